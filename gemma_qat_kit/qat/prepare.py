"""`prepare_qat`: put fake quantization into a model, on the grids that it will ship on."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gemma_qat_kit.engines.transformers_table import HostTable
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import q4_0, q4_0_grid
from gemma_qat_kit.formats.grids import Grid, starting_scale
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.qat.fake_quantizer import FakeQuantizer, FrozenTable, attach, masters, quantizers
from gemma_qat_kit.qat.ranges import add_ranges, best_scale, watched
from gemma_qat_kit.qat.schedule import MOBILE, Schedule
from gemma_qat_kit.qat.tables import gguf_table, mobile_table, tables
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.post_training import collect_importance, linears, module_of, scorer_of_module
from gemma_qat_kit.quality.scoring import cut_windows

_RANGE_WINDOW, _RANGE_TOKENS = 256, 2048  # text that the ranges of activations are calibrated on


class KeptInFloatWarning(UserWarning):
    """Some weights do not fit the grid that was asked for; they are not trained and ship in 16 bits."""


def prepare_qat(
    model,
    format: str,
    *,
    overrides: Mapping[str, str | None] | None = None,
    embeddings: bool = False,
    learn_scales: bool = True,
    calibration: str | Path | Mapping[str, torch.Tensor] | None = None,
    report: Report | None = None,
) -> None:
    """Put fake quantization into a model in place: each linear computes with its weight on the grid that ships.

    Weights become float32 masters, all else is frozen. Scales begin where they lose least of each layer's outputs
    (llama.cpp's importance search for q4_0), or on the grid that the weights lie on already.

    Args:
        model: A model of `gqk.load` that runs in transformers, a pair (transformers module, tokenizer), or a module.
        format: "q4_0"; "mobile", Gemma's schedule of 2, 4 and 8 bits with static int8 ranges of the activations;
            "mobile_weight_only", without them; or one grid of `formats.grids.GRIDS` for every weight.
        overrides: Regular expression, searched in module names, to a grid or None (stays a float). The first match
            counts, before the format's own rule.
        embeddings: Train embeddings and head, too. They are on the grid that ships in any case.
        learn_scales: Train the scales, too (learned step size). Without it they stay where they begin.
        calibration: Text to collect the inputs' importance and ranges on, as in `perplexity`; None takes
            "calibration". Or an importance that was collected before; {} for none, and then no ranges either.
        report: Called with the progress; raise CancelledError in it to stop, and the model is as before.

    Warns:
        KeptInFloatWarning: Weights whose rows do not divide into the grid's groups; each is named.

    Raises:
        UnknownNameError: Unknown format or grid.
        BadSettingError: A model that is quantized or prepared already, an override that matches nothing, or no weight
            left to train.
        BadTensorError: NaN or an infinity in a weight.
    """
    module = module_of(model)
    if quantizers(module):
        raise BadSettingError(
            "This model is prepared already.",
            "A model is prepared once, and converted when it is trained.",
            "Call convert_qat(model), or load the model again.",
        )
    schedule = Schedule(format, overrides or {}, module.config)
    chosen = _chosen(module, schedule)
    schedule.check_used(module)
    with nullcontext(report) if report else progress_bar() as shown:
        importance, samples = _calibrated(model, module, chosen, format, calibration, shown)
        prepared = _found_scales(chosen, importance, shown)
        rounded = _rounded_tables(module, schedule, embeddings)
    module.requires_grad_(False)
    for weight, scale in prepared:
        quantizer = FakeQuantizer(weight.grid, scale, weight.parameter.dtype, learn_scales)
        attach([(weight.module, weight.name)], quantizer)
    for parts, quantizer in rounded:
        attach([(part, "weight") for part in parts], quantizer)
    for part, (inputs, outputs) in samples:
        add_ranges(part, inputs, outputs, learn_scales)


@dataclass(frozen=True)
class _Weight:
    """A weight that will be trained."""

    full_name: str
    module: nn.Module
    name: str
    parameter: nn.Parameter
    grid: Grid


def _chosen(module: nn.Module, schedule: Schedule) -> list[_Weight]:
    """Return the weights that fit their grid; warn of the others."""
    found, too_narrow = [], []
    for full_name, parameter in linears(module).items():
        prefix, _, name = full_name.rpartition(".")
        part = module.get_submodule(prefix)
        is_experts = parameter.ndim == 3
        grid = schedule.grid(f"{prefix}.{name}" if is_experts else prefix)
        if grid is None:
            continue
        fits = parameter.shape[-1] % (grid.group_size or 8 // min(8, grid.bits)) == 0
        if fits and not (is_experts and grid.group_size is None):
            found.append(_Weight(full_name, part, name, parameter, grid))
        else:
            too_narrow.append(full_name)
    if too_narrow:
        warnings.warn(_kept(too_narrow, module), KeptInFloatWarning, stacklevel=3)
    if not found:
        raise BadSettingError(
            "No weight is left to train.",
            "At least one linear layer must have a grid, and rows that divide into its groups.",
            "Take another format, or fewer overrides.",
        )
    return found


def _kept(names: list[str], module: nn.Module) -> str:
    shapes = ", ".join(f"{name} {tuple(module.get_parameter(name).shape)}" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"{shapes}{more} stay in 16 bits and are not trained: their rows do not divide into the grid's groups, or they "
        "are experts, which mobile has no place for. An override gives them another grid, such as mobile_int4 or q4_0."
    )


def _calibrated(model, module, chosen, format, calibration, report) -> tuple[dict, list]:
    """Return the importance of each weight's inputs, and the ranges of each linear where the format has them."""
    if isinstance(calibration, Mapping):
        return dict(calibration), []
    if isinstance(model, nn.Module):  # without a tokenizer there is no text to read
        return {}, []
    importance = collect_importance(model, calibration, report=report)
    if format != "mobile":
        return importance, []
    parts = {weight.full_name: weight.module for weight in chosen if isinstance(weight.module, nn.Linear)}
    scorer = scorer_of_module(model)
    text = texts.read("calibration" if calibration is None else calibration)
    windows = cut_windows(scorer, text, window=_RANGE_WINDOW, max_tokens=_RANGE_TOKENS)
    with watched(parts) as kept, torch.inference_mode():
        for done, ids in enumerate(windows):
            report(Progress("calibrating ranges", done, len(windows), "windows"))
            module.base_model(torch.tensor([ids], device=module.device))
        report(Progress("calibrating ranges", len(windows), len(windows), "windows"))
    device = module.device
    ranges = [(parts[name], [best_scale(side).to(device) for side in sides]) for name, sides in kept.items()]
    return importance, ranges


def _found_scales(chosen: list[_Weight], importance: dict, report: Report) -> list[tuple[_Weight, torch.Tensor]]:
    """Return each weight with the scales to begin with."""
    total, found = sum(weight.parameter.nbytes for weight in chosen), []
    done = 0
    for weight in chosen:
        report(Progress("finding scales", done, total))
        found.append((weight, _scale(weight, importance.get(weight.full_name))))
        done += weight.parameter.nbytes
    report(Progress("finding scales", total, total))
    return found


def _scale(weight: _Weight, importance: torch.Tensor | None) -> torch.Tensor:
    """Return the scales of the grid that the weight lies on already, else those that lose least."""
    values = weight.parameter.detach()
    if weight.grid.name == "q4_0":
        blocks, fit = q4_0_grid.quantize(values, weight.full_name)
        if fit.share_on_grid > 0.5:
            return q4_0.unpack(blocks)[1]
    return starting_scale(values, weight.grid, importance, weight.full_name)


def _rounded_tables(module: nn.Module, schedule: Schedule, is_trained: bool) -> list[tuple[list, nn.Module]]:
    """Return the quantizers of embeddings and head, each with the modules that share the table."""
    sharing: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, (part, parameter) in tables(module).items():
        sharing.setdefault(id(parameter), []).append((name, part))
    if left := [name for name, part in module.named_modules() if isinstance(part, HostTable)]:
        warnings.warn(
            f"{left[0]} is looked up outside the model and stays as it is in its file; a GGUF rounds it. "
            'load(..., per_layer_table="memory") brings it into the model, and training sees it rounded.',
            KeptInFloatWarning,
            stacklevel=3,
        )
    made = [([part for _, part in users], _table(users[0][0], users[0][1].weight, schedule, is_trained))
            for users in sharing.values()]  # fmt: skip
    return [(parts, quantizer) for parts, quantizer in made if quantizer is not None]


def _table(name: str, parameter: nn.Parameter, schedule: Schedule, is_trained: bool) -> nn.Module | None:
    grid = schedule.grid(name)
    if grid is None:
        return None
    width, values = parameter.shape[-1], parameter.detach()
    if schedule.format in MOBILE and name.endswith("per_layer"):
        grid = replace(grid, group_size=width // schedule.num_layers)
    if is_trained:
        return FakeQuantizer(grid, starting_scale(values, grid, name=name), parameter.dtype, True)
    if grid.stored_as == "q4_0":
        return FrozenTable(gguf_table(values, name), parameter.dtype)
    return FrozenTable(mobile_table(values, grid, name), parameter.dtype)


def count_trained(model) -> int:
    """Return how many values `train_qat` would train, scales and ranges included."""
    module = module_of(model)
    return sum(p.numel() for p in module.parameters() if p.requires_grad) if masters(module) else 0
