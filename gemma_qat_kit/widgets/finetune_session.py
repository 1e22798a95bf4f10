"""One run of a FinetunePanel: fine-tune in a thread, what came of it so far, and the files to take home."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.export.adapter import write_modelfile
from gemma_qat_kit.export.gguf import Export, export_gguf
from gemma_qat_kit.finetune.adapted import merge_adapters, save_adapter
from gemma_qat_kit.finetune.run import Sample, TuneEvaluation
from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.finetune.train import finetune
from gemma_qat_kit.model import Model
from gemma_qat_kit.qat.run import Step
from gemma_qat_kit.widgets.session import Session


@dataclass(frozen=True)
class Choice:
    """What a person chose before Start.

    Attributes:
        qat: As in `finetune`; None for plain LoRA.
        settings: Steps, learning rate and what else there is.
    """

    qat: str | None
    settings: FinetuneSettings


class FinetuneSession(Session):
    """A run, from Start to its end.

    Attributes:
        choice: What was chosen.
        samples: Questions and answers so far.
    """

    def __init__(self, choice: Choice):
        super().__init__(choice.settings.num_steps)
        self.choice = choice
        self.samples: list[Sample] = []

    def work(self, find_model: Callable[[Callable], Model], dataset, questions, folder) -> None:
        """Do it all in this thread.

        Args:
            find_model: Returns the model; takes a function to report to.
            dataset: As in `finetune`.
            questions: Its `samples`.
            folder: As in `finetune`.
        """

        def tune() -> None:
            model = find_model(self.report)
            self.result = finetune(model, dataset, qat=self.choice.qat, settings=self.choice.settings, folder=folder,
                                   samples=questions, watch=self._watch, report=self.report)  # fmt: skip
            self.steps, self.evaluations = list(self.result.steps), list(self.result.evaluations)

        self.carry_out(tune)

    @property
    def best(self) -> TuneEvaluation | None:
        """The evaluation whose adapters are kept."""
        return min(tuple(self.evaluations), key=lambda each: each.nats, default=None)

    @property
    def words(self) -> str:
        """What happens now, or how it ended."""
        return self.words_for("Getting the model ready, and asking it first.", "Training")

    def _watch(self, event: Step | TuneEvaluation | Sample) -> None:
        """Note what happened, then wait while paused; called in the thread of the training."""
        if isinstance(event, Sample):
            self.samples.append(event)
        elif isinstance(event, TuneEvaluation):
            self.evaluations.append(event)
        else:
            self.steps.append(event)
            self.wait_while_paused()
        self.check_stopped()


class ExportSession(Session):
    """Adapters, merged GGUF and Modelfile into one folder.

    Attributes:
        result: The exported GGUF.
    """

    def __init__(self):
        super().__init__(1)

    def work(self, model: Model, folder: Path) -> None:
        """Do it all in this thread; the model is merged afterwards."""

        def export() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(model, folder / "adapter")
            merge_adapters(model)
            self.result = export_gguf(model, folder / "tuned-q4_0.gguf", overwrite=True, report=self.report)
            write_modelfile(model, self.result.path)

        self.carry_out(export)

    @property
    def words(self) -> str:
        """What happens now, or what was written."""
        if self.is_running:
            return "Merging and writing."
        if not isinstance(self.result, Export):
            return ""
        return f"Written: {self.result.path}, with the adapter and a Modelfile for Ollama beside it."
