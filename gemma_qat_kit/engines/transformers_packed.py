"""A Gemma 4 whose linears stay in Q4_0 blocks: read from a Q4_0 GGUF, or packed while a 16-bit checkpoint is read.

On a CPU the blocks are pages of the GGUF itself. transformers has no way to such a model: its own `gguf_file=`
dequantizes everything. So the network is built without weights and filled here, one tensor after the other.
"""

from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from gemma_qat_kit.checkpoint import read_config, weight_files
from gemma_qat_kit.engines.packed import EXPERTS, PackedExperts, PackedLinear, blocks_of
from gemma_qat_kit.engines.transformers_config import load_config, make_config, without_towers
from gemma_qat_kit.engines.transformers_table import NAME as TABLE
from gemma_qat_kit.engines.transformers_table import HostTable, left_out, stored_table
from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.formats.blocks import Blocks
from gemma_qat_kit.gguf.config import gemma_config
from gemma_qat_kit.gguf.header import GgufTensor, read_gguf_header
from gemma_qat_kit.gguf.tokenizer import gemma_tokenizer
from gemma_qat_kit.layouts import bf16_tensors, gguf_dtype, gguf_name, is_text
from gemma_qat_kit.progress import Progress, Report

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(Protocol):
    """Where tensors come from."""

    config: dict

    def tensor(self, name: str) -> torch.Tensor | Blocks | None:
        """Return a tensor by its name in a bf16 checkpoint, as it is stored; None where there is none."""


def load_packed(
    path: Path, *, dtype: torch.dtype, device: torch.device, per_layer_table: str, report: Report | None = None
) -> tuple:
    """Return the model and its tokenizer.

    Args:
        path: A GGUF in Q4_0, or a folder with 16-bit weights.
        dtype: Of everything that is no block.
        device: Where it computes.
        per_layer_table: As in `load`.
        report: Told how many tensors are there; may stop the load by raising.

    Raises:
        BrokenCheckpointError: A tensor or a key is missing, or has another shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_gguf = path.suffix == ".gguf"
    source = _GgufSource(path) if is_gguf else _FolderSource(path)
    config = without_towers(make_config(source.config, path)) if is_gguf else load_config(path, text_only=True)
    with init_empty_weights(include_buffers=False), left_out() as tables:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = str(path)
    filler = _Filler(model, tables, dtype, device, per_layer_table)
    wanted = [(t.name, t.shape) for t in bf16_tensors(source.config, has_shared_kv=False) if is_text(t.name)]
    for done, (name, shape) in enumerate(wanted):
        if report:
            report(Progress("loading", done, len(wanted), "tensors"))
        filler.fill(name, _whole(path, name, source.tensor(name), shape))
    if not is_gguf:
        filler.fill_table(stored_table(path, is_copied=per_layer_table != "disk"))
    filler.fill_head(source.tensor("lm_head.weight"))
    filler.finish()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise _wrong(path, f"{len(missing)} are missing, the first is {missing[0]}")
    return model.eval(), gemma_tokenizer(path) if is_gguf else AutoTokenizer.from_pretrained(path)


def _whole(path: Path, name: str, value: torch.Tensor | Blocks | None, shape: tuple[int, ...]):
    if value is None:
        raise _wrong(path, f"{name} is missing")
    if tuple(value.shape) != shape:
        raise _wrong(path, f"{name} has the shape {tuple(value.shape)} instead of {shape}")
    return value


class _GgufSource:
    """The tensors of a GGUF, as pages of the file."""

    def __init__(self, path: Path):
        header = read_gguf_header(path)
        self.config = gemma_config(path, header)
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def tensor(self, name: str) -> torch.Tensor | Blocks | None:
        """Return what lies in the file."""
        found = self._tensors.get(gguf_name(name))
        return None if found is None else self._view(found)

    def _view(self, found: GgufTensor) -> torch.Tensor | Blocks:
        from gguf import GGMLQuantizationType

        kind = GGMLQuantizationType(found.ggml_type).name
        data = self._data[found.start : found.start + found.nbytes]
        if kind in _FLOATS:
            return data.view(_FLOATS[kind]).reshape(found.shape)
        return Blocks(kind, found.shape, data.reshape(*found.shape[:-1], -1))


class _FolderSource:
    """The tensors of a 16-bit checkpoint; its linears are packed as they are asked for."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self._files = [safe_open(path, framework="pt") for path in weight_files(folder)]
        self._places = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> torch.Tensor | Blocks | None:
        """Return what lies in the file, or its blocks where Google's Q4_0 files have Q4_0."""
        if name not in self._places or TABLE in name:
            return torch.empty(self._shape(name), device="meta") if name in self._places else None
        value = self._places[name].get_tensor(name)
        is_packed = name != "lm_head.weight" and gguf_dtype(gguf_name(name), tuple(value.shape)) == "Q4_0"
        return Blocks("Q4_0", tuple(value.shape), blocks_of(value, None, name)) if is_packed else value

    def _shape(self, name: str) -> list[int]:
        return self._places[name].get_slice(name).get_shape()


class _Filler:
    """Puts tensors into a network that has none."""

    def __init__(self, model: nn.Module, tables: list, dtype: torch.dtype, device: torch.device, table_place: str):
        self._model, self._tables = model, tables
        self._dtype, self._device, self._table_place = dtype, device, table_place
        self._experts: dict[str, dict[str, torch.Tensor]] = {}

    def fill(self, name: str, value: torch.Tensor | Blocks) -> None:
        """Put a tensor where it belongs, by its name in a bf16 checkpoint."""
        path, _, last = name.rpartition(".")
        part = self._model.get_submodule(path)
        if TABLE in name:
            self._fill_blocks(value)
        elif isinstance(value, Blocks) and value.kind == "Q4_0" and isinstance(part, nn.Linear):
            self._replace(path, PackedLinear(value.blocks.to(self._device), self._dtype))
        elif isinstance(value, Blocks) and value.kind == "Q4_0" and last in EXPERTS:
            self._fill_experts(path, part, last, value.blocks)
        else:
            self._set(part, last, value)

    def _set(self, part: nn.Module, last: str, value: torch.Tensor | Blocks) -> None:
        if isinstance(value, Blocks):  # a table; what it stands for is multiplied, its blocks ship
            part.quantized = {last: value}
            value = value.dequantize(self._dtype)
        value = value.to(self._device, self._dtype)
        if last in part._buffers:
            part._buffers[last] = value.clone()
        else:
            setattr(part, last, nn.Parameter(value, requires_grad=False))

    def _fill_experts(self, path: str, part: nn.Module, last: str, blocks: torch.Tensor) -> None:
        both = self._experts.setdefault(path, {})
        both[last] = blocks.to(self._device)
        if len(both) == len(EXPERTS):
            self._replace(path, PackedExperts(*(both[name] for name in EXPERTS), part.act_fn))

    def _fill_blocks(self, value: torch.Tensor | Blocks) -> None:
        if isinstance(value, Blocks):
            place = {"disk": None, "cpu": "cpu", "memory": self._device}[self._table_place]
            blocks = value.blocks if place is None else value.blocks.to(place, copy=True)
            self._tables[0].fill_blocks(Blocks(value.kind, value.shape, blocks))

    def fill_table(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put the per-layer table of a folder in."""
        for table in self._tables:
            table.fill(tensors)
            if self._table_place == "memory":
                table.to(self._device)

    def fill_head(self, value: torch.Tensor | Blocks | None) -> None:
        """Put the head in, which is the embedding where there is none."""
        if value is None or self._model.config.get_text_config().tie_word_embeddings:
            self._model.lm_head.weight = self._model.get_input_embeddings().weight
        else:
            self._set(self._model.lm_head, "weight", value)

    def finish(self) -> None:
        """Put what transformers computes itself, such as rotary frequencies, onto the device."""
        for part in self._model.modules():
            if not isinstance(part, HostTable):
                part._buffers |= {name: value.to(self._device) for name, value in part._buffers.items()}

    def _replace(self, path: str, new: nn.Module) -> None:
        parent, _, last = path.rpartition(".")
        setattr(self._model.get_submodule(parent), last, new)


def _wrong(path: Path, what: str) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"The tensors in {path} are not those of a Gemma 4: {what}.",
        "Every tensor of the architecture must be there, in its shape.",
        "Download it again.",
    )
