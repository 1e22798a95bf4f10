"""NF4 as bitsandbytes has it: 16 levels at the quantiles of a normal distribution, groups of 64, a float32 scale each.

Its levels are not evenly spaced, so no QAT grid can be held exactly. It is here as the comparison.
Source: bitsandbytes' `functional.quantize_4bit`, QLoRA (arXiv 2305.14314).
"""

import logging
import math

import torch

from gemma_qat_kit.errors import BadTensorError, MissingLibraryError
from gemma_qat_kit.formats.groups import check, check_finite

GROUP_SIZE = 64


def quantize(weight: torch.Tensor, name: str = "This tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (..., in) to bytes, uint8 (values / 2,), the first weight of two in the high nibble, and scales.

    Returns:
        The bytes, and float32 scales (values / 64,): the largest magnitude of each group.

    Raises:
        BadTensorError: NaN or an infinity; no floats; a number of weights that does not divide by 64.
        MissingLibraryError: bitsandbytes is not installed.
    """
    check(weight, None, name)
    check_finite(weight, name)
    if weight.numel() % GROUP_SIZE:
        raise BadTensorError(
            f"{name} has {weight.numel():,} weights.",
            f"bitsandbytes' groups are {GROUP_SIZE} consecutive weights.",
            "Leave this tensor in 16 bits.",
        )
    packed, state = _functional().quantize_4bit(
        weight.detach().contiguous(), blocksize=GROUP_SIZE, quant_type="nf4", compress_statistics=False
    )
    return packed.flatten(), state.absmax


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the weight, of `shape`, that bitsandbytes computes from the bytes and scales of `quantize`."""
    functional = _functional()
    state = functional.QuantState(
        absmax=scale,
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device=packed.device),
        blocksize=GROUP_SIZE,
        quant_type="nf4",
        dtype=dtype,
    )
    return functional.dequantize_4bit(packed[:, None], state).reshape(shape)


def unpack(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the numbers of the levels, int8 of `shape`, 0 to 15."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten().to(torch.int8)[: math.prod(shape)].reshape(shape)


def pack(levels: torch.Tensor) -> torch.Tensor:
    """Return the bytes of level numbers, int8 (...): the inverse of `unpack`."""
    first, second = levels.to(torch.uint8).flatten().unflatten(0, (-1, 2)).unbind(-1)
    return first << 4 | second


def levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 16 levels, float32, as shares of a group's largest magnitude."""
    return _functional().get_4bit_type("nf4", device=device)


def _functional():
    # It warns of a kernel that only its matrix products would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as err:
        raise MissingLibraryError(
            "bitsandbytes is not installed.", "NF4 is computed by it.", "Run: pip install bitsandbytes"
        ) from err
    return functional
