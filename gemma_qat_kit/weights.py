"""Where weights come from: a checkpoint folder, a loaded model or a state dict, each read a few rows at a time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemma_qat_kit.checkpoint import inspect_checkpoint, weight_files
from gemma_qat_kit.errors import BadSettingError, BadTensorError, BrokenCheckpointError, KitError, ModelClosedError
from gemma_qat_kit.formats.blocks import Blocks, dequantized
from gemma_qat_kit.gguf.header import broken_file
from gemma_qat_kit.model import Model
from gemma_qat_kit.qat.stored import stored

CHUNK_VALUES = 2**24  # of a tensor at a time: 32 MiB of bfloat16, and what is made of it stays well below a gigabyte
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8,
           "I32": torch.int32, "I64": torch.int64}  # fmt: skip
_ROUNDED = ("w4a16", "nf4", "int8")  # on grids of their own


@dataclass(frozen=True)
class Weight:
    """One tensor that can be read in parts.

    Attributes:
        name: As its source calls it.
        dtype: Of its values.
        shape: The last axis is the input axis; the others together are its rows.
        read: Takes a first row and the one after the last, returns them as (rows, in) in this machine's memory.
        kind: ggml's name of a type that the weight was trained for; its blocks are there already.
        read_blocks: Reads those like `read`, uint8 (rows, bytes of a row).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    kind: str | None = None
    read_blocks: Callable[[int, int], torch.Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all leading axes together."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Values in a row."""
        return self.shape[-1] if self.shape else 1

    def chunks(self, codes_each: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield its rows in order, `CHUNK_VALUES` at a time, each part with the number of its first row; where values
        are packed, `codes_each` to a byte, so many fewer bytes."""
        step = max(1, CHUNK_VALUES // codes_each // self.width)
        for start in range(0, self.num_rows, step):
            yield start, self.read(start, min(start + step, self.num_rows))

    def reordered(self, order: torch.Tensor) -> "Weight":
        """Return it with its rows in another order, int64 (rows,); rows that are neighbours should stay close."""

        def reordered(read: Callable | None) -> Callable | None:
            def read_wanted(start: int, stop: int) -> torch.Tensor:
                wanted = order[start:stop]
                first, last = int(wanted.min()), int(wanted.max())
                return read(first, last + 1)[wanted - first]

            return read and read_wanted

        return replace(self, read=reordered(self.read), read_blocks=reordered(self.read_blocks))


@dataclass(frozen=True)
class Weights:
    """All tensors of a model.

    Attributes:
        what: How to call their source in a sentence.
        tensors: By name.
        origin: The folder or GGUF that they were loaded from, which has the config and tokenizer; None if unknown.
    """

    what: str
    tensors: dict[str, Weight]
    origin: Path | None


def find_weights(source: object) -> Weights:
    """Return the weights of a checkpoint folder, a loaded model, a torch module or a state dict.

    Raises:
        BadSettingError: It is none of these, or its weights were rounded to a grid of their own already.
        BrokenCheckpointError: The folder is incomplete or damaged.
        ModelClosedError: The model was closed.
    """
    if isinstance(source, str | Path):
        return _in_folder(source)
    if isinstance(source, Model):
        return _of_model(source)
    if isinstance(source, torch.nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return _of_state("the state dict", source, None)
    raise BadSettingError(
        f"{type(source).__name__} holds no weights.",
        "A checkpoint folder, a model of gqk.load, a torch module or a state dict does.",
        "Pass one of these.",
    )


def _in_folder(source: str | Path) -> Weights:
    found = inspect_checkpoint(source)
    if found.engine == "llama_cpp":
        raise _is_a_gguf(found.path)
    if found.format in _ROUNDED:
        raise _is_rounded(str(found.path), found.format)
    tensors = {weight.name: weight for file in weight_files(found.path) for weight in _stored(file)}
    return Weights(str(found.path), tensors, found.path)


def _of_model(model: Model) -> Weights:
    if model.engine == "llama_cpp":
        raise _is_a_gguf(model.name)
    if model.format in _ROUNDED:
        raise _is_rounded(model.name, model.format)
    if model.is_closed:
        raise ModelClosedError("This model is closed.", "A closed model has no weights.", "Load it again.")
    module, origin = model.hf[0], getattr(model.runner, "path", None)
    return replace(_of_module(module), what=model.name, origin=origin)


def _of_module(module: torch.nn.Module) -> Weights:
    name = getattr(module, "name_or_path", "")  # of a transformers model: where it was loaded from
    origin = Path(name) if name and Path(name).exists() else None
    ships = stored(module)
    found = _of_state(f"the {type(module).__name__}", ships.state, origin)
    for name, value in ships.blocks.items():
        read = _in_memory(name, value.blocks).read
        weight = found.tensors.get(name) or _unpacked(name, value)
        found.tensors[name] = replace(weight, kind=value.kind, read_blocks=read)
    return found


def _of_state(what: str, state: Mapping, origin: Path | None) -> Weights:
    tensors = {name: _in_memory(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if any(name.endswith(".weight_packed") for name in tensors):
        raise _is_rounded(what, "w4a16")
    return Weights(what, tensors, origin)


def _unpacked(name: str, value: Blocks) -> Weight:
    """Return the weight of blocks that are all that is in memory."""
    rows = value.blocks.detach().reshape(-1, value.blocks.shape[-1])
    return Weight(name, torch.float32, value.shape, lambda start, stop: dequantized(rows[start:stop].cpu(), value.kind))


def _in_memory(name: str, tensor: torch.Tensor) -> Weight:
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1) if tensor.numel() else tensor

    def read(start: int, stop: int) -> torch.Tensor:
        if rows.is_meta:
            raise BadTensorError(
                f"{name} has no values: it is on the 'meta' device.",
                "Every weight must be in memory.",
                "Load the model without offloading, or export its folder.",
            )
        return rows[start:stop].cpu()

    return Weight(name, tensor.dtype, tuple(tensor.shape), read)


def _stored(file: Path) -> Iterator[Weight]:
    """Yield the tensors of a safetensors file whose header was checked; they are read, not mapped, so that the memory
    that a process holds does not grow with the file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start = 8 + length + entry["data_offsets"][0]
            yield _on_disk(file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)


def _on_disk(file: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], first_byte: int) -> Weight:
    width = shape[-1] if shape else 1

    def read(start: int, stop: int) -> torch.Tensor:
        values = torch.empty((stop - start, width), dtype=dtype)
        target = memoryview(values.view(torch.uint8).numpy()).cast("B")
        with file.open("rb", buffering=0) as stream:
            stream.seek(first_byte + start * width * dtype.itemsize)
            while target and (count := stream.readinto(target)):
                target = target[count:]
        if target:
            raise broken_file(file, f"it ends in the middle of {name}")
        return values

    return Weight(name, dtype, shape, read)


def _is_a_gguf(what: object) -> BadSettingError:
    return BadSettingError(
        f"{what} is a GGUF already.",
        "An export starts from safetensors or a model in transformers.",
        "Use the file as it is, or export the 16-bit checkpoint that it was made from.",
    )


def _is_rounded(what: str, format: str) -> BadSettingError:
    return BadSettingError(
        f"The weights of {what} are {format}, a grid of its own.",
        "To round them a second time would lose quality twice; bf16, q4_0-unquantized and mobile can be exported.",
        "Export the q4_0-unquantized checkpoint of this size.",
    )


def missing(weights: Weights, names: list[str]) -> KitError:
    """Build the error for tensors that the weights do not have."""
    return BrokenCheckpointError(
        f"{weights.what} lacks {names[0]}" + (f" and {len(names) - 1:,} more tensors." if len(names) > 1 else "."),
        "Every tensor of the architecture must be there, under the name of the published checkpoints.",
        "Download it again; merge adapters into the model before exporting it.",
    )
