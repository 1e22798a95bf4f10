"""Static int8 ranges: what they round to, their gradients, and how they are found on a text."""

import pytest
import torch
from small_network import TEXT, logits, make_pair, quiet

from gemma_qat_kit.formats import mobile
from gemma_qat_kit.qat.fake_quantizer import FLOAT, computing
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.ranges import StaticRange, add_ranges, best_scale, watched


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(values, scale):
    """Return what a reader of mobile checkpoints computes, and its gradients by autograd, straight through."""
    values, scale = values.detach().requires_grad_(), scale.detach().requires_grad_()
    v = values / scale
    q = (v + (v.round() - v).detach()).clamp(-128, 127)
    (q * scale).backward(GRADIENT)
    return mobile.round_activation(values.detach(), scale.detach()), values.grad, scale.grad


GRADIENT = random(40, 30, seed=1)


@pytest.mark.parametrize("scale", [0.01, 0.03])
def test_values_are_those_of_the_format_and_gradients_those_of_autograd(scale):
    part, values = StaticRange(torch.tensor(scale), True), random(40, 30).requires_grad_()
    found = part(values)
    found.backward(GRADIENT)
    for ours, theirs in zip((found, values.grad, part.scale.grad), rounded(values, part.scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, mobile.round_activation(values, part.scale))


def test_values_outside_the_range_get_no_gradient():
    values = torch.tensor([12.77, -12.87, 12.73, 0.0], requires_grad=True)
    StaticRange(torch.tensor(0.1), True)(values).sum().backward()
    assert values.grad.tolist() == [0, 0, 1, 1]


def test_the_gradient_of_a_scale_is_not_lost_in_16_bits():
    values, gradient = 0.3 * random(64, 512), random(64, 512, seed=1)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        part = StaticRange(torch.tensor(2.0**-7), True)
        part(values.to(torch.bfloat16).to(dtype)).backward(gradient.to(torch.bfloat16).to(dtype))
        found.append(part.scale.grad)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


def test_values_stay_in_their_own_dtype_as_the_format_has_it():
    values = random(40, 30).to(torch.bfloat16)
    part = StaticRange(torch.tensor(0.0123), False)
    assert torch.equal(part(values), mobile.round_activation(values, part.scale))
    assert part(values).dtype == torch.bfloat16


def test_a_scale_of_zero_rounds_nothing_and_stays():
    part, values = StaticRange(torch.tensor(0.0), True), random(40, 30).requires_grad_()
    found = part(values)
    found.backward(GRADIENT)
    assert torch.equal(found, values)
    assert torch.equal(values.grad, GRADIENT)
    assert part.scale.grad == 0


def test_a_linear_rounds_its_inputs_and_its_outputs():
    linear, values = torch.nn.Linear(30, 20), random(40, 30)
    scales = torch.tensor(0.02), torch.tensor(0.05)
    expected = mobile.round_activation(linear(mobile.round_activation(values, scales[0])), scales[1])
    add_ranges(linear, *scales, learns=True)
    assert torch.equal(linear(values), expected)
    with computing(linear, FLOAT):
        assert torch.equal(linear(values), torch.nn.functional.linear(values, linear.weight, linear.bias))


def error(values, scale):
    return (values - mobile.round_activation(values, scale)).square().sum().item()


@pytest.mark.parametrize("power", [1, 3])
def test_the_best_scale_loses_as_little_as_any(power):
    values = random(4000) ** power
    found = error(values, best_scale(values))
    every = [error(values, s) for s in torch.linspace(0.01, 1.2, 500) * values.abs().max() / 127]
    assert found <= 1.05 * min(every)


def test_the_best_scale_reaches_as_far_as_even_values_do_and_not_as_far_as_a_stray_one():
    assert best_scale(torch.linspace(-1, 1, 4001)).item() == pytest.approx(1 / 127, rel=0.03)
    values = torch.cat([0.1 * random(40_000), torch.tensor([8.0])])
    assert best_scale(values) < 8 / 127
    assert error(values, best_scale(values)) < error(values, torch.tensor(8 / 127))


@pytest.mark.parametrize("values", [torch.zeros(7), torch.zeros(0)])
def test_no_values_or_only_zeros_leave_a_layer_uncalibrated(values):
    assert best_scale(values) == 0


def test_watching_keeps_samples_with_the_largest_value_and_leaves_no_hooks():
    linear = torch.nn.Linear(64, 8)
    batches = [random(2000, 64), random(5, 64, seed=1)]
    with watched({"it": linear}) as kept:
        for batch in batches:
            linear(batch)
    assert not linear._forward_hooks
    for side, seen in zip(kept["it"], (batches, [linear(batch) for batch in batches]), strict=True):
        for batch in seen:
            assert side.abs().max() >= batch.abs().max()
            assert batch.flatten()[0] in side
        assert len(side) < 3 * 2**12  # of 2,000 rows, 64 values each on one side
        assert torch.isin(side, torch.cat([batch.flatten() for batch in seen])).all()


@pytest.mark.parametrize("learns", [True, False])
def test_every_linear_of_a_mobile_model_is_calibrated_on_what_it_gets(learns):
    module, tokenizer = pair = make_pair(seed=3)
    seen = {}
    ids = torch.tensor([tokenizer(TEXT[:1500]).input_ids[:256]])
    parts = {name: part for name, part in module.named_modules() if ".layers." in name and name.endswith("proj")}
    with watched(parts) as kept, torch.no_grad():
        module(ids)
        seen = {name: [side.abs().max().item() for side in sides] for name, sides in kept.items()}
    prepare_qat(pair, "mobile", calibration=TEXT[:1500], learn_scales=learns, report=quiet)
    for name, part in parts.items():
        for side, largest in zip((part.input_range, part.output_range), seen[name], strict=True):
            assert 0.02 * largest <= 127 * side.scale.item() <= 1.5 * largest
            assert side.scale.requires_grad is learns
    assert len(parts) == 14
    assert torch.isfinite(logits(module)).all()


def test_mobile_without_ranges_has_none():
    module, _ = pair = make_pair()
    prepare_qat(pair, "mobile_weight_only", calibration=TEXT[:1500], report=quiet)
    assert not any(isinstance(part, StaticRange) for part in module.modules())
