"""What goes into a generation and what comes out: messages, settings, and a Stream that is read, stopped or broken."""

import gc
import json
import threading
from contextlib import closing

import numpy as np
import pytest

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.generation import Delta, Finish, Reply, Settings, Stream
from gemma_qat_kit.messages import as_messages, strip_thoughts
from gemma_qat_kit.tools import ToolCall

GOOD = {"thinking": False, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95, "top_k": 64, "seed": None}


def turn(role, content):
    return {"role": role, "content": content}


class Source:
    """An engine's stream that gives what it is told to; a piece that is an exception is raised."""

    def __init__(self, *pieces):
        self.pieces, self.num_cancels, self.stop = pieces, 0, threading.Event()

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            if self.stop.is_set():
                break
            yield piece
        yield Finish("length", 7, 9)

    def cancel(self):
        self.num_cancels += 1
        self.stop.set()


def test_a_question_becomes_a_message():
    assert as_messages("Why?") == [turn("user", "Why?")]


def test_messages_stay_as_they_are_and_the_list_is_a_new_one():
    messages = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", " c ")]
    assert as_messages(messages) == as_messages(tuple(messages)) == messages
    assert as_messages(messages) is not messages


def test_thoughts_of_earlier_answers_are_left_out():
    thought = "<|channel>thought\nHm.\n<channel|>Blue."
    messages = [turn("user", "a"), turn("assistant", thought), turn("user", "b")]
    assert as_messages(messages)[1] == turn("assistant", "Blue.")
    assert messages[1]["content"] == thought


def test_a_question_about_thoughts_is_left_whole():
    question = "What do <|channel> and <channel|> mean?"
    assert as_messages(question) == [turn("user", question)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no thoughts ", "no thoughts "),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|channel>thought\na<channel|>\nb<|channel>thought\nc<channel|> d", "b d"),
        ("b <|channel>thought\nnever ends", "b"),
        ("<|channel>thought\n<channel|>", ""),
        ("ends only<channel|> b", "ends only b"),
        ("", ""),
    ],
)
def test_thought_blocks_are_cut_out(text, answer):
    assert strip_thoughts(text) == answer


@pytest.mark.parametrize(
    "message",
    ["text", None, {}, turn("tool", "x"), turn("user", None), turn("assistant", []), {"role": "user"}],
)
def test_what_is_not_a_message_is_shown(message):
    with pytest.raises(BadSettingError) as caught:
        as_messages([turn("user", "a"), message])
    assert caught.value.wrong == f"{message!r} is not a message."
    assert '"system", "user" or "assistant"' in caught.value.allowed
    assert "Pass a string" in caught.value.next_step


@pytest.mark.parametrize("conversation", [None, 7, b"Why?", turn("user", "Why?")])
def test_what_is_not_a_conversation_is_shown(conversation):
    with pytest.raises(BadSettingError) as caught:
        as_messages(conversation)
    assert caught.value.wrong == f"{conversation!r} is not a conversation."


def test_a_long_wrong_message_is_shown_in_part():
    with pytest.raises(BadSettingError) as caught:
        as_messages([turn("nobody", "x" * 10_000)])
    assert len(caught.value.wrong) < 250


@pytest.mark.parametrize(
    "conversation", ["", " \n", [], [turn("user", "")], [turn("user", "a"), turn("assistant", "b")]]
)
def test_a_conversation_without_a_question_is_refused(conversation):
    with pytest.raises(BadSettingError, match=r"no question to answer\. The last message is the user's.*Add one"):
        as_messages(conversation)


def test_good_settings_are_kept():
    settings = Settings(**GOOD)
    assert (settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k) == (8, 1.0, 0.95, 64)
    assert Settings(**GOOD | {"temperature": 0, "top_k": 0, "top_p": 1, "seed": 0}).seed == 0


def test_numbers_of_numpy_become_numbers_that_json_can_carry():
    numbers = {"max_new_tokens": np.int64(8), "temperature": np.float32(0.5), "top_k": np.int32(3), "seed": np.uint8(1)}
    settings = Settings(**GOOD | numbers)
    assert json.loads(json.dumps(vars(settings)))["temperature"] == 0.5
    assert settings == Settings(**GOOD | {"max_new_tokens": 8, "temperature": 0.5, "top_k": 3, "seed": 1})


BAD = {
    "thinking": ["yes", 1, None],
    "max_new_tokens": [0, -1, 8.0, 2.5, "8", True, None, float("nan"), float("inf"), 2**31],
    "temperature": [-0.1, 10.1, "0.7", True, None, float("nan"), float("inf"), 1j, [1.0]],
    "top_p": [0, -0.5, 1.01, "0.9", True, float("nan")],
    "top_k": [-1, 1.5, "64", True, float("nan"), 2**31],
    "seed": [-1, 2**32 - 1, 0.5, "7", True, float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_that_cannot_be_used_is_named_with_one_that_can(name, value):
    with pytest.raises(BadSettingError) as caught:
        Settings(**GOOD | {name: value})
    assert caught.value.wrong == f"{name}={value!r} cannot be used."
    assert caught.value.allowed.startswith("It is ")
    example = caught.value.next_step.removeprefix(f"Try {name}=").removesuffix(".")
    Settings(**GOOD | {name: json.loads(example.lower())})


def test_a_stream_gives_pieces_and_then_the_reply():
    stream = Stream(Source(Delta.thought("Hm."), Delta("Bl"), Delta("ue")))
    assert [(piece, piece.is_thought) for piece in stream] == [("Hm.", True), ("Bl", False), ("ue", False)]
    reply = stream.reply
    assert (str(reply), reply.text, reply.thoughts) == ("Blue", "Blue", "Hm.")
    assert (reply.finish_reason, reply.prompt_tokens, reply.new_tokens) == ("length", 7, 9)
    assert 0 < reply.first_token_seconds <= reply.seconds == stream.reply.seconds
    assert reply.message == turn("assistant", "Blue")
    assert list(stream) == []


def test_the_reply_grows_while_it_streams():
    stream = Stream(Source(Delta("a"), Delta("b")))
    assert (stream.reply.text, stream.reply.new_tokens, stream.reply.finish_reason) == ("", 0, "unfinished")
    next(stream)
    assert (stream.reply.text, stream.reply.new_tokens, stream.reply.finish_reason) == ("a", 1, "unfinished")
    assert stream.reply.seconds >= stream.reply.first_token_seconds > 0


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_what_came_before_an_error_stays_and_the_engine_is_stopped(error):
    source = Source(Delta("a"), error)
    stream = Stream(source)
    with pytest.raises(type(error)):
        list(stream)
    assert (stream.reply.text, stream.reply.finish_reason, stream.reply.prompt_tokens) == ("a", "unfinished", None)
    assert source.num_cancels == 1
    assert list(stream) == []


def test_cancel_ends_the_iteration_and_keeps_what_came():
    stream = Stream(Source(Delta("a"), Delta("b"), Delta("c")))
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.reply.text, stream.reply.finish_reason, stream.reply.new_tokens) == ("a", "cancelled", 9)


def test_cancel_before_the_first_piece_gives_an_empty_reply():
    stream = Stream(Source(Delta("a")))
    stream.cancel()
    assert list(stream) == []
    assert (stream.reply.text, stream.reply.finish_reason) == ("", "cancelled")


def test_cancel_after_the_end_changes_nothing():
    source = Source(Delta("a"))
    with closing(Stream(source)) as stream:
        list(stream)
    assert (stream.reply.finish_reason, source.num_cancels) == ("length", 0)


def test_closing_a_half_read_stream_stops_the_engine():
    source = Source(Delta("a"), Delta("b"))
    with closing(Stream(source)) as stream:
        next(stream)
    assert (source.num_cancels, stream.reply.text, stream.reply.finish_reason) == (1, "a", "cancelled")


def test_a_forgotten_half_read_stream_stops_the_engine():
    source = Source(Delta("a"), Delta("b"))
    next(Stream(source))
    gc.collect()
    assert source.num_cancels == 1


def test_speed_counts_the_tokens_after_the_first():
    reply = Reply("", "", "stop", 5, new_tokens=11, first_token_seconds=1.0, seconds=3.0)
    assert reply.tokens_per_second == 5.0


@pytest.mark.parametrize(("new_tokens", "seconds"), [(0, 1.0), (1, 3.0), (5, 1.0)])
def test_speed_of_what_is_too_short_to_measure_is_zero(new_tokens, seconds):
    assert Reply("", "", "stop", 5, new_tokens, first_token_seconds=1.0, seconds=seconds).tokens_per_second == 0.0


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def asking(*calls, **more):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)} | more


def answering(name="add", content="2"):
    return {"role": "tool", "name": name, "content": content}


def test_images_and_sound_of_a_user_are_checked():
    parts = [{"type": "image", "image": b"GIF89a\1\0\1\0"}, {"type": "text", "text": "What?"}]
    [message] = as_messages([turn("user", parts)])
    assert message["content"][0] == {"type": "image", "media_type": "image/gif", "data": parts[0]["image"]}
    assert as_messages([message]) == [message]
    assert as_messages([turn("user", parts[:1])])[0]["content"][0]["type"] == "image"  # a question without words
    with pytest.raises(BadSettingError, match=r"is no content of a message"):
        as_messages([turn("user", [{"type": "text"}])])
    with pytest.raises(BadSettingError, match=r"is not a message"):
        as_messages([turn("system", parts), turn("user", "a")])


def test_calls_and_their_answers_get_the_same_ids_in_order():
    other = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    asked = as_messages([turn("user", "a"), asking(CALL, other, CALL), answering("now"), answering(), answering()])
    assert [call["id"] for call in asked[1]["tool_calls"]] == ["call_0", "call_1", "call_2"]
    assert [message["tool_call_id"] for message in asked[2:]] == ["call_1", "call_0", "call_2"]
    assert asked[1]["tool_calls"][1]["function"] == {"name": "now", "arguments": {}}  # from JSON, as OpenAI has it
    assert as_messages(asked) == asked


@pytest.mark.parametrize(
    "history",
    [[], [turn("assistant", "b")], [asking(CALL), answering("sub")], [asking(CALL), answering(), answering()],
     [asking(CALL), turn("user", "b"), answering()]],
)  # fmt: skip
def test_an_answer_to_a_call_that_nobody_made_is_refused(history):
    if not history or history[-1]["role"] != "tool":
        history = [*history, answering()]
    with pytest.raises(BadSettingError, match=r"There is no call of .* to answer\. .* Append reply\.message"):
        as_messages([turn("user", "a"), *history])


@pytest.mark.parametrize(
    "call",
    [None, "add", {}, {"function": None}, {"function": {"name": "a b"}}, {"function": {"name": 1, "arguments": {}}},
     {"function": {"name": "add", "arguments": "{"}}, {"function": {"name": "add", "arguments": "[1]"}},
     {"function": {"name": "add", "arguments": 7}}],
)  # fmt: skip
def test_what_is_no_call_is_refused(call):
    with pytest.raises(BadSettingError, match="is no call of a tool"):
        as_messages([turn("user", "a"), asking(call), turn("user", "b")])


def test_calls_are_kept_apart_from_the_answer_and_go_into_the_history():
    good, broken, nameless = ToolCall("add", {"a": 1}), ToolCall("sub", {}, "call:sub{"), ToolCall("", {}, "nonsense")
    stream = Stream(Source(Delta("Let me see."), good, broken, nameless))
    assert list(stream) == ["Let me see."]
    assert stream.reply.tool_calls == (good, broken, nameless)
    message = stream.reply.message
    assert message["content"] == "Let me see."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "sub"]
    assert as_messages([turn("user", "a"), message, answering(), answering("sub")])
    assert Stream(Source("a")).reply.message.keys() == {"role", "content"}
