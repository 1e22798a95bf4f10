"""Post-training quantization of a whole model, for as long as a `with` block lasts: what each format would cost it.

The weights are replaced by what the format keeps of them, so the model computes at its usual speed and precision, and
only the rounding of the weights shows. Nothing is trained.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.formats.quantized import FORMATS, Quantized, quantize
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.scoring import ModuleScorer, cut_windows, scorer_of

METHODS = ("q8_0", "q4_0", "q4_0+importance", "q4_0+grid", *(f for f in FORMATS if f not in ("q8_0", "q4_0")))
"""Ways to quantize: a format; Q4_0 by llama.cpp's rule with importance; Q4_0 that keeps the grid of QAT weights."""

_WINDOW = 512  # tokens that importance is collected over at a time, llama.cpp's own default
_EXPERTS = ("gate_up_proj", "down_proj")
# Parts of a name that say no: what Google's own Q4_0 files keep in more bits, and the towers with their projectors.
_KEPT = ("lm_head", "embed", "vision", "audio", "router", "per_layer_model_projection")


@dataclass(frozen=True)
class QuantizedSize:
    """What the quantized weights take as a file stores them, scales included."""

    nbytes: int
    num_weights: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.nbytes / self.num_weights


def linears(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that get quantized, by name: the matrices of a language model's layers.

    Embeddings and head, the router of a mixture of experts, the projection of the per-layer embeddings and the towers
    keep their precision, as in Google's Q4_0 files. Experts, (experts, out, in), are one weight.

    Raises:
        BadSettingError: There is none, or they are quantized already.
    """
    found = {}
    for name, part in module.named_modules():
        if any(word in name for word in _KEPT):
            continue
        if isinstance(part, nn.Linear):
            found[f"{name}.weight"] = getattr(part, "weight", None)  # packed under other names in w4a16
        elif name.endswith("experts"):
            found |= {f"{name}.{last}": getattr(part, last) for last in _EXPERTS if hasattr(part, last)}
    if not found or not all(weight is not None and weight.is_floating_point() for weight in found.values()):
        raise BadSettingError(
            f"{type(module).__name__} has {'quantized' if found else 'no'} linear layers.",
            "Post-training quantization starts from layers in float32, bfloat16 or float16.",
            'Load the model in such a format, as in gqk.load("smollm2-135m", "float32").',
        )
    return found


def collect_importance(
    model, text: str | Path | None = None, *, max_tokens: int = 4096, report: Report | None = None
) -> dict[str, torch.Tensor]:
    """Return the mean square of every input of each linear layer over a text: llama.cpp's importance matrix.

    Rounding a weight costs its error times what it is multiplied with, so the large inputs are where care pays.

    Args:
        model: A model of `gqk.load` that runs in transformers, or a pair (transformers module, tokenizer).
        text: As in `perplexity`; None takes "calibration", which shares no paragraph with the text measured by default.
        max_tokens: Tokens of the text to take.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar.

    Returns:
        Name of a weight, as in `linears`, to float32 (in,); of experts, over all tokens that any of them got.

    Raises:
        BadSettingError: Another engine runs the model, it is quantized already, or there is no such text.
    """
    module, scorer = module_of(model), scorer_of_module(model)
    windows = cut_windows(scorer, texts.read("calibration" if text is None else text), window=_WINDOW,
                          max_tokens=max_tokens)  # fmt: skip
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + torch.linalg.vector_norm(rows, dim=0).square()
        counts[name] = counts.get(name, 0) + len(rows)

    done, total = 0, sum(map(len, windows))
    with nullcontext(report) if report else progress_bar() as shown, _watched(module, add), torch.inference_mode():
        for ids in windows:
            shown(Progress("collecting importance", done, total, "tokens"))
            module.base_model(torch.tensor([ids], device=module.device))  # without the head, whose words nobody needs
            done += len(ids)
        shown(Progress("collecting importance", done, total, "tokens"))
    return {name: (sums[name] / counts[name]).cpu() for name in linears(module) if name in sums}


@contextmanager
def _watched(module: nn.Module, add) -> Iterator[None]:
    """Show the inputs of each linear layer to `add(name of the weight, inputs)`."""
    names, hooks = linears(module), []
    try:
        for name, part in module.named_modules():
            if f"{name}.weight" in names:
                hooks.append(part.register_forward_pre_hook(functools.partial(_linear, name, add)))
            elif f"{name}.down_proj" in names:
                hooks.append(part.register_forward_pre_hook(functools.partial(_experts, name, add)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear(name: str, add, part: nn.Module, args: tuple) -> None:
    add(f"{name}.weight", args[0])


def _experts(name: str, add, part: nn.Module, args: tuple) -> None:
    """Show the inputs of the experts' two matrices, the second one's computed as the experts do."""
    hidden, chosen = args[0], args[1]
    add(f"{name}.gate_up_proj", hidden)
    for expert in chosen.unique().tolist():
        if expert < part.gate_up_proj.shape[0]:  # one beyond the last stands for a token that another device has
            tokens = hidden[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(tokens, part.gate_up_proj[expert]).chunk(2, dim=-1)
            add(f"{name}.down_proj", part.act_fn(gate) * up)


@contextmanager
def quantized_weights(
    model, method: str, *, importance: dict[str, torch.Tensor] | None = None, report: Report | None = None
) -> Iterator[QuantizedSize]:
    """Replace a model's weights in place by what a method keeps of them, until the block ends, however it ends.

    Args:
        model: A model of `gqk.load` that runs in transformers, a pair (module, tokenizer), or a torch module.
        method: One of `METHODS`.
        importance: Of `collect_importance`; needed for "q4_0+importance".
        report: Called with the progress in bytes; raise CancelledError in it to stop.

    Yields:
        The size that the weights would have in a file.

    Raises:
        UnknownNameError: Unknown method.
        BadSettingError: Another engine runs the model, it is quantized already, or there is no importance.
        BadTensorError: A weight that the format cannot hold; it is named.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    weights = linears(module_of(model))
    originals = {name: weight.data for name, weight in weights.items()}
    total, done, nbytes = sum(value.nbytes for value in originals.values()), 0, 0
    try:
        for name, weight in weights.items():
            found = _quantize(name, originals[name], method, importance)
            weight.data = found.dequantize(weight.dtype)
            nbytes, done = nbytes + found.nbytes, done + originals[name].nbytes
            if report:
                report(Progress("quantizing", done, total))
        yield QuantizedSize(nbytes, sum(weight.numel() for weight in weights.values()))
    finally:
        for name, weight in weights.items():
            weight.data = originals[name]


def _quantize(name: str, weight: torch.Tensor, method: str, importance: dict | None) -> Quantized:
    format, _, rule = method.partition("+")
    if rule == "grid":
        return quantize(_as_stored(weight), format, recover_grid=True, name=name)
    if not rule:
        return quantize(weight, format, name=name)
    if importance is None or name not in importance:
        raise BadSettingError(
            f"There is no importance for {name}.",
            "q4_0+importance rounds by the mean squares of a layer's inputs.",
            'Pass importance=collect_importance(model), or take "q4_0".',
        )
    return quantize(weight, format, importance=importance[name], name=name)


def _as_stored(weight: torch.Tensor) -> torch.Tensor:
    """Return a float32 weight in bfloat16 where that loses nothing: it came from there, and a grid is sought within
    that rounding."""
    stored = weight.to(torch.bfloat16)
    return stored if torch.equal(stored.to(weight.dtype), weight) else weight


def module_of(model) -> nn.Module:
    """Return the torch module of what a caller passed.

    Raises:
        BadSettingError: Another engine runs the model, or it is no model.
        ModelClosedError: The model was closed.
    """
    if isinstance(model, nn.Module):
        return model
    return scorer_of_module(model).module


def scorer_of_module(model) -> ModuleScorer:
    """Return the scorer of a model that runs in transformers, or of a pair (module, tokenizer); see `module_of`."""
    scorer_of(model)  # refuses what is no model, or a closed one
    return ModuleScorer(*(model if isinstance(model, tuple) else model.hf))
