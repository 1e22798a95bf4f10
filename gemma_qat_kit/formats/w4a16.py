"""w4a16: int4, symmetric, groups of 32 along the input axis, bfloat16 scales (compressed-tensors' `pack-quantized`).

Codes lie in [-8, 7]; eight of them, each plus 8, fill an int32 word, lowest nibble first.
Source: `compressed_tensors/compressors/pack_quantized/helpers.py` and the published E2B, 12B and 31B files.
"""

import torch

from gemma_qat_kit.formats.groups import check, check_finite

GROUP_SIZE = 32


def quantize(weight: torch.Tensor, name: str = "This tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (..., in) to int8 codes (..., in) and bfloat16 scales (..., in / 32), `weight ≈ codes * scale`.

    Raises:
        BadTensorError: NaN or an infinity; no floats; rows that do not divide by 32.
    """
    check(weight, GROUP_SIZE, name)
    check_finite(weight, name)
    groups = weight.detach().float().unflatten(-1, (-1, GROUP_SIZE))
    # compressed-tensors' min-max observer: the symmetric range spans 15 steps.
    scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.clamp(torch.round(groups / scale.float()[..., None]), -8, 7).to(torch.int8)
    return codes.flatten(-2), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 weight that compressed-tensors computes from codes (..., in) and scales (..., in / 32)."""
    return (codes.unflatten(-1, (-1, GROUP_SIZE)).to(scale.dtype) * scale[..., None]).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return codes (..., in) as int32 words (..., in / 8)."""
    nibbles = (codes.to(torch.int64) + 8).unflatten(-1, (-1, 8))
    words = (nibbles << _shifts(codes)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Return the int8 codes (..., in) of int32 words (..., in / 8): the inverse of `pack`."""
    nibbles = (words.to(torch.int64)[..., None] >> _shifts(words)) & 15
    return (nibbles.flatten(-2) - 8).to(torch.int8)


def _shifts(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 32, 4, device=like.device)
