"""`train_qat`: train a prepared model, keep its best point, and survive whatever stops it."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.engines.allocator import keeping_freed_memory
from gemma_qat_kit.errors import BadSettingError, CancelledError
from gemma_qat_kit.machine import read_memory
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.qat.batches import Windows, read_windows
from gemma_qat_kit.qat.evaluation import Evaluation, Evaluator, Lines
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.loop import make_optimizer, train_steps
from gemma_qat_kit.qat.precision import autocast, choose_dtype
from gemma_qat_kit.qat.run import QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.qat.state import Checkpoints, fingerprint, restore, snapshot, trained
from gemma_qat_kit.qat.teachers import find_teacher
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
        is_first = PartialState(cpu=module.device.type == "cpu").is_main_process
        shown = report or (stack.enter_context(progress_bar()) if is_first else _ignore)
        stack.enter_context(_training_mode(module, settings))
        planned = _memory_settings(model, settings, teacher)
        if planned is not None:
            stack.enter_context(out_of_memory.help(planned))
        if _has_room(module):
            stack.enter_context(keeping_freed_memory())
        training = _Training(model, module, windows, teacher, settings, folder, watch or _ignore, shown)
        stack.enter_context(train_receipt(model, planned, training.optimizer_bytes))
        return training.run()


class _Training:
    """A run under way."""

    def __init__(self, model, module, windows: Windows, teacher, settings, folder, watch: Watch, report: Report):
        self.name, self.module, self.windows, self.settings = scorer_of(model)[0], module, windows, settings
        self.watch, self.report = watch, report
        self.accelerator = Accelerator(cpu=module.device.type == "cpu")
        _check_rows(settings, self.accelerator.num_processes)
        self.mark = fingerprint(module)
        asked = asdict(settings) | {"text": windows.digest}
        asked["teacher"] = teacher if isinstance(teacher, str | None) else "another model"
        self.checkpoints = Checkpoints(Path(folder), module, self.mark, asked) if folder is not None else None
        self.dtype = self._dtype()
        is_own = self.dtype == next(iter(masters(module).values()))[1].dtype
        self.autocast = nullcontext if is_own else lambda: autocast(module.device, self.dtype)
        self.teacher = find_teacher(teacher, module, windows, self._report_teacher)
        ranges = [p for name, p in trained(module).items() if name.endswith("_range.scale")]
        self.optimizer = make_optimizer(masters(module).values(), ranges, settings)
        self.scaler = torch.amp.GradScaler(module.device.type, enabled=self.dtype == torch.float16)
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.first_step, self.seconds, self.best_kept, self.has_begun = 0, 0.0, {}, False

    def run(self) -> QatRun:
        """Train to the end, or until something stops it."""
        if self.checkpoints:
            self.checkpoints.check_room()
        started = time.perf_counter()
        ended = "Stopped by you."
        try:
            self._begin()
            ended = self._train(started)
        except (KeyboardInterrupt, CancelledError):
            if not self.evaluations:
                raise
        finally:
            if self.has_begun:  # else nothing has moved
                restore(self.module, self.best_kept)
        self.seconds += time.perf_counter() - started
        return QatRun(self.name, self.settings, str(self.dtype).removeprefix("torch."),
                      sum(p.numel() for p in trained(self.module).values()), self.lines, tuple(self.steps),
                      tuple(self.evaluations), self.best, ended, self.seconds)  # fmt: skip

    @property
    def best(self) -> Evaluation:
        """The evaluation nearest to the model before quantization; without a teacher, the least surprised one."""
        key = (lambda e: e.nats) if self.teacher.is_text else (lambda e: e.kl_divergence)
        return min(self.evaluations, key=key)

    def optimizer_bytes(self) -> int:
        """Return what the optimizer keeps beside the masters."""
        kept = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in kept)

    def _dtype(self) -> torch.dtype:
        """Return the dtype of the run: that of its checkpoint, else one that is chosen once for all processes."""
        asked = (self.checkpoints and self.checkpoints.dtype()) or self.settings.dtype
        chosen = choose_dtype(self.module, asked, self.windows.held_out[0])
        return broadcast_object_list([chosen])[0]

    def _begin(self) -> None:
        """Measure what training moves between, and go where an earlier run stopped."""
        evaluator = Evaluator(self.module, self.windows.held_out, self.autocast)
        self.lines, self.measure = evaluator.lines, evaluator.measure
        self.watch(self.lines)
        found = self.checkpoints.load(self.optimizer) if self.checkpoints else None
        if found is None:
            self._evaluate(0)
            if self.best.kl_divergence > self.lines.plain.kl_divergence:
                self._take_plain_rule()
            return
        self.first_step, self.best_kept, history = found
        self.steps = [Step(**step) for step in history["steps"]]
        self.evaluations = [Evaluation(**each) for each in history["evaluations"]]
        self.seconds = history["seconds"]
        if history["scaler"]:
            self.scaler.load_state_dict(history["scaler"])
        self.has_begun = True
        for event in sorted([*self.steps, *self.evaluations], key=lambda event: event.step):
            self.watch(event)

    def _take_plain_rule(self) -> None:
        """Begin from the plain rule where the search for scales did worse on this text: no run may end below it."""
        for master, quantizer in masters(self.module).values():
            quantizer.take_plain_scale(master)
        self.evaluations.clear()
        self._evaluate(0)

    def _train(self, started: float) -> str:
        self.has_begun = True
        model = self.accelerator.prepare_model(self.module)
        before = time.perf_counter()
        self._report_step(self.first_step)
        for step, loss in train_steps(model, self.optimizer, self.scaler, self.teacher, self.windows, self.settings,
                                      self.accelerator, self.autocast, self.first_step):  # fmt: skip
            self.steps.append(Step(step, loss, time.perf_counter() - before))
            self.watch(self.steps[-1])
            if self.settings.evaluates_after(step):
                self._evaluate(step)
            if self.checkpoints and step % self.settings.checkpoint_every == 0:
                self._save(step, self.seconds + time.perf_counter() - started)
            self._report_step(step)
            if self._has_stalled():
                return f"Stopped after {step} steps: the last {self.settings.patience} evaluations were no better."
            before = time.perf_counter()
        return "Ran to its end."

    def _evaluate(self, step: int) -> None:
        self.evaluations.append(self.measure(step))
        if self.best is self.evaluations[-1]:
            self.best_kept = snapshot(self.module)
        self.watch(self.evaluations[-1])

    def _has_stalled(self) -> bool:
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) >= self.settings.patience

    def _save(self, step: int, seconds: float) -> None:
        if self.accelerator.is_main_process:
            history = {"steps": [asdict(s) for s in self.steps], "evaluations": [asdict(e) for e in self.evaluations],
                       "seconds": seconds, "scaler": self.scaler.state_dict(), "dtype": str(self.dtype)}  # fmt: skip
            self.checkpoints.save(step, self.optimizer, self.best_kept, history)
        self.accelerator.wait_for_everyone()

    def _report_step(self, step: int) -> None:
        self.report(Progress("training", step, self.settings.num_steps, "steps"))

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


@contextmanager
def _training_mode(module: nn.Module, settings: TrainSettings):
    """Set a module to training until the block ends; on a CPU, keep freed memory for the next step."""
    was_training = module.training
    module.train()
    if settings.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            module.gradient_checkpointing_disable()
        module.zero_grad(set_to_none=True)
        module.train(was_training)


def _check_rows(settings: TrainSettings, num_processes: int) -> None:
    if settings.rows % num_processes:
        raise BadSettingError(
            f"An update of {settings.rows} windows cannot be shared by {num_processes} processes.",
            "batch_size times gradient_accumulation must be a multiple of their number.",
            f"Try batch_size={num_processes * max(1, settings.rows // num_processes)}.",
        )


def _ignore(event: object) -> None:
    """Watch nothing."""
