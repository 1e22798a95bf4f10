"""`python -m gemma_qat_kit`: what this machine can run, and what to do next."""

import shlex
import sys
from pathlib import Path

from gemma_qat_kit import __version__
from gemma_qat_kit.environment import environment

COURSE = Path(__file__).resolve().parent.parent / "notebooks"
FIRST_WORDS = (
    "import gemma_qat_kit as gqk; print(gqk.load('smollm2-135m').chat('Why is the sky blue?', max_new_tokens=60))"
)
COURSE_ONLINE = "https://github.com/gemma-qat-kit/gemma-qat-kit/tree/main/notebooks"


def main(arguments: list[str]) -> int:
    """Print the banner and the next steps; return the exit status."""
    if arguments:
        print(
            f"Unknown: {shlex.join(arguments)}. There are no arguments. Run: python -m gemma_qat_kit", file=sys.stderr
        )
        return 2
    print(f"gemma_qat_kit {__version__}\n\n{environment()}\n\nNext:")
    for command, reason in next_steps(has_course=COURSE.is_dir()):
        print(f"  {command}\n      {reason}")
    return 0


def next_steps(*, has_course: bool) -> list[tuple[str, str]]:
    """Return what to run or read next and what it gives, the nearest first.

    Args:
        has_course: Whether the notebooks lie beside the package, as in a clone.
    """
    course = (
        ("make lab", "the course in JupyterLab, from its first notebook")
        if has_course
        else (COURSE_ONLINE, "the course")
    )
    return [
        (f'{sys.executable} -c "{FIRST_WORDS}"', "the built-in model answers, without a download"),
        course,
        ("gqk.plan_memory('E2B', 'q4_0')", "in Python: what a real Gemma 4 takes here, before its download"),
        ("gqk.load('E2B', 'q4_0').chat('Why is the sky blue?')", "in Python: download it, 3.12 GiB, and ask it"),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
