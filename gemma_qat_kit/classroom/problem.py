"""What an exercise asks and how an answer is judged: numbers within a tolerance, with a hint for each usual mistake."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

PUT_IN = "Put your answer in place of None and run the cell again."


class Draw:
    """The numbers of an exercise: the usual ones, or a student's own, always the same for the same name.

    Args:
        number: Of the exercise.
        student: Who; None or "" takes the usual numbers.
    """

    def __init__(self, number: str, student: str | None):
        name = " ".join((student or "").casefold().split())
        self._random = random.Random(f"{number} {name}") if name else None

    def pick(self, usual, others):
        """Return the usual value, or for a student one of the others."""
        return usual if self._random is None else self._random.choice(list(others))


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and where it is not, what is known of the mistake."""

    is_right: bool
    remark: str = ""


@dataclass(frozen=True)
class Problem:
    """One exercise with its numbers in it.

    Attributes:
        question: In words, numbers included.
        hints: What helps, from a nudge to nearly everything; one more is shown after each wrong answer.
        judge: Takes an answer, of whatever type.
        wanted: What kind of answer: "number", "settings" or "run".
    """

    question: str
    hints: tuple[str, ...]
    judge: Callable[[object], Verdict]
    wanted: str = "number"


def number_problem(
    question: str, hints: tuple[str, ...], right: float, *, mistakes: Mapping[str, float], tolerance: float = 0.01
) -> Problem:
    """Return a problem whose answer is a number.

    Args:
        question: In words.
        hints: In steps.
        right: The answer, computed.
        mistakes: A remark for each answer that a usual mistake gives.
        tolerance: Share of the answer that it may be off by; 0 wants it exact.
    """

    def is_near(value: float, wanted: float) -> bool:
        return abs(value - wanted) <= tolerance * abs(wanted) + 1e-9 * abs(wanted)

    def judge(answer: object) -> Verdict:
        value = as_number(answer)
        if value is None:
            return Verdict(False, f"A number is wanted, and this is {article(answer)}.")
        if is_near(value, right):
            return Verdict(True)
        return Verdict(False, next((remark for remark, wrong in mistakes.items() if is_near(value, wrong)), ""))

    return Problem(question, hints, judge)


def as_number(answer: object) -> float | None:
    """Return an answer as a finite float, also that of numpy and torch; None where it is none."""
    if isinstance(answer, bool | str | bytes):
        return None
    try:
        value = float(answer) if isinstance(answer, Real) or hasattr(answer, "item") else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def article(answer: object) -> str:
    """Name the type of an answer that is of a wrong one."""
    if isinstance(answer, float):
        return "not a finite one"
    return f"of type {type(answer).__name__[:40]}"
