"""The facts box of each notebook says the memory that was measured (bench/notebook_facts.py) and the published size."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from gemma_qat_kit.catalog import find_checkpoint

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORD = json.loads((ROOT / "bench" / "notebook_facts.json").read_text())
# What `SIZE = "E2B"` downloads.
DOWNLOADED = {"01_quantize": "q4_0-unquantized", "03_qat": "bf16"}


def _box(path):
    """The table's rows: what is said of the notebook as it stands, and with a real Gemma."""
    text = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"][1]
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {name: tuple(said) for name, *said in rows}


def test_every_notebook_is_measured():
    assert sorted(RECORD) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_memory_is_what_was_measured(path):
    measured = RECORD[path.stem] / 2**30
    assert float(re.match(r"([\d.]+) GiB", _box(path)["Memory"][0])[1]) == pytest.approx(measured, rel=0.1, abs=0.05)


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != "06_teach"], ids=lambda path: path.stem)
def test_the_download_is_the_published_one(path):
    row = find_checkpoint("E2B", DOWNLOADED.get(path.stem, "q4_0"))
    here, real = _box(path)["Download"]
    assert here == "nothing"
    assert float(re.match(r"([\d.]+) GiB", real)[1]) == pytest.approx(row.weights_bytes / 2**30, abs=0.03)
