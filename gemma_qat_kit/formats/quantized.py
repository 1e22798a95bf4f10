"""One call for every number format: `quantize` a weight into the bytes that a file holds, and look at what they mean.

The bytes are the value; codes, scales and dequantized weights are computed from them, so what is shown is what ships.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.formats import mobile, nf4, q4_0, q4_0_grid, q4_0_importance, q8_0, w4a16
from gemma_qat_kit.formats.q4_0_grid import GridFit


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in a number format.

    Attributes:
        format: One of `FORMATS`.
        shape: Of the weight, (..., in).
        tensors: What a file stores, by name: blocks with their scales inside, or packed codes and scales apart.
        fit: How much of a grid was kept, where that was asked for.
    """

    format: str
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    fit: GridFit | None = None

    @property
    def codes(self) -> torch.Tensor:
        """Codes, int8, of the weight's shape; NF4's are the numbers of its levels, 0 to 15."""
        return _TABLE[self.format].unpack(self.tensors, self.shape)[0]

    @property
    def scale(self) -> torch.Tensor:
        """Scales, float32, (..., groups of a row); NF4's, whose groups may run over rows, are (groups,)."""
        return _TABLE[self.format].unpack(self.tensors, self.shape)[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the bytes stand for, computed in float32 and rounded to `dtype`."""
        return _TABLE[self.format].dequantize(self.tensors, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales included."""
        return 8 * self.nbytes / math.prod(self.shape)

    def __str__(self) -> str:
        size = f"{self.nbytes:,} bytes, {self.bits_per_weight:.4g} bits per weight"
        return f"{self.format} of shape {self.shape}: {size}" + (f". {self.fit}" if self.fit else "")


@dataclass(frozen=True)
class _Format:
    """How one format does what `Quantized` offers; `group_size` None is a whole row."""

    group_size: int | None
    quantize: Callable[[torch.Tensor, str], dict[str, torch.Tensor]]
    unpack: Callable[[dict, tuple], tuple[torch.Tensor, torch.Tensor]]
    dequantize: Callable[[dict, tuple, torch.dtype], torch.Tensor]


def _blocks(module) -> _Format:
    """Describe a ggml format, whose groups hold their scale."""
    return _Format(
        module.GROUP_SIZE,
        lambda weight, name: {"blocks": module.quantize(weight, name)},
        lambda tensors, shape: module.unpack(tensors["blocks"]),
        lambda tensors, shape, dtype: module.dequantize(tensors["blocks"], dtype),
    )


def _mobile(bits: int) -> _Format:
    def quantize(weight: torch.Tensor, name: str, group_size: int | None = None) -> dict[str, torch.Tensor]:
        codes, scale = mobile.quantize(weight, bits, group_size=group_size, name=name)
        return {"packed": mobile.pack(codes, bits), "scale": scale}

    def unpack(tensors: dict, shape: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        return mobile.unpack(tensors["packed"], bits), tensors["scale"]

    return _Format(None, quantize, unpack, lambda t, shape, dtype: mobile.dequantize(*unpack(t, shape)).to(dtype))


def _quantize_w4a16(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    codes, scale = w4a16.quantize(weight, name)
    return {"packed": w4a16.pack(codes), "scale": scale}


def _quantize_nf4(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    return dict(zip(("packed", "scale"), nf4.quantize(weight, name), strict=True))


_TABLE = {
    "q4_0": _blocks(q4_0),
    "q8_0": _blocks(q8_0),
    "w4a16": _Format(
        w4a16.GROUP_SIZE,
        _quantize_w4a16,
        lambda t, shape: (w4a16.unpack(t["packed"]), t["scale"].float()),
        lambda t, shape, dtype: w4a16.dequantize(w4a16.unpack(t["packed"]), t["scale"]).to(dtype),
    ),
    "nf4": _Format(
        nf4.GROUP_SIZE,
        _quantize_nf4,
        lambda t, shape: (nf4.unpack(t["packed"], shape), t["scale"]),
        lambda t, shape, dtype: nf4.dequantize(t["packed"], t["scale"], shape, dtype),
    ),
    "mobile_int8": _mobile(8),
    "mobile_int4": _mobile(4),
    "mobile_int2": _mobile(2),
}
FORMATS = tuple(_TABLE)
"""Every format, by the name that `quantize` takes."""


def quantize(
    weight: torch.Tensor,
    format: str,
    *,
    recover_grid: bool = False,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    name: str = "This tensor",
) -> Quantized:
    """Round a weight to a number format.

    Args:
        weight: float32, float16 or bfloat16, (..., in), on any device; groups run along its last axis.
        format: One of `FORMATS`.
        recover_grid: For q4_0: keep the grid that QAT weights lie on (see `formats/q4_0_grid.py`), and report how much
            of it there was. Where there is none, the plain rule is used.
        importance: For q4_0: mean squared inputs, (in,), to round most carefully where they are large.
        group_size: For the mobile formats: weights of a row that share a scale, None for all of them.
        name: What an error calls the weight.

    Returns:
        The stored bytes, and everything that can be computed from them.

    Raises:
        UnknownNameError: Unknown format.
        BadTensorError: NaN, an infinity, no floats, nothing in it, or rows that do not divide into groups.
        BadSettingError: An option that this format does not have, or two that exclude each other.
        MissingLibraryError: nf4 without bitsandbytes.
    """
    if format not in _TABLE:
        raise unknown_name("format", format, FORMATS)
    _check_options(format, recover_grid, importance, group_size)
    shape = tuple(getattr(weight, "shape", ()))
    if recover_grid:
        blocks, fit = q4_0_grid.quantize(weight, name)
        return Quantized(format, shape, {"blocks": blocks}, fit)
    if importance is not None:
        return Quantized(format, shape, {"blocks": q4_0_importance.quantize(weight, importance, name)})
    options = {"group_size": group_size} if group_size else {}
    return Quantized(format, shape, _TABLE[format].quantize(weight, name, **options))


def _check_options(format: str, recover_grid: bool, importance: torch.Tensor | None, group_size: int | None) -> None:
    wrong = [option for option, is_set in (("recover_grid", recover_grid), ("importance", importance is not None))
             if is_set and format != "q4_0"]  # fmt: skip
    if group_size and not format.startswith("mobile"):
        wrong.append("group_size")
    if wrong:
        raise BadSettingError(
            f"{format} has no {wrong[0]}.",
            "recover_grid and importance belong to q4_0, group_size to the mobile formats.",
            f"Leave {wrong[0]} out, or take another format.",
        )
    if recover_grid and importance is not None:
        raise BadSettingError(
            "recover_grid and importance exclude each other.",
            "Weights on a grid are kept as they are; an importance matrix is for weights that lie on none.",
            "Leave one of them out.",
        )


def fake_quantize(weight: torch.Tensor, format: str, *, name: str = "This tensor") -> torch.Tensor:
    """Return the values that a format keeps of a weight; in the backward pass the gradient goes straight through.

    Args:
        weight: As in `quantize`.
        format: One of `FORMATS`.
        name: What an error calls the weight.

    Returns:
        A tensor of the weight's shape and dtype, equal to `quantize(weight, format).dequantize(weight.dtype)`.

    Raises:
        UnknownNameError, BadTensorError, MissingLibraryError: As `quantize`.
    """
    if format not in _TABLE:
        raise unknown_name("format", format, FORMATS)
    return _StraightThrough.apply(weight, format, name)


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is one (Bengio et al. 2013); none of these rules clips a weight by more than a step."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, format: str, name: str) -> torch.Tensor:
        if format == "q4_0":
            return q4_0.fake_quantize(weight, name)
        return quantize(weight, format, name=name).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None
