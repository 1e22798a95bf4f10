"""A server that is down, refuses, breaks off or talks nonsense: one clear message in three parts, and never the key."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
import traceback

import pytest
from fake_server import FakeServer, answer_of, event

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.errors import BadSettingError, EndpointError
from gemma_qat_kit.generation import Settings, Stream

SETTINGS = Settings(False, 16, 1.0, 0.95, 64, None)
KEY = "sk-secret-123"
A = event({"content": "a"})


def refusal(call, *arguments, kind=EndpointError):
    """Call, expect a refusal in three parts without the key, and return it."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    error = caught.value
    assert all(part and part.endswith(".") for part in (error.wrong, error.allowed, error.next_step)), error
    assert KEY not in "".join(traceback.format_exception(error))
    return error


def refused_answer(server, kind=EndpointError):
    """Ask a server that will not answer; return the refusal and what came before it."""
    stream = Stream(EndpointEngine(server.url, KEY).stream([{"role": "user", "content": "Why?"}], SETTINGS))
    return refusal(list, stream, kind=kind), stream.reply


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8080", "ftp://host/v1", "http://", "http:///v1", "http://host:port/v1", "http://host:99999/v1",
     "http://host:0", "http://[::1/v1", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_address_is_shown(url):
    error = refusal(EndpointEngine, url)
    assert error.wrong == f"{url!r} is not a server's address."
    assert "http://host:port/v1" in error.allowed


def test_a_password_in_an_address_is_not_shown():
    error = refusal(EndpointEngine, f"ftp://me:{KEY}@host/v1?api_key={KEY}")
    assert error.wrong == "'ftp://…@host/v1' is not a server's address."


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key):
    assert refusal(EndpointEngine, "http://127.0.0.1:9", key).wrong == "The API key has a character that no key has."


def test_the_space_around_a_copied_key_is_dropped():
    with FakeServer() as server:
        EndpointEngine(server.url, f" {KEY}\n")
        assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"


def test_nothing_prints_the_key():
    with FakeServer() as server, gqk.load(server.url, token=KEY) as model:
        shown = [repr(model), str(model), model.name, repr(model.runner), str(model.runner), model.runner.address]
        assert not any(KEY in text for text in shown)


@pytest.mark.parametrize("host", ["127.0.0.1", "ex ample", "é" * 70])
def test_a_server_that_is_down_is_named(host):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://{host}:{free.getsockname()[1]}"
    error = refusal(EndpointEngine, f"{address}/v1", KEY)
    assert error.wrong.startswith(f"{address} does not answer (")
    assert error.next_step == "Start the server, or check the address and port."


def test_a_server_that_went_down_after_loading_is_named():
    with FakeServer() as server:
        engine = EndpointEngine(server.url, KEY)
    error = refusal(list, Stream(engine.stream("x", SETTINGS)))
    assert "does not answer (ConnectionRefusedError)" in error.wrong


def test_https_at_a_plain_server_has_no_certificate():
    with FakeServer() as server:
        error = refusal(EndpointEngine, server.url.replace("http", "https"), KEY)
    assert "answers without a valid certificate" in error.wrong
    assert "https needs one" in error.allowed


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_signed_is_not_trusted(tmp_path):
    pem = tmp_path / "own.pem"
    order = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=127.0.0.1"
    subprocess.run([*order.split(), "-keyout", pem, "-out", pem], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with FakeServer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        error = refusal(EndpointEngine, server.url.replace("http", "https"), KEY)
        assert "answers without a valid certificate" in error.wrong
        assert server.asked == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_at_once(status):
    with FakeServer(models=json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()) as server:
        server.models_status = status
        error = refusal(EndpointEngine, server.url, KEY)
    assert error.wrong == f"{server.url} refused the key."
    assert "token=" in error.next_step


def test_a_key_that_is_refused_later_is_said():
    with FakeServer(status=401) as server:
        assert "refused the key" in refused_answer(server)[0].wrong


@pytest.mark.parametrize("status", [404, 405])
def test_a_web_server_without_the_api_is_said(status):
    with FakeServer(models=b"<h1>not here</h1>") as server:
        server.models_status = status
        error = refusal(EndpointEngine, f"{server.url}/blog", KEY)
    assert error.wrong == f"{server.url}/blog/v1 is not an OpenAI-compatible server."
    assert error.allowed == "It answers /v1/models and /v1/chat/completions."


@pytest.mark.parametrize(
    "models",
    [b"<html></html>", b"", b"[]", b"{}", b"3", b'{"data": 3}', b'{"data": [3]}', b'{"data": ["a-model-id"]}',
     b"\xff\xfe\x00", b"[" * 100_000],
)  # fmt: skip
def test_what_answers_something_else_is_no_server(models):
    with FakeServer(models=models) as server:
        assert "is not an OpenAI-compatible server" in refusal(EndpointEngine, server.url, KEY).wrong


@pytest.mark.parametrize("models", [b'{"data": []}', b'{"data": null}', b'{"data": [{"name": "x"}]}'])
def test_a_server_without_a_model_is_said(models):
    with FakeServer(models=models) as server:
        error = refusal(EndpointEngine, server.url, KEY)
    assert error.wrong == f"{server.url} lists no model."


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (500, b'{"error": {"message": "out of memory", "code": 500}}', "answered 500: out of memory."),
        (500, b'{"error": "out of memory"}', "answered 500: out of memory."),
        (502, b"<h1>Bad Gateway</h1>\n", "answered 502: <h1>Bad Gateway</h1>."),
        (503, b'{"error": {"message": "Loading model"}}', "answered 503: Loading model."),
        (404, b'{"error": {"message": "no model model-a"}}', "answered 404: no model model-a."),
        (400, b'["odd"]', 'answered 400: ["odd"].'),
        (429, b"", "answered 429: ."),
        (400, json.dumps({"error": {"message": f"header {KEY}\x1b[31m\n red"}}).encode(), "header … [31m  red."),
        (500, b"\xff" * 5000, "answered 500: \ufffd"),
    ],
)
def test_a_refusal_is_shown_in_the_servers_own_words(status, body, shown):
    with FakeServer(status=status, body=body) as server:
        error, reply = refused_answer(server)
    assert shown in error.wrong
    assert len(error.wrong) < 400
    assert "server's log" in error.next_step
    assert (reply.text, reply.finish_reason) == ("", "unfinished")


def test_a_redirection_is_shown():
    with FakeServer(status=301, headers={"Location": "https://elsewhere/v1"}) as server:
        assert "answered 301: https://elsewhere/v1." in refused_answer(server)[0].wrong


def test_a_prompt_beyond_the_servers_context_is_a_bad_setting_with_its_numbers():
    body = {"type": "exceed_context_size_error", "n_prompt_tokens": 10831, "n_ctx": 4096, "message": "too long"}
    with FakeServer(status=400, body=json.dumps({"error": body}).encode()) as server:
        error, _ = refused_answer(server, BadSettingError)
    assert error.wrong == "The prompt has 10831 tokens."
    assert error.allowed == "With its answer it must fit in context_length=4096."
    assert "larger context_length" in error.next_step


@pytest.mark.parametrize("error", [{"message": f"no memory left {KEY}"}, f"no memory left {KEY}"])
def test_an_error_in_mid_stream_keeps_what_came(error):
    with FakeServer([A, b"data: " + json.dumps({"error": error}).encode() + b"\n\n", A]) as server:
        error, reply = refused_answer(server)
    assert error.wrong == f"{server.url} stopped with an error: no memory left …."
    assert (reply.text, reply.finish_reason) == ("a", "unfinished")


@pytest.mark.parametrize(
    "how",
    [{"cuts": True}, {"closes": True}, {}],
    ids=["in the transfer", "at its end, without a reason", "between events, without a reason"],
)
@pytest.mark.parametrize("rest", [[], [b'data: {"choices": [{"del'], [b": ping\n\n"]], ids=["", "half", "ping"])
def test_a_connection_that_breaks_off_keeps_what_came(how, rest):
    with FakeServer([A, *rest], **how) as server:
        error, reply = refused_answer(server)
    assert error.wrong.startswith(f"The connection to {server.url} was ")
    assert error.wrong.endswith(" before the answer ended.")
    assert error.allowed == "What came so far is kept."
    assert (reply.text, reply.finish_reason) == ("a", "unfinished")


@pytest.mark.parametrize(
    "data",
    [b"{", b"[1]", b"7", b"nonsense", b'{"choices": 3}', b'{"choices": [3]}', b'{"choices": [{"delta": "x"}]}',
     b'{"usage": 3, "choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]}', b"[" * 100_000],
)  # fmt: skip
def test_nonsense_in_mid_stream_keeps_what_came(data):
    with FakeServer([A, b"data: " + data + b"\n\n"]) as server:
        error, reply = refused_answer(server)
    assert error.wrong == f"{server.url} sent something else than an answer."
    assert reply.text.startswith("a")


def test_an_event_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("gemma_qat_kit.engines.server_stream.MAX_BYTES", 2**16)
    with FakeServer([A, b'data: "', *[b"x" * 2**12] * 17]) as server:
        error, reply = refused_answer(server)
    assert "sent something else than an answer" in error.wrong
    assert reply.text == "a"


def test_a_server_that_is_no_http_server_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(5)

        def greet():
            connection, _ = other.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        error = refusal(EndpointEngine, f"http://127.0.0.1:{other.getsockname()[1]}", KEY)
    assert "does not answer (BadStatusLine)" in error.wrong


def test_an_answer_can_be_asked_again_after_a_failure():
    with FakeServer([A], cuts=True) as server:
        engine = EndpointEngine(server.url)
        refusal(list, Stream(engine.stream("x", SETTINGS)))
        server.answer, server.cuts = answer_of("b"), False
        assert list(Stream(engine.stream("x", SETTINGS))) == ["b"]
