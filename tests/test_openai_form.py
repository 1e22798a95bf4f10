"""What goes to an OpenAI-compatible server with images, sound and tools, and how its calls come back."""

import base64
import io
import json

import pytest
from fake_server import FakeServer, answer_of, event
from PIL import Image
from test_attachments import audio, image, picture, recording

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.transformers_stream import ThoughtSplitter
from gemma_qat_kit.errors import BadSettingError, EndpointError
from gemma_qat_kit.testing import tiny_tokenizer
from gemma_qat_kit.tools import ToolCall, tool_schemas

TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}


def calls_of(*deltas, reason="tool_calls"):
    events = [event({"tool_calls": [delta]}) for delta in deltas]
    return [event({"role": "assistant", "content": None}), *events, event({}, reason), b"data: [DONE]\n\n"]


def piece(index, arguments, name=None, **more):
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | more


def asked(conversation, answer=None, **settings):
    """Return the body that a server gets, and the reply."""
    with FakeServer(answer or answer_of("yes")) as server, gqk.load(server.url) as model:
        assert set(model.takes) == {"image", "audio"}
        reply = model.chat(conversation, **settings)
        return server.asked[-1][3], reply


def test_images_and_sound_go_as_data():
    png, wav = picture("PNG"), recording()
    words = {"type": "text", "text": "What?"}
    body, reply = asked([{"role": "user", "content": [image(png), words, audio(wav)]}])
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    sound = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    assert body["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}}, words, {"type": "input_audio", "input_audio": sound}
    ]  # fmt: skip
    assert "tools" not in body
    assert reply.text == "yes"


def test_a_webp_goes_as_a_png_which_llama_cpp_can_read():
    body, _ = asked([{"role": "user", "content": [image(picture("WEBP", (7, 5)))]}])
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).size == (7, 5)


def test_tools_are_offered_and_calls_come_back_in_order_and_whole():
    answer = calls_of(piece(0, '{"a"', "add", id="x"), piece(1, "", "now"), piece(0, ":1}"), piece(1, "{}"))
    body, reply = asked("Add.", answer, tools=[TOOL])
    assert body["tools"] == tool_schemas([TOOL])
    assert reply.tool_calls == (ToolCall("add", {"a": 1}), ToolCall("now", {}))
    assert (reply.text, reply.finish_reason) == ("", "stop")


def test_what_came_of_a_call_is_told():
    _, reply = asked("Add.", calls_of(piece(0, '{"a": 1}', "add")), tools=[TOOL])
    history = [{"role": "user", "content": "Add."}, reply.message, {"role": "tool", "name": "add", "content": "2"}]
    body, _ = asked(history, tools=[TOOL])
    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert body["messages"][1]["tool_calls"] == [call]
    assert body["messages"][2] == {"role": "tool", "name": "add", "content": "2", "tool_call_id": "call_0"}


@pytest.mark.parametrize("broken", ['{"a": ', "[1]", "<script>", "{" * 100_000])
def test_arguments_that_are_no_json_are_kept_as_they_came(broken):
    _, reply = asked("Add.", calls_of(piece(0, broken, "add"), piece(1, {"b": 2}, "sub"), {"function": None}))
    assert reply.tool_calls[0] == ToolCall("add", {}, "add" + broken)
    assert reply.tool_calls[1] == ToolCall("sub", {"b": 2})
    assert not reply.tool_calls[2].is_valid or reply.tool_calls[2].name == ""


@pytest.mark.parametrize("nonsense", [7, "x", [1], {"index": []}, {"index": 0, "function": 7}])
def test_calls_that_are_none_end_the_answer_with_a_message(nonsense):
    with pytest.raises(EndpointError, match="something else than an answer"):
        asked("Add.", calls_of(nonsense))


def test_a_wrong_tool_is_refused_before_anything_is_sent():
    with FakeServer(answer_of("yes")) as server, gqk.load(server.url) as model:
        with pytest.raises(BadSettingError, match="cannot be offered as tools"):
            model.stream("Add.", tools=[{}])
        assert not [one for one in server.asked if one[0] == "POST"]


def pieces_of(text):
    """Split what a model writes, token by token."""
    tokenizer = tiny_tokenizer()

    class Tokenizer:
        convert_tokens_to_ids = staticmethod(tokenizer.token_to_id)
        decode = staticmethod(tokenizer.decode)

    splitter = ThoughtSplitter(Tokenizer)
    pieces = [piece for i in tokenizer.encode(text).ids for piece in splitter.push(i)]
    return pieces + list(splitter.flush())


CALL = '<|tool_call>call:add{a:<|"|>the sky<|"|>,b:[1,{c:true}]}'


@pytest.mark.parametrize("end", ["<tool_call|>", "<tool_call|><|tool_response>", "<turn|>", "<eos>", ""])
def test_a_call_is_read_from_the_tokens_of_gemma(end):
    *words, call = pieces_of("blue sky" + CALL + end)
    assert "".join(words) == "blue sky"
    assert call == ToolCall("add", {"a": "the sky", "b": [1, {"c": True}]})


def test_calls_thoughts_and_the_answer_are_kept_apart():
    pieces = pieces_of(f"<|channel>thought\nthe<channel|>is{CALL}<tool_call|>{CALL}<tool_call|>was<|tool_call>sky")
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    texts = [piece for piece in pieces if not isinstance(piece, ToolCall)]
    assert "".join(piece for piece in texts if piece.is_thought) == "the"
    assert "".join(piece for piece in texts if not piece.is_thought) == "iswas"
    assert [call.name for call in calls] == ["add", "add", ""]
    assert calls[2].text == "sky"


def test_a_call_without_end_is_kept_as_it_was_written():
    text = "call:add{a:" + "{b:" * 5000
    assert pieces_of("<|tool_call>" + text) == [ToolCall("add", {}, text)]


def test_the_template_of_a_transformers_model_tells_it_of_tools_and_results(tiny):
    with gqk.load(tiny("12B", "bf16"), context_length=1024) as model:
        seen = []
        model.runner._encode, encode = lambda *args: seen.append(encode(*args)) or seen[-1], model.runner._encode
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        model.chat([*history, {"role": "tool", "name": "add", "content": "2"}], tools=[TOOL], max_new_tokens=1)
        text = model.hf[1].decode(seen[0]["input_ids"][0])
    assert '<|tool>declaration:add{description:<|"|>Add.<|"|>' in text
    assert text.endswith('<|tool_call>call:add{a:1}<tool_call|><|tool_response>response:add{value:<|"|>2<|"|>}'
                         "<tool_response|>")  # fmt: skip


def test_messages_are_what_json_can_carry():
    body, _ = asked([{"role": "user", "content": [image(picture("GIF"))]}])
    assert json.loads(json.dumps(body)) == body
