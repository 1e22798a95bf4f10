"""The tiny repository that the download tests share, and what they ask about its place in the cache."""

import hashlib
import os
import random
from pathlib import Path

REPO = "owner/tiny-model"
WEIGHTS = random.Random(0).randbytes(300_000)
NEW_WEIGHTS = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"config.json": b'{"model_type": "gemma4"}', "model.safetensors": WEIGHTS, "chat_template.jinja": b"{{ x }}"}
SLOW = {"kind": "slow", "after": 20_000, "seconds": 0.1}  # 1.5 seconds for the weights


def blobs() -> Path:
    """Return the folder of the cache that holds the repository's content."""
    return Path(os.environ["HF_HUB_CACHE"]) / f"models--{REPO.replace('/', '--')}" / "blobs"


def leave_partial(num_bytes: int, name: str = f"{SHA256}.incomplete") -> None:
    """Put the beginning of the weights where an ended download would have left it."""
    blobs().mkdir(parents=True, exist_ok=True)
    (blobs() / name).write_bytes(WEIGHTS[:num_bytes])


def quiet(progress) -> None:
    """Hear the progress and say nothing."""


def stop_after(num_bytes: int, error: BaseException):
    """Return a report function that raises once more than `num_bytes` are there."""

    def report(progress):
        if progress.stage == "downloading" and progress.done_bytes > num_bytes:
            raise error

    return report
