"""The answers that were tried on this machine: lines of a small file beside the receipts, so that hints come in steps.

Where no file can be kept they are remembered until the kernel ends.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gemma_qat_kit.classroom import training
from gemma_qat_kit.classroom.exercises import EXERCISES
from gemma_qat_kit.classroom.problem import as_number
from gemma_qat_kit.memory.receipts_line import TIME

MOST_TRIES, MOST_BYTES = 5000, 2**22
_MOST_TEXT, _MOST_ENTRIES = 80, 16
_unkept: list[bytes] = []


class TriesWarning(UserWarning):
    """Answers that could not be kept in a file."""


@dataclass(frozen=True)
class Try:
    """One answer.

    Attributes:
        when: In UTC, as in "2026-11-27T12:00:00Z".
        exercise: Its number.
        student: Whose numbers it had; "" for the usual ones.
        answer: A number, a mapping of settings, or a `Training`; None of what cannot be kept.
        is_right: What the check said.
    """

    when: str
    exercise: str
    student: str
    answer: object
    is_right: bool


def now() -> str:
    """Return the time as it is kept."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def kept(answer: object) -> object:
    """Return an answer as it is kept: a float, short settings, a run in numbers; None of what is none of these."""
    if isinstance(answer, Mapping):
        entries = {str(name)[:_MOST_TEXT]: entry for name, entry in list(answer.items())[:_MOST_ENTRIES]}
        return entries if all(map(_is_plain, entries.values())) else None
    return training.training_of(answer) or as_number(answer)


def _is_plain(entry: object) -> bool:
    if isinstance(entry, str):
        return len(entry) <= _MOST_TEXT and entry.isprintable()
    if isinstance(entry, float):
        return math.isfinite(entry)
    return entry is None or isinstance(entry, bool) or (isinstance(entry, int) and abs(entry) < 2**53)


def to_json(tried: Try) -> dict:
    """Return a try as what JSON can hold."""
    is_run = isinstance(tried.answer, training.Training)
    return asdict(tried) | ({"answer": {"run": training.to_json(tried.answer)}} if is_run else {})


def from_json(data: object) -> Try:
    """Read a try that anybody wrote.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(data, dict) or set(data) != set(Try.__dataclass_fields__):
        raise ValueError("a try lacks what it should have")
    if not isinstance(data["when"], str) or not TIME.fullmatch(data["when"]):
        raise ValueError("a try has no time")
    if data["exercise"] not in EXERCISES or not isinstance(data["is_right"], bool):
        raise ValueError("a try is of no exercise of this kit")
    if not isinstance(data["student"], str) or not _is_plain(data["student"]):
        raise ValueError("a try has a name that cannot be")
    answer = data["answer"]
    if isinstance(answer, dict) and set(answer) == {"run"}:
        answer = training.from_json(answer["run"])
    elif answer is not None and kept(answer) != answer:
        raise ValueError("a try has an answer that cannot be")
    return Try(**dict(data, answer=answer))


def remember(tried: Try) -> None:
    """Add a try to this machine's file, in one step."""
    line = json.dumps(to_json(tried), separators=(",", ":")).encode() + b"\n"
    try:
        path = tries_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_BYTES:
            os.replace(path, path.with_name(f"{path.name}.old"))
        with path.open("ab") as file:
            file.write(line)
    except (OSError, RuntimeError) as err:
        if not _unkept:
            words = f"Your answers are kept until the kernel ends, and no longer: {err}."
            warnings.warn(words, TriesWarning, stacklevel=3)
        _unkept.append(line)


def recall() -> tuple[Try, ...]:
    """Return what was tried on this machine, oldest first; lines that are no tries are passed over."""
    try:
        with tries_path().open("rb") as file:
            lines = file.read(2 * MOST_BYTES).splitlines()
    except (OSError, RuntimeError):
        lines = []
    found = []
    for line in [*lines, *_unkept]:
        try:
            found.append(from_json(json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return tuple(found[-MOST_TRIES:])


def tries_path() -> Path:
    """Return this machine's file of tries.

    Raises:
        RuntimeError: There is no home folder to keep it in.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gemma_qat_kit"
    return (Path(os.environ.get("GEMMA_QAT_KIT_HOME") or cache) / "tries.jsonl").expanduser()
