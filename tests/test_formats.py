"""Each format's codes and bytes against the library that owns the format."""

import gguf
import numpy as np
import pytest
import torch

from gemma_qat_kit.formats import mobile, q6_k, w4a16

generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(48, 512, generator=generator)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mobile_bytes_mean_to_transformers_what_they_mean_to_us(bits):
    from transformers.integrations import gemma_quant

    codes, _ = mobile.quantize(WEIGHT, bits)
    packed = mobile.pack(codes, bits)
    assert packed.shape == (48, 512 * bits // 8)
    unpack = {2: gemma_quant._unpack_int2, 4: gemma_quant._unpack_int4, 8: lambda packed, width: packed}[bits]
    theirs = unpack(packed, 512)
    assert torch.equal(theirs.to(torch.int8), codes)
    assert torch.equal(mobile.unpack(packed, bits), codes)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_mobile_error_is_at_most_half_a_step(bits):
    codes, scale = mobile.quantize(WEIGHT, bits, group_size=256)
    error = (mobile.dequantize(codes, scale) - WEIGHT).abs().unflatten(-1, (2, -1))
    assert (error <= scale[..., None] * 0.5001).all()


def test_w4a16_words_mean_to_compressed_tensors_what_they_mean_to_us():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes, _ = w4a16.quantize(WEIGHT)
    words = w4a16.pack(codes)
    assert torch.equal(words, pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(words, 4, codes.shape), codes)
    assert torch.equal(w4a16.unpack(words), codes)


def test_q6_k_bytes_mean_to_gguf_what_they_mean_to_us():
    weight = WEIGHT.numpy()
    packed = q6_k.quantize(weight)
    assert packed.shape == (48, 2 * 210)
    values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q6_K)
    # A part of 16 has steps of its extremum / 32 (one whole step where the far side clips at 31), and its scale is a
    # multiple of the group's largest step / 128, which moves the far end by up to 32 halves of that.
    error = np.abs(values - weight).reshape(-1, 16, 16).max(-1)
    largest = np.abs(weight).reshape(-1, 16, 16).max(-1)
    assert (error <= largest / 32 + 16 * largest.max(-1, keepdims=True) / 32 / 128 * 1.01).all()
    assert np.linalg.norm(values - weight) / np.linalg.norm(weight) < 0.02


def test_q6_k_keeps_zeros():
    packed = q6_k.quantize(np.zeros((2, 256), np.float32))
    assert not gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q6_K).any()
