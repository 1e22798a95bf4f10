"""What the widgets share: text made harmless, errors in three parts, and updates that come from the right thread."""

import threading

import pytest
from stand_ins import wait_for

from gemma_qat_kit import widgets
from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import error_html, escape


def test_widgets_are_found_by_name_and_a_wrong_name_is_refused():
    assert {"Picker", "ChatPanel"} <= set(dir(widgets))
    with pytest.raises(AttributeError, match="Picker"):
        widgets.Pickr  # noqa: B018


def test_an_error_of_the_kit_shows_its_three_parts():
    shown = error_html(BrokenCheckpointError("<b>x</b> is cut.", "It has 3 bytes.", "Load it again."))
    assert "<p>&lt;b&gt;x&lt;/b&gt; is cut.</p><p>It has 3 bytes.</p><p>Load it again.</p>" in shown


def test_any_other_error_shows_its_kind():
    assert "OSError: disk &lt;gone&gt;" in error_html(OSError("disk <gone>"))


def test_foreign_text_becomes_harmless_html():
    assert escape("<script>&\"'") == "&lt;script&gt;&amp;&quot;&#x27;"
    assert escape("a\u202eb\x1b[31mc\u2066d\x00e\u200f\ufeff") == "abcde"
    assert escape("two\nlines\tक\u200dष") == "two\nlines\tक\u200dष"


def test_outside_a_kernel_the_work_and_its_updates_run_beside_the_caller():
    seen, gate = [], threading.Event()
    assert pump.kernel_loop() is None
    done = pump.start(gate.wait, lambda: seen.append(gate.is_set()))
    wait_for(lambda: len(seen) > 1)
    assert not done.is_set()
    gate.set()
    wait_for(lambda: seen[-1])


def test_work_that_fails_still_ends(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    done = pump.start(lambda: 1 / 0, lambda: None)
    assert done.wait(5)


def test_a_panel_that_could_not_be_redrawn_once_is_redrawn_and_says_so_in_the_log(caplog):
    gate, seen = threading.Event(), []

    def refresh():
        seen.append(gate.is_set())
        if len(seen) < 3:
            raise ImportError("half a module")

    pump.start(gate.wait, refresh)
    wait_for(lambda: len(seen) > 3)
    gate.set()
    wait_for(lambda: seen[-1])
    assert [record.exc_info[0] for record in caplog.records] == [ImportError]


def test_a_waiting_cell_shows_the_last_state():
    seen, done = [], threading.Event()
    done.set()
    pump.refresh_until(done, lambda: seen.append(1))
    assert seen == [1]
