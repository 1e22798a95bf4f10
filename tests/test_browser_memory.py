"""The memory widgets in a real browser: context dragged, a chart that moves, a button that loads with less."""

import os
import statistics
from pathlib import Path

import pytest
from lab import CHROMIUM, ROOT, STDERR, notebook_page, photograph, run_cells, run_code

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]
SETUP = "import gemma_qat_kit as gqk; from gemma_qat_kit import widgets; import time"
NUM_STEPS = int(os.environ.get("GQK_DRAGS", 6))  # more of them for a figure that says something, shown by pytest -s
# Milliseconds from a key or pointer event on the slider to the frame that shows another picture.
WATCH_FIGURE = """figure => {
  window.gqkDelay = null;
  let moved = null;
  const note = event => { moved ??= event.timeStamp; };
  for (const kind of ["pointermove", "mousemove", "keydown"])
    addEventListener(kind, note, { capture: true, once: true });
  new MutationObserver((_, observer) => {
    observer.disconnect();
    requestAnimationFrame(() => { window.gqkDelay = performance.now() - moved; });
  }).observe(figure, { childList: true, characterData: true, subtree: true });
}"""
COUNT_CHARTS = """() => {
  window.gqkCharts = 0;
  const count = changes => changes.some(change => change.target.closest?.(".gqk-memory-chart"));
  new MutationObserver(changes => { window.gqkCharts += count(changes); })
    .observe(document.body, { childList: true, subtree: true });
}"""
CHART = """
with widgets.MemoryChart() as chart:
    time.sleep(0.5)
    block = b"x" * 300_000_000
    chart.mark("300 MB")
    time.sleep(1.5)
    del block
    time.sleep(1)
print("measuring:", chart.use.is_running)
"""
# A model that is loaded, and measures 5 % more than was planned.
MEASURED = """
from dataclasses import replace
from types import SimpleNamespace
from gemma_qat_kit.memory.measure import MemoryUse
plan = gqk.plan_memory("E2B", "bf16", device="cpu")
use = MemoryUse(tuple(replace(part, nbytes=round(part.nbytes * 1.05)) for part in plan.placed))
facts = {"size": "E2B", "format": "bf16", "engine": "transformers", "context_length": 4096, "name": "E2B bf16"}
model = SimpleNamespace(**facts, runner=None, memory=lambda: use)
panel.model = model
"""
# Memory does not really run out, and what is offered is small enough to be loaded here.
FAILS = """
from gemma_qat_kit import out_of_memory
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
def shorter(plan):
    return [("a context of 512 tokens", plan_for(replace(plan.settings, context_length=512)))]
MemoryPlan.cheaper = shorter
def chat():
    with out_of_memory.help(gqk.plan_memory("smollm2-135m").settings):
        raise MemoryError
chat()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook, run to its end, and a panel below it for these tests."""
    folder = tmp_path_factory.mktemp("lab")
    os.environ["GQK_RECEIPTS"] = str(folder / "receipts.jsonl")
    try:
        with notebook_page(folder, "notebooks/02_memory.ipynb") as page:
            run_cells(page)
            run_code(page, SETUP)
            run_code(page, "panel = widgets.MemoryPanel('E2B', 'bf16'); panel")
            page.wait_for_function("document.querySelectorAll('.gqk-memory').length === 3")
            yield page
    finally:
        os.environ["GQK_RECEIPTS"] = "off"


@pytest.fixture
def panel(page):
    panel = page.locator(".gqk-memory").last
    panel.scroll_into_view_if_needed()
    return panel


def test_the_notebook_runs_to_its_end(page):
    assert page.locator(STDERR).all_text_contents() == []
    notebook = page.locator(".jp-Notebook")
    notebook.locator(".gqk-memory-chart svg :text('loaded')").wait_for()
    notebook.locator(".gqk-memory-compared :text('smollm2-135m q4_1, loaded here')").wait_for()
    assert notebook.locator(".js-plotly-plot .scatterlayer .trace").count() == 5
    assert notebook.locator("tr:has-text('Mobile, text only')").count() == 1
    assert notebook.locator(".jp-OutputArea-output .gqk-check").count() == 3


def test_the_picture_of_the_readme_can_be_drawn_again(page, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    page.locator("h2:has-text('Does it fit')").click()  # so that neither a control nor the cell is the selected one
    panel = page.locator(".gqk-memory").first
    panel.scroll_into_view_if_needed()
    panel.locator(".gqk-memory-size select").select_option("12B")
    panel.locator(".gqk-memory-status :text('12B q4_0')").wait_for()
    panel.locator(".gqk-memory-size select").blur()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    panel.screenshot(path=folder / "memory_panel.png")
    assert (folder / "memory_panel.png").stat().st_size < 150_000


def _handle(panel, name):
    return panel.locator(f".gqk-memory-{name} .noUi-handle, .gqk-memory-{name} .ui-slider-handle").first


def _picture(panel):
    return panel.locator("svg").first.inner_html()


def _step(page, panel, act):
    """Do something to a slider and return the milliseconds until the picture was another one."""
    before = _picture(panel)
    panel.locator(".gqk-memory-figure").first.evaluate(WATCH_FIGURE)
    act()
    page.wait_for_function("window.gqkDelay !== null")
    assert _picture(panel) != before
    return page.evaluate("window.gqkDelay")


def test_the_picture_follows_the_slider(page, panel):
    handle = _handle(panel, "context")
    handle.hover()  # once it stands still and gets what the mouse does
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.down()
    delays = []
    for number in range(NUM_STEPS):
        target = x + (60 if number % 2 == 0 else 110)
        delays.append(_step(page, panel, lambda target=target: page.mouse.move(target, y)))
    page.mouse.up()
    print(f"{len(delays)} moves: median {statistics.median(delays):.0f} ms, longest {max(delays):.0f} ms")
    shown = panel.locator(".gqk-memory-context .widget-readout").inner_text()
    run_code(page, "print(f'{panel.plan.settings.context_length:,} tokens')")
    page.wait_for_selector(f".jp-OutputArea-output:has-text('{shown} tokens')")


def test_what_cannot_be_is_said_where_the_eye_is_and_goes_again(page, panel):
    choice = panel.locator(".gqk-memory-kv-format select")
    choice.select_option("q8_0")
    problem = panel.locator(".gqk-memory-status .gqk-error")
    problem.wait_for()
    assert problem.locator("p").count() == 3
    assert panel.locator("svg").count() == 1
    choice.select_option("bf16")
    problem.wait_for(state="detached")


def test_other_sizes_and_formats_are_a_choice_away(page, panel):
    for size, words in (("31B", "more GPU memory"), ("E4B", "fits")):
        panel.locator(".gqk-memory-size select").select_option(size)
        panel.locator(f"svg[aria-label*='{words}']").wait_for()
        panel.locator(f".gqk-memory-status :text('{size} bf16')").wait_for()


def test_a_loaded_model_stands_beside_its_plan(page, panel):
    run_code(page, MEASURED)
    panel.locator(".gqk-memory-compared svg").wait_for()
    assert panel.locator(".gqk-memory-compared th", has_text="Measured").count() == 1


def test_a_chart_moves_while_its_cell_runs(page):
    page.evaluate(COUNT_CHARTS)
    run_code(page, CHART)
    chart = page.locator(".gqk-memory-chart").last
    chart.locator("svg :text('300 MB')").wait_for()
    assert page.evaluate("window.gqkCharts") > 2, "four pictures a second for three seconds, fewer where it is busy"
    page.wait_for_selector(".jp-OutputArea-output:has-text('measuring: False')")


def test_out_of_memory_offers_a_button_that_loads_with_less(page):
    run_code(page, FAILS)
    panel = page.locator(".gqk-oom").last
    assert panel.locator(".gqk-error p").count() == 3
    panel.locator("button", has_text="a context of 512 tokens").click()
    panel.locator(".gqk-oom-status :text('Loaded as `model`')").wait_for()
    run_code(page, "print('context', model.context_length)")
    page.wait_for_selector(".jp-OutputArea-output:has-text('context 512')")


def test_the_widgets_read_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("memory", "memory-chart", "oom"), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
