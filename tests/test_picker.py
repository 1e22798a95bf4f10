"""Picker without a browser, on a stand-in for `load`: what it shows, what it does, what it refuses."""

import sys
import threading
from types import SimpleNamespace

import pytest
from stand_ins import Loader, click, wait_for

from gemma_qat_kit.catalog import SIZES, catalog
from gemma_qat_kit.errors import BrokenCheckpointError, CancelledError, NotPublishedError, UnknownNameError
from gemma_qat_kit.widgets import Picker, picker, picker_facts
from gemma_qat_kit.widgets.look import escape


@pytest.fixture
def loader(monkeypatch):
    stand_in = Loader()
    monkeypatch.setitem(sys.modules, "gemma_qat_kit.load", SimpleNamespace(load=stand_in.load))
    monkeypatch.setattr(picker, "_kept", picker._Kept())
    return stand_in


@pytest.mark.parametrize("size", SIZES)
def test_every_size_shows_each_of_its_formats_and_its_call(loader, size):
    shown = Picker(size)
    assert [value for _, value in shown._format.options] == [row.format for row in catalog(size=size, role="chat")]
    for row in catalog(size=size, role="chat"):
        shown._format.value = row.format
        call = f"gqk.load({row.size!r}, {row.alternative if row.unavailable else row.format!r})"
        assert escape(call.replace("'", '"')) in shown._facts.value or row.unavailable


def test_an_unpublished_format_is_listed_with_its_reason_and_cannot_be_loaded(loader):
    shown = Picker("26B-A4B", "w4a16")
    row = catalog(size="26B-A4B", format="w4a16", role="chat")[0]
    assert ("w4a16 (not published)", "w4a16") in shown._format.options
    assert escape(row.unavailable[1:]) in shown._facts.value
    assert escape(row.alternative) in shown._facts.value
    assert shown._load_button.disabled
    with pytest.raises(NotPublishedError, match=row.alternative):
        shown.load()
    assert loader.calls == []


def test_a_wrong_size_or_format_is_refused_with_a_suggestion(loader):
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        Picker("E2BB")
    with pytest.raises(UnknownNameError, match="Did you mean 'mobile'"):
        Picker("E2B", "mobil")
    with pytest.raises(NotPublishedError):
        Picker("smollm2-135m", "mobile")


def test_the_built_in_model_downloads_nothing(loader):
    assert "nothing: this model is built in" in Picker()._facts.value


def test_the_download_and_the_memory_are_those_of_the_plan(loader):
    plan = picker_facts.plan_memory("E2B", "mobile")
    facts = Picker("E2B", "mobile")._facts.value
    assert picker_facts.readable_bytes(plan.download_bytes) in facts
    assert picker_facts.readable_bytes(plan.needed_bytes) in facts
    assert f"{picker_facts.readable_bytes(plan.written_bytes)} more on disk" in facts


@pytest.mark.parametrize(("free_bytes", "words"), [(2**40, ": fits"), (2**20, "Will not fit:")])
def test_memory_is_held_against_what_is_free(loader, free_bytes, words):
    row = catalog(size="E2B", format="q4_0", role="chat")[0]
    machine = SimpleNamespace(gpu=None, ram_available_bytes=free_bytes, formats=(), downloaded=frozenset())
    assert words in picker_facts.facts_html(row, machine)


def test_memory_of_a_machine_that_cannot_be_read_is_left_open(loader):
    row = catalog(size="E2B", format="q4_0", role="chat")[0]
    machine = SimpleNamespace(gpu=None, ram_available_bytes=None, formats=(), downloaded=frozenset())
    facts = picker_facts.facts_html(row, machine)
    assert "fit" not in facts
    assert "could not be read" in facts


def test_a_gpu_counts_only_for_what_runs_on_it(loader):
    gpu = SimpleNamespace(name="Tesla <T4>", free_bytes=2**40)
    machine = SimpleNamespace(gpu=gpu, ram_available_bytes=2**20, formats=(), downloaded=frozenset())
    on_gpu, on_cpu = (catalog(size="E2B", format=name, role="chat")[0] for name in ("bf16", "mobile"))
    assert "Tesla &lt;T4&gt;" in picker_facts.facts_html(on_gpu, machine)
    assert "Tesla" not in picker_facts.facts_html(on_cpu, machine)


def test_a_format_that_does_not_work_here_says_why(loader):
    verdict = SimpleNamespace(format="q4_0", works=False, reason="<no engine>")
    machine = SimpleNamespace(gpu=None, ram_available_bytes=2**40, formats=(verdict,), downloaded=frozenset())
    row = catalog(size="E2B", format="q4_0", role="chat")[0]
    assert "&lt;no engine&gt;" in picker_facts.facts_html(row, machine)


def test_changing_the_size_keeps_the_format_where_the_size_has_it(loader):
    shown = Picker("E2B", "mobile")
    shown._size.value = "E4B"
    assert shown.choice == ("E4B", "mobile")
    shown._size.value = "smollm2-135m"
    assert shown.choice == ("smollm2-135m", "q4_1")


def test_load_returns_the_model_and_the_same_choice_is_loaded_once(loader):
    shown = Picker()
    assert shown.model is None
    model = shown.load()
    assert shown.model is model
    assert shown.load() is model
    assert loader.calls == [("smollm2-135m", "q4_1")]
    assert "is loaded" in shown._status.value


def test_another_choice_closes_the_model_before_it_loads(loader):
    shown = Picker()
    first = shown.load()
    shown._size.value = "E2B"
    assert not first.is_closed
    second = shown.load()
    assert first.is_closed
    assert shown.model is second


def test_running_the_cell_again_keeps_the_choice_and_the_model(loader):
    first = Picker("smollm2-135m")
    first._size.value = "E2B"
    model = first.load()
    again = Picker("smollm2-135m")
    assert again.choice == first.choice
    assert again.load() is model
    other = Picker("E4B")
    assert other.choice == ("E4B", "q4_0")
    assert other.model is None


def test_two_pickers_that_load_at_once_load_one_model(loader):
    loader.gate.clear()
    first, again = Picker(), Picker()
    click(first._load_button)
    click(again._load_button)
    loader.gate.set()
    model = again.load()
    first.load()
    assert loader.models == [model]


def test_a_model_that_was_closed_is_loaded_again(loader):
    shown = Picker()
    shown.load().close()
    assert not shown.load().is_closed
    assert len(loader.calls) == 2


def test_the_button_loads_with_progress_and_locks_the_choice(loader):
    loader.gate.clear()
    shown = Picker()
    click(shown._load_button)
    wait_for(lambda: shown._bar.value == 0.5)
    assert shown._size.disabled
    assert shown._load_button.disabled
    assert not shown._cancel_button.disabled
    assert "512 MiB of 1.00 GiB" in shown._bar_label.value
    loader.gate.set()
    wait_for(lambda: "is loaded" in shown._status.value)
    assert shown.model is loader.models[0]
    assert not shown._size.disabled
    assert shown._cancel_button.disabled


def test_pressing_load_twice_loads_once(loader):
    loader.gate.clear()
    shown = Picker()
    click(shown._load_button)
    click(shown._load_button)
    loader.gate.set()
    assert shown.load() is shown.model
    assert len(loader.calls) == 1


def test_cancel_stops_the_load_and_leaves_nothing(loader):
    loader.gate.clear()
    shown = Picker()
    click(shown._load_button)
    wait_for(lambda: loader.calls)
    click(shown._cancel_button)
    loader.gate.set()
    wait_for(lambda: "Cancelled" in shown._status.value)
    assert shown.model is None
    assert not shown._load_button.disabled


def test_a_cancelled_load_raises_in_the_cell_that_waits_for_it(loader):
    loader.gate.clear()
    shown = Picker()
    threading.Timer(0.2, lambda: (shown.cancel(), loader.gate.set())).start()
    with pytest.raises(CancelledError, match="Press Load"):
        shown.load()


def test_an_interrupt_in_the_waiting_cell_cancels_the_load(loader, monkeypatch):
    def interrupted(done, refresh):
        loader.gate.set()
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    loader.gate.clear()
    shown = Picker()
    monkeypatch.setattr(picker.pump, "refresh_until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shown.load()
    assert not shown._load_button.disabled


def test_an_error_shows_its_three_parts_in_the_widget_and_raises_in_the_cell(loader):
    loader.error = BrokenCheckpointError("The file <b>x</b> is cut.", "It has 3 bytes.", "Load it again.")
    shown = Picker()
    with pytest.raises(BrokenCheckpointError):
        shown.load()
    status = shown._status.value
    for part in ("<p>The file &lt;b&gt;x&lt;/b&gt; is cut.</p>", "<p>It has 3 bytes.</p>", "<p>Load it again.</p>"):
        assert part in status
    loader.error = None
    assert shown.load() is shown.model
    assert "alert" not in shown._status.value


def test_every_control_has_a_name_for_screen_readers(loader):
    shown = Picker()
    named = [shown._size, shown._format, shown._load_button, shown._cancel_button]
    assert all(control.description for control in named)
    assert 'role="status" aria-live="polite"' in shown._status.value
