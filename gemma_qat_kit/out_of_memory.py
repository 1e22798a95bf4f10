"""When memory runs out: say which part is largest and what would take less, and free what failed, all of it.

A model that did not fit stays in memory as long as anything refers to the frames of its traceback: Python, IPython and
the exception itself all do. `help` turns the error into one that refers to nothing. A kernel that the system ended
cannot say anything any more; the note that `note_loading` leaves says it to the next one.
"""

import gc
import json
import os
import re
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)
_LAST = ("last_exc", "last_value", "last_traceback", "last_type")
_CLOCK = 5  # seconds by which a process's start may seem to move when the clock is set


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
        _advice(cheaper),
        settings=settings,
        cheaper=cheaper,
    )


def _what_happened(error: BaseException, settings: MemorySettings) -> str:
    if isinstance(error, KitError):
        return error.wrong
    asked = _ASKED.search(str(error))
    memory = "GPU memory" if settings.device == "cuda" else "memory"
    words = f", asking for {asked[1]} more" if asked else ""
    return f"{settings.size} {settings.format} ran out of {memory}{words}."


def _advice(cheaper: list[tuple[str, MemoryPlan]]) -> str:
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


@dataclass(frozen=True)
class EndedKernel:
    """A kernel that ended while it loaded a model; as text, what to say about it.

    Attributes:
        settings: What it loaded.
        needed_bytes: By its plan.
        cheaper: As in `OutOfMemoryError`.
    """

    settings: MemorySettings
    needed_bytes: int
    cheaper: tuple[tuple[str, MemoryPlan], ...]

    def __str__(self) -> str:
        name = f"{self.settings.size} {self.settings.format}"
        needs = readable_bytes(self.needed_bytes)
        return f"The last kernel ended while it loaded {name}, which needs {needs}. {_advice(list(self.cheaper))}"


@contextmanager
def note_loading(settings: MemorySettings) -> Iterator[None]:
    """Leave a note on disk while a model is loaded, and warn of the one that a kernel left which did not survive that.

    Args:
        settings: What is loaded.
    """
    if ended := last_failure():
        warnings.warn(str(ended), stacklevel=3)
    path = _write_note(settings)
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def last_failure() -> EndedKernel | None:
    """Return what a kernel was loading when it ended, once: its note is removed. None where all went well."""
    found = None
    for path in sorted(_folder().glob("loading-*.json")):
        note = _read_note(path)
        if note is not None and _is_alive(note):
            continue
        with suppress(OSError):
            path.unlink(missing_ok=True)
        found = (note and _ended(note)) or found
    return found


def _write_note(settings: MemorySettings) -> Path | None:
    """Write the note of this process; where that cannot be done nothing else is lost."""
    import psutil

    path = _folder() / f"loading-{os.getpid()}.json"
    try:
        note = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
        note |= {"needed_bytes": plan_for(settings).needed_bytes, "settings": asdict(replace(settings, config=None))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note), encoding="utf-8")
    except (OSError, KitError, psutil.Error):
        return None
    return path


def _read_note(path: Path) -> dict | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {"pid": int(note["pid"]), "started": float(note["started"]), "host": str(note["host"]),
                "needed_bytes": int(note["needed_bytes"]), "settings": dict(note["settings"])}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):  # cut off, or written by somebody else
        return None


def _is_alive(note: dict) -> bool:
    """Whether the process that wrote a note still runs; of another machine with the same home nobody knows."""
    import psutil

    if note["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(note["pid"])
        is_same = abs(process.create_time() - note["started"]) < _CLOCK  # ids are used again, in containers at once
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _ended(note: dict) -> EndedKernel | None:
    try:
        settings = MemorySettings(**note["settings"] | {"lora_targets": tuple(note["settings"]["lora_targets"])})
        return EndedKernel(settings, note["needed_bytes"], tuple(plan_for(settings).cheaper()))
    except (KitError, TypeError, KeyError):  # settings of another version of the kit
        return None


def _folder() -> Path:
    """Return the folder of what the kit remembers."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("GEMMA_QAT_KIT_HOME") or f"{cache}/gemma_qat_kit").expanduser()
