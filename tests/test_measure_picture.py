"""The chart of memory over time: what it names, what it leaves out, and that nothing in it runs."""

from html.parser import HTMLParser

import pytest

from gemma_qat_kit.memory import measure_picture
from gemma_qat_kit.memory.measure import Moment, measure_memory

MIB = 2**20


class Page(HTMLParser):
    """Collects what a page would show, and refuses what would run."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag != "script"

    def handle_data(self, data):
        self.words.append(data)


def test_the_picture_names_places_marks_and_the_peak_and_runs_nothing():
    with measure_memory() as use:
        use.mark("<script>alert(1)</script>")
    page = Page(use._repr_html_())
    shown = " ".join(page.words)
    assert "<script>alert(1)</scrip" in shown  # cut to its room, as text
    assert {"svg", "polygon", "circle"} <= set(page.tags)
    assert f"peak {measure_picture.readable_bytes(use.peak.total_bytes)}" in shown
    assert "RAM, private" in shown
    assert "GPU memory" not in shown  # none was used


def test_the_picture_of_hours_stays_small_and_shows_the_highest_moment():
    samples = tuple(Moment(i, 0, MIB * (i % 100 + 1), 0) for i in range(4000))
    thinned = measure_picture._thinned(samples)
    assert len(thinned) <= 252
    assert max(m.ram for m in thinned) == 100 * MIB
    assert (thinned[0], thinned[-1]) == (samples[0], samples[-1])


@pytest.mark.parametrize("limit", [1e-3, 0.7, 1.0, 4.99, 5.0, 73.2, 999.9, 86_400])
def test_axes_have_a_few_round_values(limit):
    values = measure_picture._round_values(limit)
    assert 2 <= len(values) <= 6
    assert values[0] == 0
    assert limit / 2.6 < values[-1] <= limit * (1 + 1e-6)
