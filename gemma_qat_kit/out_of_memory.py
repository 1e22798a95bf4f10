"""When memory runs out: say which part is largest and what would take less, and free what failed, all of it.

A model that did not fit stays in memory as long as anything refers to the frames of its traceback: Python, IPython and
the exception itself all do. `help` turns the error into one that refers to nothing.
"""

import gc
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gemma_qat_kit.errors import KitError, NotEnoughMemoryError
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.units import readable_bytes

MOST_OFFERS = 4
# What torch, its CPU allocator, cuBLAS, cuDNN, bitsandbytes, llama.cpp and the system say.
_SIGNS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|bad allocation"
    r"|std::bad_alloc|failed to allocate|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?([KMGT]iB|bytes)", re.IGNORECASE)
_LAST = ("last_exc", "last_value", "last_traceback", "last_type")


class OutOfMemoryError(NotEnoughMemoryError):
    """Memory ran out; in a notebook it shows settings that take less, as buttons.

    Attributes:
        settings: What did not fit.
        cheaper: What to change, in words, and the plan with that change; the least loss first.
    """

    def __init__(self, wrong: str, allowed: str, next_step: str, *, settings: MemorySettings, cheaper=()):
        super().__init__(wrong, allowed, next_step)
        self.settings, self.cheaper, self._is_shown = settings, tuple(cheaper), False

    def _render_traceback_(self) -> list[str]:
        """Called by IPython in place of drawing a traceback, when every frame of the cell has ended, once or twice."""
        for error in _linked(self):
            traceback.clear_frames(error.__traceback__)
        free()
        if not self._is_shown:
            self._is_shown = True
            with suppress(Exception):  # the message matters more than its buttons
                _show_buttons(self)
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def help(settings: MemorySettings) -> Iterator[None]:
    """Turn an out-of-memory error inside a with block, or a decorated function, into one that helps; free what failed.

    Args:
        settings: What the block loads or runs.

    Raises:
        OutOfMemoryError: In place of whatever says that memory ran out; other errors pass.
    """
    try:
        yield
    except Exception as err:
        if isinstance(err, OutOfMemoryError) or not is_out_of_memory(err):
            raise
        failure = explain_oom(err, settings)
        free(err)
        raise failure from err


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: torch's, cuBLAS's, bitsandbytes', the system's or the kit's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and _SIGNS.search(str(error)) is not None


def explain_oom(error: BaseException, settings: MemorySettings) -> OutOfMemoryError:
    """Return an error that names the largest part of the plan and what would take less.

    Args:
        error: What said that memory ran out.
        settings: What was loaded or run.
    """
    plan = plan_for(settings)
    cheaper, largest = plan.cheaper(), plan.largest()
    return OutOfMemoryError(
        _what_happened(error, settings),
        f"It needs {readable_bytes(plan.needed_bytes)} by its plan; the largest part is {largest.name}, "
        f"{readable_bytes(largest.nbytes)}.",
        advice(cheaper),
        settings=settings,
        cheaper=cheaper,
    )


def _what_happened(error: BaseException, settings: MemorySettings) -> str:
    if isinstance(error, KitError):
        return error.wrong
    asked = _ASKED.search(str(error))
    memory = "GPU memory" if settings.device == "cuda" else "memory"
    number, unit = asked.groups() if asked else ("", "")
    amount = readable_bytes(int(number)) if unit == "bytes" and number.isdecimal() else f"{number} {unit}"
    words = f", asking for {amount} more" if asked else ""
    return f"{settings.size} {settings.format} ran out of {memory}{words}."


def advice(cheaper: Sequence[tuple[str, MemoryPlan]]) -> str:
    """Say what would take less, with its bytes."""
    if not cheaper:
        return "Close other models, or take a machine with more memory."
    offers = [f"{words} ({readable_bytes(plan.needed_bytes)})" for words, plan in cheaper[:MOST_OFFERS]]
    return f"Cheaper: {'; '.join(offers)}."


def free(error: BaseException | None = None) -> None:
    """Let go of everything that failed code still holds, and give torch's unused memory back.

    The frames of an error, of its causes and of what the interpreter and IPython remember as the last error are
    cleared; a debugger finds nothing in them any more.
    """
    for found in (error, *_remembered()):
        for linked in _linked(found):
            traceback.clear_frames(linked.__traceback__)
            linked.__traceback__ = None
    for name in _LAST:
        if hasattr(sys, name):
            delattr(sys, name)
    gc.collect()
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        with suppress(RuntimeError):  # after some CUDA errors every call fails
            cuda.empty_cache()


def _linked(error: BaseException | None) -> list[BaseException]:
    """Return an error and all that led to it, each once."""
    found, waiting = [], [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is other for other in found):
            found.append(each)
            waiting += [each.__context__, each.__cause__, *getattr(each, "exceptions", ())]
    return found


def _remembered() -> Iterator[BaseException]:
    """Yield the errors that the interpreter and IPython keep for a debugger, less the one that is shown just now."""
    shown = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
    shell = _ipython()
    result = getattr(shell, "last_execution_result", None)
    kept = [getattr(sys, name, None) for name in ("last_exc", "last_value")]
    kept += [getattr(result, name, None) for name in ("error_in_exec", "error_before_exec")]
    yield from (each for each in kept if isinstance(each, BaseException) and each is not shown)
    drawer = getattr(shell, "InteractiveTB", None)
    if getattr(drawer, "tb", None) is not None:
        traceback.clear_frames(drawer.tb)
        drawer.tb = None


def _ipython():
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def _show_buttons(failure: OutOfMemoryError) -> None:
    """Show the panel in a notebook. It stands floors above, so it is asked for at the front door."""
    if getattr(_ipython(), "kernel", None) is not None:
        from IPython.display import display

        import gemma_qat_kit

        display(gemma_qat_kit.widgets.OutOfMemoryPanel(failure, into="model"))
