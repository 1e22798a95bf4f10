"""`python -m gemma_qat_kit`: the machine, then commands that can be copied as they are."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_qat_kit import __main__ as program
from gemma_qat_kit.environment import environment

ROOT = Path(__file__).parent.parent


def test_it_prints_the_machine_and_what_to_do_next():
    command = [sys.executable, "-m", "gemma_qat_kit"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.startswith("gemma_qat_kit 0.1.0\n")
    assert "q4_1              works: smollm2-135m" in said
    assert str(environment()).splitlines()[1] in said
    assert "\n  make lab\n" in said


def test_without_the_notebooks_it_names_where_they_are():
    commands = [command for command, _ in program.next_steps(has_course=False)]
    assert program.COURSE_ONLINE in commands
    assert "make lab" not in commands


@pytest.mark.parametrize("command", [command for command, _ in program.next_steps(has_course=True)])
def test_every_next_step_can_be_copied(command):
    if command.startswith("gqk."):
        ast.parse(command)
    else:
        program_name, *arguments = shlex.split(command)
        assert program_name in ("make", sys.executable)
        assert arguments == ["lab"] or ast.parse(arguments[1])


def test_the_first_command_answers(capsys):
    command, _ = program.next_steps(has_course=True)[0]
    exec(shlex.split(command)[2].replace("=60", "=8"), {})
    assert len(capsys.readouterr().out.split()) > 3


def test_arguments_are_refused(capsys):
    assert program.main(["--help", "me"]) == 2
    assert "Unknown: --help me. There are no arguments." in capsys.readouterr().err


def test_it_loads_no_torch():
    code = "import sys, runpy; runpy.run_module('gemma_qat_kit.__main__', run_name='x'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
