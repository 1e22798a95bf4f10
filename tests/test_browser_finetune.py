"""FinetunePanel in a real browser on a tiny Gemma: started, paused, resumed, stopped, exported, and looked at."""

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
PREPARE = """
import gemma_qat_kit as gqk
from gemma_qat_kit import widgets
from gemma_qat_kit.finetune.orders import orders
model = gqk.load("{path}", "q4_0", engine="transformers", device="cpu", report=lambda progress: None)
"""
PANEL = """
settings = gqk.FinetuneSettings(2000, 2, gradient_accumulation=1, rank=4, num_evaluations=20, patience=20)
panel = widgets.FinetunePanel(model, orders(40), settings=settings, samples=["Two teas to go for Ana."],
                              export_to="{folder}")
panel
"""

REAL = """
settings = gqk.FinetuneSettings(40, 4, gradient_accumulation=1, gradient_checkpointing=False, num_evaluations=5)
widgets.FinetunePanel("smollm2-135m", orders(160), settings=settings,
                      samples=[row[0]["content"] for row in orders(2, held_out=True)])
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny):
    with notebook_page(tmp_path_factory.mktemp("lab"), "notebooks/01_quantize.ipynb") as page:
        run_cells(page, "all-above", "import importlib.util")
        run_code(page, PREPARE.format(path=tiny("E2B", "q4_0")))
        run_code(page, PANEL.format(folder=tmp_path_factory.mktemp("home")))
        _wait_for_status(page.locator(".gqk-tune"), "Nothing is trained yet.")
        yield page


@pytest.fixture
def panel(page):
    panel = page.locator(".gqk-tune").last
    panel.scroll_into_view_if_needed()
    return panel


def _wait_for_status(panel, text):
    panel.locator(f".gqk-tune-status :text('{text}')").wait_for()


def test_start_pause_resume_stop_export(page, panel):
    assert panel.locator(".gqk-tune-data mark").count() == 2
    assert "not in the catalog" in panel.locator(".gqk-tune-memory").inner_text()
    panel.locator(".gqk-tune-start").click()
    panel.locator(".gqk-train-charts circle").nth(3).wait_for()
    panel.locator(".gqk-tune-pause").click()
    _wait_for_status(panel, "Paused after the step under way")
    wait_until_still(panel.locator(".gqk-tune-status"))
    panel.locator(".gqk-tune-pause").click()
    _wait_for_status(panel, "Training: step")
    panel.locator(".gqk-tune-stop").click()
    _wait_for_status(panel, "Stopped by you. The model is at its best point")
    assert "before" in panel.locator(".gqk-tune-said").inner_text()
    panel.locator(".gqk-tune-export").click()
    _wait_for_status(panel, "tuned-q4_0.gguf, with the adapter")
    assert re.search(r"best [\d.]+", panel.locator(".gqk-train-charts > svg").nth(1).text_content())


def test_the_picture_of_the_readme_can_be_drawn_again(page, panel, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    if os.environ.get("GQK_PICTURES"):  # minutes: the built-in model learns to write tickets
        run_code(page, REAL)
        panel = page.locator(".gqk-tune").last
        panel.locator(".gqk-tune-start").click()
        panel.locator(".gqk-tune-status :text('The model is at its best point')").wait_for(timeout=1_800_000)
    page.set_viewport_size({"width": 1120, "height": 1400})
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    panel.screenshot(path=folder / "finetune_panel.png")
    assert (folder / "finetune_panel.png").stat().st_size < 150_000


def test_the_panel_reads_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("tune",), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
