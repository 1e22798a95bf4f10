"""What FinetunePanel shows: the dataset as the model sees it, memory beside what is free, curves, and answers."""

from collections.abc import Sequence

from gemma_qat_kit.finetune.conversations import Conversation
from gemma_qat_kit.finetune.examples import written
from gemma_qat_kit.finetune.run import Sample
from gemma_qat_kit.memory.plan import MemoryPlan
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.finetune_session import FinetuneSession
from gemma_qat_kit.widgets.look import escape
from gemma_qat_kit.widgets.training_picture import TEXT_LOSS, charts_html

FINETUNE_STYLE = """<style>
.gqk-tune-row { font: 12px/1.5 var(--jp-code-font-family, monospace); white-space: pre-wrap; overflow-wrap: anywhere;
  border-left: 3px solid rgba(127, 127, 127, .4); padding: 2px 8px; margin: 6px 0; max-height: 9em; overflow: auto; }
.gqk-tune-row mark { background: rgba(0, 114, 178, .28); color: inherit; border-radius: 2px; }
.gqk-tune-answers { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 16px; margin: 4px 0 10px; }
.gqk-tune-answers > * { overflow-wrap: anywhere; white-space: pre-wrap; max-height: 12em; overflow: auto; }
.gqk-tune-answers .gqk-tune-asked { grid-column: 1 / -1; font-weight: 600; }
.gqk-tune :is(.gqk-tune-figures, .gqk-tune-data, .gqk-tune-said) .widget-html-content { min-width: 0; width: 100%; }
</style>"""
_SHOWN = 2


def data_html(conversations: Sequence[Conversation], tokenizer=None) -> str:
    """Draw the first conversations: with a tokenizer as the model sees them, the learnt part marked."""
    count = f"{len(conversations):,} conversations"
    if tokenizer is None:
        rows = ["\n".join(f"{each['role']}: {each['content']}" for each in one) for one in conversations[:_SHOWN]]
        words, drawn = f"{count}; the first ones:", [escape(row) for row in rows]
    else:
        words = f"{count}; the first ones as the model sees them, with what it learns marked:"
        drawn = [_marked(*written(one, tokenizer)) for one in conversations[:_SHOWN]]
    body = "".join(f'<div class="gqk-tune-row">{row}</div>' for row in drawn)
    return f'<div class="gqk-text gqk-quiet">{words}</div>{body}'


def _marked(text: str, spans: list[tuple[int, int]]) -> str:
    parts, at = [], 0
    for start, end in spans:
        parts += [escape(text[at:start]), f"<mark>{escape(text[start:end])}</mark>"]
        at = end
    return "".join([*parts, escape(text[at:])])


def memory_html(plan: MemoryPlan | None, free: int | None) -> str:
    """Draw what a run will take beside what is there."""
    if plan is None:
        return '<div class="gqk-text gqk-quiet">This model is not in the catalog, so its memory is not planned.</div>'
    place = "gpu" if plan.settings.device == "cuda" else "ram"
    needed, name = plan.needed[place], "GPU memory" if place == "gpu" else "memory"
    if not free:
        return f'<div class="gqk-text">Needs {readable_bytes(needed)} of {name}, planned.</div>'
    share, fits = min(1.0, needed / free), needed <= free
    colour = "#009E73" if fits else "#D55E00"
    words = f"{readable_bytes(needed)} of {name} planned, {readable_bytes(free)} there"
    advice = "" if fits else "; fewer conversations at once, shorter ones or a smaller rank take less"
    return (
        f'<div class="gqk-bar" role="img" aria-label="{words}"><div style="width:{share:.1%};background:{colour}">'
        f'</div></div><div class="gqk-text">{words}{advice}.</div>'
    )


def curves_html(session: FinetuneSession | None, num_steps: int) -> str:
    """Draw the loss and the held-out conversations of a run, or their empty places."""
    steps, evaluations = (tuple(session.steps), tuple(session.evaluations)) if session else ((), ())
    return charts_html(steps, None, evaluations, session and session.best, num_steps, TEXT_LOSS)


def answers_html(samples: Sequence[Sample]) -> str:
    """Draw each question with its first and its newest answer side by side; a model's words are text, never HTML."""
    parts = []
    for question in dict.fromkeys(sample.question for sample in samples):
        given = [sample for sample in samples if sample.question == question]
        cells = [f'<div class="gqk-tune-asked">{escape(question)}</div>']
        for sample in (given[0], given[-1])[: len(given)]:
            when = f"after {sample.step} steps" if sample.step else "before"
            cells.append(f'<div><span class="gqk-quiet">{when}</span>\n{escape(sample.answer)}</div>')
        parts.append(f'<div class="gqk-text gqk-tune-answers">{"".join(cells)}</div>')
    return "".join(parts)
