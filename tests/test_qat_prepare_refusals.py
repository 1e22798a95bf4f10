"""What `prepare_qat` refuses, what it warns of, and that it leaves a model as it was when it is stopped."""

import functools

import pytest
import torch
from small_network import TEXT, logits, make_pair, quiet

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import BadSettingError, BadTensorError, CancelledError, UnknownNameError
from gemma_qat_kit.qat.fake_quantizer import masters, quantizers
from gemma_qat_kit.qat.prepare import KeptInFloatWarning, prepare_qat

SHORT = TEXT[:80]
NONE = {}  # no importance: the plain search for scales
prepare = functools.partial(prepare_qat, report=quiet)


def test_an_override_that_matches_nothing_is_an_error_that_shows_a_name():
    module, _ = pair = make_pair()
    with pytest.raises(
        BadSettingError, match=r"No weight's name matches 'mpl'\. .*'model\.layers\.0\.self_attn\.q_proj'"
    ):
        prepare(pair, "q4_0", overrides={"mlp": None, "mpl": "q4_0"})
    assert not quantizers(module)


def test_an_override_that_is_no_expression_is_an_error():
    with pytest.raises(BadSettingError, match=r"'mlp\(' is no regular expression: .* Mend the expression"):
        prepare(make_pair(), "q4_0", overrides={"mlp(": None})


def test_unknown_formats_and_grids_get_suggestions():
    with pytest.raises(UnknownNameError, match=r"Unknown QAT format 'q4'\. .* Did you mean 'q4_0'"):
        prepare(make_pair(), "q4")
    with pytest.raises(UnknownNameError, match=r"Unknown grid 'int2'\. .* Did you mean 'int2_g32'"):
        prepare(make_pair(), "q4_0", overrides={"mlp": "int2"})


def test_weights_whose_rows_do_not_divide_are_named_and_stay_floats():
    module, _ = pair = make_pair(intermediate_size=144)
    down = module.model.layers[1].mlp.down_proj
    before = down.weight.detach().clone()
    with pytest.warns(KeptInFloatWarning, match=r"layers\.0\.mlp\.down_proj\.weight \(64, 144\), .* stay in 16 bits"):
        prepare(pair, "q4_0", calibration=NONE)
    assert len(masters(module)) == 12
    assert torch.equal(down.weight, before)
    pair = make_pair(intermediate_size=144)
    prepare(pair, "q4_0", overrides={"down_proj": "mobile_int4"}, calibration=NONE)
    assert len(masters(pair[0])) == 14


def test_many_kept_weights_are_counted():
    with pytest.warns(KeptInFloatWarning, match=r"and 2 more stay"):
        prepare(make_pair(intermediate_size=144, num_hidden_layers=7), "q4_0", calibration=NONE)


def test_a_mask_for_all_weights_leaves_nothing_to_train():
    with pytest.raises(BadSettingError, match="No weight is left to train"):
        prepare(make_pair(), "q4_0", overrides={"layers": None})


def test_a_model_is_prepared_once():
    pair = make_pair()
    prepare(pair, "q4_0", calibration=NONE)
    with pytest.raises(BadSettingError, match=r"prepared already\. .*convert_qat\(model\)"):
        prepare(pair, "q4_0", calibration=NONE)


@pytest.mark.parametrize(("format", "words"), [("w4a16", "quantized"), ("mobile", "linear layers")])
def test_a_quantized_model_is_refused(tiny, format, words):
    with (
        gqk.load(tiny("E2B", format), format, engine="transformers") as model,
        pytest.raises(BadSettingError, match=words),
    ):
        prepare(model, "q4_0")


def test_a_gguf_is_refused(tiny):
    with gqk.load(tiny("12B", "q4_0")) as model, pytest.raises(BadSettingError, match="runs in llama_cpp"):
        prepare(model, "q4_0")


def test_a_weight_with_nan_is_named_and_the_model_as_before():
    module, _ = pair = make_pair()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(BadTensorError, match=r"layers\.1\.mlp\.up_proj\.weight\[3, 4\] is nan"):
        prepare(pair, "q4_0", calibration=NONE)
    assert not quantizers(module)


@pytest.mark.parametrize("stage", ["collecting importance", "calibrating ranges", "finding scales"])
@pytest.mark.parametrize("error", [CancelledError("Stopped.", "", ""), KeyboardInterrupt()])
def test_preparing_can_be_stopped_and_the_model_is_as_before(stage, error):
    module, _ = pair = make_pair()
    before = logits(module)

    def stop(progress):
        if progress.stage == stage:
            raise error

    with pytest.raises(type(error)):
        prepare_qat(pair, "mobile", calibration=SHORT, report=stop)
    assert torch.equal(logits(module), before)
    assert not quantizers(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(p.requires_grad for p in module.parameters())


def test_a_table_outside_the_model_is_named(tiny):
    warning = pytest.warns(KeptInFloatWarning, match=r"embed_tokens_per_layer.*per_layer_table=\"memory\"")
    with gqk.load(str(tiny("E2B", "bf16")), device="cpu", report=quiet) as model, warning:
        prepare_qat(model, "q4_0", calibration={}, report=quiet)
