"""TrainingReplay and a recorded CompareChat in a real browser, where no model is loaded: played, moved, looked at."""

import re

import pytest
from lab import CHROMIUM, notebook_page, photograph, run_cells, run_code

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with notebook_page(tmp_path_factory.mktemp("lab"), "notebooks/00_start_here.ipynb") as page:
        run_cells(page, "all-above", "import os")
        run_code(page, "from gemma_qat_kit import widgets\nwidgets.TrainingReplay()")
        run_code(page, 'widgets.CompareChat(recording="smollm2-135m")')
        page.locator(".gqk-compare-status :text('A recording')").wait_for()
        yield page


@pytest.fixture
def panel(page):
    panel = page.locator(".gqk-replay").last
    panel.scroll_into_view_if_needed()
    return panel


def _points(panel):
    """How many steps the left chart shows."""
    return panel.locator(".gqk-train-charts > svg").first.locator("circle").count()


def _wait_for_step(panel, step):
    panel.locator(f".gqk-train-caption:has-text('after step {step}:')").wait_for()


def test_it_opens_with_what_came_of_the_run(page, panel):
    _wait_for_step(panel, 60)
    assert _points(panel) == 60
    assert "A recording: nothing is computed here." in panel.locator(".gqk-train-status").inner_text()
    assert re.search(r"\d\d%", panel.locator(".gqk-train-facts").inner_text())
    words = panel.locator(".gqk-train-charts > svg").nth(1).text_content()
    assert all(name in words for name in ("PTQ", "float", "best"))


def test_the_slider_moves_the_charts_and_the_walk_and_nothing_jumps(page, panel):
    height, handle = panel.bounding_box()["height"], panel.locator(".gqk-train-place [role=slider]")
    handle.press("Home")
    _wait_for_step(panel, 0)
    assert _points(panel) == 0
    assert "0 of 32 codes changed" in panel.locator(".gqk-train-caption").inner_text()
    handle.press("ArrowRight")
    _wait_for_step(panel, 1)
    assert _points(panel) == 1
    assert abs(panel.bounding_box()["height"] - height) < 4


def test_play_goes_from_the_first_step_to_the_last(page, panel):
    panel.locator(".gqk-train-play button").first.click()
    panel.locator(".gqk-train-caption:not(:has-text('after step 1:'))").wait_for()
    _wait_for_step(panel, 60)
    assert _points(panel) == 60


def test_the_comparison_shows_four_answers_and_replays_them(page):
    panel = page.locator(".gqk-compare").last
    panel.scroll_into_view_if_needed()
    assert panel.locator(".gqk-pane").count() == 4
    answers = panel.locator(".gqk-pane-answer").all_inner_texts()
    assert all(answers)
    panel.locator(".gqk-compare-replay").click()
    panel.locator(
        ".gqk-pane footer :text('Waiting for its turn'), footer:has-text('Waiting for its turn')"
    ).first.wait_for()
    panel.locator(".gqk-compare-stop").click()
    panel.locator(".gqk-compare-status :text('replayed')").wait_for()
    assert panel.locator(".gqk-pane-answer").all_inner_texts() == answers


def test_both_read_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("replay", "compare"), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
