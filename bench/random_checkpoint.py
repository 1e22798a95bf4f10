"""Write a checkpoint of real size and layout with random weights, a few megabytes at a time.

    python bench/random_checkpoint.py E2B mobile /tmp/e2b-mobile
    python bench/random_checkpoint.py E2B bf16 /tmp/e2b-short --layers 5    # the first layers of it

Sizes, names and dtypes are the published ones, so memory and speed are too; what it says is nonsense. Its tokenizer is
the tiny one of `gemma_qat_kit.testing`.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemma_qat_kit.architectures import drafter_config, hf_config
from gemma_qat_kit.gguf.metadata import Vocabulary, drafter_metadata, gemma_metadata
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import (
    GROUP_BYTES,
    Tensor,
    bf16_tensors,
    drafter_gguf_tensors,
    gguf_tensors,
    mobile_tensors,
    w4a16_tensors,
)
from gemma_qat_kit.testing import CHAT_TEMPLATE, tiny_tokenizer, write_settings

CHUNK_BYTES = 2**26
_TENSORS = {"bf16": bf16_tensors, "w4a16": w4a16_tensors, "mobile": mobile_tensors}


def write_random_checkpoint(folder: Path, size: str, format: str, num_layers: int | None = None) -> Path:
    """Write the checkpoint, or the one of its first layers, and return the path to load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(size, format if format in ("mobile", "w4a16") else "bf16")
    if num_layers:
        text = config["text_config"]
        text |= {"num_hidden_layers": num_layers, "layer_types": text["layer_types"][:num_layers]}
        text["num_kv_shared_layers"] = 0
    if format == "q4_0":
        return _write_gguf(folder / f"{size}-q4_0.gguf", config)
    tensors = list(_TENSORS[format](config))
    header, start = {}, 0
    for tensor in tensors:
        offsets = [start, start + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        shapes = {t.name.removesuffix("packed"): (t.shape[0], 8 * t.shape[1]) for t in tensors if t.dtype == "I32"}
        for tensor in tensors:
            if tensor.name.endswith("weight_shape"):
                file.write(np.array(shapes[tensor.name.removesuffix("shape")], np.int64).tobytes())
                continue
            for chunk in random_bytes(tensor):
                file.write(chunk)
    write_settings(folder, config)
    return folder


def random_bytes(tensor: Tensor) -> Iterator[bytes]:
    """Yield the bytes of one tensor: random codes, small scales, norms near 1, weights that keep activations tame."""
    left = tensor.nbytes
    while left:
        count = min(left, CHUNK_BYTES)
        yield _random_chunk(tensor, count)
        left -= count


def _random_chunk(tensor: Tensor, count: int) -> bytes:
    random = np.random.default_rng(len(tensor.name))
    if tensor.dtype in ("U8", "I8", "I32"):
        return random.bytes(count)
    values = random.standard_normal(count // (4 if tensor.dtype == "F32" else 2), dtype=np.float32)
    if tensor.name.endswith("activation_scale"):
        values = np.zeros_like(values)  # not calibrated
    elif "scale" in tensor.name.rsplit(".", 1)[-1]:
        values = 0.005 + 0.001 * np.abs(values)
    elif len(tensor.shape) < 2 or "norm" in tensor.name:
        values = 1 + 0.1 * values
    else:
        values *= 0.02
    return (values if tensor.dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes()


def _write_gguf(path: Path, config: dict) -> Path:
    vocabulary = Vocabulary.from_tokenizer_json(json.loads(tiny_tokenizer().to_str()), CHAT_TEMPLATE)
    metadata = gemma_metadata(config, vocabulary.filled(config["text_config"]["vocab_size"]))
    write_gguf(path, metadata, ((t, lambda t=t: [gguf_data(t)]) for t in gguf_tensors(config)), overwrite=True)
    return path


def write_random_drafter(path: Path, size: str, model: Path) -> Path:
    """Write the GGUF of a drafter with random weights for the GGUF of a model, and return its path."""
    config = drafter_config(size)
    tensors = ((t, lambda t=t: [gguf_data(t)]) for t in drafter_gguf_tensors(config))
    write_gguf(path, drafter_metadata(config, model), tensors, overwrite=True)
    return path


def gguf_data(tensor: Tensor) -> np.ndarray:
    """Return one tensor's bytes for a GGUF: random codes with a scale that keeps activations tame."""
    random = np.random.default_rng(len(tensor.name))
    if tensor.dtype == "F32":
        return 1 + 0.1 * random.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.dtype == "BF16":
        values = 0.02 * random.standard_normal(tensor.shape, dtype=np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    group_bytes, group_size = GROUP_BYTES[tensor.dtype]
    scale_at, scale = {"Q4_0": (0, 2e-3), "Q6_K": (208, 2e-5), "Q8_0": (0, 3e-4)}[tensor.dtype]
    row = math.prod(tensor.shape[-1:]) // group_size * group_bytes
    block = np.frombuffer(random.bytes(min(tensor.nbytes, CHUNK_BYTES // group_bytes * group_bytes)), np.uint8)
    data = np.resize(block, (tensor.nbytes // group_bytes, group_bytes))
    data[:, scale_at : scale_at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return data.reshape(*tensor.shape[:-1], row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size")
    parser.add_argument("format", choices=[*_TENSORS, "q4_0"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="how many of its layers; all of them by default")
    arguments = parser.parse_args()
    print(write_random_checkpoint(arguments.folder, arguments.size, arguments.format, arguments.layers))
