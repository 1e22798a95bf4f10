"""Draw a group of weights once and for good: for GitHub, print, and wherever no widget runs.

`one_group.Group` draws itself with this, so nothing here imports it.
"""

import math

from gemma_qat_kit.quality.format_table import METHOD_COLOURS
from gemma_qat_kit.widgets.look import escape, line

WIDTH, TOP, PLOT, LEFT, RIGHT = 720, 10, 240, 56, 34
_HEIGHT = TOP + PLOT + 30
_SMALLEST_GAP = 11  # pixels between two labels that can still be read


def draw(group) -> str:
    """Return the picture as HTML with inline SVG: weights over the levels of their format, codes, bytes and facts."""
    facts = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in group.facts)
    stored = " ".join(f"{byte.value:02x}" for byte in group.packed)
    return (
        f'<figure style="margin:0;max-width:{WIDTH}px"><figcaption>{escape(group.title)}</figcaption>{_svg(group)}'
        f'<ul style="margin:0;padding-left:1.2em">{facts}<li>Bytes: <code>{stored}</code></li></ul></figure>'
    )


def group_colour(group) -> str:
    """Return the colour of a group's format: Q4_0 by the plain rule and Q4_0 on its recovered grid have one each."""
    return METHOD_COLOURS[group.format if group.peak_level is None else "q4_0+grid"]


def plot_limit(group) -> float:
    """Return the weight at the picture's upper edge: above every weight, and above the level next to zero."""
    near = min((abs(value) for _, value in group.levels if value), default=0.0)
    return max(1.3 * max(map(abs, group.values)), 1.15 * near) or 1.0


def round_ticks(limit: float) -> list[tuple[float, str]]:
    """Return round weights between -limit and limit, with their texts."""
    power = 10.0 ** math.floor(math.log10(limit / 2))
    step = next(factor * power for factor in (5, 2, 1) if factor * power <= limit / 2)
    count = int(limit / step)
    return [(i * step, f"{i * step:.3g}") for i in range(-count, count + 1)]


def _svg(group) -> str:
    limit = plot_limit(group)

    def y(value: float) -> float:
        return TOP + PLOT / 2 * (1 - max(-1.0, min(1.0, value / limit)))

    labels = [_text(LEFT - 8, y(value) + 4, text, "end") for value, text in round_ticks(limit)]
    weights = "".join(_weight(group, i, y) for i in range(len(group.values)))
    zero = line(LEFT, y(0), WIDTH - RIGHT, y(0), "currentColor", 1, 0.6)
    caption = _text(LEFT - 8, TOP + PLOT + 20, "code", "end")
    drawn = "".join([*_levels(group, limit, y), *labels, zero, weights, caption])
    return (
        f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="{escape(_in_words(group))}" '
        f'font-family="monospace" font-size="11" fill="currentColor">{drawn}</svg>'
    )


def _in_words(group) -> str:
    return f"{group.title}. Each weight is drawn over the levels it can be stored as. {' '.join(group.lines)}"


def _levels(group, limit: float, y) -> list[str]:
    """Draw the levels that can be seen as lines, of many only some, and their codes where there is room."""
    seen = sorted((value, code) for code, value in group.levels if abs(value) <= limit)
    gap = PLOT / 2 / limit * abs(seen[-1][0] - seen[0][0]) / max(1, len(seen) - 1)
    every = 1 if gap >= 4 else 8 * math.ceil(_SMALLEST_GAP / max(gap, 0.1) / 8)
    drawn, last = [], math.inf
    for value, code in seen:
        if code % every:
            continue
        drawn.append(line(LEFT, y(value), WIDTH - RIGHT, y(value), group_colour(group), 1, 0.4))
        if last - y(value) >= _SMALLEST_GAP:
            drawn.append(_text(WIDTH - RIGHT + 6, y(value) + 4, code, "start"))
            last = y(value)
    return drawn


def _weight(group, i: int, y) -> str:
    """Draw one weight: a stem with a circle where it is, a short bar where its code puts it, and the code."""
    step = (WIDTH - LEFT - RIGHT) / len(group.values)
    x, value, snapped = LEFT + (i + 0.5) * step, y(group.values[i]), y(group.snapped[i])
    is_wide = max(len(str(code)) for code in group.codes) > 2  # too wide for one row: two, in turn
    below = TOP + PLOT + 20 + (i % 2 * 14 - 7) * is_wide
    return (
        line(x, y(0), x, value, "currentColor", 1, 0.4)
        + line(x - 7, snapped, x + 7, snapped, group_colour(group), 4, 1)
        + f'<circle cx="{x:.1f}" cy="{value:.1f}" r="4" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        + f'<text x="{x:.1f}" y="{below}" text-anchor="middle">{group.codes[i]}</text>'
    )


def _text(x: float, y: float, text: object, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity=".8">{text}</text>'
