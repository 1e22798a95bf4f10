"""The number of threads is measured, once a session, with ggml's own products."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit.engines import llama_cpp_process as process
from gemma_qat_kit.engines import llama_cpp_threads as threads


@pytest.fixture
def fresh():
    """Nothing was measured yet, and nothing of a test is remembered."""
    process.num_threads.cache_clear()
    yield
    process.num_threads.cache_clear()


@pytest.fixture
def child(monkeypatch, tmp_path, fresh):
    """Return a function that lets a script of a test do the measuring, on a machine of so many cores."""

    def become(text, cores=4):
        script = tmp_path / "child.py"
        script.write_text(text)
        monkeypatch.setattr(process, "_THREADS", script)
        monkeypatch.setattr(process, "read_cpu_count", lambda: cores)

    return become


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [({1: 10.0, 2: 5.0, 4: 2.6}, 4), ({1: 10.0, 2: 9.5}, 1), ({1: 10.0, 2: 70.0}, 1), ({1: 9.0, 2: 5.0, 4: 4.9}, 2)],
)
def test_the_fewest_threads_that_are_about_as_fast_are_taken(milliseconds, best):
    assert threads.fewest_fast(milliseconds) == best


def test_ggml_computes_the_layers_with_every_number_of_threads():
    timings = threads.time_threads([1, 2])
    assert timings.keys() == {1, 2}
    assert min(timings.values()) > 0.01  # 47 MB of weights are not read in ten microseconds
    assert threads._graph()(1) == 0  # GGML_STATUS_SUCCESS


def test_the_model_computes_with_what_was_measured_and_says_so(fresh):
    with gqk.load("smollm2-135m", context_length=256) as model:
        chosen = model.runner.num_threads
        assert 1 <= chosen <= len(os.sched_getaffinity(0))
        assert f"llama_cpp on {chosen} thread" in repr(model)
        log = process.read_log(model.runner._log)
        assert re.search(rf"n_threads = {chosen} \(n_threads_batch = {chosen}\)", log)
    assert process.num_threads.cache_info().misses == 1


def test_a_measurement_is_remembered_and_tries_powers_of_two_and_every_core(child):
    child("import json\nprint(json.dumps({'num_threads': json.loads(input())}))", cores=6)
    assert process.num_threads() == [1, 2, 4, 6]
    child("raise SystemExit(1)")
    assert process.num_threads() == [1, 2, 4, 6]


@pytest.mark.parametrize(
    ("script", "cores", "expected"),
    [
        ("raise SystemExit('no such function')", 4, 4),
        ("print('{}')", 4, 4),
        ("import time; time.sleep(60)", 4, 1),
        ("raise SystemExit('one core is not measured')", 1, 1),
    ],
)
def test_where_it_cannot_be_measured_there_is_still_a_number(child, monkeypatch, script, cores, expected):
    monkeypatch.setattr(process, "_MEASURE_SECONDS", 0.5)
    child(script, cores)
    assert process.num_threads() == expected


def test_the_script_stands_alone():
    """It runs without this package on its path, as `-P` starts it."""
    source = Path(importlib.util.find_spec(threads.__name__).origin).read_text()
    assert "gemma_qat_kit" not in source
