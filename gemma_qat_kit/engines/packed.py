"""Linears and experts whose weights stay in Q4_0 blocks: 4.5 bits a weight, numbers only while they are multiplied.

A frozen weight needs no gradient, so the backward pass needs the weight again and nothing else: it is dequantized a
second time instead of being kept, and one layer's numbers are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gemma_qat_kit.formats import q4_0, q4_0_grid, q4_0_importance
from gemma_qat_kit.formats.blocks import Blocks
from gemma_qat_kit.memory.settings import SMALL_WEIGHTS

EXPERTS = ("gate_up_proj", "down_proj")


class PackedLinear(nn.Linear):
    """A linear without bias that holds its frozen weight in Q4_0 blocks.

    Args:
        blocks: uint8 (out, in / 32 * 18).
        dtype: In which `weight` is handed out.
    """

    def __init__(self, blocks: torch.Tensor, dtype: torch.dtype):
        nn.Module.__init__(self)  # not that of nn.Linear, which makes a weight
        self.out_features, self.in_features = len(blocks), _width(blocks)
        self.dtype, self.bias, self.held = dtype, None, None
        self.register_buffer("blocks", blocks, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """What the blocks stand for, (out, in), computed at each use."""
        return q4_0.dequantize(self.blocks, self.dtype)

    @property
    def quantized(self) -> dict[str, Blocks]:
        """The blocks as `export_gguf` looks for them."""
        return {"weight": Blocks("Q4_0", (self.out_features, self.in_features), self.blocks)}

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what the blocks stand for, (out, in)."""
        return q4_0.dequantize(self.blocks, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs (..., in) times the weight, (..., out)."""
        if self.held is not None:
            return product_with_held(self, inputs)
        return _Product.apply(inputs, self.blocks)


class PackedExperts(nn.Module):
    """The experts of a layer of Gemma 4, their matrices in Q4_0 blocks.

    Args:
        gate_up: uint8 (experts, 2 * width, hidden / 32 * 18).
        down: uint8 (experts, hidden, width / 32 * 18).
        act_fn: Between the two.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module):
        super().__init__()
        self.act_fn = act_fn
        self.register_buffer("gate_up", gate_up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    @property
    def quantized(self) -> dict[str, Blocks]:
        """The blocks as `export_gguf` looks for them."""
        both = zip(EXPERTS, (self.gate_up, self.down), strict=True)
        return {name: Blocks("Q4_0", (*blocks.shape[:-1], _width(blocks)), blocks) for name, blocks in both}

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the sum of the outputs of each token's experts.

        Args:
            hidden: Float (tokens, hidden).
            chosen: int64 (tokens, k): which experts a token has.
            shares: Float (tokens, k): what their outputs are multiplied with.
        """
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            if expert == len(self.gate_up):  # stands for none
                continue
            tokens, places = torch.where(chosen == expert)
            gate, up = _Product.apply(hidden[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            each = _Product.apply(self.act_fn(gate) * up, self.down[expert])
            out = out.index_add(0, tokens, (each * shares[tokens, places, None]).to(out.dtype))
        return out


def _width(blocks: torch.Tensor) -> int:
    return blocks.shape[-1] // q4_0.GROUP_BYTES * q4_0.GROUP_SIZE


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(blocks)
        ctx.dtype = inputs.dtype
        inputs = as_computed(inputs)
        return nn.functional.linear(inputs, q4_0.dequantize(blocks, inputs.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (blocks,) = ctx.saved_tensors
        return (gradient @ q4_0.dequantize(blocks, gradient.dtype)).to(ctx.dtype), None


@contextmanager
def holding_values(module: nn.Module) -> Iterator[None]:
    """Take the weights of a small model out of their blocks once, not at each product, until the block ends.

    An answer needs every weight again for each of its tokens. Nothing may be trained meanwhile.
    """
    parts = [part for part in module.modules() if hasattr(part, "held")] if is_small(module) else []
    try:
        for part in parts:
            part.held = {}
        yield
    finally:
        for part in parts:
            part.held = None


def is_small(module: nn.Module) -> bool:
    """Tell whether the values of all blocks may be in memory at once: `memory.settings.SMALL_WEIGHTS`."""
    blocks = (part.blocks.numel() for part in module.modules() if isinstance(part, PackedLinear))
    return sum(blocks) // q4_0.GROUP_BYTES * q4_0.GROUP_SIZE <= SMALL_WEIGHTS


def product_with_held(part, inputs: torch.Tensor) -> torch.Tensor:
    """Return inputs times the values of a linear, which are computed at its first use in a dtype."""
    inputs = as_computed(inputs)
    if inputs.dtype not in part.held:
        part.held[inputs.dtype] = part.values(inputs.dtype)
    return nn.functional.linear(inputs, part.held[inputs.dtype])


def as_computed(inputs: torch.Tensor) -> torch.Tensor:
    """Return inputs in the dtype that a product of them is computed in: autocast's, where that is on."""
    kind = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else inputs


def blocks_of(weight: torch.Tensor, importance: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the Q4_0 blocks of a weight (..., in): on the grid where it lies on one, else those that lose least.

    Args:
        weight: Float.
        importance: Mean squared inputs, float32 (in,); without them, the plain rule rounds what is on no grid.
        name: To name it in an error.
    """
    blocks, fit = q4_0_grid.quantize(weight.detach(), name)
    if fit.share_on_grid > 0.5:
        return blocks
    return q4_0.quantize(weight, name) if importance is None else q4_0_importance.quantize(weight, importance, name)
