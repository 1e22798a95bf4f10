"""What a file keeps of a training run: a few numbers, whichever loop it came from."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

KINDS = ("qat", "finetune")
_MOST_LOOKS = 1000


@dataclass(frozen=True)
class Training:
    """A run in numbers.

    Attributes:
        kind: "qat" or "finetune".
        name: The model.
        num_steps: Updates made.
        learning_rate: As it was asked for.
        nats: Surprise at the held-out text at each look, the first one before training.
        kept: Which of the looks is the point that was kept.
        float_nats: Of the model before quantization; None of fine-tuning.
        plain_nats: By the plain rule; None of fine-tuning.
        seconds: That it took.
    """

    kind: str
    name: str
    num_steps: int
    learning_rate: float
    nats: tuple[float, ...]
    kept: int
    float_nats: float | None
    plain_nats: float | None
    seconds: float

    @property
    def start(self) -> float | None:
        """What was won back before the first step: by careful scales alone."""
        return self._won(self.nats[0])

    @property
    def end(self) -> float | None:
        """What is won back at the point that was kept; None where there was nothing to win.

        Of QAT the share of the log-perplexity that the plain rule lost; of fine-tuning the share of the surprise at
        held-out answers that is gone.
        """
        return self._won(self.nats[self.kept])

    def _won(self, nats: float) -> float | None:
        if self.kind == "finetune":
            return 1 - nats / self.nats[0] if self.nats[0] > 0 else None
        lost = self.plain_nats - self.float_nats
        return (self.plain_nats - nats) / lost if lost > 0 else None


def training_of(run: object) -> Training | None:
    """Return what is kept of a `QatRun` or a `FinetuneRun`, None of anything else."""
    if isinstance(run, Training):
        return run
    if not all(hasattr(run, name) for name in ("evaluations", "best", "steps", "settings", "seconds", "name")):
        return None
    lines, looks = getattr(run, "lines", None), list(run.evaluations)
    return Training(
        "qat" if lines else "finetune",
        run.name,
        len(run.steps),
        run.settings.learning_rate,
        tuple(look.nats for look in looks),
        looks.index(run.best),
        lines and lines.float_nats,
        lines and lines.plain.nats,
        round(run.seconds, 3),
    )


def to_json(training: Training) -> dict:
    """Return a run as what JSON can hold."""
    return asdict(training)


def from_json(data: object) -> Training:
    """Read a run that anybody wrote.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(data, Mapping) or set(data) != set(Training.__dataclass_fields__):
        raise ValueError("a training run lacks what it should have")
    nats, name = data["nats"], data["name"]
    if data["kind"] not in KINDS or not isinstance(name, str) or len(name) > 80 or not name.isprintable():
        raise ValueError("a training run has no kind or no name")
    if not isinstance(nats, list | tuple) or not 0 < len(nats) <= _MOST_LOOKS:
        raise ValueError("a training run has no evaluations")
    if data["kind"] == "qat":
        nats = [*nats, data["float_nats"], data["plain_nats"]]
    numbers = [*nats, data["learning_rate"], data["seconds"]]
    if not all(type(n) in (int, float) and math.isfinite(n) and 0 <= n < 1e9 for n in numbers):
        raise ValueError("a training run has a number that cannot be")
    counts = (data["num_steps"], data["kept"])
    if not all(type(n) is int and 0 <= n < 10**9 for n in counts) or data["kept"] >= len(data["nats"]):
        raise ValueError("a training run kept a point that it does not have")
    return Training(**dict(data, nats=tuple(data["nats"])))
