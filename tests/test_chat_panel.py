"""ChatPanel without a browser, on a stand-in for a model: answers, branches, settings, errors, and hostile text."""

import base64
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from stand_ins import StandIn, click, wait_for

from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.generation import Delta, Reply
from gemma_qat_kit.speed import SpeedLimit
from gemma_qat_kit.widgets import ChatPanel
from gemma_qat_kit.widgets.chat_figures import speed_words

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (1).to_bytes(4, "big") * 2 + b"\x08\x06\x00\x00\x00"


def is_idle(panel):
    return not panel._session.is_answering and "Answering" not in panel._status.value


def ask(panel, question, **more):
    """Ask as a page does, and wait until the answer is shown."""
    count = len(panel.conversation.turns)
    panel._view._act({"do": "ask", "text": question, "files": [], "instead_of": None} | more)
    wait_for(lambda: len(panel.conversation.turns) > count and "the first after" in panel._status.value)


def shown(panel):
    """What stands in the transcript: HTML."""
    view = panel._view
    return view._turns.value if hasattr(view, "_turns") else json.dumps([*view.items, view.live], ensure_ascii=False)


@pytest.fixture(params=[False, True], ids=["front end", "plain"])
def plain(request):
    return request.param


def test_a_question_gets_its_answer_and_the_measured_speed(plain):
    panel = ChatPanel(StandIn(), plain=plain)
    ask(panel, " Why is the sky blue? ")
    assert panel.messages == [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Light scatters."},
    ]
    wait_for(lambda: "2 tokens at " in panel._status.value)
    assert "the model holds 256 MiB." in panel._status.value
    assert "Why is the sky blue?" in shown(panel)
    assert "Light scatters." in shown(panel)
    assert "Context: 7 of 4,096 tokens" in panel._meter.value


def test_the_next_question_carries_the_conversation_without_thoughts(plain):
    model = StandIn(answer=(Delta.thought("Hm."), "Paris."))
    panel = ChatPanel(model, plain=plain)
    ask(panel, "Capital of France?")
    assert "Hm." in shown(panel)
    ask(panel, "And of Italy?")
    assert [message["content"] for message in model.asked[1]] == ["Capital of France?", "Paris.", "And of Italy?"]


def test_the_answer_is_shown_while_it_comes_and_stop_keeps_what_was_said(plain):
    panel = ChatPanel(StandIn(answer=("word ",) * 1000, delay=0.02), plain=plain)
    panel.ask("Talk.")
    wait_for(lambda: "word" in shown(panel))
    assert "Answering: " in panel._status.value
    panel._view._act({"do": "stop"})
    wait_for(lambda: "Stopped." in panel._status.value)
    assert panel.messages[-1]["content"].startswith("word")
    assert "Stopped." in shown(panel)


def test_stop_before_the_first_word_gives_the_question_back(plain):
    panel = ChatPanel(StandIn(delay=5), plain=plain)
    panel.ask("Talk.")
    panel.stop()
    wait_for(lambda: not panel._session.is_answering)
    wait_for(lambda: (panel._view._input.value if plain else panel._view.draft.get("text")) == "Talk.")
    assert panel.messages == []


def test_another_answer_and_an_edited_question_stand_beside_what_was_there(plain):
    model = StandIn()
    panel = ChatPanel(model, seed=5, plain=plain)
    ask(panel, "One?")
    panel._view._act({"do": "again"})
    wait_for(lambda: len(panel.conversation.turns) == 3 and is_idle(panel))
    assert [settings["seed"] for settings in model.settings] == [5, 6]
    ask(panel, "Two?", instead_of=0)
    assert [turn.content for turn in panel.conversation.path] == ["Two?", "Light scatters."]
    panel._view._act({"do": "show", "number": 1})
    assert [turn.number for turn in panel.conversation.path] == [0, 1]
    assert "1 of 2" in shown(panel) if plain else panel._view.items[1]["place"] == [1, 2]


@pytest.mark.parametrize("content", [{}, {"do": "show", "number": 99}, {"do": "show"}, {"do": "ask", "text": 3},
                                     {"do": "ask", "text": "x", "instead_of": "y"}, {"do": "no"}])  # fmt: skip
def test_a_page_that_sends_nonsense_does_no_harm(content):
    panel = ChatPanel(StandIn())
    panel._view._take(content)
    wait_for(lambda: is_idle(panel))
    ask(panel, "Hello?")


def test_a_picture_goes_to_the_model_and_into_the_conversation():
    model = StandIn()
    model.runner = SimpleNamespace(takes=("image",))
    panel = ChatPanel(model)
    assert panel._view.can_attach
    file = {"name": "a.png", "type": "image/png", "data": base64.b64encode(PNG).decode()}
    ask(panel, "What is this?", files=[file])
    assert model.asked[0][0]["content"][0]["data"] == PNG
    assert "data:image/png;base64,iVBORw0KGgo" in shown(panel)
    panel._view._act({"do": "ask", "text": "And this?", "files": [file | {"data": "PHN2Zz4="}], "instead_of": None})
    assert "is not a PNG" in panel._status.value
    assert panel._view.draft["text"] == "And this?"


def test_what_the_model_writes_does_nothing_in_the_page(plain):
    model = StandIn(name="<b>m</b>", answer=(Delta.thought("<i>"), "<img src=x onerror=alert(1)>", "\u202e"))
    panel = ChatPanel(model, plain=plain)
    ask(panel, "<script>alert(2)</script>")
    drawn = [shown(panel)] if plain else [item["html"] + item["thoughts"] for item in panel._view.items]
    seen = "".join(drawn) + panel._status.value
    assert not any(sign in seen for sign in ("<img", "<script", "<i>", "\u202e"))
    assert "<b>" not in panel._status.value + (seen if plain else "")


def test_an_error_while_answering_shows_in_the_panel_and_the_next_question_works(plain):
    model = StandIn(answer=(BrokenCheckpointError("Closed.", "An open one.", "Load it again."),))
    panel = ChatPanel(model, plain=plain)
    panel.ask("Hello?")
    wait_for(lambda: "<p>Load it again.</p>" in panel._status.value)
    assert panel.messages == []
    model.answer = ("Hello.",)
    ask(panel, "Hello?")
    assert len(panel.messages) == 2


def test_an_empty_message_or_one_while_answering_is_not_sent(plain):
    model = StandIn(answer=("word ",) * 100, delay=0.02)
    panel = ChatPanel(model, plain=plain)
    panel.ask("   ")
    assert model.asked == []
    panel.ask("First.")
    panel.ask("Second.")
    panel.stop()
    wait_for(lambda: is_idle(panel))
    assert len(model.asked) == 1


def test_enter_sends_in_the_plain_view_and_edit_brings_the_last_question_back():
    panel = ChatPanel(StandIn(), plain=True)
    view = panel._view
    view._input.value = "One?"
    view._input._handle_custom_msg({"event": "submit"}, [])
    wait_for(lambda: len(panel.messages) == 2 and not view._edit.disabled)
    click(view._edit)
    assert view._input.value == "One?"
    click(view._send_button)
    wait_for(lambda: len(panel.conversation.turns) == 4 and not view._other.disabled)
    click(view._other)
    assert panel.conversation.tip == 1


def test_settings_hold_from_the_next_answer_on_and_a_wrong_one_is_said():
    model = StandIn()
    panel = ChatPanel(model)
    settings = panel._settings
    settings._fields["temperature"].value = "0"
    settings._fields["seed"].value = "9"
    settings._thinking.value = True
    settings._system.value = "Be brief."
    ask(panel, "Hello?")
    assert model.settings[0] | {"temperature": 0, "seed": 9, "thinking": True} == model.settings[0]
    assert model.asked[0][0] == {"role": "system", "content": "Be brief."}
    settings._fields["top_k"].value = "many"
    assert "top_k cannot be &#x27;many&#x27;" in panel._status.value
    settings._fields["seed"].value = ""
    assert panel._session.choice.seed is None


def test_save_writes_three_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = ChatPanel(StandIn())
    click(panel._settings._save)
    assert "nothing to save" in panel._status.value
    ask(panel, "Hello?")
    click(panel._settings._save)
    assert "Saved as chats/chat-1.json" in panel._status.value
    assert sorted(file.suffix for file in (tmp_path / "chats").iterdir()) == [".json", ".jsonl", ".md"]


def test_every_control_has_a_name_for_screen_readers():
    panel = ChatPanel(StandIn(), plain=True)
    buttons = [panel._view._send_button, panel._view._stop_button, panel._view._again, panel._settings._new]
    assert all(control.description for control in [panel._view._input, *buttons, *panel._settings._fields.values()])
    assert 'role="status" aria-live="polite"' in panel._status.value


def test_the_speed_is_told_beside_what_the_machine_allows_and_what_a_drafter_guessed():
    limit = SpeedLimit(10**9, 0, 100, 2 * 10**10, "RAM")  # 20 tokens/s
    reply = Reply("a", "", "stop", 5, 11, 1.0, 2.0, drafted_tokens=8, accepted_tokens=6)
    session = SimpleNamespace(limit=limit, memory_bytes=2**30, model=StandIn())
    words = speed_words(reply, session)
    assert "11 tokens at 10 tokens/s (50 % of what this machine's memory allows), the first after 1 s" in words
    assert "; the model holds 1.00 GiB. Of 8 guesses of the drafter 75 % were right." in words
    session.model.drafter_note = "The drafter is off."
    assert speed_words(replace(reply, drafted_tokens=None), session).endswith("The drafter is off.")
