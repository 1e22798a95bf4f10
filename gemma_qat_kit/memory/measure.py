"""Memory as it is: what this process and its children hold, at a moment or over time, apart by place."""

import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.memory.measure_process import (
    Moment,
    ProcessMemory,
    add_up,
    child_pids,
    gpu_memory,
    process_memory,
    reset_gpu_peak,
)
from gemma_qat_kit.memory.measure_samples import PLACES_IN_MEMORY, Peak, Samples
from gemma_qat_kit.memory.parts import PLACE_LABELS, Parts, describe_parts
from gemma_qat_kit.units import readable_bytes

__all__ = ["Mark", "MemoryOverTime", "MemoryUse", "Moment", "Peak", "ProcessMemory", "measure_memory", "process_memory"]

_INTERVAL, _CHILDREN_INTERVAL = 0.02, 0.1  # seconds, at least
_IDLE = 110  # so many times as long as a sample took the CPU, the sampler waits: it takes well below 1 % of a core
_MOST_MARKS = 1000


@dataclass(frozen=True, repr=False)
class MemoryUse(Parts):
    """Measured bytes, part by part, of a loaded model."""

    def __str__(self) -> str:
        return describe_parts(self, "measured")

    __repr__ = __str__


class Mark(NamedTuple):
    """A moment with a name."""

    name: str
    moment: Moment


def measure_memory() -> "MemoryOverTime":
    """Measure memory while something runs: `with gqk.measure_memory() as use: …`, then look at `use`.

    It looks every 20 ms, less often where that would take more than a hundredth of a core. Outside a with block call
    `start()` and `stop()`. One may run inside another.
    """
    return MemoryOverTime()


# Who measures now. torch has one peak counter, so whoever resets it first lets everybody note what it says.
# The garbage collector may end a forgotten answer, and with it a measurement, while this thread starts another one
# here: so the lock may be taken again, and what is looped over is a copy.
_running: "dict[int, weakref.ref[MemoryOverTime]]" = {}
_running_lock = threading.RLock()


class MemoryOverTime:
    """Memory of this process, its children and torch's GPUs over time; draws itself as a chart.

    `before`, `after`, `peak`, `samples` and `marks` may be read at any time after the start, also while it runs.
    """

    def __init__(self):
        self._stopped: threading.Event | None = None
        self._started: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._children, self._children_due = (), 0.0
        self._seen = Samples()
        self._marks: deque[Mark] = deque(maxlen=_MOST_MARKS)

    @property
    def is_running(self) -> bool:
        """Whether it measures now."""
        return self._stopped is not None

    def start(self) -> None:
        """Begin to measure, from nothing.

        Raises:
            BadSettingError: It runs already.
        """
        if self.is_running:
            raise BadSettingError(
                "This measurement runs already.", "Each runs once at a time.", "Call stop(), or make another."
            )
        self._forget()
        self._started, self._stopped = time.perf_counter(), threading.Event()
        with _running_lock:
            for other in [ref() for ref in list(_running.values())]:
                if other is not None:
                    other._note_gpu_peak()
            reset_gpu_peak()
            _running[id(self)] = weakref.ref(self)
        self._look(fresh=True)
        arguments = weakref.ref(self), self._stopped
        threading.Thread(target=_keep_looking, args=arguments, name="measure_memory", daemon=True).start()

    def stop(self) -> None:
        """Take the last sample and end; calling it twice does no harm."""
        if not self.is_running:
            return
        self._stopped.set()
        self._look(fresh=True)
        with _running_lock:
            self._note_gpu_peak()
            _running.pop(id(self), None)
        self._stopped = None

    def __enter__(self) -> "MemoryOverTime":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def now(self) -> Moment:
        """Look, and return what there is; while it runs the look is one of the samples.

        Raises:
            MissingLibraryError: The memory of this process cannot be read.
        """
        return _readable(self._look(fresh=True))

    def mark(self, name: str) -> None:
        """Give this moment a name, for the chart: "loaded", "first token"."""
        moment = self._look(fresh=True)
        if moment is not None:
            self._marks.append(Mark(str(name), moment))

    @property
    def before(self) -> Moment:
        """Memory at the start; raises as `peak` does."""
        return self._measured(self._seen.first)

    @property
    def after(self) -> Moment:
        """Memory at the end, or at the last look while it runs; raises as `peak` does."""
        return self._measured(self._seen.newest)

    @property
    def peak(self) -> Peak:
        """The most at once.

        Raises:
            BadSettingError: It was never started.
            MissingLibraryError: The memory of this process cannot be read.
        """
        if self.is_running:
            self._note_gpu_peak()
        return self._measured(self._seen.peak)

    @property
    def samples(self) -> tuple[Moment, ...]:
        """Memory over time, oldest first; in long runs each stands for several looks and is the highest of them."""
        return self._seen.all

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The moments that have names, oldest first; of very many the newest."""
        return tuple(self._marks)

    def _look(self, fresh: bool) -> Moment | None:
        """Look at the memory and keep what is there; `fresh` looks for new children first."""
        seconds = time.perf_counter() - self._started if self._started else 0.0
        if fresh or seconds >= self._children_due:
            begun = time.thread_time()
            self._children = child_pids(os.getpid())
            cost = time.thread_time() - begun
            self._children_due = seconds + max(_CHILDREN_INTERVAL, 2 * _IDLE * cost)
        process, gpu = add_up(os.getpid(), self._children), gpu_memory()
        if process is None:
            return None
        moment = Moment(seconds, gpu.allocated, process.ram, process.mapped, gpu.reserved)
        if self.is_running:
            self._seen.add(moment)
        return moment

    def _note_gpu_peak(self) -> None:
        self._seen.add_gpu_peak(gpu_memory().peak)

    def _measured(self, found: Moment | Peak | None) -> Moment | Peak:
        if self._started is None:
            raise BadSettingError(
                "Nothing was measured yet.",
                "A measurement has numbers once it was started.",
                "Use it as `with gqk.measure_memory() as use:`, or call start().",
            )
        return _readable(found)

    def __str__(self) -> str:
        try:
            peak, before, after = self.peak, self.before, self.after
        except (BadSettingError, MissingLibraryError) as err:
            return str(err)
        lines = [f"{f'memory over {after.seconds:.1f} s':<26}{'before':>10}{'after':>10}{'peak':>10}"]
        rows = [(PLACE_LABELS[place], [m.in_place(place) for m in (before, after, peak)]) for place in PLACES_IN_MEMORY]
        rows.append(("together", [m.total_bytes for m in (before, after, peak)]))
        lines += [f"{name:<26}" + "".join(f"{readable_bytes(n):>10}" for n in row) for name, row in rows if row[2]]
        lines += [f"at {m.seconds:.1f} s, {name}: {readable_bytes(m.total_bytes)}" for name, m in self.marks]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from gemma_qat_kit.memory.measure_picture import draw

        return draw(self)


def _keep_looking(reference: "weakref.ref[MemoryOverTime]", stopped: threading.Event) -> None:
    """Look again and again until it is stopped, or nobody refers to the measurement any more."""
    wait = _INTERVAL
    while not stopped.wait(wait):
        use = reference()
        if use is None:
            return
        begun = time.thread_time()
        use._look(fresh=False)
        del use
        # The time on the CPU, not on the clock: beside a busy thread a look mostly waits for the interpreter's lock.
        wait = max(_INTERVAL, _IDLE * (time.thread_time() - begun))


def _readable(found: Moment | Peak | None) -> Moment | Peak:
    if found is None:
        raise MissingLibraryError(
            "The memory of this process cannot be read.",
            "It comes from Linux's /proc or from psutil, and neither answers here.",
            "Run: pip install psutil",
        )
    return found
