"""Receipts of loads and answers: recorded beside their plan, at their peak, and never at the answer's expense."""

import gc
import threading
import warnings
from types import SimpleNamespace

import pytest
from stand_ins import wait_for

from gemma_qat_kit import recording
from gemma_qat_kit.catalog import Sampling
from gemma_qat_kit.errors import EndpointError
from gemma_qat_kit.generation import Delta, Finish
from gemma_qat_kit.memory import receipts_file
from gemma_qat_kit.memory.measure import MemoryUse, Moment, Peak
from gemma_qat_kit.memory.parts import ACTIVATIONS, ENGINE, KEY_VALUES, LOGITS, TEXT_LAYERS, Part
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.receipts import receipts
from gemma_qat_kit.model import Model
from gemma_qat_kit.recording import load_receipt

MIB = 2**20
HELD = (Part(TEXT_LAYERS, 300 * MIB, "ram"), Part(ENGINE, 50 * MIB, "ram"))


class Runner:
    """An engine that answers three pieces, takes memory for it, and gives it back."""

    context_length, is_closed = 512, False

    def __init__(self, name="transformers", nbytes=0, failure=None):
        self.name, self.nbytes, self.failure, self.measuring = name, nbytes, failure, []

    def stream(self, messages, settings):
        return self

    def __iter__(self):
        block = bytearray(b"x") * self.nbytes
        for text in ("Light ", "scatters", "."):
            self.measuring.append(bool(samplers()))
            yield Delta(text)
        if self.failure:
            raise self.failure
        del block
        yield Finish("stop", 20, 3)

    def cancel(self):
        pass

    def memory(self):
        return HELD


def samplers():
    """The threads that measure; one that was told to stop may take a moment."""
    return [thread for thread in threading.enumerate() if thread.name == "measure_memory" and thread.is_alive()]


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    path = tmp_path / "receipts.jsonl"
    monkeypatch.setenv("GQK_RECEIPTS", str(path))
    monkeypatch.setattr(receipts_file, "_said", set())
    return path


def model(runner=None, size="smollm2-135m", format="float32"):
    return Model(size, format, Sampling(1.0, 0.95, 64), runner or Runner())


def test_an_answer_leaves_a_receipt_with_the_plan_for_its_length():
    runner = Runner()
    reply = model(runner).chat("Why?")
    (row,) = receipts()
    assert (row.event, row.name, row.settings["context_length"]) == ("chat", "smollm2-135m float32", 23)
    plan = plan_memory("smollm2-135m", "float32", context_length=23)
    work = sum(plan.parts.get(name, 0) for name in (KEY_VALUES, ACTIVATIONS, LOGITS))
    assert row.predicted.total_bytes == plan.total_bytes
    assert row.predicted.parts[ACTIVATIONS] == work  # which transformers frees together
    assert row.measured.parts[TEXT_LAYERS] == 300 * MIB
    assert (row.numbers["tokens"], row.numbers["seconds"]) == (23, round(reply.seconds, 3))
    assert runner.measuring == [True, True, True]


def test_the_sampler_runs_only_while_an_answer_is_generated():
    gc.collect()  # of an answer that another test left alone
    wait_for(lambda: not samplers())
    stream = model().stream("Why?")
    assert not samplers()
    next(stream)
    assert samplers()
    for _ in stream:
        pass
    wait_for(lambda: not samplers())


def test_llama_cpp_allocates_its_whole_context_whatever_the_length():
    model(Runner("llama_cpp"), format="q4_1").chat("Why?")
    assert receipts()[0].settings["context_length"] == 512


def test_what_an_answer_took_and_gave_back_is_its_work():
    class Slow(Runner):
        def __iter__(self):
            for piece in super().__iter__():
                yield piece
                if isinstance(piece, Finish):
                    return
                threading.Event().wait(0.15)  # for the sampler, which looks every 20 ms

    model(Slow(nbytes=200 * MIB)).chat("Why?")
    assert receipts()[0].measured.parts[ACTIVATIONS] == pytest.approx(200 * MIB, abs=12 * MIB)


def test_a_raw_text_is_recorded_too_and_a_local_checkpoint_has_no_plan():
    model(size=None, format="bf16").generate("Once")
    (row,) = receipts()
    assert (row.name, row.predicted) == ("local bf16", None)


def test_an_answer_that_breaks_off_or_is_left_alone_is_not_recorded():
    with pytest.raises(EndpointError):
        model(Runner(failure=EndpointError("a", "b", "c"))).chat("Why?")
    stream = model().stream("Why?")
    next(stream)
    del stream
    assert len(receipts()) == 0
    stream = model().stream("Why?")
    del stream  # never asked for a piece


def test_a_server_elsewhere_is_not_measured(monkeypatch):
    monkeypatch.setattr(recording, "record", lambda *_, **__: pytest.fail("it recorded"))
    runner = Runner("endpoint")
    model(runner, None, "endpoint").chat("Why?")
    with load_receipt(None) as loaded:
        loaded(model(runner, None, "endpoint"))


def test_off_measures_nothing(monkeypatch):
    monkeypatch.setenv("GQK_RECEIPTS", "off")
    monkeypatch.setattr(recording, "measure_memory", lambda: pytest.fail("it measured"))
    assert str(model().chat("Why?")) == "Light scatters."
    with load_receipt(None) as loaded:
        loaded(model())


@pytest.mark.parametrize("broken", ["measure_memory", "record", "plan_for", "receipts_path"])
@pytest.mark.parametrize("filter", ["always", "error"])
def test_a_recorder_that_fails_breaks_no_answer_and_no_load(monkeypatch, broken, filter):
    def fail(*_, **__):
        raise RuntimeError("broken on purpose")

    recording._plan.cache_clear()
    monkeypatch.setattr(recording, broken, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filter)
        assert str(model().chat("Why?")) == "Light scatters."
        with load_receipt(None) as loaded:
            loaded(model())
    if filter == "always":
        assert ["broken on purpose" in str(warning.message) for warning in caught] == [True]


def test_a_load_is_compared_with_what_is_there_before_the_first_question():
    with load_receipt(None) as loaded:
        block = bytearray(b"x") * (100 * MIB)
        threading.Event().wait(0.2)
        del block
        loaded(model())
    (row,) = receipts()
    plan = plan_memory("smollm2-135m", "float32", context_length=512)
    assert row.event == "load"
    assert not {KEY_VALUES, ACTIVATIONS, LOGITS} & set(row.predicted.parts)
    assert row.predicted.parts[TEXT_LAYERS] == plan.parts[TEXT_LAYERS]
    assert row.measured.placed == HELD
    assert row.numbers["predicted_peak_bytes"] == plan.load_peak_bytes
    assert row.numbers["measured_peak_bytes"] == pytest.approx(450 * MIB, abs=12 * MIB)


def test_the_plan_is_made_for_what_was_asked_of_load():
    asked = SimpleNamespace(kv_format="q8_0", per_layer_table="disk", text_only=True, drafter=False, token="secret")
    with load_receipt(asked) as loaded:
        small = loaded(model(Runner("llama_cpp"), "E2B", "q4_0"))
    small.chat("Why?")
    plan = plan_memory("E2B", "q4_0", context_length=512, kv_format="q8_0")
    for row in receipts():
        assert row.settings["kv_format"] == "q8_0"
        assert row.predicted.parts[KEY_VALUES] == plan.parts[KEY_VALUES]
        assert "token" not in row.settings
    assert [row.event for row in receipts()] == ["load", "chat"]


def test_what_the_allocator_keeps_is_not_counted_twice():
    held = MemoryUse((Part(TEXT_LAYERS, 300, "gpu"), Part(ACTIVATIONS, 100, "gpu")))
    for peak, work in ((380, 100), (450, 150)):
        seen = SimpleNamespace(peak=Peak(Moment(0, peak, 0, 0), peak, 0, 0), after=Moment(1, 310, 0, 0))
        assert recording._at_peak(held, seen).parts == {TEXT_LAYERS: 300, ACTIVATIONS: work}


def test_a_load_that_fails_is_not_recorded_and_its_error_is_the_loaders():
    with pytest.raises(MemoryError), load_receipt(None):
        raise MemoryError
    assert len(receipts()) == 0
