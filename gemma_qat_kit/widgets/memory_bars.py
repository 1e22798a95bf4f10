"""Stacked bars of the parts of memory, as inline SVG: one colour per part, one way of filling per place.

Full colour is memory of its own, GPU or private. Stripes are pages of a file, which the system can take back; pale
stripes are pages that it runs as well without. A dashed outline is what stays on disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gemma_qat_kit.memory.parts import (
    ACTIVATIONS,
    ADAPTERS,
    AUDIO,
    DRAFTER,
    EMBEDDINGS,
    ENGINE,
    GRADIENTS,
    KEY_VALUES,
    LOGITS,
    OPTIMIZER,
    REPACKED,
    TABLE,
    TEACHER,
    TEXT_LAYERS,
    VISION,
    Part,
    Parts,
)
from gemma_qat_kit.units import GIB, readable_bytes
from gemma_qat_kit.widgets.look import escape

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/) and shades of it: what belongs together is akin.
PART_COLOURS = {
    TEXT_LAYERS: "#0072B2",
    REPACKED: "#56B4E9",
    EMBEDDINGS: "#009E73",
    TABLE: "#E69F00",
    VISION: "#CC79A7",
    AUDIO: "#A05195",
    DRAFTER: "#7A5C99",
    ADAPTERS: "#004B76",
    KEY_VALUES: "#D55E00",
    ACTIVATIONS: "#F0E442",
    LOGITS: "#B3A800",
    GRADIENTS: "#8C4A2F",
    OPTIMIZER: "#5D6D7E",
    TEACHER: "#B08D57",
    ENGINE: "#999999",
}
_SHORT = {
    EMBEDDINGS: "embeddings",
    TABLE: "per-layer",
    REPACKED: "repacked",
    TEACHER: "teacher",
    KEY_VALUES: "KV cache",
}
_DARK = (TEXT_LAYERS, EMBEDDINGS, AUDIO, DRAFTER, ADAPTERS, GRADIENTS, OPTIMIZER)  # colours that white reads on
WARNING = "var(--jp-error-color1, #D32F2F)"
WIDTH, LEFT, RIGHT = 420, 34, 14
_STEPS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_LETTER = 5.6  # pixels that a letter of a label takes, about


@dataclass(frozen=True)
class Bar:
    """One bar to draw.

    Attributes:
        name: What it stands for, in front of it: "GPU", "RAM".
        parts: The parts, first the ones at the left.
        limit_bytes: How much there is; None draws no mark.
        height: Pixels.
    """

    name: str
    parts: tuple[Part, ...]
    limit_bytes: int | None = None
    height: int = 14

    @property
    def length(self) -> int:
        """Bytes from the left end to the right one."""
        return sum(part.nbytes for part in self.parts)


def parts_in(parts: Parts, memory: str, *, with_disk: bool = True) -> tuple[Part, ...]:
    """Return the parts in "GPU" or "RAM": what is needed first, then spare pages, then what stays on disk."""
    places = ("gpu",) if memory == "GPU" else ("ram", "mapped", *(["disk"] if with_disk else []))
    found = (part for part in parts.placed if part.place in places and part.nbytes)
    return tuple(sorted(found, key=lambda part: (part.place == "disk", part.is_spare)))


def axis_end(bars: Iterable[Bar]) -> float:
    """Return the bytes at the right end of the axis: round, and beyond the longest bar."""
    longest = max((bar.length for bar in bars), default=0) * 1.03 / GIB
    return GIB * next((step for step in _STEPS if step >= longest), longest)


def draw_bar(bar: Bar, y: float, end: float) -> str:
    """Draw a bar at a height of the picture, with its name, on an axis that ends at `end` bytes."""
    drawn, start = [text(LEFT - 5, y + bar.height / 2 + 4, bar.name, "end", size=10), _room(bar, y, end)], 0
    for part in bar.parts:
        drawn.append(_segment(part, _x(start, end), _x(start + part.nbytes, end), y, bar.height))
        start += part.nbytes
    return "".join([*drawn, _limit(bar, y, end)])


def _x(nbytes: int, end: float) -> float:
    return LEFT + min(nbytes / end, 1.0) * (WIDTH - LEFT - RIGHT)


def _room(bar: Bar, y: float, end: float) -> str:
    """Draw how much there is as a pale ground, which the parts fill."""
    width = 0 if bar.limit_bytes is None else _x(bar.limit_bytes, end) - LEFT
    return f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{bar.height}" fill="currentColor" opacity=".1"/>'


def _segment(part: Part, start: float, stop: float, y: float, height: float) -> str:
    colour, width = PART_COLOURS[part.name], stop - start
    box = f'x="{start:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}"'
    title = f"<title>{escape(part.name)}, {readable_bytes(part.nbytes)}</title>"
    label = _label(part, start, width, y + height / 2) if height > 10 else ""
    if part.place == "disk":
        inner = f'x="{start + 1:.1f}" y="{y + 0.5:.1f}" width="{max(width - 2, 0.5):.1f}" height="{height - 1}"'
        outline = f'<rect {inner} fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="3 2"/>'
        return f"<g>{title}{outline}{label}</g>"
    edge = 'stroke="rgba(127,127,127,.9)" stroke-width=".6"'
    if part.place != "mapped":
        return f'<g>{title}<rect {box} fill="{colour}" {edge}/>{label}</g>'
    middle = f'x1="{start:.1f}" x2="{stop:.1f}" y1="{y + height / 2:.1f}" y2="{y + height / 2:.1f}"'
    dashes, pale = ("2 3", ' opacity=".55"') if part.is_spare else ("4 1.5", "")
    stripes = f'<line {middle} stroke="{colour}" stroke-width="{height}" stroke-dasharray="{dashes}"/>'
    return f'<g>{title}<g{pale}>{stripes}<rect {box} fill="none" {edge}/></g>{label}</g>'


def _label(part: Part, start: float, width: float, y: float) -> str:
    """Write the part's name on its segment, where it has room."""
    name = _SHORT.get(part.name, part.name)
    if width < _LETTER * len(name) + 6:
        return ""
    is_on_colour = part.place in ("gpu", "ram")
    colour = ("#fff" if part.name in _DARK else "#000") if is_on_colour else "currentColor"
    # Stripes would make a name hard to read: it stands on a patch of the page.
    halo = "" if is_on_colour else ' stroke="var(--jp-layout-color1, Canvas)" stroke-width="4" paint-order="stroke"'
    return text(start + width / 2, y + 3.5, name, "middle", size=10, more=f'fill="{colour}"{halo}')


def _limit(bar: Bar, y: float, end: float) -> str:
    """Mark how much there is, and what lies beyond it; a limit beyond the axis is an arrow."""
    if bar.limit_bytes is None:
        return ""
    if bar.limit_bytes > end:
        tip, middle = WIDTH - 3, y + bar.height / 2
        return f'<path d="M{tip - 6} {middle - 4}L{tip} {middle}L{tip - 6} {middle + 4}Z" fill="currentColor"/>'
    x = _x(bar.limit_bytes, end)
    needed = sum(part.nbytes for part in bar.parts if part.place != "disk" and not part.is_spare)
    beyond = ""
    if needed > bar.limit_bytes:
        stop, height = _x(needed, end), bar.height + 4
        outline = f"M{x:.1f} {y - 2:.1f}H{stop:.1f}V{y - 2 + height:.1f}H{x:.1f}Z"
        beyond = f'<path d="{outline}" fill="{WARNING}" fill-opacity=".2" stroke="{WARNING}" stroke-width="2"/>'
    mark = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3:.1f}" y2="{y + bar.height + 3:.1f}"'
    return f'{beyond}{mark} stroke="currentColor" stroke-width="2.5"/>'


def draw_axis(y: float, end: float) -> str:
    """Draw the axis under the bars, in GiB."""
    count = 4 if end == GIB or (end / GIB / 4) * 2 % 1 == 0 else 3
    drawn = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".5"/>']
    for step in range(count + 1):
        x, value = _x(step * end / count, end), step * end / count / GIB
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}" stroke="currentColor" opacity=".5"/>')
        name, anchor = (f"{value:.3g} GiB", "end") if step == count else (f"{value:.3g}", "middle")
        drawn.append(text(x + RIGHT * (step == count), y + 16, name, anchor, size=10.5))
    return "".join(drawn)


def text(
    x: float, y: float, words: object, anchor: str = "start", *, size: float = 12, more: str = "", quiet: str = ""
) -> str:
    """Write words into the picture, and behind them smaller ones; they are escaped here."""
    behind = f'<tspan dx="6" font-size="11" font-weight="400" opacity=".75">{escape(quiet)}</tspan>' if quiet else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
    return f"<text {place} {more}>{escape(words)}{behind}</text>"


def svg(drawn: str, height: float, in_words: str) -> str:
    """Put what was drawn into a picture that fits its page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'style="width:100%;max-width:{WIDTH}px;display:block" aria-label="{escape(in_words)}" fill="currentColor" '
        f'font-size="12" font-family="var(--jp-ui-font-family, system-ui, sans-serif)">{drawn}</svg>'
    )
