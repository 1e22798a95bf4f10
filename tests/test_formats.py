"""Each format's codes and bytes against the library that owns the format, and what all formats have in common."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_qat_kit.errors import BadSettingError, BadTensorError, MissingLibraryError, UnknownNameError
from gemma_qat_kit.formats import ggml, k_quants, mobile, nf4, q8_0, w4a16
from gemma_qat_kit.formats.quantized import FORMATS, fake_quantize, quantize

generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(48, 512, generator=generator)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------- the owners' arithmetic


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mobile_linear_is_to_transformers_what_it_is_to_us(bits, dtype):
    from transformers.integrations.gemma_quant import QuantizedLinear

    stored = quantize(WEIGHT, f"mobile_int{bits}")
    linear = QuantizedLinear(512, 48, num_bits=bits)
    linear.weight.data, linear.weight_scale.data = stored.tensors["packed"], stored.tensors["scale"]
    assert torch.equal(linear._dequantize_weights(), stored.dequantize())
    # In 16 bits transformers rounds the scale first, then the product; the kit rounds the product alone.
    rounded = (stored.codes.to(dtype) * stored.scale.to(dtype)).float()
    assert torch.equal(linear._dequantize_weights(dtype).float(), rounded)
    assert (rounded - stored.dequantize(dtype).float()).abs().max() <= 2**-7 * stored.dequantize().abs().max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_mobile_per_layer_embedding_is_to_transformers_what_it_is_to_us(bits):
    from transformers.integrations.gemma_quant import QuantizedEmbedding

    stored = quantize(WEIGHT, f"mobile_int{bits}", group_size=256)
    assert stored.scale.shape == (48, 2)
    table = QuantizedEmbedding(48, 512, torch.float32, num_bits=bits)
    table.embedding_quantized.data, table.embedding_scale.data = stored.tensors["packed"], stored.tensors["scale"]
    assert torch.equal(table.weight, stored.dequantize())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.013, 3.0])
def test_static_activations_are_rounded_as_transformers_rounds_them(dtype, scale):
    from transformers.integrations.gemma_quant import apply_srq

    values = torch.cat([WEIGHT.flatten(), torch.arange(-200, 200) / 2 * scale]).to(dtype)
    assert torch.equal(mobile.round_activation(values, torch.tensor(scale)), apply_srq(values, torch.tensor(scale)))


@pytest.mark.parametrize("bits", [4, 8])
def test_mobile_error_is_at_most_half_a_step(bits):
    codes, scale = mobile.quantize(WEIGHT, bits, group_size=256)
    error = (mobile.dequantize(codes, scale) - WEIGHT).abs().unflatten(-1, (2, -1))
    assert (error <= scale[..., None] * 0.5001).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_w4a16_is_to_compressed_tensors_what_it_is_to_us(dtype):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = WEIGHT.to(dtype).float()
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    groups = weight.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    scale = scale.to(torch.bfloat16)
    stored = quantize(weight.to(dtype), "w4a16")
    assert torch.equal(stored.tensors["scale"], scale)
    codes = theirs(weight, scale.float(), zero, arguments, dtype=torch.int8)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.tensors["packed"], pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(stored.tensors["packed"], 4, codes.shape), codes)
    assert torch.equal(stored.dequantize(torch.bfloat16), dequantize(codes, scale, args=arguments))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nf4_is_what_bitsandbytes_makes(dtype):
    from bitsandbytes import functional

    weight = WEIGHT.to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = quantize(weight, "nf4")
    assert torch.equal(stored.tensors["packed"], packed.flatten())
    assert torch.equal(stored.tensors["scale"], state.absmax)
    assert torch.equal(stored.dequantize(dtype), functional.dequantize_4bit(packed, state))
    by_hand = nf4.levels()[stored.codes.long()].unflatten(-1, (-1, 64)) * stored.scale.reshape(48, 8, 1)
    assert torch.allclose(stored.dequantize(), by_hand.flatten(-2), rtol=1e-6, atol=0)


def test_k_quants_are_written_by_llama_cpp_and_read_by_gguf():
    errors = []
    for kind, group_bytes in k_quants.BYTES.items():
        blocks = k_quants.quantize(WEIGHT.reshape(4, 12, 512), kind)
        assert blocks.shape == (4, 12, 2 * group_bytes)
        assert np.array_equal(blocks.numpy(), ggml.quantize(WEIGHT.reshape(4, 12, 512).numpy(), kind))
        errors.append((k_quants.dequantize(blocks, kind).reshape(48, 512) - WEIGHT).norm() / WEIGHT.norm())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # 2, 4 and 6 bits


def test_k_quants_keep_zeros_and_refuse_what_they_cannot_hold():
    assert not k_quants.dequantize(k_quants.quantize(torch.zeros(2, 256)), "Q6_K").any()
    with pytest.raises(BadTensorError, match="groups of 256"):
        k_quants.quantize(torch.zeros(2, 128))
    with pytest.raises(BadTensorError, match=r"embed\[1, 3\] is nan"):
        k_quants.quantize(torch.zeros(2, 256).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(torch.nan)),
                          name="embed")  # fmt: skip


def test_without_llama_cpp_its_quantizers_say_how_to_get_it(monkeypatch):
    ggml._quantize_chunk.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="pip install xllamacpp"):
        ggml.quantize(np.zeros((1, 256), np.float32), "Q6_K")


# ---------------------------------------------------------------------------------------------- what all share

BITS = {"q4_0": 4.5, "q8_0": 8.5, "w4a16": 4.5, "nf4": 4.5, "mobile_int8": 8 + 32 / 512, "mobile_int4": 4 + 32 / 512,
        "mobile_int2": 2 + 32 / 512}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_leading_dimensions_and_any_float(format, dtype):
    weight = WEIGHT.to(dtype)
    flat, deep = quantize(weight, format), quantize(weight.reshape(2, 3, 8, 512), format)
    assert torch.equal(deep.dequantize(dtype).reshape(48, 512), flat.dequantize(dtype))
    assert deep.codes.shape == (2, 3, 8, 512)
    assert torch.equal(quantize(weight[5], format).dequantize(), flat.dequantize()[5])
    assert torch.equal(quantize(weight.T.contiguous().T, format).dequantize(), flat.dequantize())
    assert flat.dequantize(dtype).dtype == dtype
    assert flat.bits_per_weight == BITS[format]
    assert flat.nbytes == 48 * 512 * BITS[format] / 8
    assert f"{flat.nbytes:,} bytes" in str(flat)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "nf4"])
def test_weights_are_codes_times_scale(format):
    stored = quantize(WEIGHT, format)
    product = stored.codes.float().unflatten(-1, (stored.scale.shape[-1], -1)) * stored.scale[..., None]
    dtype = torch.bfloat16 if format == "w4a16" else torch.float32  # compressed-tensors multiplies in the scale's type
    assert torch.equal(stored.dequantize(dtype), product.flatten(-2).to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_quantize_keeps_the_same_values_and_lets_the_gradient_through(format, dtype):
    weight = WEIGHT.to(dtype, copy=True).requires_grad_()
    kept = fake_quantize(weight, format)
    assert torch.equal(kept, quantize(weight, format).dequantize(dtype))
    upstream = torch.randn(48, 512, generator=generator).to(dtype)
    kept.backward(upstream)
    assert torch.equal(weight.grad, upstream)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**31), st.floats(1e-4, 1e4))
def test_what_is_on_a_grid_stays_there(format, seed, size):
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * size
    once = quantize(weight, format).dequantize()
    relative = (once - weight).norm() / weight.norm()
    assert relative < {"mobile_int2": 1.0, "mobile_int4": 0.25, "mobile_int8": 0.02, "q8_0": 0.02}.get(format, 0.15)
    if format in ("q8_0", "nf4", "mobile_int8"):  # each group keeps its extremum, and so its scale
        assert torch.allclose(quantize(once, format).dequantize(), once, rtol=2e-3, atol=1e-3 * size)


def test_more_bits_err_less():
    error = {name: (quantize(WEIGHT, name).dequantize() - WEIGHT).norm() for name in FORMATS}
    assert error["mobile_int2"] > error["mobile_int4"] > error["q4_0"] > error["mobile_int8"] > error["q8_0"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")])
def test_every_format_refuses_what_is_no_number_and_says_where(format, value, shown):
    weight = WEIGHT.clone()
    weight[7, 300] = value
    for call in (quantize, fake_quantize):
        with pytest.raises(BadTensorError) as caught:
            call(weight, format, name="layers.3.mlp.up_proj")
        assert str(caught.value).startswith(f"layers.3.mlp.up_proj[7, 300] is {shown}.")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_refuses_what_holds_no_weights(format):
    for nothing in (torch.zeros(0, 64), torch.zeros(4, 0), torch.tensor(1.0)):
        with pytest.raises(BadTensorError, match="must be weights in it"):
            quantize(nothing, format)
    for wrong, kind in ((WEIGHT.double(), "torch.float64"), (WEIGHT.to(torch.int8), "torch.int8"), ([1.0], "list")):
        with pytest.raises(BadTensorError, match=f"is {kind}"):
            quantize(wrong, format)


@pytest.mark.parametrize("format", ["q4_0", "q8_0", "w4a16"])
def test_rows_that_do_not_divide_are_refused_with_what_to_do(format):
    with pytest.raises(BadTensorError, match=r"rows of 48 weights.*groups of 32.*mobile_int4"):
        quantize(torch.zeros(2, 48), format, name="layers.0.o_proj")


def test_nf4_takes_any_row_but_whole_groups():
    assert quantize(torch.ones(4, 48), "nf4").dequantize().shape == (4, 48)
    with pytest.raises(BadTensorError, match=r"144 weights.*64 consecutive"):
        quantize(torch.zeros(3, 48), "nf4")


def test_a_wrong_format_or_option_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_0'"):
        quantize(WEIGHT, "q4_o")
    with pytest.raises(UnknownNameError, match="Did you mean 'mobile_int8'"):
        fake_quantize(WEIGHT, "mobile")
    for options in ({"recover_grid": True}, {"importance": torch.ones(512)}, {"group_size": 256}):
        with pytest.raises(BadSettingError, match=f"q8_0 has no {next(iter(options))}"):
            quantize(WEIGHT, "q8_0", **options)


def test_nf4_without_bitsandbytes_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingLibraryError, match="pip install bitsandbytes"):
        quantize(WEIGHT, "nf4")


def test_blocks_are_laid_out_as_gguf_reads_them():
    for kind, format in ((gguf.GGMLQuantizationType.Q4_0, "q4_0"), (gguf.GGMLQuantizationType.Q8_0, "q8_0")):
        stored = quantize(WEIGHT, format)
        values = gguf.quants.dequantize(stored.tensors["blocks"].numpy(), kind)
        assert np.array_equal(values, stored.dequantize().numpy())
    codes, scale = q8_0.unpack(stored.tensors["blocks"])
    assert torch.equal(q8_0.pack(codes, scale), stored.tensors["blocks"])
    assert torch.equal(w4a16.unpack(w4a16.pack(codes.clamp(-8, 7))), codes.clamp(-8, 7))
    assert torch.equal(nf4.pack(nf4.unpack(nf4.pack(codes.abs() % 16), (48, 512))), nf4.pack(codes.abs() % 16))
