"""The house rules that no module can check for itself: floors, sizes, papers that agree, and the two commands."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

from gemma_qat_kit.quality.post_training import collect_importance

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_qat_kit"
FLOORS = (
    "errors units progress published catalog architectures layouts parameters machine "
    "attachments tools messages generation",
    "formats gguf",
    "memory quality verdicts environment",
    "hub download checkpoint drafter engines recording model speed load serve out_of_memory loading_note",
    "qat weights",
    "finetune",
    "grid_report export testing tiny_chat chat",
    "classroom",
    "widgets",
    "__main__",
)


def _modules():
    return sorted(PACKAGE.rglob("*.py"))


def _floor(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    floors = [number for number, names in enumerate(FLOORS) if name in names.split()]
    assert floors, f"gemma_qat_kit/{name} has no floor: give it one in FLOORS, above everything it imports"
    return floors[0]


def _imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("gemma_qat_kit."))


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_import_only_goes_down_or_stays_on_its_floor(path):
    if path == PACKAGE / "__init__.py":
        return  # the front door: it names modules of every floor and imports them on first use
    for name in _imported_modules(path):
        target = PACKAGE / name
        if target.is_dir() or target.with_suffix(".py").exists():
            assert _floor(target) <= _floor(path), f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", [*_modules(), *sorted(ROOT.glob("tests/*.py"))], ids=lambda path: path.name)
def test_a_file_stays_under_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_importing_the_package_loads_no_framework_and_no_widgets():
    code = "import sys, gemma_qat_kit; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "ipywidgets", "plotly"} & set(loaded.split())


def test_facts_and_widgets_load_no_torch():
    code = "import sys, gemma_qat_kit as gqk; gqk.catalog(), gqk.environment(), gqk.widgets.Picker('E2B');"
    code += "print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


def test_every_pin_lies_within_what_the_package_allows():
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = packaging.Requirement(line)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), line


@pytest.mark.parametrize("name", ["binder/postBuild", ".ci/run"])
def test_scripts_are_executable_and_stop_at_the_first_error(name):
    assert os.access(ROOT / name, os.X_OK)
    assert "set -e" in (ROOT / name).read_text()


def test_ci_runs_make_test():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_opens_with_the_two_commands_then_a_picture():
    text = (ROOT / "README.md").read_text()
    places = [text.index(part) for part in ("make lab", "make test", "docs/start_here.png", "├")]
    assert places == sorted(places)
    assert places[0] < 600


def test_readme_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if not t.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_tree_names_every_module():
    tree = (ROOT / "README.md").read_text()
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _modules()} - {"__init__"}
    assert [name for name in sorted(names) if name not in tree] == []


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
def test_readme_code_runs(block, monkeypatch):
    monkeypatch.setitem(collect_importance.__kwdefaults__, "max_tokens", 1024)  # of 4,096: half a minute
    exec(compile(block, "README.md", "exec"), {})


def test_the_index_of_errors_is_what_the_code_says():
    index = runpy.run_path(str(ROOT / "scripts" / "error_index.py"))["render"]()
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == index, "run: python scripts/error_index.py"
    assert index.count("\n| ") > 200


def test_addresses_name_one_repository():
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    repository = source.removeprefix("https://github.com/")
    for path in [ROOT / "README.md", *ROOT.glob("notebooks/*.ipynb")]:
        found = re.findall(r"(?:github\.com|github/|/gh)/?([\w-]+/gemma-qat-kit)", path.read_text())
        assert set(found) <= {repository}, path.name
