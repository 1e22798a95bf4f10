"""What QuantizePanel shows of its results: a table that fills row by row, and size against quality as inline SVG."""

import math
from collections.abc import Iterable

from gemma_qat_kit.catalog import FORMAT_COLOURS, PANEL_STYLE
from gemma_qat_kit.quality.format_picture import place_labels
from gemma_qat_kit.quality.format_table import METHOD_COLOURS, FormatRow, FormatTable
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import escape

# Narrow enough to be read on a phone, where the page scales it down.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 300, 62, 14, 34, 44
LOWEST, HIGHEST, MOST_BITS = -4, 2, 9.5  # fixed axes: powers of ten of the divergence, bits per weight
_LABEL_GAP = 14
_HEADINGS = ("Size", "Bits", "Perplex&shy;ity", "Top&#8209;1 %", "KL")  # cut on a phone alone
_STYLE = """<style>
.gqk-quantize-table .widget-html-content { min-width: 0; width: 100%; }
.gqk-quantize-table .gqk-panel .gqk-table th.gqk-bytes { min-width: 5.4em; }
.gqk-quantize-table .gqk-quantize-note { min-height: 4.5em; }
.gqk-quantize-table .gqk-nobreak { white-space: nowrap; }
@media (max-width: 640px) {
  .gqk-quantize-table .gqk-panel .gqk-table { font-size: 11.5px; }
  .gqk-quantize-table .gqk-panel .gqk-table th.gqk-bytes { min-width: 0; }
  .gqk-quantize-table .gqk-panel .gqk-table :is(th, td) { padding-right: 5px; }
  .gqk-quantize-table .gqk-panel .gqk-table :is(th, td):last-child { padding-right: 0; }
  .gqk-quantize-table .gqk-panel .gqk-table :is(th, .gqk-name) { white-space: normal; }
}
</style>"""


def table_html(table: FormatTable | None, methods: Iterable[str], current: str | None) -> str:
    """Draw the measured rows, and those to come as empty ones, so that nothing jumps when they are filled.

    Args:
        table: What was measured so far, None for nothing.
        methods: Every method to list, in order.
        current: The one that is being measured.
    """
    head = "".join(f'<th class="gqk-bytes" scope="col">{name}</th>' for name in _HEADINGS)
    rows = {row.method: row for row in table.rows} if table else {}
    unquantized = _float_cells(table) if table else ("",) * len(_HEADINGS)
    body = _row("unquantized", FORMAT_COLOURS["float32"], unquantized)
    for method in methods:
        empty = ("measuring" if method == current else "–", *[""] * (len(_HEADINGS) - 1))
        body += _row(method, METHOD_COLOURS[method], _cells(rows[method]) if method in rows else empty)
    return (
        f'{PANEL_STYLE}{_STYLE}<div class="gqk-panel"><table class="gqk-table"><thead><tr><th scope="col">Format</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="gqk-text gqk-quiet gqk-quantize-note">{escape(_note(table))}</div>'
    )


def picture_html(table: FormatTable | None) -> str:
    """Draw bits per weight against KL divergence; its axes are there before the first point is."""
    rows = table.rows if table else ()
    places = place_labels(rows, lambda row: _y(row.quality.kl_divergence), _LABEL_GAP)
    drawn = [*_axes(), *(part for row in rows for part in _point(row, *places[row.method]))]
    words = "; ".join(f"{r.method} {r.size.bits_per_weight:.3g} bits, {r.quality.kl_divergence:.3g} nats" for r in rows)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="width:100%;max-width:{WIDTH}px" '
        f'aria-label="Size against quality: {escape(words or "nothing is measured yet")}" fill="currentColor" '
        f'font-size="12" font-family="var(--jp-ui-font-family, system-ui, sans-serif)">{"".join(drawn)}</svg>'
    )


def _float_cells(table: FormatTable) -> tuple[str, ...]:
    return readable_bytes(table.float_nbytes), str(table.float_bits), _readable(table.perplexity), "100", "0"


def _cells(row: FormatRow) -> tuple[str, ...]:
    quality = row.quality
    return (
        readable_bytes(row.size.nbytes),
        f"{row.size.bits_per_weight:.3g}",
        _readable(quality.perplexity),
        f"{100 * quality.top1_agreement:.1f}",
        f"{quality.kl_divergence:#.3g}" if quality.kl_divergence else "0",
    )


def _readable(perplexity: float) -> str:
    """Write three digits, and zeros behind them where it is large: the perplexity of a broken model is in millions."""
    return f"{perplexity:#.3g}" if perplexity < 100 else f"{float(f'{perplexity:.3g}'):,.0f}"


def _row(name: str, colour: str, cells: Iterable[str]) -> str:
    dot = f'<span class="gqk-dot" style="background:{colour}" aria-hidden="true"></span>'
    numbers = "".join(f'<td class="gqk-bytes">{cell}</td>' for cell in cells)
    first, *rest = escape(name).replace("_", "_<wbr>").replace("+", "+<wbr>").split("<wbr>", 1)
    name = "<wbr>".join([f'<span class="gqk-nobreak">{dot}{first}</span>', *rest])
    return f'<tr><td class="gqk-name">{name}</td>{numbers}</tr>'


def _note(table: FormatTable | None) -> str:
    what = (
        "Size and bits per weight are those of the linear layers, scales included. Top-1: how often the likeliest next "
        "token is the unquantized model's. KL: divergence from that model, nats per token."
    )
    if table is None:
        return what
    quality = table.rows[0].quality
    return f"{table.name}, {quality.num_tokens:,} tokens of {table.text} in windows of {quality.window}. {what}"


def _x(bits: float) -> float:
    return LEFT + min(bits, MOST_BITS) / MOST_BITS * (WIDTH - LEFT - RIGHT)


def _y(divergence: float) -> float:
    power = math.log10(divergence) if divergence > 10**LOWEST else LOWEST
    return TOP + (HIGHEST - min(power, HIGHEST)) / (HIGHEST - LOWEST) * (HEIGHT - TOP - BOTTOM)


def _axes() -> list[str]:
    parts = [_text(0, 14, "KL divergence from the unquantized model, nats per token"),
             _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "Bits per weight, scales included", "middle")]  # fmt: skip
    for power in range(LOWEST, HIGHEST + 1):
        y = _y(10**power)
        name = f"{10**power:g}" if power > LOWEST else f"≤ {10**power:g}"
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, 0.2), _text(LEFT - 8, y + 4, name, "end")]
    for bits in range(0, 10, 2):
        parts += [_line(_x(bits), TOP, _x(bits), HEIGHT - BOTTOM, 0.2),
                  _text(_x(bits), HEIGHT - BOTTOM + 16, bits, "middle")]  # fmt: skip
    return parts


def _point(row: FormatRow, label_y: float, is_left: bool) -> list[str]:
    x, y = _x(row.size.bits_per_weight), _y(row.quality.kl_divergence)
    away, anchor = (-14, "end") if is_left else (14, "start")
    exact = "" if row.quality.kl_divergence else " (exact)"
    return [
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x + away:.1f}" y2="{label_y:.1f}" stroke="currentColor" opacity=".4"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{METHOD_COLOURS[row.method]}" stroke="#888"/>',
        _text(x + away * 1.2, label_y + 4, row.method + exact, anchor),
    ]


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" opacity="{opacity}"/>'


def _text(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
