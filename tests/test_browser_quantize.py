"""The notebook on formats in a real browser, on the real model: weights dragged, formats measured, all looked at."""

import os
import re
import statistics
from pathlib import Path

import pytest
from built_in_network import FEWER_TOKENS
from lab import CHROMIUM, ROOT, STDERR, notebook_page, photograph, run_cells, run_code

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]
MEASURING = "table = panel.run()"
BROKEN = (
    "import torch; weight = torch.ones(2, 64); weight[1, 40] = float('nan'); widgets.BitExplorer({'<b>w</b>': weight})"
)
NUM_DRAGS = int(os.environ.get("GQK_DRAGS", 3))  # more of them for a figure that says something, shown by pytest -s
# Milliseconds from the movement of the mouse to the frame that shows another code.
WATCH_CODE = """code => {
  window.gqkDelay = null;
  let moved = null;
  addEventListener("pointermove", event => { moved ??= event.timeStamp; }, { capture: true, once: true });
  new MutationObserver((_, observer) => {
    observer.disconnect();
    requestAnimationFrame(() => { window.gqkDelay = performance.now() - moved; });
  }).observe(code, { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook, run as far as the panel that measures: what is measured is picked by hand first."""
    with notebook_page(tmp_path_factory.mktemp("lab"), "notebooks/01_quantize.ipynb") as page:
        run_cells(page, "all-above", MEASURING)
        page.wait_for_selector(".gqk-quantize-status :text('Nothing is measured yet.')")
        yield page


@pytest.fixture
def explorer(page):
    """The first BitExplorer, in view, as it starts."""
    panel = page.locator(".gqk-bits").first
    panel.scroll_into_view_if_needed()
    if panel.locator(".gqk-bits-reset").is_enabled():
        panel.locator(".gqk-bits-reset").click()
        panel.locator(".gqk-bits-reset:disabled").wait_for()
    return panel


@pytest.fixture
def panel(page):
    panel = page.locator(".gqk-quantize")
    panel.scroll_into_view_if_needed()
    return panel


def _codes(explorer):
    return [int(text) for text in explorer.locator(".gqk-bits-code").all_text_contents()]


def _wait_for_codes(explorer, before):
    explorer.page.wait_for_function(
        "([svg, before]) => [...svg.querySelectorAll('.gqk-bits-code')].map(code => code.textContent).join() != before",
        arg=[explorer.locator("svg").element_handle(), ",".join(map(str, before))],
    )
    return _codes(explorer)


def _drag(page, explorer, index, pixels):
    """Move a weight with the mouse, once, and return the milliseconds until its code was another one."""
    handle = explorer.locator(".gqk-bits-handle").nth(index)
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.wait_for_timeout(100)
    explorer.locator(".gqk-bits-code").nth(index).evaluate(WATCH_CODE)
    page.mouse.move(x, y + pixels)
    page.wait_for_function("window.gqkDelay !== null")
    page.mouse.up()
    return page.evaluate("window.gqkDelay")


def _tick(panel, *methods):
    """Tick these formats, and no other."""
    for box in panel.locator(".gqk-quantize-methods input[type=checkbox]").all():
        name = box.evaluate("box => box.closest('.widget-checkbox').innerText").strip()
        box.set_checked(name in methods)


def _rows(panel):
    """The table's rows by format, each a list of texts."""
    rows = panel.locator(".gqk-quantize-table tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return {name.strip(): rest for name, *rest in cells}


def _wait_for_status(panel, text):
    panel.locator(f".gqk-quantize-status :text('{text}')").wait_for()


def test_a_dragged_weight_flips_its_code_and_its_digit(page, explorer):
    delays = []
    for number in range(NUM_DRAGS):
        before, index = _codes(explorer), (7 * number + 2) % 32
        pixels = 60 if before[index] > 0 else -60
        delays.append(_drag(page, explorer, index, pixels))
        after = _codes(explorer)
        assert after[index] != before[index]
        assert f"w[{index}] = " in explorer.locator(".gqk-bits-status").inner_text()
        digit = explorer.locator(f".gqk-bits-part[data-weights='{index}']")
        assert int(digit.inner_text(), 16) - 8 == after[index]
        explorer.locator(".gqk-bits-reset").click()
        assert _wait_for_codes(explorer, after) == before
    print(f"{len(delays)} drags: median {statistics.median(delays):.0f} ms, longest {max(delays):.0f} ms")


def test_a_weight_far_beyond_the_others_sets_the_scale_of_all(page, explorer):
    before, facts = _codes(explorer), explorer.locator(".gqk-bits-facts").inner_text()
    box = explorer.locator(".gqk-bits-handle").nth(4).bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + 3, box["y"] + 600, steps=8)
    page.mouse.up()
    page.wait_for_function("document.querySelectorAll('.gqk-bits-code')[4].textContent == '-8'")
    after = _codes(explorer)
    assert sum(abs(code) for code in after) < sum(abs(code) for code in before)
    assert explorer.locator(".gqk-bits-facts").inner_text() != facts


def test_arrow_keys_pick_and_move_a_weight_and_stay_in_the_widget(page, explorer):
    before = _codes(explorer)
    explorer.locator(".gqk-bits-weight").nth(0).focus()
    cell = page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    weight = explorer.locator(".gqk-bits-weight:focus")
    assert weight.get_attribute("data-index") == "3"
    assert "w[3] = " in explorer.locator(".gqk-bits-status").inner_text()
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    assert _wait_for_codes(explorer, before)[3] > before[3]
    assert re.match(r"w\[3\] = .* → code", weight.get_attribute("aria-valuetext"))
    assert page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex") == cell


def test_every_format_can_be_picked(page, explorer):
    before, lengths = _codes(explorer), {"q8_0": 34, "mobile_int2": 12, "nf4": 20, "q4_0": 18}
    for format, num_bytes in lengths.items():
        explorer.locator(".gqk-bits-format").select_option(format)
        after = before = _wait_for_codes(explorer, before)
        assert explorer.locator(".gqk-bits-owner").count() == num_bytes
        assert explorer.locator(".gqk-bits-recover").is_enabled() == (format == "q4_0")
    assert len(after) == 32


def test_the_buttons_and_the_fields_go_to_other_groups(page, explorer):
    first = before = _codes(explorer)
    for name, group in (("next", "1"), ("next", "2"), ("previous", "1")):
        explorer.locator(f".gqk-bits-{name}").click()
        before = _wait_for_codes(explorer, before)
        assert explorer.locator("input.gqk-bits-group").input_value() == group
    explorer.locator(".gqk-bits-random").click()
    before = _wait_for_codes(explorer, before)
    for name in ("row", "group"):
        explorer.locator(f"input.gqk-bits-{name}").fill("")
        explorer.locator(f"input.gqk-bits-{name}").press_sequentially("0")  # by keys: a handler once swallowed them
        explorer.locator(f"input.gqk-bits-{name}").press("Enter")
        before = _wait_for_codes(explorer, before)
    assert before == first
    explorer.locator(".gqk-bits-layer").select_option("blk.3.ffn_up.weight")
    before = _wait_for_codes(explorer, before)
    explorer.locator(".gqk-bits-layer").select_option("token_embd.weight")
    assert _wait_for_codes(explorer, before) == first


def test_the_picture_of_the_readme_can_be_drawn_again(page, explorer, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    page.locator("h2:has-text('One weight')").click()  # so that neither a control nor the cell is the selected one
    explorer.scroll_into_view_if_needed()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    explorer.screenshot(path=folder / "bit_explorer.png")
    assert (folder / "bit_explorer.png").stat().st_size < 150_000


def test_nothing_ticked_is_said_in_three_parts(panel):
    _tick(panel)
    panel.locator(".gqk-quantize-run").click()
    _wait_for_status(panel, "No format is ticked.")
    assert panel.locator(".gqk-quantize-status .gqk-error p").count() == 3


def test_run_fills_the_rows_and_cancel_keeps_those_that_are_finished(panel):
    height = panel.bounding_box()["height"]
    panel.locator(".gqk-quantize-tokens select").select_option("128")
    _tick(panel, "q8_0", "q4_0+importance")  # the second takes long enough to be cancelled
    panel.locator(".gqk-quantize-run").click()
    _wait_for_status(panel, "Measuring q4_0+importance, 2 of 2.")
    assert panel.locator(".gqk-quantize-run").is_disabled()
    panel.locator(".gqk-quantize-cancel").click()
    _wait_for_status(panel, "Cancelled; finished formats stay.")
    rows = _rows(panel)
    assert rows["q8_0"][1] == "8.5"
    assert rows["q4_0+importance"][0] == "–"
    assert abs(panel.bounding_box()["height"] - height) < 200


def test_run_again_measures_what_is_missing_alone(panel):
    before = _rows(panel)["q8_0"]
    _tick(panel, "q8_0", "q4_0", "mobile_int2")
    panel.locator(".gqk-quantize-run").click()
    _wait_for_status(panel, "3 formats are measured.")
    rows = _rows(panel)
    assert rows["q8_0"] == before
    losses = [float(rows[name][-1]) for name in ("q8_0", "q4_0", "mobile_int2")]
    assert losses == sorted(losses)
    assert panel.locator(".gqk-quantize-picture circle").count() == 3


def test_the_cells_below_run_too(page, panel):
    run_code(page, FEWER_TOKENS)
    run_cells(page, "all-below", MEASURING)
    assert page.locator(STDERR).all_text_contents() == []
    assert page.locator(".jp-OutputArea-output .gqk-panel tbody tr", has_text="unquantized").count() == 2
    assert page.locator(".js-plotly-plot .scatterlayer .trace").count() == 3
    answer = page.locator(".jp-Cell:has-text('exported.stream(QUESTION') .jp-OutputArea-output").last.inner_text()
    assert re.search(r"force|mass|gravit", answer)


def test_a_recovered_grid_passes_through_every_weight(page):
    explorer = page.locator(".gqk-bits").nth(1)
    explorer.scroll_into_view_if_needed()
    explorer.locator(".gqk-bits-facts:has-text('dB')").wait_for()
    before, off = _codes(explorer), explorer.locator(".gqk-bits-facts").text_content()
    explorer.locator(".gqk-bits-recover").check()
    explorer.locator(".gqk-bits-facts:has-text('its largest weight is at level'):has-text('dB')").wait_for()
    assert _codes(explorer) != before
    decibels = [float(re.search(r"\(SQNR\)\s*([\d.]+) dB", text)[1]) for text in
                (off, explorer.locator(".gqk-bits-facts").text_content())]  # fmt: skip
    assert decibels[1] > decibels[0] + 20


def test_weights_that_cannot_be_quantized_say_so_where_the_eye_is(page):
    run_code(page, BROKEN)
    explorer = page.locator(".gqk-bits").nth(2)
    row = explorer.locator("input.gqk-bits-row")
    row.fill("1")
    row.press("Enter")
    problem = explorer.locator(".gqk-bits-status.gqk-error")
    problem.wait_for()
    assert problem.locator("p").count() == 3
    assert "<b>w</b>" in problem.inner_text()
    row.fill("0")
    row.press("Enter")
    problem.wait_for(state="detached")
    assert explorer.locator(".gqk-bits-handle").count() == 32


def test_the_widgets_read_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("bits", "quantize"), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
