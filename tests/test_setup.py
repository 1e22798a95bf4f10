"""The script behind `make lab` and `make test`: what it chooses, what it refuses, and that it does nothing twice."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "scripts" / "setup.py"))


@pytest.mark.parametrize(
    ("system", "machine", "has_gpu", "is_reachable", "arguments"),
    [
        ("Linux", "x86_64", True, True, []),
        ("Linux", "x86_64", False, True, ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        ("Windows", "AMD64", False, True, ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        ("Linux", "x86_64", False, False, []),
        ("Darwin", "arm64", False, True, []),
    ],
)
def test_setup_takes_the_cpu_build_of_torch_only_where_there_is_no_gpu(
    system, machine, has_gpu, is_reachable, arguments
):
    chosen, reason = SETUP["torch_build"](system, machine, has_gpu, lambda host: is_reachable)
    assert chosen == arguments
    assert reason


def test_setup_refuses_an_unknown_purpose(capsys):
    assert SETUP["main"](["lunch"]) == 2
    assert "setup.py lab|test" in capsys.readouterr().out


def test_a_failed_step_names_its_command_and_what_to_do(monkeypatch, capsys):
    def fail(purpose):
        raise subprocess.CalledProcessError(1, ["pip", "install", "torch"])

    monkeypatch.setitem(SETUP["main"].__globals__, "set_up", fail)
    assert SETUP["main"](["lab"]) == 1
    said = capsys.readouterr().out
    assert "pip install torch" in said
    assert "Run the same make command again" in said


def test_without_a_browser_and_without_root_it_says_what_to_install(monkeypatch, capsys):
    for name, answer in (("find_chromium", lambda: None), ("apt_install", lambda package, reason: False)):
        monkeypatch.setitem(SETUP["install_chromium"].__globals__, name, answer)
    SETUP["install_chromium"]()
    assert "Install the package `chromium`" in capsys.readouterr().out


def test_no_nvidia_smi_or_a_failing_one_means_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not SETUP["has_nvidia_gpu"]()
    command = tmp_path / "nvidia-smi"
    for answer, has_gpu in (("exit 9", False), ("echo No devices found", False), ("echo 'GPU 0: Tesla T4'", True)):
        command.write_text(f"#!/bin/sh\n{answer}\n")
        command.chmod(0o755)
        assert SETUP["has_nvidia_gpu"]() is has_gpu


def test_setup_does_nothing_the_second_time(tmp_path):
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    own = runpy.run_path(str(tmp_path / "scripts" / "setup.py"))
    own["stamp_file"]("lab").parent.mkdir()
    own["stamp_file"]("lab").write_text(own["stamp"]())
    command = [sys.executable, "scripts/setup.py", "lab"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "ready" in result.stdout
    assert "Installing" not in result.stdout


def test_make_says_what_to_do_without_a_python():
    result = subprocess.run(["make", "lab", "PYTHON="], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "PYTHON=" in result.stdout
