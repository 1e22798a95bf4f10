"""Loading with llama.cpp: what is said when it fails, and that no child outlives its load or its parent."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gemma_qat_kit.engines.llama_cpp import LlamaCppEngine
from gemma_qat_kit.errors import (
    BadSettingError,
    BrokenCheckpointError,
    CancelledError,
    MissingLibraryError,
    NotEnoughMemoryError,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_child_is_left():
    """After each test every process that it started has ended."""
    before = psutil.Process().children(recursive=True)
    yield
    started = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert psutil.wait_procs(started, timeout=5)[1] == []


@pytest.fixture
def fake_llama(tmp_path, monkeypatch):
    """Return a function that puts a module of some lines in xllamacpp's place, for the child only."""

    def write(code):
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "xllamacpp.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{ROOT}")

    return write


def load(path, **options):
    LlamaCppEngine(path, **{"context_length": 256} | options).close()


def refusal(path, kind, **options):
    with pytest.raises(kind) as caught:
        load(path, **options)
    assert all(part.endswith(".") for part in (caught.value.wrong, caught.value.allowed)), caught.value
    return caught.value


def test_progress_runs_from_the_file_to_the_whole_of_it(built_in):
    told = []
    load(built_in, report=told.append)
    assert {progress.stage for progress in told} == {"loading"}
    assert all(progress.total_bytes == built_in.stat().st_size for progress in told)
    assert all(0 <= progress.done_bytes <= progress.total_bytes for progress in told)
    assert told[-1].fraction == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, CancelledError])
@pytest.mark.parametrize("moment", ["at the first report", "at the last report"])
def test_a_load_that_is_stopped_leaves_no_process(built_in, fake_llama, kind, moment):
    error = kind("a", "b", "c") if kind is CancelledError else kind()
    if moment == "at the first report":
        fake_llama("import time; time.sleep(60)")

    def report(progress):
        if moment == "at the first report" or progress.fraction == 1:
            raise error

    with pytest.raises(kind):
        load(built_in, report=report)


def test_numpys_integers_are_contexts(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=np.int64(512))
    assert engine.context_length == 512
    engine.close()


def test_the_context_is_rounded_up_and_the_model_says_so(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=300)
    assert engine.context_length == 512
    engine.close()


@pytest.mark.parametrize("length", [0, -5, 8193, 10**9, "512", 512.0])
def test_a_context_that_the_model_does_not_take_is_refused_before_the_load(built_in, length):
    error = refusal(built_in, BadSettingError, context_length=length)
    assert error.wrong == f"context_length={length!r} cannot be used."
    assert error.allowed == "This model takes 1 to 8,192 tokens."


def changed(path, tiny, key, value):
    """Write the tiny E2B with another number under one of its keys."""
    content = tiny("E2B", "q4_0").read_bytes()
    at = content.index(key) + len(key) + 4  # behind the key's type
    path.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    return path


@pytest.mark.parametrize(
    ("shared_layers", "said"),
    [(2, "tensor 'blk.15.attn_k.weight' not found"), (19, "GGML_ASSERT(hparams.n_layer_kv_from_start >= 2) failed")],
    ids=["refused by llama.cpp", "ends in abort()"],
)
def test_a_file_that_llama_cpp_cannot_load_is_refused_with_its_reason(tiny, tmp_path, shared_layers, said):
    path = changed(tmp_path / "some.gguf", tiny, b"gemma4.attention.shared_kv_layers", shared_layers)
    error = refusal(path, BrokenCheckpointError)
    assert error.wrong.startswith(f"llama.cpp cannot load {path}: ")
    assert error.wrong.endswith(f"{said}.")
    assert "Download it again" in error.next_step


def test_a_damaged_header_is_refused_before_a_process_starts(tmp_path, fake_llama):
    (tmp_path / "some.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 99)
    assert "header is damaged" in refusal(tmp_path / "some.gguf", BrokenCheckpointError).wrong


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", NotEnoughMemoryError, "The memory was too small while llama.cpp loaded"),
        ("import sys; sys.exit('error: std::bad_alloc')", NotEnoughMemoryError, "The memory was too small"),
        ("import sys; sys.exit(3)", BrokenCheckpointError, "its process ended with code 3"),
        ("raise RuntimeError('no such thing.')", BrokenCheckpointError, ": no such thing."),
        ("print('{}', flush=True); import os; os.abort()", BrokenCheckpointError, "its process ended with code -6"),
        ("import os; os.close(0); os.close(1); os._exit(4)", BrokenCheckpointError, "ended with code 4"),
    ],
)
def test_a_child_that_fails_to_load_is_explained(built_in, fake_llama, code, kind, said):
    fake_llama(code)
    error = refusal(built_in, kind)
    assert said in error.wrong
    assert str(built_in) in error.wrong
    assert error.next_step


def test_without_xllamacpp_the_command_to_install_it_is_said(built_in, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refusal(built_in, MissingLibraryError)
    assert error.wrong == "xllamacpp is not installed."
    assert error.next_step == "Run: pip install xllamacpp"


def test_a_file_of_the_working_folder_is_not_taken_for_a_module(tiny, tmp_path, monkeypatch):
    for name in ("xllamacpp", "json", "contextlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken for a module')")
    path = tiny("12B", "q4_0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # "." would be the working folder on purpose
    monkeypatch.chdir(tmp_path)
    load(path)


def test_a_container_with_fewer_cores_gets_fewer_threads(tiny, fake_llama, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    fake_llama(
        "from types import SimpleNamespace as N\n"
        "ggml_type = N(GGML_TYPE_F16=1)\n"
        "def CommonParams(): return N(model=N(), cpuparams=N(), cpuparams_batch=N(), sampling=N())\n"
        f"def Server(p): open({str(seen)!r}, 'w').write(str(p.cpuparams.n_threads)); raise RuntimeError('seen')\n"
    )
    monkeypatch.setattr("gemma_qat_kit.engines.llama_cpp_process.read_cpu_count", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    refusal(tiny("12B", "q4_0"), BrokenCheckpointError)
    assert seen.read_text() == "1"


@pytest.mark.parametrize(("cores", "spins"), [(1, "10000"), (4, "10000"), (5, None)])
def test_on_a_few_cores_threads_do_not_wait_in_a_loop(built_in, monkeypatch, cores, spins):
    monkeypatch.setattr("gemma_qat_kit.engines.llama_cpp_process.read_cpu_count", lambda: cores)
    environments = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, env, **options: environments.append(env) or 1 / 0)
    for setting in ({}, {"GOMP_SPINCOUNT": "7"}):
        monkeypatch.setattr(os, "environ", setting)
        with pytest.raises(ZeroDivisionError):
            load(built_in)
    assert environments[0].get("GOMP_SPINCOUNT") == spins
    assert environments[1]["GOMP_SPINCOUNT"] == "7"  # the user's own choice


PARENT = """
import sys, time
from pathlib import Path
from gemma_qat_kit.engines.llama_cpp import LlamaCppEngine

def report(progress):
    if progress.fraction < 1:
        print("loading", flush=True)

engine = LlamaCppEngine(Path(sys.argv[1]), context_length=256, report=report)
print("ready", flush=True)
time.sleep(60)
"""
STUCK = "import ctypes; ctypes.PyDLL(None).sleep(20)"  # holds Python's lock, as a load does


@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_a_child_ends_with_its_parent_even_in_the_middle_of_a_load(built_in, fake_llama, moment):
    if moment == "loading":
        fake_llama(STUCK)
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, built_in], stdout=subprocess.PIPE, text=True, env=environment
    )
    with parent:
        assert moment in iter(lambda: parent.stdout.readline().strip(), "")
        children = psutil.Process(parent.pid).children()
        assert len(children) == 1
        if moment == "loading":
            time.sleep(0.3)  # it is in the load now
        parent.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(children, timeout=2)[1] == []
