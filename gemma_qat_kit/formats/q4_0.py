"""Q4_0: groups of 32 along the input axis, a 4-bit code a weight and a float16 scale a group, 4.5 bits a weight.

A group is 18 bytes: the scale, then 16 bytes of which byte j holds code j in its low and code j + 16 in its high
nibble. Codes q lie in [-8, 7] (stored plus 8) and stand for q * scale; a scale may be negative.

    scale = (value of largest magnitude, with its sign) / -8
    q     = clamp(trunc(w / scale + 8.5), 0, 15) - 8        with the scale before its rounding to float16

There are three ways to find the codes and scales of a tensor:

- `quantize`, here: the rule above. The extremum gets the code -8, so it is exact and the range is used in full.
- `q4_0_grid.quantize`: weights of a QAT checkpoint lie on such a grid already, and their step is found again.
- `q4_0_importance.quantize`: llama.cpp's search with an importance matrix, the strongest rule without training.

On a CPU all three run in C (q4_0.c); the torch code gives the same bytes on any device.
Source: ggml's `quantize_row_q4_0_ref`, gguf-py's `Q4_0`, google-deepmind/gemma's `peft/_quantization.py`.
"""

import torch

from gemma_qat_kit.formats import native
from gemma_qat_kit.formats.groups import LARGEST, check, check_finite, in_chunks, not_usable

GROUP_SIZE, GROUP_BYTES = 32, 18


def quantize(weight: torch.Tensor, name: str = "This tensor") -> torch.Tensor:
    """Round a weight to Q4_0 by the plain rule.

    Args:
        weight: Float, (..., in), `in` a multiple of 32.
        name: What an error calls it.

    Returns:
        Blocks, uint8 (..., in / 32 * 18), byte for byte what ggml writes.

    Raises:
        BadTensorError: NaN, an infinity or a value from 524,160 on; no floats; rows that do not divide.
    """
    weight = ready(weight, name)
    if not native.can_run(weight):
        return pack(*by_groups(_plain, weight))
    blocks = empty_blocks(weight)
    native.run("q4_0_quantize", weight, native.DTYPES[weight.dtype], target=blocks, group_size=GROUP_SIZE, name=name)
    return blocks


def fake_quantize(weight: torch.Tensor, name: str = "This tensor") -> torch.Tensor:
    """Return what Q4_0 keeps of a weight (..., in), in its shape and dtype; `quantize` and `dequantize` in one pass."""
    weight = ready(weight, name)
    if not native.can_run(weight):
        return dequantize(quantize(weight, name), weight.dtype)
    kept = native.empty(weight.shape, weight.dtype)
    native.run("q4_0_fake_quantize", weight, native.DTYPES[weight.dtype], target=kept, group_size=GROUP_SIZE, name=name)
    return kept


def dequantize(blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight (..., in) of blocks (..., in / 32 * 18): the float32 product, rounded to `dtype`."""
    if not native.can_run(blocks):
        codes, scale = unpack(blocks)
        return (codes.float().unflatten(-1, (-1, GROUP_SIZE)) * scale[..., None]).flatten(-2).to(dtype)
    blocks = blocks.contiguous()
    shape = (*blocks.shape[:-1], blocks.shape[-1] // GROUP_BYTES * GROUP_SIZE)
    weight = native.empty(shape, dtype)
    native.run("q4_0_dequantize", blocks, native.DTYPES[dtype], target=weight, group_size=GROUP_BYTES)
    return weight


def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the blocks of int8 codes (..., in) in [-8, 7] and float scales (..., in / 32), rounded to float16 here."""
    stored = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, GROUP_SIZE // 2))
    nibbles = stored[..., 0, :] | stored[..., 1, :] << 4
    return torch.cat([scale.to(torch.float16)[..., None].view(torch.uint8), nibbles], -1).flatten(-2)


def unpack(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes (..., in) and float32 scales (..., in / 32): the inverse of `pack`."""
    groups = blocks.unflatten(-1, (-1, GROUP_BYTES))
    nibbles = torch.stack([groups[..., 2:] & 15, groups[..., 2:] >> 4], -2)
    return nibbles.flatten(-3).to(torch.int8) - 8, scales(blocks)


def scales(blocks: torch.Tensor) -> torch.Tensor:
    """Return the float32 scales (..., in / 32) of blocks."""
    return blocks.unflatten(-1, (-1, GROUP_BYTES))[..., :2].contiguous().view(torch.float16)[..., 0].float()


def ready(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return the weight in one piece, checked for everything but NaN, which the kernels look for."""
    check(weight, GROUP_SIZE, name)
    weight = weight.detach().contiguous()
    if not native.can_run(weight):
        check_finite(weight, name)
        if (too_large := weight.abs().float() >= LARGEST).any():
            raise not_usable(weight, name, int(torch.nonzero(too_large.flatten())[0]))
    return weight


def by_groups(rule, weight: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply a torch rule to groups (n, 32); its codes (n, 32) and scales (n,) come back in the weight's shape."""
    codes, scale, *facts = in_chunks(rule, weight.reshape(-1, GROUP_SIZE), *more)
    return codes.reshape(weight.shape), scale.reshape(*weight.shape[:-1], -1), *facts


def extremum(groups: torch.Tensor) -> torch.Tensor:
    """Return the first value of largest magnitude of each group (n, 32), signed, (n,); never -0.0, as in ggml."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[:, 0] + 0.0


def plain_rule(groups: torch.Tensor, extreme: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes in [-8, 7], float32 (n, 32), and scales (n,) of float32 groups by ggml's rule."""
    scale = extreme / -8
    inv_scale = torch.where(scale == 0, 0, 1 / scale)
    codes = torch.trunc(groups * inv_scale[:, None] + 8.5).clamp(0, 15)
    # A scale whose inverse overflows is zero in float16; ggml stores the code 0.
    return torch.where(inv_scale.isinf()[:, None], 0, codes) - 8, scale


def _plain(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = groups.float()
    codes, scale = plain_rule(groups, extremum(groups))
    return codes.to(torch.int8), scale


def empty_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Return room for the blocks of a weight (..., in)."""
    return native.empty((*weight.shape[:-1], weight.shape[-1] // GROUP_SIZE * GROUP_BYTES), torch.uint8)
