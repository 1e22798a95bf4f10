"""`check`: is this answer right? If not yet, a hint, and a further one after each answer."""

import html
import re
from dataclasses import dataclass

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.classroom import tries
from gemma_qat_kit.classroom.exercises import find_problem
from gemma_qat_kit.classroom.problem import PUT_IN, Problem, Verdict
from gemma_qat_kit.classroom.tries import Try
from gemma_qat_kit.errors import BadSettingError

_MOST_NAME = 80
# A sign and words for each state; the colour of the bar on the left is only a third one.
_STATES = {"right": ("✓", "right", "#009E73"), "wrong": ("✗", "not yet", "#D55E00"), "open": ("○", "open", "#888888")}


@dataclass(frozen=True, repr=False)
class Feedback:
    """What a check says; draws itself.

    Attributes:
        exercise: Its number.
        student: Whose numbers it has; "" for the usual ones.
        question: The exercise in words.
        state: "right", "wrong", or "open" without an answer.
        remark: What is known of the mistake.
        hints: As many as there were different wrong answers.
        num_tries: Different answers so far, this one included.
    """

    exercise: str
    student: str
    question: str
    state: str
    remark: str
    hints: tuple[str, ...]
    num_tries: int

    @property
    def is_right(self) -> bool:
        """Whether the answer is right."""
        return self.state == "right"

    def _headline(self) -> str:
        sign, word, _ = _STATES[self.state]
        tried = f", {self.num_tries} tries" if self.num_tries > 1 else ", at the first try" if self.is_right else ""
        whose = f", numbers of {self.student}" if self.student else ""
        return f"{sign} {self.exercise} {word}{tried}{whose}"

    def _lines(self) -> list[str]:
        steps = [f"Hint {number}: {hint}" for number, hint in enumerate(self.hints, 1)]
        return [*filter(None, [self.remark]), *steps]

    def __str__(self) -> str:
        return "\n".join([self._headline(), self.question, *self._lines()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{_marked(line)}</div>" for line in self._lines())
        return (
            f'{PANEL_STYLE}<div class="gqk-panel gqk-check" role="status" aria-live="polite" style="border-left:4px '
            "solid "
            f'{_STATES[self.state][2]};padding-left:10px"><strong>{html.escape(self._headline())}</strong>'
            f"<div>{_marked(self.question)}</div>{lines}</div>"
        )


def check(number: str, answer: object = None, *, student: str = "") -> Feedback:
    """Check the answer to an exercise of the notebooks.

    Answers are kept in a small file on this machine, for hints in steps and for `hand_in`, and are sent nowhere.

    Args:
        number: Notebook and exercise, as in "02.3".
        answer: A number, settings, or a run, as the exercise says. None shows the exercise.
        student: A name, for numbers of one's own: always the same for a name, and others for other names.

    Returns:
        Whether it is right, and otherwise hints: one more after each different answer.

    Raises:
        UnknownNameError: There is no such exercise.
        BadSettingError: A name that cannot be one.
    """
    student = "" if student in ("", None) else checked_name(student)
    problem = find_problem(number, student)
    if answer is None:
        return Feedback(number, student, problem.question, "open", PUT_IN, (), 0)
    verdict, kept = judged(problem, answer), tries.kept(answer)
    earlier = [t for t in tries.recall() if (t.exercise, t.student) == (number, student)]
    if not earlier or earlier[-1].answer != kept or kept is None:  # running a cell again is no new try
        tried = Try(tries.now(), number, student, kept, verdict.is_right)
        tries.remember(tried)
        earlier.append(tried)
    num_wrong = sum(not t.is_right for t in earlier)
    hints = () if verdict.is_right else problem.hints[:num_wrong]
    state, remark = ("right", "") if verdict.is_right else ("wrong", verdict.remark)
    return Feedback(number, student, problem.question, state, remark, hints, len(earlier))


def _marked(text: str) -> str:
    """Return text as HTML, with code where it has backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def judged(problem: Problem, answer: object) -> Verdict:
    """Judge an answer, whatever it is: one that breaks the comparison is wrong."""
    try:
        return problem.judge(answer)
    except (ArithmeticError, TypeError, ValueError, AttributeError) as err:
        return Verdict(False, f"This cannot be compared with the answer: {str(err)[:200]}")


def checked_name(name: object) -> str:
    """Return a student's name without spaces around it.

    Raises:
        BadSettingError: It is empty, too long, or has signs that cannot be printed.
    """
    if isinstance(name, str) and name.strip() and len(name) <= _MOST_NAME and name.isprintable():
        return " ".join(name.split())
    raise BadSettingError(
        f"{name!r:.60} is no name.",
        f"A name has up to {_MOST_NAME} printable characters.",
        'Write it as in student="Ada".',
    )
