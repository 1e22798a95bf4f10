"""One model for a class: several chats at once, the queue, the key, and what is said when the server ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.server_queue import Queue
from gemma_qat_kit.errors import EndpointError
from gemma_qat_kit.memory.parts import KEY_VALUES
from gemma_qat_kit.recording import settings_of

LENGTH = 1024
ROOT = Path(__file__).parent.parent
QUESTIONS = ["the sky", "a blue sky is the", "sky sky the the", "is the blue a"]


def start(tiny, **settings):
    return gqk.serve(tiny("12B", "q4_0"), num_chats=2, context_length=LENGTH, report=lambda progress: None, **settings)


@pytest.fixture(scope="module")
def served(tiny):
    with start(tiny) as served:
        yield served


@pytest.fixture
def clients(served):
    return [gqk.load(served.address, token=served.key) for _ in QUESTIONS]


def ask_all(clients, *, is_endless=False, **settings):
    """Ask each client its question at once; return the streams and the threads that read them."""
    streams = [client.stream(q, temperature=0, **settings) for client, q in zip(clients, QUESTIONS, strict=True)]
    for stream in streams:
        stream.source._body["ignore_eos"] = is_endless
    readers = [threading.Thread(target=_read, args=(stream,)) for stream in streams]
    for reader in readers:
        reader.start()
    return streams, readers


def _read(stream):
    try:
        list(stream)
    except EndpointError as err:
        stream.error = err


def wait_for(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_four_chats_at_two_places_each_get_the_answer_that_they_get_alone(clients):
    alone = [client.chat(q, temperature=0, max_new_tokens=8).text for client, q in zip(clients, QUESTIONS, strict=True)]
    streams, readers = ask_all(clients, max_new_tokens=8)
    for reader in readers:
        reader.join(60)
    assert len(set(alone)) == 4
    assert [stream.reply.text for stream in streams] == alone


def test_the_queue_is_told_to_the_class_and_a_place_is_given_on(served, clients):
    assert clients[0].queue().places == served.queue().places == 2
    streams, readers = ask_all(clients, is_endless=True, max_new_tokens=10_000)
    assert wait_for(lambda: clients[3].queue().waiting == 2)
    assert wait_for(lambda: sum(bool(stream.reply.text) for stream in streams) == 2)
    assert (served.queue().busy, str(served.queue())) == (2, "2 of 2 places busy, 2 waiting")
    waits = [stream for stream in streams if not stream.reply.text]
    waits[0].cancel()  # llama.cpp counts it among those who wait until it would be its turn
    for stream in [stream for stream in streams if stream.reply.text]:
        stream.cancel()
    assert wait_for(lambda: waits[1].reply.text)
    assert not waits[0].reply.text
    for stream in streams:
        stream.cancel()
    for reader in readers:
        reader.join(10)
    assert wait_for(lambda: (served.queue().busy, served.queue().waiting) == (0, 0))
    assert served.queue().new_tokens > 0


def test_each_chat_has_the_whole_context(clients):
    """Two prompts that do not fit in it together; the second is read while the first still answers."""
    assert clients[0].context_length == LENGTH
    first, second = (client.stream("the sky " * 150, temperature=0, max_new_tokens=n)
                     for client, n in zip(clients, (10_000, 4), strict=False))  # fmt: skip
    first.source._body["ignore_eos"] = True
    next(first)
    list(second)
    assert second.reply.prompt_tokens > LENGTH / 2
    assert first.reply.finish_reason == "unfinished"
    first.cancel()


@pytest.mark.parametrize("key", [None, "", "wrong-key-1234"])
def test_without_the_key_nothing_is_told(served, key):
    with pytest.raises(EndpointError, match="refused the key"):
        gqk.load(served.address, token=key)


def test_no_client_learns_where_the_file_lies_by_the_models_name(clients, tiny):
    assert clients[0].name == tiny("12B", "q4_0").name


def test_the_text_of_a_served_model_is_the_line_for_the_class(served):
    line = f'gqk.load("{served.address}", token="{served.key}")'
    assert line in str(served)
    assert line in served._repr_html_().replace("&quot;", '"')
    assert f"answers 2 at once, {LENGTH} tokens each" in str(served)
    assert "Only this machine reaches it." in str(served)
    with eval(line, {"gqk": gqk}) as model:
        assert wait_for(lambda: model.queue() == Queue(0, 0, 2, model.queue().new_tokens))


def test_a_key_and_a_port_of_ones_own(tiny):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with start(tiny, key='my"key<1>', port=port) as served:
        assert served.address == f"http://127.0.0.1:{port}/v1"
        assert gqk.load(served.address, token='my"key<1>').queue().places == 2
        assert "my\\&quot;key&lt;1&gt;" in served._repr_html_()
        assert settings_of(served.model) is None or settings_of(served.model).batch_size == 2


def test_a_killed_server_is_said_to_each_client_and_what_came_is_kept(tiny):
    with start(tiny) as served:
        clients = [gqk.load(served.address, token=served.key) for _ in QUESTIONS]
        streams, readers = ask_all(clients, is_endless=True, max_new_tokens=10_000)
        assert wait_for(lambda: sum(bool(stream.reply.text) for stream in streams) == 2)
        started = [stream for stream in streams if stream.reply.text]
        served.model.runner._child.send_signal(signal.SIGKILL)
        for reader in readers:
            reader.join(10)
        said = [(stream.error.wrong, stream.error.next_step) for stream in streams]
        assert all(wrong.startswith(("The connection to", served.address[:-3])) for wrong, _ in said)
        assert all("server" in next_step for _, next_step in said)
        assert len(started) == 2
        assert all(stream.reply.text and stream.reply.finish_reason == "unfinished" for stream in started)
        assert clients[0].queue() is served.queue() is None
        assert "llama.cpp has stopped. Call serve again." in str(served)
        with pytest.raises(EndpointError, match=r"llama\.cpp has stopped"):
            served.model.chat("the")


def test_a_closed_server_is_said_to_whoever_waits(tiny):
    served = start(tiny)
    client = gqk.load(served.address, token=served.key)
    stream = client.stream("the sky", max_new_tokens=10_000)
    stream.source._body["ignore_eos"] = True
    next(stream)
    served.close()
    with pytest.raises(EndpointError, match="before the answer ended"):
        list(stream)
    assert stream.reply.text
    assert served.queue() is None
    assert str(served).strip().endswith("is served no more.")
    with pytest.raises(EndpointError, match="does not answer"):
        client.chat("the")


ALONE = """
import sys, time
import gemma_qat_kit as gqk
with gqk.serve(sys.argv[1], num_chats=2, context_length=1024, report=lambda progress: None) as served:
    print(served.address, served.key, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_server_ends_with_the_process_that_started_it(tiny, ending):
    parent = subprocess.Popen(
        [sys.executable, "-c", ALONE, tiny("12B", "q4_0")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=ROOT, start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    address, key = parent.stdout.readline().split()
    stream = gqk.load(address, token=key).stream("the sky", max_new_tokens=10_000)
    stream.source._body["ignore_eos"] = True
    next(stream)
    parent.send_signal(ending)
    with pytest.raises(EndpointError):
        list(stream)
    parent.wait(10)
    parent.stdout.close()
    with pytest.raises(EndpointError, match="does not answer"):
        gqk.load(address, token=key)


def test_the_cache_of_every_chat_is_planned_as_llama_cpp_allocates_it(built_in):
    with gqk.serve("smollm2-135m", num_chats=3, context_length=300, report=lambda progress: None) as served:
        (measured,) = (part for part in served.model.runner._buffers if part.name == KEY_VALUES)
        plan = gqk.plan_memory("smollm2-135m", batch_size=3, context_length=300)
        assert measured.nbytes == plan.parts[KEY_VALUES]
        assert settings_of(served.model).batch_size == 3
        assert gqk.load(served.address, token=served.key).sampling == served.model.sampling
