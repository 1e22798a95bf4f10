"""Float weights as the bytes of a ggml type, some rows at a time: what an export does to each tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats import k_quants
from gemma_qat_kit.formats.q4_0_grid import GridFit
from gemma_qat_kit.formats.quantized import quantize
from gemma_qat_kit.layouts import GROUP_BYTES, Tensor
from gemma_qat_kit.weights import Weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Rounding:
    """How weights become Q4_0, and what of their grid was kept.

    Attributes:
        importance: Mean squared inputs, float32 (in,), by module name; such a weight is rounded by importance, any
            other keeps the grid that it lies on.
        fits: How much of a grid each part had, added while the parts are rounded.
    """

    importance: dict[str, torch.Tensor] = field(default_factory=dict)
    fits: list[GridFit] = field(default_factory=list)

    def rounded(self, weight: Weight, kind: str, module: str = "") -> Iterator[np.ndarray]:
        """Yield a weight's bytes in a ggml type.

        Raises:
            BadTensorError: NaN or an infinity; the message names its position in the whole tensor.
        """
        for start, rows in weight.chunks():
            _check_finite(weight, rows, start)
            yield self._bytes(rows, kind, weight.name, self.importance.get(module))

    def _bytes(self, rows: torch.Tensor, kind: str, name: str, importance: torch.Tensor | None) -> np.ndarray:
        if kind == "F32":
            return rows.float().numpy()
        if kind == "BF16":
            return rows.to(torch.bfloat16).view(torch.int16).numpy()
        if kind == "Q6_K":
            return k_quants.quantize(rows, kind, name).numpy()
        keeps_grid = kind == "Q4_0" and importance is None
        options = {"importance": importance} if kind == "Q4_0" and importance is not None else {}
        result = quantize(rows, kind.lower(), recover_grid=keeps_grid, name=name, **options)
        if result.fit is not None:
            self.fits.append(result.fit)
        return result.tensors["blocks"].numpy()


def check_floats(weight: Weight) -> None:
    """Refuse what was quantized before.

    Raises:
        BadTensorError: No floats.
    """
    if weight.dtype not in FLOATS:
        raise BadTensorError(
            f"{weight.name} is {weight.dtype}: it is quantized already.",
            "Weights to export are float32, float16 or bfloat16, or a mobile checkpoint's codes with their scales.",
            "Export the 16-bit checkpoint that it was made from.",
        )


def check_width(weight: Weight, tensor: Tensor) -> None:
    """Refuse rows that do not divide into the groups of a tensor's type.

    Raises:
        BadTensorError: With the tensor's name.
    """
    group_size = GROUP_BYTES[tensor.dtype][1]
    if tensor.shape[-1] % group_size:
        raise BadTensorError(
            f"{weight.name} has rows of {tensor.shape[-1]:,} weights.",
            f"{tensor.dtype} takes them in groups of {group_size}.",
            'Export with format="bf16", which has no groups.',
        )


def _check_finite(weight: Weight, rows: torch.Tensor, first_row: int) -> None:
    lowest, highest = rows.aminmax()  # NaN wins in both
    if torch.isfinite(lowest) and torch.isfinite(highest):
        return
    index = int(torch.nonzero(~torch.isfinite(rows).flatten())[0])
    place = torch.unravel_index(torch.tensor(first_row * weight.width + index), weight.shape or (1,))
    raise BadTensorError(
        f"{weight.name}[{', '.join(str(int(i)) for i in place)}] is {float(rows.flatten()[index]):g}.",
        "Every weight must be finite.",
        "Find out where it came from (a diverged training run, a damaged file) before exporting.",
    )
