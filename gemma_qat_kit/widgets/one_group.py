"""32 weights in one number format: codes, scale, stored bytes and errors, as numbers and a picture."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import nf4
from gemma_qat_kit.formats.quantized import Quantized, quantize
from gemma_qat_kit.quality.comparison import sqnr_db
from gemma_qat_kit.widgets.group_picture import draw
from gemma_qat_kit.widgets.layers import GROUP_SIZE


@dataclass(frozen=True)
class _Layout:
    """How a format lays codes into bytes.

    Attributes:
        bits: Width of a stored code.
        codes: Lowest and highest code.
        owners: Weights whose codes byte j holds, as its digits are read: highest bits first.
        scale: Type of a stored scale, and what shares it.
    """

    bits: int
    codes: tuple[int, int]
    owners: Callable[[int], tuple[int, ...]]
    scale: str


_CHANNEL = "float32, one for the whole channel"
_LAYOUTS = {
    "q4_0": _Layout(4, (-8, 7), lambda j: (j + 16, j), "float16, one for these 32"),
    "q8_0": _Layout(8, (-127, 127), lambda j: (j,), "float16, one for these 32"),
    "w4a16": _Layout(4, (-8, 7), lambda j: (2 * j + 1, 2 * j), "bfloat16, one for these 32"),
    "nf4": _Layout(4, (0, 15), lambda j: (2 * j, 2 * j + 1), "float32, one for 64"),
    "mobile_int8": _Layout(8, (-128, 127), lambda j: (j,), _CHANNEL),
    "mobile_int4": _Layout(4, (-8, 7), lambda j: (2 * j + 1, 2 * j), _CHANNEL),
    "mobile_int2": _Layout(2, (-2, 1), lambda j: (4 * j + 3, 4 * j + 2, 4 * j + 1, 4 * j), _CHANNEL),
}


@dataclass(frozen=True)
class PackedByte:
    """One stored byte: its value, and the weights that it belongs to, highest bits first; none for a scale's byte."""

    value: int
    weights: tuple[int, ...]

    @property
    def digits(self) -> tuple[str, ...]:
        """The byte cut into its codes: two hex digits, one byte, or four pairs of bits; a scale's byte stays whole."""
        if len(self.weights) == 4:
            bits = f"{self.value:08b}"
            return tuple(bits[i : i + 2] for i in range(0, 8, 2))
        return tuple(f"{self.value:02x}") if len(self.weights) == 2 else (f"{self.value:02x}",)


@dataclass(frozen=True, repr=False)
class Group:
    """32 consecutive weights of a row and what a format makes of them; draws itself.

    Attributes:
        title: Where the weights lie, and the format.
        format: As in `quantize`.
        values: The weights.
        codes: Their codes.
        snapped: The weights that the codes stand for.
        levels: Every code of the format and its value under this group's scale.
        scale: `w ≈ code * scale`; for nf4 the level of the code times the scale.
        scale_kind: Type of the stored scale, and what shares it.
        packed: The stored bytes, the scale's first.
        bits_per_weight: Of the whole tensor, scales included.
        sqnr_db: Signal over error of these 32, in decibels; infinite where nothing moved.
        peak_level: With a recovered grid: level of the largest weight, 1 to 8, or 0 where these lie on no grid. None
            without `recover_grid`.
    """

    title: str
    format: str
    values: tuple[float, ...]
    codes: tuple[int, ...]
    snapped: tuple[float, ...]
    levels: tuple[tuple[int, float], ...]
    scale: float
    scale_kind: str
    packed: tuple[PackedByte, ...]
    bits_per_weight: float
    sqnr_db: float
    peak_level: int | None

    @property
    def errors(self) -> tuple[float, ...]:
        """How far each weight moved: what its code stands for, minus the weight."""
        return tuple(snapped - value for snapped, value in zip(self.snapped, self.values, strict=True))

    @property
    def lines(self) -> tuple[str, ...]:
        """What happened to each weight, as a sentence."""
        parts = zip(self.values, self.codes, self.snapped, self.errors, strict=True)
        return tuple(f"w[{i}] = {w:z.3g} → code {q} → {s:z.3g}, error {e:z.2g}" for i, (w, q, s, e) in enumerate(parts))

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and texts of what holds for the group as a whole."""
        exact = "infinite: nothing moved" if math.isinf(self.sqnr_db) else f"{self.sqnr_db:.3g} dB"
        facts = [
            ("Scale", f"{self.scale:.3g} ({self.scale_kind})"),
            ("Signal over error (SQNR)", exact),
            ("Largest error", f"{max(map(abs, self.errors)):.2g}"),
            ("Stored", f"{self.bits_per_weight:.4g} bits per weight"),
        ]
        if self.peak_level is not None:
            found = f"yes, its largest weight is at level {self.peak_level}" if self.peak_level else "no: plain rule"
            facts.append(("On a grid", found))
        return tuple(facts)

    def __str__(self) -> str:
        facts = "; ".join(f"{name}: {text}" for name, text in self.facts)
        stored = " ".join(f"{byte.value:02x}" for byte in self.packed)
        return "\n".join([self.title, facts, *self.lines, f"Bytes: {stored}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return draw(self)


def describe_group(
    weight: torch.Tensor,
    format: str,
    *,
    row: int = 0,
    group: int = 0,
    recover_grid: bool = False,
    name: str = "weight",
) -> Group:
    """Quantize one row of a weight and describe 32 of its weights.

    The whole row is quantized, since in some formats all of it shares a scale.

    Args:
        weight: Float, (..., in), `in` a multiple of 32 (of 64 for nf4).
        format: One of `formats.quantized.FORMATS`.
        row: Which row, the leading axes counted as one.
        group: Which 32 of the row.
        recover_grid: As in `quantize`, for q4_0.
        name: What to call the weight.

    Raises:
        BadSettingError: There is no such row or group.
        BadTensorError: The row cannot be quantized: NaN, infinite, or of a length that does not divide.
        UnknownNameError: The format is not known.
    """
    rows = weight.detach().reshape(-1, weight.shape[-1])
    num_groups = rows.shape[1] // GROUP_SIZE
    for kind, number, count in (("row", row, len(rows)), ("group", group, num_groups)):
        if not 0 <= number < count:
            raise BadSettingError(
                f"{name} has no {kind} {number}.",
                f"Its {kind}s are 0 to {count - 1:,}.",
                f"Pass one of these as {kind}=.",
            )
    title = f"{name}, row {row:,}, group {group:,}, {format}"
    if recover_grid:  # groups are independent here, and the report is to be about this one alone
        part = rows[row, group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
        return _describe(part, quantize(part[None], format, recover_grid=True, name=name), 0, title)
    return _describe(rows[row], quantize(rows[row : row + 1], format, name=name), group, title)


def _describe(row: torch.Tensor, quantized: Quantized, group: int, title: str) -> Group:
    part = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
    layout = _LAYOUTS[quantized.format]
    scales = quantized.scale.flatten()
    scale = float(scales[part.start * len(scales) // len(row)])
    codes = range(layout.codes[0], layout.codes[1] + 1)
    steps = nf4.levels().tolist() if quantized.format == "nf4" else codes
    peaks = (level for level, count in enumerate(quantized.fit.peak_levels, 1) if count) if quantized.fit else ()
    values, snapped = row[part].float(), quantized.dequantize()[0, part]
    return Group(
        title=title,
        format=quantized.format,
        values=tuple(values.tolist()),
        codes=tuple(quantized.codes[0, part].tolist()),
        snapped=tuple(snapped.tolist()),
        levels=tuple((code, step * scale) for code, step in zip(codes, steps, strict=True)),
        scale=scale,
        scale_kind=layout.scale,
        packed=_packed(quantized, layout, group),
        bits_per_weight=quantized.bits_per_weight,
        sqnr_db=sqnr_db(values, snapped),
        peak_level=next(iter(peaks), 0) if quantized.fit else None,
    )


def _packed(quantized: Quantized, layout: _Layout, group: int) -> tuple[PackedByte, ...]:
    """Cut the stored bytes of a group out of its row's."""
    num_bytes, tensors = GROUP_SIZE * layout.bits // 8, quantized.tensors
    if "blocks" in tensors:
        stored = _bytes(tensors["blocks"])[group * (num_bytes + 2) :]
        scale, codes = stored[:2], stored[2:]
    else:
        scales = tensors["scale"].flatten()
        index = group * GROUP_SIZE * len(scales) // math.prod(quantized.shape)
        scale, codes = _bytes(scales[index : index + 1]), _bytes(tensors["packed"])[group * num_bytes :]
    whole = (PackedByte(value, ()) for value in scale)
    return (*whole, *(PackedByte(value, layout.owners(j)) for j, value in enumerate(codes[:num_bytes])))


def _bytes(tensor: torch.Tensor) -> list[int]:
    """Return a tensor's bytes as they lie in a file, little-endian."""
    return tensor.contiguous().flatten().view(torch.uint8).tolist()
