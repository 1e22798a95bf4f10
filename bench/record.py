"""Make the recordings that come with the kit: a training run and a comparison of the built-in model, both real.

    OMP_NUM_THREADS=2 python bench/record.py [FOLDER]

The model is trained with the defaults of the full run of notebook 03, and exported. Then one question, chosen before
any answer to it was seen (it is the one of notebook 05), goes to four of its forms, at temperature 0: the floats, the
trained Q4_0, Q4_0 by the plain rule, and the file as it ships. Minutes on two cores; what comes of it is written to
gemma_qat_kit/recordings/ whatever it says.
"""

import sys
import tempfile
from pathlib import Path

import gemma_qat_kit as gqk
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.widgets import TrainingPanel
from gemma_qat_kit.widgets.shipped import FOLDER

QUESTION = "Why do cats purr? Answer in three short points."
SETTINGS = gqk.TrainSettings(60, sequence_length=256)
MAX_NEW_TOKENS = 120


def quiet(progress) -> None:
    """Show nothing."""


def record_training(folder: Path, work: Path) -> Path:
    """Train, record the run, and return the GGUF of what was trained."""
    panel = TrainingPanel(BUILT_IN_SIZE, settings=SETTINGS)
    print(panel.run())
    print(panel.record(folder / "training.json"))
    with panel.model as model:
        gqk.convert_qat(model)
        return gqk.export_gguf(model, work / "trained.gguf", "q4_0").path


def record_comparison(folder: Path, work: Path, trained: Path) -> None:
    """Ask the four forms of the model, one after the other."""
    reference = gqk.load(BUILT_IN_SIZE, "float32", report=quiet)
    naive = gqk.export_gguf(reference, work / "naive.gguf", "q4_0").path
    models = {
        "float32": reference,
        "Q4_0 trained through the grid": gqk.load(trained, report=quiet),
        "naive Q4_0": gqk.load(naive, report=quiet),
        "as it ships (Q4_1)": gqk.load(BUILT_IN_SIZE, report=quiet),
    }
    found = gqk.compare_answers(models, QUESTION, max_new_tokens=MAX_NEW_TOKENS)
    print(found)
    print(found.save(folder / "comparison.json"))
    for model in models.values():
        model.close()


def main() -> None:
    """Record both."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        record_comparison(folder, Path(work), record_training(folder, Path(work)))


if __name__ == "__main__":
    main()
