"""A training run that survives whatever stops it: what QAT and fine-tuning have in common around the loop."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from gemma_qat_kit.engines.transformers_traps import set_checkpointing
from gemma_qat_kit.errors import BadSettingError, CancelledError
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.qat.loop import train_steps
from gemma_qat_kit.qat.precision import autocast, choose_dtype, own_dtype
from gemma_qat_kit.qat.run import Step
from gemma_qat_kit.qat.settings import LoopSettings
from gemma_qat_kit.qat.state import Checkpoints


class Training(ABC):
    """A run under way.

    Args:
        module: The model; what requires a gradient is trained.
        settings: Of the loop.
        mark: What tells this model from every other.
        asked: What else a checkpoint must agree with: the text, the teacher.
        window: Token ids (tokens,) that a narrow dtype has to answer with finite numbers.
        folder: For checkpoints, or None.
        watch: Called with what happens.
        report: Called with the progress.
    """

    def __init__(self, module: nn.Module, settings: LoopSettings, *, mark: str, asked: dict, window: torch.Tensor,
                 folder: str | Path | None, watch: Callable, report: Report):  # fmt: skip
        self.module, self.settings, self.watch, self.report = module, settings, watch, report
        self.accelerator = Accelerator(cpu=module.device.type == "cpu")
        _check_rows(settings, self.accelerator.num_processes)
        asked = asdict(settings) | asked
        self.checkpoints = Checkpoints(Path(folder), module, mark, asked) if folder is not None else None
        self.dtype = self._choose_dtype(window)
        is_own = self.dtype == own_dtype(module)
        self.autocast = nullcontext if is_own else lambda: autocast(module.device, self.dtype)
        # From 65,536, torch's own beginning, the first ten steps of a short run would be lost to overflows.
        self.scaler = torch.amp.GradScaler(module.device.type, 2.0**10, enabled=self.dtype == torch.float16)
        self.steps: list[Step] = []
        self.evaluations: list = []
        self.first_step, self.seconds, self.best_kept, self.has_begun = 0, 0.0, {}, False

    # What a kind of training brings along: its parts in the loop, and the class of its evaluations.
    optimizer: torch.optim.Optimizer
    objective: object
    batches: object
    evaluation_type: type

    @abstractmethod
    def measure_lines(self) -> None:
        """Measure what has to be known before anything moves."""

    @abstractmethod
    def measure(self, step: int):
        """Return an evaluation of the model as it is now."""

    @abstractmethod
    def score(self, evaluation) -> float:
        """Return by what the best evaluation is the least."""

    @abstractmethod
    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return the model as it is now, small, from which `restore` makes it again."""

    @abstractmethod
    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Put a snapshot back."""

    def start(self) -> None:
        """Measure the model that training begins with."""
        self.evaluate(0)

    def trained_module(self) -> nn.Module:
        """Return what the loop calls."""
        return self.module

    @property
    def best(self):
        """The evaluation whose model is kept."""
        return min(self.evaluations, key=self.score)

    def train(self) -> str:
        """Train to the end, or until something stops it; leave the model at its best point and say how it ended."""
        if self.checkpoints:
            self.checkpoints.check_room()
        started, ended = time.perf_counter(), "Stopped by you."
        try:
            self._begin()
            ended = self._train(started)
        except (KeyboardInterrupt, CancelledError):
            if not self.evaluations:
                raise
        finally:
            if self.has_begun:  # else nothing has moved
                self.restore(self.best_kept)
        self.seconds += time.perf_counter() - started
        return ended

    def evaluate(self, step: int) -> None:
        """Measure, keep the model if it is the best so far, and tell."""
        self.evaluations.append(self.measure(step))
        if self.best is self.evaluations[-1]:
            self.best_kept = self.snapshot()
        self.watch(self.evaluations[-1])

    def optimizer_bytes(self) -> int:
        """Return what the optimizer keeps beside what is trained."""
        kept = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in kept)

    def _choose_dtype(self, window: torch.Tensor) -> torch.dtype:
        """Return the dtype of the run: that of its checkpoint, else one that is chosen once for all processes."""
        asked = (self.checkpoints and self.checkpoints.dtype()) or self.settings.dtype
        return broadcast_object_list([choose_dtype(self.module, asked, window)])[0]

    def _begin(self) -> None:
        """Measure, and go where an earlier run stopped."""
        self.measure_lines()
        found = self.checkpoints.load(self.optimizer) if self.checkpoints else None
        if found is None:
            self.start()
            return
        self.first_step, self.best_kept, history = found
        self.steps = [Step(**step) for step in history["steps"]]
        self.evaluations = [self.evaluation_type(**each) for each in history["evaluations"]]
        self.seconds = history["seconds"]
        if history["scaler"]:
            self.scaler.load_state_dict(history["scaler"])
        self.has_begun = True
        for event in sorted([*self.steps, *self.evaluations], key=lambda event: event.step):
            self.watch(event)

    def _train(self, started: float) -> str:
        self.has_begun = True
        model = self.accelerator.prepare_model(self.trained_module())
        before = time.perf_counter()
        self._report_step(self.first_step)
        for step, loss in train_steps(model, self.optimizer, self.scaler, self.objective, self.batches, self.settings,
                                      self.accelerator, self.autocast, self.first_step):  # fmt: skip
            self.steps.append(Step(step, loss, time.perf_counter() - before))
            self.watch(self.steps[-1])
            if self.settings.evaluates_after(step):
                self.evaluate(step)
            if self.checkpoints and step % self.settings.checkpoint_every == 0:
                self._save(step, self.seconds + time.perf_counter() - started)
            self._report_step(step)
            if self._has_stalled():
                return f"Stopped after {step} steps: the last {self.settings.patience} evaluations were no better."
            before = time.perf_counter()
        return "Ran to its end."

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


@contextmanager
def training_mode(module: nn.Module, settings: LoopSettings) -> Iterator[None]:
    """Set a module to training until the block ends."""
    was_training = module.training
    module.train()
    if settings.gradient_checkpointing:
        set_checkpointing(module, True)
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            set_checkpointing(module, False)
        module.zero_grad(set_to_none=True)
        module.train(was_training)


def _check_rows(settings: LoopSettings, num_processes: int) -> None:
    if settings.rows % num_processes:
        raise BadSettingError(
            f"An update of {settings.rows} windows cannot be shared by {num_processes} processes.",
            "batch_size times gradient_accumulation must be a multiple of their number.",
            f"Try batch_size={num_processes * max(1, settings.rows // num_processes)}.",
        )


def shown_report(report: Report | None, stack: ExitStack) -> Report:
    """Return what to report to: what a caller gave, else a bar, which only the first of several processes draws."""
    is_first = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate number processes
    return report or (stack.enter_context(progress_bar()) if is_first else ignore)


def ignore(event: object) -> None:
    """Watch nothing."""
