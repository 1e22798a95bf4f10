"""Q4_0 with an importance matrix: llama.cpp's search for the scale that loses least where the inputs are large.

The importance of an input is the mean of its square over a text. Of 19 scales around the plain one, each group takes
the one that keeps most of the weighted energy: with weights u = importance * sqrt(mean(row²) + w²) and codes
q = clamp(round(w / s), -8, 7), the largest (Σ u w q)² / Σ u q², and then scale = Σ u w q / Σ u q².

On a CPU this runs in C (q4_0.c); the torch code here sums in the same order and gives the same bytes.
Source: ggml's `quantize_row_q4_0_impl` and `make_qx_quants`.
"""

import ctypes

import torch

from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats import native
from gemma_qat_kit.formats.q4_0 import GROUP_SIZE, by_groups, empty_blocks, extremum, pack, ready

_TINY = 1e-15  # ggml's GROUP_MAX_EPS: a group below it becomes zeros


def quantize(weight: torch.Tensor, importance: torch.Tensor, name: str = "This tensor") -> torch.Tensor:
    """Round a weight to Q4_0, most carefully where its inputs are large.

    Args:
        weight: As in `q4_0.quantize`.
        importance: Mean squared inputs, (in,), not negative.
        name: What an error calls the weight.

    Returns:
        Blocks, uint8 (..., in / 32 * 18), byte for byte what llama.cpp writes.

    Raises:
        BadTensorError: As `q4_0.quantize`, or an importance of another length, negative or NaN.
    """
    weight = ready(weight, name)
    importance = importance.to(weight.device, torch.float32).contiguous()
    if importance.shape != weight.shape[-1:] or not (importance >= 0).all() or importance.isinf().any():
        raise BadTensorError(
            f"The importance of {name} has the shape {tuple(importance.shape)}, or values below zero or NaN.",
            f"It holds one mean square for each of its {weight.shape[-1]:,} inputs.",
            "Collect it again from the model that the weight belongs to.",
        )
    groups_per_row = weight.shape[-1] // GROUP_SIZE
    if not native.can_run(weight):
        energy = _mean_square(weight)[..., None] + weight.float() ** 2
        u = importance * energy.double().sqrt().float()  # torch's float32 root is not always the nearest number
        return pack(*by_groups(_search, weight, u.reshape(-1, GROUP_SIZE)))
    blocks = empty_blocks(weight)
    arguments = native.DTYPES[weight.dtype], ctypes.c_int64(groups_per_row), ctypes.c_void_p(importance.data_ptr())
    native.run("q4_0_importance", weight, *arguments, target=blocks, group_size=GROUP_SIZE, multiple=groups_per_row,
               name=name)  # fmt: skip
    return blocks


def _mean_square(weight: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each row (...), summed one by one as ggml does."""
    total = torch.zeros(weight.shape[:-1], device=weight.device)
    for column in weight.unbind(-1):
        total += column.float() ** 2
    return total / weight.shape[-1]


def _search(groups: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, int8 (n, 32), and scales (n,) of groups with their weights u (n, 32)."""
    w = groups.float()
    extreme = extremum(w)
    best = scale = codes = None
    for shift in (0, *range(-9, 0), *range(1, 10)):
        inv_scale = -(8 + torch.tensor(0.1) * shift).to(w.device) / extreme
        q = torch.round(inv_scale[:, None] * w).nan_to_num().clamp(-8, 7)
        uwq, uqq = _sum(u * w * q), _sum(u * q * q)
        fitted = torch.where(uqq > 0, uwq / uqq, 0)
        if best is None:
            best, scale, codes = fitted * uwq, fitted, q
            continue
        better = (uqq > 0) & (uwq * uwq > best * uqq)
        best, scale = torch.where(better, fitted * uwq, best), torch.where(better, fitted, scale)
        codes = torch.where(better[:, None], q, codes)
    is_zero = extreme.abs() < _TINY
    return torch.where(is_zero[:, None], -8, codes).to(torch.int8), torch.where(is_zero, 0, scale)


def _sum(products: torch.Tensor) -> torch.Tensor:
    """Sum groups (n, 32) in ggml's order, which decides the last bits."""
    total = torch.zeros_like(products[:, 0])
    for column in products.unbind(-1):
        total = total + column
    return total
