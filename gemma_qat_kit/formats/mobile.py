"""Gemma's mobile format: per output channel, symmetric, 2, 4 or 8 bits, a float32 scale per channel.

A code q lies in [-2**(bits-1), 2**(bits-1) - 1] and stands for q * scale. Codes of 2 and 4 bits are stored with an
offset of 2**(bits-1), lowest bits first; codes of 8 bits are plain int8.
Source: `transformers/integrations/gemma_quant.py` and the published E2B and E4B files.
"""

import torch

from gemma_qat_kit.formats.groups import check, check_finite


def quantize(
    weight: torch.Tensor, bits: int, *, group_size: int | None = None, name: str = "This tensor"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to its nearest codes.

    Args:
        weight: Float, (..., in).
        bits: 2, 4 or 8.
        group_size: Weights of a row that share a scale (256 in the per-layer embeddings); None is the whole row.
        name: What an error calls the weight.

    Returns:
        Codes, int8 (..., in), and scales, float32 (..., in / group_size), with `weight ≈ codes * scale`.

    Raises:
        BadTensorError: NaN or an infinity; no floats; rows that do not divide by `group_size`.
    """
    top = 2 ** (bits - 1)
    check(weight, group_size, name)
    check_finite(weight, name)
    groups = weight.detach().float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    # The range is one step longer on the negative side, so each side asks for its own step.
    step = torch.maximum(groups.amax(-1) / (top - 1 if bits > 2 else 1.5), -groups.amin(-1) / top)
    scale = torch.where(step > 0, step, torch.ones_like(step))
    codes = torch.clamp(torch.round(groups / scale[..., None]), -top, top - 1).to(torch.int8)
    return codes.flatten(-2), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 weight that codes (..., in) and scales (..., groups) stand for."""
    return (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes as stored: int8 (..., in) for 8 bits, otherwise uint8 (..., in * bits / 8)."""
    if bits == 8:
        return codes.to(torch.int8)
    parts = (codes + 2 ** (bits - 1)).to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    return sum(parts[..., i] << (bits * i) for i in range(8 // bits))


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the int8 codes of stored bytes: the inverse of `pack`."""
    if bits == 8:
        return packed
    parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2).to(torch.int8) - 2 ** (bits - 1)


def round_activation(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round activations to a layer's static int8 range, in their own dtype: halves to even, clipped to [-128, 127].

    Args:
        values: Float, any shape.
        scale: Float, (); 0 means that the layer was not calibrated and nothing is rounded.
    """
    scale = scale.to(values.dtype)
    step = torch.where(scale == 0, 1, scale)
    return torch.where(scale == 0, values, torch.clamp(torch.round(values / step), -128, 127) * step)
