"""Draw a comparison: one pane for each model, the tokens marked where they leave the reference's answer."""

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.chat.comparison import Agreement, Comparison, Pane
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.chat_figures import counted
from gemma_qat_kit.widgets.look import escape

COMPARE_STYLE = """<style>
.gqk-panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 10px; }
.gqk-pane { display: flex; flex-direction: column; border: 1px solid var(--jp-border-color2, rgba(127, 127, 127, .4)); border-top: 5px solid; border-radius: 4px; padding: 8px 10px; }
.gqk-pane h4 { margin: 0 0 4px; font-size: 1em; }
.gqk-pane-answer { flex: 1; min-height: 120px; max-height: 300px; overflow-y: auto; white-space: pre-wrap; }
.gqk-pane mark { background: rgba(213, 94, 0, .25); color: inherit; text-decoration: underline; text-decoration-color: #D55E00; border-radius: 2px; }
.gqk-pane footer { margin-top: 6px; min-height: 40px; color: var(--jp-ui-font-color2, inherit); }
</style>"""  # noqa: E501 - CSS
_ENDS = {"stop": "", "length": "Cut off at the longest answer. ", "cancelled": "Stopped. ", "unfinished": ""}


def comparison_html(comparison: Comparison) -> str:
    """Return the question and its answers side by side, as HTML that needs no script."""
    panes = "".join(_pane_html(pane, comparison, index) for index, pane in enumerate(comparison.panes))
    asked = f"<p><b>{escape(comparison.prompt)}</b></p>" if comparison.prompt else ""
    return f'{COMPARE_STYLE}<div class="gqk-text gqk-compare-picture">{asked}<div class="gqk-panes">{panes}</div></div>'


def _pane_html(pane: Pane, comparison: Comparison, index: int) -> str:
    is_naive = pane.format == "q4_0" and "naive" in pane.name.lower()  # a file does not say by which rule it was made
    colour = FORMAT_COLOURS.get("q4_0-naive" if is_naive else pane.format, "#888888")
    agreement = comparison.agreement(index) if index else None
    return (
        f'<section class="gqk-pane" style="border-top-color:{colour}" aria-label="{escape(pane.name)}">'
        f"<h4>{escape(pane.name)}{'' if index else ' (reference)'}</h4>"
        f'<div class="gqk-pane-answer" tabindex="0">{_answer_html(pane, agreement)}</div>'
        f"<footer>{escape(_figures(pane, agreement))}</footer></section>"
    )


def _answer_html(pane: Pane, agreement: Agreement | None) -> str:
    """Return the answer; neighbouring pieces that differ share one mark, so that a screen reader tells it once."""
    if agreement is None:
        return escape(pane.text)
    html, is_open = [], False
    for piece, differs in zip(pane.pieces, agreement.differs, strict=True):
        if differs != is_open:
            html.append("<mark>" if differs else "</mark>")
            is_open = differs
        html.append(escape(piece))
    return "".join(html) + ("</mark>" if is_open else "")


def _figures(pane: Pane, agreement: Agreement | None) -> str:
    """Say what was measured of an answer, and how far it goes with the reference's."""
    if pane.ended not in _ENDS:
        return pane.ended
    if pane.ended == "unfinished":
        return f"{counted(len(pane.pieces), 'token')} so far." if pane.pieces else "Waiting for its turn."
    held = f", holds {readable_bytes(pane.memory_bytes)}" if pane.memory_bytes else ""
    words = f"{_ENDS[pane.ended]}{counted(len(pane.pieces), 'token')} at {pane.tokens_per_second:.3g} tokens/s{held}."
    if agreement is None or not pane.pieces:
        return words
    return f"{words} {_agreement_words(agreement)}"


def _agreement_words(agreement: Agreement) -> str:
    if agreement.num_same == len(agreement.differs):
        return "The same tokens as the reference."
    share = f"{100 * agreement.share:.0f} % of its tokens are the reference's, too"
    return f"{share}; alike up to token {agreement.num_alike}."
