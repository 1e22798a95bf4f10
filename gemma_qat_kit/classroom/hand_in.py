"""`hand_in`: one file with what a student did, for the teacher; and how such a file is read, whoever wrote it.

There is no secret in it, so nothing in it can be proved. What is noticed: damage, by a checksum over everything; a
right answer that is none, since answers are in the file and are judged again; numbers of somebody else's exercise;
receipts and runs that another file has, too. What is not: who gave the answers, and a file that was made with care.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.classroom import tries
from gemma_qat_kit.classroom.check import checked_name, judged
from gemma_qat_kit.classroom.exercises import find_problem
from gemma_qat_kit.classroom.training import Training
from gemma_qat_kit.classroom.tries import Try
from gemma_qat_kit.errors import BrokenFileError, ExportError, KitError
from gemma_qat_kit.memory.receipts import Receipts, receipts, this_machine
from gemma_qat_kit.memory.receipts_line import TIME, Receipt, from_line, to_line

KIND, VERSION = "gemma_qat_kit hand-in", 1
MOST_BYTES = 2**21
_MOST_RECEIPTS = 500
_FIELDS = {"kind", "version", "student", "when", "kit", "machine", "tries", "receipts", "sha256"}


@dataclass(frozen=True, repr=False)
class HandIn:
    """What a student hands in; draws itself as a few lines.

    Attributes:
        student: Name.
        when: It was written, in UTC.
        kit: Version of the kit.
        machine: As in a receipt.
        tries: Every answer, oldest first.
        receipts: The newest receipts of that machine.
        path: The file.
    """

    student: str
    when: str
    kit: str
    machine: dict
    tries: tuple[Try, ...]
    receipts: tuple[Receipt, ...]
    path: Path

    @property
    def solved(self) -> dict[str, int]:
        """Exercises with a right answer, and at which try it came."""
        found: dict[str, int] = {}
        for number in sorted({t.exercise for t in self.tries}):
            right = [t.is_right for t in self.tries if t.exercise == number]
            if True in right:
                found[number] = right.index(True) + 1
        return found

    @property
    def trainings(self) -> tuple[Training, ...]:
        """The training runs among the answers, each once."""
        return tuple(dict.fromkeys(t.answer for t in self.tries if isinstance(t.answer, Training)))

    def __str__(self) -> str:
        solved = ", ".join(f"{number} at try {num}" for number, num in self.solved.items()) or "none yet"
        return (
            f"{self.path}: {self.student}, {self.when}, kit {self.kit}\n"
            f"Solved: {solved}\n{len(self.tries)} answers, {len(self.trainings)} training runs, "
            f"{len(self.receipts)} receipts"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        lines = "".join(f"<div>{html.escape(line)}</div>" for line in str(self).split("\n"))
        return f'{PANEL_STYLE}<div class="gqk-panel" role="status">{lines}</div>'


def hand_in(student: str, path: str | Path | None = None) -> HandIn:
    """Write one file with what was solved on this machine, its receipts and training runs, for the teacher.

    A file of the same student is replaced. On Colab, where each notebook has a machine of its own, each gives a file;
    `pool` puts those of one name together.

    Args:
        student: The name to hand in under; answers for other names stay out.
        path: Of the file; None takes hand_in_NAME.json in this folder.

    Raises:
        BadSettingError: A name that cannot be one.
        ExportError: Something else lies at the path, or it cannot be written.
    """
    student = checked_name(student)
    path = Path(path or f"hand_in_{_slug(student)}.json").expanduser()
    own = tuple(t for t in tries.recall() if _is_of(t, student))
    return write(path, student, own, receipts())


def write(path: Path, student: str, own: tuple[Try, ...], rows: Receipts) -> HandIn:
    """Write a file of these answers and receipts.

    Raises:
        ExportError: Something else lies at the path, or it cannot be written.
    """
    here, libraries = this_machine()
    kept = rows.rows[-_MOST_RECEIPTS:]
    data = {
        "kind": KIND,
        "version": VERSION,
        "student": student,
        "when": tries.now(),
        "kit": libraries["gemma_qat_kit"],
        "machine": here,
        "tries": [tries.to_json(t) for t in own],
        "receipts": [json.loads(to_line(row)) for row in kept],
    }
    _check_free(path, student)
    draft = path.with_name(f"{path.name}.draft")
    try:
        draft.write_text(json.dumps(data | {"sha256": digest(data)}, indent=1), encoding="utf-8")
        draft.replace(path)
    except OSError as err:
        raise ExportError(
            f"{path} cannot be written: {err.strerror or err}.",
            "The folder must be there, and this user may write to it.",
            'Name another place, as in hand_in("Ada", "ada.json").',
        ) from err
    return HandIn(student, data["when"], data["kit"], here, own, kept, path)


def _check_free(path: Path, student: str) -> None:
    """Refuse to replace what is not this student's."""
    if not path.exists():
        return
    try:
        if read(path).student == student:
            return
    except KitError:
        pass
    raise ExportError(
        f"{path} is there already and is no file of {student}.",
        "Only a file that the same student handed in is replaced.",
        "Remove it, or name another path.",
    )


def digest(data: dict) -> str:
    """Return the checksum of everything but the checksum."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_of(tried: Try, student: str) -> bool:
    """Tell whether an answer has the usual numbers, or those of this student."""
    return tried.student.casefold() in ("", student.casefold())


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower() or "student"


def read(path: Path) -> HandIn:
    """Read a file that somebody handed in, believing nothing.

    Raises:
        BrokenFileError: It is none, damaged, of another version, or says what does not hold.
    """
    data = _loaded(path)
    if data.get("kind") != KIND:
        raise _broken(path, "is no hand-in", "Ask for the file that gqk.hand_in writes.")
    if data.get("version") != VERSION:
        raise _broken(path, f"is of form {str(data.get('version'))[:20]}, and this kit reads {VERSION}",
                      "Update the older of the two kits, and hand in again.")  # fmt: skip
    if set(data) != _FIELDS or data["sha256"] != digest(data):
        raise _broken(path, "was changed or damaged after it was written", "Ask the student for a new one.")
    try:
        found = _read(data, path)
    except (TypeError, ValueError, AttributeError, KeyError) as err:
        raise _broken(path, f"cannot be: {str(err)[:120]}", "Ask the student for a new one.") from err
    _check_claims(found)
    return found


def _loaded(path: Path) -> dict:
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as err:
        raise _broken(path, f"cannot be read: {err.strerror or err}", "Check the file.") from err
    if len(raw) > MOST_BYTES:
        raise _broken(path, f"is larger than {MOST_BYTES // 2**20} MiB", "Ask for the file that gqk.hand_in writes.")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise _broken(path, "is cut off, or no JSON", "Ask the student for a new one.") from err
    if not isinstance(data, dict):
        raise _broken(path, "is no hand-in", "Ask for the file that gqk.hand_in writes.")
    return data


def _read(data: dict, path: Path) -> HandIn:
    when, kit = data["when"], data["kit"]
    if not TIME.fullmatch(when) or len(kit) > 40 or not kit.isprintable():
        raise ValueError("time or kit are none")
    if len(data["tries"]) > tries.MOST_TRIES or len(data["receipts"]) > _MOST_RECEIPTS:
        raise ValueError("there is too much of it")
    own = tuple(map(tries.from_json, data["tries"]))
    rows = tuple(from_line(json.dumps(row).encode()) for row in data["receipts"])
    if not isinstance(data["machine"], dict) or len(json.dumps(data["machine"])) > 1000:
        raise ValueError("the machine is none")
    return HandIn(checked_name(data["student"]), when, kit, data["machine"], own, rows, path)


def _check_claims(found: HandIn) -> None:
    """Judge every answer again, with the numbers of this student, and look at the order of the times."""
    for tried in found.tries:
        if not _is_of(tried, found.student):
            raise _broken(found.path, f"has answers to the exercises of {tried.student!r}", "Ask whose file it is.")
        if tried.is_right and not judged(find_problem(tried.exercise, tried.student), tried.answer).is_right:
            raise _broken(found.path, f"says that {tried.exercise} is right, which it is not", "Ask the student.")
    if any(moment.when > found.when for moment in (*found.tries, *found.receipts)):
        raise _broken(found.path, "has answers or receipts from after it was written", "Ask the student about it.")


def _broken(path: Path, what: str, next_step: str) -> BrokenFileError:
    return BrokenFileError(f"{path.name} {what}.", "A hand-in is a file of gqk.hand_in, as it was written.", next_step)
