"""What QuantizePanel draws: nothing, one row or all of them, and figures beyond every axis."""

import itertools
from dataclasses import replace

import pytest
from stand_ins import format_row

from gemma_qat_kit.quality.format_picture import place_labels
from gemma_qat_kit.quality.format_table import FormatTable
from gemma_qat_kit.quality.post_training import METHODS
from gemma_qat_kit.widgets.quantize_picture import BOTTOM, HEIGHT, TOP, picture_html, table_html


@pytest.mark.parametrize("methods", [(), ("q4_0",), METHODS])
def test_table_and_picture_hold_nothing_one_row_or_all(methods):
    table = FormatTable("<model>", "<text>", 2**30, 32, tuple(map(format_row, methods))) if methods else None
    html = table_html(table, METHODS, current="nf4")
    picture = picture_html(table)
    assert html.count("<tr>") == 2 + len(METHODS)
    assert ("measuring" in html) == ("nf4" not in methods)
    assert picture.count("<circle") == len(methods)
    assert "<model>" not in html
    assert "<text>" not in html + picture


def test_a_format_that_loses_nothing_or_everything_stays_within_the_picture():
    exact, broken = (replace(format_row("q8_0").quality, kl_divergence=value) for value in (0.0, 1e9))
    rows = (replace(format_row("q8_0"), quality=exact), replace(format_row("mobile_int2"), quality=broken))
    picture = picture_html(FormatTable("m", "t", 1, 32, rows))
    assert "q8_0 (exact)" in picture
    heights = [float(part.split('"')[0]) for part in picture.split('cy="')[1:]]
    assert all(TOP <= y <= HEIGHT - BOTTOM for y in heights)


def test_no_label_lies_on_another_or_on_a_line():
    rows = tuple(map(format_row, METHODS))
    places = place_labels(rows, lambda row: 100.0, 14, avoid=(100.0,))
    assert set(places) == set(METHODS)
    for side in (False, True):
        heights = sorted([100.0, *(height for height, is_left in places.values() if is_left == side)])
        assert all(b - a >= 14 for a, b in itertools.pairwise(heights))
    assert places["q8_0"][1], "a label at the right edge would be cut"
    assert not places["mobile_int2"][1]
