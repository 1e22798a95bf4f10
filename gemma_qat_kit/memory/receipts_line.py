"""A receipt and the line of JSON that it is kept as. A line may come from anybody: nothing in it is believed."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.memory.parts import PLACES, Part, Parts

VERSION = 1
EVENTS = ("load", "chat", "train")
MOST_LINE_BYTES = 2**16
_MOST_TEXT, _MOST_ENTRIES, _MOST_BYTES, _MOST_NUMBER = 80, 64, 2**50, 2**60
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True)
class Receipt:
    """What one run was predicted to take and took.

    Attributes:
        when: In UTC, as in "2026-11-26T17:12:11Z".
        event: "load", "chat" or "train".
        machine: "place", "cpu_count", "ram_bytes" and "gpu": what tells machines apart, and nobody's name.
        libraries: Version of each library, None where it is missing.
        settings: Of the plan, by the names of `MemorySettings`; fewer where the checkpoint is no published one.
        predicted: None where there was no plan.
        measured: At the peak of the run.
        numbers: What else was counted: "predicted_peak_bytes", "measured_peak_bytes", "seconds".
        version: Of the record's form.
    """

    when: str
    event: str
    machine: Mapping[str, object]
    libraries: Mapping[str, object]
    settings: Mapping[str, object]
    predicted: Parts | None
    measured: Parts
    numbers: Mapping[str, float] = field(default_factory=dict)
    version: int = VERSION

    @property
    def name(self) -> str:
        """Size and format."""
        return f"{self.settings.get('size') or 'local'} {self.settings.get('format') or ''}".rstrip()

    @property
    def error_bytes(self) -> int | None:
        """Predicted less measured total; None without a plan."""
        return None if self.predicted is None else self.predicted.total_bytes - self.measured.total_bytes

    @property
    def error(self) -> float | None:
        """The same as a share of what was measured; None without a plan, or where nothing was measured."""
        total = self.measured.total_bytes
        return None if self.error_bytes is None or not total else self.error_bytes / total


def to_line(receipt: Receipt) -> bytes:
    """Write a receipt as one line of JSON.

    Raises:
        BadSettingError: It holds what could not be read back: a number that is not finite, a text that is too long.
    """
    values = dict(vars(receipt), predicted=_rows(receipt.predicted), measured=_rows(receipt.measured))
    try:
        line = json.dumps({"version": receipt.version, **values}, separators=(",", ":")).encode()
        from_line(line)
    except (TypeError, ValueError) as err:
        raise BadSettingError(
            f"This receipt cannot be written: {err}.",
            f"It holds finite numbers, and texts of up to {_MOST_TEXT} characters.",
            "Leave out what is neither.",
        ) from err
    return line + b"\n"


def _rows(parts: Parts | None) -> list | None:
    return None if parts is None else [[part.name, part.place, part.nbytes] for part in parts.placed]


def from_line(line: bytes) -> Receipt:
    """Read a receipt; of one in a newer form what this version knows.

    Raises:
        ValueError: It is none: broken, too long, or with a value that cannot be.
    """
    if len(line) > MOST_LINE_BYTES:
        raise ValueError("the line is too long")
    try:
        data = json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or not 1 <= version <= _MOST_NUMBER:
        raise ValueError("it has no version")
    defaults = {"when": "", "event": "?", "predicted": None, "measured": Parts(())}
    values = {}
    for name, read in _READERS.items():
        try:
            values[name] = read(data[name])
        except (KeyError, TypeError, ValueError) as err:
            if version == VERSION:
                raise ValueError(f"{name} is missing or cannot be: {err}") from None
            values[name] = defaults.get(name, {})
    return Receipt(version=version, **values)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT or not value.isprintable():  # of one line, no hidden signs
        raise ValueError("a text is too long or not printable")
    return value


def _number(value: object, most: int = _MOST_NUMBER) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > most:
        raise ValueError("a number is not finite or too large")
    return value


def _when(value: object) -> str:
    if not TIME.fullmatch(_text(value)):
        raise ValueError("it is no time")
    return value


def _event(value: object) -> str:
    if value not in EVENTS:
        raise ValueError("it is no event")
    return value


def _scalar(value: object) -> object:
    if isinstance(value, list):
        return tuple(_text(entry) for entry in _bounded(value))
    if value is None or isinstance(value, bool):
        return value
    return _text(value) if isinstance(value, str) else _number(value)


def _bounded(entries):
    if len(entries) > _MOST_ENTRIES:
        raise ValueError("there are too many entries")
    return entries


def _mapping(read: Callable) -> Callable[[object], dict]:
    def read_mapping(value: object) -> dict:
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
        return {_text(name): read(entry) for name, entry in _bounded(value).items()}

    return read_mapping


def _parts(value: object) -> Parts:
    if not isinstance(value, list):
        raise ValueError("it is no list of parts")
    return Parts(tuple(_part(*entry) for entry in _bounded(value)))


def _part(name: object, place: object, nbytes: object) -> Part:
    if place not in PLACES or type(nbytes) is not int or not 0 <= nbytes <= _MOST_BYTES:
        raise ValueError("a part is in no place or of no size")
    return Part(_text(name), nbytes, place)


_READERS = {
    "when": _when,
    "event": _event,
    "machine": _mapping(_scalar),
    "libraries": _mapping(_scalar),
    "settings": _mapping(_scalar),
    "predicted": lambda value: None if value is None else _parts(value),
    "measured": _parts,
    "numbers": _mapping(_number),
}
