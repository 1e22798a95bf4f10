"""The MTP drafter of a model: which one belongs to it, whether the two fit, and the file that llama.cpp runs.

A drafter proposes a few tokens, and the model checks all of them in one forward: the answer stays the model's own. It
reads the model's hidden states, keys and values, so one fits a single size.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemma_qat_kit.catalog import Checkpoint, find_checkpoint
from gemma_qat_kit.checkpoint import DRAFTER_TYPES, read_config, weight_files
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError
from gemma_qat_kit.gguf.header import broken_file, read_gguf_header
from gemma_qat_kit.gguf.metadata import (
    DRAFTER_ARCHITECTURE,
    drafter_keys,
    drafter_metadata,
    model_keys,
    rope_frequencies,
)
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import Tensor, drafter_gguf_tensors, drafter_tensors, gguf_name
from gemma_qat_kit.progress import Report

NAME = "drafter"
_TRAINED_FOR_QAT = ("q4_0", "q4_0-unquantized", "w4a16", "mobile")
_CONVERTED = "drafter-q8_0.gguf"
_CHUNK_VALUES = 2**22  # a few dozen megabytes while they are rounded


def published_drafter(row: Checkpoint) -> Checkpoint:
    """Return the catalog's row of the drafter that belongs to a checkpoint: the QAT one for QAT weights.

    Raises:
        NotPublishedError: This size has none.
    """
    kind = "q4_0-unquantized" if row.format in _TRAINED_FOR_QAT else "bf16"
    return find_checkpoint(row.size, kind, role="drafter")


def matching_drafter(
    model: Path, row: Checkpoint | None, engine: str, *, token: str | None = None, report: Report | None = None
) -> Path:
    """Return the drafter of a checkpoint as its engine takes it, downloaded or converted first if need be.

    Args:
        model: The .gguf file or folder of the model.
        row: Of the catalog, whose drafter is downloaded; None takes what lies beside the model: `drafter.gguf` or a
            folder `drafter`.
        engine: llama.cpp takes a GGUF, which is made of a folder once and kept in it.
        token: Hub token.
        report: Told of the download and the conversion.

    Raises:
        BadSettingError: There is none, or it belongs to another size.
        BrokenCheckpointError: It is damaged, or no drafter.
        ExportError: Its GGUF cannot be written.
    """
    wanted = _joint(_keys(model), model)
    if row is None:
        found = _beside(model, engine)
    else:
        from gemma_qat_kit.download import download

        found = download(published_drafter(row), token=token, report=report)
    if (joint := _joint(_drafter_keys(found), found)) != wanted:
        raise BadSettingError(
            f"{found} is the drafter of another model: it reads {_words(joint)}.",
            f"This model has {_words(wanted)}.",
            "Put the drafter of this size there, or load without drafter=True.",
        )
    return _as_gguf(found, model, report) if engine == "llama_cpp" and found.is_dir() else found


def _beside(model: Path, engine: str) -> Path:
    folder = (model.parent if model.is_file() else model) / NAME
    if folder.is_dir():
        return folder
    file = folder.with_suffix(".gguf")
    if engine == "llama_cpp" and file.is_file():
        return file
    raise BadSettingError(
        f"{folder} does not exist.",
        "The drafter of a local checkpoint lies in its folder 'drafter'; for llama.cpp also as drafter.gguf.",
        "Put it there, or load without drafter=True.",
    )


def _keys(path: Path) -> dict:
    """Return llama.cpp's keys for a model's shape, from its config or GGUF."""
    if path.is_dir():
        return _described(path, model_keys)
    header = read_gguf_header(path)
    if header.architecture != "gemma4":
        raise BadSettingError(
            f"{path} is of architecture {header.architecture!r}, which has no MTP drafter.",
            "Gemma 4 has one in every size.",
            "Load it without drafter=True.",
        )
    return _unprefixed(header.metadata, "gemma4.")


def _drafter_keys(path: Path) -> dict:
    if path.is_dir():
        if read_config(path).get("model_type") not in DRAFTER_TYPES:
            raise _no_drafter(path)
        return _described(path, drafter_keys)
    header = read_gguf_header(path)
    if header.architecture != DRAFTER_ARCHITECTURE:
        raise _no_drafter(path)
    return _unprefixed(header.metadata, f"{DRAFTER_ARCHITECTURE}.")


def _described(folder: Path, keys_of) -> dict:
    try:
        return keys_of(read_config(folder))
    except (LookupError, TypeError, AttributeError) as err:
        raise broken_file(folder / "config.json", f"it does not describe a Gemma 4 model ({err!r})") from err


def _unprefixed(metadata: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _no_drafter(path: Path) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{path} is no MTP drafter.",
        f"One says model_type {' or '.join(DRAFTER_TYPES)}, in a GGUF the architecture {DRAFTER_ARCHITECTURE}.",
        "Put a drafter there, or load without drafter=True.",
    )


def _joint(keys: dict, path: Path) -> tuple[int, ...]:
    """Return what a model and its drafter must have in common: width, and keys of both kinds of layers."""
    try:
        pattern, heads = keys["attention.sliding_window_pattern"], keys["attention.head_count_kv"]
        last = [len(pattern) - 1 - pattern[::-1].index(is_sliding) for is_sliding in (True, False)]
        num_heads = [heads[layer] if isinstance(heads, list) else heads for layer in last]
        width = keys.get("embedding_length_out", keys["embedding_length"])
        return (width, num_heads[0], keys["attention.key_length_swa"], num_heads[1], keys["attention.key_length"])
    except (LookupError, TypeError, ValueError, AttributeError) as err:
        raise broken_file(path, f"it does not say what a drafter must fit ({err!r})") from err


def _words(joint: tuple[int, ...]) -> str:
    return "states of {:,} values and keys of {} x {} and {} x {}".format(*joint)


def _as_gguf(folder: Path, model: Path, report: Report | None) -> Path:
    """Return the drafter's GGUF, which lies in its folder once it has been made, or in the kit's own where nothing can
    be written there."""
    shards, place = weight_files(folder), folder
    if not os.access(folder, os.W_OK):  # a cache that a class shares
        home = Path(os.environ.get("GEMMA_QAT_KIT_HOME") or "~/.cache/gemma_qat_kit").expanduser()
        place = home / "drafters" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
    path = place / _CONVERTED
    if path.exists() and path.stat().st_mtime >= max(shard.stat().st_mtime for shard in shards):
        return path
    config, stored = read_config(folder), {}
    for shard in shards:
        stored |= _stored(shard)
    sources = {gguf_name(t.name): t for t in drafter_tensors(config) if not t.name.startswith("masked_embedding.")}
    for tensor in sources.values():
        if (found := stored.get(tensor.name, ("none", 0, 0))[1]) != tensor.nbytes:
            raise broken_file(folder, f"its tensor {tensor.name} has {found:,} bytes and not {tensor.nbytes:,}")

    def data(tensor: Tensor) -> Iterator[np.ndarray]:
        if tensor.name not in sources:
            return iter([np.array(list(rope_frequencies(config)), np.float32)])
        return _rounded(stored[sources[tensor.name].name], tensor)

    tensors = ((tensor, lambda tensor=tensor: data(tensor)) for tensor in drafter_gguf_tensors(config))
    write_gguf(path, drafter_metadata(config, model), tensors, overwrite=True, report=report)
    return path


def _stored(file: Path) -> dict[str, tuple[Path, int, int]]:
    """Return for each bfloat16 tensor of a safetensors file: the file, the tensor's bytes and the first of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks the header
            pass
    except SafetensorError as err:
        raise broken_file(file, f"it is damaged or cut short ({err})") from err
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "BF16":
            start, stop = entry["data_offsets"]
            found[name] = file, stop - start, 8 + length + start
    return found


def _rounded(stored: tuple[Path, int, int], tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor's rows in its type of the GGUF, some at a time."""
    import gguf

    file, nbytes, start = stored
    kind, width = gguf.GGMLQuantizationType[tensor.dtype], tensor.shape[-1]
    rows = np.memmap(file, np.uint16, "r", start, (nbytes // 2 // width, width))
    step = max(1, _CHUNK_VALUES // width)
    for first in range(0, len(rows), step):
        # bfloat16 is the upper half of float32
        values = (rows[first : first + step].astype(np.uint32) << 16).view(np.float32)
        yield values if tensor.dtype == "F32" else gguf.quants.quantize(values, kind)
