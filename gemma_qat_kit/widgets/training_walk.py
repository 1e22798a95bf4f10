"""The walk of weights in training: where one group stood after each step, over the levels of its grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.widgets.look import escape, line

NUM_WEIGHTS = 32
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 36, 8, 6, 42
_MARGIN = 0.7  # steps of the grid above the highest weight and below the lowest one
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
    "began, the dot where it is; below are the codes, bold over orange where the code is another one than at first. Of "
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
        low, high: Smallest and largest code of its grid.
        is_half: Whether its scales are float16, as in Q4_0.
        row: Leading axes counted as one.
        column: Of the first of them.
    """

    name: str
    low: int
    high: int
    is_half: bool
    row: int = 0
    column: int = 0

    @property
    def title(self) -> str:
        """Where they lie."""
        last = self.column + NUM_WEIGHTS - 1
        return f"{self.name.removesuffix('.weight')}, row {self.row}, weights {self.column} to {last}"


def liveliest(places: Sequence[Sequence[Place]]) -> int:
    """Return which group has most codes that are not those it began with; the first of equals.

    Args:
        places: After each step, where every group stood.
    """
    return max(range(len(places[0])), key=lambda i: places[-1][i].num_changed(places[0][i]))


def walk_html(group: Group | None, places: Sequence[Place], index: int) -> str:
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
    low, high = _range(group, places)

    def y(height: float) -> float:
        return TOP + (high - height) / (high - low) * (HEIGHT - TOP - BOTTOM)

    colour = FORMAT_COLOURS["q4_0" if group.is_half else "mobile"]
    lines = _levels(group, low, high, y, colour)
    return lines + [_weight(i, places[0], places[index], y, colour) for i in range(len(places[0].codes))]


def _range(group: Group, places: Sequence[Place]) -> tuple[float, float]:
    """Return what is shown: all that the weights ever were, the same in each frame, and a level on either side."""
    heights = [height for place in places for height in place.heights]
    low, high = min(heights), max(heights)
    return min(low, group.high) - _MARGIN, max(high, group.low) + _MARGIN


def _levels(group: Group, low: float, high: float, y, colour: str) -> list[str]:
    """Draw the levels that can be seen, their codes where there is room, and the borders between few of them."""
    codes = range(max(group.low, math.ceil(low)), min(group.high, math.floor(high)) + 1)
    gap = (HEIGHT - TOP - BOTTOM) / (high - low)
    every = 2 ** max(0, math.ceil(math.log2(_SMALLEST_GAP / gap)))
    drawn = []
    for code in codes:
        if code % every and gap < 4:
            continue
        drawn.append(line(LEFT, y(code), WIDTH - RIGHT, y(code), colour, 1.2, 0.55))
        if code % every == 0:
            drawn.append(_text(LEFT - 8, y(code) + 4, "end", code))
        if gap >= _SMALLEST_GAP and code < group.high and code + 0.5 < high:
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
    label = 'font-weight="700"' if has_moved else 'opacity=".7"'
    mark = line(x - 7, below + 4, x + 7, below + 4, _MOVED, 2.5, 1) if has_moved else ""
    return (
        line(x, start, x, here, colour, 2.5, 0.8)
        + f'<circle cx="{x:.1f}" cy="{start:.1f}" r="4" fill="none" stroke="currentColor" opacity=".5"/>'
        + f'<circle cx="{x:.1f}" cy="{here:.1f}" r="{6 if has_moved else 4.5}" fill="{colour}"/>'
        + f'<text x="{x:.1f}" y="{below}" text-anchor="middle" {label}>{now.codes[i]}</text>'
        + mark
    )


def _text(x: float, y: float, anchor: str, text: object) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
