"""Receipts as text, as a table, and as predicted against measured on log axes; every name in them may be anybody's."""

import html
import math
from collections.abc import Iterable

from gemma_qat_kit.catalog import FORMAT_COLOURS, PANEL_STYLE
from gemma_qat_kit.memory.receipts_line import Receipt
from gemma_qat_kit.units import readable_bytes

_STYLE = """<style>.gqk-receipts .gqk-model{white-space:normal;min-width:9em}
@media (max-width:640px){
.gqk-panel.gqk-receipts .gqk-table{font-size:11px}
.gqk-panel.gqk-receipts .gqk-table th,.gqk-panel.gqk-receipts .gqk-table td{padding-right:5px}
.gqk-panel.gqk-receipts .gqk-table th,.gqk-panel.gqk-receipts .gqk-table td:first-child{white-space:normal}
.gqk-receipts .gqk-model{min-width:6em}}</style>"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 340, 68, 30, 30, 44
BAND = 0.05  # how far a plan may be off
_MOST_ROWS, _MOST_POINTS, _MOST_LABELS, _LABEL_GAP = 20, 1000, 12, 14
_GREY = "#888888"  # reads on light and on dark
_UNITS = (2**30, 2**20, 2**10, 1)
_HEADINGS = ("Run", "Model", "Settings", "Predicted", "Measured", "Error", "%")
_ERROR_HEADINGS = ("Part", "Runs", "Mean error", "Worst", "Mean %")
_NOTE = (
    "Error: predicted less measured, of what is in memory; a plan that is too low is negative. Mean %: mean distance "
    "from what was measured."
)


def describe(receipts) -> str:
    """Return receipts as text: the newest runs, then the error part by part."""
    if not receipts.rows:
        return "\n".join(["No receipts yet: each load, chat and training run leaves one.", *receipts.notes])
    tables = [
        _text_table(_HEADINGS, map(_cells, _shown(receipts))),
        _text_table(_ERROR_HEADINGS, _error_cells(receipts)),
    ]
    return "\n\n".join([*tables, "\n".join([_NOTE, *_notes(receipts)])])


def draw(receipts) -> str:
    """Return receipts as HTML: the newest runs, the picture of all, and the error part by part."""
    notes = "".join(f'<div class="gqk-dim">{html.escape(note)}</div>' for note in _notes(receipts))
    if not receipts.rows:
        return f'{PANEL_STYLE}<div class="gqk-panel">{html.escape(describe(receipts))}</div>'
    runs = "".join(map(_run_html, _shown(receipts)))
    return (
        f'{PANEL_STYLE}{_STYLE}<div class="gqk-panel gqk-receipts">'
        f"{_html_table(('Run', 'Model', *_HEADINGS[3:]), runs, 2)}{notes}{draw_errors(receipts)}</div>"
    )


def draw_errors(receipts) -> str:
    """Return the picture of all runs and the error part by part, without the list of runs."""
    parts = "".join(_html_row(cells[:1], cells[1:]) for cells in map(_escaped, _error_cells(receipts)))
    note = f'<div class="gqk-dim">{html.escape(_NOTE)}</div>'
    return f"{_svg(receipts)}{_html_table(_ERROR_HEADINGS, parts, 1)}{note}"


def _shown(receipts) -> list[Receipt]:
    return list(reversed(receipts.rows[-_MOST_ROWS:]))


def _notes(receipts) -> list[str]:
    more = len(receipts.rows) - _MOST_ROWS
    return [f"{more:,} earlier runs are not listed, but counted.", *receipts.notes] if more > 0 else [*receipts.notes]


def _cells(row: Receipt) -> tuple[str, ...]:
    predicted, ratio = row.predicted, row.error
    return (
        row.event,
        row.name,
        _in_short(row),
        "–" if predicted is None else f"≈ {readable_bytes(predicted.total_bytes)}",
        readable_bytes(row.measured.total_bytes) if row.measured.placed else "–",
        "–" if predicted is None else _signed(row.error_bytes),
        "–" if ratio is None else f"{100 * ratio:+.1f}",
    )


def _in_short(row: Receipt) -> str:
    """Return the settings that matter for an event, those of them that are known."""
    known = row.settings
    texts = {"{}": ("engine", "device")}
    if row.event == "train":
        texts = {"{}": ("engine", "device", "task", "optimizer"), "{} tokens": ("sequence_length",),
                 "batch {}": ("batch_size",)}  # fmt: skip
        if known.get("task") == "finetune":
            texts["rank {}"] = ("lora_rank",)
    else:
        texts["{} tokens"] = ("context_length",)
        if known.get("kv_format") != "bf16":
            texts["{} cache"] = ("kv_format",)
    return ", ".join(text.format(known[name]) for text, names in texts.items() for name in names
                     if known.get(name) is not None)  # fmt: skip


def _signed(nbytes: float) -> str:
    return f"{nbytes / 2**20:+,.0f} MiB"


def _error_cells(receipts) -> list[tuple[str, ...]]:
    return [
        (error.name, str(error.count), _signed(error.mean_bytes), _signed(error.worst_bytes),
         "–" if error.mean_ratio is None else f"{100 * error.mean_ratio:.1f}")
        for error in receipts.errors()
    ]  # fmt: skip


def _text_table(headings: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    table = [tuple(headings), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in table)  # fmt: skip


def _html_table(headings: Iterable[str], body: str, num_words: int) -> str:
    kinds = ("" if i < num_words else ' class="gqk-bytes"' for i in range(99))
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(headings, kinds, strict=False))
    return f'<table class="gqk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _escaped(cells: Iterable[str]) -> list[str]:
    return [html.escape(cell) for cell in cells]


def _run_html(row: Receipt) -> str:
    """Draw one run: the settings stand below the model, and the predicted number is slanted."""
    event, name, settings, predicted, *others = map(html.escape, _cells(row))
    dot = f'<span class="gqk-dot" style="background:{_colour(row)}" aria-hidden="true"></span>'
    model = f'<div class="gqk-model">{dot}{name}<br><span class="gqk-dim">{settings}</span></div>'
    return _html_row([event, model], [f"<i>{predicted}</i>", *others])


def _html_row(words: Iterable[str], numbers: Iterable[str]) -> str:
    """Draw cells, which are HTML already."""
    cells = "".join(f"<td>{word}</td>" for word in words)
    return f'<tr>{cells}{"".join(f"""<td class="gqk-bytes">{number}</td>""" for number in numbers)}</tr>'


def _colour(row: Receipt) -> str:
    return FORMAT_COLOURS.get(str(row.settings.get("format")), _GREY)


def _svg(receipts) -> str:
    """Draw predicted against measured, a sign for each run: disc for chat, square for load, triangle for train."""
    rows = [row for row in receipts.rows[-_MOST_POINTS:] if row.error is not None and row.predicted.total_bytes]
    if not rows:
        return ""
    totals = [total for row in rows for total in (row.predicted.total_bytes, row.measured.total_bytes)]
    low, high = math.log2(min(totals)) - 0.5, math.log2(max(totals)) + 0.5

    def at(nbytes: float) -> float:
        return (math.log2(nbytes) - low) / (high - low)

    def x(nbytes: float) -> float:
        return LEFT + at(nbytes) * (WIDTH - LEFT - RIGHT)

    def y(nbytes: float) -> float:
        return HEIGHT - BOTTOM - at(nbytes) * (HEIGHT - TOP - BOTTOM)

    drawn = [*_axes(low, high, x, y), *(_point(row, x, y) for row in rows), *_labels(rows, x, y)]
    errors = "; ".join(f"{error.name} {_signed(error.mean_bytes)}" for error in receipts.errors())
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="width:100%;max-width:{WIDTH}px;display:block" '
        f'aria-label="{html.escape(f"Predicted against measured memory of {len(rows)} runs. Mean errors: {errors}")}" '
        f'fill="currentColor" font-size="12" font-family="var(--jp-ui-font-family, system-ui, sans-serif)">'
        f"{''.join(drawn)}</svg>"
    )


def _axes(low: float, high: float, x, y) -> list[str]:
    """Draw the grid, the line of a perfect plan, and the band of 5 % around it."""
    first, last = 2**low, 2**high
    upper, lower = 1 + BAND, 1 - BAND
    corners = [(first, first * upper), (last / upper, last), (last, last), (last, last * lower), (first / lower, first),
               (first, first)]  # fmt: skip
    band = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
    parts = [f'<polygon points="{band}" opacity=".18"/>', _line(x(first), y(first), x(last), y(last), 0.6),
             _text(0, 14, "Predicted; the line: as measured, ± 5 %"),
             _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "Measured, at the peak", "middle")]  # fmt: skip
    step = max(1, math.ceil((high - low) / 6))
    for power in range(math.ceil(low), math.floor(high) + 1):
        if power % step == 0:
            nbytes = 2.0**power
            across, up = y(nbytes), x(nbytes)
            parts += [_line(LEFT, across, WIDTH - RIGHT, across, 0.15), _line(up, TOP, up, HEIGHT - BOTTOM, 0.15),
                      _text(LEFT - 6, across + 4, _power(nbytes), "end"),
                      _text(up, HEIGHT - BOTTOM + 16, _power(nbytes), "middle")]  # fmt: skip
    return parts


def _power(nbytes: float) -> str:
    """Write a power of two without the zeros that a measured number has."""
    unit = next((unit for unit in _UNITS if nbytes >= unit), 1)
    return f"{nbytes / unit:,.0f} {('GiB', 'MiB', 'KiB', 'bytes')[_UNITS.index(unit)]}"


def _point(row: Receipt, x, y) -> str:
    at, height = x(row.measured.total_bytes), y(row.predicted.total_bytes)
    look = f'fill="{_colour(row)}" fill-opacity=".85" stroke="{_GREY}"'
    title = f"<title>{html.escape(', '.join(filter(None, _cells(row))))}</title>"
    if row.event == "load":
        return f'<rect x="{at - 4.5:.1f}" y="{height - 4.5:.1f}" width="9" height="9" {look}>{title}</rect>'
    if row.event == "train":
        corners = f"{at:.1f},{height - 6:.1f} {at + 6:.1f},{height + 5:.1f} {at - 6:.1f},{height + 5:.1f}"
        return f'<polygon points="{corners}" {look}>{title}</polygon>'
    return f'<circle cx="{at:.1f}" cy="{height:.1f}" r="5" {look}>{title}</circle>'


def _labels(rows: list[Receipt], x, y) -> list[str]:
    """Name each model once for each event, beside its newest run, and never one name over another."""
    newest = {(row.name, row.event): row for row in rows}
    taken: list[tuple[bool, float]] = []
    parts = []
    for row in sorted(list(newest.values())[-_MOST_LABELS:], key=lambda row: y(row.predicted.total_bytes)):
        at, place = x(row.measured.total_bytes), y(row.predicted.total_bytes)
        is_left, height = at > WIDTH / 2, place
        while any(is_left == side and abs(height - other) < _LABEL_GAP for side, other in taken):
            height += 1
        taken.append((is_left, height))
        away, anchor = (-16, "end") if is_left else (16, "start")
        parts += [_line(at, place, at + away, height, 0.4),
                  _text(at + away * 1.2, height + 4, f"{row.name[:28]}, {row.event}", anchor)]  # fmt: skip
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" opacity="{opacity}"/>'


def _text(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(str(text))}</text>'
