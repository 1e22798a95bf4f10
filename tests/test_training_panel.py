"""TrainingPanel without a browser: what is trained, what it shows, what is kept when the cell runs again."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from stand_in_trainer import SHORT, loaded_for_training, prepare_without_text, stand_in_for_train_qat, weights
from stand_ins import Loader, click, wait_for

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import BadOutputError, BadSettingError, UnknownNameError
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.widgets import TrainingPanel

TEXT = "Why is the sky blue? Because air scatters short waves more than long ones. " * 20


@pytest.fixture
def trainer(monkeypatch):
    return stand_in_for_train_qat(monkeypatch)


@pytest.fixture
def model(tiny, monkeypatch):
    with loaded_for_training(tiny, monkeypatch) as model:
        yield model


def test_run_prepares_trains_and_shows_what_came_back(trainer, model):
    panel = TrainingPanel(model, format="int3_g32", text=TEXT, settings=SHORT, folder="kept")
    assert panel.result is None
    assert panel.run() is panel.result
    assert trainer.calls == [(TEXT, "memory", SHORT, "kept")]
    assert {quantizer.grid.name for _, quantizer in masters(model.hf[0]).values()} == {"int3_g32"}
    assert "50%" in panel._figures.value
    for label in ("PTQ 20.09", "float 7.389", "best 12.18"):
        assert label in panel._figures.value, f"{label}: math.exp of 3, 2 and 2.5"
    assert math.exp(2.5) == pytest.approx(12.18, abs=0.005)
    assert "Ran to its end. The model is at its best point, after step 4." in panel._status.value


def test_what_is_chosen_is_what_is_trained(trainer, model):
    panel = TrainingPanel(model, settings=SHORT)
    panel._teacher.value, panel._steps.value, panel._rate.value = "text", 2, 0.05
    panel.run()
    text, teacher, settings, folder = trainer.calls[0]
    assert (text, teacher, folder) == (None, None, None)
    assert settings == TrainSettings(num_steps=2, num_evaluations=2, sequence_length=16, batch_size=1,
                                     learning_rate=0.05)  # fmt: skip
    assert "surprise at the text" in panel._figures.value


def test_a_real_model_is_trained_as_train_qat_trains_it(monkeypatch, tiny):
    prepare_without_text(monkeypatch)
    by_panel, by_hand = (gqk.load(tiny("12B", "bf16"), device="cpu", report=lambda p: None) for _ in range(2))
    panel = TrainingPanel(by_panel, text=TEXT, settings=SHORT)
    found = panel.run()
    gqk.prepare_qat(by_hand, "q4_0", calibration={}, report=lambda p: None)
    expected = gqk.train_qat(by_hand, TEXT, settings=SHORT, report=lambda p: None)
    assert [step.loss for step in found.steps] == [step.loss for step in expected.steps]
    assert all(torch.equal(a, b) for a, b in zip(weights(by_panel), weights(by_hand), strict=True))
    group, places = panel._mine.session.walk
    assert group in panel._mine.session.groups
    assert [place.step for place in places] == [0, 1, 2, 3, 4]
    assert panel._place.max == panel._place.value == 4
    by_panel.close()
    by_hand.close()


def test_running_the_cell_again_keeps_the_choice_and_the_finished_run(trainer, model):
    first = TrainingPanel(model, settings=SHORT)
    first._rate.value = 0.02
    run = first.run()
    again = TrainingPanel(model, settings=SHORT)
    assert again._rate.value == 0.02
    assert again.result is run
    assert "Ran to its end." in again._status.value
    assert again._place.value == 4
    assert TrainingPanel(model, settings=TrainSettings(num_steps=5)).result is None


def test_running_the_cell_again_while_it_trains_goes_on_showing_it(trainer, model):
    trainer.gate.clear()
    click(TrainingPanel(model, settings=SHORT)._start_button)
    again = TrainingPanel(model, settings=SHORT)
    wait_for(lambda: "Training for q4_0" in again._status.value)
    click(again._start_button)
    trainer.gate.set()
    wait_for(lambda: "Ran to its end." in again._status.value)
    assert len(trainer.calls) == 1


def test_an_error_is_raised_and_shown_and_the_next_choice_clears_it(trainer, model):
    trainer.error = BadOutputError("The <loss> is nan.", "It is finite.", "Take a tenth.")
    panel = TrainingPanel(model, settings=SHORT)
    with pytest.raises(BadOutputError, match="is nan"):
        panel.run()
    for part in ("The &lt;loss&gt; is nan.", "It is finite.", "Take a tenth."):
        assert part in panel._status.value


def test_an_error_nobody_thought_of_is_shown_too(trainer, model):
    trainer.error = ZeroDivisionError("by <zero>")
    panel = TrainingPanel(model, settings=SHORT)
    with pytest.raises(ZeroDivisionError):
        panel.run()
    assert "by &lt;zero&gt;" in panel._status.value


def test_wrong_names_and_texts_are_refused(trainer, model):
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        TrainingPanel("E2BB")
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_0'"):
        TrainingPanel(model, format="q4")
    with pytest.raises(BadSettingError, match=r"\['words'\] is no text"):
        TrainingPanel(model, text=[["words"]])


def test_a_model_of_llama_cpp_is_refused_inside_the_panel(trainer, tiny):
    with gqk.load(tiny("E2B", "q4_0"), report=lambda progress: None) as model:
        panel = TrainingPanel(model)
        with pytest.raises(BadSettingError, match="runs in llama_cpp"):
            panel.run()
        assert "runs in llama_cpp" in panel._status.value


def test_a_size_is_loaded_on_start_and_again_where_it_cannot_be_trained_on(trainer, model, tiny, monkeypatch):
    calls, load = [], gqk.load

    def load_tiny(size, format, report):
        calls.append((size, format))
        report(Progress("loading", 1, 2))
        return load(tiny("12B", "bf16"), device="cpu", report=report)

    monkeypatch.setitem(sys.modules, "gemma_qat_kit.load", SimpleNamespace(load=load_tiny))
    panel = TrainingPanel("smollm2-135m", settings=SHORT)
    assert panel.model is None
    panel._teacher.value = "text"
    panel.run()
    first = panel.model
    panel._format.value = "int2_g32"
    panel.run()
    assert calls == [("smollm2-135m", "float32")] * 2
    assert panel.model is not first
    assert not first.is_closed
    assert TrainingPanel("E2B", settings=SHORT).run().name == "custom bf16"
    assert calls[-1] == ("E2B", "bf16")
    assert panel.model is None


def test_a_load_that_fails_is_shown_and_tried_again(trainer, monkeypatch):
    loader = Loader()
    loader.error = BadSettingError("No room.", "a", "b")
    monkeypatch.setitem(sys.modules, "gemma_qat_kit.load", SimpleNamespace(load=loader.load))
    panel = TrainingPanel("smollm2-135m", settings=SHORT)
    for _ in range(2):
        with pytest.raises(BadSettingError, match="No room"):
            panel.run()
    assert loader.calls == [("smollm2-135m", "float32")] * 2
    assert "No room." in panel._status.value
    assert panel.model is None
