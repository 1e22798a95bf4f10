"""What was measured at full size, kept with the kit: ordinary receipts, written by `bench/memory_measured.py`."""

from pathlib import Path

from gemma_qat_kit.memory.receipts import Receipts, receipts

MEASURED = Path(__file__).with_name("measured.jsonl")


def measured_receipts() -> Receipts:
    """Return the receipts of runs with checkpoints as large as the published ones, predicted beside measured.

    The weights were random, in the published layouts: what such a model takes is what the published one takes.
    """
    return receipts(MEASURED)
