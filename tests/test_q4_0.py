"""Q4_0 by each of its rules, bit for bit against gguf's numpy and llama.cpp's own C code, in C and in torch."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats import ggml, native, q4_0, q4_0_importance, q8_0
from gemma_qat_kit.formats.quantized import quantize

generator = torch.Generator().manual_seed(0)
RANDOM = torch.randn(70, 3, 320, generator=generator) * 0.02
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def adversarial():
    """Groups in which a rule is most likely to differ: ties, zeros, denormals, halves, far apart magnitudes."""
    ties = torch.tensor([1.0, -1.0] * 16)
    halves = (torch.arange(32) - 16) / 2 + 0.25
    rows = [ties, -ties, torch.zeros(32), -torch.zeros(32), torch.full((32,), 1e-40), torch.full((32,), -3e-45),
            halves, halves * 1e-7, ties * 1e-8, halves * 7e3, torch.eye(32)[5] * -7, torch.linspace(-8, 7, 32),
            torch.linspace(-1, 1, 32) ** 9, torch.full((32,), 0.1), torch.tensor([0.0] * 31 + [-0.0]),
            torch.tensor([1e-38, -1e-38] * 16), torch.tensor([65504.0, -1e-7] * 16)]  # fmt: skip
    nudged = torch.nextafter(halves, torch.full_like(halves, torch.inf))
    return torch.stack([*rows, nudged, -nudged])


def on_tie_points():
    """Weights that fall exactly on, just below and just above the points where a code changes."""
    codes = torch.randint(-8, 8, (400, 32), generator=generator) + 0.5
    scale = 2.0 ** torch.randint(-12, 0, (400, 1), generator=generator) * (1 + torch.rand(400, 1, generator=generator))
    on = codes * scale
    return torch.cat([on, torch.nextafter(on, on + 1), torch.nextafter(on, on - 1)])


CASES = {"random": RANDOM, "adversarial": adversarial(), "tie points": on_tie_points()}


@pytest.fixture(params=["C", "torch"])
def path(request, monkeypatch):
    """Run a test on the compiled kernels, then on torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler here")
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_q4_0_matches_gguf_and_llama_cpp_bit_for_bit(path, case, dtype):
    weight = CASES[case].to(dtype)
    same = weight.float().numpy()
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(same, gguf.GGMLQuantizationType.Q4_0)
    blocks = q4_0.quantize(weight).numpy()
    assert np.array_equal(blocks, ggml.quantize(same, "Q4_0"))
    # The two oracles differ in the sign of the zero scale of groups of nothing but -0.0; the file's owner decides.
    groups = np.signbit(same.reshape(-1, 32)).all(-1) & (same.reshape(-1, 32) == 0).all(-1)
    assert np.array_equal(blocks.reshape(-1, 18)[~groups], expected.reshape(-1, 18)[~groups])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_q8_0_matches_gguf_and_llama_cpp_bit_for_bit(case, dtype):
    weight = CASES[case].to(dtype)
    same = weight.float().numpy()
    blocks = q8_0.quantize(weight).numpy()
    normal = np.abs(same).reshape(-1, 32).max(-1) > 1e-30  # below, an inverse overflows: zeros to us, undefined in C
    with np.errstate(all="ignore"):
        by_gguf = gguf.quants.quantize(same, gguf.GGMLQuantizationType.Q8_0)
    for expected in (ggml.quantize(same, "Q8_0"), by_gguf):
        assert np.array_equal(blocks.reshape(-1, 34)[normal], expected.reshape(-1, 34)[normal])
    assert not q8_0.dequantize(torch.from_numpy(blocks)).reshape(-1, 32)[~normal].any()


def test_the_real_model_becomes_the_same_bytes_as_in_llama_cpp(path, built_in):
    for tensor in gguf.GGUFReader(built_in).tensors[10:20]:
        weight = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if weight.ndim == 2:
            assert np.array_equal(q4_0.quantize(torch.from_numpy(weight)).numpy(), ggml.quantize(weight, "Q4_0"))


@pytest.mark.parametrize("case", CASES)
def test_importance_matches_llama_cpp_bit_for_bit(path, case):
    weight = CASES[case]
    importance = torch.rand(weight.shape[-1], generator=generator) ** 4
    expected = ggml.quantize(weight.numpy(), "Q4_0", importance.numpy())
    assert np.array_equal(q4_0_importance.quantize(weight, importance).numpy(), expected)


def test_importance_where_nothing_matters_gives_zero_scales_as_llama_cpp_does(path):
    expected = ggml.quantize(RANDOM.numpy(), "Q4_0", np.zeros(320, np.float32))
    assert np.array_equal(q4_0_importance.quantize(RANDOM, torch.zeros(320)).numpy(), expected)


def test_importance_protects_what_matters(path):
    importance = torch.ones(320)
    importance[::32] = 1000
    error = {}
    for name, options in (("plain", {}), ("importance", {"importance": importance})):
        error[name] = (quantize(RANDOM, "q4_0", **options).dequantize() - RANDOM)[..., ::32].square().mean()
    assert error["importance"] < error["plain"] / 2


@pytest.mark.parametrize("wrong", [torch.ones(31), -torch.ones(320), torch.full((320,), torch.nan)])
def test_an_importance_that_does_not_fit_is_refused(wrong):
    with pytest.raises(BadTensorError, match="one mean square for each of its 320 inputs"):
        q4_0_importance.quantize(RANDOM, wrong)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_and_fake_quantize_agree_with_gguf(path, dtype):
    for weight in CASES.values():
        blocks = q4_0.quantize(weight.to(dtype))
        values = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0))
        assert torch.equal(q4_0.dequantize(blocks), values)
        assert torch.equal(q4_0.dequantize(blocks, dtype), values.to(dtype))
        assert torch.equal(q4_0.fake_quantize(weight.to(dtype)), values.to(dtype))


GROUPS = arrays.arrays(
    np.float32, (4, 32), elements=st.floats(-1000, 1000, width=32, allow_nan=False, allow_subnormal=True)
)


@settings(max_examples=150, deadline=None)
@given(GROUPS)
def test_any_group_keeps_its_extremum_and_errs_by_at_most_one_step(values):
    weight = torch.from_numpy(values)
    blocks = q4_0.quantize(weight)
    codes, scale = q4_0.unpack(blocks)
    assert torch.equal(q4_0.pack(codes, scale), blocks)
    assert np.array_equal(blocks.numpy(), ggml.quantize(values, "Q4_0"))
    # Half a step, a whole one where the far side has no code 8, and float16's rounding of the step (normal or not).
    bound = scale.abs() + weight.abs().amax(-1, keepdim=True) * 2**-10 + 2**-22
    assert ((q4_0.dequantize(blocks) - weight).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_both_paths_give_the_same_bytes_for_any_group(values):
    weight, importance = torch.from_numpy(values), torch.linspace(0, 2, 32)
    fast = q4_0.quantize(weight), q4_0_importance.quantize(weight, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        slow = q4_0.quantize(weight), q4_0_importance.quantize(weight, importance)
    assert all(map(torch.equal, fast, slow))


@pytest.mark.parametrize(
    ("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf"), (6e5, "600000")]
)
def test_a_value_that_no_scale_holds_is_refused_with_its_position(path, value, shown):
    weight = RANDOM.clone()
    weight[41, 2, 7] = weight[69, 0, 1] = value
    for rule in (q4_0.quantize, q4_0.fake_quantize, lambda w, name: quantize(w, "q4_0", recover_grid=True, name=name)):
        with pytest.raises(BadTensorError) as caught:
            rule(weight, name="blk.3.attn_q")
        assert str(caught.value).startswith(f"blk.3.attn_q[41, 2, 7] is {shown}.")


def test_the_largest_value_that_a_scale_holds_is_kept(path):
    weight = torch.tensor([[524159.0, -524159.0] * 16])
    assert q4_0.dequantize(q4_0.quantize(weight)).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes():
    for weight in CASES.values():
        importance = torch.rand(weight.shape[-1], generator=generator)
        assert torch.equal(q4_0.quantize(weight.cuda()).cpu(), q4_0.quantize(weight))
        assert torch.equal(q4_0.fake_quantize(weight.cuda()).cpu(), q4_0.fake_quantize(weight))
        on_gpu = q4_0_importance.quantize(weight.cuda(), importance.cuda())
        assert torch.equal(on_gpu.cpu(), q4_0_importance.quantize(weight, importance))
