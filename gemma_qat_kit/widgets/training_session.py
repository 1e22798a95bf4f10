"""One run of a TrainingPanel: prepare and train in a thread, what came of it so far, and how to pause and stop it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.machine import where_and_when
from gemma_qat_kit.model import Model
from gemma_qat_kit.qat.fake_quantizer import masters, quantizers
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.run import Evaluation, Lines, Step, best_of
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.qat.train import train_qat
from gemma_qat_kit.quality.post_training import module_of
from gemma_qat_kit.widgets.session import Session
from gemma_qat_kit.widgets.training_figures import loss_words
from gemma_qat_kit.widgets.training_places import find_groups, take_places
from gemma_qat_kit.widgets.training_recording import Recording
from gemma_qat_kit.widgets.training_walk import Group, Place, liveliest

# What this kernel's panels prepared, and trained without keeping the weights from before; modules are held weakly.
_formats: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_forgot: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(frozen=True)
class Choice:
    """What a person chose before Start.

    Attributes:
        format: As in `prepare_qat`.
        teacher: As in `train_qat`; "text" for none.
        settings: Steps, learning rate and what else there is.
    """

    format: str
    teacher: str
    settings: TrainSettings


def prepared_format(module: nn.Module) -> str | None:
    """Return the format that a model is prepared for, None where it is not; of mixed grids, those of most weights."""
    found = [quantizer.grid.name for _, quantizer in masters(module).values()]
    if not found:
        return None
    return _formats.get(module) or max(found, key=found.count)


def check_can_train(model: Model, choice: Choice) -> None:
    """Refuse a model that cannot be trained in a format because of what happened to it before.

    Raises:
        BadSettingError: It is prepared for another format, was converted, or forgot what it was before training.
    """
    module = module_of(model)
    format = prepared_format(module)
    again = "Load it again with gqk.load, and make a new panel of it."
    if format is None and any(hasattr(part, "quantized") for part in module.modules()):
        raise BadSettingError(f"{model.name} is converted already.", "Training starts from the floats before.", again)
    if format not in (None, choice.format):
        raise BadSettingError(
            f"{model.name} is prepared for {format} already.",
            "A model is prepared once, from the weights that it was loaded with.",
            f"For {choice.format}: {again[0].lower()}{again[1:]} Or choose {format} to train on.",
        )
    if module in _forgot:
        raise BadSettingError(
            f"{model.name} was trained without a copy of its weights from before.",
            'Only the teacher "itself, kept in memory" keeps them, and all figures compare with them.',
            again,
        )


class TrainingSession(Session):
    """A run, from Start to its end.

    Attributes:
        choice: What was chosen.
        lines: What training moves between.
        groups, places: The weights that are watched, and after each step where every group stood.
    """

    def __init__(self, choice: Choice):
        super().__init__(choice.settings.num_steps)
        self.choice = choice
        self.lines: Lines | None = None
        self.groups: list[Group] = []
        self.places: list[list[Place]] = []

    def work(self, find_model: Callable[[Callable], Model], text, folder) -> None:
        """Do it all in this thread.

        Args:
            find_model: Returns the model; takes a function to report to.
            text: As in `train_qat`.
            folder: As in `train_qat`.
        """

        def prepare_and_train() -> None:
            model = find_model(self.report)
            check_can_train(model, self.choice)
            self._train(model, text, folder)

        self.carry_out(prepare_and_train)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation whose model is kept, by the rule of `train_qat`."""
        if self.result is not None:
            return self.result.best
        return best_of(tuple(self.evaluations), is_text=self.choice.teacher == "text")

    @property
    def share_recovered(self) -> float | None:
        """Of the best point; None before it is known, and where there was nothing to win back."""
        best = self.best
        return self.lines.share_recovered(best.nats) if self.lines and best else None

    @property
    def walk(self) -> tuple[Group | None, list[Place]]:
        """The group in which most happened, and where it stood after each step."""
        places = tuple(self.places)
        if not places:
            return None, []
        number = liveliest(places)
        return self.groups[number], [each[number] for each in places]

    def recording(self, held_out: str) -> Recording:
        """Return what the run did, to be shown where the model is not.

        Args:
            held_out: The text whose end was held out.

        Raises:
            BadSettingError: It has not ended, or made no step.
        """
        run, (group, places) = self.result, self.walk
        if run is None or not run.steps or not places:
            raise BadSettingError(
                "There is no run to record.",
                "One that has ended or was stopped, and made a step, can be recorded.",
                "Press Start, wait until it has ended, and record it then.",
            )
        try:
            peak = self.use.peak
        except KitError:  # this machine does not say
            peak = None
        return Recording(run.name, self.choice.format, loss_words(self.choice), self.num_steps, run.lines, run.steps,
                         run.evaluations, held_out, run.seconds, peak and (peak.gpu or peak.ram), group, tuple(places),
                         where_and_when())  # fmt: skip

    @property
    def words(self) -> str:
        """What happens now, or how it ended."""
        format = self.choice.format
        return self.words_for(f"Getting the model ready for {format}.", f"Training for {format}")

    @property
    def has_begun(self) -> bool:
        """Whether there is something to show."""
        return self.lines is not None

    def _train(self, model: Model, text, folder) -> None:
        choice, module = self.choice, module_of(model)
        if not quantizers(module):
            prepare_qat(model, choice.format, report=self.report)
            _formats[module] = choice.format

        def watch(event: Step | Evaluation | Lines) -> None:
            self._watch(event, module)

        teacher = None if choice.teacher == "text" else choice.teacher
        try:
            self.result = train_qat(model, text, teacher=teacher, settings=choice.settings, folder=folder, watch=watch,
                                    report=self.report)  # fmt: skip
        finally:
            if (self.evaluations or self.steps) and any(
                quantizer.reference is None for _, quantizer in masters(module).values()
            ):
                _forgot.add(module)
        self.steps, self.evaluations = list(self.result.steps), list(self.result.evaluations)

    def _watch(self, event: Step | Evaluation | Lines, module: nn.Module) -> None:
        """Note what happened, then wait while paused; called in the thread of the training, between two steps."""
        if isinstance(event, Lines):
            self.lines, self.groups = event, find_groups(module)
        elif isinstance(event, Evaluation):
            if event.step == 0:  # told twice where the plain rule turns out to be the better start
                self.evaluations, self.places = [], [take_places(module, self.groups, 0)]
            self.evaluations.append(event)
        else:
            self.steps.append(event)
            if self._is_under_way:
                self.places.append(take_places(module, self.groups, event.step))
            else:  # a step of a run that goes on: the weights are further already
                self.places.clear()
            self.wait_while_paused()
        self.check_stopped()

    @property
    def _is_under_way(self) -> bool:
        return self.progress is not None and self.progress.stage == "training"
