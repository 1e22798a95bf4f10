"""Bytes as people read them."""

import pytest

from gemma_qat_kit.units import GIB, readable_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "unknown"),
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (300_000, "293 KiB"),
        (3_349_514_112, "3.12 GiB"),
        (GIB // 2, "512 MiB"),
        (int(12.7 * GIB), "12.7 GiB"),
        (int(99.97 * GIB), "100 GiB"),
        (2000 * GIB, "2,000 GiB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count, text):
    assert readable_bytes(count) == text
