"""Grid recovery: weights that lie on a Q4_0 grid come back as they were, others by the plain rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import native, q4_0, q4_0_grid
from gemma_qat_kit.formats.quantized import quantize

NUM_GROUPS = 4096
LEVELS = range(1, 9)


def on_grid(level, *, dtype=torch.bfloat16, step_dtype=None, num_groups=NUM_GROUPS, seed=0):
    """Return codes (n, 32) whose largest magnitude is `level`, the steps (n, 1) and the weights, stored in `dtype`.

    A grid has codes -8 to 7, so only the level 8 has one sign; the step has either.
    """
    generator = torch.Generator().manual_seed(seed + level)
    codes = torch.randint(-level, min(level, 7) + 1, (num_groups, 32), generator=generator).float()
    places = torch.randint(0, 32, (num_groups, 1), generator=generator)
    signs = torch.where(torch.rand(2, num_groups, 1, generator=generator) < 0.5, -1.0, 1.0)
    codes.scatter_(1, places, -8.0 if level == 8 else level * signs[0])
    if level == 8:
        codes.scatter_(1, places, torch.full((num_groups, 1), -8.0))
    steps = signs[1] * 2.0 ** torch.empty(num_groups, 1).uniform_(-12, -4, generator=generator)
    steps = steps.to(step_dtype).float() if step_dtype else steps
    return codes, steps, (codes * steps).to(dtype)


@pytest.fixture(params=["C", "torch"])
def path(request, monkeypatch):
    """Run a test on the compiled kernels, then on torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)


def same_codes(quantized, codes, steps):
    """Tell for each group whether the codes are those that it was made of; a grid has no sign of its own."""
    turned = torch.sign(quantized.scale) * torch.sign(steps)
    return (quantized.codes.float() * turned == codes).all(-1)


@pytest.mark.parametrize("level", LEVELS)
def test_weights_on_a_bf16_step_come_back_bit_for_bit(path, level):
    codes, steps, weight = on_grid(level, step_dtype=torch.bfloat16)
    recovered = quantize(weight, "q4_0", recover_grid=True)
    is_exact = (recovered.dequantize(torch.bfloat16) == weight).all(-1)
    assert is_exact.float().mean() >= 0.999
    assert same_codes(recovered, codes, steps).all()
    assert recovered.fit.groups_exact == is_exact.sum()
    assert recovered.fit.groups_on_grid == NUM_GROUPS
    assert recovered.fit.peak_levels[level - 1] == NUM_GROUPS
    plain = q4_0.dequantize(q4_0.quantize(weight), torch.bfloat16) == weight
    assert recovered.fit.naive_groups_exact == plain.all(-1).sum()
    assert recovered.fit.naive_values_exact == plain.sum()
    assert plain.all(-1).float().mean() < 0.05 or level == 8  # only there is the plain rule's step the right one


@pytest.mark.parametrize("level", LEVELS)
def test_with_a_float32_step_all_codes_are_right_and_every_value_within_one_bf16_step(path, level):
    codes, steps, weight = on_grid(level)
    recovered = quantize(weight, "q4_0", recover_grid=True)
    assert same_codes(recovered, codes, steps).all()
    back = recovered.dequantize(torch.bfloat16)
    assert ((back.view(torch.int16) - weight.view(torch.int16)).abs() <= 1).all()
    assert recovered.fit.worst_error < 2**-7  # half a bf16 step of the weight, and as much of the step


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_types_keep_their_grid_too(path, level, dtype):
    codes, steps, weight = on_grid(level, dtype=dtype, step_dtype=torch.float16)
    recovered = quantize(weight, "q4_0", recover_grid=True)
    assert same_codes(recovered, codes, steps).all()
    assert torch.equal(recovered.dequantize(dtype), weight)


def test_bf16_numbers_in_float32_are_taken_as_bf16(path):
    _, _, weight = on_grid(5, step_dtype=torch.bfloat16)
    assert quantize(weight.float(), "q4_0", recover_grid=True).fit == quantize(weight, "q4_0", recover_grid=True).fit


def test_weights_off_by_one_and_a_half_bf16_steps_still_get_their_codes(path):
    # What was reported of published weights: most exact, the rest up to about 1.6 units in the last place away.
    for level in (3, 5, 8):
        codes, steps, weight = on_grid(level, step_dtype=torch.bfloat16)
        nudge = torch.randint(-1, 2, weight.shape, dtype=torch.int16) * (codes.abs() > 0)
        nudged = (weight.view(torch.int16) + nudge.to(torch.int16)).view(torch.bfloat16)
        recovered = quantize(nudged, "q4_0", recover_grid=True)
        assert same_codes(recovered, codes, steps).float().mean() > 0.98


def test_without_a_grid_the_plain_rule_stands(path):
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    recovered = quantize(weight, "q4_0", recover_grid=True)
    assert torch.equal(recovered.tensors["blocks"], q4_0.quantize(weight))
    assert recovered.fit.groups_on_grid == 0
    assert recovered.fit.values_exact == recovered.fit.naive_values_exact
    expected = (recovered.dequantize() - weight.float()).abs().unflatten(-1, (-1, 32)).amax(-1)
    expected = (expected / weight.float().abs().unflatten(-1, (-1, 32)).amax(-1)).max()
    assert recovered.fit.worst_error == pytest.approx(float(expected))


def test_zeros_and_numbers_too_small_for_float16_are_no_trouble(path):
    weight = torch.zeros(3, 32)
    weight[1, 4], weight[2] = 1e-42, 1e-33
    recovered = quantize(weight, "q4_0", recover_grid=True)
    assert not recovered.dequantize().any()
    assert recovered.fit.groups_exact == 1
    assert recovered.fit.worst_error == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(LEVELS), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_both_paths_give_the_same_bytes_and_figures(seed, level, dtype):
    _, _, weight = on_grid(level, dtype=dtype, num_groups=64, seed=seed)
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.01
    for tensor in (weight, noise, torch.cat([weight, noise])):
        fast = q4_0_grid.quantize(tensor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            slow = q4_0_grid.quantize(tensor)
        assert torch.equal(fast[0], slow[0])
        assert fast[1].worst_error == pytest.approx(slow[1].worst_error, rel=1e-6)
        assert str(fast[1]) == str(slow[1])
        assert fast[1].peak_levels == slow[1].peak_levels


def test_fits_add_up():
    one, two = (quantize(on_grid(level)[2], "q4_0", recover_grid=True).fit for level in (2, 6))
    whole = q4_0_grid.GridFit.sum([one, two])
    assert whole.num_values == 2 * NUM_GROUPS * 32
    assert whole.peak_levels == (0, NUM_GROUPS, 0, 0, 0, NUM_GROUPS, 0, 0)
    assert whole.worst_error == max(one.worst_error, two.worst_error)
    assert "100.00% of 8,192 groups lie on a Q4_0 grid" in str(whole)


def test_a_grid_and_an_importance_matrix_exclude_each_other():
    with pytest.raises(BadSettingError, match="exclude each other"):
        quantize(torch.zeros(1, 32), "q4_0", recover_grid=True, importance=torch.ones(32))
