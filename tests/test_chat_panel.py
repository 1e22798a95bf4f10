"""ChatPanel without a browser, on a stand-in for a model: answers, stops, errors, and text that must stay text."""

from stand_ins import StandIn, click, wait_for

from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.generation import Delta
from gemma_qat_kit.widgets import ChatPanel


def _press_enter(panel):
    panel._input._handle_custom_msg({"event": "submit"}, [])


def test_a_question_gets_its_answer_and_the_measured_speed():
    model = StandIn()
    panel = ChatPanel(model)
    panel._input.value = "Why is the sky blue?"
    _press_enter(panel)
    wait_for(lambda: "tokens/s" in panel._status.value)
    assert panel._input.value == ""
    assert panel.messages == [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Light scatters."},
    ]
    assert "2 tokens at 12.3 tokens/s, the first after 0.25 s." in panel._status.value
    assert "Why is the sky blue?" in panel._turns.children[0].value
    assert "Light scatters." in panel._turns.children[1].value


def test_the_next_question_carries_the_conversation_without_thoughts():
    model = StandIn(answer=(Delta.thought("Hm."), "Paris."))
    panel = ChatPanel(model)
    panel.ask("Capital of France?")
    wait_for(lambda: not panel._send_button.disabled)
    assert "<details>" in panel._turns.children[1].value
    panel.ask("And of Italy?")
    wait_for(lambda: len(panel.messages) == 4)
    assert [message["content"] for message in model.asked[1]] == ["Capital of France?", "Paris.", "And of Italy?"]


def test_stop_ends_the_answer_and_keeps_what_was_said():
    panel = ChatPanel(StandIn(answer=("word ",) * 1000, delay=0.02))
    panel.ask("Talk.")
    wait_for(lambda: "word" in panel._turns.children[1].value)
    click(panel._stop_button)
    wait_for(lambda: "Stopped." in panel._status.value)
    assert panel.messages[-1]["content"].startswith("word")
    assert panel._stop_button.disabled


def test_stop_before_the_first_word_forgets_the_question():
    panel = ChatPanel(StandIn(delay=5))
    panel.ask("Talk.")
    panel.stop()
    wait_for(lambda: "Stopped." in panel._status.value)
    assert panel.messages == []


def test_what_the_model_writes_does_nothing_in_the_page():
    panel = ChatPanel(StandIn(name="<b>m</b>", answer=("<img src=x onerror=alert(1)>", "\u202e")))
    panel.ask("<script>alert(2)</script>")
    wait_for(lambda: "tokens/s" in panel._status.value)
    shown = "".join(turn.value for turn in panel._turns.children)
    assert "<img" not in shown
    assert "<script" not in shown
    assert "<b>" not in shown
    assert "\u202e" not in shown


def test_an_error_while_answering_shows_in_the_panel_and_the_next_question_works():
    model = StandIn(answer=(BrokenCheckpointError("Closed.", "An open one.", "Load it again."),))
    panel = ChatPanel(model)
    panel.ask("Hello?")
    wait_for(lambda: "<p>Load it again.</p>" in panel._status.value)
    assert panel.messages == []
    model.answer = ("Hello.",)
    panel.ask("Hello?")
    wait_for(lambda: "tokens/s" in panel._status.value)
    assert len(panel.messages) == 2


def test_an_empty_message_or_one_while_answering_is_not_sent():
    model = StandIn(answer=("word ",) * 100, delay=0.02)
    panel = ChatPanel(model)
    panel.ask("   ")
    assert model.asked == []
    panel.ask("First.")
    panel._input.value = "Second."
    _press_enter(panel)
    assert panel._input.value == "Second."
    panel.stop()
    wait_for(lambda: not panel._send_button.disabled)
    assert len(model.asked) == 1


def test_every_control_has_a_name_for_screen_readers():
    panel = ChatPanel(StandIn())
    assert all(control.description for control in (panel._input, panel._send_button, panel._stop_button))
    assert 'role="status" aria-live="polite"' in panel._status.value
