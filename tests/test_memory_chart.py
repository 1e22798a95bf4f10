"""MemoryChart without a browser: it shows at once, moves while the cell runs, and is whole at the end."""

import os
import signal
import threading
import time

import pytest
from stand_ins import wait_for

from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.widgets import MemoryChart, memory_chart


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed; and no thread of a chart or a measurement left at the end."""
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    yield displayed
    wait_for(lambda: not {"MemoryChart", "measure_memory"} & {thread.name for thread in threading.enumerate()})


def test_it_is_shown_at_once_and_drawn_while_the_cell_runs(shown):
    pictures = []
    with MemoryChart() as chart:
        assert shown == [chart]
        first = chart._picture.value
        assert "<svg" in first
        chart._picture.observe(lambda change: pictures.append(change["new"]), names="value")
        wait_for(lambda: len(pictures) >= 2)
        assert chart.use.is_running
    assert not chart.use.is_running


def test_the_last_picture_is_whole_and_comes_from_the_cells_own_thread(monkeypatch):
    threads = []
    draw = memory_chart.draw
    monkeypatch.setattr(memory_chart, "draw", lambda use: threads.append(threading.current_thread()) or draw(use))
    with MemoryChart() as chart:
        chart.mark("<half way>")
    assert threads[-1] is threading.main_thread()
    assert "&lt;half way&gt;" in chart._picture.value
    assert chart._picture.value == draw(chart.use)


def test_it_is_drawn_at_most_four_times_a_second(monkeypatch):
    drawn = []
    monkeypatch.setattr(memory_chart, "draw", lambda use: drawn.append(use) or str(len(drawn)))
    begun = time.monotonic()
    with MemoryChart():
        wait_for(lambda: len(drawn) >= 5)
    assert len(drawn) <= 4 * (time.monotonic() - begun) + 3  # before, at the start and at the end


def test_a_front_end_that_refuses_updates_from_a_thread_gets_the_picture_at_the_end(monkeypatch):
    refused = threading.Event()
    draw = memory_chart.draw

    def refuse(use):
        if threading.current_thread() is not threading.main_thread():
            refused.set()
            raise LookupError("no parent message in this thread")
        return draw(use)

    monkeypatch.setattr(memory_chart, "draw", refuse)
    with MemoryChart() as chart:
        assert refused.wait(5)
    assert "<svg" in chart._picture.value


def test_ctrl_c_ends_it_and_leaves_the_chart():
    def press():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt), MemoryChart() as chart:
        press()
    assert not chart.use.is_running
    assert "<svg" in chart._picture.value


def test_a_measurement_that_runs_already_is_shown_until_it_ends_and_not_stopped(shown):
    with measure_memory() as use:
        with MemoryChart(use) as chart:
            wait_for(lambda: len(use.samples) > 2)
        assert use.is_running
        moving = MemoryChart(use)
        assert moving._watcher is not None
    wait_for(lambda: not moving._watcher.is_alive())
    assert moving._picture.value == memory_chart.draw(use)
    assert shown == [chart]


def test_a_measurement_that_is_over_is_drawn_once():
    with measure_memory() as use:
        use.mark("here")
    chart = MemoryChart(use)
    assert chart._watcher is None
    assert "here" in chart._picture.value


def test_a_chart_can_be_used_again():
    with MemoryChart() as chart:
        chart.mark("mark one")
    with chart:
        chart.mark("mark two")
    assert "mark two" in chart._picture.value
    assert "mark one" not in chart._picture.value
