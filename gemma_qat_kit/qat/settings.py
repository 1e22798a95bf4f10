"""How to train: settings whose defaults follow from the grid, so that a first run on any model helps."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from gemma_qat_kit.errors import BadSettingError, unknown_name

DTYPES = ("auto", "float32", "bfloat16", "float16")
COUNTS = {"num_steps": 1, "batch_size": 1, "sequence_length": 16, "gradient_accumulation": 1, "num_evaluations": 1,
           "patience": 1, "checkpoint_every": 1, "seed": 0}  # fmt: skip


@dataclass(frozen=True)
class LoopSettings:
    """What every training loop of the kit is told.

    Attributes:
        num_steps: Updates of the weights.
        batch_size: Windows of text that are computed together.
        sequence_length: Tokens of a window.
        gradient_accumulation: Batches that one update is made from.
        warmup: Share of the updates in which the rate rises; afterwards it falls as half a cosine.
        num_evaluations: How often the held-out text is measured while training; the best point is kept.
        patience: Training stops after so many evaluations without a better one.
        checkpoint_every: Updates between two checkpoints, where a folder is given.
        gradient_checkpointing: Compute each layer a second time instead of keeping its activations.
        dtype: Of the computation; what is trained is float32 always. "auto" takes what this device is fastest in, of
            those that it has.
        seed: Of the order of the text.
    """

    num_steps: int = 60
    batch_size: int = 2
    sequence_length: int = 256
    gradient_accumulation: int = 1
    warmup: float = 0.1
    num_evaluations: int = 4
    patience: int = 3
    checkpoint_every: int = 20
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0

    # No fields: the least of each count, and the largest of each number that may be zero.
    _least = COUNTS
    _largest = {"warmup": 1.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        for name, least in self._least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise _wrong(name, value, f"It is an integer from {least}.", type(self).__dataclass_fields__)
        for name, most in self._largest.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= most:
                raise _wrong(name, value, f"It is a number from 0 to {most:g}.", type(self).__dataclass_fields__)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)

    @property
    def rows(self) -> int:
        """Windows that one update is made from."""
        return self.batch_size * self.gradient_accumulation

    def rate(self, step: int) -> float:
        """Return the share of the learning rate that an update uses, counted from 0."""
        num_warm = max(1, round(self.warmup * self.num_steps))
        if step < num_warm:
            return (step + 1) / num_warm
        return 0.5 * (1 + math.cos(math.pi * (step + 1 - num_warm) / (self.num_steps - num_warm + 1)))

    def evaluates_after(self, step: int) -> bool:
        """Tell whether the held-out text is measured after so many updates."""
        marks = {round(self.num_steps * i / self.num_evaluations) for i in range(1, self.num_evaluations + 1)}
        return step in marks


@dataclass(frozen=True)
class TrainSettings(LoopSettings):
    """Settings of `train_qat`: those of the loop (`LoopSettings`), and these.

    Attributes:
        learning_rate: How far a weight may move in one update, in steps of its own grid: a weight has to travel half a
            step at most to change its code, so the number means the same for every model and layer.
        scale_learning_rate: Likewise for scales, as a share of themselves.
        hidden_weight: Of the distance of hidden states in the loss, beside that of the words; for a teacher in memory.
    """

    learning_rate: float = 0.005
    scale_learning_rate: float = 0.001
    hidden_weight: float = 1.0

    _largest = LoopSettings._largest | {"learning_rate": 1.0, "scale_learning_rate": 1.0, "hidden_weight": 1e6}


def _wrong(name: str, value: object, allowed: str, fields: dict) -> BadSettingError:
    return BadSettingError(f"{name}={value!r} cannot be used.", allowed, f"Try {name}={fields[name].default}.")
