"""Adapters: peft's LoRA over packed or plain linears, and LoRA that is trained through the grid that ships.

Plain LoRA computes with `W + s·B·A`, which lies on no grid; merged and rounded, part of what was learnt is gone.
QAT-LoRA computes with `Q(W + u + s·B·A)` under the scales that W has on its grid: what was trained is what the merged
file holds, and an adapter that is still zero changes nothing. The gradient goes straight through the rounding, and so
it has the rank of the adapter: `dB = s·g'(xA')` and `dA = s·(gB)'x`, never the size of W.

Why u: weights of a QAT checkpoint lie in the middle between two roundings, so a change of less than half a step is
rounded away, and an adapter is small and moves all weights a little: 15 steps of training won a twentieth of what they
win with u. So each weight is taken to lie somewhere within its step, evenly spread over each row and column. Alone that
changes no code; but of the weights that an adapter moves by a tenth of a step, one in ten takes the next code, and on
average the whole change is there. As dither in sound and pictures, it turns a threshold into a proportion.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from gemma_qat_kit.engines.packed import PackedLinear, as_computed, is_small, product_with_held
from gemma_qat_kit.engines.transformers_traps import peft_unwarned
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import q4_0
from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize
from gemma_qat_kit.memory.training import ADAPTED_CHUNK

_GRID = GRIDS["q4_0"]
ADAPTER = "default"  # peft's name of the first adapter


class GridLora(LoraLinear):
    """An adapter beside a packed linear; with `qat` the sum goes through the grid of the packed weight."""

    qat = True
    keeps_values = False  # from the forward pass for the backward pass, which else computes them again
    held: dict | None = None  # see `engines.packed.holding_values`

    def forward(self, x: torch.Tensor, *args, **options) -> torch.Tensor:
        """Return inputs (..., in) times the adapted weight, (..., out)."""
        if not self.qat or self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        if self.held is not None:
            return product_with_held(self, x)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _GridProduct.apply(x, self.base_layer.blocks, a, b, self.scaling[ADAPTER], self.keeps_values)

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the adapted weight on its grid, (out, in)."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _on_grid(self.base_layer.blocks, a, b, self.scaling[ADAPTER], dtype)

    @torch.no_grad()
    def merged_blocks(self) -> torch.Tensor:
        """Return the Q4_0 blocks of the adapted weight, uint8 (out, in / 32 * 18): the codes that training computed
        with; of an adapter that was trained without the grid, those of the plain rule."""
        a, b, scaling = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
        merged = torch.empty_like(self.base_layer.blocks)
        for rows, weight, scale in _adapted(self.base_layer.blocks, a, b, scaling, self.qat):
            merged[rows] = q4_0.pack(_GRID.codes(weight, scale), scale) if self.qat else q4_0.quantize(weight)
        return merged


class PlainGridLora(GridLora):
    """An adapter beside a packed linear, whose sum is rounded only when it is merged."""

    qat = False


_WIDTH = 0.999  # of a step of the grid: less than half a step around a code, so that alone it changes none
_ROW_SHIFT, _COLUMN_SHIFT = 0.7548776662466927, 0.5698402909980532  # the plane's most even sequence (R2)


def _spread(first_row: int, num_rows: int, width: int, device) -> torch.Tensor:
    """Return where within a step each weight is taken to lie, in 2^-32 of a step around its middle: (rows, in)."""
    counts = ((first_row, num_rows, _ROW_SHIFT), (0, width, _COLUMN_SHIFT))
    rows, columns = (torch.arange(start, start + count, device=device, dtype=torch.int32) * round(shift * 2**32 - 2**32)
                     for start, count, shift in counts)  # fmt: skip
    return (rows[:, None] + columns).float()  # int32 wraps around, as the sequence does


def _adapted(
    blocks: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, is_spread: bool
) -> Iterator[tuple]:
    """Yield some rows at a time of W + s·B·A in float32, with the scales of W: which rows, (rows, in), (rows, groups).

    Training and merging take the same rows at a time: a product's last bits depend on how many there are.
    """
    step = max(1, ADAPTED_CHUNK // a.shape[-1])
    for rows in (slice(start, start + step) for start in range(0, len(blocks), step)):
        weight, scale = q4_0.dequantize(blocks[rows], torch.float32), q4_0.scales(blocks[rows])
        weight.addmm_(b[rows].float(), a.float(), alpha=scaling)
        if is_spread:
            spread = _spread(rows.start, *weight.shape, blocks.device).view(*scale.shape, -1)
            weight.view(*scale.shape, -1).addcmul_(spread, scale[..., None], value=_WIDTH * 2.0**-32)
        yield rows, weight, scale


def _on_grid(blocks, a, b, scaling, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty((len(blocks), a.shape[-1]), dtype=dtype, device=blocks.device)
    for rows, weight, scale in _adapted(blocks, a, b, scaling, True):
        values[rows] = learned_fake_quantize(weight, scale, _GRID, dtype)
    return values


class _GridProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, a, b, scaling: float, keeps_values: bool) -> torch.Tensor:
        ctx.scaling, ctx.dtype = scaling, x.dtype
        x = as_computed(x)
        values = _on_grid(blocks, a, b, scaling, x.dtype)
        ctx.save_for_backward(x, blocks, a, b, values if keeps_values else None)
        return nn.functional.linear(x, values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        x, blocks, a, b, values = ctx.saved_tensors
        g = gradient.to(x.dtype)
        of_x = g @ (_on_grid(blocks, a, b, ctx.scaling, x.dtype) if values is None else values)
        g, x = g.flatten(0, -2).to(a.dtype), x.flatten(0, -2).to(a.dtype)
        of_b = g.T @ (x @ a.T) * ctx.scaling
        of_a = (g @ b).T @ x * ctx.scaling
        return of_x.to(ctx.dtype), None, of_a, of_b, None, None


def add_adapters(
    module: nn.Module, names: Sequence[str], *, rank: int, alpha: float, qat: bool, seed: int = 0
) -> PeftModel:
    """Freeze a model and put an adapter beside some of its linears.

    Args:
        module: A transformers model.
        names: Of the linears, as `find_linears` finds them.
        rank: Of B and A.
        alpha: The product is scaled by alpha / rank.
        qat: Whether packed linears are trained through their grid.
        seed: Of the numbers that A begins with.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(names), bias="none", task_type="CAUSAL_LM"
    )
    # The first class that fits is taken, before peft asks what else is installed: a stale torchao would make it raise.
    config._register_custom_module({PackedLinear: GridLora if qat else PlainGridLora, nn.Linear: LoraLinear})
    with torch.random.fork_rng(), peft_unwarned():
        torch.manual_seed(seed)
        adapted = get_peft_model(module, config)
    found = [part for part in adapted.modules() if isinstance(part, LoraLinear)]
    assert len(found) == len(names), "peft adapted other linears than it was told"
    keeps_values = is_small(module)
    for part in found:
        part.keeps_values = keeps_values
    return adapted


def find_linears(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the linears of a language model's layers that have one of some names, such as "q_proj".

    Raises:
        BadSettingError: There is none.
    """
    names = list(_adaptable(module, targets))
    if not names:
        raise BadSettingError(
            f"No linear of this model is called {', '.join(targets)}.",
            "Adapters go beside linears of the language model.",
            'Try targets=("q_proj", "v_proj").',
        )
    return names


def _adaptable(module: nn.Module, targets: Sequence[str]) -> Iterator[str]:
    pattern = re.compile(r"(^|\.)layers\.\d+\.(.+\.)?(" + "|".join(map(re.escape, targets)) + ")$")
    for name, part in module.named_modules():
        is_elsewhere = any(word in name for word in ("vision", "audio"))
        if isinstance(part, nn.Linear | LoraLinear) and pattern.search(name) and not is_elsewhere:
            yield name


def adapters(module: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted linears by name, without peft's prefix."""
    return {name.removeprefix("base_model.model."): part for name, part in module.named_modules()
            if isinstance(part, LoraLinear)}  # fmt: skip
