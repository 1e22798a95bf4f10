"""A tensor as a GGUF stores it: ggml's type and its bytes."""

from dataclasses import dataclass

import torch

from gemma_qat_kit.formats import k_quants, q4_0, q8_0

_ROWS = 2**24  # values that are read at a time
_OWN = {"Q4_0": q4_0.dequantize, "Q8_0": q8_0.dequantize}


@dataclass(frozen=True, eq=False)
class Blocks:
    """A tensor in groups of codes and scales.

    Attributes:
        kind: ggml's name of the type, "Q4_0", "Q8_0" or a K-quant.
        shape: Of the tensor, the last axis is the input axis.
        blocks: uint8 (..., bytes of a row).
    """

    kind: str
    shape: tuple[int, ...]
    blocks: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the tensor that the bytes stand for, some rows at a time."""
        rows = self.blocks.reshape(-1, self.blocks.shape[-1])
        found = torch.empty((len(rows), self.shape[-1]), dtype=dtype, device=rows.device)
        step = max(1, _ROWS // self.shape[-1])
        for start in range(0, len(rows), step):
            found[start : start + step] = dequantized(rows[start : start + step], self.kind)
        return found.reshape(self.shape)


def dequantized(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the float32 values (..., in) of blocks, uint8 (..., bytes of a row)."""
    return _OWN[kind](blocks) if kind in _OWN else k_quants.dequantize(blocks, kind)
