"""float16 on a GPU without bfloat16: a Gemma whose MLPs' sums do not fit it answers and trains all the same."""

import pytest
import torch
from small_network import quiet
from test_finetune import ROWS, SETTINGS
from test_load import IDS

import gemma_qat_kit as gqk
from gemma_qat_kit.engines import transformers
from gemma_qat_kit.engines.half import keep_sums_in_float32
from gemma_qat_kit.engines.packed import PackedLinear

FULL = 65504


def enlarge(module):
    """Make the sums of the first layers too large for float16; the norms behind them take the size out again."""
    for name, part in module.named_modules():
        if name.endswith(("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.0.mlp.down_proj")):
            with torch.no_grad():
                part.weight.mul_(300)
        elif name.endswith("layers.1.experts"):
            with torch.no_grad():
                part.gate_up_proj[:, part.gate_up_proj.shape[1] // 2 :].mul_(300)
                part.down_proj.mul_(300)


def says(module):
    with torch.no_grad():
        return module(torch.tensor([IDS])).logits.float()


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B"])
def test_sums_that_do_not_fit_are_kept(tiny, size):
    with gqk.load(str(tiny(size, "bf16")), device="cpu", per_layer_table="memory", report=quiet) as model:
        module = model.hf[0].float()
        enlarge(module)
        expected, largest = says(module), []
        down = module.model.language_model.layers[0].mlp.down_proj
        handle = down.register_forward_hook(lambda part, inputs, out: largest.append(out.abs().max().item()))
        says(module)
        handle.remove()
        assert largest[0] > FULL
        module.half()
        assert not torch.isfinite(says(module)).all()
        for _ in range(2):  # a second time changes nothing
            keep_sums_in_float32(module)
            found = says(module)
        assert torch.isfinite(found).all()
        if size == "26B-A4B":
            _check_experts(module.model.language_model.layers[1])
        if size != "26B-A4B":  # in 16 bits some tokens change experts
            assert (found - expected).norm() < 0.05 * expected.norm()


def _check_experts(layer):
    """The experts of a layer alone, in float16 with their sums kept, against the same in float32."""
    torch.manual_seed(0)
    hidden = 4 * torch.randn(5, layer.hidden_size)
    chosen, shares = torch.tensor([[0, 1], [2, 0], [1, 3], [3, 2], [0, 2]]), torch.full((5, 2), 0.5)
    found = layer.post_feedforward_layernorm_2(layer.experts(hidden.half(), chosen, shares.half()))
    weights = [getattr(layer.experts, name).float() for name in ("gate_up_proj", "down_proj")]
    expected = torch.zeros_like(hidden)
    for token, experts in enumerate(chosen.tolist()):
        for expert in experts:
            gate, up = (weights[0][expert] @ hidden[token].half().float()).chunk(2)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            expected[token] += 0.5 * weights[1][expert] @ inner
    assert expected.abs().max() > FULL
    expected = layer.post_feedforward_layernorm_2.float()(expected).float()
    layer.post_feedforward_layernorm_2.half()
    assert found.dtype == torch.float16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_a_model_in_float16_is_tuned_and_taken_home(tiny, monkeypatch):
    monkeypatch.setattr(transformers, "best_dtype", lambda device: torch.float16)
    with gqk.load(str(tiny("12B", "q4_0")), "q4_0", engine="transformers", device="cpu", report=quiet) as model:
        module = model.hf[0]
        for layer in module.model.language_model.layers[:2]:
            for part in (layer.mlp.up_proj, layer.mlp.down_proj):
                scales = part.blocks.view(-1, 18)[:, :2].contiguous().view(torch.float16) * 50
                part.blocks = part.blocks.clone()
                part.blocks.view(-1, 18)[:, :2] = scales.view(torch.uint8)
        settings = gqk.FinetuneSettings(**SETTINGS | {"num_steps": 12})
        run = gqk.finetune(model, ROWS, settings=settings, report=quiet)
        assert run.dtype == "float16"
        assert run.best.nats < run.evaluations[0].nats
        before = says(module)
        gqk.merge_adapters(model)
        assert isinstance(module.model.language_model.layers[0].mlp.down_proj, PackedLinear)
        assert torch.equal(says(module), before)
