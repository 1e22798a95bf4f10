"""The per-layer embeddings of E2B and E4B, left in their file or in RAM: rows are looked up there.

The table is up to half of a checkpoint, and nothing is ever multiplied by it. So only the rows of the tokens at hand
reach the device. While transformers builds the model a table without weights takes its place (by torch's own hook for
new submodules): transformers then has nothing to read them into and leaves them in the file, whatever the format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from gemma_qat_kit.checkpoint import weight_files
from gemma_qat_kit.formats.blocks import Blocks, dequantized
from gemma_qat_kit.formats.mobile import unpack

NAME = "embed_tokens_per_layer"


class HostTable(torch.nn.Module):
    """Embeddings that lie on the CPU's side, under the names and in the dtype of their file.

    Args:
        num_embeddings: Tokens.
        embedding_dim: Values of a token, all layers together.
        scale: What a row is multiplied with.
        dtype: Of the result.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale, self.dtype, self._kind = scale, dtype, None

    @property
    def quantized(self) -> dict[str, Blocks]:
        """The blocks of a table out of a GGUF, as `export_gguf` looks for them."""
        if self._kind is None:
            return {}
        return {"weight": Blocks(self._kind, (self.num_embeddings, self.embedding_dim), self.blocks)}

    def fill_blocks(self, value: Blocks) -> None:
        """Take the table of a GGUF in place, on the device where it lies."""
        self._kind = value.kind
        self.register_buffer("blocks", value.blocks, persistent=False)

    def fill(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Take the weights in place, and tell whether they are complete and fit."""
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        if tensors.keys() == {"weight"}:
            return tensors["weight"].shape == (self.num_embeddings, self.embedding_dim)
        if tensors.keys() != {"embedding_quantized", "embedding_scale"}:
            return False
        codes, scale = tensors["embedding_quantized"], tensors["embedding_scale"]
        is_whole = {len(codes), len(scale)} == {self.num_embeddings} and self.embedding_dim % scale.shape[-1] == 0
        return is_whole and self._bits in (2, 4, 8)

    @property
    def _bits(self) -> float:
        return 8 * self.embedding_quantized.shape[-1] / self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids (…), on their device: (…, embedding_dim)."""
        if self._kind is not None:
            rows = dequantized(self.blocks[ids.to(self.blocks.device)], self._kind)
            return rows.to(ids.device, self.dtype) * self.scale
        rows = [table[ids.to(table.device)].to(ids.device) for table in self.parameters()]
        if len(rows) == 1:
            return rows[0].to(self.dtype) * self.scale
        codes, scale = unpack(rows[0], int(self._bits)), rows[1].to(self.dtype)
        values = codes.to(self.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
        return (values.flatten(-2) * self.scale).to(self.dtype)


@contextmanager
def left_out() -> Iterator[list[HostTable]]:
    """Build models without their per-layer embeddings; yield the tables that stand in for them, to be filled."""
    tables = []

    def replaced(parent, name, module):
        if name != NAME or not isinstance(module, torch.nn.Embedding):
            return None
        scale, dtype = getattr(module, "scalar_embed_scale", 1.0), module.weight.dtype
        tables.append(HostTable(module.num_embeddings, module.embedding_dim, scale, dtype))
        return tables[-1]

    hook = torch.nn.modules.module.register_module_module_registration_hook(replaced)
    try:
        yield tables
    finally:
        hook.remove()


def stored_table(folder: Path, *, is_copied: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's table by the last part of their names.

    Args:
        folder: Of the checkpoint.
        is_copied: Read them into RAM; else they are the file's own pages, which the system reads and drops as needed.
    """
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file itself cannot be iterated
                module, _, last = name.rpartition(".")
                if module.endswith(NAME):
                    found[last] = file.get_tensor(name).clone() if is_copied else file.get_tensor(name)
    return found
