"""The receipts that come with the kit: whole, installed with it, and close to what the planner says today."""

import tomllib
from pathlib import Path

import pytest

from gemma_qat_kit.memory.measured import MEASURED, measured_receipts

ROOT = Path(__file__).parent.parent
CLOSE = 0.05, 150 * 10**6  # of what was measured, or bytes: whichever is more
RECEIPTS = measured_receipts()


def test_every_line_is_a_receipt_with_a_plan():
    assert RECEIPTS.notes == ()
    assert len(RECEIPTS) == len(MEASURED.read_text().splitlines()) > 0
    assert all(row.predicted for row in RECEIPTS)


@pytest.mark.parametrize("row", RECEIPTS.select(event="chat"), ids=lambda row: f"{row.name} {row.settings['engine']}")
def test_what_was_predicted_was_close_to_what_was_measured(row):
    share, nbytes = CLOSE
    assert abs(row.error_bytes) <= max(share * row.measured.total_bytes, nbytes)


def test_they_are_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "gemma_qat_kit"
    assert MEASURED in {path for pattern in patterns["gemma_qat_kit"] for path in package.glob(pattern)}


def test_they_are_drawn_as_receipts_are():
    assert RECEIPTS.errors()
    assert "Predicted" in RECEIPTS._repr_html_()
