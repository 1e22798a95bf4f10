"""One question to several models: what agrees is counted against difflib's own ratio, and a file replays it."""

import json
import math
import re
from difflib import SequenceMatcher

import pytest
from stand_ins import StandIn, wait_for

import gemma_qat_kit as gqk
from gemma_qat_kit.chat.comparison import Pane
from gemma_qat_kit.errors import BadSettingError, EndpointError
from gemma_qat_kit.widgets import CompareChat

SKY, SEA = ("The ", "sky ", "is ", "blue."), ("The ", "sea ", "is ", "blue.")


def _models():
    return [StandIn("a", SKY), StandIn("b", SEA), StandIn("c", SKY)]


def test_answers_are_compared_token_by_token_with_the_first():
    found = gqk.compare_answers(_models(), "Hm?")
    assert found.agreement(1).differs == (False, True, False, False)
    assert found.agreement(1).share == SequenceMatcher(None, SKY, SEA).ratio()
    assert found.agreement(1).num_alike == 1
    assert found.agreement(2).share == 1
    assert [pane.text for pane in found.panes] == ["The sky is blue.", "The sea is blue.", "The sky is blue."]
    assert all(pane.memory_bytes == 2**28 and len(pane.times) == 4 for pane in found.panes)
    assert "75 % as in a" in str(found)


def test_an_answer_that_is_shorter_or_empty_is_measured_by_its_own_tokens():
    found = gqk.compare_answers([StandIn("a", SKY), StandIn("b", SKY[:2]), StandIn("c", ())], "Hm?")
    assert [found.agreement(index).share for index in (1, 2)] == [1, 0]


def test_a_model_that_fails_says_why_in_its_pane_and_the_others_answer():
    gone = StandIn("gone", (EndpointError("It has stopped.", "It runs.", "Load it again."),))
    found = gqk.compare_answers([StandIn("a", SKY), gone, StandIn("c", SKY)], "Hm?")
    assert [pane.ended for pane in found.panes] == ["stop", "It has stopped.", "stop"]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_two_to_four_models_stand_side_by_side(count):
    with pytest.raises(BadSettingError, match=r"cannot be compared|There is no model"):
        gqk.compare_answers([StandIn(str(i)) for i in range(count)], "Hm?")


def test_models_of_one_name_are_numbered():
    found = gqk.compare_answers([StandIn("a", SKY), StandIn("a", SEA)], "Hm?")
    assert [pane.name for pane in found.panes] == ["a", "a #2"]


def test_a_file_brings_it_back_and_a_damaged_one_is_refused(tmp_path):
    found = gqk.compare_answers(_models(), "Hm?")
    path = found.save(tmp_path / "c.json")
    assert gqk.Comparison.load(path) == found
    assert re.search(r"\d+ CPU cores.*, \d{4}-\d\d-\d\d$", found.made)
    kept = json.loads(path.read_text())
    changed = [{"panes": [kept["panes"][0] | change]} for change in (
        {"times": [1]}, {"times": [1, 2, 3, math.inf]}, {"times": [1, 2, 3, math.nan]}, {"times": [-1, 2, 3, 4]},
        {"memory_bytes": math.inf})]  # fmt: skip
    for change in ({"panes": []}, {"panes": [{}]}, {"prompt": 3}, {"made": 3}, *changed):
        path.write_text(json.dumps(kept | change))
        with pytest.raises(BadSettingError, match="no comparison that can be read"):
            gqk.Comparison.load(path)
    path.write_text(json.dumps({name: value for name, value in kept.items() if name != "made"}))
    assert gqk.Comparison.load(path).made == "", "as it was written before"


def test_a_moment_of_a_replay_has_what_had_come_by_then():
    pane = Pane("a", pieces=SKY, times=(0.1, 0.2, 0.3, 0.4), ended="stop")
    assert pane.until(0.25).text == "The sky "
    assert pane.until(0.25).ended == "unfinished"
    assert pane.until(0.4) is pane


def test_the_panel_marks_what_differs_and_replays_without_models(tmp_path):
    panel = CompareChat(_models())
    panel.ask("Hm?")
    wait_for(lambda: "Every model has answered." in panel._status.value)
    assert panel._picture.value.count("<mark>sea </mark>") == 1
    assert "a (reference)" in panel._picture.value
    assert "75 % of its tokens" in panel._picture.value
    again = CompareChat(recording=panel.comparison.save(tmp_path / "c.json"))
    assert f"A recording: press Replay. Made on {panel.comparison.made}." in again._status.value
    again.ask("Another?")
    again.replay(1e9)
    wait_for(lambda: "replayed" in again._status.value)
    assert again.comparison == panel.comparison


def test_stop_ends_all_answers_and_keeps_them():
    panel = CompareChat([StandIn("a", ("word ",) * 1000, 0.02), StandIn("b", ("word ",) * 1000, 0.02)])
    panel.ask("Hm?")
    wait_for(lambda: panel.comparison.panes[0].pieces)
    panel.stop()
    wait_for(lambda: "Stopped." in panel._status.value)
    assert [pane.ended for pane in panel.comparison.panes] == ["cancelled", "cancelled"]


def test_what_models_write_does_nothing_in_the_page():
    panel = CompareChat([StandIn("<i>", ("<img src=x onerror=1>",)), StandIn("b", ("<script>",))])
    panel.ask("<svg onload=1>")
    wait_for(lambda: "Every model has answered." in panel._status.value)
    assert not any(tag in panel._picture.value for tag in ("<img", "<script", "<svg", "<i>"))


def test_a_panel_needs_models_or_a_recording():
    for models in ([], None):
        with pytest.raises(BadSettingError, match="There is no model"):
            CompareChat(models)
