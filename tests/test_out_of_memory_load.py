"""Memory that runs out while the real `load` and `chat` work, and what they leave behind."""

import gc
import weakref

import pytest

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.engines import transformers as engine
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.load import load
from gemma_qat_kit.out_of_memory import OutOfMemoryError

TORCH_SAYS = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 800"


class Big:
    """Stands for the half of a model that was there when memory ran out."""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path))
    return tmp_path


def quiet(progress):
    pass


def test_a_load_that_runs_out_names_the_largest_part_and_leaves_nothing(monkeypatch, notes):
    alive = []

    def fail(path, device, report):
        half = Big()
        alive.append(weakref.ref(half))
        assert list(notes.glob("loading-*.json")), "a kernel that is ended here leaves no word"
        raise RuntimeError(TORCH_SAYS)

    monkeypatch.setattr(engine, "load_gguf", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        load(BUILT_IN_SIZE, "float32", report=quiet)
    assert "the largest part is text layers" in caught.value.allowed
    assert [words for words, plan in caught.value.cheaper][:1] == ["context_length=2048"]
    gc.collect()
    assert alive[0]() is None
    assert list(notes.glob("loading-*.json")) == []


def test_other_errors_of_a_load_stay_what_they_are(monkeypatch, notes):
    def fail(path, device, report):
        raise RuntimeError("something else")

    monkeypatch.setattr(engine, "load_gguf", fail)
    with pytest.raises(RuntimeError, match="something else"):
        load(BUILT_IN_SIZE, "float32", report=quiet)
    with pytest.raises(BadSettingError):
        load(BUILT_IN_SIZE, "float32", context_length=9000, report=quiet)
    assert list(notes.glob("loading-*.json")) == []


def test_an_answer_that_runs_out_says_so_and_the_model_answers_again(monkeypatch, notes):
    with load(BUILT_IN_SIZE, "float32", context_length=256, report=quiet) as model:
        generate = model.hf[0].generate

        def fail(*args, **kwargs):
            raise RuntimeError(TORCH_SAYS)

        monkeypatch.setattr(model.hf[0], "generate", fail)
        with pytest.raises(OutOfMemoryError, match="ran out of memory"):
            model.chat("Hello")
        monkeypatch.setattr(model.hf[0], "generate", generate)
        assert model.chat("Hello", max_new_tokens=2).new_tokens == 2
