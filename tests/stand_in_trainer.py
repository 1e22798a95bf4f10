"""A stand-in for `train_qat`, so that TrainingPanel can be tested in less than a run takes, and be stopped anywhere."""

import threading
from contextlib import contextmanager

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import CancelledError
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.run import Evaluation, Lines, QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.widgets import training_panel, training_session

SHORT = TrainSettings(num_steps=4, num_evaluations=2, sequence_length=16, batch_size=1)


class Trainer:
    """Stands in for `train_qat`: four steps, each after `gate`; the loss falls, and half of the damage comes back."""

    def __init__(self):
        self.calls, self.gate, self.error = [], threading.Event(), None
        self.gate.set()

    def train(self, model, text, *, teacher, settings, folder, watch, report):
        self.calls.append((text, teacher, settings, folder))
        lines, evaluations, steps = Lines(2.0, Evaluation(0, 3.0, 0.5)), [Evaluation(0, 2.9, 0.4)], []
        ended = "Ran to its end."
        try:
            for event in (lines, evaluations[0]):
                watch(event)
            report(Progress("training", 0, settings.num_steps, "steps"))
            for step in range(1, settings.num_steps + 1):
                while not self.gate.wait(0.01):
                    report(Progress("training", step - 1, settings.num_steps, "steps"))
                if self.error:
                    raise self.error
                steps.append(Step(step, 0.4 / step, 1.0))
                watch(steps[-1])
                report(Progress("training", step, settings.num_steps, "steps"))
            evaluations.append(Evaluation(settings.num_steps, 2.5, 0.2))
            watch(evaluations[-1])
        except CancelledError:
            ended = "Stopped by you."
        best = evaluations[-1]
        return QatRun(model.name, settings, "float32", 64, lines, tuple(steps), tuple(evaluations), best, ended, 4.0)


def stand_in_for_train_qat(monkeypatch):
    """Let panels train by a `Trainer`, and forget what they did before."""
    trainer = Trainer()
    monkeypatch.setattr(training_session, "train_qat", trainer.train)
    monkeypatch.setattr(training_panel, "_kept", {})
    monkeypatch.setattr(training_panel, "_loaded", {})
    return trainer


@contextmanager
def loaded_for_training(tiny, monkeypatch):
    """Yield a tiny model that a panel prepares without reading a text, which takes most of the time."""
    prepare_without_text(monkeypatch)
    with gqk.load(tiny("12B", "bf16"), device="cpu", report=lambda progress: None) as model:
        yield model


def prepare_without_text(monkeypatch):
    """Let panels prepare without calibration."""

    def prepare(model, format, report):
        gqk.prepare_qat(model, format, calibration={}, report=report)

    monkeypatch.setattr(training_session, "prepare_qat", prepare)


def weights(model):
    """The masters that a prepared model has."""
    return [master for master, _ in masters(model.hf[0]).values()]
