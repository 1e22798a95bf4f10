"""The replay of a training run: where one group of weights stood after each step, over the levels of its grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.formats.grids import Grid
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.widgets.group_picture import line
from gemma_qat_kit.widgets.look import escape

NUM_WEIGHTS = 32
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 36, 8, 6, 42
_MARGIN = 0.7  # steps of the grid above the highest weight and below the lowest one
_ROWS, _NEAR = 256, 0.05  # rows that groups are looked for in; steps of the grid from a border that count as near
NUM_GROUPS = 64  # that are watched
_SMALLEST_GAP = 17  # between two labels; on a phone their letters are as high
_MOVED = "#D55E00"
_FRAME = (
    f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" fill="none" '
    'stroke="currentColor" stroke-dasharray="4 6" opacity=".4"/>'
)
_EMPTY = "The walk of 32 weights over the levels of their grid, step by step: nothing is trained yet."
_LEGEND = (
    "Lines are the levels of the grid with their codes, dotted ones where rounding tips over. A ring is where a weight "
    "began, the dot where it is now; below are the codes, orange where the code is another one than at first. Of "
    f"{NUM_GROUPS} groups of 32 neighbours that began near borders, the one in which most codes have changed is shown."
)


@dataclass(frozen=True)
class Place:
    """Where the group stood.

    Attributes:
        step: Updates made before.
        values: The masters.
        scale: Of the group, as a file stores it.
        codes: What the weights are rounded to.
    """

    step: int
    values: tuple[float, ...]
    scale: float
    codes: tuple[int, ...]

    def num_changed(self, first: "Place") -> int:
        """Return how many codes are not what they were."""
        return sum(a != b for a, b in zip(self.codes, first.codes, strict=True))

    @property
    def heights(self) -> tuple[float, ...]:
        """The masters in steps of the grid: the code is the nearest integer that there is."""
        return tuple(value / self.scale if self.scale else 0.0 for value in self.values)


@dataclass(frozen=True)
class Group:
    """Which weights are watched: neighbours in one row of the first trained weight.

    Attributes:
        name: Of the weight.
        grid: Its grid.
        row: Leading axes counted as one.
        column: Of the first of them.
    """

    name: str
    grid: Grid
    row: int = 0
    column: int = 0

    @property
    def title(self) -> str:
        """Where they lie."""
        last = self.column + NUM_WEIGHTS - 1
        return f"{self.name.removesuffix('.weight')}, row {self.row}, weights {self.column} to {last}"


def find_groups(module: nn.Module) -> list[Group]:
    """Return the groups of a prepared model that are watched: of the first rows, those with most weights near a border.

    A code changes where a weight crosses the border between two levels, and in a short training most are far from one.
    Scales near the median are asked for, since the learning rate of a weight is in steps of that.
    """
    name, (master, quantizer) = next(iter(masters(module).items()))
    grid, width = quantizer.grid, master.shape[-1]
    scale = grid.stored_scale(quantizer.scale.detach().flatten(0, -2)[:_ROWS])
    step = scale.repeat_interleave(width // scale.shape[-1], -1)
    ratio = master.detach().flatten(0, -2)[:_ROWS] / torch.where(step == 0, 1, step)
    median = quantizer.scale.detach().abs().median()
    is_usual = (step.abs() > 0.5 * median) & (step.abs() < 1.5 * median) & (ratio > grid.low) & (ratio < grid.high)
    is_near = ((ratio - ratio.floor() - 0.5).abs() < _NEAR) & is_usual
    groups = is_near[:, : width // NUM_WEIGHTS * NUM_WEIGHTS].unflatten(-1, (-1, NUM_WEIGHTS)).sum(-1)
    order = groups.flatten().argsort(descending=True, stable=True)[:NUM_GROUPS].tolist()
    return [Group(name, grid, i // groups.shape[-1], NUM_WEIGHTS * (i % groups.shape[-1])) for i in order]


def take_places(module: nn.Module, groups: Sequence[Group], step: int) -> list[Place]:
    """Copy groups of one weight as they are now."""
    master, quantizer = masters(module)[groups[0].name]
    masters_of, scales_of = (each.detach().flatten(0, -2) for each in (master, quantizer.scale))
    width, num_scales = masters_of.shape[-1], scales_of.shape[-1]
    values = torch.stack([masters_of[g.row, g.column : g.column + NUM_WEIGHTS] for g in groups]).cpu()
    scales = torch.stack([scales_of[g.row, g.column * num_scales // width] for g in groups]).cpu()[:, None]
    codes, stored = quantizer.grid.codes(values, scales), quantizer.grid.stored_scale(scales)
    return [Place(step, tuple(v), s, tuple(c)) for v, s, c in
            zip(values.tolist(), stored.flatten().tolist(), codes.tolist(), strict=True)]  # fmt: skip


def liveliest(places: Sequence[Sequence[Place]]) -> int:
    """Return which group has most codes that are not those it began with; the first of equals.

    Args:
        places: After each step, where every group stood.
    """
    return max(range(len(places[0])), key=lambda i: places[-1][i].num_changed(places[0][i]))


def replay_html(group: Group | None, places: Sequence[Place], index: int) -> str:
    """Draw the group after one of the steps, and from where each weight has come; empty before there is one."""
    words = _EMPTY if group is None else _caption(group, places, index)
    drawn = [_FRAME] if group is None else _drawn(group, places, index)
    return (
        f'<div class="gqk-text gqk-train-caption">{escape(words)}</div>'
        f'<svg class="gqk-train-svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}" '
        f'fill="currentColor" font-size="12">{"".join(drawn)}</svg>'
        f'<div class="gqk-text gqk-quiet gqk-train-legend">{_LEGEND}</div>'
    )


def _caption(group: Group, places: Sequence[Place], index: int) -> str:
    now, first = places[index], places[0]
    return (
        f"{group.title}, after step {now.step}: {now.num_changed(first)} of {len(now.codes)} codes changed; "
        f"scale {now.scale:.4g}, at first {first.scale:.4g}."
    )


def _drawn(group: Group, places: Sequence[Place], index: int) -> list[str]:
    low, high = _range(group.grid, places)

    def y(height: float) -> float:
        return TOP + (high - height) / (high - low) * (HEIGHT - TOP - BOTTOM)

    colour = FORMAT_COLOURS["q4_0" if group.grid.is_half else "mobile"]
    lines = _levels(group.grid, low, high, y, colour)
    return lines + [_weight(i, places[0], places[index], y, colour) for i in range(len(places[0].codes))]


def _range(grid: Grid, places: Sequence[Place]) -> tuple[float, float]:
    """Return what is shown: all that the weights ever were, the same in each frame, and a level on either side."""
    heights = [height for place in places for height in place.heights]
    low, high = min(heights), max(heights)
    return min(low, grid.high) - _MARGIN, max(high, grid.low) + _MARGIN


def _levels(grid: Grid, low: float, high: float, y, colour: str) -> list[str]:
    """Draw the levels that can be seen, their codes where there is room, and the borders between few of them."""
    codes = range(max(grid.low, math.ceil(low)), min(grid.high, math.floor(high)) + 1)
    gap = (HEIGHT - TOP - BOTTOM) / (high - low)
    every = 2 ** max(0, math.ceil(math.log2(_SMALLEST_GAP / gap)))
    drawn = []
    for code in codes:
        if code % every and gap < 4:
            continue
        drawn.append(line(LEFT, y(code), WIDTH - RIGHT, y(code), colour, 1.2, 0.55))
        if code % every == 0:
            drawn.append(_text(LEFT - 8, y(code) + 4, "end", code))
        if gap >= _SMALLEST_GAP and code < grid.high and code + 0.5 < high:
            border = 'stroke="currentColor" stroke-width="1" opacity=".3" stroke-dasharray="1 5"'
            drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(code + 0.5):.1f}" y2="{y(code + 0.5):.1f}" '
                         f"{border}/>")  # fmt: skip
    return drawn


def _weight(i: int, first: Place, now: Place, y, colour: str) -> str:
    """Draw a weight as a dot, where it began as a ring, the way between, and its code below."""
    x = LEFT + (i + 0.5) * (WIDTH - LEFT - RIGHT) / len(first.codes)
    start, here = y(first.heights[i]), y(now.heights[i])
    has_moved, is_wide = now.codes[i] != first.codes[i], max(map(abs, now.codes + first.codes)) > 9
    below = HEIGHT - BOTTOM + 24 + (i % 2 * 14 - 7) * is_wide  # wide codes stand in two rows, in turn
    colour = _MOVED if has_moved else colour
    label = f'font-weight="700" fill="{_MOVED}"' if has_moved else 'opacity=".7"'
    return (
        line(x, start, x, here, colour, 2.5, 0.8)
        + f'<circle cx="{x:.1f}" cy="{start:.1f}" r="4" fill="none" stroke="currentColor" opacity=".5"/>'
        + f'<circle cx="{x:.1f}" cy="{here:.1f}" r="{6 if has_moved else 4.5}" fill="{colour}"/>'
        + f'<text x="{x:.1f}" y="{below}" text-anchor="middle" {label}>{now.codes[i]}</text>'
    )


def _text(x: float, y: float, anchor: str, text: object) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
