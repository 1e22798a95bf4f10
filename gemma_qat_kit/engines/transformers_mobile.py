"""Compute with the packed matrices of a mobile checkpoint without unpacking a large one whole.

transformers unpacks the whole matrix at each forward: int8 codes, their stack, two float copies. For the head of E2B
(262,144 x 1,536) these take 4.3 GB, and as much for the token embeddings, of which one row is used. Here a large
matrix is unpacked some rows at a time, by the same arithmetic.

To multiply row by row gives each output value from the same sum. For a few tokens the kernels of torch's CPU builds add
it up in the same order whatever the number of rows, so the result is the same to the last bit. For more tokens they
choose their blocks by the shape, and some last bits differ. So there the rows are put together first and multiplied
at once, except for a head, which would be too large: its logits for a long text may differ in the last bit.
"""

import torch
from torch.nn import functional
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, apply_srq

from gemma_qat_kit.formats.mobile import unpack
from gemma_qat_kit.memory.work import UNPACK_CHUNK

FEW_TOKENS = 4  # up to here rows are multiplied as they are unpacked, the fastest way: they are still in the cache
LARGEST_WHOLE = 2**25  # weights; the largest matrix of E4B's layers has 26 million, 50 MiB in bfloat16
_ROW_STEP = 64  # rows of a chunk are a multiple, or kernels treat the last ones in another way


def unpack_in_chunks(model: torch.nn.Module) -> None:
    """Change in place how a loaded mobile model uses embeddings, and matrices of more than `UNPACK_CHUNK` weights."""
    for module in model.modules():
        if type(module) is QuantizedEmbedding:
            module.__class__ = RowEmbedding
        if type(module) is QuantizedLinear and module.in_features * module.out_features > UNPACK_CHUNK:
            module.__class__ = ChunkedLinear


class ChunkedLinear(QuantizedLinear):
    """The library's linear layer, with its matrix unpacked some rows at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the library's own forward returns: (…, out_features) in the dtype of x (…, in_features)."""
        x = apply_srq(x, self.input_activation_scale)
        return apply_srq(self._product(x), self.output_activation_scale)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        is_many = x.numel() > FEW_TOKENS * self.in_features
        if is_many and self.in_features * self.out_features <= LARGEST_WHOLE:
            weight = x.new_empty(self.out_features, self.in_features)
            for rows in self._chunks():
                weight[rows] = self._unpacked(rows, x.dtype)
            return functional.linear(x, weight, self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in self._chunks():
            bias = None if self.bias is None else self.bias[rows]
            out[..., rows] = functional.linear(x, self._unpacked(rows, x.dtype), bias)
        return out

    def _chunks(self) -> list[slice]:
        step = max(1, UNPACK_CHUNK // self.in_features // _ROW_STEP) * _ROW_STEP
        return [slice(start, start + step) for start in range(0, self.out_features, step)]

    def _unpacked(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the matrix; codes and scales meet in the dtype of the computation, as in the library."""
        codes = unpack(self.weight[rows], self.num_bits)[:, : self.in_features]
        return codes.to(dtype).mul_(self.weight_scale[rows].to(dtype))


class RowEmbedding(QuantizedEmbedding):
    """The library's embeddings, whose `weight` unpacks only the row that is asked for."""

    @property
    def weight(self) -> "_Rows":
        """The dequantized table, without `embed_scale`; `weight[row, :]` unpacks a row, anything else all of it."""
        return _Rows(self)


class _Rows:
    def __init__(self, embedding: RowEmbedding):
        self._embedding = embedding

    def __getitem__(self, index):
        row, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(row, int):
            return self._unpacked(slice(None))[index]
        return self._unpacked(row)[tuple(rest)]

    def __getattr__(self, name: str):
        return getattr(self._unpacked(slice(None)), name)

    def _unpacked(self, rows: int | slice) -> torch.Tensor:
        table = self._embedding
        return table._dequantize_weights(table.embedding_quantized[rows], table.embedding_scale[rows])
