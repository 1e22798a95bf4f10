"""What `serve` refuses before it loads anything, and whom it warns of."""

import socket
from importlib import import_module

import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.serving import Serving, draw_key
from gemma_qat_kit.errors import BadSettingError, NotEnoughMemoryError


def refusal(*source, kind=BadSettingError, **settings):
    with pytest.raises(kind) as caught:
        gqk.serve(*source or ("smollm2-135m",), **settings)
    error = caught.value
    assert all(part.endswith(".") for part in (error.wrong, error.allowed, error.next_step)), error
    return error


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    def load(*_):
        raise AssertionError("went on to load")

    monkeypatch.setattr(import_module("gemma_qat_kit.load"), "_fetch", load)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(port=port)
    assert error.wrong == f"Port {port} of 127.0.0.1 is taken."
    assert "port=0" in error.next_step


def test_a_port_that_is_not_allowed_is_said(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert refusal(port=80).wrong == "Port 80 of 127.0.0.1 is not allowed to this user."


@pytest.mark.parametrize("port", [-1, 65536, "8000", 80.0, True, None])
def test_a_port_that_is_none_is_shown(port):
    assert refusal(port=port).wrong == f"port={port!r} cannot be used."


@pytest.mark.parametrize("host", ["192.0.2.7", "no such host", "é" * 70, None, 3])
def test_a_host_that_is_not_this_machine_is_shown(host):
    error = refusal(host=host)
    assert error.wrong == f"host={host!r} is no address of this machine."
    assert '"0.0.0.0"' in error.next_step


@pytest.mark.parametrize("key", ["", "short", "with a space", "schlüssel-1", "line\nbreak", 12345678])
def test_a_key_that_is_no_good_is_refused_unseen(key):
    error = refusal(key=key)
    assert "cannot be used" in error.wrong
    assert not key or str(key) not in str(error)
    assert "A key is always required" in error.allowed


def test_a_drawn_key_is_good_and_another_each_time():
    keys = {draw_key() for _ in range(20)}
    assert len(keys) == 20
    assert all(Serving(key=key).key == key for key in keys)
    assert not any(key in repr(Serving(key=key)) for key in keys)


@pytest.mark.parametrize("num_chats", [0, -1, 257, 1.5, "8", True])
def test_so_many_chats_there_are_not(num_chats):
    assert refusal(num_chats=num_chats).allowed == "It is a whole number from 1 to 256."


def test_a_server_is_not_served_again():
    error = refusal("http://127.0.0.1:8080/v1")
    assert error.wrong == "'http://127.0.0.1:8080/v1' is a server already."


def test_what_runs_in_transformers_is_not_served():
    error = refusal("E2B", "w4a16")
    assert error.wrong == "E2B w4a16 runs in transformers, which answers one chat at a time."
    assert "vLLM" in error.next_step


def test_more_chats_than_fit_are_refused_with_the_number_that_fits(monkeypatch):
    """The number is the plan's: one more does not fit."""

    def needed(num_chats):
        return gqk.plan_memory("E2B", "q4_0", batch_size=num_chats, context_length=8192).needed_bytes

    free = needed(5) + 1
    monkeypatch.setattr(import_module("gemma_qat_kit.environment"), "free_memory", lambda: (free, None))
    assert needed(5) <= free < needed(6)
    error = refusal("E2B", "q4_0", kind=NotEnoughMemoryError, num_chats=30, context_length=8192)
    assert error.next_step.startswith("Serve fewer chats at once (num_chats=5 fits; the others wait)")
    free = needed(1) - 1
    assert "load what fits" in refusal("E2B", "q4_0", kind=NotEnoughMemoryError, context_length=8192).next_step


@pytest.mark.parametrize(
    ("host", "is_alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("classroom.example", False)],
)  # fmt: skip
def test_only_loopback_is_this_machine_alone(host, is_alone):
    assert Serving(host=host).is_loopback is is_alone


def test_others_are_given_an_address_that_they_can_reach():
    assert Serving(host="192.168.1.5").url_for_others("http://192.168.1.5:81") == "http://192.168.1.5:81/v1"
    assert Serving(host="::1").url_for_others("http://[::1]:81") == "http://[::1]:81/v1"
    everywhere = Serving(host="0.0.0.0")
    assert everywhere.url_here("http://0.0.0.0:81") == "http://127.0.0.1:81"
    assert "0.0.0.0" not in everywhere.url_for_others("http://127.0.0.1:81")
    assert Serving(host="::").url_here("http://[::]:81") == "http://[::1]:81"


def test_a_machine_without_a_network_gives_its_name(monkeypatch):
    def unreachable(*_):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert Serving(host="0.0.0.0").url_for_others("http://127.0.0.1:81") == f"http://{socket.gethostname()}:81/v1"


class Runner:
    address, is_closed, is_running, context_length = "http://192.168.1.5:81", False, True, 4096


def test_who_serves_a_network_or_from_colab_is_warned(monkeypatch):
    from gemma_qat_kit.model import Model

    module = import_module("gemma_qat_kit.serve")
    text = str(module.Served(Model("E2B", "q4_0", None, Runner()), Serving(host="192.168.1.5")))
    assert "Every machine that reaches this address can use it with the key. Nothing is encrypted" in text
    assert "Colab" not in text
    monkeypatch.setattr(module, "read_place", lambda: "colab")
    text = str(module.Served(Model("E2B", "q4_0", None, Runner()), Serving()))
    assert "A free Colab runtime may not serve others through a tunnel: its terms forbid it." in text
