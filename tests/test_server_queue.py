"""The queue of a server, as it tells it, and a server that keeps still: how long an answer is waited for."""

import json
import socket
import threading

import pytest
from fake_server import STALL, FakeServer, answer_of, event

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.engines.server_queue import Queue, parse_queue
from gemma_qat_kit.errors import EndpointError
from gemma_qat_kit.generation import Settings, Stream

SETTINGS = Settings(False, 16, 1.0, 0.95, 64, None)
# As vllm/engine/metrics prints them, one line for each engine of a data-parallel server.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="google/gemma-4 {E2B}"} 3.0
vllm:num_requests_running{engine="1",model_name="google/gemma-4"} 2.0
vllm:num_requests_waiting{engine="0",model_name="google/gemma-4"} 4.0 1795782563000
vllm:generation_tokens_total{engine="0",model_name="google/gemma-4"} 1.2e3
"""


def test_vllms_figures_are_added_up_over_its_engines():
    assert parse_queue(VLLM.replace(" {E2B}", "")) == Queue(5, 4, None, 1200)


@pytest.mark.parametrize(
    "text",
    ["", "no", "\0", "{", "}", "vllm:num_requests_running 1\n", "llamacpp:requests_processing NaN\n" * 2,
     "llamacpp:requests_processing -1\nllamacpp:requests_deferred inf\n", "ollama_requests 3\n"],
)  # fmt: skip
def test_figures_that_do_not_tell_give_no_queue(text):
    assert parse_queue(text) is None


def test_a_queue_reads_as_a_line():
    assert str(Queue(2, 3, 8)) == "2 of 8 places busy, 3 waiting"
    assert str(Queue(1, 0)) == "1 answering, none waiting"


def test_a_model_of_llama_cpps_server_tells_its_queue_and_its_places():
    with FakeServer() as server:
        server.pages["/metrics"] = b"llamacpp:requests_processing 2\nllamacpp:requests_deferred 5\n"
        server.pages["/props"] = json.dumps({"total_slots": 2}).encode()
        model = gqk.load(f"{server.url}/v1", token="k")
        assert model.queue() == model.queue() == Queue(2, 5, 2)
        asked = [(path, headers["Authorization"]) for _, path, headers, _ in server.asked[1:]]
        assert asked == [(path, "Bearer k") for path in ("/metrics", "/props", "/metrics")]


@pytest.mark.parametrize("props", [None, b"7", b"{}", b'{"total_slots": "2"}', b"<html>"])
def test_places_that_nobody_names_are_unknown(props):
    with FakeServer() as server:
        server.pages = {"/metrics": VLLM.encode()} | ({} if props is None else {"/props": props})
        assert gqk.load(server.url).queue().places is None


def test_a_server_that_does_not_tell_or_is_gone_has_no_queue():
    with FakeServer() as server:
        model = gqk.load(server.url)
        assert model.queue() is None
    assert model.queue() is None


def test_a_stall_between_two_tokens_is_an_error_that_keeps_what_came():
    error, stream = stalled([event({"content": "a"}), STALL], stall_seconds=0.1)
    assert error.wrong.endswith(" has sent nothing for 0.1 seconds.")
    assert error.allowed == "An answer comes without such a pause; what came so far is kept."
    assert "model.runner.stall_seconds" in error.next_step
    assert (stream.reply.text, stream.reply.finish_reason) == ("a", "unfinished")


def test_a_server_that_only_says_it_is_there_has_stalled():
    error, stream = stalled([event({"content": "a"}), *[b": ping\n\n"] * 10**6], stall_seconds=0.1)
    assert "has sent nothing for 0.1 seconds" in error.wrong
    assert stream.reply.text == "a"


@pytest.mark.parametrize("sent", [[], [event({"role": "assistant"})], [b": ping\n\n"]])
def test_the_first_token_may_take_longer_than_the_next(sent):
    """Here it waits, with a stall of no time at all, until the other limit."""
    error, _ = stalled([*sent, STALL], first_token_seconds=0.3, stall_seconds=0.001)
    assert "0.3 seconds" in error.wrong or "TimeoutError" in error.wrong


def stalled(answer, **limits):
    with FakeServer(answer) as server:
        engine = EndpointEngine(server.url)
        vars(engine).update(limits)
        stream = Stream(engine.stream("x", SETTINGS))
        with pytest.raises(EndpointError) as caught:
            list(stream)
    return caught.value, stream


def test_a_reader_that_pauses_is_no_stall():
    with FakeServer(answer_of("a", "b", "c")) as server:
        engine = EndpointEngine(server.url)
        engine.stall_seconds = 0.2
        pieces = iter(Stream(engine.stream("x", SETTINGS)))
        first = next(pieces)
        threading.Event().wait(0.3)
        assert [first, *pieces] == ["a", "b", "c"]


def test_a_host_that_vanishes_is_noticed_while_an_answer_is_waited_for():
    with FakeServer([event({"content": "a"}), STALL]) as server:
        stream = EndpointEngine(server.url).stream("x", SETTINGS)
        pieces = iter(stream)
        next(pieces)
        assert stream._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        stream.cancel()
