"""One run of a panel: long work in a thread, that can be paused and stopped between two steps."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from statistics import mean

from gemma_qat_kit.errors import CancelledError
from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.progress import Progress

_one_at_a_time = threading.Lock()


class Session:
    """A run, from Start to its end.

    Attributes:
        num_steps: Steps that are to be made.
        is_running: Until it ended, however it did.
        steps, evaluations: What was told so far.
        progress: Of what is done now.
        use: The memory of this process, measured while it runs.
        result: What came of it, also where it was stopped.
        error: What ended it otherwise.
        done: Set when it is over.
    """

    def __init__(self, num_steps: int):
        self.num_steps, self.is_running, self.done = num_steps, True, threading.Event()
        self.steps: list = []
        self.evaluations: list = []
        self.progress: Progress | None = None
        self.result = None
        self.error: Exception | None = None
        self.use = measure_memory()
        self._stopped, self._goes_on = threading.Event(), threading.Event()
        self._goes_on.set()

    def carry_out(self, work: Callable[[], None]) -> None:
        """Do it all in this thread, after other panels' runs; errors are kept."""
        try:
            with self.use, self._alone():
                work()
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
    def seconds_left(self) -> float | None:
        """An estimate from the steps so far; None before the first one."""
        steps = self.steps
        if not steps or not self.is_running:
            return None
        return mean(step.seconds for step in steps) * (self.num_steps - steps[-1].step)

    def words_for(self, getting_ready: str, training: str) -> str:
        """Return what happens now, or how it ended.

        Args:
            getting_ready: What it does before there is anything to show.
            training: What it does afterwards, without the numbers.
        """
        made = self.steps[-1].step if self.steps else 0
        if self.is_stopping:
            return "Stopping after the step under way."
        if self.is_paused:
            return f"Paused after the step under way; {made} of {self.num_steps} are made."
        if self.is_running and not self.has_begun:
            return getting_ready
        if self.is_running:
            return f"{training}: step {made} of {self.num_steps}."
        if self.result is not None:
            return f"{self.result.ended} The model is at its best point, after step {self.result.best.step}."
        return f"{self.error.wrong} {self.error.allowed}" if isinstance(self.error, CancelledError) else ""

    @property
    def has_begun(self) -> bool:
        """Whether there is something to show."""
        return bool(self.evaluations)

    def wait_while_paused(self) -> None:
        """Wait while it is paused; called in the thread of the work, between two steps."""
        self._goes_on.wait()

    def report(self, progress: Progress) -> None:
        """Note the progress."""
        self.check_stopped()
        self.progress = progress

    def check_stopped(self) -> None:
        """Raise where it was asked to stop."""
        if self._stopped.is_set():
            raise CancelledError("Stopped before the first measurement.", "Nothing is trained.", "Press Start again.")

    @contextmanager
    def _alone(self):
        """Wait for another panel's training to end: two at once would take twice the memory."""
        while not _one_at_a_time.acquire(timeout=0.1):
            self.report(Progress("waiting for another training to end", 0, None))
        try:
            yield
        finally:
            _one_at_a_time.release()
