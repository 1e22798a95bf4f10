"""The first notebook in a real browser, on the real model: what `make lab` opens, run and used as a learner does."""

import io
import os
import re
import time
from pathlib import Path

import pytest
from lab import CHROMIUM, ROOT, STDERR, notebook_page, photograph, run_cells
from PIL import Image

from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import readable_bytes

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook after Run all, with its panels ready."""
    with notebook_page(tmp_path_factory.mktemp("lab")) as page:
        run_cells(page)
        page.wait_for_selector(".gqk-chat-status :text('Talking to')")
        yield page


def _ask(page, question):
    """Type a question, press Enter, and return the lengths that the answer had while it came, and its text."""
    box = page.locator(".gqk-chat").get_by_label("Message", exact=True)
    box.fill(question)
    box.press("Enter")
    turn, lengths = page.locator(".gqk-turn-assistant .gqk-said").last, []
    while not page.locator(".gqk-chat-status :text('tokens/s')").count() or not lengths:
        lengths.append(len(turn.inner_text()))
        time.sleep(0.05)
        assert len(lengths) < 2000
    return lengths, turn.inner_text()


def _pick(page, size, format):
    page.locator(".gqk-picker-size select").select_option(label=size)
    page.locator(".gqk-picker-format select").select_option(label=format)


def test_every_cell_ran_and_the_first_answer_is_about_the_sky(page):
    assert page.locator(STDERR).all_text_contents() == []
    answer = page.locator(".jp-Cell:has-text('model.stream(QUESTION') .jp-OutputArea-output").last.text_content()
    assert re.search(r"light|scatter|atmosphere", answer)
    assert "smollm2-135m q4_1 is loaded" in page.locator(".gqk-picker-status").text_content()


def test_the_picker_shows_what_another_choice_costs_and_its_call(page):
    _pick(page, "E2B", "mobile")
    call = page.locator(".gqk-call", has_text='gqk.load("E2B", "mobile")')
    call.wait_for()
    plan = plan_memory("E2B", "mobile")
    for nbytes in (plan.download_bytes, plan.needed_bytes):
        page.locator(".gqk-picker-facts", has_text=readable_bytes(nbytes)).wait_for()
    call.click()
    assert page.evaluate("document.getSelection().toString()").strip() == 'gqk.load("E2B", "mobile")'


def test_the_picker_says_why_a_format_does_not_exist(page):
    _pick(page, "26B-A4B", "w4a16 (not published)")
    page.locator(".gqk-call", has_text='gqk.load("26B-A4B", "q4_0")').wait_for()
    page.locator(".gqk-picker-load:disabled").wait_for()
    page.locator(".gqk-picker-size select").select_option(label="smollm2-135m")
    page.locator(".gqk-call", has_text='gqk.load("smollm2-135m", "q4_1")').wait_for()


def test_a_typed_question_gets_a_streamed_and_sensible_answer(page):
    lengths, answer = _ask(page, "What is gravity?")
    assert len(set(lengths)) > 3, "the answer came in one piece"
    assert re.search(r"physics|force|mass|matter|universe|object", answer)
    assert page.locator(".gqk-chat").get_by_label("Message", exact=True).input_value() == ""
    _, second = _ask(page, "Explain it to a child in one sentence.")
    assert "ravity" in second


def test_the_picture_of_the_readme_can_be_drawn_again(page, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    page.set_viewport_size({"width": 920, "height": 1000})
    page.locator("h2:has-text('Remember')").click()  # so that neither panel's cell is the selected one
    parts = []
    for panel in ("picker", "chat"):
        page.locator(f".gqk-{panel}").scroll_into_view_if_needed()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        cell = page.locator(".jp-CodeCell", has=page.locator(f".gqk-{panel}"))
        parts.append(Image.open(io.BytesIO(cell.screenshot())))
    whole = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height))
    whole.save(folder / "start_here.png", optimize=True)
    assert whole.width > 700
    assert whole.height < 1000


def test_stop_ends_an_answer_soon(page):
    box = page.locator(".gqk-chat").get_by_label("Message", exact=True)
    box.fill("Tell me a long story.")
    box.press("Enter")
    page.wait_for_selector(".gqk-chat-status :text('Answering')")
    page.wait_for_function("document.querySelector('.gqk-chat-live .gqk-said')?.innerText.length > 40")
    page.locator(".gqk-chat-stop").click()
    page.wait_for_selector(".gqk-chat-status :text('Stopped.')")


def test_the_panels_read_well_in_the_dark_and_on_a_phone(page, tmp_path):
    photograph(page, ("picker", "chat"), tmp_path)


def test_nothing_went_wrong_in_the_page_and_nothing_left_this_machine(page):
    assert page.errors == []
    assert page.outside == []
