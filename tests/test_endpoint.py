"""An OpenAI-compatible server as a model: what is sent, what is read, and how an answer is stopped."""

import gc
import json
import threading
import time

import pytest
from fake_server import STALL, FakeServer, answer_of, event

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.errors import ModelClosedError
from gemma_qat_kit.generation import Settings, Stream

SETTINGS = Settings(False, 16, 1.0, 0.95, 64, None)
KEY = "sk-secret-123"


def stream_of(server, settings=SETTINGS, question="Why?"):
    return Stream(EndpointEngine(server.url, KEY).stream([{"role": "user", "content": question}], settings))


def test_a_server_is_loaded_by_its_address_and_chats():
    with FakeServer(answer_of("Bl", "ue.")) as server, gqk.load(server.url, token=KEY) as model:
        assert (model.name, model.engine, model.context_length) == ("model-a", "endpoint", None)
        reply = model.chat("Why?")
    assert (reply.text, reply.finish_reason, reply.prompt_tokens, reply.new_tokens) == ("Blue.", "stop", 5, 2)
    assert model.memory().parts == {}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/llm", "/llm/v1/", "/lähm/v1"])
def test_the_address_may_have_a_path_and_v1(path):
    with FakeServer(answer_of("a")) as server:
        engine = EndpointEngine(server.url + path)
        list(engine.stream("x", SETTINGS))
        base = path.replace("ä", "%C3%A4").strip("/").removesuffix("v1").strip("/")
        base = f"/{base}/v1" if base else "/v1"
        assert [asked[1] for asked in server.asked] == [f"{base}/models", f"{base}/completions"]
        assert engine.address == server.url


def test_a_chat_sends_messages_settings_and_key():
    with FakeServer(answer_of("a")) as server:
        list(stream_of(server, Settings(True, 9, 0.5, 0.9, 0, 7)))
        method, path, headers, body = server.asked[-1]
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/chat/completions", f"Bearer {KEY}")
    assert body == {
        "model": "model-a", "messages": [{"role": "user", "content": "Why?"}], "stream": True,
        "stream_options": {"include_usage": True}, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 0,
        "seed": 7, "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip


def test_a_raw_prompt_goes_to_completions_and_an_unset_seed_is_not_sent():
    text = {"choices": [{"text": "blue", "finish_reason": "length"}]}
    with FakeServer([b"data: " + json.dumps(text).encode() + b"\n\n"]) as server:
        stream = Stream(EndpointEngine(server.url).stream("The sky is", Settings(False, 9, 0, 0.9, 0, None)))
        assert list(stream) == ["blue"]
        _, path, headers, body = server.asked[-1]
    assert stream.reply.finish_reason == "length"
    assert (path, body["prompt"], body["top_k"]) == ("/v1/completions", "The sky is", 1)  # 0 would take a sort a token
    assert not {"seed", "messages", "chat_template_kwargs"} & body.keys()
    assert "Authorization" not in headers


def test_a_model_can_be_named_without_a_list():
    with FakeServer(models=[]) as server:
        assert EndpointEngine(server.url, model="mine").model == "mine"
        assert server.asked == []


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_come_apart_from_the_answer(name):
    pieces = [event({name: "Hm"}), event({name: ".", "content": None}), event({"content": "Blue."}), event({}, "stop")]
    with FakeServer(pieces) as server:
        stream = stream_of(server)
        assert [(piece, piece.is_thought) for piece in stream] == [("Hm", True), (".", True), ("Blue.", False)]
    assert (stream.reply.thoughts, stream.reply.text) == ("Hm.", "Blue.")


def test_text_passes_through_unchanged():
    text = "<script>alert(1)</script> &amp; \x1b[31m \u202e \0 data: {} \r\n\n ${x} é 日本 🙂"
    with FakeServer(answer_of(*text)) as server:
        assert "".join(stream_of(server)) == text


SPELLINGS = {
    "no space after the colon": lambda raw: raw.replace(b"data: ", b"data:"),
    "CRLF": lambda raw: raw.replace(b"\n", b"\r\n"),
    "CR": lambda raw: raw.replace(b"\n", b"\r"),
    "comments that keep it alive": lambda raw: b": ping\n\n" + raw.replace(b"\n\n", b"\n\n: ping\n\n:\n"),
    "other fields": lambda raw: raw.replace(b"data: ", b"event: message\nid: 7\nretry: 10\ndata: "),
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "data over several lines": lambda raw: raw.replace(b", ", b",\ndata: ").replace(b'": ', b'":\ndata:'),
    "empty events": lambda raw: b"\n\n" + raw.replace(b"\n\n", b"\n\n\n\n"),
    "no space at all": lambda raw: raw.replace(b": ", b":").replace(b", ", b","),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("cut", ["in one piece", "byte by byte"])
def test_every_valid_spelling_of_events_is_read(spelling, cut):
    raw = spelling(b"".join(answer_of("Bl", "é🙂", "日", ".")).replace(b"\\u00e9\\ud83d\\ude42", "é🙂".encode()))
    assert "🙂".encode() in raw
    chunks = [raw] if cut == "in one piece" else [raw[i : i + 1] for i in range(len(raw))]
    with FakeServer(chunks) as server:
        stream = stream_of(server)
        assert list(stream) == ["Bl", "é🙂", "日", "."]
    assert (stream.reply.finish_reason, stream.reply.new_tokens) == ("stop", 4)


@pytest.mark.parametrize("closes", [False, True])
def test_an_answer_may_end_with_its_connection(closes):
    with FakeServer(answer_of("a", "b"), closes=closes) as server:
        assert list(stream_of(server)) == ["a", "b"]


def test_the_mark_of_the_end_ends_an_answer_that_gives_no_reason():
    with FakeServer([event({"content": "a"}), b"data: [DONE]\n\n", STALL]) as server:
        stream = stream_of(server)
        assert list(stream) == ["a"]
    assert stream.reply.finish_reason == "stop"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "5"}])
def test_tokens_are_counted_by_piece_where_the_server_does_not_count(usage):
    with FakeServer([event({"content": "a"}), event({"content": "b"}, "stop"), event(usage=usage)]) as server:
        stream = stream_of(server)
        list(stream)
    assert (stream.reply.prompt_tokens, stream.reply.new_tokens) == (None, 2)


STALLS = {
    "before it answers": ([STALL], False, []),
    "before the first piece": ([event({"role": "assistant"}), STALL], False, []),
    "between two pieces": ([event({"content": "a"}), STALL], False, ["a"]),
    "in an event": ([event({"content": "a"}), b'data: {"choi', STALL], False, ["a"]),
    "on a connection that ends with the answer": ([event({"content": "a"}), STALL], True, ["a"]),
}


@pytest.mark.parametrize(("answer", "closes", "came"), STALLS.values(), ids=STALLS)
def test_a_stalled_server_is_left_at_once(answer, closes, came):
    with FakeServer(answer, closes=closes) as server:
        stream = stream_of(server)
        seconds = seconds_to_cancel(stream, server)
    assert stream.reply.text == "".join(came)
    assert stream.reply.finish_reason == "cancelled"
    assert seconds < 1  # the server would keep still for 30


def seconds_to_cancel(stream, server):
    """Read a stream in another thread until its server keeps still, cancel, and return the time that ending took."""
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    assert server.stalls.wait(10)
    time.sleep(0.05)  # the reader has taken what came
    started = time.perf_counter()
    stream.cancel()
    reader.join(10)
    return time.perf_counter() - started


def test_a_stream_that_is_cancelled_before_it_is_read_asks_nothing():
    with FakeServer(answer_of("a")) as server:
        stream = stream_of(server)
        stream.cancel()
        assert list(stream) == []
        assert [asked[0] for asked in server.asked] == ["GET"]


def test_a_half_read_answer_that_is_dropped_frees_its_connection():
    with FakeServer([event({"content": "a"}), *[event({"content": "x" * 60_000})] * 200]) as server:
        stream = stream_of(server)
        next(stream)
        source = stream.source
        del stream
        gc.collect()
        assert source._socket.fileno() == -1


def test_a_closed_model_answers_no_more():
    with FakeServer(answer_of("a")) as server:
        model = gqk.load(server.url)
        model.close()
        model.close()
        with pytest.raises(ModelClosedError) as caught:
            model.stream("Why?")
    assert caught.value.wrong == "This model is closed."
    assert caught.value.allowed == "A closed model answers no more."
    assert caught.value.next_step == "Load it again."


def test_a_server_that_counts_no_tokens_is_asked_once():
    with FakeServer(status=404, body=b"no") as server:
        engine = EndpointEngine(server.url)
        assert [engine.num_tokens([{"role": "user", "content": "a"}]) for _ in range(2)] == [None, None]
        asked = [path for _, path, _, _ in server.asked if path != "/v1/models"]
        assert asked == ["/v1/chat/completions/input_tokens", "/tokenize"]


def test_a_closed_server_counts_nothing():
    with FakeServer() as server:
        engine = EndpointEngine(server.url)
        engine.close()
        with pytest.raises(ModelClosedError):
            engine.num_tokens([])
