"""TrainingPanel in a real browser on a tiny Gemma: started, paused, resumed, stopped, replayed, and looked at."""

import os
import re
from pathlib import Path

import pytest
from lab import CHROMIUM, ROOT, notebook_page, photograph, run_cells, run_code, wait_until_still

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]
# Prepared without a text, which takes most of the time; a word a byte, so any text has enough of them.
PREPARE = """
import gemma_qat_kit as gqk
from gemma_qat_kit import widgets
model = gqk.load("{path}", device="cpu", report=lambda progress: None)
gqk.prepare_qat(model, "q4_0", calibration={{}}, report=lambda progress: None)
"""
PANEL = """
settings = gqk.TrainSettings(num_steps=5000, batch_size=1, sequence_length=32, num_evaluations=8, patience=9,
                             learning_rate=0.03)
panel = widgets.TrainingPanel(model, settings=settings)
panel
"""

REAL = "widgets.TrainingPanel(settings=gqk.TrainSettings(num_steps=40, sequence_length=64))"


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny):
    with notebook_page(tmp_path_factory.mktemp("lab"), "notebooks/01_quantize.ipynb") as page:
        run_cells(page, "all-above", "import importlib.util")
        run_code(page, PREPARE.format(path=tiny("12B", "bf16")))
        run_code(page, PANEL)
        _wait_for_status(page.locator(".gqk-train"), "Nothing is trained yet.")
        yield page


@pytest.fixture
def panel(page):
    panel = page.locator(".gqk-train").last
    panel.scroll_into_view_if_needed()
    return panel


def _wait_for_status(panel, text):
    panel.locator(f".gqk-train-status :text('{text}')").wait_for()


def _num_steps(panel):
    """How many steps the status line tells."""
    return int(re.search(r"(?:step |; )(\d+) (?:of|are)", panel.locator(".gqk-train-status").inner_text())[1])


def _wait_for_more_steps(panel):
    before = _num_steps(panel)
    panel.page.wait_for_function(
        "([status, before]) => Number(status.textContent.match(/step (\\d+) of/)?.[1]) > before + 2",
        arg=[panel.locator(".gqk-train-status").element_handle(), before],
    )


def test_start_shows_the_loss_between_both_lines_and_nothing_jumps(page, panel):
    height = panel.bounding_box()["height"]
    assert panel.locator(".mod-primary").count() == 1
    panel.locator(".gqk-train-start").click()
    _wait_for_status(panel, "Training for q4_0")
    panel.locator(".gqk-train-charts circle").nth(3).wait_for()
    words = panel.locator(".gqk-train-charts > svg").nth(1).text_content()
    assert "PTQ" in words
    assert "float" in words
    assert panel.locator(".gqk-train-start").is_disabled()
    assert abs(panel.bounding_box()["height"] - height) < 4


def test_pause_waits_and_resume_goes_on(page, panel):
    panel.locator(".gqk-train-pause").click()
    _wait_for_status(panel, "Paused after the step under way")
    wait_until_still(panel.locator(".gqk-train-status"))
    assert panel.locator(".gqk-train-pause").inner_text() == "Resume"
    panel.locator(".gqk-train-pause").click()
    _wait_for_status(panel, "Training for q4_0")
    _wait_for_more_steps(panel)


def test_running_the_cell_again_shows_the_run_that_goes_on(page, panel):
    run_code(page, "panel.close()\npanel = widgets.TrainingPanel(model, settings=settings)\npanel")
    again = page.locator(".gqk-train").last
    _wait_for_status(again, "Training for q4_0")
    _wait_for_more_steps(again)


def test_stop_keeps_the_best_point(page, panel):
    panel.locator(".gqk-train-stop").click()
    _wait_for_status(panel, "Stopped by you. The model is at its best point")
    assert panel.locator(".gqk-train-start").inner_text() == "Train on"
    assert re.search(r"\d+ of 32 codes changed", panel.locator(".gqk-train-replay").inner_text())


def test_play_walks_the_weights_from_the_first_step_to_the_last(page, panel):
    caption = panel.locator(".gqk-train-caption")
    last = int(re.search(r"after step (\d+)", caption.inner_text())[1])
    panel.locator(".gqk-train-play button").first.click()
    page.wait_for_function(
        "([node, last]) => Number(node.textContent.match(/after step (\\d+)/)[1]) < last",
        arg=[panel.locator(".gqk-train-replay").element_handle(), last],
    )
    panel.locator(f".gqk-train-caption:has-text('after step {last}:')").wait_for()


def test_training_on_goes_to_its_end(page, panel):
    panel.locator(".gqk-train-steps input").fill("40")
    panel.locator(".gqk-train-steps input").press("Enter")
    panel.locator(".gqk-train-start").click()
    _wait_for_status(panel, "Ran to its end.")
    assert panel.locator(".gqk-train-charts > svg").first.locator("circle").count() == 40
    assert re.search(r"\d+(\.\d+)? [GM]iB", panel.locator(".gqk-train-facts").inner_text())


def test_a_model_that_is_prepared_otherwise_says_so_where_the_eye_is(page, panel):
    panel.locator(".gqk-train-format select").select_option("int2_g32")
    panel.locator(".gqk-train-start").click()
    problem = panel.locator(".gqk-train-status .gqk-error")
    problem.wait_for()
    assert problem.locator("p").count() == 3
    assert "prepared for q4_0 already" in problem.inner_text()
    panel.locator(".gqk-train-format select").select_option("q4_0")
    _wait_for_status(panel, "Ran to its end.")


def test_the_picture_of_the_readme_can_be_drawn_again(page, panel, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    if os.environ.get("GQK_PICTURES"):  # minutes: the built-in model, from its floats to its best point
        run_code(page, REAL)
        panel = page.locator(".gqk-train").last
        panel.locator(".gqk-train-start").click()
        panel.locator(".gqk-train-status :text('The model is at its best point')").wait_for(timeout=1_800_000)
    page.set_viewport_size({"width": 1120, "height": 1400})
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    panel.screenshot(path=folder / "training_panel.png")
    assert (folder / "training_panel.png").stat().st_size < 150_000


def test_the_panel_reads_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("train",), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
