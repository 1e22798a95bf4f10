"""What every format asks of a tensor before it touches it, and how a tensor is worked on a few groups at a time."""

import math
from collections.abc import Callable

import torch

from gemma_qat_kit.errors import BadTensorError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 8 * 65520.0  # from here on a Q4_0 scale would be an infinity in float16
CHUNK_GROUPS = 2**14  # two megabytes of float32 in groups of 32: the steps of a rule stay in a core's cache


def check(weight: torch.Tensor, group_size: int | None, name: str) -> None:
    """Refuse a tensor that cannot be quantized in groups along its last axis; NaN is looked for by `check_finite`.

    Args:
        weight: Any shape (..., in).
        group_size: Weights that share a scale, None for a whole row.
        name: What to call the tensor.

    Raises:
        BadTensorError: No floats, nothing in it, or rows that do not divide into groups.
    """
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise BadTensorError(
            f"{name} is {kind}.",
            "Weights are float32, float16 or bfloat16 torch tensors.",
            "Dequantize it first, or convert it with .float().",
        )
    if weight.ndim == 0 or weight.numel() == 0:
        raise BadTensorError(
            f"{name} has the shape {tuple(weight.shape)}.", "There must be weights in it.", "Pass the whole tensor."
        )
    if group_size and weight.shape[-1] % group_size:
        raise BadTensorError(
            f"{name} has rows of {weight.shape[-1]:,} weights.",
            f"A row must divide into groups of {group_size}.",
            "Leave this tensor in 16 bits, or take a format with one scale a row (mobile_int4, mobile_int8).",
        )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        BadTensorError: There is one; the message names the first one's position.
    """
    if torch.isfinite(weight).all():
        return
    raise not_usable(weight, name, int(torch.nonzero(~torch.isfinite(weight).flatten())[0]))


def not_usable(weight: torch.Tensor, name: str, index: int) -> BadTensorError:
    """Build the error for one value, given its position in the flattened tensor."""
    position = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(index), weight.shape))
    value = float(weight.flatten()[index])
    return BadTensorError(
        f"{name}[{position}] is {value:g}.",
        "Every weight must be finite" + (" and below 524,160." if math.isfinite(value) else "."),
        "Find out where it came from (a diverged training run, a damaged file) before quantizing.",
    )


def in_chunks(work: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call `work` on slices of the inputs' first axis on a CPU, on all at once on a GPU, and join what it returns."""
    if inputs[0].device.type != "cpu" or len(inputs[0]) <= CHUNK_GROUPS:
        return work(*inputs)
    parts = zip(*(tensor.split(CHUNK_GROUPS) for tensor in inputs), strict=True)
    return tuple(torch.cat(results) for results in zip(*(work(*part) for part in parts), strict=True))
