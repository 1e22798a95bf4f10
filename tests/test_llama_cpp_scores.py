"""llama.cpp's logits of whole texts: against its own server, and what is left when anything goes wrong."""

import ctypes.util
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from test_load import IDS, log_probs

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines import llama_cpp_logits, llama_cpp_scores
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.engines.llama_cpp_logits import BATCH
from gemma_qat_kit.engines.llama_cpp_scores import Scores
from gemma_qat_kit.errors import (
    BadSettingError,
    BrokenCheckpointError,
    EndpointError,
    MissingLibraryError,
    ModelClosedError,
)
from gemma_qat_kit.quality.comparison import perplexity


@pytest.fixture
def scores(tiny):
    scores = Scores(tiny("12B", "q4_0"))
    yield scores
    scores.close()


def child_of(scores):
    return psutil.Process(scores._child.pid)


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_logits_are_the_log_probabilities_of_llama_cpps_server(tiny, size):
    with gqk.load(tiny(size, "q4_0")) as model:
        logits = model.runner.logits(IDS)
        expected = log_probs(model)
    assert (logits.shape, logits.dtype) == ((len(IDS), 512), torch.float32)
    assert logits.isfinite().all()
    # The same sums, which a batch of another length adds up in another order.
    torch.testing.assert_close(logits[-1].log_softmax(-1), expected, rtol=0, atol=1e-3)


def test_long_texts_come_in_pieces_and_say_the_same(built_in):
    scores = Scores(built_in)
    ids = scores.tokenize("The sky is blue because of the light that reaches the sea. " * 20)[:200]
    whole = scores.logits(ids, 512)
    assert whole.shape == (200, 49152)
    for length in (1, BATCH, BATCH + 1, 150):
        part = scores.logits(ids[:length], 512)
        # Another kernel multiplies where a piece is short, which rounds the activations differently.
        divergence = torch.nn.functional.kl_div(part.log_softmax(-1), whole[:length].log_softmax(-1), log_target=True,
                                                reduction="none").sum(-1)  # fmt: skip
        assert divergence.max() < 0.02
    assert torch.equal(scores.logits(ids, 512), whole)  # nothing is left of the calls between
    scores.close()


def test_one_answer_does_not_change_with_the_next(scores):
    first = scores.logits(IDS, 512)
    kept = first.clone()
    scores.logits(IDS[::-1], 512)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "text", ["the sky is blue", "<bos><|turn>user\nthe<turn|>", "é ü 日本 🙂 \t\0", "", "x" * 3000]
)
def test_words_get_the_ids_of_the_hugging_face_tokenizer_behind_the_first_token(scores, text):
    assert scores.tokenize(text) == [2, *testing.tiny_tokenizer().encode(text, add_special_tokens=False).ids]


def test_both_engines_read_a_tiny_gemma_alike(tiny):
    with gqk.load(tiny("E2B", "bf16")) as network, gqk.load(tiny("E2B", "q4_0")) as file:
        text = "the sky is blue and the sky was blue"
        assert network.runner.tokenize(text) == file.runner.tokenize(text)
        assert network.runner.logits(IDS).dtype == torch.float32
        assert math.isfinite(perplexity(file, text, report=lambda progress: None).nats)


def test_the_child_starts_when_it_is_needed_shares_the_file_and_ends_with_the_model(built_in):
    with gqk.load("smollm2-135m", context_length=512) as model:
        before = model.memory()
        assert model.runner._scores._child is None
        model.runner.logits(list(range(100)))
        after, child = model.memory(), child_of(model.runner._scores)
        assert after.in_place("mapped") < before.in_place("mapped") + 2**25  # not a second time
        assert 0 < after.in_place("ram") - before.in_place("ram") < 2**28
    assert not child.is_running()


def test_a_window_beyond_the_context_is_refused(tiny):
    with gqk.load(tiny("12B", "q4_0"), context_length=256) as model:
        for ids in ([], [5] * 257):
            with pytest.raises(BadSettingError, match=rf"{len(ids)} tokens cannot be scored .* context_length=256"):
                model.runner.logits(ids)


@pytest.mark.parametrize("ids", [[512], [-1], [2**30]])
def test_ids_beyond_the_vocabulary_are_refused_and_the_next_text_is_scored(scores, ids):
    with pytest.raises(EndpointError, match=r"cannot score with .*: llama_decode answers -1\. .* own vocabulary"):
        scores.logits(ids, 512)
    assert scores.logits(IDS, 512).isfinite().all()


def test_a_child_that_was_killed_is_said_and_replaced(scores):
    scores.logits(IDS, 512)
    child_of(scores).send_signal(signal.SIGKILL)
    with pytest.raises(EndpointError, match="ended with code -9"):
        scores.logits(IDS, 512)
    assert scores.logits(IDS, 512).isfinite().all()


def test_ctrl_c_while_it_computes_leaves_nothing_half_read(scores, monkeypatch):
    expected = scores.logits(IDS, 512)
    monkeypatch.setattr(scores, "_read_into", lambda buffer: (_ for _ in ()).throw(KeyboardInterrupt))
    child = child_of(scores)
    with pytest.raises(KeyboardInterrupt):
        scores.logits(IDS[::-1], 512)
    assert not child.is_running()
    monkeypatch.undo()
    assert torch.equal(scores.logits(IDS, 512), expected)


def test_closed_scores_say_so(scores):
    scores.logits(IDS, 512)
    child = child_of(scores)
    scores.close()
    scores.close()
    assert not child.is_running()
    with pytest.raises(ModelClosedError):
        scores.logits(IDS, 512)


def test_forgotten_scores_end_their_child(tiny):
    scores = Scores(tiny("12B", "q4_0"))
    scores.tokenize("the")
    child = child_of(scores)
    del scores
    gc.collect()
    assert psutil.wait_procs([child], timeout=5)[1] == []


PARENT = """
import sys, time
from pathlib import Path
from gemma_qat_kit.engines.llama_cpp_logits import BATCH
from gemma_qat_kit.engines.llama_cpp_scores import Scores
scores = Scores(Path(sys.argv[1]))
scores.tokenize("the")
print(scores._child.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_with_a_kernel_that_is_killed(tiny):
    command = [sys.executable, "-c", PARENT, str(tiny("12B", "q4_0"))]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_that_cannot_be_loaded_is_named(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BrokenCheckpointError, match=r"llama\.cpp cannot load .*no\.gguf"):
        Scores(path).tokenize("the")


def test_without_a_gpu_wish_the_child_sees_none(tiny):
    scores = Scores(tiny("12B", "q4_0"), use_gpu=False)
    scores.tokenize("the")
    assert child_of(scores).environ()["CUDA_VISIBLE_DEVICES"] == ""
    scores.close()


def test_a_library_without_llama_cpp_inside_is_said(tiny, tmp_path, monkeypatch):
    with pytest.raises(llama_cpp_logits.OtherReleaseError, match="llama_backend_init") as caught:
        llama_cpp_logits.load_library(ctypes.util.find_library("c"))
    script = tmp_path / "child.py"
    script.write_text(f"print({json.dumps({'missing': str(caught.value)})!r})")
    monkeypatch.setattr(llama_cpp_scores, "_CHILD", script)
    with pytest.raises(MissingLibraryError) as caught:
        Scores(tiny("12B", "q4_0")).tokenize("the")
    assert "cannot be asked for the logits of a text" in caught.value.wrong
    assert "llama_backend_init" in caught.value.wrong
    assert caught.value.next_step.startswith('Run: pip install "xllamacpp')


def test_settings_are_read_back(built_in, monkeypatch):
    model = llama_cpp_logits.Model(os.fspath(built_in), 1)
    monkeypatch.setattr(model._llama, "llama_n_batch", lambda context: 2048)
    with pytest.raises(llama_cpp_logits.OtherReleaseError, match=r"as \[256, 2048, 64\], not \[256, 64, 64\]"):
        model._context_for(10)


def test_a_server_cannot_be_measured_and_says_what_can():
    engine = EndpointEngine("http://127.0.0.1:9", model="any")
    for call in (lambda: engine.tokenize("a"), lambda: engine.logits([1])):
        with pytest.raises(BadSettingError, match=r"cannot be measured\. .* no probabilities .* gqk\.load\("):
            call()
