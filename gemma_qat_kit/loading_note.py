"""A note on disk while a model is loaded: a kernel that the system ends cannot say why, so the next one does.

The note names its process; it goes when the load is over, however it ends. One whose process is gone was left by a
kernel that did not survive.
"""

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.units import readable_bytes

_CLOCK = 5  # seconds by which a process's start may seem to move when the clock is set


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
        return (
            f"The last kernel ended while it loaded {name}, which needs {needs}. {out_of_memory.advice(self.cheaper)}"
        )


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


@contextmanager
def guarded_load(settings: MemorySettings | None) -> Iterator[None]:
    """Load inside: with a note on disk meanwhile, and an out-of-memory error that helps; None does neither."""
    if settings is None:
        yield
        return
    with out_of_memory.help(settings), note_loading(settings):
        yield


def last_failure() -> EndedKernel | None:
    """Return what a kernel was loading when it ended, once: its note is removed. None where all went well."""
    found, folder = None, _folder()
    for path in sorted(folder.glob("loading-*.json")) if folder else ():
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

    if (folder := _folder()) is None:
        return None
    path = folder / f"loading-{os.getpid()}.json"
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


def _folder() -> Path | None:
    """Return the folder of what the kit remembers, None where there is no home for it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with suppress(RuntimeError):
        return Path(os.environ.get("GEMMA_QAT_KIT_HOME") or f"{cache}/gemma_qat_kit").expanduser()
    return None
