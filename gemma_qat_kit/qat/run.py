"""What a training run did: its losses, what the held-out text said, and which point was kept."""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.qat.settings import TrainSettings


@dataclass(frozen=True)
class Step:
    """One update.

    Attributes:
        step: Counted from 1.
        loss: Mean over its windows, in nats per token.
        seconds: That it took; without what came after it, an evaluation, a checkpoint or a pause.
    """

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out text.

    Attributes:
        step: Updates made before it.
        nats: Mean surprise per token.
        kl_divergence: From the model before quantization, in nats per token, over its 256 likeliest words.
    """

    step: int
    nats: float
    kl_divergence: float


@dataclass(frozen=True)
class Lines:
    """What training moves between: the model before quantization, and after it without any training.

    Attributes:
        float_nats: Mean surprise of the model before quantization.
        plain: The same weights rounded by the plain rule of the format.
    """

    float_nats: float
    plain: Evaluation

    def share_recovered(self, nats: float) -> float | None:
        """Return which share of the lost log-perplexity is won back: 0 as the plain rule, 1 as before.

        None where the plain rule lost nothing on this text: there is nothing to win back.
        """
        lost = self.plain.nats - self.float_nats
        return (self.plain.nats - nats) / lost if lost > 0 else None


def best_of(evaluations: Iterable[Evaluation], *, is_text: bool) -> Evaluation | None:
    """Return the evaluation whose model is kept; None where there is none.

    Args:
        evaluations: Those so far.
        is_text: Whether the text itself is learnt: the least surprised one is kept then, else the one nearest to the
            model before quantization.
    """
    return min(evaluations, key=lambda each: each.nats if is_text else each.kl_divergence, default=None)


@dataclass(frozen=True)
class QatRun:
    """A finished or stopped run of `train_qat`; draws itself as a table.

    Attributes:
        name: The model.
        settings: As they were asked for.
        dtype: That it computed in.
        num_trained: Values that were trained, scales included.
        lines: The model before quantization, and by the plain rule.
        steps: Every update.
        evaluations: Of the held-out text; the first one before training.
        best: The evaluation whose model was kept.
        ended: Why it ended.
        seconds: In all, a resumed run's earlier parts included.
    """

    name: str
    settings: TrainSettings
    dtype: str
    num_trained: int
    lines: Lines
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    best: Evaluation
    ended: str
    seconds: float

    @property
    def share_recovered(self) -> float | None:
        """Share of the log-perplexity that the plain rule lost on the held-out text and training won back."""
        return self.lines.share_recovered(self.best.nats)

    def _rows(self) -> list[tuple[str, ...]]:
        lines = self.lines
        points = [("before quantization", lines.float_nats, 0.0), ("plain rule", lines.plain.nats,
                  lines.plain.kl_divergence)]  # fmt: skip
        points += [(_label(e, self.best), e.nats, e.kl_divergence) for e in self.evaluations]
        return [
            (label, f"{math.exp(nats):#.4g}", f"{kl:.3g}", _percent(lines.share_recovered(nats)))
            for label, nats, kl in points
        ]

    def _note(self) -> str:
        return (
            f"{self.ended} {len(self.steps):,} steps of {self.settings.rows} windows of "
            f"{self.settings.sequence_length} tokens in {self.seconds:.0f} s; {self.num_trained:,} values trained, "
            f"computed in {self.dtype}. Measured on held-out text that was not trained on. KL divergence from the "
            "model before quantization, nats per token; recovered: share of the lost log-perplexity."
        )

    def __str__(self) -> str:
        return "\n".join([self.name, *text_table(_HEADINGS, self._rows()), self._note()])

    def _repr_html_(self) -> str:
        return panel_html(self.name, html_table(_HEADINGS, self._rows()), self._note())


_HEADINGS = ("Held-out text", "Perplexity", "KL", "Recovered")


def text_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table: names to the left, figures to the right."""
    rows = [headings, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def html_table(headings: tuple[str, ...], rows: list[tuple[str, ...]], *, are_figures: bool = True) -> str:
    """Draw a table, its texts escaped; figures after each row's name, or texts."""
    cell = '<td class="gqk-bytes">' if are_figures else "<td>"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headings)
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(f'{cell}{html.escape(one)}</td>' for one in rest)}</tr>"
                   for name, *rest in rows)  # fmt: skip
    return f'<table class="gqk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def panel_html(name: str, tables: str, note: str) -> str:
    """Draw a run: the model's name, tables, and a note."""
    return (
        f'{PANEL_STYLE}<div class="gqk-panel"><div><strong>{html.escape(name)}</strong></div>{tables}'
        f'<div class="gqk-dim">{html.escape(note)}</div></div>'
    )


def _label(evaluation: Evaluation, best: Evaluation) -> str:
    label = f"after {evaluation.step} steps" if evaluation.step else "prepared, before training"
    return f"{label} (kept)" if evaluation is best else label


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
