"""Embeddings and heads as they ship, rounded once, not trained: Q6_K or Q8_0 in a Q4_0 file, 2 or 4 bits in mobile."""

import torch
from torch import nn

from gemma_qat_kit.formats import k_quants, q8_0
from gemma_qat_kit.formats.blocks import Blocks
from gemma_qat_kit.formats.grids import Grid, starting_scale
from gemma_qat_kit.formats.quantized import Quantized
from gemma_qat_kit.layouts import gguf_dtype


def gguf_table(weight: torch.Tensor, name: str) -> Blocks:
    """Round a table to the type that Google's Q4_0 files give it."""
    kind = gguf_dtype("token_embd.weight", tuple(weight.shape))
    rounded = q8_0.quantize(weight, name) if kind == "Q8_0" else k_quants.quantize(weight, kind, name)
    return Blocks(kind, tuple(weight.shape), rounded.cpu())


def mobile_table(weight: torch.Tensor, grid: Grid, name: str) -> Quantized:
    """Round a table to mobile codes under the scales that lose least."""
    return grid.store(weight, starting_scale(weight, grid, name=name))


def tables(module: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return by a module's name the embeddings and heads of a language model with their parameters, tied ones too."""
    return {
        name: (part, part.weight)
        for name, part in module.named_modules()
        if (name.endswith(("embed_tokens", "embed_tokens_per_layer")) and isinstance(part, nn.Embedding))
        or (name == "lm_head" and isinstance(part, nn.Linear))
    }
