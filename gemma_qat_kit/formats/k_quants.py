"""ggml's K-quants: groups of 256 in parts of 16 or 32, with scales that are quantized themselves.

Q6_K holds Google's embedding tables in GGUF files; llama.cpp's own C code writes it. Q2_K, Q4_K and Q6_K are read by
gguf.
Source: ggml's `block_q2_K`, `block_q4_K` and `block_q6_K`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

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
