"""A run of TrainingPanel from Start to its end: paused, stopped, trained on, and refused for what happened before."""

import signal
import threading

import pytest
import torch
from stand_in_trainer import SHORT, loaded_for_training, stand_in_for_train_qat, weights
from stand_ins import click, wait_for

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import BadSettingError, CancelledError
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.widgets import TrainingPanel, training_session


@pytest.fixture
def trainer(monkeypatch):
    return stand_in_for_train_qat(monkeypatch)


@pytest.fixture
def model(tiny, monkeypatch):
    with loaded_for_training(tiny, monkeypatch) as model:
        yield model


def test_pause_waits_after_a_step_and_resume_goes_on(trainer, model):
    trainer.gate.clear()
    panel = TrainingPanel(model, settings=SHORT)
    click(panel._start_button)
    wait_for(lambda: "Training for q4_0" in panel._status.value)
    assert panel._start_button.disabled
    assert not panel._stop_button.disabled
    click(panel._pause_button)
    assert panel._pause_button.description == "Resume"
    trainer.gate.set()
    wait_for(lambda: len(panel._mine.session.steps) == 1)
    assert not panel._mine.session.done.wait(0.3)
    assert len(panel._mine.session.steps) == 1
    wait_for(lambda: "1 of 4 are made" in panel._status.value)
    click(panel._pause_button)
    wait_for(lambda: "Ran to its end." in panel._status.value)
    assert len(panel.result.steps) == 4
    assert panel._pause_button.disabled
    assert panel._pause_button.description == "Pause"


def test_a_pause_does_not_count_in_the_time_that_is_left(trainer, model):
    trainer.gate.clear()
    panel = TrainingPanel(model, settings=SHORT)
    click(panel._start_button)
    session = panel._mine.session
    wait_for(lambda: session.evaluations)
    panel.pause()
    trainer.gate.set()
    wait_for(lambda: session.steps)
    assert session.seconds_left == pytest.approx(3 * 1.0), "a step took a second, and three are left"
    trainer.gate.clear()
    threading.Event().wait(0.3)
    assert session.seconds_left == pytest.approx(3 * 1.0)
    session.resume()
    panel.stop()
    session.done.wait(5)


def test_stop_keeps_the_best_point_also_while_paused(trainer, model):
    panel = TrainingPanel(model, settings=SHORT)
    trainer.gate.clear()
    click(panel._start_button)
    wait_for(lambda: panel._mine.session.evaluations)
    click(panel._pause_button)
    trainer.gate.set()
    wait_for(lambda: panel._mine.session.steps)
    click(panel._stop_button)
    wait_for(lambda: "Stopped by you. The model is at its best point, after step 0." in panel._status.value)
    assert len(panel.result.steps) == 1
    assert not panel._start_button.disabled


def test_stop_before_the_first_measurement_ends_run_with_an_error(monkeypatch, model, trainer):
    prepare = training_session.prepare_qat

    def stop_then_prepare(model, format, report):
        panel.stop()
        prepare(model, format, report=report)

    monkeypatch.setattr(training_session, "prepare_qat", stop_then_prepare)
    panel = TrainingPanel(model, settings=SHORT)
    with pytest.raises(CancelledError, match="Stopped before the first measurement"):
        panel.run()
    assert panel.result is None
    assert not masters(model.hf[0])
    assert "Nothing is trained." in panel._status.value
    assert "gqk-error" not in panel._status.value


def test_ctrl_c_stops_the_training_before_the_cell_ends(trainer, model):
    trainer.gate.clear()
    panel = TrainingPanel(model, settings=SHORT)
    threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        panel.run()
    assert not panel._mine.session.is_running
    assert panel.result.ended == "Stopped by you."


def test_a_second_start_trains_on_and_prepares_nothing(trainer, model):
    panel = TrainingPanel(model, settings=SHORT)
    assert panel._start_button.description == "Start"
    panel.run()
    assert panel._start_button.description == "Train on"
    before = weights(model)
    for _, quantizer in masters(model.hf[0]).values():
        quantizer.reference = torch.zeros(1)  # as the teacher in memory leaves it
    training_session._forgot.discard(model.hf[0])
    panel.run()
    assert len(trainer.calls) == 2
    assert all(a is b for a, b in zip(weights(model), before, strict=True))


def test_a_model_that_is_prepared_otherwise_must_be_loaded_again_and_the_earlier_run_stays(trainer, model):
    panel = TrainingPanel(model, settings=SHORT)
    run = panel.run()
    panel._format.value = "int2_g32"
    with pytest.raises(BadSettingError, match=r"prepared for q4_0 already.*For int2_g32: load it again"):
        panel.run()
    assert "prepared for q4_0 already" in panel._status.value
    assert panel._status.value.count("<p>") == 3
    assert panel.result is run
    panel._format.value = "q4_0"
    assert "prepared for q4_0 already" not in panel._status.value


def test_a_model_that_forgot_its_floats_or_is_converted_must_be_loaded_again(trainer, model):
    panel = TrainingPanel(model, settings=SHORT)
    panel._teacher.value = "cache"
    panel.run()
    with pytest.raises(BadSettingError, match="without a copy of its weights from before"):
        panel.run()
    gqk.convert_qat(model)
    with pytest.raises(BadSettingError, match="is converted already"):
        panel.run()


def test_what_another_call_prepared_is_recognized(trainer, model):
    gqk.prepare_qat(model.hf[0], "int2_g32", report=lambda progress: None)
    panel = TrainingPanel(model, format="int2_g32", settings=SHORT)
    assert panel._start_button.description == "Start"
    assert panel.run().ended == "Ran to its end."
    with pytest.raises(BadSettingError, match="prepared for int2_g32 already"):
        TrainingPanel(model, settings=SHORT).run()


def test_two_trainings_take_turns(trainer, model, tiny):
    trainer.gate.clear()
    with gqk.load(tiny("12B", "bf16"), device="cpu", report=lambda progress: None) as other:
        first, second = TrainingPanel(model, settings=SHORT), TrainingPanel(other, settings=SHORT)
        click(first._start_button)
        wait_for(lambda: trainer.calls)
        click(second._start_button)
        wait_for(lambda: "waiting for another training to end" in second._bar_label.value)
        trainer.gate.set()
        assert second.run().ended == "Ran to its end."
