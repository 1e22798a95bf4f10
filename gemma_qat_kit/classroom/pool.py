"""`pool`: the files of a class in one result: who solved what, plans beside measurements, what training won back."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from gemma_qat_kit.classroom.hand_in import HandIn, read
from gemma_qat_kit.classroom.training import Training
from gemma_qat_kit.errors import BadSettingError, BrokenFileError
from gemma_qat_kit.memory.receipts import Receipts
from gemma_qat_kit.memory.receipts_line import Receipt

_MOST_FILES = 1000


@dataclass(frozen=True)
class Student:
    """One name, and what its files say.

    Attributes:
        name: As in the newest file.
        files: Names of the files.
        solved: Exercise to the try at which the first right answer came.
        open: Exercise to the number of wrong answers, where none was right.
        trainings: Training runs.
        receipts: Memory planned and measured.
    """

    name: str
    files: tuple[str, ...]
    solved: dict[str, int]
    open: dict[str, int]
    trainings: tuple[Training, ...]
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, repr=False)
class ClassResults:
    """A class; draws itself as a table of exercises and two pictures: memory, and what training won back.

    Attributes:
        students: By name.
        notes: Files that were left out, each with the reason, and what looks copied.
    """

    students: tuple[Student, ...]
    notes: tuple[str, ...]

    @property
    def exercises(self) -> tuple[str, ...]:
        """Exercises that anybody tried."""
        return tuple(sorted({number for student in self.students for number in (*student.solved, *student.open)}))

    @property
    def receipts(self) -> Receipts:
        """All receipts, each once, oldest first."""
        rows = {_mark(row): row for student in self.students for row in student.receipts}
        return Receipts(tuple(sorted(rows.values(), key=lambda row: row.when)))

    def __str__(self) -> str:
        from gemma_qat_kit.classroom.pool_picture import describe

        return describe(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from gemma_qat_kit.classroom.pool_picture import draw

        return draw(self)


def pool(folder: str | Path) -> ClassResults:
    """Read the files that a class handed in; one that is broken, forged or of another version is left out and named.

    Args:
        folder: With files of `hand_in`, also in folders inside, as learning platforms pack them. Nothing is written.

    Raises:
        BadSettingError: No such folder, or no .json file in it.
    """
    folder = Path(folder).expanduser()
    paths = sorted(islice(folder.rglob("*.json"), _MOST_FILES)) if folder.is_dir() else []
    if not paths:
        raise BadSettingError(
            f"{folder} {'has no .json file in it' if folder.is_dir() else 'is no folder'}.",
            "It holds the files that students handed in, also in folders inside.",
            "Collect what gqk.hand_in writes into one folder.",
        )
    found, notes = [], []
    for path in paths:
        try:
            found.append(read(path))
        except BrokenFileError as err:
            notes.append(f"Left out: {err.wrong} {err.next_step}")
    students = _by_name(found)
    return ClassResults(students, (*notes, *_copies(students)))


def _by_name(files: Iterable[HandIn]) -> tuple[Student, ...]:
    groups: dict[str, list[HandIn]] = {}
    for file in sorted(files, key=lambda file: file.when):
        groups.setdefault(file.student.casefold(), []).append(file)
    return tuple(_student(groups[name]) for name in sorted(groups))


def _student(files: list[HandIn]) -> Student:
    """Put the files of one name together: the same try or receipt in two of them counts once."""
    tried = sorted({repr(t): t for file in files for t in file.tries}.values(), key=lambda t: t.when)
    rows = {_mark(row): row for file in files for row in file.receipts}
    whole = replace(files[-1], tries=tuple(tried), receipts=tuple(rows.values()))
    solved = whole.solved
    left = [t.exercise for t in tried if t.exercise not in solved]
    return Student(
        whole.student,
        tuple(file.path.name for file in files),
        solved,
        {number: left.count(number) for number in sorted(set(left))},
        whole.trainings,
        whole.receipts,
    )


def _copies(students: tuple[Student, ...]) -> list[str]:
    """Say who has the same receipts or runs: two machines never measure the same bytes in the same second."""
    owners: dict[tuple, list[str]] = {}
    for student in students:
        marks = {*map(_mark, student.receipts), *((run.seconds, *run.nats) for run in student.trainings)}
        for mark in marks:
            owners.setdefault(mark, []).append(student.name)
    shared = dict.fromkeys(tuple(names) for names in owners.values() if len(names) > 1)
    return [f"The same receipts or runs are in the files of {', '.join(names)}: one machine, or a copy."
            for names in shared]  # fmt: skip


def _mark(row: Receipt) -> tuple:
    return row.when, row.event, row.measured.placed, tuple(sorted(row.numbers.items()))
