"""What TrainingPanel draws: nothing, one step or thousands, figures beyond every axis, weights over their levels."""

import itertools
import math
import re

import pytest
import torch

from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize
from gemma_qat_kit.qat.fake_quantizer import FakeQuantizer, attach
from gemma_qat_kit.qat.run import Evaluation, Lines, Step
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.widgets.training_figures import figures_html, readable_duration
from gemma_qat_kit.widgets.training_picture import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TEXT_LOSS,
    TOP,
    WIDTH,
    charts_html,
    readable_perplexity,
)
from gemma_qat_kit.widgets.training_places import find_groups, take_places
from gemma_qat_kit.widgets.training_session import Choice, TrainingSession
from gemma_qat_kit.widgets.training_walk import Group, Place, liveliest, walk_html

LINES = Lines(2.6, Evaluation(0, 2.8, 0.3))


def charts(losses=(), nats=(), lines=LINES, loss="Loss: KL divergence"):
    steps = [Step(i + 1, loss, 1.0) for i, loss in enumerate(losses)]
    evaluations = [Evaluation(i, value, value) for i, value in enumerate(nats)]
    best = min(evaluations, key=lambda each: each.nats, default=None)
    return charts_html(steps, lines, evaluations, best, max(1, len(losses), len(nats)), loss)


def numbers(html, name):
    return [float(value) for value in re.findall(rf' {name}="([-\d.]+)"', html)]


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5000])
@pytest.mark.parametrize("loss", [TEXT_LOSS, "Loss: another"])
def test_a_loss_curve_of_any_length_stays_within_its_axes(num_steps, loss):
    html = charts([3 + math.sin(i) for i in range(num_steps)], lines=None, loss=loss)
    assert html.count("<circle") == min(num_steps, 300) if num_steps < 5000 else 200 < html.count("<circle") <= 300
    assert all(TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for y in numbers(html, "cy"))
    assert all(LEFT <= x <= WIDTH for x in numbers(html, "cx"))
    assert ("no step yet" in html) == (num_steps == 0)
    assert len(re.findall(r'<text x="346.0"[^>]* text-anchor="end">[\d,]+<', html)) == 1, (
        "the edge cuts the last number"
    )


@pytest.mark.parametrize(("plain", "nats"), [(2.8, [2.7, 2.65, 2.64]), (12.0, [7, 5]), (2.6, [2.6]), (2.5, [2.7]),
                                             (2.6001, [2.6]), (800.0, [700.0]), (2.8, [])])  # fmt: skip
def test_both_lines_are_drawn_named_and_apart_from_each_other(plain, nats):
    html = charts(nats=nats, lines=Lines(2.6, Evaluation(0, plain, 0.3)))
    assert html.count("stroke-dasharray") == 2
    labels = re.findall(r'y="([\d.]+)"[^>]*>(float|PTQ|best) ([^<]+)<', html)
    assert {name for _, name, _ in labels} == {"float", "PTQ"} | ({"best"} if nats else set())
    heights = sorted(float(y) for y, _, _ in labels)
    assert all(b - a >= 14 for a, b in itertools.pairwise(heights))
    assert all(TOP - 5 < y < HEIGHT - BOTTOM + 20 for y in heights)
    assert {name: text for _, name, text in labels}["float"] == f"{math.exp(2.6):.2f}"


def test_the_kept_point_is_the_largest():
    html = charts(nats=[2.7, 2.65, 2.68])
    assert numbers(html, "r") == [3.5, 6, 3.5]


def test_numbers_are_as_long_as_they_need_to_be():
    assert [readable_perplexity(math.log(x)) for x in (13.7894, 123.456, 4567.8, 165_000)] == [
        "13.79", "123.5", "4,568", "1.7e5"]  # fmt: skip
    assert [readable_duration(s) for s in (0.4, 59.4, 60, 200, 3600, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min"]  # fmt: skip


def test_the_figures_say_nothing_before_a_run_and_where_nothing_was_lost():
    choice = Choice("q4_0", "memory", TrainSettings())
    assert figures_html(None, choice).count("<b>–</b>") == 4
    session = TrainingSession(choice)
    session.lines, session.evaluations = Lines(2.6, Evaluation(0, 2.5, 0.3)), [Evaluation(0, 2.55, 0.2)]
    assert "<b>–</b>" in figures_html(session, choice)
    session.lines = LINES
    assert "<b>125%</b>" in figures_html(session, choice), "(2.8 - 2.55) / (2.8 - 2.6)"


@pytest.mark.parametrize(("teacher", "hidden_weight", "name"), [
    ("memory", 1.0, "KL divergence and distance of hidden states<"), ("memory", 0.0, "KL divergence, nats per token<"),
    ("cache", 1.0, "KL divergence, nats per token<"), ("text", 1.0, "surprise at the text, nats per token<"),
])  # fmt: skip
def test_the_loss_has_the_name_of_what_is_made_smaller(teacher, hidden_weight, name):
    assert f">Loss: {name}" in figures_html(None, Choice("q4_0", teacher, TrainSettings(hidden_weight=hidden_weight)))


def test_the_best_point_is_the_one_that_train_qat_keeps():
    near, sure = Evaluation(1, 2.7, 0.1), Evaluation(2, 2.6, 0.2)
    for teacher, best in (("memory", near), ("cache", near), ("text", sure)):
        session = TrainingSession(Choice("q4_0", teacher, TrainSettings()))
        session.evaluations = [near, sure]
        assert session.best is best


def group(name, grid, row=0, column=0):
    """A group of weights on a grid."""
    return Group(name, grid.low, grid.high, grid.is_half, row, column)


def network(grid, weight, scale):
    """A prepared network of one layer."""
    module = torch.nn.Module()
    module.layer = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
    module.layer.weight.data = weight
    attach([(module.layer, "weight")], FakeQuantizer(grid, scale, torch.float32, True))
    return module


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 32)])
def test_a_place_holds_the_codes_that_the_model_computes_with(name, row, column):
    grid, weight = GRIDS[name], torch.randn(2, 64) * 0.05
    scale = 0.01 + 0.01 * torch.rand(2, 64 // (grid.group_size or 64))
    groups = [group("layer.weight", grid), group("layer.weight", grid, row, column)]
    _, place = take_places(network(grid, weight, scale), groups, 3)
    snapped = learned_fake_quantize(weight, scale, grid)[row, column : column + 32]
    assert torch.equal(torch.tensor(place.codes) * torch.tensor(place.scale), snapped)
    assert place.values == tuple(weight[row, column : column + 32].tolist())
    assert place.step == 3


@pytest.mark.parametrize("name", GRIDS)
def test_groups_that_are_watched_have_most_weights_near_a_border(name):
    grid = GRIDS[name]
    weight = torch.full((4, 96), 0.3)
    weight[0, :5], weight[2, 32:40], weight[1, 64:] = 0.48, 0.48, 1e3  # the last: beyond the last level
    scale = torch.ones(4, 96 // (grid.group_size or 96))
    weight[3], scale[3] = 4.8, 10  # near, but moving slowly
    found = find_groups(network(grid, weight, scale))
    assert found[:2] == [group("layer.weight", grid, 2, 32), group("layer.weight", grid, 0, 0)]
    assert len(set(found)) == 4 * 3
    assert find_groups(network(grid, weight, torch.zeros_like(scale)))[0].low == grid.low


def test_the_group_that_is_shown_is_the_one_in_which_most_codes_changed():
    still, walk = places(GRIDS["q4_0"], (0.0, 0.0, 0.0)), places(GRIDS["q4_0"], (0.0, 0.3, 0.6))
    assert liveliest([[still[0], walk[0]]]) == 0
    assert liveliest(list(zip(still, walk, strict=True))) == 1
    assert liveliest(list(zip(walk, still, strict=True))) == 0


def places(grid, moves, scale=0.01):
    """A group whose weights stand at 0, ±1, ±2, …, then one step of the grid each higher by a share."""
    found = []
    for step, move in enumerate(moves):
        weights = torch.tensor([(i % 5 - 2 + move) * scale for i in range(32)])
        codes = grid.codes(weights, torch.tensor([scale]))
        found.append(Place(step, tuple(weights.tolist()), scale, tuple(codes.tolist())))
    return found


def test_weights_that_changed_their_code_stand_out():
    grid = GRIDS["q4_0"]
    watched, walk = group("<name>.weight", grid), places(grid, (0.0, 0.3, 0.6))
    first, near, far = (walk_html(watched, walk, index) for index in range(3))
    assert "0 of 32 codes changed" in first
    assert "0 of 32 codes changed" in near
    assert "32 of 32 codes changed" in far
    assert near.count('font-weight="700"') == 0
    assert far.count('font-weight="700"') == 32
    assert "<name>" not in first
    assert "nothing is trained yet" in walk_html(None, (), -1)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scale", [0.01, -0.01, 1e-9])
def test_every_grid_has_levels_with_room_for_their_codes(name, scale):
    grid = GRIDS[name]
    walk = places(grid, (0.0, 40.0 if grid.bits == 8 else 0.4), scale)
    html = walk_html(group("w", grid), walk, 1)
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">(-?\d+)<', html)
    assert len(labels) >= 3
    heights = [float(y) for y, _ in labels]
    assert all(a - b > 15 for a, b in itertools.pairwise(heights)), "higher codes stand higher"
    assert html.count("<circle") == 64


def test_a_group_of_zeros_is_drawn_too():
    grid = GRIDS["q4_0"]
    zeros = Place(0, (0.0,) * 32, 0.0, (0,) * 32)
    assert "nan" not in walk_html(group("w", grid), [zeros], 0)
