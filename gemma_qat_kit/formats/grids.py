"""Grids with a scale of their own: fake quantization in which the step between levels is trained beside the weights.

The rules in `q4_0.py` and `mobile.py` compute a scale from the weights, so the largest weight decides it. Here it is
given: codes are `q = clamp(round(w / s), low, high)` and the weight becomes `q * s`, with s rounded as the file
stores it. In the backward pass a weight inside the range gets its gradient unchanged, one outside gets none, and the
scale gets `sum of g * (q - w / s)` inside and `sum of g * q` outside. What comes out can be stored bit for bit, in the
blocks or the packed codes of a format that exists.

On a CPU this runs in C (learned.c); the torch code gives the same values on any device.
Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); Esser et al. 2019, arXiv:1902.08153 (learned step size).
    Their factor 1 / sqrt(n * high) is left out: Adam divides it away.
"""

import ctypes
from dataclasses import dataclass

import torch

from gemma_qat_kit.errors import unknown_name
from gemma_qat_kit.formats import mobile, native, q4_0, q4_0_importance
from gemma_qat_kit.formats.groups import check
from gemma_qat_kit.formats.quantized import Quantized, quantize

_SHARES = torch.linspace(0.15, 1.1, 20)  # of the scale that the largest weight asks for, which is one of them


@dataclass(frozen=True)
class Grid:
    """Which codes there are, which weights share a scale, and the format that stores both.

    Attributes:
        name: As in `GRIDS`.
        bits: Of a code; codes are -2**(bits - 1) to 2**(bits - 1) - 1.
        group_size: Weights of a row that share a scale; None is the whole row.
        stored_as: The format, as in `formats.quantized.FORMATS`; its codes may have more bits.
    """

    name: str
    bits: int
    group_size: int | None
    stored_as: str

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def is_half(self) -> bool:
        """Whether the file rounds scales to float16; such a scale may be negative."""
        return self.stored_as == "q4_0"

    def stored_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Return float32 scales as the file has them."""
        return scale.half().float() if self.is_half else scale.float()

    def codes(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the codes, int8 (..., in), of a weight (..., in) with scales (..., groups)."""
        return self.levels(weight, scale).flatten(-2).to(torch.int8)

    def levels(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the codes, float32 (..., groups, weights of a group); a NaN stays one."""
        step = self.stored_scale(scale)[..., None]
        ratio = weight.float().unflatten(-1, (scale.shape[-1], -1)) / torch.where(step == 0, 1, step)
        return torch.where(step == 0, 0, ratio.round().clamp(self.low, self.high))

    def plain(self, weight: torch.Tensor) -> Quantized:
        """Return what the plain rule keeps of a weight: the largest of each group decides the scale."""
        if self.bits == FORMAT_BITS[self.stored_as]:
            group_size = None if self.is_half else self.group_size
            return quantize(weight.detach(), self.stored_as, group_size=group_size)
        groups = weight.detach().float().reshape(-1, self.group_size)
        return self.store(weight, (q4_0.extremum(groups) / self.low).view(*weight.shape[:-1], -1))

    def store(self, weight: torch.Tensor, scale: torch.Tensor) -> Quantized:
        """Return what a file stores of a weight (..., in) with scales (..., groups)."""
        codes, scale = self.codes(weight.detach(), scale.detach()), scale.detach().float()
        if self.stored_as == "q4_0":
            return Quantized("q4_0", tuple(weight.shape), {"blocks": q4_0.pack(codes, scale)})
        packed = mobile.pack(codes, self.bits)
        return Quantized(self.stored_as, tuple(weight.shape), {"packed": packed, "scale": scale})


FORMAT_BITS = {"q4_0": 4, "mobile_int8": 8, "mobile_int4": 4, "mobile_int2": 2}
GRIDS = {
    grid.name: grid
    for grid in (
        Grid("q4_0", 4, 32, "q4_0"),
        Grid("int3_g32", 3, 32, "q4_0"),
        Grid("int2_g32", 2, 32, "q4_0"),
        Grid("mobile_int8", 8, None, "mobile_int8"),
        Grid("mobile_int4", 4, None, "mobile_int4"),
        Grid("mobile_int2", 2, None, "mobile_int2"),
    )
}
"""Every grid by its name: Q4_0, groups of 32 in 3 and 2 bits (which Q4_0's blocks hold), and mobile's three."""


def find_grid(name: str) -> Grid:
    """Return a grid by its name.

    Raises:
        UnknownNameError: With the nearest name.
    """
    if name not in GRIDS:
        raise unknown_name("grid", name, GRIDS)
    return GRIDS[name]


def starting_scale(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None, name: str = "This tensor"
) -> torch.Tensor:
    """Return the scales to begin training with: those that lose least of the outputs, as far as inputs are known.

    Args:
        weight: Float, (..., in).
        grid: Which codes and groups.
        importance: Mean squared inputs, float32 (in,), or None: the rule of the format, where only weights count.
        name: What an error calls the weight.

    Returns:
        float32 (..., groups).

    Raises:
        BadTensorError: NaN or an infinity, or rows that do not divide into groups.
    """
    if grid.name == "q4_0":
        found = quantize(weight, "q4_0", name=name) if importance is None else None
        blocks = found.tensors["blocks"] if found else q4_0_importance.quantize(weight, importance, name)
        return q4_0.unpack(blocks)[1]
    check(weight, grid.group_size, name)
    plain = mobile.quantize(weight, grid.bits, group_size=grid.group_size, name=name)[1]
    if importance is None and grid.bits == 8:
        return plain
    width = weight.shape[-1]
    inputs = torch.ones(width) if importance is None else importance.float().clamp_min(1e-12 * importance.max())
    groups = weight.detach().float().reshape(-1, grid.group_size or width)
    u = inputs.to(weight.device).view(-1, groups.shape[-1])
    # Only as many rows at a time as stay in a core's cache.
    step = max(1, 2**19 // width) * len(u)
    parts = [
        _search(rows, u.repeat(len(rows) // len(u), 1), scales, grid)
        for rows, scales in zip(groups.split(step), plain.reshape(-1).split(step), strict=True)
    ]
    return torch.cat(parts).view(plain.shape)


def _search(groups: torch.Tensor, u: torch.Tensor, plain: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the scale of each group (n, size) that loses least, weighted by u, fitted to the codes that it gives."""
    best, found = torch.full_like(plain, torch.inf), plain.clone()
    signs = (1, -1) if grid.is_half else (1,)
    for share in (sign * share for share in _SHARES.tolist() for sign in signs):
        scale = plain * share
        codes = (groups / torch.where(scale == 0, 1, scale)[:, None]).round_().clamp_(grid.low, grid.high)
        weighted = u * codes
        fitted = (weighted * groups).sum(-1) / (weighted * codes).sum(-1)
        fitted = torch.where(torch.isfinite(fitted), fitted, scale)
        lost = (u * (groups - codes * fitted[:, None]).square_()).sum(-1)
        is_better = lost < best
        best, found = torch.where(is_better, lost, best), torch.where(is_better, fitted, found)
    return found


def learned_fake_quantize(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values that a grid keeps of a weight, with gradients for the weight and for its scales.

    Args:
        weight: float32, (..., in).
        scale: float32, (..., groups).
        grid: Which codes there are.
        dtype: Of the result.

    Returns:
        The weight's shape. What a file's reader computes: for Q4_0's blocks the float32 product, rounded; for mobile
        the product in `dtype`, as transformers has it.
    """
    return _Learned.apply(weight, scale, grid, dtype)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, scale: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
        weight, scale = weight.float().contiguous(), scale.float().contiguous()
        ctx.save_for_backward(weight, scale)
        ctx.grid = grid
        if native.can_run(weight) and (grid.is_half or dtype == torch.float32):
            kept = native.empty(weight.shape, torch.float32)
            native.run("learned_forward", weight, *_arguments(weight, scale, grid), target=kept, beside=(scale,),
                       group_size=weight.numel() // scale.numel())  # fmt: skip
            return kept.to(dtype)
        computed_in = torch.float32 if grid.is_half else dtype
        step = grid.stored_scale(scale)[..., None].to(computed_in)
        return (grid.levels(weight, scale).to(computed_in) * step).flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        gradient = gradient.float().contiguous()
        if native.can_run(weight):
            of_weight, of_scale = native.empty(weight.shape, torch.float32), torch.empty_like(scale)
            native.run("learned_backward", weight, *_arguments(weight, scale, ctx.grid), target=of_weight,
                       beside=(scale, gradient), results=(of_scale,),
                       group_size=weight.numel() // scale.numel())  # fmt: skip
            return of_weight, of_scale, None, None
        step = ctx.grid.stored_scale(scale)[..., None]
        ratio = weight.unflatten(-1, (scale.shape[-1], -1)) / torch.where(step == 0, 1, step)
        codes = ratio.round()
        inside = (codes >= ctx.grid.low) & (codes <= ctx.grid.high) | (step == 0)
        grouped = gradient.unflatten(-1, (scale.shape[-1], -1))
        moved = torch.where(inside, codes - ratio, codes.clamp(ctx.grid.low, ctx.grid.high))
        of_scale = torch.where(step == 0, 0, grouped * moved).sum(-1)
        return (grouped * inside).flatten(-2), of_scale, None, None


def _arguments(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> tuple:
    return int(grid.is_half), grid.low, grid.high, ctypes.c_int64(weight.numel() // scale.numel())
