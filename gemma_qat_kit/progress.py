"""How far a long operation is: one record that a bar, a widget or a test can show."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of a long operation.

    Attributes:
        stage: What is happening, as a short present participle ("downloading", "verifying", "loading").
        done_bytes: Bytes handled so far.
        total_bytes: Bytes to handle, or None where nobody knows.
        unit: "B", or what is counted where it is no bytes, as in "tokens".
    """

    stage: str
    done_bytes: int
    total_bytes: int | None
    unit: str = "B"

    @property
    def fraction(self) -> float | None:
        """Share done, 0 to 1, or None where the total is unknown."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else None


Report = Callable[[Progress], None]
"""Called several times a second with the state; raise `CancelledError` in it to stop the operation cleanly."""


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Yield a report function that draws a tqdm bar: text in a terminal, a widget in a notebook."""
    from tqdm.auto import tqdm

    bars: dict[str, tqdm] = {}

    def report(progress: Progress) -> None:
        bar = bars.get(progress.stage)
        if bar is None:
            is_bytes = progress.unit == "B"
            unit = {"unit": "B", "unit_divisor": 1024} if is_bytes else {"unit": f" {progress.unit}"}
            bar = bars[progress.stage] = tqdm(desc=progress.stage, unit_scale=True, delay=1, **unit)
        bar.total = progress.total_bytes
        bar.update(progress.done_bytes - bar.n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()
