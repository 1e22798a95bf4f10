"""A training run as a file: it comes back as it was, a hand that changed it is told, and it is drawn without torch."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_trainer import SHORT, loaded_for_training, stand_in_for_train_qat
from stand_ins import click, wait_for

from gemma_qat_kit.errors import BadSettingError, UnknownNameError
from gemma_qat_kit.qat.run import Evaluation, Lines, Step
from gemma_qat_kit.widgets import TrainingPanel, TrainingReplay
from gemma_qat_kit.widgets.training_picture import TEXT_LOSS
from gemma_qat_kit.widgets.training_recording import MOST_BYTES, Recording
from gemma_qat_kit.widgets.training_walk import Group, Place

ROOT = Path(__file__).parent.parent
HOSTILE = "<img src=x onerror=1>"
RUN = Recording(
    name="a model",
    format="q4_0",
    loss="Loss: KL divergence",
    num_steps=4,
    lines=Lines(2.0, Evaluation(0, 3.0, 0.5)),
    steps=tuple(Step(step, 0.4 / step, 1.5) for step in (1, 2, 4)),
    evaluations=(Evaluation(0, 2.9, 0.4), Evaluation(2, 2.5, 0.2), Evaluation(4, 2.4, 0.3)),
    held_out="a text",
    seconds=75.0,
    memory_bytes=3 * 2**30,
    group=Group("layers.0.weight", -8, 7, True, 3, 64),
    places=tuple(Place(step, tuple(0.01 * (i % 15 - 7) + 0.002 * step for i in range(32)), 0.01,
                       tuple(i % 15 - 7 for i in range(32))) for step in (0, 1, 2, 4)),
    made="2 CPU cores, 2026-01-31",
)  # fmt: skip


def test_a_file_brings_it_back(tmp_path):
    exact = replace(RUN, steps=tuple(replace(step, loss=round(step.loss, 9)) for step in RUN.steps))
    path = RUN.save(tmp_path / "new folder" / "run.json")
    assert Recording.load(path) == replace(
        exact, places=tuple(replace(p, values=tuple(round(v, 9) for v in p.values)) for p in RUN.places)
    )
    assert Recording.load(Recording.load(path).save(path)) == Recording.load(path), "rounded once"
    nothing_measured = replace(RUN, memory_bytes=None)
    assert Recording.load(nothing_measured.save(path)).memory_bytes is None
    assert "<b>–</b>" in TrainingReplay(nothing_measured)._figures.value


def test_the_kept_point_is_the_nearest_and_of_the_text_the_least_surprised_one():
    assert RUN.best() == RUN.evaluations[1]
    assert RUN.best(1) == RUN.evaluations[0]
    assert RUN.share_recovered() == 0.5
    assert RUN.share_recovered(0) == pytest.approx(0.1)
    assert replace(RUN, loss=TEXT_LOSS).best() == RUN.evaluations[2]
    assert replace(RUN, evaluations=RUN.evaluations[1:]).share_recovered(0) is None


def test_a_panel_records_what_its_run_did(tiny, monkeypatch, tmp_path):
    stand_in_for_train_qat(monkeypatch)
    with loaded_for_training(tiny, monkeypatch) as model:
        panel = TrainingPanel(model, text=("python-code", "words " * 40), settings=SHORT)
        run, (group, places) = panel.run(), panel._mine.session.walk
        found = Recording.load(panel.record(tmp_path / "run.json"))
    assert (found.name, found.format, found.num_steps, found.seconds) == (run.name, "q4_0", 4, run.seconds)
    assert (found.lines, found.evaluations) == (run.lines, run.evaluations)
    assert found.steps == tuple(replace(step, loss=round(step.loss, 9)) for step in run.steps)
    assert (found.best(), found.share_recovered()) == (run.best, run.share_recovered)
    assert (found.group, [place.codes for place in found.places]) == (group, [place.codes for place in places])
    assert found.loss == "Loss: KL divergence and distance of hidden states"
    assert re.fullmatch(r"python-code of Python [\d.]+\w*, your text", found.held_out)
    assert re.search(r"\d+ CPU cores.*, \d{4}-\d\d-\d\d$", found.made)
    assert found.memory_bytes > 2**20
    replay = TrainingReplay(found)
    assert replay._walk.value == panel._replay.value
    assert "PTQ 20.09" in replay._figures.value


def test_there_is_nothing_to_record_before_a_run_has_ended(tiny, monkeypatch, tmp_path):
    trainer = stand_in_for_train_qat(monkeypatch)
    with loaded_for_training(tiny, monkeypatch) as model:
        panel = TrainingPanel(model, settings=SHORT)
        with pytest.raises(BadSettingError, match="no run to record"):
            panel.record(tmp_path / "run.json")
        trainer.gate.clear()
        click(panel._start_button)
        wait_for(lambda: "Training for q4_0" in panel._status.value)
        with pytest.raises(BadSettingError, match="wait until it has ended"):
            panel.record(tmp_path / "run.json")
        trainer.gate.set()
        wait_for(lambda: "Ran to its end." in panel._status.value)
        assert panel.record(tmp_path / "run.json").is_file()


@pytest.mark.parametrize(("where", "value", "words"), [
    ("name", "x" * 301, "name must be a text of 300 characters at most"),
    ("made", None, "made must be a text"),
    ("num_steps", 0, "num_steps is 0, not a number from 1"),
    ("num_steps", 2.0, "num_steps is 2.0, not an integer"),
    ("num_steps", True, "num_steps is True, not a number"),
    ("num_steps", 10**4000, "not a number from 1"),
    ("seconds", math.nan, "seconds is nan, not a number from 0"),
    ("seconds", "1", "seconds is '1', not a number"),
    ("memory_bytes", -1, "memory_bytes is -1"),
    ("memory_bytes", 1.5, "memory_bytes is 1.5, not an integer"),
    ("lines", [], "lines must be a group of values"),
    ("lines.float_nats", math.inf, "float_nats is inf"),
    ("lines.plain", None, "plain must be a group of values"),
    ("lines.plain.nats", 701, "nats is 701, not a number from 0 to 700"),
    ("steps", [], "steps must be a list of groups of values, with one at least"),
    ("steps", {}, "steps must be a list"),
    ("steps.0", 3, "steps must be a list of groups"),
    ("steps.0.step", 2, "the steps of steps do not rise"),
    ("steps.2.step", 5, "step is 5, not a number from 0 to 4"),
    ("steps.0.step", 0, "step is 0, not a number from 1 to 4"),
    ("steps.0.loss", -1, "loss is -1"),
    ("evaluations", None, "evaluations must be a list"),
    ("evaluations.1.step", 0, "the steps of evaluations do not rise"),
    ("evaluations.1.kl_divergence", 1e7, "kl_divergence is 10000000.0"),
    ("group.is_half", 1, "is_half must be true or false"),
    ("group.low", 0, "low is 0, not a number from -128 to -1"),
    ("group.row", -1, "row is -1"),
    ("group.name", 3, "name must be a text"),
    ("places", [], "places must be a list"),
    ("places.3.step", 2, "the steps of places do not rise"),
    ("places.0.values", [0.0], "a place must have 32 values and as many codes"),
    ("places.0.codes", 3, "a place must have 32 values"),
    ("places.0.values.31", None, "value is None"),
    ("places.0.codes.0", 8, "code is 8, not a number from -8 to 7"),
    ("places.0.codes.0", 0.5, "code is 0.5, not an integer"),
    ("places.0.scale", math.inf, "scale is inf"),
    ("places.0.scale", 2e-9, "levels away and more"),
])  # fmt: skip
def test_a_value_that_cannot_be_drawn_is_refused(where, value, words, tmp_path):
    kept = json.loads(RUN.save(tmp_path / "run.json").read_text())
    *parts, last = [int(part) if part.isdecimal() else part for part in where.split(".")]
    inner = kept
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (tmp_path / "run.json").write_text(json.dumps(kept))
    with pytest.raises(BadSettingError, match="is no recording that can be read") as caught:
        Recording.load(tmp_path / "run.json")
    assert words in caught.value.wrong
    assert "TrainingPanel.record" in caught.value.allowed


def test_another_file_is_refused_however_large_it_is(tmp_path):
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(BadSettingError, match="larger than 16 MiB"):
        Recording.load(path)
    for content, words in (("{", "no JSON"), ('{"kind": "else"}', "another kind"), ("[" * 100_000, "no JSON"),
                           ('{"kind": "gemma_qat_kit recording", "version": 9}', "of version 9")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(BadSettingError, match=words):
            Recording.load(path)
    with pytest.raises(BadSettingError, match="cannot be read: No such file"):
        TrainingReplay(tmp_path / "missing.json")


def test_the_most_that_a_file_may_say_is_drawn(tmp_path):
    for nats, loss, value in ((700, 1e6, 1e6), (0, 0, 0), (1e-9, 1e-9, 1e-9)):
        point = Evaluation(0, nats, loss)
        place = Place(0, (value,) * 32, 1.0 if value else 0.0, (0,) * 32)
        extreme = replace(RUN, lines=Lines(nats, point), evaluations=(point,), steps=(Step(1, loss, 1e9),),
                          places=(place,), seconds=1e9, memory_bytes=2**60)  # fmt: skip
        for each in (extreme, replace(extreme, loss=TEXT_LOSS), replace(extreme, lines=Lines(0, point))):
            replay = TrainingReplay(Recording.load(each.save(tmp_path / "run.json")))
            assert not re.search(r"\b(nan|inf)\b", replay._figures.value + replay._walk.value)


def test_what_a_file_says_does_nothing_in_the_page():
    texts = dict.fromkeys(("name", "format", "loss", "held_out", "made"), HOSTILE)
    replay = TrainingReplay(replace(RUN, **texts, group=replace(RUN.group, name=HOSTILE)))
    shown = "".join(child.value for child in replay.children if hasattr(child, "value"))
    assert "&lt;img" in shown
    assert "<img" not in shown


def test_the_slider_moves_the_charts_and_the_walk():
    replay = TrainingReplay(RUN)
    assert "after step 4:" in replay._walk.value
    assert "<b>50%</b>" in replay._figures.value
    whole = replay._figures.value
    replay._place.value = 0
    assert replay._play.value == 0
    assert "after step 0:" in replay._walk.value
    assert "<b>10%</b>" in replay._figures.value
    assert "no step yet" in replay._figures.value
    replay._place.value = 2
    first, last = (set(re.findall(r'c[xy]="[\d.]+" c?y?="?[\d.]*', text)) for text in (replay._figures.value, whole))
    assert first < last, "the points that are there already stay where they are"
    assert re.findall(r"<text.*?</text>", replay._figures.value)[:6] == re.findall(r"<text.*?</text>", whole)[:6]
    replay._play.value = 3
    assert replay._figures.value == whole


def test_it_says_that_it_is_a_recording_and_where_it_was_made():
    replay = TrainingReplay(RUN)
    words = "A recording: nothing is computed here. Held out: the end of “a text”. Made on 2 CPU cores, 2026-01-31."
    assert words in replay.children[-1].value
    assert "<b>a model</b>, trained for q4_0: 3 of 4 steps." in replay.children[1].value
    assert "1 min 15 s" in replay._figures.value
    assert "3.00 GiB" in replay._figures.value


def test_a_name_that_did_not_come_with_the_kit_is_refused():
    with pytest.raises(UnknownNameError, match=r"Unknown recording 'smollm2'.*Did you mean 'smollm2-135m'"):
        TrainingReplay("smollm2")


def test_recordings_are_shown_without_torch():
    code = "import sys; from gemma_qat_kit import widgets; widgets.TrainingReplay()._play.value = 3;"
    code += "widgets.CompareChat(recording='smollm2-135m'); print(*{name.partition('.')[0] for name in sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "transformers", "xllamacpp"} & set(shown.split())
