"""ggml's K-quants: groups of 256 in parts of 16 or 32, with scales that are quantized themselves.

Q6_K holds Google's embedding tables in GGUF files; llama.cpp's own C code writes it. Q2_K takes the codes of Gemma's
mobile 2-bit weights unchanged. All of Q2_K, Q4_K and Q6_K are read by gguf.
Source: ggml's `block_q2_K`, `block_q4_K` and `block_q6_K`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats import ggml
from gemma_qat_kit.formats.groups import check, check_finite
from gemma_qat_kit.machine import read_cpu_count

GROUP_SIZE = 256
BYTES = {"Q2_K": 84, "Q4_K": 144, "Q6_K": 210}


def quantize(weight: torch.Tensor, kind: str = "Q6_K", name: str = "This tensor") -> torch.Tensor:
    """Round a weight (..., in) to a K-quant with llama.cpp's own code, on all cores.

    Returns:
        Blocks, uint8 (..., in / 256 * bytes of a group).

    Raises:
        BadTensorError: NaN or an infinity; no floats; rows that do not divide by 256.
        MissingLibraryError: xllamacpp is not installed.
    """
    check(weight, GROUP_SIZE, name)
    check_finite(weight, name)
    rows = weight.detach().cpu().reshape(-1, weight.shape[-1])
    num_parts = min(len(rows), 4 * read_cpu_count())
    with ThreadPoolExecutor(read_cpu_count()) as pool:
        parts = pool.map(lambda part: ggml.quantize(part.float().contiguous().numpy(), kind), rows.chunk(num_parts))
        blocks = np.concatenate(list(parts))
    return torch.from_numpy(blocks).reshape(*weight.shape[:-1], -1)


def dequantize(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the float32 weight (..., in) of blocks, uint8 (..., bytes of a row), as gguf reads them."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType[kind]))


def pack_q2_k(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return Q2_K blocks that hold 2-bit codes as they are: `q * scale` becomes `d * 1 * (q + 2) - dmin * 2`, d = dmin.

    Args:
        codes: int8 (..., in), -2 to 1.
        scale: Float, (..., 1) or (..., in / 256); rounded to float16 here.

    Returns:
        Blocks, uint8 (..., in / 256 * 84).

    Raises:
        BadTensorError: Rows that do not divide by 256.
    """
    if codes.shape[-1] % GROUP_SIZE:
        raise BadTensorError(
            f"A row has {codes.shape[-1]:,} codes.",
            f"Q2_K takes rows in groups of {GROUP_SIZE}.",
            "Write this tensor as Q4_0, whose groups are 32.",
        )
    halves = (codes + 2).to(torch.uint8).unflatten(-1, (-1, 2, 4, 32))  # byte j of a half: j, j+32, j+64, j+96
    bits = halves[..., 0, :] | halves[..., 1, :] << 2 | halves[..., 2, :] << 4 | halves[..., 3, :] << 6
    groups = bits.flatten(-2)
    parts = torch.full((*groups.shape[:-1], 16), 1 | 2 << 4, dtype=torch.uint8)  # a scale of 1 and a minimum of 2 each
    step = scale.to(torch.float16).expand(groups.shape[:-1]).contiguous()[..., None].view(torch.uint8)
    return torch.cat([parts, groups, step, step], -1).flatten(-2)
