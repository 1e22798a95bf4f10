"""What is shown of a training run at a glance: four figures above two charts.

Nothing here needs torch: a recording is drawn where there is none.
"""

from collections.abc import Sequence

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.qat.run import Evaluation
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import escape
from gemma_qat_kit.widgets.training_picture import TEXT_LOSS, charts_html, readable_perplexity
from gemma_qat_kit.widgets.training_recording import Recording

TRAINING_STYLE = """<style>
.gqk-train-facts { display: grid; grid-template-columns: 1.1fr 1fr 1.3fr 1fr; gap: 4px 16px; min-height: 64px; }
.gqk-train-fact b { display: block; font-size: 19px; font-weight: 600; line-height: 34px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.gqk-train-fact:first-child b { font-size: 30px; }
.gqk-train-fact span { display: block; font-size: 12px; line-height: 1.35; min-height: 2.7em; }
.gqk-train-charts { display: flex; flex-wrap: wrap; gap: 12px 16px; margin-top: 12px; }
.gqk-train-charts > svg { flex: 1 1 300px; min-width: 0; max-width: 460px; }
.gqk-train-svg { display: block; width: 100%; font-family: var(--jp-ui-font-family, system-ui, sans-serif); }
.gqk-train :is(.gqk-train-figures, .gqk-train-replay) .widget-html-content { min-width: 0; width: 100%; }
.gqk-train-caption { min-height: 3em; }
.gqk-train-legend { font-size: 12px; }
@media (max-width: 640px) {
  .gqk-train-facts { grid-template-columns: 1fr 1fr; }
  .gqk-train-charts > svg { max-width: none; }
  .gqk-train-caption { min-height: 4.5em; }
  .gqk-train-replay .gqk-train-svg { font-size: 17px; }
}
</style>"""


def figures_html(session, choice) -> str:
    """Draw figures and charts of a run, or their empty places before there is one.

    Args:
        session: The `TrainingSession`, under way or over; None before there is one.
        choice: The `Choice` of what would be trained, where there is no run.
    """
    choice = session.choice if session else choice
    steps, evaluations = (tuple(session.steps), tuple(session.evaluations)) if session else ((), ())
    charts = charts_html(
        steps,
        session and session.lines,
        evaluations,
        session and session.best,
        choice.settings.num_steps,
        loss_words(choice),
        _colour(choice.format),
    )
    return _facts_html(_facts(session)) + charts


def recording_html(recording: Recording, step: int) -> str:
    """Draw figures and charts of a recorded run as they were after a step, on the axes of the whole run."""
    best, share, seconds = recording.best(step), recording.share_recovered(step), recording.seconds
    facts = [
        *_results(share, best),
        (readable_bytes(recording.memory_bytes) if recording.memory_bytes else "–", "of memory at most, measured"),
        (
            readable_duration(seconds),
            f"for {recording.steps[-1].step:,} steps and {len(recording.evaluations)} measurements",
        ),
    ]
    charts = charts_html(recording.steps, recording.lines, recording.evaluations, best, recording.num_steps,
                         recording.loss, _colour(recording.format), until=step)  # fmt: skip
    return _facts_html(facts) + charts


def _colour(format: str) -> str:
    return FORMAT_COLOURS["mobile" if format.startswith("mobile") else "q4_0"]


def loss_words(choice) -> str:
    """Say what the loss of each step is."""
    if choice.teacher == "text":
        return TEXT_LOSS
    has_hidden = choice.teacher == "memory" and choice.settings.hidden_weight > 0
    return f"Loss: KL divergence{' and distance of hidden states' if has_hidden else ', nats per token'}"


def _facts(session) -> list[tuple[str, str]]:
    share, best, left = (session.share_recovered, session.best, session.seconds_left) if session else (None,) * 3
    time_left = ("–" if left is None else readable_duration(left), "left, without pauses")
    return [*_results(share, best), _memory(session), time_left]


def _results(share: float | None, best: Evaluation | None) -> list[tuple[str, str]]:
    """Return what training won back, and the best point, in words."""
    return [
        ("–" if share is None else f"{share:.0%}", "of the lost log-perplexity recovered"),
        (readable_perplexity(best.nats) if best else "–",
         f"perplexity of the best point{f', after step {best.step}' if best else ''}"),
    ]  # fmt: skip


def _memory(session) -> tuple[str, str]:
    """Return the memory of this process now, and the most that it was, in words."""
    try:
        peak, now = session.use.peak, session.use.after
    except (AttributeError, KitError):  # nothing was started, or this machine does not say
        return "–", "memory, measured"
    place, name = ("gpu", "on the GPU") if peak.gpu else ("ram", "in this process")
    return readable_bytes(now.in_place(place)), f"measured {name}; at most {readable_bytes(peak.in_place(place))}"


def readable_duration(seconds: float) -> str:
    """Write seconds as in "40 s", "3 min 20 s" or "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """Draw some figures with what each of them is below, the first one large."""
    cells = (f'<div class="gqk-train-fact"><b>{escape(figure)}</b><span class="gqk-quiet">{escape(words)}</span></div>'
             for figure, words in facts)  # fmt: skip
    return f'<div class="gqk-text gqk-train-facts">{"".join(cells)}</div>'
