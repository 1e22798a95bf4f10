"""The picture of a format table: does a smaller format cost more, and which one gives most for its bits?"""

_FLOOR = 1e-7  # nats; a format that changes nothing has none, which a log axis cannot show
_GREY = "#888888"  # reads on light and on dark


def draw(table, colours: dict[str, str]):
    """Return a plotly figure of a FormatTable: bits per weight against mean KL divergence, both labelled directly."""
    import plotly.graph_objects as go

    figure = go.Figure()
    places = _label_places(table.rows)
    for row in table.rows:
        quality, bits = row.quality, row.size.bits_per_weight
        figure.add_trace(
            go.Scatter(
                x=[bits],
                y=[max(quality.kl_divergence, _FLOOR)],
                mode="markers+text",
                name=row.method,
                text=[row.method if quality.kl_divergence else f"{row.method} (exact)"],
                textposition=places[row.method],
                marker={"size": 12, "color": colours[row.method], "line": {"width": 1, "color": _GREY}},
                hovertemplate=(
                    f"<b>{row.method}</b><br>{bits:.3g} bits per weight<br>KL {quality.kl_divergence:.3g} nats<br>"
                    f"top-1 {quality.top1_agreement:.1%}<br>perplexity {quality.perplexity:.4g}<extra></extra>"
                ),
                cliponaxis=False,
            )
        )
    _draw_reference(figure, table)
    figure.update_layout(
        title={"text": "What does a bit less per weight cost?"},
        showlegend=False,
        height=420,
        margin={"l": 70, "r": 30, "t": 60, "b": 60},
        font={"color": _GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    top = max(row.size.bits_per_weight for row in table.rows)
    line = {"gridcolor": "rgba(127,127,127,.25)", "linecolor": _GREY, "zeroline": False}
    figure.update_xaxes(title_text="Bits per weight, scales included", range=[0, max(9.5, 1.25 * top)], **line)
    figure.update_yaxes(title_text="KL divergence from the unquantized model, nats per token", type="log",
                        exponentformat="power", **line)  # fmt: skip
    return figure


def _draw_reference(figure, table) -> None:
    """Draw the level of plain Q4_0, which every other way of spending 4 bits has to beat."""
    plain = next((row for row in table.rows if row.method == "q4_0"), None)
    if plain is None or len(table.rows) == 1:
        return
    figure.add_hline(
        y=max(plain.quality.kl_divergence, _FLOOR),
        line={"dash": "dash", "width": 1, "color": _GREY},
        annotation_text="q4_0 by the plain rule",
        annotation_position="top right",
        annotation_font_color=_GREY,
    )


def _label_places(rows) -> dict[str, str]:
    """Return on which side of its point each label stands: in turn, from the highest point down."""
    ordered = sorted(rows, key=lambda row: -row.quality.kl_divergence)
    sides = ("middle right", "middle left")
    return {row.method: sides[i % 2] if row.size.bits_per_weight > 2.5 else sides[0] for i, row in enumerate(ordered)}
