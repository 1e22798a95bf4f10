"""The picture of a format table: does a smaller format cost more, and which one gives most for its bits?"""

import math
from collections.abc import Callable, Iterable

_FLOOR = 1e-7  # nats; a format that changes nothing has none, which a log axis cannot show
_GREY = "#888888"  # reads on light and on dark
_MOST_BITS = 9.5  # per weight; labels of points in the right third of it stand on their left
_PLOT, _TOP, _BOTTOM, _LABEL_GAP = 300, 60, 60, 17  # pixels


def draw(table, colours: dict[str, str]):
    """Return a plotly figure of a FormatTable: bits per weight against mean KL divergence, both labelled directly."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row in table.rows:
        quality, bits = row.quality, row.size.bits_per_weight
        figure.add_trace(
            go.Scatter(
                x=[bits],
                y=[_divergence(row)],
                mode="markers",
                name=row.method,
                text=[row.method if quality.kl_divergence else f"{row.method} (exact)"],
                marker={"size": 12, "color": colours[row.method], "line": {"width": 1, "color": _GREY}},
                hovertemplate=(
                    f"<b>{row.method}</b><br>{bits:.3g} bits per weight<br>KL {quality.kl_divergence:.3g} nats<br>"
                    f"top-1 {quality.top1_agreement:.1%}<br>perplexity {quality.perplexity:.4g}<extra></extra>"
                ),
                cliponaxis=False,
            )
        )
    powers = [math.log10(_divergence(row)) for row in table.rows]
    lowest, highest = math.floor(min(powers)), math.floor(max(powers)) + 1
    _label(figure, table.rows, lambda row: _PLOT * (highest - math.log10(_divergence(row))) / (highest - lowest))
    figure.update_layout(
        title={"text": "What does a bit less per weight cost?"},
        showlegend=False,
        height=_TOP + _PLOT + _BOTTOM,
        margin={"l": 70, "r": 30, "t": _TOP, "b": _BOTTOM},
        font={"color": _GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"remove": ["sendChartToCloud", "sendDataToCloud"], "bgcolor": "rgba(0,0,0,0)", "color": _GREY},
    )
    most = max(_MOST_BITS, *(row.size.bits_per_weight for row in table.rows))
    line = {"gridcolor": "rgba(127,127,127,.25)", "linecolor": _GREY, "zeroline": False}
    figure.update_xaxes(title_text="Bits per weight, scales included", range=[0, most], **line)
    figure.update_yaxes(title_text="KL divergence, nats per token", type="log", range=[lowest, highest], dtick=1,
                        exponentformat="power", **line)  # fmt: skip
    return figure


def place_labels(
    rows: Iterable, y: Callable[[object], float], gap: float, avoid: Iterable[float] = ()
) -> dict[str, tuple[float, bool]]:
    """Say where the label of each point goes, so that none lies on another.

    Args:
        rows: Of a FormatTable.
        y: Height of a row's point, in pixels from the top.
        gap: Least distance of two labels.
        avoid: Heights of lines across the picture.

    Returns:
        Method to the height of its label, at its point or lower, and whether it stands on the left.
    """
    rows = tuple(rows)
    taken = [(side, line) for line in avoid for side in (False, True)]
    places = {}
    for row in sorted(rows, key=y):
        height, side = y(row), _is_left(row, rows)
        while any(side == other_side and abs(height - other) < gap for other_side, other in taken):
            height += 1
        taken.append((side, height))
        places[row.method] = height, side
    return places


def _is_left(row, rows: tuple) -> bool:
    """Whether others, or the picture's edge, are close on the right."""
    bits = row.size.bits_per_weight
    return bits > _MOST_BITS * 0.7 or any(0 < other.size.bits_per_weight - bits < 1 for other in rows)


def _divergence(row) -> float:
    return max(row.quality.kl_divergence, _FLOOR)


def _label(figure, rows: tuple, y: Callable[[object], float]) -> None:
    """Write each point's name beside it, and draw the level of plain Q4_0, which other ways of spending 4 bits have to
    beat."""
    plain = next((row for row in rows if row.method == "q4_0" and len(rows) > 1), None)
    if plain is not None:
        level = _divergence(plain)
        figure.add_hline(y=level, line={"dash": "dash", "width": 1, "color": _GREY})
        figure.add_annotation(x=0, xref="paper", y=math.log10(level), text="q4_0 by the plain rule", showarrow=False,
                              xanchor="left", yanchor="bottom", font={"color": _GREY})  # fmt: skip
    places = place_labels(rows, y, _LABEL_GAP, () if plain is None else (y(plain),))
    for row, trace in zip(rows, figure.data, strict=True):
        height, is_left = places[row.method]
        figure.add_annotation(
            x=row.size.bits_per_weight,
            y=math.log10(_divergence(row)),  # what plotly wants on a log axis
            text=trace.text[0],
            ax=-24 if is_left else 24,
            ay=height - y(row),
            xanchor="right" if is_left else "left",
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=_GREY,
            font={"color": _GREY},
        )
