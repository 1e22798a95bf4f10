"""The weight matrices of what a person has at hand: a model, a checkpoint, a tensor, or the built-in model's file."""

from pathlib import Path

import torch

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.weights import Weight, find_weights

GROUP_SIZE = 32
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def find_layers(weights: object = None) -> dict[str, Weight]:
    """List the weight matrices whose rows divide into groups of 32, by name; a row is read when it is asked for.

    Args:
        weights: A `Model` that runs in transformers, a torch module, a dict of tensors by name, the folder of a 16-bit
            checkpoint, one tensor, or None for the built-in model's file.

    Raises:
        BadSettingError: None of these, or there is no such matrix in it.
        BrokenCheckpointError: The folder is incomplete or damaged.
        MissingLibraryError: The built-in model is not installed.
    """
    if weights is None:
        from gemma_qat_kit.load import built_in_checkpoint

        return _of_gguf(built_in_checkpoint())
    found = find_weights({"weight": weights} if isinstance(weights, torch.Tensor) else weights)
    layers = {name: weight for name, weight in found.tensors.items() if _is_matrix(weight)}
    if not layers:
        raise BadSettingError(
            f"There are no weights to look at in {found.what}.",
            "Needed are floats in rows that divide into groups of 32.",
            "Pass a loaded model, a dict of tensors or one tensor; BitExplorer() shows the built-in model.",
        )
    return layers


def _is_matrix(weight: Weight) -> bool:
    return weight.dtype in _FLOATS and weight.num_rows > 0 < weight.width and weight.width % GROUP_SIZE == 0


def _of_gguf(path: Path) -> dict[str, Weight]:
    """List the matrices of a GGUF, each row dequantized when it is read."""
    import gguf
    import numpy as np

    from gemma_qat_kit.gguf.header import read_gguf_header

    data = np.memmap(path, mode="r")

    def weight(tensor) -> Weight:
        rows = data[tensor.start : tensor.start + tensor.nbytes].reshape(tensor.shape[0], -1)
        kind = gguf.GGMLQuantizationType(tensor.ggml_type)

        def read(start: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(gguf.quants.dequantize(rows[start:stop], kind).copy())

        return Weight(tensor.name, torch.float32, tensor.shape, read)

    return {tensor.name: weight(tensor) for tensor in read_gguf_header(path).tensors if len(tensor.shape) == 2}
