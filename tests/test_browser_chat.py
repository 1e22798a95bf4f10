"""ChatPanel and CompareChat in a real browser: what people press, and what a hostile model tries.

The models are stand-ins that say what they are told; the first notebook's own test talks to the real one.
"""

import os
from pathlib import Path

import pytest
from lab import CHROMIUM, ROOT, notebook_page, photograph, run_cells, run_code

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]
PREPARE = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from stand_ins import StandIn
from gemma_qat_kit.generation import Delta
sea = ("once ", "more ", "the *sea* ") * 40
code = "def double(x):  # twice\\n    return {{'x': x * 2.5 + 1, 'is_known': True}}\\n\\nprint(1)"
story = (Delta.thought("A story."), "# The sea\\n\\n", *sea, "\\n\\n```python\\n" + code + "\\n```")
model, other = StandIn("first", story, delay=0.02), StandIn("second", ("Paris.",), delay=0.02)
panel = widgets.ChatPanel([model, other])
panel
"""
HOSTILE = r"""
answer = ("# Look\n\n<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n",
          "[link](javascript:window.hacked=3) ![p](https://example.com/p.png) <https://example.com/>\n\n",
          "<svg onload=window.hacked=4> $\\text{<img src=x onerror=window.hacked=5>}$ $\\frac{1}{2}$\n\n",
          "\x1b[31mred\u202e backwards\n\n```html\n<b onclick=window.hacked=6>code</b>\n```\n\n", "word " * 20000)
widgets.ChatPanel(StandIn(name="<b>hostile</b>", answer=answer))
"""
REAL = """
model = gqk.load("smollm2-135m")
talk = gqk.Conversation("Answer in Markdown.")
panel = widgets.ChatPanel(model, talk, seed=3, max_new_tokens=160)
panel.ask("Show me a Python loop that adds the numbers from 1 to 10.")
panel
"""
REAL_COMPARE = """
import tempfile
reference = gqk.load("smollm2-135m", "float32")
naive = gqk.load(gqk.export_gguf(reference, tempfile.mkdtemp() + "/naive.gguf", "q4_0").path)
models = {"float32": reference, "as it ships": model, "naive Q4_0": naive}
versus = widgets.CompareChat(models, max_new_tokens=80)
versus.ask("Why do cats purr?")
versus
"""
COMPARE = """
a, b = StandIn("a", ("The ", "sky ", "is ", "blue.")), StandIn("b", ("The ", "sea ", "is ", "blue."))
versus = widgets.CompareChat([a, b])
versus
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with notebook_page(tmp_path_factory.mktemp("lab"), "notebooks/05_chat.ipynb") as page:
        run_cells(page, "all-above", "model = gqk.load")
        run_code(page, PREPARE)
        page.wait_for_selector(".gqk-chat-status :text('Talking to')")
        yield page


@pytest.fixture
def panel(page):
    return page.locator(".gqk-chat").last


def _wait_for_status(panel, text):
    panel.locator(f".gqk-chat-status :text('{text}')").wait_for()


def _ask(panel, question):
    box = panel.get_by_label("Message", exact=True)
    box.fill(question)
    box.press("Enter")


def test_type_and_the_answer_streams(page, panel):
    _ask(panel, "Tell me a story.")
    said = panel.locator(".gqk-chat-live .gqk-said")
    said.locator("h1").wait_for()
    first = said.inner_text()
    page.wait_for_function(
        "before => (document.querySelector('.gqk-chat-live .gqk-said')?.innerText.length ?? 1e9) > before",
        arg=len(first),
    )
    _wait_for_status(panel, "tokens/s")
    assert panel.get_by_label("Message", exact=True).input_value() == ""
    assert panel.locator(".gqk-turn-assistant em", has_text="sea").count() == 40
    assert panel.locator("pre", has_text="print(1)").get_by_label("Copy this code").count() == 1
    assert "A story." in panel.locator("details").text_content()
    assert "Context: " in panel.locator(".gqk-chat-meter").inner_text()


def test_stop_keeps_what_was_said_and_again_stands_beside_it(page, panel):
    _ask(panel, "Once more.")
    panel.locator(".gqk-chat-live .gqk-said h1").wait_for()
    panel.locator(".gqk-chat-stop").click()
    _wait_for_status(panel, "Stopped.")
    assert "Stopped." in panel.locator(".gqk-turn footer").last.inner_text()
    panel.locator(".gqk-chat-again").click()
    panel.locator(".gqk-chat-live").wait_for()
    panel.get_by_label("Message", exact=True).press("Escape")
    _wait_for_status(panel, "Stopped.")
    panel.locator(".gqk-turn", has_text="2 of 2").wait_for()
    panel.get_by_label("Previous version").click()
    panel.locator(".gqk-turn", has_text="1 of 2").wait_for()


def test_an_edited_question_is_a_branch_of_its_own_and_another_model_answers_it(page, panel):
    panel.locator(".gqk-chat-model select").select_option(label="second")
    _wait_for_status(panel, "Stopped.")
    panel.get_by_label("Edit and ask again, in a branch of its own").first.click()
    box = panel.get_by_label("Edited message")
    box.fill("What is the capital of France?")
    box.press("Enter")
    panel.locator(".gqk-turn-user", has_text="2 of 2").wait_for()
    panel.locator(".gqk-turn-assistant", has_text="Paris.").wait_for()
    assert panel.locator(".gqk-turn").count() == 2
    assert panel.locator(".gqk-turn-assistant .gqk-who").inner_text() == "second"


def test_running_the_cell_again_shows_the_same_conversation(page, panel):
    run_code(page, "panel.close()\npanel = widgets.ChatPanel([model, other])\npanel")
    page.locator(".gqk-chat .gqk-turn-user", has_text="capital of France").wait_for()


def test_a_page_that_is_loaded_again_shows_the_conversation(page, panel):
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_function("window.jupyterapp")
    page.locator(".gqk-chat .gqk-turn-user", has_text="capital of France").wait_for()
    _ask(panel, "And of Italy?")
    panel.locator(".gqk-turn-user", has_text="And of Italy?").wait_for()
    _wait_for_status(panel, "the first after")


def test_what_a_model_writes_does_nothing(page, panel):
    run_code(page, HOSTILE)
    page.locator(".gqk-chat-status :text('hostile')").wait_for()
    _ask(panel, "<img src=x onerror=window.hacked=7>")
    panel.locator(".gqk-said math mfrac").wait_for()
    _wait_for_status(panel, "tokens/s")
    assert page.evaluate("window.hacked") is None
    assert panel.locator(".gqk-said :is(img, script, svg, b)").count() == 0
    assert panel.locator(".gqk-said a").get_attribute("href") == "https://example.com/"
    assert "\u202e" not in panel.locator(".gqk-turn-assistant").inner_text()


def test_models_stand_side_by_side(page):
    run_code(page, COMPARE)
    compare = page.locator(".gqk-compare").last
    compare.locator("input").first.fill("What is blue?")
    compare.locator("input").first.press("Enter")
    compare.locator(".gqk-compare-status :text('Every model has answered.')").wait_for()
    assert compare.locator("mark").inner_text().strip() == "sea"
    compare.locator(".gqk-compare-replay").click()
    compare.locator(".gqk-compare-status :text('recording')").wait_for()


def test_the_pictures_of_the_readme_can_be_drawn_again(page, tmp_path):
    folder = ROOT / "docs" if os.environ.get("GQK_PICTURES") else Path(os.environ.get("GQK_SCREENSHOTS") or tmp_path)
    page.set_viewport_size({"width": 1120, "height": 1400})
    if os.environ.get("GQK_PICTURES"):  # minutes: real models answer
        run_code(page, REAL)
        real = page.locator(".gqk-chat", has_text="adds the numbers from 1 to 10")
        real.locator(".gqk-chat-status :text('tokens/s')").wait_for(timeout=300_000)
        run_code(page, REAL_COMPARE)  # after it, so that the speed in the picture is the answer's own
        words = ".gqk-compare-status :text('Every model has answered.')"
        page.locator(".gqk-compare").last.locator(words).wait_for(timeout=600_000)
    page.mouse.move(0, 0)
    for name in ("chat", "compare"):
        path = folder / f"{name}_panel.png"
        page.locator(f".gqk-{name}").last.screenshot(path=path)
        assert path.stat().st_size < 150_000


def test_the_panels_read_well_in_the_dark_and_on_a_phone(page, tmp_path):
    first = page.locator(".gqk-chat").first
    first.get_by_label("Previous version").first.click()
    first.locator("pre .k").first.wait_for()  # code in all its colours
    photograph(page, ("chat", "compare"), tmp_path)
    first.get_by_label("Next version").first.click()
    first.locator(".gqk-turn-user", has_text="capital of France").wait_for()


def test_the_keyboard_is_enough(page, panel):
    page.locator(".gqk-chat").first.get_by_label("Message", exact=True).focus()
    names = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        names.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText")
        )
    assert "Copy this message" in names


def test_a_kernel_that_is_gone_is_said_and_the_words_stay(page, panel):
    page.evaluate(
        "async () => { const s = jupyterapp.shell.currentWidget.sessionContext; await s.session.kernel.shutdown(); }"
    )
    first = page.locator(".gqk-chat").first
    first.get_by_label("Message", exact=True).fill("Are you there?")
    first.get_by_label("Message", exact=True).press("Enter")
    first.locator(".gqk-chat-notice", has_text="The kernel does not answer").wait_for()
    assert "capital of France" in first.locator(".gqk-chat-transcript").inner_text()


def test_nothing_left_this_machine(page):
    assert page.outside == []
