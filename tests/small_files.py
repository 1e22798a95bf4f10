"""Checkpoints of a few hundred bytes, byte by byte: what the header readers and `inspect_checkpoint` are tested on."""

import json
import shutil
import struct

import numpy as np
from safetensors.numpy import save_file

U32, STRING, ARRAY = 4, 8, 9  # GGUF's types of values
GEMMA = {"model_type": "gemma4", "text_config": {"hidden_size": 8, "num_hidden_layers": 1}}


def text(value):
    """A GGUF string."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    """A GGUF key with its value."""
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, shape=(8,), kind=0, offset=0, num_axes=None):
    """A GGUF tensor's description; the shape is ggml's order, fastest axis first."""
    axes = struct.pack("<I", len(shape) if num_axes is None else num_axes) + struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def gguf_bytes(keys=(), tensors=(), *, version=3, num_keys=None, num_tensors=None, data=bytes(1024)):
    """A GGUF file."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors]) + data


def write_gguf(path, architecture="gemma4", kind=2, keys=()):
    """Write a GGUF with one 1 x 256 matrix of a ggml type and return its path."""
    keys = [key("general.architecture", STRING, text(architecture)), *keys]
    path.write_bytes(gguf_bytes(keys, [tensor("blk.0.x", (256, 1), kind)]))
    return path


def write_folder(path, config=GEMMA, name="model.safetensors", dtype=np.float32):
    """Write a folder with a config.json, and 8 text and 4 vision values under `name`; return the folder."""
    path.mkdir(exist_ok=True)
    if name:
        values = {"model.language_model.norm.weight": np.ones(8, dtype), "model.vision_tower.x": np.ones(4, dtype)}
        save_file(values, path / name)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def copy_of(folder, tmp_path):
    """Return a copy of a checkpoint folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def change_config(folder, change):
    """Let a function change the content of a folder's config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
