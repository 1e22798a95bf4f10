"""The recordings that come with the kit: what bench/record.py makes, in agreement with themselves, and they load."""

import math
import re
import runpy
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest

from gemma_qat_kit.chat.comparison import Comparison
from gemma_qat_kit.errors import UnknownNameError
from gemma_qat_kit.widgets import CompareChat, TrainingReplay
from gemma_qat_kit.widgets.shipped import FOLDER, find_recording

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "bench" / "record.py"), run_name="record")


@pytest.fixture(scope="module")
def run():
    return TrainingReplay().recording


@pytest.fixture(scope="module")
def comparison():
    return CompareChat(recording="smollm2-135m").comparison


def test_the_training_is_the_full_run_of_the_third_notebook(run, script):
    settings = script["SETTINGS"]
    assert (run.name, run.format, run.num_steps) == ("smollm2-135m float32", "q4_0", settings.num_steps)
    assert [step.step for step in run.steps] == [*range(1, settings.num_steps + 1)]
    marks = [step for step in range(1, settings.num_steps + 1) if settings.evaluates_after(step)]
    assert [each.step for each in run.evaluations] == [0, *marks]
    assert [place.step for place in run.places] == [*range(settings.num_steps + 1)]


def test_its_figures_follow_from_its_own_numbers(run):
    best = min(run.evaluations, key=lambda each: each.kl_divergence)
    plain, before = math.exp(run.lines.plain.nats), math.exp(run.lines.float_nats)
    share = math.log(plain / math.exp(best.nats)) / math.log(plain / before)
    assert run.share_recovered() == pytest.approx(share)
    assert f"<b>{share:.0%}</b>" in TrainingReplay()._figures.value
    assert sum(step.seconds for step in run.steps) <= run.seconds
    assert run.lines.float_nats < best.nats < run.lines.plain.nats


def test_its_codes_are_the_nearest_ones_on_the_grid_of_q4_0(run):
    assert (run.group.low, run.group.high, run.group.is_half) == (-8, 7, True)
    for place in run.places:
        for height, code in zip(place.heights, place.codes, strict=True):
            assert abs(min(max(height, -8), 7) - code) <= 0.5 + 1e-5, "but for what nine digits leave open"
    assert run.places[-1].num_changed(run.places[0]) > 0


def test_the_comparison_is_the_one_that_the_script_asks_for(comparison, script):
    assert comparison.prompt == script["QUESTION"]
    assert comparison.settings == {"max_new_tokens": script["MAX_NEW_TOKENS"], "temperature": 0.0, "seed": 0}
    assert [(pane.name, pane.format) for pane in comparison.panes] == [
        ("float32", "float32"), ("Q4_0 trained through the grid", "q4_0"), ("naive Q4_0", "q4_0"),
        ("as it ships (Q4_1)", "q4_1")]  # fmt: skip
    for pane in comparison.panes:
        assert pane.ended in ("stop", "length")
        assert 0 < len(pane.pieces) <= script["MAX_NEW_TOKENS"] + 1
        assert list(pane.times) == sorted(pane.times)
        assert pane.memory_bytes > 2**26


def test_both_say_where_they_were_made(run, comparison):
    assert run.made.split(",")[0] == comparison.made.split(",")[0]
    assert comparison.made in CompareChat(recording="smollm2-135m")._status.value


def test_they_are_small_and_part_of_the_package():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.keys() == {"training.json", "comparison.json"}
    assert max(sizes.values()) < 150_000
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for name in sizes:
        assert any(fnmatch(f"recordings/{name}", pattern) for pattern in patterns["gemma_qat_kit"])


def test_a_name_opens_one_that_came_with_the_kit_and_a_path_any_file(tmp_path, comparison):
    assert find_recording("smollm2-135m", "training.json") == FOLDER / "training.json"
    assert find_recording("./smollm2-135m", "training.json") == Path("smollm2-135m")
    assert find_recording(Path("smollm2-135m"), "training.json") == Path("smollm2-135m")
    path = comparison.save(tmp_path / "mine.json")
    assert CompareChat(recording=str(path)).comparison == Comparison.load(FOLDER / "comparison.json")
    with pytest.raises(UnknownNameError, match=r"Unknown recording 'E2B'. Known: smollm2-135m"):
        CompareChat(recording="E2B")


@pytest.mark.parametrize(("notebook", "cell", "steps"), [("00_start_here", "ahead-static", (0, 60)),
                                                         ("03_qat", "full-run-static", (0, 30, 60))])  # fmt: skip
def test_the_notebooks_say_its_figures(run, notebook, cell, steps):
    cells = {cell.id: cell.source for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells}
    said = re.findall(r"(\d+) %", cells[cell])
    assert [f"{float(share) / 100:.0%}" for share in said] == [f"{run.share_recovered(step):.0%}" for step in steps]
    assert run.best().step == 60
