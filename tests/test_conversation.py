"""Conversations as data, on a stand-in and on the built-in model: branches, settings, files, replay, room."""

import json

import pytest
from stand_ins import StandIn

import gemma_qat_kit as gqk
from gemma_qat_kit.chat.context import fit_context
from gemma_qat_kit.errors import BadSettingError, EndpointError
from gemma_qat_kit.generation import Delta
from gemma_qat_kit.load import built_in_checkpoint
from gemma_qat_kit.tools import ToolCall
from gemma_qat_kit.widgets.chat_figures import end_note

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (1).to_bytes(4, "big") * 2 + b"\x08\x06\x00\x00\x00"


def _talked(*questions, model=None, **settings):
    conversation = gqk.Conversation("Be brief.")
    for question in questions:
        conversation.ask(model or StandIn(), question, **settings).finish()
    return conversation


def test_a_question_and_its_answer_are_kept_with_how_it_came_about():
    model = StandIn(answer=(Delta.thought("Hm."), "Light."))
    conversation = _talked("Why?", model=model, seed=7, temperature=0.5)
    answer = conversation.path[-1]
    assert (answer.content, answer.thoughts, answer.model) == ("Light.", "Hm.", "stand-in")
    assert answer.settings == {"seed": 7, "temperature": 0.5}
    assert answer.timings["finish_reason"] == "stop"
    assert answer.timings["new_tokens"] == 2
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Light."},
    ]


def test_a_seed_is_drawn_and_kept_where_none_is_given():
    model = StandIn()
    first, second = _talked("a", "b", model=model).path[1::2]
    assert first.settings["seed"] != second.settings["seed"]
    assert [settings["seed"] for settings in model.settings] == [first.settings["seed"], second.settings["seed"]]


def test_versions_stand_beside_each_other_and_branches_come_back_whole():
    conversation = _talked("a", "b")
    conversation.answer_again(StandIn(answer=("Again.",))).finish()
    assert conversation.beside(conversation.tip) == [3, 4]
    conversation.ask(StandIn(), "c", instead_of=0).finish()
    assert [turn.content for turn in conversation.path] == ["c", "Light scatters."]
    assert conversation.beside(5) == [0, 5]
    conversation.show(0)
    assert [turn.content for turn in conversation.path] == ["a", "Light scatters.", "b", "Again."]
    conversation.show(3)
    assert conversation.tip == 3


@pytest.mark.parametrize("number", [-1, 2, "0", None])
def test_a_turn_that_is_not_there_cannot_be_shown(number):
    with pytest.raises(BadSettingError, match="There is no turn"):
        _talked("a").show(number)
    with pytest.raises(BadSettingError, match="There is no turn"):
        _talked("a").ask(StandIn(), "b", instead_of=-1 if number is None else number)


@pytest.mark.parametrize("question", ["", "  ", None])
def test_an_empty_question_is_refused(question):
    with pytest.raises(BadSettingError, match="no question"):
        gqk.Conversation().ask(StandIn(), question)


def test_nothing_can_be_answered_again_before_it_was_asked():
    with pytest.raises(BadSettingError, match="Nothing was asked"):
        gqk.Conversation().answer_again(StandIn())


def test_what_was_said_before_an_error_or_a_stop_stays_and_silence_leaves_no_trace():
    conversation = gqk.Conversation()
    lost = EndpointError("The connection was lost.", "It stays.", "Ask again.")
    with pytest.raises(EndpointError):
        conversation.ask(StandIn(answer=("Half ", lost)), "a").finish()
    assert conversation.path[-1].content == "Half "
    assert conversation.path[-1].timings["finish_reason"] == "unfinished"
    with pytest.raises(EndpointError):
        conversation.ask(StandIn(answer=(lost,)), "b").finish()
    answer = conversation.ask(StandIn(answer=("one ", "two ")), "c")
    next(answer)
    answer.cancel()
    answer.finish()
    assert [turn.content for turn in conversation.path] == ["a", "Half ", "c", "one "]
    assert conversation.path[-1].timings["finish_reason"] == "cancelled"


def test_a_file_brings_everything_back(tmp_path):
    conversation = _talked("a", "b", model=StandIn(answer=(Delta.thought("Hm."), "Ä \ud800 <b>")))
    conversation.ask(StandIn(), "c", attachments=[{"type": "image", "image": PNG}]).finish()
    conversation.answer_again(StandIn()).finish()
    path = conversation.save(tmp_path / "new" / "talk.json")
    assert vars(gqk.Conversation.load(path)) == vars(conversation)
    assert [file.name for file in path.parent.iterdir()] == ["talk.json"]


def test_a_picture_reaches_the_model_as_bytes_and_the_files_as_base64():
    model = StandIn()
    conversation = gqk.Conversation()
    conversation.ask(model, "What?", attachments=[{"type": "image", "image": PNG}]).finish()
    picture, text = model.asked[0][0]["content"]
    assert (picture["data"], text["text"]) == (PNG, "What?")
    assert conversation.replay(model).messages == conversation.messages
    assert "iVBORw0KGgo" in conversation.to_jsonl()
    assert "*[image attached]*" in conversation.to_markdown()


def test_jsonl_is_a_row_of_a_dataset_and_markdown_can_be_read():
    from gemma_qat_kit.finetune.conversations import read_conversations

    conversation = _talked("a", seed=3)
    row = json.loads(conversation.to_jsonl())
    assert row == {"messages": conversation.messages}
    assert read_conversations([row["messages"]])
    assert "**You**\n\na\n" in str(conversation)
    assert "seed 3*" in str(conversation)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kept: kept.update(kind="something"), "another kind"),
        (lambda kept: kept.update(version=99), "version 99"),
        (lambda kept: kept.update(system=1), "system must be a text"),
        (lambda kept: kept.update(tip=7), "tip is 7"),
        (lambda kept: kept["turns"][1].update(number=5), "turn 1 is not numbered"),
        (lambda kept: kept["turns"][1].update(parent=1), "turn 1 follows 1"),
        (lambda kept: kept["turns"][1].update(role="system"), "turn 1 is said by 'system'"),
        (lambda kept: kept["turns"][1].update(content=3), "turn 1 has a content that is int"),
        (lambda kept: kept["turns"][1].update(extra=3), "'extra', which no turn has"),
        (lambda kept: kept["turns"][1].pop("content"), "turn 1 has no content"),
    ],
)
def test_a_file_edited_by_hand_says_where_it_is_wrong(tmp_path, change, words):
    path = _talked("a").save(tmp_path / "talk.json")
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(BadSettingError, match=words):
        gqk.Conversation.load(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3"])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(BadSettingError, match="no conversation that can be read"):
        gqk.Conversation.load(path)


def test_a_missing_file_and_a_place_that_takes_none_are_named(tmp_path):
    with pytest.raises(BadSettingError, match="cannot be read"):
        gqk.Conversation.load(tmp_path / "no.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSettingError, match="cannot be written"):
        _talked("a").save(tmp_path / "file" / "talk.json")


def test_the_oldest_turns_are_left_out_where_that_is_wanted_and_the_answer_says_so():
    model = StandIn(context_length=40)
    conversation = _talked("one two three four five", model=model, max_new_tokens=8)
    for _ in range(5):
        conversation.ask(model, "one two three four five", max_new_tokens=8, drop_oldest=True).finish()
    assert conversation.path[-1].timings["num_dropped"] > 0
    assert model.asked[-1][0] == {"role": "system", "content": "Be brief."}
    assert model.asked[-1][1]["role"] == "user"
    assert model.num_tokens(model.asked[-1]) <= 40 - 8


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_asked():
    model = StandIn(context_length=40)
    for may_drop in (False, True):
        with pytest.raises(BadSettingError, match="The prompt has 50 tokens"):
            fit_context(model, [{"role": "user", "content": "word " * 50}], may_drop=may_drop)
    assert fit_context(StandIn(context_length=None), [{"role": "user", "content": "a"}]).num_tokens == 1


@pytest.fixture(scope="module")
def built_in():
    with gqk.load(built_in_checkpoint(), context_length=512) as model:
        yield model


def test_the_built_in_model_says_the_same_again_and_counts_as_its_server_does(built_in):
    conversation = gqk.Conversation("Be brief.")
    for question in ("Why is the sky blue?", "And at night?"):
        answer = conversation.ask(built_in, question, max_new_tokens=12)
        assert answer.finish().prompt_tokens == answer.fit.num_tokens
    assert conversation.replay(built_in).messages == conversation.messages


def test_two_cells_may_use_one_model_at_once(built_in):
    first = gqk.Conversation().ask(built_in, "Count to ten.", max_new_tokens=10, temperature=0)
    next(first)
    second = gqk.Conversation().ask(built_in, "Count to ten.", max_new_tokens=10, temperature=0)
    first.finish()
    assert second.finish().text == first.reply.text


def test_calls_that_a_model_asks_for_are_kept_and_go_on_in_the_next_prompt(tmp_path):
    model = StandIn(answer=(ToolCall("weather", {"city": "Oslo"}), ToolCall("", {}, "weather{")))
    conversation = gqk.Conversation()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    conversation.ask(model, "Is it cold?", tools=[tool]).finish()
    answer = gqk.Conversation.load(conversation.save(tmp_path / "talk.json")).path[-1]
    assert answer.settings["tools"][0]["function"]["name"] == "weather"
    assert [call["function"] for call in answer.message["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": "Oslo"}}
    ]
    assert "weather(city='Oslo')." in end_note(answer)
    assert "weather{ (it cannot be read)." in end_note(answer)
