"""Building the C kernels: once, for this processor, and what happens where that is not possible."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gemma_qat_kit.formats import native, q4_0

WEIGHT = torch.randn(40, 2**16, generator=torch.Generator().manual_seed(0))  # several parts for the threads


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A kit whose cache is empty and which has built nothing yet."""
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path))
    monkeypatch.delenv("GEMMA_QAT_KIT_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Return a function that makes a shell script the C compiler."""

    def use(script):
        path = tmp_path / "cc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))

    return use


def test_the_kernels_are_built_once_and_then_found(fresh, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler here")
    (built,) = (fresh / "kernels").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert native.library() is not None
    assert [built] == list((fresh / "kernels").iterdir())


def test_another_processor_gets_its_own_build(fresh, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler here")
    native.library.cache_clear()
    monkeypatch.setattr(native, "_processor_features", lambda: "another one")
    native.library()
    assert len(list((fresh / "kernels").iterdir())) == 2


def test_without_a_compiler_torch_computes_the_same_and_says_so_once(fresh, monkeypatch):
    expected = q4_0.quantize(WEIGHT)
    native.library.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(native.SlowKernelsWarning, match="no C compiler on PATH"):
        found = q4_0.quantize(WEIGHT)
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q4_0.quantize(WEIGHT[:2])


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'q4_0.c:1: error: no float16' >&2; exit 1", "no float16"), ("exit 3", "cc ended with code 3"),
     ('while [ "$1" != -o ]; do shift; done; echo broken > "$2"', "file too short|invalid ELF")],
)  # fmt: skip
def test_a_compiler_that_fails_leaves_nothing_and_is_explained(fresh, compiler, script, said):
    compiler(script)
    with pytest.warns(native.SlowKernelsWarning, match=said):
        assert native.library() is None
    assert list((fresh / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(fresh, monkeypatch):
    blocked = fresh / "file"
    blocked.write_text("")
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(blocked))
    with pytest.warns(native.SlowKernelsWarning):
        assert q4_0.quantize(WEIGHT[:1]).shape == (1, 2**16 // 32 * 18)


def test_the_kernels_can_be_switched_off_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("GEMMA_QAT_KIT_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
        assert not native.can_run(WEIGHT)


def test_every_part_of_a_large_tensor_is_done_on_one_core_and_on_many(monkeypatch):
    together = q4_0.quantize(WEIGHT)
    rows = torch.stack([q4_0.quantize(row) for row in WEIGHT])
    assert torch.equal(together, rows)
    broken = WEIGHT.clone()
    broken[3, 70], broken[39, 5] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"\[3, 70\] is nan"):
        q4_0.quantize(broken)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own():
    expected = q4_0.quantize(WEIGHT).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=lambda: sender.send(q4_0.quantize(WEIGHT).numpy().tobytes() == expected))
    child.start()
    assert receiver.poll(30)
    assert receiver.recv()
    child.join()


def test_ctrl_c_comes_through_between_two_parts():
    code = """
import os, signal, threading, torch
from gemma_qat_kit.formats import q4_0
weight = torch.randn(2**20, 32)
q4_0.quantize(weight)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        q4_0.quantize(weight)
except KeyboardInterrupt:
    print("stopped", q4_0.quantize(weight[:1]).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parent.parent)  # fmt: skip
    assert done.stdout.startswith("stopped"), done.stderr
