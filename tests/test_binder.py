"""What Binder reads, and what its first page loads. A build needs Binder; the lines and the links are checked here."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PEOPLE, BINDER = (yaml.safe_load((ROOT / name).read_text()) for name in ("environment.yml", "binder/environment.yml"))
CONDA_NAMES = {"torch": "pytorch-cpu"}
# Run a notebook's code cells as far as one, showing what a notebook shows, and say what has been imported.
RUN_CELLS = """
import ast, json, sys
names, cells = {}, json.load(open(sys.argv[1]))["cells"]
for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
    tree = ast.parse(source.replace("%pip", "pass  # ").replace("seed=SEED", "seed=SEED, max_new_tokens=4"))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    getattr(shown, "_repr_html_", str)()
    if sys.argv[2] in source:
        break
print("\\nimported:", *{name.partition(".")[0] for name in sys.modules})
"""


def test_both_environments_are_in_step():
    assert PEOPLE["dependencies"] == [line for line in BINDER["dependencies"] if "nbgitpuller" not in line]
    assert PEOPLE["channels"] == BINDER["channels"] == ["conda-forge"]


def test_they_bring_what_the_package_requires():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = PEOPLE["dependencies"]
    listed = {_name(line) for line in [*lines[:-1], *lines[-1]["pip"]]}
    assert {CONDA_NAMES.get(_name(line), _name(line)) for line in requires} <= listed
    assert "python=3.12" in lines


def _name(requirement):
    return re.split(r"[<>=;\s]", requirement)[0]


@pytest.mark.parametrize("line", [line for line in BINDER["dependencies"] if isinstance(line, str)])
def test_conda_reads_every_line(line):
    rattler = pytest.importorskip("rattler")  # conda's own grammar; `make test` installs it
    spec = rattler.MatchSpec(line, strict=True)
    assert spec.name.normalized == _name(line)
    assert (spec.version is None) == (line == "pip")


def test_pip_reads_every_line_of_its_part():
    requirements = pytest.importorskip("packaging.requirements")
    for line in BINDER["dependencies"][-1]["pip"]:
        assert str(requirements.Requirement(line).specifier).startswith(">=")


def test_python_is_pinned_in_the_way_that_repo2docker_understands():
    lines = [line for line in BINDER["dependencies"] if str(line).startswith("python")]
    assert re.fullmatch(r"python=3\.\d+", lines[0]), "any other form silently gives repo2docker's default"


def test_no_other_file_would_take_over():
    """repo2docker reads the first of its folders that there is, and in it a Dockerfile before anything else."""
    assert sorted(path.name for path in (ROOT / "binder").iterdir()) == ["environment.yml", "postBuild"]
    assert not (ROOT / ".binder").exists()


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.ipynb"))], ids=lambda p: p.name)
def test_links_open_jupyterlab_on_a_notebook_that_exists(path):
    links = re.findall(r"https://mybinder\.org/v2/gh/[^\s)\"\\]+", path.read_text())
    assert links
    for link in links:
        opened = parse_qs(urlsplit(link).query)["urlpath"][0]
        if opened.startswith("git-pull"):  # the image of a release, notebooks as they are now
            assert urlsplit(link).path.endswith(f"/v{_version()}")
            asked = parse_qs(urlsplit(opened).query)
            assert asked["repo"][0].endswith("/gemma-qat-kit")
            opened = unquote(asked["urlpath"][0]).replace("lab/tree/gemma-qat-kit/", "lab/tree/")
        folder, _, name = opened.removeprefix("lab/tree/").rpartition("/")
        assert (ROOT / folder / name).is_file()
        assert path.suffix == ".md" or name == path.name


def _version():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(("notebook", "until"), [("00_start_here", "CompareChat"), ("02_memory", "MemoryPanel")])
def test_the_first_page_its_recordings_and_the_planner_load_no_torch(notebook, until):
    """Torch takes 200 MB of the 450 that Binder guarantees (bench/binder_memory.py)."""
    command = [sys.executable, "-c", RUN_CELLS, str(ROOT / "notebooks" / f"{notebook}.ipynb"), until]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    imported = set(answer.rpartition("imported:")[2].split())
    assert not {"torch", "transformers"} & imported
    assert {"gemma_qat_kit", "ipywidgets"} <= imported
