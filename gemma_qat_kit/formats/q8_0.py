"""Q8_0: groups of 32 along the input axis, an int8 code a weight and a float16 scale a group, 8.5 bits a weight.

A group is 34 bytes: the scale, then the codes. `scale = max|w| / 127`, `q = round(w / scale)`, halves away from zero,
with the scale before its rounding to float16.
Source: ggml's `quantize_row_q8_0_ref`, gguf-py's `Q8_0`.
"""

import torch

from gemma_qat_kit.formats.groups import check, check_finite, in_chunks

GROUP_SIZE, GROUP_BYTES = 32, 34


def quantize(weight: torch.Tensor, name: str = "This tensor") -> torch.Tensor:
    """Round a weight (..., in) to blocks, uint8 (..., in / 32 * 34), byte for byte what ggml writes.

    Raises:
        BadTensorError: NaN or an infinity; no floats; rows that do not divide by 32.
    """
    check(weight, GROUP_SIZE, name)
    check_finite(weight, name)
    codes, scale = in_chunks(_codes, weight.detach().reshape(-1, GROUP_SIZE))
    return pack(codes.reshape(weight.shape), scale.reshape(*weight.shape[:-1], -1))


def _codes(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = groups.float()
    scale = groups.abs().amax(-1) / 127
    inv_scale = torch.where(scale == 0, 0, 1 / scale)
    steps = (groups * inv_scale[:, None]).nan_to_num(posinf=0, neginf=0)
    # torch.round takes halves to even; the difference to the floor is exact, so halves are seen as they are.
    size, floor = steps.abs(), steps.abs().floor()
    return (torch.sign(steps) * (floor + (size - floor >= 0.5))).to(torch.int8), scale


def dequantize(blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight (..., in) of blocks (..., in / 32 * 34): the float32 product, rounded to `dtype`."""
    codes, scale = unpack(blocks)
    return (codes.float().unflatten(-1, (-1, GROUP_SIZE)) * scale[..., None]).flatten(-2).to(dtype)


def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the blocks of int8 codes (..., in) and float scales (..., in / 32), which are rounded to float16 here."""
    groups = codes.to(torch.int8).view(torch.uint8).unflatten(-1, (-1, GROUP_SIZE))
    return torch.cat([scale.to(torch.float16)[..., None].view(torch.uint8), groups], -1).flatten(-2)


def unpack(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes (..., in) and float32 scales (..., in / 32): the inverse of `pack`."""
    groups = blocks.unflatten(-1, (-1, GROUP_BYTES))
    scale = groups[..., :2].contiguous().view(torch.float16)[..., 0].float()
    return groups[..., 2:].contiguous().view(torch.int8).flatten(-2), scale
