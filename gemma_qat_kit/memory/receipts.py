"""Receipts: what each load, chat and training run was predicted to take in memory, and took.

They are lines of a small local file, `GQK_RECEIPTS` or ~/.cache/gemma_qat_kit/receipts.jsonl, and are sent nowhere. A
record names the kind of machine and the settings, and no user, host or path, so that a class can pool its files.
"""

import functools
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from gemma_qat_kit import machine
from gemma_qat_kit.catalog import KNOWN_FORMATS, SIZES
from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.memory import receipts_file
from gemma_qat_kit.memory.parts import PARTS, Parts
from gemma_qat_kit.memory.receipts_line import EVENTS, Receipt, to_line

__all__ = ["EVENTS", "PartError", "Receipt", "Receipts", "receipts", "record"]

TOTAL, PEAK = "total", "peak"
_MOST_FILES, _MOST_RECEIPTS = 1000, 100_000  # of a class


def record(event: str, settings, predicted: Parts | None, measured: Parts, **numbers: float) -> None:
    """Add a receipt to this machine's file, unless `GQK_RECEIPTS=off`; a disk that does not take it causes a warning.

    Args:
        event: "load", "chat" or "train".
        settings: `MemorySettings`, or a mapping with the names that are known of a local checkpoint.
        predicted: The plan, None where there is none.
        measured: The same parts as they were.
        **numbers: What else was counted, finite numbers: `predicted_peak_bytes` and `measured_peak_bytes` become a row
            of `Receipts.errors()`.

    Raises:
        UnknownNameError: Unknown event.
        BadSettingError: A number that is not finite, or a text of more than 80 characters.
    """
    if event not in EVENTS:
        raise unknown_name("event", event, EVENTS)
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    here, libraries = this_machine()
    receipts_file.append(to_line(Receipt(when, event, here, libraries, _kept(settings), predicted, measured, numbers)))


def _kept(settings) -> dict[str, object]:
    """Return settings as a receipt keeps them: the name of a checkpoint that is not in the catalog may be a path."""
    values = asdict(settings) if is_dataclass(settings) else dict(settings)
    is_published = values.pop("config", None) is None
    for name, known in (("size", SIZES), ("format", KNOWN_FORMATS)):
        is_known = values.get(name) in known and (is_published or name == "format")
        values[name] = values.get(name) if is_known else None
    return values


@functools.cache
def this_machine() -> tuple[dict, dict]:
    """Return what a receipt says of the machine and its libraries."""
    from gemma_qat_kit import __version__

    gpus = machine.read_gpus()
    here = {
        "place": machine.read_place(),
        "system": platform.system(),
        "cpu_count": machine.read_cpu_count(),
        "ram_bytes": machine.read_memory()[0],
        "gpu": gpus[0].name[:80] if gpus else None,
    }
    kit = {"gemma_qat_kit": __version__, "python": platform.python_version()}
    return here, kit | machine.read_libraries(("torch", "transformers", "xllamacpp"))


@dataclass(frozen=True)
class PartError:
    """How far the plans of several runs were off in one part; positive means that the plan was too high.

    Attributes:
        name: A part, "total", or "peak".
        count: Runs that have the part.
        mean_bytes: Mean of predicted less measured.
        worst_bytes: The one furthest from zero.
        mean_ratio: Mean distance as a share of what was measured; None where that was nothing.
    """

    name: str
    count: int
    mean_bytes: float
    worst_bytes: int
    mean_ratio: float | None


@dataclass(frozen=True, repr=False)
class Receipts(Sequence):
    """Runs, oldest first; draws itself as a table, a picture of predicted against measured, and the error per part.

    Attributes:
        rows: The receipts.
        notes: What could not be read.
    """

    rows: tuple[Receipt, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, index):
        return Receipts(self.rows[index], self.notes) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, *, event: str | None = None, size: str | None = None) -> "Receipts":
        """Return the runs of one event, one size, or both.

        Raises:
            UnknownNameError: Unknown event or size.
        """
        for kind, value, known in (("event", event, EVENTS), ("size", size, SIZES)):
            if value is not None and value not in known:
                raise unknown_name(kind, value, known)
        rows = (row for row in self.rows if event in (None, row.event))
        return Receipts(tuple(row for row in rows if size in (None, row.settings.get("size"))), self.notes)

    def errors(self) -> tuple[PartError, ...]:
        """Return how far the plans were off: in total, at the peak, and part by part. It shows what to mend in them."""
        pairs: dict[str, list[tuple[int, int]]] = {}
        for row in self.rows:
            for name, predicted, measured in _compared(row):
                pairs.setdefault(name, []).append((predicted, measured))
        order = [TOTAL, PEAK, *PARTS]
        return tuple(_part_error(name, pairs[name]) for name in sorted(pairs, key=lambda name: (
            order.index(name) if name in order else len(order), name)))  # fmt: skip

    def __str__(self) -> str:
        from gemma_qat_kit.memory.receipts_picture import describe

        return describe(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from gemma_qat_kit.memory.receipts_picture import draw

        return draw(self)


def _compared(row: Receipt) -> Iterator[tuple[str, int, int]]:
    """Yield (name, predicted, measured bytes) of everything that a run tells about its plan."""
    if row.predicted is None:
        return
    yield TOTAL, row.predicted.total_bytes, row.measured.total_bytes
    predicted, measured = (row.numbers.get(f"{kind}_peak_bytes") for kind in ("predicted", "measured"))
    if predicted is not None and measured is not None:
        yield PEAK, int(predicted), int(measured)
    sums = [_in_memory(parts) for parts in (row.predicted, row.measured)]
    yield from ((name, sums[0].get(name, 0), sums[1].get(name, 0)) for name in sums[0] | sums[1])


def _in_memory(parts: Parts) -> Mapping[str, int]:
    """Return bytes by name, also of names that this version does not know."""
    sums: dict[str, int] = {}
    for part in parts.placed:
        if part.place != "disk":
            sums[part.name] = sums.get(part.name, 0) + part.nbytes
    return sums


def _part_error(name: str, pairs: list[tuple[int, int]]) -> PartError:
    errors = [predicted - measured for predicted, measured in pairs]
    ratios = [abs(predicted - measured) / measured for predicted, measured in pairs if measured]
    return PartError(name, len(pairs), sum(errors) / len(errors), max(errors, key=abs),
                     sum(ratios) / len(ratios) if ratios else None)  # fmt: skip


def receipts(*paths: str | Path) -> Receipts:
    """Return the receipts of this machine, or those in files and folders: a class's, pooled.

    Args:
        *paths: Files, or folders with files that end in .jsonl, also in folders inside; they are only read. None takes
            this machine's own file: broken lines in it are moved to a file beside it, with a warning.

    Raises:
        BadSettingError: A path that does not exist.
    """
    if not paths:
        return _ordered(receipts_file.read_own(), _own_notes())
    rows, notes = [], []
    for path in _files(paths):
        try:
            found, num_bad = receipts_file.read_other(path)
        except OSError as err:
            notes.append(f"{path.name} could not be read: {err.strerror or err}.")
            continue
        rows += found
        if num_bad:
            notes.append(f"Lines of {path.name} that are no receipts and are left out: {num_bad}.")
        if len(rows) > _MOST_RECEIPTS:
            notes.append(f"There are more than {_MOST_RECEIPTS:,} receipts; the rest is left out.")
            break
    return _ordered(rows[:_MOST_RECEIPTS], notes)


def _own_notes() -> list[str]:
    try:
        is_off = receipts_file.receipts_path() is None
    except OSError:
        is_off = False
    return ["Receipts are switched off: GQK_RECEIPTS=off."] if is_off else []


def _ordered(rows: Iterable[Receipt], notes: Iterable[str]) -> Receipts:
    return Receipts(tuple(sorted(rows, key=lambda row: row.when)), tuple(notes))


def _files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files that paths name, each once."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        path = path.expanduser()
        if not path.exists():
            raise BadSettingError(
                f"{path} does not exist.",
                "Receipts lie in files of JSON lines, or in folders of such files.",
                "Name one of these, or call receipts() for this machine's own.",
            )
        inside = islice((file for file in path.rglob("*.jsonl") if file.is_file()), _MOST_FILES)
        for file in sorted(inside) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())
