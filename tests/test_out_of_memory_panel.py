"""OutOfMemoryPanel without a browser: what it offers, loads and says."""

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from stand_ins import StandIn, click, wait_for

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.loading_note import EndedKernel
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for, plan_memory
from gemma_qat_kit.out_of_memory import explain_oom
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.widgets import OutOfMemoryPanel, out_of_memory_panel


@pytest.fixture(autouse=True)
def kernel(tmp_path, monkeypatch):
    """A kernel without notes; a shorter context and a smaller model are cheaper."""

    def cheaper(plan):
        shorter = replace(plan.settings, context_length=512)
        return [("a context of 512 tokens", plan_for(shorter)), ("E2B", plan_for(replace(shorter, size="E2B")))]

    monkeypatch.setattr(MemoryPlan, "cheaper", cheaper, raising=False)
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path))


@pytest.fixture
def failure():
    return explain_oom(MemoryError(), plan_memory("E4B", "q4_0").settings)


def test_each_cheaper_setting_is_a_button_that_loads_in_place(failure, monkeypatch):
    calls, gate = [], threading.Event()

    def load(size, format, *, context_length, text_only, drafter, device, report):
        calls.append((size, format, context_length, device))
        report(Progress("downloading", 2**29, 2**30))
        gate.wait(5)
        return StandIn(size)

    monkeypatch.setitem(sys.modules, "gemma_qat_kit.load", SimpleNamespace(load=load))
    shell = SimpleNamespace(user_ns={})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    panel = OutOfMemoryPanel(failure, into="model")
    assert [button.description.split(" (")[0] for button in panel._buttons] == [
        "Load: a context of 512 tokens", "Load: E2B"]  # fmt: skip
    click(panel._buttons[0])
    wait_for(lambda: "512 MiB of 1.00 GiB" in panel._status.value)
    assert all(button.disabled for button in panel._buttons)
    click(panel._buttons[1])
    gate.set()
    assert panel.wait().name == "E4B"
    assert calls == [("E4B", "q4_0", 512, "cpu")]
    wait_for(lambda: "Loaded as `model`" in panel._status.value)
    assert shell.user_ns["model"] is panel.model
    first = panel.model
    click(panel._buttons[1])
    assert panel.wait().name == "E2B"
    assert first.is_closed, "it goes before the next one comes"


def test_what_load_has_no_argument_for_is_told_but_has_no_button(failure, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma_qat_kit.load", SimpleNamespace(load=lambda size, format, *, report: None))
    panel = OutOfMemoryPanel(failure)
    assert panel._buttons == []
    assert "a context of 512 tokens" in panel.children[1].value


def test_a_load_that_fails_again_says_so_in_the_panel(failure):
    error = BadSettingError("<wrong>.", "Allowed.", "Next.")

    def run(settings, *, report):
        raise error

    panel = OutOfMemoryPanel(failure, run=run)
    click(panel._buttons[0])
    with pytest.raises(BadSettingError):
        panel.wait()
    wait_for(lambda: "<p>&lt;wrong&gt;.</p>" in panel._status.value)
    assert panel.model is None


def test_without_a_failure_it_looks_for_a_kernel_that_ended(failure, monkeypatch):
    assert "Nothing ran out" in OutOfMemoryPanel().children[1].value
    ended = EndedKernel(failure.settings, 2**34, failure.cheaper)
    monkeypatch.setattr(out_of_memory_panel, "last_failure", lambda: ended)
    panel = OutOfMemoryPanel(run=lambda settings, report: settings)
    assert "The last kernel ended" in panel.children[1].value
    click(panel._buttons[0])
    assert panel.wait().context_length == 512
