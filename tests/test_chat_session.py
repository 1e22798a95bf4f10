"""The chat behind a ChatPanel, on a stand-in for a model: each moment of an answer, cells run again, files, models."""

import pytest
from stand_ins import StandIn, click, wait_for
from test_chat_panel import ask, is_idle, shown

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.server_queue import Queue
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.widgets import ChatPanel
from gemma_qat_kit.widgets.chat_figures import meter_html


def test_while_an_answer_comes_only_its_question_stands_below_what_was_there():
    panel, drawn = ChatPanel(StandIn(answer=("word ",) * 20, delay=0.005)), []
    ask(panel, "One?")
    draw = panel._view.draw

    def recorded(items, live, *, is_answering, **more):
        drawn.append((is_answering, [(item["text"], item["is_last"]) for item in items]))
        draw(items, live, is_answering=is_answering, **more)

    panel._view.draw = recorded
    whole = panel._session.run

    def run():  # pictures of every moment, also of those between the end and the thread's
        whole()
        panel._show()

    panel._session.run = run
    ask(panel, "Two?")
    said = "word " * 20
    before, after = [("One?", False), (said, True), ("Two?", False)], [("One?", False), (said, False), ("Two?", False)]
    assert {True, False} == {is_answering for is_answering, _ in drawn}
    assert all(items in (before, after) for is_answering, items in drawn if is_answering)
    assert drawn[-1] == (False, [*after, (said, True)])


def test_a_question_in_place_of_one_that_is_not_there_is_refused_and_the_next_is_answered():
    panel = ChatPanel(StandIn())
    with pytest.raises(BadSettingError, match="There are no turns yet"):
        panel.ask("One?", instead_of=3)
    ask(panel, "One?")


def test_stop_does_not_wait_for_a_measurement(monkeypatch):
    measured = []
    monkeypatch.setattr("gemma_qat_kit.widgets.chat_session.speed_limit", lambda *_, **__: measured.append(1))
    panel = ChatPanel(StandIn(answer=("word ",) * 1000, delay=0.02))
    panel.ask("Talk.")
    wait_for(lambda: "word" in shown(panel))
    panel.stop()
    wait_for(lambda: "Stopped." in panel._status.value)
    assert measured == []
    panel._session.model.answer = ("word",)
    ask(panel, "Again.")
    assert measured == [1]


def test_who_else_waits_is_said_until_the_first_word():
    model = StandIn(delay=5)
    model.queue = lambda: Queue(busy=2, waiting=3, places=2)
    panel = ChatPanel(model)
    panel.ask("Hello?")
    wait_for(lambda: "Waiting for a place: 2 of 2 places busy, 3 waiting." in panel._status.value)
    panel.stop()
    wait_for(lambda: "Stopped." in panel._status.value)


def test_a_cell_that_is_run_again_goes_on_with_its_conversation_even_while_it_answers():
    model = StandIn(answer=("word ",) * 50, delay=0.02)
    panel = ChatPanel(model)
    panel.ask("Talk.")
    wait_for(lambda: "word" in shown(panel))
    again = ChatPanel(model)
    assert again.conversation is panel.conversation
    wait_for(lambda: "word" in shown(again))
    again.stop()
    wait_for(lambda: "Stopped." in again._status.value)
    assert len(again.messages) == 2
    assert ChatPanel(model, gqk.Conversation()).messages == []


def test_a_conversation_in_a_file_survives_the_kernel(tmp_path):
    path = tmp_path / "talk.json"
    panel = ChatPanel(StandIn(), path)
    ask(panel, "Hello?")
    wait_for(path.exists)
    assert ChatPanel(StandIn(), path).messages == panel.messages
    click(panel._settings._new)
    assert panel.messages == []
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["talk-1.json", "talk.json"]


def test_another_model_answers_next():
    first, second = StandIn("first"), StandIn("second", ("Hello.",))
    panel = ChatPanel([first, second])
    panel._settings._models.value = "second"
    ask(panel, "Hello?")
    assert (first.asked, panel.conversation.path[-1].model) == ([], "second")
    with pytest.raises(BadSettingError, match="none of this panel's models"):
        panel._session.choose_model("third")
    with pytest.raises(BadSettingError, match="There is no model"):
        ChatPanel([])


def test_the_answer_says_what_had_no_room():
    panel = ChatPanel(StandIn(context_length=20), max_new_tokens=4)
    for _ in range(4):
        ask(panel, "one two three four five")
        wait_for(lambda: is_idle(panel))
    assert "the oldest 2 messages left out." in shown(panel)
    assert "; when it is full" not in panel._meter.value
    assert "; when it is full, the oldest messages are left out" in meter_html(80, 100)
