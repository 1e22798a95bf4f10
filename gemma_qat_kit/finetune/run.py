"""What fine-tuning did: its losses, what held-out conversations said, and a few answers before and after."""

import math
from dataclasses import dataclass

from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.qat.run import Step, html_table, panel_html, text_table

_HEADINGS = ("Held-out answers", "Surprise", "Perplexity")


@dataclass(frozen=True)
class TuneEvaluation:
    """One look at the held-out conversations.

    Attributes:
        step: Updates made before it.
        nats: Mean surprise at a token of the assistant's turns.
    """

    step: int
    nats: float


@dataclass(frozen=True)
class Sample:
    """What the model answered at one moment.

    Attributes:
        step: Updates made before.
        question: What it was asked.
        answer: What it said, with the likeliest word each time.
    """

    step: int
    question: str
    answer: str


@dataclass(frozen=True)
class FinetuneRun:
    """A finished or stopped run of `finetune`; draws itself as a table.

    Attributes:
        name: The model.
        settings: As they were asked for.
        qat: The grid that adapters were trained through, or None.
        dtype: That it computed in.
        data: The dataset in a sentence.
        num_adapted: Linears with an adapter.
        num_trained: Values in the adapters.
        steps: Every update.
        evaluations: Of the held-out conversations; the first one before training.
        best: The evaluation whose adapters were kept.
        samples: Answers, those before training first.
        ended: Why it ended.
        seconds: In all, a resumed run's earlier parts included.
    """

    name: str
    settings: FinetuneSettings
    qat: str | None
    dtype: str
    data: str
    num_adapted: int
    num_trained: int
    steps: tuple[Step, ...]
    evaluations: tuple[TuneEvaluation, ...]
    best: TuneEvaluation
    samples: tuple[Sample, ...]
    ended: str
    seconds: float

    def _rows(self) -> list[tuple[str, ...]]:
        best = self.best
        return [(_label(e, best), f"{e.nats:.4f}", f"{math.exp(min(e.nats, 700)):#.4g}") for e in self.evaluations]

    def _note(self) -> str:
        grid = f"through the grid of {self.qat}" if self.qat else "without a grid"
        return (
            f"{self.ended} {len(self.steps):,} steps of {self.settings.rows} conversations in {self.seconds:.0f} s; "
            f"{self.num_adapted:,} linears have an adapter, {self.num_trained:,} values, trained {grid}, computed in "
            f"{self.dtype}. {self.data} Surprise in nats per token of the assistant's turns."
        )

    def _pairs(self) -> list[tuple[str, str, str]]:
        """Return each question with its first and its last answer."""
        asked = dict.fromkeys(sample.question for sample in self.samples)
        answers = {question: [s.answer for s in self.samples if s.question == question] for question in asked}
        return [(question, given[0], given[-1]) for question, given in answers.items()]

    def __str__(self) -> str:
        said = [f"{question}\n  before: {before}\n  after:  {after}" for question, before, after in self._pairs()]
        return "\n".join([self.name, *text_table(_HEADINGS, self._rows()), self._note(), *said])

    def _repr_html_(self) -> str:
        pairs = self._pairs()
        said = html_table(("Asked", "Before", "After"), pairs, are_figures=False) if pairs else ""
        return panel_html(self.name, html_table(_HEADINGS, self._rows()) + said, self._note())


def _label(evaluation: TuneEvaluation, best: TuneEvaluation) -> str:
    label = f"after {evaluation.step} steps" if evaluation.step else "before training"
    return f"{label} (kept)" if evaluation is best else label
