"""`export_mobile`: a trained model as a folder laid out as Gemma's mobile checkpoints, which transformers loads."""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from gemma_qat_kit.errors import BadSettingError, ExportError
from gemma_qat_kit.qat.stored import stored
from gemma_qat_kit.quality.post_training import module_of

_USUAL_BITS = 4


def export_mobile(model, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a converted model as a mobile checkpoint: packed codes, a scale a row, static ranges; whole or not at all.

    The folder has `quant_method: "gemma"` in its config and loads in transformers from 5.22.2, and with `gqk.load`.
    The weights that transformers computes with are those of the converted model, bit for bit.

    Args:
        model: A model of `gqk.load` or a pair (transformers module, tokenizer), trained in a mobile format, converted.
        folder: To write; made if it does not exist.
        overwrite: Replace a folder that is there.

    Returns:
        The folder.

    Raises:
        BadSettingError: The model is not converted, or holds weights on another grid than mobile's.
        ExportError: The folder exists, or cannot be written.
    """
    module, folder = module_of(model), Path(folder).expanduser()
    ships = stored(module)
    bits, is_q4_0 = _bits(module), any(value.kind == "Q4_0" for value in ships.blocks.values())
    if is_q4_0 or not bits:
        raise BadSettingError(
            f"{type(module).__name__} has {'weights on the Q4_0 grid' if is_q4_0 else 'no mobile codes'}.",
            "A mobile checkpoint holds the codes that prepare_qat with a mobile format and convert_qat leave.",
            'Prepare the model with "mobile", train and convert it; export_gguf writes the others.',
        )
    if folder.exists() and not overwrite:
        raise ExportError(f"{folder} exists.", "Nothing is replaced unasked.", "Name another, or pass overwrite=True.")
    draft = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(module, None if isinstance(model, nn.Module) else model, ships.state, bits, draft)
        if folder.exists():
            shutil.rmtree(folder)
        draft.replace(folder)
    except OSError as err:
        raise ExportError(
            f"{folder} cannot be written: {err.strerror or err}.",
            "A checkpoint takes about as much room as its codes.",
            "Free some space, or name another folder.",
        ) from err
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _bits(module: nn.Module) -> dict[str, int]:
    """Return the bits of each module that has mobile codes, by its name."""
    found = {}
    for name, part in module.named_modules():
        format = getattr(getattr(part, "quantized", {}).get("weight"), "format", "")
        if format.startswith("mobile_int"):
            found[name] = int(format.removeprefix("mobile_int"))
    return found


def _write(module: nn.Module, model, state: dict[str, torch.Tensor], bits: dict[str, int], folder: Path) -> None:
    from safetensors.torch import save_file

    for name in bits:  # a reader expects both ranges of every linear; 0 says that it was not calibrated
        if f"{name}.weight_scale" in state:
            for side in ("input", "output"):
                state.setdefault(f"{name}.{side}_activation_scale", torch.tensor(0.0))
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(module, bits), indent=2))
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.save_pretrained(folder)
    if model is not None:
        tokenizer = (model if isinstance(model, tuple) else model.hf)[1]
        tokenizer.save_pretrained(folder)


def _config(module: nn.Module, bits: dict[str, int]) -> dict:
    config = module.config.to_dict()
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section["tie_word_embeddings"] = False
            section.pop("output_attentions", None)  # a setting of the moment, which published configs do not have
    parts = ((name, part) for name, part in module.named_modules() if name not in bits)
    floats = [name for name, part in parts if isinstance(part, nn.Linear | nn.Embedding) or name.endswith("per_layer")]
    rules = {}
    for width in sorted({*bits.values()} - {_USUAL_BITS}):
        names = "|".join(re.escape(name) for name, own in bits.items() if own == width)
        rules[f"^(?:{names})$"] = {"num_bits": width}
    config["quantization_config"] = {
        "quant_method": "gemma",
        "num_bits": _USUAL_BITS,
        "quantize_embeddings": True,
        "module_quant_configs": rules,
        "modules_to_not_convert": floats,
    }
    return config
