"""What a converted model's file holds: floats, and the codes and scales that stand beside the weights."""

from dataclasses import dataclass, field

import torch
from torch import nn

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats.blocks import Blocks
from gemma_qat_kit.formats.quantized import Quantized


@dataclass
class Stored:
    """A model's tensors as they ship.

    Attributes:
        state: Floats by their usual names; mobile weights as that layout names and packs them.
        blocks: Of weights that are in blocks, by the same names; some have no floats beside them.
    """

    state: dict[str, torch.Tensor]
    blocks: dict[str, Blocks] = field(default_factory=dict)


def stored(module: nn.Module) -> Stored:
    """Return the tensors of a converted model as they ship, those of any other model as they are.

    Raises:
        BadSettingError: The model is prepared and not converted.
    """
    found = Stored(module.state_dict())
    if any(".lora_A." in name for name in found.state):
        raise BadSettingError(
            "This model has adapters beside its weights.",
            "What ships are merged weights; an adapter alone is saved by peft.",
            "Call merge_adapters(model) first.",
        )
    if any(".parametrizations." in name for name in found.state):
        raise BadSettingError(
            "This model is prepared for training.",
            "What ships are codes and scales, which convert_qat makes.",
            "Call convert_qat(model) first.",
        )
    for prefix, part in module.named_modules():
        for name, value in getattr(part, "quantized", {}).items():
            _add(found, f"{prefix}.{name}", part, value)
        for side in ("input", "output"):
            if (scale := found.state.pop(f"{prefix}.{side}_range.scale", None)) is not None:
                found.state[f"{prefix}.{side}_activation_scale"] = scale.float()
    return found


def _add(found: Stored, name: str, part: nn.Module, value: Quantized | Blocks) -> None:
    if isinstance(value, Blocks):
        found.blocks[name] = value
    elif value.format == "q4_0":
        found.blocks[name] = Blocks("Q4_0", value.shape, value.tensors["blocks"])
    else:
        is_table = isinstance(part, nn.Embedding)
        prefix = name.removesuffix(".weight")
        del found.state[name]
        packed, scale = (".embedding_quantized", ".embedding_scale") if is_table else (".weight", ".weight_scale")
        found.state[prefix + packed] = value.tensors["packed"]
        found.state[prefix + scale] = value.tensors["scale"]
