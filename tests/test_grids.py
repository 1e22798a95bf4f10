"""Grids with a scale of their own: C against torch, torch against autograd, and both against what a file stores."""

from dataclasses import replace

import gguf
import pytest
import torch

from gemma_qat_kit.errors import BadTensorError, UnknownNameError
from gemma_qat_kit.formats import native, q4_0
from gemma_qat_kit.formats.grids import FORMAT_BITS, GRIDS, find_grid, learned_fake_quantize, starting_scale
from gemma_qat_kit.formats.quantized import quantize

ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
HALF = [grid for grid in GRIDS.values() if grid.is_half]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(grid):
    """Return random weights and scales under which some of them lie outside the range, with every special case."""
    weight = random(3, 4, 128)
    num_groups = weight.shape[-1] // (grid.group_size or weight.shape[-1])
    scale = 1.4 / grid.high * (0.5 + random(3, 4, num_groups, seed=2).abs())
    scale[0, 0] = 0
    scale[0, 1] = 2.0**-4
    weight[0, 1] = (torch.arange(128) - 63.5) / 2**4  # halves between two codes
    if grid.is_half:
        scale[0, 2] *= -1
        scale[0, 3] = 1e-9  # a zero in float16
    return weight, scale


@pytest.fixture
def without_c(monkeypatch):
    """Return a function that switches the kernels off."""
    return lambda: monkeypatch.setattr(native, "can_run", lambda tensor: False)


def with_gradients(grid, weight, scale, gradient):
    """Return the values, and the gradients of the weight and of its scales."""
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    values = learned_fake_quantize(weight, scale, grid)
    values.backward(gradient)
    return values.detach(), weight.grad, scale.grad


def straight_through(grid, weight, scale, gradient):
    """Return the same by autograd, written as in the papers: round and store with a gradient of one, then clip."""
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    step = scale + ((scale.half().float() if grid.is_half else scale) - scale).detach()
    v = weight.unflatten(-1, (scale.shape[-1], -1)) / step[..., None]
    q = v + (v.round() - v).detach()
    values = (q.clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) * step[..., None]).flatten(-2)
    values.backward(gradient)
    return values.detach(), weight.grad, scale.grad


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("shape", [(), (1030, 1024)], ids=["small", "in several parts"])
@ALL
def test_c_computes_what_torch_computes(grid, shape, without_c):
    weight, scale = some(grid) if not shape else (random(*shape), 0.4 * random(1030, 1024 // (grid.group_size or 1024)))
    gradient = random(*weight.shape, seed=1)
    in_c = with_gradients(grid, weight, scale, gradient)
    without_c()
    in_torch = with_gradients(grid, weight, scale, gradient)
    assert torch.equal(in_c[0].view(torch.int32), in_torch[0].view(torch.int32))  # zeros have a sign
    assert torch.equal(in_c[1], in_torch[1])
    torch.testing.assert_close(in_c[2], in_torch[2], rtol=1e-4, atol=1e-3)  # sums in another order


@pytest.mark.parametrize("is_c", [True, False], ids=["C", "torch"])
@ALL
def test_values_are_those_that_the_stored_bytes_stand_for(grid, is_c, without_c):
    if not is_c:
        without_c()
    weight, scale = some(grid)
    stored = grid.store(weight, scale)
    assert torch.equal(learned_fake_quantize(weight, scale, grid), stored.dequantize())
    assert stored.format == grid.stored_as
    assert stored.codes.min() >= grid.low
    assert stored.codes.max() <= grid.high
    assert torch.equal(stored.codes, grid.codes(weight, scale))
    assert torch.equal(stored.scale, grid.stored_scale(scale))


@pytest.mark.parametrize("grid", HALF, ids=lambda grid: grid.name)
def test_q4_0_rounds_the_product_once_to_a_narrow_dtype(grid):
    weight, scale = some(grid)
    found = learned_fake_quantize(weight, scale, grid, torch.bfloat16)
    assert torch.equal(found, grid.store(weight, scale).dequantize(torch.bfloat16))


def test_mobile_multiplies_in_the_narrow_dtype_as_transformers_does():
    grid = GRIDS["mobile_int4"]
    weight, scale = some(grid)
    stored = grid.store(weight, scale)
    expected = stored.codes.to(torch.bfloat16) * scale.to(torch.bfloat16)
    assert torch.equal(learned_fake_quantize(weight, scale, grid, torch.bfloat16), expected)


@pytest.mark.parametrize("grid", HALF, ids=lambda grid: grid.name)
def test_gguf_py_reads_the_same_values_from_the_blocks(grid):
    weight, scale = some(grid)
    blocks = grid.store(weight, scale).tensors["blocks"]
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(learned_fake_quantize(weight, scale, grid), torch.from_numpy(theirs))


@pytest.mark.parametrize("is_c", [True, False], ids=["C", "torch"])
@ALL
def test_gradients_are_those_of_autograd_straight_through_the_rounding(grid, is_c, without_c):
    if not is_c:
        without_c()
    weight, scale = some(grid)
    weight, scale = weight[1:], scale[1:].abs()
    gradient = random(*weight.shape, seed=1)
    for ours, theirs in zip(
        with_gradients(grid, weight, scale, gradient), straight_through(grid, weight, scale, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@ALL
def test_a_weight_outside_the_range_gets_no_gradient_and_moves_the_scale_by_its_code(grid):
    weight, scale = torch.zeros(1, 128), torch.ones(1, 128 // (grid.group_size or 128))
    weight[0, 0], weight[0, 1], weight[0, 2] = (
        grid.high + 0.6,
        grid.low - 0.6,
        grid.high + 0.4,
    )  # the last one rounds in
    _, of_weight, of_scale = with_gradients(grid, weight, scale, torch.ones_like(weight))
    expected = torch.ones(1, 128)
    expected[0, :2] = 0
    assert torch.equal(of_weight, expected)
    assert of_scale[0, 0].item() == pytest.approx(grid.high + grid.low - 0.4, rel=1e-5)


@pytest.mark.parametrize("is_c", [True, False], ids=["C", "torch"])
@ALL
def test_a_scale_of_zero_gives_zeros_and_stays(grid, is_c, without_c):
    if not is_c:
        without_c()
    weight = random(2, 64)
    scale, gradient = torch.zeros(2, 64 // (grid.group_size or 64)), random(2, 64, seed=1)
    values, of_weight, of_scale = with_gradients(grid, weight, scale, gradient)
    assert not values.any()
    assert not of_scale.any()
    assert torch.equal(of_weight, gradient)
    assert not grid.store(weight, scale).dequantize().any()


@pytest.mark.parametrize("is_c", [True, False], ids=["C", "torch"])
@ALL
def test_a_nan_is_not_rounded_away(grid, is_c, without_c):
    if not is_c:
        without_c()
    weight, scale = some(grid)
    weight[1, 2, 3] = torch.nan
    found = learned_fake_quantize(weight, scale, grid)
    assert found.isnan().sum() == 1
    assert found[1, 2, 3].isnan()


@ALL
def test_a_weight_and_scales_that_are_not_contiguous_or_not_float32_count_as_they_are(grid):
    weight, scale = random(128, 128), 0.2 + random(128, 128 // (grid.group_size or 128), seed=1).abs()
    turned = weight.t()
    expected = learned_fake_quantize(turned.contiguous(), scale, grid)
    assert torch.equal(learned_fake_quantize(turned, scale, grid), expected)
    assert torch.equal(learned_fake_quantize(turned, scale.t().contiguous().t(), grid), expected)
    narrow = weight.to(torch.bfloat16).requires_grad_()
    found = learned_fake_quantize(narrow, scale, grid)
    found.sum().backward()
    assert torch.equal(found, learned_fake_quantize(narrow.detach().float(), scale, grid))
    assert narrow.grad.dtype == torch.bfloat16


def lost(grid, weight, scale, importance):
    error = weight - learned_fake_quantize(weight, scale, grid)
    return (importance * error.double().square()).sum(-1)


@pytest.mark.parametrize("is_heavy_tailed", [False, True])
@ALL
def test_scales_by_importance_lose_no_more_than_the_plain_rule(grid, is_heavy_tailed):
    weight, importance = random(64, 256), random(256, seed=1).exp().square()
    if is_heavy_tailed:
        weight *= weight.abs().square()
    plain = grid.plain(weight)
    found = lost(grid, weight, starting_scale(weight, grid, importance), importance)
    before = (importance * (weight - plain.dequantize()).double().square()).sum(-1)
    assert found.sum() < before.sum()
    if grid.name != "q4_0":  # llama.cpp's search never looks at the plain rule's scale
        assert (found <= before * 1.001).all()  # float16 scales are rounded after the search


@ALL
def test_scales_without_importance_are_found_by_the_weights_alone(grid):
    weight = random(64, 256)
    found = starting_scale(weight, grid)
    ones = torch.ones(256)
    assert found.shape == (64, 256 // (grid.group_size or 256))
    assert lost(grid, weight, found, ones).sum() <= (weight - grid.plain(weight).dequantize()).square().sum() * 1.0001
    if grid.bits in (2, 3):
        assert torch.equal(found, starting_scale(weight, grid, ones))


def test_scales_of_a_scaled_weight_are_scaled():
    weight, importance = random(8, 64), random(64, seed=1).square()
    for name in ("int3_g32", "mobile_int4"):
        once = starting_scale(weight, GRIDS[name], importance)
        torch.testing.assert_close(starting_scale(weight * 4, GRIDS[name], importance), once * 4)


@ALL
def test_a_weight_of_zeros_has_scales_that_give_zeros(grid):
    weight = torch.zeros(2, 64)
    for importance in (None, torch.ones(64)):
        scale = starting_scale(weight, grid, importance)
        assert torch.isfinite(scale).all()
        assert not learned_fake_quantize(weight, scale, grid).any()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.bits == FORMAT_BITS[grid.stored_as]])
def test_the_plain_rule_of_a_grid_is_that_of_its_format(name):
    weight = random(3, 5, 64)
    found, expected = GRIDS[name].plain(weight), quantize(weight, name)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in expected.tensors)


@pytest.mark.parametrize("name", ["int3_g32", "int2_g32"])
def test_the_plain_rule_of_narrow_groups_gives_the_largest_weight_the_lowest_code(name):
    grid, weight = GRIDS[name], random(7, 96)
    groups = weight.view(-1, 32)
    largest = groups.abs().argmax(-1, keepdim=True)
    scale = groups.gather(-1, largest) / grid.low
    found = grid.plain(weight)
    assert (found.codes.view(-1, 32).gather(-1, largest) == grid.low).all()
    assert torch.equal(found.scale.view(-1, 1), scale.half().float())
    expected = (groups / found.scale.view(-1, 1)).round().clamp(grid.low, grid.high)
    assert torch.equal(found.codes.view(-1, 32), expected.to(torch.int8))


def test_a_mobile_grid_may_have_several_scales_in_a_row():
    grid, weight = replace(GRIDS["mobile_int4"], group_size=64), random(5, 256)
    scale = starting_scale(weight, grid)
    assert scale.shape == grid.plain(weight).scale.shape == (5, 4)
    assert torch.equal(learned_fake_quantize(weight, scale, grid), grid.store(weight, scale).dequantize())
    assert torch.equal(
        grid.plain(weight).tensors["packed"], quantize(weight, "mobile_int4", group_size=64).tensors["packed"]
    )


def test_weights_on_a_q4_0_grid_come_back_with_its_scales():
    weight = quantize(random(4, 64), "q4_0").dequantize()
    scale = q4_0.unpack(quantize(weight, "q4_0", recover_grid=True).tensors["blocks"])[1]
    assert torch.equal(learned_fake_quantize(weight, scale, GRIDS["q4_0"]), weight)


def test_an_unknown_grid_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"Unknown grid 'int3'\. Known: q4_0, .* Did you mean 'int3_g32'"):
        find_grid("int3")
    assert all(find_grid(name) is grid for name, grid in GRIDS.items())


@ALL
def test_a_weight_that_a_grid_cannot_hold_is_named(grid):
    broken = random(2, 64)
    broken[1, 5] = torch.nan
    with pytest.raises(BadTensorError, match=r"some\.weight\[1, 5\] is nan"):
        starting_scale(broken, grid, name="some.weight")
    if grid.group_size:
        with pytest.raises(BadTensorError, match=r"some\.weight has rows of 40"):
            starting_scale(random(2, 40), grid, name="some.weight")
