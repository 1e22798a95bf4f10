"""Adapters into weights: what was trained through a grid becomes its codes, bit for bit; the rest is added up."""

import torch
from torch import nn

from gemma_qat_kit.engines.half import keep_sums_in_float32
from gemma_qat_kit.engines.packed import PackedLinear
from gemma_qat_kit.finetune.lora import GridLora, adapters
from gemma_qat_kit.finetune.train import adapted_model, forget
from gemma_qat_kit.model import Model
from gemma_qat_kit.qat.precision import own_dtype
from gemma_qat_kit.quality.post_training import module_of


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    """Put a model's adapters into its weights in place, one linear after the other; then `export_gguf` writes it.

    Packed weights stay packed: where adapters were trained through the grid, the model computes what it computed
    before, bit for bit. The adapter by itself is saved before: `adapted_model(model).save_pretrained(folder)`.

    Args:
        model: One that `finetune` adapted.

    Raises:
        BadSettingError: It is not adapted.
    """
    adapted_model(model)
    module = module_of(model)
    for name, part in list(adapters(module).items()):
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, _merged(part))
    if own_dtype(module) == torch.float16:
        keep_sums_in_float32(module)
    forget(module)


def _merged(part: nn.Module) -> nn.Module:
    if isinstance(part, GridLora):
        return PackedLinear(part.merged_blocks(), part.base_layer.dtype)
    part.merge()
    return part.base_layer
