"""What MemoryPanel draws: the parts of a plan against several machines, and a plan beside its measurement."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.memory.budgets import Budget, Room
from gemma_qat_kit.memory.parts import ENGINE, PARTS, WEIGHTS, Parts
from gemma_qat_kit.memory.plan import MemoryPlan
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import escape
from gemma_qat_kit.widgets.memory_bars import (
    PART_COLOURS,
    WARNING,
    WIDTH,
    Bar,
    axis_end,
    draw_axis,
    draw_bar,
    parts_in,
    svg,
    text,
)

DEVICE_LABELS = {"cuda": "on a GPU", "cpu": "on a CPU"}
_SIGNS = {True: "✓", False: "✗", None: "?"}
_PLACES = {"gpu": "GPU", "ram": "RAM", "mapped": "pages", "disk": "on disk"}
_THIN, _ROW = 7, 18  # pixels: the bar of a memory that is not the device's own; the words above a bar
STYLE = """<style>
.gqk-memory .widget-html-content { min-width: 0; width: 100%; }
.gqk-memory-figure { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: flex-start; margin: 0; }
.gqk-memory-figure > svg { flex: 1 1 300px; min-width: 0; }
.gqk-memory-figure > .gqk-panel { flex: 1 1 270px; min-width: 0; }
.gqk-memory-figure .gqk-panel .gqk-table { font-size: 12px; }
.gqk-memory-figure .gqk-panel .gqk-table :is(th, td) { padding-right: 10px; }
.gqk-memory-figure .gqk-panel .gqk-table :is(th, td):last-child { padding-right: 0; }
.gqk-memory-figure .gqk-panel .gqk-table .gqk-name {
  white-space: normal; min-width: 7em; padding-left: 1.3em; text-indent: -1.3em;
}
.gqk-memory-figure .gqk-panel .gqk-table .gqk-sum .gqk-name { padding-left: 0; text-indent: 0; }
.gqk-memory-figure .gqk-panel .gqk-table tr.gqk-sum:first-child > * { padding-top: 6px; }
.gqk-memory-figure .gqk-swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid rgba(127, 127, 127, .8);
}
.gqk-memory-figure .gqk-small { font-size: .85em; opacity: .75; }
@media (max-width: 640px) {
  .gqk-memory-figure .gqk-small { white-space: normal; }
  .gqk-memory-figure .gqk-panel .gqk-table .gqk-name { min-width: 5.5em; }
}
</style>"""
KEY = (
    "Full colour: GPU or private memory. Stripes: pages of the file, which the system can take back; pale stripes: it "
    "runs as well without them. Dashed: left on disk. Upright line: how much there is; an arrow: more."
)


@dataclass(frozen=True)
class MemoryPicture:
    """A picture that stands still, for print and GitHub.

    Attributes:
        svg: The bars alone, on white.
        html: Bars and numbers, in the colours of the page.
    """

    svg: str
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def _repr_svg_(self) -> str:
        return self.svg.replace("display:block", "display:block;background:#fff;color:#000")

    def __repr__(self) -> str:
        return "<MemoryPicture: bars as .svg, with their numbers as .html>"


def bars_svg(rooms: Iterable[Room], *, with_legend: bool = False) -> str:
    """Draw one row per machine: its name, whether it fits, and a bar per memory with the limit marked.

    Args:
        rooms: Whether the plan fits, machine by machine.
        with_legend: Name the colours below, for a picture that stands without its table.
    """
    rooms = tuple(rooms)
    rows = [_bars(found) for found in rooms]
    end = axis_end(bar for row in rows for bar in row)
    drawn, y = [], 4.0
    for found, row in zip(rooms, rows, strict=True):
        drawn.append(_heading(found, y + 11))
        y += _ROW
        for bar in row:
            drawn.append(draw_bar(bar, y, end))
            y += bar.height + 4
        y += 9
    words = "; ".join(f"{found.budget.name}: {found.words}" for found in rooms)
    drawn.append(draw_axis(y, end))
    names = [name for name in PARTS if any(part.name == name for found in rooms for part in found.plan.placed)]
    height = y + 22
    for i, name in enumerate(names if with_legend else ()):
        x, height = WIDTH / 2 * (i % 2), y + 42 + 16 * (i // 2)
        drawn.append(f'<rect x="{x}" y="{height - 12}" width="9" height="9" fill="{PART_COLOURS[name]}"/>')
        drawn.append(text(x + 14, height - 4, name, size=11))
    return svg("".join(drawn), height, f"Memory by machine. {words}")


def _bars(found: Room) -> tuple[Bar, ...]:
    limits = {"GPU": found.budget.gpu_bytes, "RAM": found.budget.ram_bytes}
    names = ("GPU", "RAM") if found.device == "cuda" else ("RAM",)
    return tuple(Bar(n, parts_in(found.plan, n), limits[n], _THIN if i else 14) for i, n in enumerate(names))


def _heading(found: Room, y: float) -> str:
    words = f"{_SIGNS[found.fits]} {_short_words(found)}"
    more = f'font-weight="700" fill="{WARNING}"' if found.fits is False else ""
    name = text(0, y, found.budget.name, more='font-weight="600"', quiet=_has(found.budget, found.device))
    return f"<g>{name}{text(WIDTH, y, words, 'end', size=11.5, more=more)}</g>"


def _has(budget: Budget, device: str) -> str:
    if device == "cuda" and budget.gpu_bytes:
        cards = f"{budget.num_gpus} × " if budget.num_gpus > 1 else ""
        return f"{cards}{readable_bytes(budget.gpu_bytes)} GPU"
    return "RAM unknown" if budget.ram_bytes is None else f"{readable_bytes(budget.ram_bytes)} RAM"


def _short_words(found: Room) -> str:
    """Say what is missing or left in as few words as a phone has room for; `Room.words` says it in full."""
    first = found.needs[0]
    if found.fits is None:
        return f"needs {readable_bytes(first.nbytes)}"
    if found.fits:
        return f"fits, {readable_bytes(first.there_bytes - first.nbytes)} left"
    short = [need for need in found.needs if need.fits is False]
    missing = (f"{readable_bytes(n.nbytes - n.there_bytes)} {n.memory.removesuffix(' memory')}" for n in short[:2])
    return f"lacks {', '.join(missing)}" if first.there_bytes else f"no {first.memory.removesuffix(' memory')}"


def table_html(plans: Mapping[str, MemoryPlan]) -> str:
    """Write the parts of each device's plan with their bytes, and the sums.

    Args:
        plans: Device to plan, in the order of the columns.
    """
    columns = tuple(plans.values())
    heads = [DEVICE_LABELS[device] for device in plans]
    names = [name for name in PARTS if any(part.name == name for plan in columns for part in plan.placed)]
    body = "".join(_row(_swatch(name), [_places(plan, name) for plan in columns]) for name in names)
    sums = [("In memory", "total_bytes"), ("Needed", "needed_bytes"), ("Peak of the load", "load_peak_bytes")]
    rows = [(label, [_amount(getattr(plan, name)) for plan in columns]) for label, name in sums]
    rows.append(("Download", [_amount(plan.download_bytes) for plan in columns]))
    return _table(["Planned", *heads], body, "".join(_row(label, cells, "gqk-sum") for label, cells in rows))


def loaded_html(plan: MemoryPlan, use: Parts, name: str) -> str:
    """Draw what was predicted beside what is measured; what is not there before the first answer is left out."""
    is_there = {*WEIGHTS, ENGINE, *use.parts}
    answered = Parts(tuple(part for part in plan.placed if part.name in is_there))
    # Nobody says whether it has answered yet, which is when some weights are read.
    shown = min(plan.loaded, answered, key=lambda parts: abs(parts.total_bytes - use.total_bytes))
    head = f'<div class="gqk-text" style="font-weight:600;margin-top:10px">{escape(name)}, loaded here</div>'
    note = f"Measured {readable_bytes(use.total_bytes)} in memory, predicted {readable_bytes(shown.total_bytes)}."
    if len(shown.parts) < len(plan.parts):
        later = ", ".join(name for name in plan.parts if name not in shown.parts)
        note += f" Not there before the first answer: {later}."
    return head + figure_html(_compared_svg(shown, use), _compared_html(shown, use), note=note)


def _compared_svg(plan: Parts, use: Parts) -> str:
    """Draw what was predicted above what was measured, memory by memory."""
    pairs = [(n, how, parts_in(p, n, with_disk=False)) for n in ("GPU", "RAM")
             for how, p in (("predicted", plan), ("measured", use))]  # fmt: skip
    pairs = [(name, how, parts) for name, how, parts in pairs if any(n == name and p for n, _, p in pairs)]
    bars = [Bar(name, parts) for name, _, parts in pairs]
    end, drawn, y = axis_end(bars), [], 4.0
    for bar, (_, how, parts) in zip(bars, pairs, strict=True):
        nbytes = readable_bytes(sum(part.nbytes for part in parts))
        weight = 'font-weight="600"' if how == "measured" else ""
        drawn.append(text(0, y + 11, f"{bar.name}, {how}: {nbytes}", more=weight))
        faded = ' opacity=".6"' if how == "predicted" else ""
        drawn.append(f"<g{faded}>{draw_bar(bar, y + _ROW, end)}</g>")
        y += _ROW + bar.height + 12
    words = f"predicted {readable_bytes(plan.total_bytes)}, measured {readable_bytes(use.total_bytes)}"
    return svg("".join([*drawn, draw_axis(y, end)]), y + 22, words)


def _compared_html(plan: Parts, use: Parts) -> str:
    """Write what was predicted and measured, part by part, and by how much they differ."""
    names = [name for name in PARTS if name in plan.parts or name in use.parts]
    rows = [(_swatch(name), plan.parts.get(name, 0), use.parts.get(name, 0)) for name in names]
    body = "".join(_row(name, [_amount(a), _amount(b), _error(a, b)]) for name, a, b in rows)
    a, b = plan.total_bytes, use.total_bytes
    return _table(["Part", "Predicted", "Measured", "Error"], body,
                  _row("In memory", [_amount(a), _amount(b), _error(a, b)], "gqk-sum"))  # fmt: skip


def figure_html(picture: str, *tables: str, note: str = "") -> str:
    """Put bars and tables side by side, or one below the other on a phone."""
    notes = f'<div class="gqk-text gqk-quiet">{escape(note)}</div>' if note else ""
    return f'{PANEL_STYLE}{STYLE}<div class="gqk-memory-figure">{picture}{"".join(tables)}</div>{notes}'


def _amount(nbytes: int | None) -> str:
    return readable_bytes(nbytes) if nbytes else ("unknown" if nbytes is None else "–")


def _places(plan: Parts, name: str) -> str:
    """Write a part's bytes, each place on a line of its own where it is not the device's memory."""
    lines = []
    for part in (part for part in plan.placed if part.name == name):
        place = "spare " * part.is_spare + _PLACES[part.place]
        lines.append(f'{readable_bytes(part.nbytes)} <span class="gqk-small">{place}</span>')
    return "<br>".join(lines) or "–"


def _error(predicted: int, measured: int) -> str:
    """Write by how much a prediction misses: bytes with a sign, and per cent of what was measured."""
    miss = predicted - measured
    sign = "+" if miss > 0 else "−"
    if not miss:
        return "0"
    share = f'<br><span class="gqk-small">{sign}{abs(miss) / measured:.1%}</span>' if measured else ""
    return f"{sign}{readable_bytes(abs(miss))}{share}"


def _swatch(name: str) -> str:
    colour = PART_COLOURS[name]
    return f'<span class="gqk-swatch" style="background:{colour}" aria-hidden="true"></span>{escape(name)}'


def _row(name: str, cells: Iterable[str], kind: str = "gqk-part") -> str:
    numbers = "".join(f'<td class="gqk-bytes">{cell}</td>' for cell in cells)
    return f'<tr class="{kind}"><td class="gqk-name">{name}</td>{numbers}</tr>'


def _table(heads: list[str], body: str, sums: str) -> str:
    first, *rest = heads
    head = f'<th scope="col">{first}</th>' + "".join(f'<th class="gqk-bytes" scope="col">{h}</th>' for h in rest)
    return (
        f'<div class="gqk-panel"><table class="gqk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tbody>{sums}</tbody></table></div>"
    )
