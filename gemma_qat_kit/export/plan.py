"""Match a model's weights with what a GGUF of it must hold: which weight becomes which tensor, of which type.

Names, shapes and types are checked here, before anything is written; data are read when the writer asks for them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError
from gemma_qat_kit.export.blueprint import published_names, read_blueprint
from gemma_qat_kit.export.reblock import MobileWeight, ScaleTally, check_groups, mobile_weight, reblocked, same_values
from gemma_qat_kit.export.rounding import Rounding, check_floats, check_width
from gemma_qat_kit.formats.q4_0_grid import GridFit
from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.gguf.writer import Data
from gemma_qat_kit.layouts import Tensor, gguf_dtype
from gemma_qat_kit.weights import Weight, Weights, missing

_TABLE, _HEAD = "token_embd.weight", "output.weight"
_OF_MOBILE = ("_activation_scale", "_cache_scale", ".weight_scale", ".embedding_scale")


class GgufPlan:
    """A GGUF that is ready to be written.

    Args:
        weights: Of the model.
        format: One of `layouts.GGUF_FORMATS`.
        like: Folder or GGUF that has the config and tokenizer; None takes what the weights were loaded from.
        importance: Mean squared inputs, float32 (in,), by weight or module name.

    Raises:
        BadSettingError: Nothing says what the file must hold, or a setting that does not go with these weights.
        BadTensorError: Rows that do not divide into groups, or values that are no floats.
        BrokenCheckpointError: Tensors are missing or have other shapes, or the config or tokenizer cannot be read.
    """

    def __init__(
        self,
        weights: Weights,
        format: str,
        *,
        like: Path | None = None,
        importance: Mapping[str, torch.Tensor] | None = None,
        device: str = "cuda",
    ):
        self._format, self._tally, self._device = format, ScaleTally(), device
        names = published_names(weights.tensors)
        self._named = {name: weights.tensors[original] for original, name in names.items()}
        self._blueprint = read_blueprint(_origin(weights, like), self._named, format)
        self._rounding = Rounding(_by_module(importance or {}, names, format))
        sources = self._blueprint.sources
        if lacking := [name for name in sources.values() if self._stored(name) is None]:
            raise missing(weights, lacking)
        self._parts = {t.name: self._part(sources[t.name], t) for t in self._blueprint.tensors}
        if _HEAD not in self._parts and (head := self._own_head()) is not None:
            self._parts[_HEAD] = head
        if self._is_mobile:
            _check_mobile(weights, format, importance)
            for part in self._parts.values():
                if format == "q4_0" and isinstance(part, MobileWeight):
                    check_groups(part)

    @property
    def metadata(self) -> Metadata:
        """The file's keys."""
        return self._blueprint.metadata

    @property
    def _is_mobile(self) -> bool:
        return any(isinstance(part, MobileWeight) for part in self._parts.values())

    def _stored(self, name: str) -> Weight | None:
        """Return a tensor by its own name, or the packed codes of a mobile embedding."""
        return self._named.get(name) or self._named.get(name.removesuffix(".weight") + ".embedding_quantized")

    def _part(self, name: str, tensor: Tensor) -> Weight | MobileWeight:
        """Return the weight of a tensor, checked, its rows in llama.cpp's order."""
        weight, module = self._stored(name), name.removesuffix(".weight")
        scale = self._named.get(module + ".weight_scale") or self._named.get(module + ".embedding_scale")
        num_heads = self._blueprint.num_heads.get(tensor.name)
        order = rotary_order(weight.num_rows, num_heads) if num_heads else None
        if scale is not None:
            found = mobile_weight(weight, scale, tensor.shape, self._device)
            return found if order is None else found.reordered(order)
        check_floats(weight)
        if weight.shape != tensor.shape:
            raise BrokenCheckpointError(
                f"{weight.name} has the shape {weight.shape}.",
                f"The model's description makes it {tensor.shape}.",
                "Export it with the config that belongs to these weights.",
            )
        check_width(weight, tensor)
        return weight if order is None else weight.reordered(order)

    def _own_head(self) -> Weight | MobileWeight | None:
        """Return the head where it is not the embedding."""
        if self._blueprint.is_tied or "lm_head.weight" not in self._named:
            return None
        embedding = self._parts[_TABLE]
        head = self._part("lm_head.weight", Tensor(_HEAD, gguf_dtype(_HEAD, embedding.shape), embedding.shape))
        if type(head) is not type(embedding):
            return head
        is_same = head.equals(embedding) if isinstance(head, MobileWeight) else same_values(head, embedding)
        return None if is_same else head

    def tensors(self) -> Iterator[tuple[Tensor, Data]]:
        """Yield every tensor of the file with what gives its data."""
        for name, value in self._blueprint.constants.items():
            yield Tensor(name, "F32", value.shape), lambda value=value: [value]
        for name, part in self._parts.items():
            tensor = Tensor(name, self._dtype(name, part), part.shape)
            yield tensor, lambda part=part, tensor=tensor: self._data(part, tensor)

    def _dtype(self, name: str, part: Weight | MobileWeight) -> str:
        trained_for = part.ggml_type if isinstance(part, MobileWeight) else part.kind
        keeps_codes = trained_for is not None and self._format == "q4_0"
        return trained_for if keeps_codes else gguf_dtype(name, part.shape, self._format)

    def _data(self, part: Weight | MobileWeight, tensor: Tensor) -> Iterator[np.ndarray]:
        if not isinstance(part, MobileWeight):
            if part.kind == tensor.dtype:
                return _blocks(part)
            name = self._blueprint.sources.get(tensor.name, "lm_head.weight")
            return self._rounding.rounded(part, tensor.dtype, name.removesuffix(".weight"))
        if self._format == "q4_0":
            return reblocked(part, self._tally)
        return self._rounding.rounded(part.dequantized(), tensor.dtype)

    def num_tensors(self) -> dict[str, int]:
        """Return the tensors of each type, most first."""
        kinds = [tensor.dtype for tensor, _ in self.tensors()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)}

    def fit(self) -> GridFit | None:
        """Return how much of a Q4_0 grid was kept of what was written, None where nothing was rounded to it."""
        return GridFit.sum(self._rounding.fits) if self._rounding.fits else None

    def notes(self) -> Iterator[str]:
        """Yield what the file, once it is written, does not hold or holds otherwise than its source."""
        if any(_is_for_media(name) for name in self._named):
            yield "What sees and hears is left out: llama.cpp reads it from a file of its own (mmproj)."
        if "tokenizer.chat_template" not in self.metadata.keys:
            yield "There is no chat template beside the tokenizer, so there is none in the file."
        if self._is_mobile:
            yield from self._mobile_notes()
        if (fit := self.fit()) is not None and fit.share_on_grid < 0.5:
            yield "Most of these weights lie on no Q4_0 grid, so they are not QAT weights; the plain rule rounded them."
        if unused := self._unused():
            yield f"{len(unused):,} tensors have no place in a GGUF and are left out, such as {unused[0]}."

    def _mobile_notes(self) -> Iterator[str]:
        if ranges := self._num_ranges():
            yield (
                f"The static int8 ranges of {ranges:,} layers are lost: a GGUF has no place for them, and llama.cpp "
                "rounds activations by ranges that it measures as it goes."
            )
        if self._tally.num_small:
            yield (
                f"{self._tally.num_small:,} of {self._tally.num_scales:,} scales are so small that float16 keeps fewer "
                f"of their digits; they moved by {self._tally.largest_loss:.1e} at most."
            )

    def _num_ranges(self) -> int:
        """Return how many of the linears in the file have calibrated input or output ranges."""
        modules = {name.removesuffix(".weight") for name in self._blueprint.sources.values()}
        scales = {name.removesuffix(f".{side}_activation_scale"): weight for name, weight in self._named.items()
                  for side in ("input", "output") if name.endswith(f".{side}_activation_scale")}  # fmt: skip
        return sum(1 for module in modules & scales.keys() if scales[module].read(0, 1).any())

    def _unused(self) -> list[str]:
        used = {*self._blueprint.sources.values(), *self._blueprint.known, "lm_head.weight"}
        used |= {name.removesuffix(".weight") + ".embedding_quantized" for name in used}
        rest = [name for name in self._named if name not in used and not name.endswith(_OF_MOBILE)]
        return [name for name in rest if not _is_for_media(name)]


def _blocks(part: Weight) -> Iterator[np.ndarray]:
    """Yield the blocks that a weight was trained for, some rows at a time."""
    for start, values in part.chunks():
        yield part.read_blocks(start, start + len(values)).numpy()


def _is_for_media(name: str) -> bool:
    return "vision" in name or "audio" in name


def rotary_order(num_rows: int, num_heads: int) -> torch.Tensor:
    """Return where llama.cpp's rows of a query or key projection come from: it pairs neighbours, where transformers
    pairs a head's first half with its second.

    Source: `LlamaModel.permute` in llama.cpp's converter.
    """
    return torch.arange(num_rows).view(num_heads, 2, -1).transpose(1, 2).reshape(-1)


def _origin(weights: Weights, like: Path | None) -> Path:
    if like is not None:
        return like
    if weights.origin is None:
        raise BadSettingError(
            f"Nothing says which config and tokenizer belong to {weights.what}.",
            "A GGUF holds both; a folder or another GGUF of the model has them.",
            "Pass its path: like=folder.",
        )
    return weights.origin


def _by_module(importance: Mapping[str, torch.Tensor], names: dict[str, str], format: str) -> dict[str, torch.Tensor]:
    """Return the importance by the published names of the modules."""
    if importance and format != "q4_0":
        raise BadSettingError(
            f"An importance matrix changes nothing in {format}.",
            "It decides how weights are rounded to q4_0.",
            "Leave it out.",
        )
    modules = {name.removesuffix(".weight"): published.removesuffix(".weight") for name, published in names.items()}
    modules |= {published: published for published in modules.values()}
    found = {}
    for name, values in importance.items():
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            raise BadSettingError(
                f"The importance matrix names {name!r}, which is no weight of this model.",
                f"Its names are those of the weights, such as {next(iter(modules), '')!r}.",
                "Collect it from this model.",
            )
        found[module] = values
    return found


def _check_mobile(weights: Weights, format: str, importance: Mapping | None) -> None:
    if format == "q8_0" or importance:
        raise BadSettingError(
            f"{weights.what} holds mobile codes, which are kept as they are.",
            'format="q4_0" puts them into the groups that hold them exactly; "bf16" and "float32" write their values.',
            'Take format="q4_0", without an importance matrix.',
        )
