"""Recordings that came with the kit, by name: what a model did on a machine that had it, for places that have not."""

from pathlib import Path

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.errors import unknown_name

FOLDER = Path(__file__).parent.parent / "recordings"  # made by bench/record.py


def find_recording(recording: str | Path, file: str) -> Path:
    """Return the path of a recording.

    Args:
        recording: The name of one that came with the kit, or the path of a file: whatever has a folder or an ending.
        file: Of those that came with the kit, `training.json` or `comparison.json`.

    Raises:
        UnknownNameError: No recording of that name came with the kit.
    """
    if not isinstance(recording, str) or recording != Path(recording).stem:
        return Path(recording)
    if recording != BUILT_IN_SIZE:
        raise unknown_name("recording", recording, [BUILT_IN_SIZE])
    return FOLDER / file
