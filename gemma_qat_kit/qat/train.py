"""`train_qat`: train a prepared model, keep its best point, and survive whatever stops it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.engines.allocator import keeping_freed_memory
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.machine import read_memory
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Progress, Report
from gemma_qat_kit.qat.batches import Windows, read_windows
from gemma_qat_kit.qat.evaluation import Evaluator
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.loop import make_optimizer
from gemma_qat_kit.qat.run import Evaluation, Lines, QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.qat.state import fingerprint, restore, snapshot, trained
from gemma_qat_kit.qat.teachers import find_teacher
from gemma_qat_kit.qat.training import Training, ignore, shown_report, training_mode
from gemma_qat_kit.quality.post_training import scorer_of_module
from gemma_qat_kit.quality.scoring import scorer_of
from gemma_qat_kit.recording import settings_of, train_receipt

Watch = Callable[[Step | Evaluation | Lines], None]


def train_qat(
    model,
    text: str | Path | Iterable | None = None,
    *,
    teacher="memory",
    settings: TrainSettings | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
    report: Report | None = None,
) -> QatRun:
    """Train a prepared model in place, and leave it at the best point that held-out text showed.

    Args:
        model: A model of `gqk.load` or a pair (transformers module, tokenizer), after `prepare_qat`.
        text: What to train on, as in `perplexity`, or several texts, which take turns; one of them may be a list of
            conversations, which the model's own chat template writes out. None takes a built-in text. The end of each
            is held out.
        teacher: Whose probabilities to match: "memory", the model before quantization, kept beside the masters;
            "cache", its likeliest words, asked for once; another model with the same vocabulary; or None for plain
            cross-entropy with the text, which is fine-tuning.
        settings: None for the defaults.
        folder: For checkpoints. A run that was killed goes on exactly from the last one, once the model is loaded and
            prepared again.
        watch: Called with each update and evaluation, those of a resumed run's earlier parts included; may block to
            pause, or raise CancelledError to stop.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar, in the first process.

    Returns:
        What happened. Ctrl-C and CancelledError end a run early, and it still keeps its best point.

    Raises:
        BadSettingError: The model is not prepared, the text is too short, a setting or teacher cannot be used, or the
            folder holds a checkpoint of another run.
        BadOutputError: The loss became NaN; the model is at its best point before that.
        NotEnoughDiskError: A checkpoint cannot be written; the model is at its best point.
    """
    settings = settings or TrainSettings()
    module, scorer = _prepared(model), scorer_of_module(model)
    windows = read_windows(scorer, text, settings)
    with ExitStack() as stack:
        shown = shown_report(report, stack)
        stack.enter_context(training_mode(module, settings))
        planned = _memory_settings(model, settings, teacher)
        if planned is not None:
            stack.enter_context(out_of_memory.help(planned))
        if _has_room(module):
            stack.enter_context(keeping_freed_memory())
        training = _QatTraining(module, windows, teacher, settings, folder, watch or ignore, shown)
        stack.enter_context(train_receipt(model, planned, training.optimizer_bytes))
        return training.result(scorer_of(model)[0], training.train())


class _QatTraining(Training):
    """A run of QAT under way."""

    evaluation_type = Evaluation

    def __init__(self, module, windows: Windows, teacher, settings, folder, watch: Watch, report: Report):
        asked = {"text": windows.digest, "teacher": teacher if isinstance(teacher, str | None) else "another model"}
        super().__init__(module, settings, mark=fingerprint(module), asked=asked, window=windows.held_out[0],
                         folder=folder, watch=watch, report=report)  # fmt: skip
        self.batches = windows
        self.objective = find_teacher(teacher, module, windows, self._report_teacher)
        ranges = [p for name, p in trained(module).items() if name.endswith("_range.scale")]
        self.optimizer = make_optimizer(masters(module).values(), ranges, settings)

    def measure_lines(self) -> None:
        """Measure what training moves between."""
        evaluator = Evaluator(self.module, self.batches.held_out, self.autocast)
        self.lines, self._evaluator = evaluator.lines, evaluator
        self.watch(self.lines)

    def start(self) -> None:
        """Begin from the plain rule where the search for scales did worse on this text: no run may end below it."""
        self.evaluate(0)
        if self.best.kl_divergence > self.lines.plain.kl_divergence:
            for master, quantizer in masters(self.module).values():
                quantizer.take_plain_scale(master)
            self.evaluations.clear()
            self.evaluate(0)

    def measure(self, step: int) -> Evaluation:
        """Measure the held-out text."""
        return self._evaluator.measure(step)

    def score(self, evaluation: Evaluation) -> float:
        """The nearest to the model before quantization is best; without a teacher, the least surprised one."""
        return evaluation.nats if self.objective.is_text else evaluation.kl_divergence

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return codes and scales."""
        return snapshot(self.module)

    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Put codes and scales back."""
        restore(self.module, kept)

    def result(self, name: str, ended: str) -> QatRun:
        """Return what happened."""
        return QatRun(name, self.settings, str(self.dtype).removeprefix("torch."),
                      sum(p.numel() for p in trained(self.module).values()), self.lines, tuple(self.steps),
                      tuple(self.evaluations), self.best, ended, self.seconds)  # fmt: skip

    def _report_teacher(self, done: int, total: int) -> None:
        self.report(Progress("asking the teacher", done, total, "windows"))


def _prepared(model) -> nn.Module:
    module = scorer_of_module(model).module
    if not masters(module):
        raise BadSettingError(
            "This model is not prepared.",
            "train_qat trains what prepare_qat put into a model.",
            'Call prepare_qat(model, "q4_0") first.',
        )
    if any(quantizer.has_moved and quantizer.reference is None for _, quantizer in masters(module).values()):
        raise BadSettingError(
            "This model was trained already, and its weights before quantization were not kept.",
            'Only teacher="memory" keeps them, and every run is measured against them.',
            "Load and prepare the model again; a run with a folder then goes on from its checkpoint.",
        )
    return module


def _memory_settings(model, settings: TrainSettings, teacher) -> MemorySettings | None:
    """Return what the run's plan is made for, None of a model that is not in the catalog."""
    known = settings_of(model) if isinstance(model, Model) else None
    return known and replace(
        known,
        task="qat",
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        gradient_accumulation=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        logits_chunk_length=None,
        teacher=teacher if teacher in ("memory", "cache") else "none",
    )


def _has_room(module: nn.Module) -> bool:
    """Tell whether a CPU can hold twice what training takes: master, gradient, two moments, values, teacher."""
    values = sum(p.numel() for p in trained(module).values())
    return module.device.type == "cpu" and (read_memory()[1] or 0) > 2 * 24 * values
