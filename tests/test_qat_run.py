"""What a finished run says of itself: its table, what was won back, and which point was kept."""

import math

import pytest

from gemma_qat_kit.qat.run import Evaluation, Lines, QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings

EVALUATIONS = (Evaluation(0, 2.4, 0.3), Evaluation(2, 2.1, 0.1), Evaluation(4, 2.2, 0.15))


def run(name="tiny", lines=Lines(2.0, Evaluation(0, 2.5, 0.4)), evaluations=EVALUATIONS):  # noqa: B008, both are frozen
    steps = tuple(Step(i, 1 / i, 0.5) for i in range(1, 5))
    settings = TrainSettings(num_steps=4, batch_size=3, sequence_length=64)
    best = min(evaluations, key=lambda evaluation: evaluation.kl_divergence)
    return QatRun(name, settings, "float32", 1234567, lines, steps, evaluations, best, "Ran to its end.", 61.4)


def test_what_is_won_back_is_a_share_of_the_lost_log_perplexity():
    lines = Lines(2.0, Evaluation(0, 2.5, 0.4))
    assert [lines.share_recovered(nats) for nats in (2.5, 2.0, 2.1, 2.6)] == pytest.approx([0, 1, 0.8, -0.2])
    assert run().share_recovered == pytest.approx(0.8)


@pytest.mark.parametrize("plain", [2.0, 1.9])
def test_where_nothing_was_lost_nothing_can_be_won_back(plain):
    found = run(lines=Lines(2.0, Evaluation(0, plain, 0.4)))
    assert found.share_recovered is None
    assert "–" in str(found)


def test_the_table_has_a_line_for_each_look_and_says_which_was_kept():
    lines = str(run()).splitlines()
    assert lines[0] == "tiny"
    cells = [line.split() for line in lines[2:7]]
    assert [row[-1] for row in cells] == ["100%", "0%", "20%", "80%", "60%"]
    assert [float(row[-3]) for row in cells] == pytest.approx(
        [math.exp(n) for n in (2.0, 2.5, 2.4, 2.1, 2.2)], rel=1e-3
    )
    assert [float(row[-2]) for row in cells] == [0, 0.4, 0.3, 0.1, 0.15]
    assert [("(kept)" in line) for line in lines[2:7]] == [False, False, False, True, False]
    assert "4 steps of 3 windows of 64 tokens in 61 s; 1,234,567 values trained, computed in float32" in lines[-1]
    assert "not trained on" in lines[-1]


def test_the_page_shows_what_the_text_shows_and_escapes_names():
    found = run(name="<b>model</b>")
    page = found._repr_html_()
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "<b>" not in page
    for row in found._rows():
        assert all(cell in page for cell in row)
    assert page.count("<tr>") == 1 + 5


def test_a_best_point_that_equals_another_is_marked_once():
    twins = (Evaluation(2, 2.1, 0.1), Evaluation(2, 2.1, 0.1))
    assert str(run(evaluations=(*EVALUATIONS[:1], *twins))).count("(kept)") == 1
