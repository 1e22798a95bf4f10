"""Packed linears and adapters against torch's own: values, gradients, what is trained, and what a merge keeps."""

import pytest
import torch
from small_network import logits, make_pair, quiet

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines.packed import PackedLinear, blocks_of
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.finetune.lora import ADAPTER, GridLora, PlainGridLora, _spread, adapters, add_adapters, find_linears
from gemma_qat_kit.finetune.losses import chunked_cross_entropy
from gemma_qat_kit.finetune.packed import pack
from gemma_qat_kit.formats import q4_0
from gemma_qat_kit.memory.settings import LORA_TARGETS
from gemma_qat_kit.quality.post_training import linears


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(out=48, into=64, dtype=torch.float32):
    return PackedLinear(q4_0.quantize(random(out, into)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_is_a_linear_of_the_same_values(dtype):
    ours = packed(dtype=dtype)
    plain = torch.nn.Linear(64, 48, bias=False).to(dtype)
    plain.weight.data = q4_0.dequantize(ours.blocks, dtype)
    results = []
    for part in (ours, plain):
        inputs = random(2, 5, 64, seed=1).to(dtype).requires_grad_()
        out = part(inputs)
        (out * random(2, 5, 48, seed=2).to(dtype)).sum().backward()
        results.append((out.detach(), inputs.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not list(ours.parameters())
    assert sum(buffer.nbytes for buffer in ours.buffers()) == 48 * 64 * 18 // 32


def test_packing_keeps_a_grid_and_else_rounds_by_importance():
    weight = random(64, 64)
    assert torch.equal(blocks_of(weight, None, "w"), q4_0.quantize(weight))
    importance = random(64, seed=3).square()
    assert not torch.equal(blocks_of(weight, importance, "w"), q4_0.quantize(weight))
    codes = torch.randint(-5, 6, (64, 64), generator=torch.Generator().manual_seed(0))
    trained = (codes * 0.0078125).bfloat16()  # on a grid that the plain rule does not look for
    assert torch.equal(q4_0.dequantize(blocks_of(trained, importance, "w"), torch.bfloat16), trained)


def test_packing_replaces_the_linears_and_nothing_else():
    module, _ = make_pair()
    names = [name.removesuffix(".weight") for name in linears(module)]
    before = {name: q4_0.fake_quantize(weight.detach()) for name, weight in linears(module).items()}
    pack(module, {}, quiet)
    for name, value in before.items():
        assert torch.equal(module.get_submodule(name.removesuffix(".weight")).weight, value)
    assert [name for name, part in module.named_modules() if isinstance(part, PackedLinear)] == names
    with pytest.raises(BadSettingError, match="no linear that Q4_0 can hold"):
        pack(module, {}, quiet)


def grid_layer(kind, dtype=torch.float32):
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([torch.nn.Module()])
    module.layers[0].q_proj = packed(dtype=dtype)
    module.norm = torch.nn.Linear(1, 1)  # peft looks for a parameter
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    config._register_custom_module({PackedLinear: kind})
    inject_adapter_in_model(config, module)
    layer = module.layers[0].q_proj
    assert type(layer) is kind
    layer.lora_B[ADAPTER].weight.data = random(48, 4, seed=7)
    return layer


def test_the_grid_is_that_of_the_packed_weight_and_the_gradient_goes_straight_through():
    layer = grid_layer(GridLora)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight, (codes, scale) = layer.base_layer.weight, q4_0.unpack(layer.base_layer.blocks)
    inputs, factor = random(2, 5, 64, seed=1).requires_grad_(), random(2, 5, 48, seed=2)
    out = layer(inputs)
    (out * factor).sum().backward()
    found = [out.detach(), inputs.grad, a.grad, b.grad]
    assert not torch.equal(q4_0.unpack(layer.merged_blocks())[0], codes), "the adapter is large enough to move codes"
    inputs.grad = a.grad = b.grad = None
    adapted = weight + layer.scaling[ADAPTER] * b @ a
    step = scale.repeat_interleave(32, -1)
    spread = _spread(0, 48, 64, "cpu") * 2.0**-32
    assert spread.abs().max() <= 0.5
    assert 0.28 < spread.std() < 0.30
    rounded = (adapted / step + 0.999 * spread).round().clamp(-8, 7) * step
    out = torch.nn.functional.linear(inputs, adapted + (rounded - adapted).detach())
    (out * factor).sum().backward()
    for ours, theirs in zip(found, [out.detach(), inputs.grad, a.grad, b.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_linear_computes_what_was_trained_bit_for_bit(dtype):
    layer, inputs = grid_layer(GridLora, dtype), random(3, 64, seed=1).to(dtype)
    merged = PackedLinear(layer.merged_blocks(), dtype)
    assert torch.equal(merged(inputs), layer(inputs))


def test_an_adapter_that_is_zero_changes_nothing():
    layer, inputs = grid_layer(GridLora), random(3, 64, seed=1)
    layer.lora_B[ADAPTER].weight.data.zero_()
    assert torch.equal(layer(inputs), layer.base_layer(inputs))
    assert torch.equal(layer.merged_blocks(), layer.base_layer.blocks)


def test_a_small_change_is_there_on_average():
    """A tenth of a step, which plain rounding of weights on their grid would lose to the last one."""
    layer = grid_layer(GridLora)
    scale = q4_0.scales(layer.base_layer.blocks).abs().mean()
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    a.data.fill_(0.25)
    b.data.copy_((0.1 * scale / layer.scaling[ADAPTER]).expand_as(b))
    asked = layer.scaling[ADAPTER] * b @ a
    weight = layer.base_layer.weight
    moved = q4_0.dequantize(layer.merged_blocks()) - weight
    steps = (moved / q4_0.scales(layer.base_layer.blocks).repeat_interleave(32, -1)).round()
    assert set(steps.unique().tolist()) <= {-1, 0, 1}
    assert moved.mean() == pytest.approx(asked.mean().item(), rel=0.1)
    nearest = ((weight + asked) / q4_0.scales(layer.base_layer.blocks).repeat_interleave(32, -1)).round()
    assert torch.equal(nearest.clamp(-8, 7), q4_0.unpack(layer.base_layer.blocks)[0].float())


def test_without_the_grid_it_is_pefts_own_lora():
    layer, inputs = grid_layer(PlainGridLora), random(3, 64, seed=1)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight = layer.base_layer.weight + layer.scaling[ADAPTER] * b @ a
    torch.testing.assert_close(layer(inputs), inputs @ weight.T)
    assert torch.equal(layer.merged_blocks(), q4_0.quantize(weight.detach()))


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_gradients_reach_every_adapter_of_the_language_model_and_nothing_else(tiny, size):
    with gqk.load(str(tiny(size, "q4_0-unquantized")), device="cpu", report=quiet) as model:
        module = model.hf[0]
        shapes = {name: part for name, part in module.named_modules() if name.rpartition(".")[2] in LORA_TARGETS}
        linear = {name for name, part in shapes.items() if isinstance(part, torch.nn.Linear) and "layers." in name}
        pack(module, {}, quiet)
        add_adapters(module, find_linears(module, LORA_TARGETS), rank=4, alpha=8, qat=True)
        assert set(adapters(module)) == linear
        assert all(isinstance(part, GridLora) for part in adapters(module).values())
        for part in adapters(module).values():
            part.lora_B[ADAPTER].weight.data = 0.02 * random(*part.lora_B[ADAPTER].weight.shape)
        module(torch.tensor([[2, 105, 93, 107, 80, 4, 110]]), use_cache=False).logits.float().square().mean().backward()
        reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == {f"{name}.lora_{side}.{ADAPTER}.weight" for name in linear for side in "AB"}


def test_names_that_no_linear_has_are_refused():
    with pytest.raises(BadSettingError, match="No linear of this model is called o_prj"):
        find_linears(make_pair()[0], ("o_prj",))


def test_a_stale_torchao_beside_it_does_no_harm(monkeypatch):
    from peft.tuners.lora import torchao

    def stale():
        raise ImportError("Found an incompatible version of torchao.")

    monkeypatch.setattr(torchao, "is_torchao_available", stale)
    module, _ = make_pair()
    before = logits(module)
    add_adapters(module, find_linears(module, ("q_proj", "v_proj")), rank=4, alpha=8, qat=False)
    assert len(adapters(module)) == 4
    assert torch.equal(logits(module), before)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_in_chunks_is_torchs_with_its_gradient(softcap):
    head, targets, results = random(101, 16, seed=1), torch.arange(37) * 2, []
    for is_ours in (True, False):
        hidden = random(37, 16).requires_grad_()
        if is_ours:
            loss = chunked_cross_entropy(hidden, head, targets, softcap, chunk=8)
        else:
            scores = hidden @ head.T
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            loss = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
        (0.5 * loss).backward()
        results.append((loss.detach(), hidden.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
