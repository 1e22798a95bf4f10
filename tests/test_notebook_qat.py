"""What the notebook on QAT says in words is what the plans, the settings and the panel say."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch

from gemma_qat_kit.catalog import find_checkpoint
from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.qat.losses import distillation
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.units import GIB, readable_bytes
from gemma_qat_kit.widgets import training_panel

NOTEBOOK = nbformat.read(Path(__file__).parent.parent / "notebooks" / "03_qat.ipynb", as_version=4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells}
SETTINGS = {line.split(" = ")[0]: line for line in CELLS["settings"].splitlines()}


def _words(name):
    return " ".join(CELLS[name].split())


def _value(name):
    return ast.literal_eval(SETTINGS[name].split(" = ")[1].split("#")[0].strip())


def test_the_facts_are_those_of_the_plans():
    settings = {"task": "qat", "logits_chunk_length": None, "batch_size": 2, "sequence_length": _value("LENGTH")}
    small = plan_memory("smollm2-135m", "float32", device="cpu", **settings)
    large = plan_memory("E2B", "bf16", device="cuda", **settings)
    words = _words("facts")
    assert f"planned: {small.needed['ram'] / GIB:.1f} GiB)" in words
    assert (
        f"{large.needed['gpu'] / GIB:.0f} GiB on the GPU, {large.needed['ram'] / GIB:.1f} GiB in RAM (planned)" in words
    )
    assert readable_bytes(find_checkpoint("E2B", "bf16").weights_bytes) in words


def test_every_format_that_can_be_set_is_in_the_panel():
    formats = ast.literal_eval(re.search(r"@param (\[.*\])", SETTINGS["FORMAT"])[1])
    assert set(formats) <= set(training_panel._FORMATS)
    assert {_value("FORMAT"), "int2_g32", "int3_g32"} <= set(formats)


def test_the_full_run_is_that_of_the_defaults():
    default = TrainSettings()
    assert f"`STEPS = {default.num_steps}` and `LENGTH = {default.sequence_length}`" in _words("settings-text")
    assert _value("LEARNING_RATE") == default.learning_rate
    assert 1 + default.num_steps // 20 == default.num_evaluations, "as the panel's cell has it"


@pytest.mark.parametrize(("rate", "words"), [(0.0005, "a sixty-fifth of a step"), (0.1, "three steps far")])
def test_a_weight_comes_as_far_as_is_said(rate, words):
    settings = TrainSettings(learning_rate=rate)
    way = rate * sum(settings.rate(step) for step in range(settings.num_steps))
    assert words in _words("try")
    assert f"`LEARNING_RATE = {rate}`" in _words("try") or f"`{rate}`" in _words("try")
    assert way == pytest.approx({0.0005: 1 / 65, 0.1: 3.5}[rate], rel=0.2)


def test_the_gradients_on_the_page_are_those_of_the_code():
    grid, scale = GRIDS["q4_0"], torch.tensor([[0.5]], requires_grad=True)
    weight = torch.linspace(-6, 6, 32)[None].requires_grad_()
    arriving = torch.randn(1, 32)
    learned_fake_quantize(weight, scale, grid).backward(arriving)
    ratio = weight.detach() / scale.detach()
    inside = (ratio.round() >= grid.low) & (ratio.round() <= grid.high)
    assert 0 < inside.sum() < 32
    assert torch.equal(weight.grad, arriving * inside)
    code = ratio.round().clamp(grid.low, grid.high)
    assert torch.allclose(scale.grad.sum(), (arriving * torch.where(inside, code - ratio, code)).sum(), atol=1e-4)
    logits, teacher = torch.randn(1, 9, requires_grad=True), torch.randn(1, 9)
    distillation(logits, teacher).backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - teacher.softmax(-1), atol=1e-6)
    for formula in (r"q_i - w_i / s", r"\hat p_v - p_v", r"\mathrm{round}(w/s) \le q_{\max}"):
        assert formula in CELLS["maths"] + CELLS["maths-scale"]


def test_it_says_whose_figures_they_are_and_what_comes_next():
    assert "lie on a Q4_1 grid" in _words("facts")
    assert "not Gemma's" in _words("facts")
    assert "the CHANGELOG has the figures of the full run" in _words("run-see")
    assert _words("remember").endswith("Next: `04_finetune`.")
