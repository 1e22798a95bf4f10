"""Linears whose weights stay in Q4_0 blocks: 4.5 bits a weight, made into numbers only while they are multiplied.

A frozen weight needs no gradient, so the backward pass needs the weight again and nothing else: it is dequantized a
second time instead of being kept, and one layer's numbers are in memory at a time.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import q4_0, q4_0_grid, q4_0_importance
from gemma_qat_kit.formats.quantized import Quantized
from gemma_qat_kit.progress import Progress, Report
from gemma_qat_kit.quality.post_training import linears


class PackedLinear(nn.Linear):
    """A linear without bias that holds its frozen weight in Q4_0 blocks.

    Args:
        blocks: uint8 (out, in / 32 * 18).
        dtype: In which `weight` is handed out.
    """

    def __init__(self, blocks: torch.Tensor, dtype: torch.dtype):
        nn.Module.__init__(self)  # not that of nn.Linear, which makes a weight
        self.out_features, self.in_features = len(blocks), blocks.shape[-1] // q4_0.GROUP_BYTES * q4_0.GROUP_SIZE
        self.dtype, self.bias = dtype, None
        self.register_buffer("blocks", blocks)

    @property
    def weight(self) -> torch.Tensor:
        """What the blocks stand for, (out, in), computed at each use."""
        return q4_0.dequantize(self.blocks, self.dtype)

    @property
    def quantized(self) -> dict[str, Quantized]:
        """The blocks as `export_gguf` looks for them."""
        return {"weight": Quantized("q4_0", (self.out_features, self.in_features), {"blocks": self.blocks})}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs (..., in) times the weight, (..., out)."""
        return _Product.apply(inputs, self.blocks)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(blocks)
        return nn.functional.linear(inputs, q4_0.dequantize(blocks, inputs.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (blocks,) = ctx.saved_tensors
        return gradient @ q4_0.dequantize(blocks, gradient.dtype), None


def pack(module: nn.Module, importance: Mapping[str, torch.Tensor], report: Report) -> None:
    """Put a language model's linears into Q4_0 blocks in place, one after the other; all else stays.

    Weights that lie on a Q4_0 grid keep it, value for value; others are rounded where that costs least of each layer's
    outputs. Experts of a mixture and what Google keeps in more bits stay as they are.

    Args:
        module: A transformers model.
        importance: Mean squared inputs, float32 (in,), by weight; weights without are rounded by the plain rule.
        report: Called with the progress.

    Raises:
        BadSettingError: There is no linear to pack.
        BadTensorError: NaN or an infinity in a weight.
    """
    found = dict(_packable(module))
    if not found:
        raise BadSettingError(
            "This model has no linear that Q4_0 can hold.",
            "Rows must divide into groups of 32.",
            "Fine-tune it without packing: qat=None.",
        )
    total, done = sum(part.weight.nbytes for part in found.values()), 0
    for name, part in found.items():
        report(Progress("packing", done, total))
        nbytes, blocks = part.weight.nbytes, blocks_of(part.weight, importance.get(f"{name}.weight"), name)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, PackedLinear(blocks, part.weight.dtype))
        done += nbytes
    report(Progress("packing", total, total))


def _packable(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for full_name in linears(module):
        name = full_name.removesuffix(".weight")
        part = module.get_submodule(name) if full_name.endswith(".weight") else None
        is_free = isinstance(part, nn.Linear) and not isinstance(part, PackedLinear) and part.bias is None
        if is_free and part.in_features % q4_0.GROUP_SIZE == 0:
            yield name, part


def blocks_of(weight: torch.Tensor, importance: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the Q4_0 blocks of a weight (out, in): on the grid where it lies on one, else those that lose least."""
    blocks, fit = q4_0_grid.quantize(weight.detach(), name)
    if fit.share_on_grid > 0.5:
        return blocks
    return q4_0.quantize(weight, name) if importance is None else q4_0_importance.quantize(weight, importance, name)
