"""One run of a TrainingPanel: prepare and train in a thread, what came of it so far, and how to pause and stop it."""

import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

from torch import nn

from gemma_qat_kit.errors import BadSettingError, CancelledError
from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.qat.evaluation import Evaluation, Lines
from gemma_qat_kit.qat.fake_quantizer import masters, quantizers
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.run import QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.qat.train import train_qat
from gemma_qat_kit.quality.post_training import module_of
from gemma_qat_kit.widgets.training_replay import Group, Place, find_groups, liveliest, take_places

_one_at_a_time = threading.Lock()
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


class TrainingSession:
    """A run, from Start to its end.

    Attributes:
        choice: What was chosen.
        is_running: Until it ended, however it did.
        lines, steps, evaluations: What `train_qat` told so far.
        groups, places: The weights that are watched, and after each step where every group stood.
        progress: Of what is done now.
        use: The memory of this process, measured while it runs.
        result: The finished or stopped run.
        error: What ended it otherwise.
        done: Set when it is over.
    """

    def __init__(self, choice: Choice):
        self.choice, self.is_running, self.done = choice, True, threading.Event()
        self.lines: Lines | None = None
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.groups: list[Group] = []
        self.places: list[list[Place]] = []
        self.progress: Progress | None = None
        self.result: QatRun | None = None
        self.error: Exception | None = None
        self.use = measure_memory()
        self._stopped, self._goes_on = threading.Event(), threading.Event()
        self._goes_on.set()

    def work(self, find_model: Callable[[Callable], Model], text, folder) -> None:
        """Do it all in this thread.

        Args:
            find_model: Returns the model; takes a function to report to.
            text: As in `train_qat`.
            folder: As in `train_qat`.
        """
        try:
            with self.use, self._alone():
                model = find_model(self._report)
                check_can_train(model, self.choice)
                self._train(model, text, folder)
        except Exception as err:
            self.error = err
        finally:
            self.is_running = False
            self.done.set()

    def pause(self) -> None:
        """Wait after the step under way."""
        self._goes_on.clear()

    def resume(self) -> None:
        """Go on."""
        self._goes_on.set()

    def stop(self) -> None:
        """End after the step under way, at the best point so far."""
        self._stopped.set()
        self._goes_on.set()

    @property
    def is_paused(self) -> bool:
        """Whether it waits, or will after the step under way."""
        return self.is_running and not self._goes_on.is_set()

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop and has not yet."""
        return self.is_running and self._stopped.is_set()

    @property
    def best(self) -> Evaluation | None:
        """The evaluation whose model is kept, by the rule of `train_qat`."""
        if self.result is not None:
            return self.result.best
        kept = "nats" if self.choice.teacher == "text" else "kl_divergence"
        return min(tuple(self.evaluations), key=lambda each: getattr(each, kept), default=None)

    @property
    def share_recovered(self) -> float | None:
        """Of the best point; None before it is known, and where there was nothing to win back."""
        best = self.best
        return self.lines.share_recovered(best.nats) if self.lines and best else None

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the steps so far; None before the first one."""
        steps = self.steps
        if not steps or not self.is_running:
            return None
        return mean(step.seconds for step in steps) * (self.choice.settings.num_steps - steps[-1].step)

    @property
    def walk(self) -> tuple[Group | None, list[Place]]:
        """The group in which most happened, and where it stood after each step."""
        places = tuple(self.places)
        if not places:
            return None, []
        number = liveliest(places)
        return self.groups[number], [each[number] for each in places]

    @property
    def words(self) -> str:
        """What happens now, or how it ended."""
        format, total = self.choice.format, self.choice.settings.num_steps
        made = self.steps[-1].step if self.steps else 0
        if self.is_stopping:
            return "Stopping after the step under way."
        if self.is_paused:
            return f"Paused after the step under way; {made} of {total} are made."
        if self.is_running and self.lines is None:
            return f"Getting the model ready for {format}."
        if self.is_running:
            return f"Training for {format}: step {made} of {total}."
        if self.result is not None:
            return f"{self.result.ended} The model is at its best point, after step {self.result.best.step}."
        return f"{self.error.wrong} {self.error.allowed}" if isinstance(self.error, CancelledError) else ""

    def _train(self, model: Model, text, folder) -> None:
        choice, module = self.choice, module_of(model)
        if not quantizers(module):
            prepare_qat(model, choice.format, report=self._report)
            _formats[module] = choice.format

        def watch(event: Step | Evaluation | Lines) -> None:
            self._watch(event, module)

        teacher = None if choice.teacher == "text" else choice.teacher
        try:
            self.result = train_qat(model, text, teacher=teacher, settings=choice.settings, folder=folder, watch=watch,
                                    report=self._report)  # fmt: skip
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
            self._goes_on.wait()
        self._check_stopped()

    @property
    def _is_under_way(self) -> bool:
        return self.progress is not None and self.progress.stage == "training"

    def _report(self, progress: Progress) -> None:
        self._check_stopped()
        self.progress = progress

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise CancelledError("Stopped before the first measurement.", "Nothing is trained.", "Press Start again.")

    @contextmanager
    def _alone(self):
        """Wait for another panel's training to end: two at once would take twice the memory."""
        while not _one_at_a_time.acquire(timeout=0.1):
            self._report(Progress("waiting for another training to end", 0, None))
        try:
            yield
        finally:
            _one_at_a_time.release()
