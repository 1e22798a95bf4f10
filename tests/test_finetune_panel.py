"""FinetunePanel without a browser: what it shows, trains and writes, and what it keeps when the cell runs again."""

import pytest
from small_network import quiet
from stand_ins import click, wait_for
from test_finetune import ROWS

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import BadSettingError, UnknownNameError
from gemma_qat_kit.finetune.lora import adapters
from gemma_qat_kit.finetune.run import Sample
from gemma_qat_kit.widgets import FinetunePanel
from gemma_qat_kit.widgets.finetune_figures import answers_html, data_html

SETTINGS = gqk.FinetuneSettings(num_steps=4, num_evaluations=2, batch_size=2, gradient_accumulation=1, rank=4,
                                sequence_length=64, learning_rate=5e-3, gradient_checkpointing=False)  # fmt: skip


@pytest.fixture
def model(tiny):
    with gqk.load(str(tiny("E2B", "q4_0")), "q4_0", engine="transformers", device="cpu", report=quiet) as model:
        yield model


def test_run_trains_and_shows_curves_and_answers(model):
    panel = FinetunePanel(model, ROWS, settings=SETTINGS, samples=["the sky"])
    assert "9 conversations" in panel._shown_data.value
    assert panel._shown_data.value.count("<mark>") == 2
    assert panel.run() is panel.result
    assert panel.result.settings == SETTINGS
    assert "step 4" in panel._figures.value
    assert "best" in panel._figures.value
    assert "before" in panel._said.value
    assert "after 4 steps" in panel._said.value
    assert "Ran to its end." in panel._status.value
    assert adapters(model.hf[0])


def test_what_is_chosen_is_what_is_trained(model):
    panel = FinetunePanel(model, ROWS, settings=SETTINGS)
    panel._numbers["num_steps"].value, panel._numbers["rank"].value, panel._rate.value = 2, 2, 0.001
    panel._qat.value = None
    run = panel.run()
    assert (run.qat, run.settings.num_steps, run.settings.rank, run.settings.learning_rate) == (None, 2, 2, 0.001)


def test_export_writes_everything_once(model, tmp_path):
    panel = FinetunePanel(model, ROWS, settings=SETTINGS, export_to=tmp_path / "home")
    assert panel._export_button.disabled
    with pytest.raises(BadSettingError, match="nothing to export"):
        panel.export()
    panel.run()
    path = panel.export()
    names = {str(file.relative_to(tmp_path / "home")) for file in (tmp_path / "home").rglob("*") if file.is_file()}
    assert {"tuned-q4_0.gguf", "Modelfile", "adapter/adapter_model.safetensors"} <= names
    assert panel._export_button.disabled
    assert str(path) in panel._status.value
    with gqk.load(path, report=quiet) as tuned:
        assert tuned.format == "q4_0"


def test_pause_waits_and_stop_keeps_the_best_point(model):
    panel = FinetunePanel(model, ROWS, settings=SETTINGS)
    panel.pause()  # there is nothing to pause
    click(panel._start_button)
    panel.pause()
    wait_for(lambda: panel._mine.session.steps)
    assert panel._mine.session.is_paused
    assert len(panel._mine.session.steps) == 1
    again = FinetunePanel(model, ROWS, settings=SETTINGS)  # the cell is run again
    assert again._pause_button.description == "Resume"
    again.stop()
    assert panel._mine.session.done.wait(30)
    wait_for(lambda: "Stopped by you." in again._status.value)
    assert again.result.best.step == 0


def test_the_memory_moves_along():
    panel = FinetunePanel("smollm2-135m", ROWS)
    before = panel._memory.value
    assert "of memory planned" in before
    panel._numbers["batch_size"].value = 64
    assert panel._memory.value != before
    assert panel._start_button.description == "Start"
    assert "user: the sky is blue" in panel._shown_data.value


def test_a_bad_dataset_and_unknown_names_are_refused(model):
    with pytest.raises(BadSettingError, match="The dataset is empty"):
        FinetunePanel(model, [])
    with pytest.raises(UnknownNameError, match="size"):
        FinetunePanel("E3B", ROWS)
    with pytest.raises(UnknownNameError, match="qat"):
        FinetunePanel(model, ROWS, qat="int3")


def test_an_error_is_shown_and_raised(model):
    panel = FinetunePanel(model, ROWS, settings=SETTINGS)
    model.close()
    with pytest.raises(Exception, match="closed"):
        panel.run()
    assert "closed" in panel._status.value


def test_what_people_and_models_write_is_escaped():
    said = answers_html([Sample(0, "<i>q</i>", "<script>"), Sample(2, "<i>q</i>", "<img src=x>")])
    shown = data_html([[{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "<script>"}]])
    for html in (said, shown):
        assert "<script>" not in html
        assert "<b>" not in html
        assert "<img" not in html
