"""Mobile codes as GGUF groups: the same codes under the same scales, so nothing is rounded but the scale to float16.

| codes of a row | become | bits per weight |
|---|---|---|
| 4 bits | Q4_0, the row's scale in every group of 32 | 4.5 |
| 8 bits | Q8_0, likewise | 8.5 |
| 2 bits, anywhere | Q2_K, a scale and a minimum for each 256: `q * scale = d * (q + 2) - 2 * d`, d = scale | 2.63 |
| 2 bits, on a CPU | TQ2_0, which counts from -1: `q * scale = d * (1 - q - 1)` with d = -scale | 2.06 |
| 2 bits, where groups of 256 do not fit | Q4_0, whose codes are a superset | 4.5 |

A float16 has 11 significant bits, so a value moves by at most 2**-11 of itself. A scale below float16's normal numbers
(6.1e-5) moves by up to 3e-8, which is counted and said.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from gemma_qat_kit.errors import BadTensorError, BrokenCheckpointError
from gemma_qat_kit.formats import mobile, q4_0
from gemma_qat_kit.layouts import GROUP_BYTES, reblocked_dtype
from gemma_qat_kit.weights import Weight

SMALLEST_NORMAL = 2.0**-14  # of float16; smaller numbers have fewer significant bits


@dataclass(frozen=True)
class MobileWeight:
    """A weight of a mobile checkpoint: packed codes and float32 scales.

    Attributes:
        packed: Codes of 2 or 4 bits, uint8 (rows, in * bits / 8), or of 8 bits, int8 (rows, in).
        scale: (rows, 1), or (rows, slices) in the per-layer embeddings.
        shape: (rows, in).
        device: What llama.cpp will compute on, "cpu" or "cuda"; it decides the type of 2-bit codes.
    """

    packed: Weight
    scale: Weight
    shape: tuple[int, int]
    device: str = "cuda"

    @property
    def bits(self) -> int:
        """Of a code: 2, 4 or 8."""
        return 8 * self.packed.width // self.shape[-1]

    @property
    def ggml_type(self) -> str:
        """ggml's name of the type that holds these codes exactly."""
        return reblocked_dtype(self.bits, self.shape[-1] // self.scale.width, self.device)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield packed codes and float32 scales (rows, slices), some rows at a time."""
        for start, packed in self.packed.chunks(8 // self.bits):
            yield packed, self.scale.read(start, start + len(packed)).float()

    def reordered(self, order: torch.Tensor) -> "MobileWeight":
        """Return it with its rows in another order, int64 (rows,)."""
        return replace(self, packed=self.packed.reordered(order), scale=self.scale.reordered(order))

    def dequantized(self) -> Weight:
        """Return the float32 weight that it stands for."""

        def read(start: int, stop: int) -> torch.Tensor:
            codes = mobile.unpack(self.packed.read(start, stop), self.bits)
            return mobile.dequantize(codes, self.scale.read(start, stop).float())

        return replace(self.packed, dtype=torch.float32, shape=self.shape, read=read)

    def equals(self, other: "MobileWeight") -> bool:
        """Tell whether another one has the same codes and scales."""
        pairs = ((self.packed, other.packed), (self.scale, other.scale))
        return self.shape == other.shape and all(same_values(ours, theirs) for ours, theirs in pairs)


@dataclass
class ScaleTally:
    """What the scales of a checkpoint lost in float16, counted while they are written.

    Attributes:
        num_scales: All of them.
        num_small: Those below float16's normal numbers.
        largest_loss: Most by which one of those moved.
    """

    num_scales: int = 0
    num_small: int = 0
    largest_loss: float = 0.0

    def add(self, scale: torch.Tensor) -> None:
        """Count some scales."""
        small = scale[(scale.abs() < SMALLEST_NORMAL) & (scale != 0)]
        self.num_scales += scale.numel()
        self.num_small += small.numel()
        if small.numel():
            self.largest_loss = max(self.largest_loss, float((small - small.half().float()).abs().max()))


def reblocked(weight: MobileWeight, tally: ScaleTally) -> Iterator[np.ndarray]:
    """Yield the weight's groups in its `ggml_type`, some rows at a time.

    Raises:
        BadTensorError: A scale is NaN or beyond float16's numbers.
    """
    first, group_size = 0, GROUP_BYTES[weight.ggml_type][1]
    groups_each = weight.shape[-1] // weight.scale.width // group_size  # of a slice
    for packed, scale in weight.chunks():
        _check_scale(weight.scale, scale, first)
        tally.add(scale)
        first += len(scale)
        yield _grouped(packed, weight, scale.half().repeat_interleave(groups_each, -1))


def _grouped(packed: torch.Tensor, weight: MobileWeight, scale: torch.Tensor) -> np.ndarray:
    """Return the groups (rows, bytes) of packed codes and a float16 scale for each group (rows, groups)."""
    kind = weight.ggml_type
    if (kind, weight.bits) == ("Q4_0", 2):
        return q4_0.pack(mobile.unpack(packed, 2), scale).numpy()
    groups = np.empty((*scale.shape, GROUP_BYTES[kind][0]), np.uint8)
    step = scale.numpy()[..., None].view(np.uint8)
    if kind == "TQ2_0":  # a code q is stored as 1 - q, which is its stored bits turned over
        _fill_q2_k(groups[..., :64], ~packed.numpy())
        groups[..., 64:] = (-scale).numpy()[..., None].view(np.uint8)
    elif kind == "Q2_K":
        groups[..., :16] = 1 | 2 << 4  # each part of 16: a scale of 1 and a minimum of 2
        _fill_q2_k(groups[..., 16:80], packed.numpy())
        groups[..., 80:82] = groups[..., 82:] = step
    else:
        groups[..., :2] = step
        _fill_q4_0(groups[..., 2:], packed.numpy()) if kind == "Q4_0" else _fill_q8_0(groups[..., 2:], packed.numpy())
    return groups.reshape(len(groups), -1)


# Both formats add the same to a code before they store it, so its bits only change places: eight bytes at a time.


def _fill_q4_0(target: np.ndarray, packed: np.ndarray) -> None:
    """Pair values j and j + 16 of a group, which lie beside their neighbours: 2i and 2i + 1 share a byte."""
    low, high = np.moveaxis(packed.reshape(*target.shape[:2], 16).view(np.uint64), -1, 0)
    nibbles, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
    even, odd = low & nibbles | (high & nibbles) << four, low >> four & nibbles | high & ~nibbles
    target[..., 0::2], target[..., 1::2] = even[..., None].view(np.uint8), odd[..., None].view(np.uint8)


def _fill_q2_k(target: np.ndarray, packed: np.ndarray) -> None:
    """Put values j, j + 32, j + 64 and j + 96 of each half into a byte, of which 4i … 4i + 3 share one."""
    quarters = np.moveaxis(packed.reshape(*target.shape[:2], 2, 32).view(np.uint64), -1, 0)
    places = target.reshape(*target.shape[:2], 2, 8, 4)
    for i in range(4):
        codes = quarters >> np.uint64(2 * i) & np.uint64(0x0303030303030303)
        mixed = codes[0] | codes[1] << np.uint64(2) | codes[2] << np.uint64(4) | codes[3] << np.uint64(6)
        places[..., i] = mixed[..., None].view(np.uint8)


def _fill_q8_0(target: np.ndarray, packed: np.ndarray) -> None:
    target[...] = packed.view(np.uint8).reshape(target.shape)


def _check_scale(weight: Weight, scale: torch.Tensor, first_row: int) -> None:
    wrong = ~torch.isfinite(scale.half())
    if not wrong.any():
        return
    row, column = torch.nonzero(wrong)[0].tolist()
    raise BadTensorError(
        f"{weight.name}[{first_row + row}, {column}] is {float(scale[row, column]):g}.",
        "A GGUF keeps scales as float16: finite, and at most 65,504.",
        "The checkpoint may be damaged: download it again.",
    )


def mobile_weight(packed: Weight, scale: Weight, shape: tuple[int, ...], device: str) -> MobileWeight:
    """Return the weight of some packed codes, checked against the shape that the architecture gives it.

    Raises:
        BrokenCheckpointError: Another shape, or scales that do not fit it.
    """
    found = MobileWeight(packed, scale, shape, device)
    dtypes = {2: torch.uint8, 4: torch.uint8, 8: torch.int8}
    is_whole = packed.shape[:-1] == shape[:-1] and found.bits * shape[-1] == 8 * packed.width
    if not is_whole or dtypes.get(found.bits) != packed.dtype:
        raise BrokenCheckpointError(
            f"{packed.name} is {packed.dtype} of shape {packed.shape}.",
            f"Its config.json makes it {shape}, in codes of 2, 4 or 8 bits.",
            "Download the checkpoint again.",
        )
    if scale.num_rows != packed.num_rows or shape[-1] % scale.width:
        raise BrokenCheckpointError(
            f"{packed.name} has scales of shape {scale.shape}.",
            f"There is one for each of its {shape[0]:,} rows, or for equal slices of them.",
            "Download the checkpoint again.",
        )
    return found


def check_groups(weight: MobileWeight) -> None:
    """Refuse slices that are narrower than a group.

    Raises:
        BadTensorError: With the width.
    """
    slice_width = weight.shape[-1] // weight.scale.width
    if slice_width % q4_0.GROUP_SIZE:
        raise BadTensorError(
            f"{weight.packed.name} has a scale for every {slice_width:,} weights.",
            f"A GGUF's groups are {q4_0.GROUP_SIZE} weights under one scale.",
            'Export it with format="float32".',
        )


def same_values(weight: Weight, other: Weight) -> bool:
    """Tell whether two weights hold the same values."""
    if (weight.shape, weight.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(weight.chunks(), other.chunks(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)
