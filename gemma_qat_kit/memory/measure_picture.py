"""Memory over time as a picture that stands still: inline SVG, for GitHub, print, and wherever no widget runs."""

import html
import math

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.memory.measure_process import Moment
from gemma_qat_kit.memory.measure_samples import PLACES_IN_MEMORY
from gemma_qat_kit.memory.parts import PLACE_LABELS
from gemma_qat_kit.units import readable_bytes

PLACE_COLOURS = {"ram": "#0072B2", "mapped": "#56B4E9", "gpu": "#E69F00"}  # Okabe and Ito's, as in FORMAT_COLOURS
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 280, 64, 14, 46, 40
_MOST_POINTS, _MOST_MARKS = 250, 8  # drawn
_STEPS = (1, 2, 5, 10)
_HALO = ' stroke="var(--jp-layout-color1, Canvas)" stroke-width="4" paint-order="stroke"'  # text over the areas


def draw(use) -> str:
    """Return a MemoryOverTime as HTML: the places stacked over time, marks and the peak labelled, numbers below."""
    try:
        peak, samples = use.peak, use.samples
    except (BadSettingError, MissingLibraryError) as err:
        return f'{PANEL_STYLE}<div class="gqk-panel">{html.escape(str(err))}</div>'
    return (
        f'{PANEL_STYLE}<div class="gqk-panel"><figure style="margin:0;max-width:{WIDTH}px">'
        f"{_svg(_thinned(samples), use.marks[:_MOST_MARKS], peak, str(use))}</figure>{_table(use, peak)}</div>"
    )


def _thinned(samples: tuple[Moment, ...]) -> list[Moment]:
    """Return few enough samples to draw, of each stretch the highest, and both ends."""
    size = math.ceil(len(samples) / _MOST_POINTS)
    chunks = (samples[i : i + size] for i in range(0, len(samples), size))
    highest = [max(chunk, key=lambda moment: moment.total_bytes) for chunk in chunks]
    return sorted({samples[0], *highest, samples[-1]}, key=lambda moment: moment.seconds)


def _table(use, peak) -> str:
    rows = ""
    columns = (use.before, use.after, peak)
    for place in PLACES_IN_MEMORY:
        if peak.in_place(place):
            dot = f'<span class="gqk-dot" style="background:{PLACE_COLOURS[place]}" aria-hidden="true"></span>'
            rows += _row(dot + PLACE_LABELS[place], [column.in_place(place) for column in columns])
    rows += _row("together", [column.total_bytes for column in columns])
    head = "".join(f'<th class="gqk-bytes" scope="col">{name}</th>' for name in ("Before", "After", "Peak"))
    return (
        f'<table class="gqk-table"><thead><tr><th scope="col">Measured</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _row(name: str, numbers: list[int]) -> str:
    cells = "".join(f'<td class="gqk-bytes">{readable_bytes(number)}</td>' for number in numbers)
    return f"<tr><td>{name}</td>{cells}</tr>"


def _svg(samples: list[Moment], marks: tuple, peak, words: str) -> str:
    last = max(samples[-1].seconds, 1e-3)
    most = max(1, peak.moment.total_bytes)

    def x(seconds: float) -> float:
        return LEFT + min(seconds / last, 1) * (WIDTH - LEFT - RIGHT)

    def y(nbytes: float) -> float:
        return HEIGHT - BOTTOM - nbytes / most * (HEIGHT - TOP - BOTTOM)

    drawn = [*_areas(samples, x, y), *_axes(last, most, x, y), *_marks(marks, x), *_peak(peak, x, y)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="width:100%" aria-label="{html.escape(words)}" '
        f'fill="currentColor" font-size="12" font-family="var(--jp-ui-font-family, system-ui, sans-serif)">'
        f"{''.join(drawn)}</svg>"
    )


def _areas(samples: list[Moment], x, y) -> list[str]:
    """Stack the places: each area lies on the sum of those before it."""
    below, areas = [0] * len(samples), []
    for place in PLACES_IN_MEMORY:
        above = [low + moment.in_place(place) for low, moment in zip(below, samples, strict=True)]
        if above == below:
            continue
        outline = [*zip(samples, above, strict=True), *reversed(list(zip(samples, below, strict=True)))]
        points = " ".join(f"{x(moment.seconds):.1f},{y(nbytes):.1f}" for moment, nbytes in outline)
        areas.append(f'<polygon points="{points}" fill="{PLACE_COLOURS[place]}" fill-opacity=".75"/>')
        below = above
    return areas


def _axes(last: float, most: int, x, y) -> list[str]:
    parts = [_text(0, 14, "Memory over time, measured"), _text(WIDTH - RIGHT, HEIGHT - 4, "seconds", "end")]
    unit = 2 ** (10 * min(3, int(math.log2(most) // 10)))
    for value in _round_values(most / unit):
        nbytes = value * unit
        parts += [_line(LEFT, y(nbytes), WIDTH - RIGHT, y(nbytes), 0.25),
                  _text(LEFT - 6, y(nbytes) + 4, readable_bytes(round(nbytes)) if value else "0", "end")]  # fmt: skip
    parts += [_text(x(seconds), HEIGHT - BOTTOM + 16, f"{seconds:g}", "middle") for seconds in _round_values(last)]
    return parts


def _round_values(limit: float) -> list[float]:
    """Return three to six round numbers from zero up to a limit."""
    power = 10.0 ** math.floor(math.log10(limit))
    step = next(size for factor in (0.1, 1) for part in _STEPS if limit / (size := factor * part * power) <= 5)
    return [float(f"{i * step:.6g}") for i in range(int(limit / step + 1e-9) + 1)]


def _marks(marks: tuple, x) -> list[str]:
    """Draw a line for each mark, its name beside it; the names take two rows in turn."""
    parts = []
    for i, (name, moment) in enumerate(marks):
        at, is_late = x(moment.seconds), x(moment.seconds) > (LEFT + WIDTH) / 2
        parts.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
                     'stroke-dasharray="4 3"/>')  # fmt: skip
        parts.append(
            _text(at - 4 if is_late else at + 4, TOP + 26 + i % 3 * 14, name[:24], "end" if is_late else "start", _HALO)
        )
    return parts


def _peak(peak, x, y) -> list[str]:
    at, height = x(peak.moment.seconds), y(peak.moment.total_bytes)
    anchor, side = ("end", -8) if at > (LEFT + WIDTH) / 2 else ("start", 8)
    label = f"peak {readable_bytes(peak.total_bytes)}"
    return [f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4" fill="none" stroke="currentColor" stroke-width="2"/>',
            _text(at + side, height - 8, label, anchor, _HALO)]  # fmt: skip


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" opacity="{opacity}"/>'


def _text(x: float, y: float, text: object, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(str(text))}</text>'
