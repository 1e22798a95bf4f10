"""Adapters in a loaded model: put in, looked up, saved in peft's files, loaded again, merged."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gemma_qat_kit.engines.half import keep_sums_in_float32
from gemma_qat_kit.engines.packed import PackedLinear
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError
from gemma_qat_kit.finetune.lora import ADAPTER, GridLora, adapters, add_adapters, find_linears
from gemma_qat_kit.finetune.packed import pack
from gemma_qat_kit.formats import q4_0_grid
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Report
from gemma_qat_kit.qat.precision import own_dtype
from gemma_qat_kit.quality.post_training import collect_importance, linears, module_of

_ADAPTED = "gqk_adapted"  # attribute of an adapted module, in a tuple: torch would take a module for a part of it
_BASE = "base.json"  # beside peft's files: what the adapters were trained on
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Kind:
    """What adapters are.

    Attributes:
        names: Of the linears that have one.
        rank: Of the adapters.
        alpha: What is learnt is scaled by alpha / rank.
        qat: The grid that they are trained through, or None.
    """

    names: tuple[str, ...]
    rank: int
    alpha: float
    qat: str | None


def adapt(model: Model, kind: Kind, seed: int, report: Report) -> None:
    """Pack a model's linears if they are trained through the grid, and put adapters beside them, in place and once.

    Raises:
        BadSettingError: It has other adapters already.
    """
    module = module_of(model)
    if hasattr(module, _ADAPTED):
        _check_same(getattr(module, _ADAPTED)[1], kind)
        return
    if kind.qat and not any(isinstance(part, PackedLinear) for part in module.modules()):
        pack(module, {} if _is_on_grid(module) else collect_importance(model, report=report), report)
    module.requires_grad_(False)
    adapted = add_adapters(module, kind.names, rank=kind.rank, alpha=kind.alpha, qat=kind.qat is not None, seed=seed)
    if own_dtype(module) == torch.float16:
        keep_sums_in_float32(module)
    setattr(module, _ADAPTED, (adapted, kind))


def _check_same(there: Kind, asked: Kind) -> None:
    differing = [name for name in ("rank", "alpha", "qat") if getattr(asked, name) != getattr(there, name)]
    said = [f"{name}={getattr(there, name)!r}" for name in differing]
    if not said and set(there.names) != set(asked.names):
        said = [f"targets={tuple(dict.fromkeys(name.rpartition('.')[2] for name in there.names))!r}"]
    if said:
        raise BadSettingError(
            f"This model has adapters already, with {', '.join(said)}.",
            "They are trained on as they are.",
            "Pass the same, call merge_adapters(model) first, or load the model again.",
        )


def _is_on_grid(module: nn.Module) -> bool:
    name, weight = next(iter(linears(module).items()))
    return q4_0_grid.quantize(weight.detach(), name)[1].share_on_grid > 0.5


def adapted_model(model: Model) -> PeftModel:
    """Return peft's own view of a model that `finetune` adapted.

    Raises:
        BadSettingError: It is not adapted.
    """
    return _found(model)[0]


def kind_of(model: Model) -> Kind:
    """Return what a model's adapters are.

    Raises:
        BadSettingError: It is not adapted.
    """
    return _found(model)[1]


def _found(model: Model) -> tuple[PeftModel, Kind]:
    found = getattr(module_of(model), _ADAPTED, None)
    if found is None:
        raise BadSettingError(
            "This model has no adapters.", "finetune puts them in.", "Call finetune(model, dataset) first."
        )
    return found


def fingerprint(module: nn.Module) -> str:
    """Return what tells an adapted model, whatever its adapters have learnt, from every other."""
    digest = hashlib.sha256()
    for name, part in adapters(module).items():
        base = part.base_layer.blocks if isinstance(part, GridLora) else part.base_layer.weight.detach()
        sample = base.flatten()[:: max(1, base.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(base.shape)} {part.r}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: Model, folder: str | Path) -> Path:
    """Save a model's adapters in peft's format, which every tool around peft reads, and say what they belong to.

    Args:
        model: One that `finetune` adapted.
        folder: Made if need be.

    Returns:
        The folder: adapter_model.safetensors, adapter_config.json and base.json.

    Raises:
        BadSettingError: It is not adapted, or the folder cannot be written.
    """
    adapted, kind = _found(model)
    folder = Path(folder).expanduser()
    mark = {"base": model.name, "fingerprint": fingerprint(module_of(model)), "qat": kind.qat}
    try:
        adapted.save_pretrained(folder, save_embedding_layers=False)  # else it looks for the base on the hub
        (folder / _BASE).write_text(json.dumps(mark), encoding="utf-8")
    except (OSError, ValueError) as err:  # ValueError: peft's word for a file where a folder should be
        raise BadSettingError(
            f"{folder} cannot be written: {getattr(err, 'strerror', None) or err}.",
            "It is a folder of yours.",
            "Pass another one.",
        ) from err
    return folder


def load_adapter(model: Model, folder: str | Path, *, report: Report = lambda progress: None) -> None:
    """Put saved adapters into a model in place, to go on training, to chat, to merge.

    Args:
        model: The model that they were trained on, freshly loaded in transformers.
        folder: As `save_adapter` wrote it, or one of peft's own; those are computed without a grid.
        report: Called with the progress of packing.

    Raises:
        BadSettingError: The adapters belong to another model, or this one has some already.
        BrokenCheckpointError: The folder is incomplete or damaged, or holds more than plain LoRA.
    """
    folder, module = Path(folder).expanduser(), module_of(model)
    weights, settings, mark = _read(folder)
    kind = Kind(tuple(weights), settings["r"], settings["lora_alpha"], mark.get("qat"))
    there = dict(module.named_modules())
    shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in weights.items()}
    wrong = [name for name, shape in shapes.items() if _shape(there.get(name)) != shape]
    if wrong:
        raise _other_base(folder, mark, f"{wrong[0]} is no linear of {shapes[wrong[0]]} here")
    had_some = hasattr(module, _ADAPTED)
    adapt(model, kind, 0, report)
    if mark and mark["fingerprint"] != fingerprint(module):
        if not had_some:
            _take_out(model)
        raise _other_base(folder, mark, "its weights are others")
    with torch.no_grad():
        for name, part in adapters(module).items():
            for values, side in zip(weights[name], (part.lora_A, part.lora_B), strict=True):
                side[ADAPTER].weight.copy_(values)


def _read(folder: Path) -> tuple[dict[str, list[torch.Tensor]], dict, dict]:
    """Return the pairs (A, B) by the linear's name, peft's settings, and what they belong to."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        mark = json.loads((folder / _BASE).read_text(encoding="utf-8")) if (folder / _BASE).exists() else {}
        names = dict.fromkeys(name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors)
        weights = {name: [tensors.pop(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB"] for name in names}
        is_plain = not tensors and not any(settings.get(key) for key in ("use_dora", "use_rslora", "rank_pattern"))
        if is_plain and weights and {"r", "lora_alpha"} <= settings.keys():
            return weights, settings, {**mark}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as err:
        raise _unusable(folder, str(err)) from err
    raise _unusable(folder, "it holds more than plain LoRA")


def _unusable(folder: Path, what: str) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{folder} holds no adapters that can be loaded: {what}.",
        "A folder has adapter_model.safetensors and adapter_config.json, with a LoRA beside linears.",
        "Check the path, or save it again with save_adapter.",
    )


def _other_base(folder: Path, mark: dict, what: str) -> BadSettingError:
    return BadSettingError(
        f"The adapters in {folder} belong to another model: {what}.",
        f"They were trained on {mark['base']}." if mark else "Names, shapes and values must be those of their model.",
        "Load that model.",
    )


def _shape(part: nn.Module | None) -> tuple[int, int] | None:
    return (part.out_features, part.in_features) if hasattr(part, "out_features") else None


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    """Put a model's adapters into its weights in place, one linear after the other; then `export_gguf` writes it.

    Packed weights stay packed: where adapters were trained through the grid, the model computes what it computed
    before, bit for bit. The adapter by itself is saved before, with `save_adapter`.

    Args:
        model: One that `finetune` adapted.

    Raises:
        BadSettingError: It is not adapted, or its weights are held by bitsandbytes.
    """
    _found(model)
    parts = adapters(module_of(model))
    if packed := [
        n for n, p in parts.items() if not (isinstance(p, GridLora) or p.base_layer.weight.is_floating_point())
    ]:
        raise BadSettingError(
            f"{packed[0]} is held by bitsandbytes in a format that no sum can be put into.",
            "Adapters on nf4 and int8 stay beside the weights: save_adapter and export_adapter keep them.",
            'Fine-tune the q4_0 checkpoint for a merged file: gqk.load(size, "q4_0", engine="transformers").',
        )
    for part in parts.values():
        if not isinstance(part, GridLora):
            part.merge()
    _take_out(model, is_merged=True)


def _take_out(model: Model, *, is_merged: bool = False) -> None:
    """Leave linears where adapted ones were."""
    module = module_of(model)
    for name, part in list(adapters(module).items()):
        parent, _, last = name.rpartition(".")
        new = part.base_layer
        if is_merged and isinstance(part, GridLora):
            new = PackedLinear(part.merged_blocks(), new.dtype)
        setattr(module.get_submodule(parent), last, new)
    if own_dtype(module) == torch.float16:
        keep_sums_in_float32(module)
    delattr(module, _ADAPTED)
    if hasattr(module, "peft_config"):  # peft's own mark, which it warns of when it meets it again
        del module.peft_config


def kind_for(module: nn.Module, settings, qat: str | None) -> Kind:
    """Return what adapters some `FinetuneSettings` ask for.

    Raises:
        BadSettingError: No linear of the language model has one of the names.
    """
    return Kind(tuple(find_linears(module, settings.targets)), settings.rank, settings.alpha, qat)
