"""Keep the grid of QAT weights: find, group by group, the step that they already lie on.

A QAT checkpoint's bfloat16 weights are q * scale with codes in [-8, 7], rounded. In most groups no weight uses the code
-8, and Q4_0's plain rule, which gives the largest weight that code, then picks another step and moves every weight. So
for each group the peak levels k = 1 ... 8 are tried: does extreme / -k pass through all 32 weights, each allowed the
rounding of its type? The smallest k that does is the group's; its float16 scale is then the one, among the neighbours
of that step, which gives back most weights bit for bit. Where no level fits, the plain rule stands.

On a CPU this runs in C (q4_0.c); the torch code here gives the same bytes on any device.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gemma_qat_kit.formats import native
from gemma_qat_kit.formats.q4_0 import GROUP_SIZE, by_groups, empty_blocks, extremum, pack, plain_rule, ready

# Half a unit in the last place, relative, of the type that the weights were rounded to. Float32 weights get some room:
# whoever made them multiplied in float32 too.
_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
_TINY = 1e-30  # a group below this is zero in Q4_0
_COUNTS = ("num_groups", "groups_on_grid", "groups_exact", "values_exact", "naive_groups_exact", "naive_values_exact")


@dataclass(frozen=True)
class GridFit:
    """How much of a tensor lies on a Q4_0 grid, and how much of it the codes keep.

    A weight is exact when its dequantized value, rounded to the type that the weights came in, is the weight itself.

    Attributes:
        num_groups: Groups of 32.
        groups_on_grid: Groups through whose weights some grid passes, within the rounding of their type.
        groups_exact: Groups all of whose weights are exact.
        num_values: Weights.
        values_exact: Weights that are exact.
        naive_groups_exact: As `groups_exact`, by the plain rule.
        naive_values_exact: As `values_exact`, by the plain rule.
        worst_error: Largest error of a weight, as a share of its group's largest magnitude.
        peak_levels: Groups on a grid, by the level of their largest weight, 1 to 8.
    """

    num_groups: int
    groups_on_grid: int
    groups_exact: int
    num_values: int
    values_exact: int
    naive_groups_exact: int
    naive_values_exact: int
    worst_error: float
    peak_levels: tuple[int, ...]

    @classmethod
    def sum(cls, fits: Iterable["GridFit"]) -> "GridFit":
        """Return the fit of several tensors together."""
        fits = list(fits)
        counts = {name: sum(getattr(fit, name) for fit in fits) for name in ("num_values", *_COUNTS)}
        levels = tuple(sum(fit.peak_levels[i] for fit in fits) for i in range(8))
        return cls(**counts, worst_error=max((fit.worst_error for fit in fits), default=0.0), peak_levels=levels)

    @property
    def share_on_grid(self) -> float:
        """Share of the groups that lie on a grid, 0 to 1."""
        return self.groups_on_grid / max(1, self.num_groups)

    @property
    def share_exact(self) -> float:
        """Share of the weights that are exact, 0 to 1."""
        return self.values_exact / max(1, self.num_values)

    @property
    def naive_share_exact(self) -> float:
        """Share of the weights that the plain rule keeps exact, 0 to 1."""
        return self.naive_values_exact / max(1, self.num_values)

    def __str__(self) -> str:
        groups, naive = (n / max(1, self.num_groups) for n in (self.groups_exact, self.naive_groups_exact))
        return (
            f"{self.share_on_grid:.2%} of {self.num_groups:,} groups lie on a Q4_0 grid. Exact in the type they came "
            f"in: {groups:.2%} of the groups, {self.share_exact:.2%} of the weights; by the plain rule {naive:.2%} and "
            f"{self.naive_share_exact:.2%}. Worst error before that rounding: {self.worst_error:.2%} of a group's "
            "largest weight."
        )


class _Counts(ctypes.Structure):
    """What the kernel counts; the order is that of `Fit` in q4_0.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in _COUNTS), ("peak_levels", ctypes.c_int64 * 8),
                ("worst_error", ctypes.c_double))  # fmt: skip


def quantize(weight: torch.Tensor, name: str = "This tensor") -> tuple[torch.Tensor, GridFit]:
    """Round a weight to Q4_0 on the grid that it lies on, group by group; by the plain rule where there is none.

    Args:
        weight: As in `q4_0.quantize`. A float32 group whose values all are 16-bit numbers is taken as such.
        name: What an error calls it.

    Returns:
        Blocks, uint8 (..., in / 32 * 18), and how much of the weight they keep.

    Raises:
        BadTensorError: As `q4_0.quantize`.
    """
    weight = ready(weight, name)
    if not native.can_run(weight):
        codes, scale, *facts = by_groups(_on_grid, weight)
        return pack(codes, scale), _fit(*facts)
    blocks = empty_blocks(weight)
    dtype = native.DTYPES[weight.dtype]
    counts = native.run("q4_0_recover", weight, dtype, target=blocks, group_size=GROUP_SIZE, tail=_Counts, name=name)
    return blocks, GridFit.sum(_as_fit(part) for part in counts)


def _as_fit(counts: _Counts) -> GridFit:
    numbers = {name: getattr(counts, name) for name in _COUNTS}
    num_values = numbers["num_groups"] * GROUP_SIZE
    return GridFit(
        **numbers, num_values=num_values, worst_error=counts.worst_error, peak_levels=tuple(counts.peak_levels)
    )


def _on_grid(groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return codes (n, 32), scales (n,), levels (n,; 0 is no grid), exact weights by both rules (n,), errors (n,)."""
    v, precision = groups.float(), _Precision(groups)
    extreme = extremum(v)
    codes, scale = plain_rule(v, extreme)
    scale = scale.half().float()
    naive = _count_exact(v, codes, scale, precision)
    is_zero = extreme.abs() < _TINY
    level = torch.where(is_zero, 8, _peak_level(v, extreme, precision.unit))
    found = ((level > 0) & ~is_zero)[:, None]
    codes = torch.where(found, torch.round(v * (-level / extreme)[:, None]).nan_to_num(), codes)
    fitted, exact = _best_scale(v, codes, extreme / -level.clamp(min=1), precision)
    scale, exact = torch.where(found[:, 0], fitted, scale), torch.where(found[:, 0], exact, naive)
    errors = torch.where(extreme == 0, 0, _largest_error(v, codes, scale) / extreme.abs())
    return codes.to(torch.int8), scale, level, exact, naive, errors


class _Precision:
    """The type that the values of each group (n, 32) were rounded to: the narrowest that holds them all."""

    def __init__(self, groups: torch.Tensor):
        dtypes = (torch.bfloat16, torch.float16) if groups.dtype == torch.float32 else (groups.dtype,)
        self._held = [(dtype, (groups.to(dtype).to(groups.dtype) == groups).all(-1, keepdim=True)) for dtype in dtypes]
        self.unit = torch.full_like(groups[:, :1], _UNIT[torch.float32], dtype=torch.float32)
        for dtype, holds in reversed(self._held):
            self.unit[holds] = _UNIT[dtype]

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Round float32 values (n, 32) to their group's type."""
        rounded = values
        for dtype, holds in reversed(self._held):
            rounded = torch.where(holds, values.to(dtype).float(), rounded)
        return rounded


def _peak_level(v: torch.Tensor, extreme: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the smallest level that fits within half a unit, else the smallest within three halves, else 0; (n,)."""
    tight, loose = (torch.zeros_like(extreme, dtype=torch.int64) for _ in range(2))
    for level in range(8, 0, -1):
        step = extreme / -level
        codes = torch.round(v * (-level / extreme)[:, None]).clamp(max=7)
        off = (codes * step[:, None] - v).abs()
        bound = unit * v.abs() + codes.abs() * (unit * step.abs()[:, None])
        for found, halves in ((tight, 1), (loose, 3)):
            found[~(off > halves * bound).any(-1)] = level
    return torch.where(tight > 0, tight, loose)


def _best_scale(v, codes, step, precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float16 scale, among the step's and the least-squares step's neighbours, that keeps most weights.

    Where the step was a bfloat16 number, one of its three nearest gives back every weight.
    """
    q = codes.double()
    least_squares = ((q * v).sum(-1) / (q * q).sum(-1)).nan_to_num().float().half()
    best = exact = error = None
    for scale in _candidates(step, least_squares):
        count, worst = _count_exact(v, codes, scale, precision), _largest_error(v, codes, scale)
        if best is None:
            best, exact, error = scale, count, worst
            continue
        better = (count > exact) | ((count == exact) & (worst < error) & (exact < GROUP_SIZE))
        best, exact, error = (torch.where(better, new, old) for new, old in
                              ((scale, best), (count, exact), (worst, error)))  # fmt: skip
    return best, exact


def _candidates(step: torch.Tensor, least_squares: torch.Tensor) -> Iterable[torch.Tensor]:
    """Yield a bfloat16 number and its neighbours, then a float16 number and its neighbours, as float16 values."""
    for number in (step.bfloat16(), least_squares):
        for near in (0, 1, -1):
            yield (number.view(torch.int16) + near).view(number.dtype).float().half().float()


def _count_exact(v, codes, scale, precision) -> torch.Tensor:
    return (precision.round(codes * scale[:, None]) == v).sum(-1)


def _largest_error(v, codes, scale) -> torch.Tensor:
    return (codes * scale[:, None] - v).abs().amax(-1)


def _fit(levels, exact, naive, errors) -> GridFit:
    num_groups = len(levels)
    return GridFit(
        num_groups=num_groups,
        groups_on_grid=int((levels > 0).sum()),
        groups_exact=int((exact == GROUP_SIZE).sum()),
        num_values=num_groups * GROUP_SIZE,
        values_exact=int(exact.sum()),
        naive_groups_exact=int((naive == GROUP_SIZE).sum()),
        naive_values_exact=int(naive.sum()),
        worst_error=float(errors.max()),
        peak_levels=tuple(int((levels == level).sum()) for level in range(1, 9)),
    )
