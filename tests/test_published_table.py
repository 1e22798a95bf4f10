"""Google's memory table: every number computed again, and the real bytes beside it."""

import re
import subprocess
import sys

import pytest

from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.errors import UnknownNameError
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.published_table import COLUMNS, FIGURES, published_memory
from gemma_qat_kit.units import GIB

# Stored parameters as the hub's own API counts them, which leaves out 928 clip bounds of E2B and E4B.
PARAMETERS = {"E2B": 5_123_178_051, "E4B": 7_996_156_490, "12B": 11_959_730_224, "26B-A4B": 25_805_936_206,
              "31B": 31_273_088_876}  # fmt: skip
# Bytes of the weight files in the hub's listings.
GGUF_BYTES = {"E2B": 3_349_516_256, "E4B": 5_154_941_280, "12B": 6_975_879_296, "26B-A4B": 14_439_363_584,
              "31B": 17_651_001_568}  # fmt: skip
BF16_BYTES = {"E2B": 10_246_621_918, "E4B": 15_992_595_884, "12B": 23_919_549_408, "26B-A4B": 51_612_009_916,
              "31B": 62_546_338_248}  # fmt: skip
MOBILE_BYTES = {"E2B": 2_458_111_846, "E4B": 3_525_094_516}
# Elements of the per-layer table, and the bits of its codes in the mobile format; a float32 scale per row and layer.
TABLES = {"E2B": (2_348_810_240, 4, 262_144 * 35), "E4B": (2_818_572_288, 2, 262_144 * 42)}
CELLS = {(cell.size, cell.column): cell for cell in published_memory()}


def test_every_cell_of_the_page_is_there_once():
    assert len(CELLS) == len(published_memory()) == 19
    assert [cell.figure for cell in published_memory()] == [figure for size in GEMMA_SIZES for figure in FIGURES[size]]


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: f"{cell.size} {cell.column}")
def test_the_rule_gives_the_printed_digits(cell):
    assert cell.reproduced == cell.figure


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_three_columns_are_the_parameters_times_bytes_and_a_fifth(size):
    for column, nbytes in zip(COLUMNS, (2, 1, 0.5), strict=False):
        exact = PARAMETERS[size] * nbytes * 1.2
        assert CELLS[size, column].rule_bytes == pytest.approx(exact, rel=1e-3)  # they round the count first


@pytest.mark.parametrize("size", MOBILE_BYTES)
def test_mobile_is_the_file_without_its_table(size):
    elements, bits, scales = TABLES[size]
    rest = MOBILE_BYTES[size] - elements * bits // 8 - 4 * scales
    cell, text = CELLS[size, "Mobile"], CELLS[size, "Mobile, text only"]
    assert text.rule_bytes < cell.rule_bytes < rest
    assert cell.rule_bytes > 0.96 * rest  # unused keys and values, and half of the 32-bit floats
    assert text.resident_bytes == pytest.approx(text.rule_bytes, rel=1e-3)
    assert cell.rule_bytes < cell.resident_bytes < 1.04 * cell.rule_bytes


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_files_are_those_on_the_hub_to_the_byte(size):
    assert CELLS[size, "BF16"].file_bytes == BF16_BYTES[size]
    assert CELLS[size, "Q4_0"].file_bytes == GGUF_BYTES[size]
    assert CELLS[size, "SFP8"].file_bytes is None
    assert CELLS[size, "SFP8"].resident_bytes is None
    for column in COLUMNS[3:]:
        if size in MOBILE_BYTES:
            assert CELLS[size, column].file_bytes == MOBILE_BYTES[size]


@pytest.mark.parametrize(
    ("size", "words"), [("E2B", "9 % larger"), ("E4B", "7 % larger"), ("12B", "3 % smaller"), ("31B", "6 % smaller")]
)
def test_four_bits_are_four_and_a_half_and_the_small_sizes_do_not_fit_the_margin(size, words):
    cell = CELLS[size, "Q4_0"]
    assert (cell.file_bytes > cell.rule_bytes) == ("larger" in words)
    assert words in cell.reason
    share = GGUF_BYTES[size] / (PARAMETERS[size] * 0.6) - 1
    assert f"{abs(share) * 100:.0f}" == words.split()[0]


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_in_memory_is_less_than_the_file_and_less_than_a_chat_needs(size):
    for column, format in (("BF16", "bf16"), ("Q4_0", "q4_0")):
        cell = CELLS[size, column]
        assert cell.resident_bytes <= cell.file_bytes
        assert cell.resident_bytes < plan_memory(size, format, text_only=format == "q4_0").needed_bytes


def test_the_table_that_stays_on_disk_is_named_with_its_size():
    assert f"{TABLES['E2B'][0] * 2 / GIB:.2f} GiB, can stay on disk" in CELLS["E2B", "BF16"].reason
    assert "can stay on disk" not in CELLS["31B", "BF16"].reason


def test_one_size_is_asked_for_by_its_name_and_others_are_refused():
    assert [cell.size for cell in published_memory("e2b")] == ["E2B"] * 5
    with pytest.raises(UnknownNameError, match="E2B"):
        published_memory("smollm2-135m")


def test_it_reads_as_text_and_as_a_table():
    table = published_memory()
    assert str(table) == repr(table)
    assert re.search(r"Q4_0 +2\.9 +2\.9 +3\.12", str(table))
    drawn = table._repr_html_()
    assert drawn.count("<tr>") == 1 + len(GEMMA_SIZES) + 2 * len(table)
    assert all(
        text in drawn for text in ("26B-A4B", "https://ai.google.dev/gemma/docs/core", "2026-11-23", "no key/value")
    )
    assert len(table[:5]) == 5


def test_it_takes_no_torch():
    code = "import sys, gemma_qat_kit as gqk; str(gqk.published_memory()); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
