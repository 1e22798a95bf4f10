"""Whole models rounded for the length of a block: which layers, what importance, and everything back afterwards."""

import math

import pytest
import torch
from built_in_network import loaded

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.errors import BadSettingError, BadTensorError, CancelledError, ModelClosedError, UnknownNameError
from gemma_qat_kit.formats.quantized import FORMATS, quantize
from gemma_qat_kit.layouts import gguf_name, gguf_tensors
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.post_training import METHODS, collect_importance, linears, module_of, quantized_weights
from gemma_qat_kit.testing import tiny_config


def quiet(progress):
    pass


@pytest.fixture(scope="module")
def importance():
    return collect_importance(loaded(), max_tokens=64, report=quiet)


def state_of(module):
    return {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in module.named_parameters()}


def assert_unchanged(module, before):
    for name, weight in module.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1]), name


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_linears_are_what_googles_files_store_as_q4_0(tiny, size):
    stored = {tensor.name for tensor in gguf_tensors(tiny_config(size)) if tensor.dtype == "Q4_0"}
    with gqk.load(tiny(size, "bf16")) as model:
        found = linears(model.hf[0])
    names = {gguf_name("model.language_model." + name.partition("model.")[2].removeprefix("language_model."))
             for name in found}  # fmt: skip
    assert names == stored


def test_linears_of_the_built_in_model_are_all_but_head_and_embeddings():
    module = loaded().hf[0]
    found = linears(module)
    assert len(found) == 30 * 7
    assert all(found[name] is module.get_parameter(name) for name in found)
    kept = {name for name, weight in module.named_parameters() if weight.ndim > 1} - set(found)
    assert kept == {"model.embed_tokens.weight"}


def test_towers_keep_their_precision():
    from transformers import AutoConfig, AutoModelForCausalLM

    content = tiny_config("E2B")
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    towers = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear) and "tower" in name]
    assert len(towers) > 20
    assert not set(linears(module)) & {f"{name}.weight" for name in towers}
    assert all(".layers." in name and "tower" not in name for name in linears(module))


def test_importance_is_the_mean_square_of_each_input():
    model = loaded()
    module = model.hf[0]
    found = collect_importance(model, "python-code", max_tokens=40, report=quiet)
    ids = torch.tensor([model.runner.tokenize(texts.read("python-code").content)[:40]])
    seen = {}
    layer = module.model.layers[3]
    hooks = [
        part.register_forward_hook(lambda part, args, output, name=name: seen.update({name: args[0]}))
        for name, part in (("q", layer.self_attn.q_proj), ("down", layer.mlp.down_proj))
    ]
    with torch.inference_mode():
        module(ids)
    for hook in hooks:
        hook.remove()
    for short, name in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        expected = seen[short][0].double().square().mean(0).float()
        torch.testing.assert_close(found[f"model.layers.3.{name}.weight"], expected, rtol=1e-4, atol=1e-9)
    assert set(found) == set(linears(module))
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_importance_of_experts_is_over_all_tokens_that_any_of_them_got(tiny):
    with gqk.load(tiny("26B-A4B", "bf16")) as model:
        module = model.hf[0]
        name, experts = next((n, part) for n, part in module.named_modules() if n.endswith("experts"))
        seen = []
        hook = experts.register_forward_pre_hook(lambda part, args: seen.append(args))
        found = collect_importance(model, "the sky is blue " * 4, max_tokens=20, report=quiet)
        hook.remove()
        hidden, chosen = seen[0][0].clone(), seen[0][1].tolist()  # out of inference mode
        torch.testing.assert_close(found[f"{name}.gate_up_proj"], hidden.float().square().mean(0), rtol=1e-4, atol=0)
        rows = []
        for token, experts_of_it in zip(hidden, chosen, strict=True):
            for expert in experts_of_it:
                with torch.no_grad():
                    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                    rows.append((experts.act_fn(gate) * up).float())
        expected = torch.stack(rows).square().mean(0)
        torch.testing.assert_close(found[f"{name}.down_proj"], expected, rtol=0.02, atol=1e-6)  # products in bf16
        assert set(found) == set(linears(module))


def test_importance_is_collected_from_another_text_than_the_one_measured():
    words = texts.read("calibration").content
    explicit = collect_importance(loaded(), words, max_tokens=32, report=quiet)
    default = collect_importance(loaded(), max_tokens=32, report=quiet)
    assert all(torch.equal(explicit[name], default[name]) for name in default)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_format_and_come_back_bit_for_bit(method, importance):
    module = loaded().hf[0]
    before, name = state_of(module), "model.layers.5.mlp.down_proj.weight"
    options = {
        "q4_0+importance": {"format": "q4_0", "importance": importance[name]},
        "q4_0+grid": {"format": "q4_0", "recover_grid": True},
    }
    expected = quantize(before[name][1], **options.get(method, {"format": method}))
    with quantized_weights(loaded(), method, importance=importance) as size:
        assert torch.equal(module.get_parameter(name), expected.dequantize())
        assert torch.equal(module.model.embed_tokens.weight, before["model.embed_tokens.weight"][1])
        for changed in linears(module):
            assert not torch.equal(module.get_parameter(changed), before[changed][1])
    assert_unchanged(module, before)
    assert size.num_weights == 106_168_320
    bits = {"q8_0": 8.5, "w4a16": 4.5, "nf4": 4.5}.get(method, 4.5 if method.startswith("q4_0") else None)
    if bits is None:  # a float32 scale for each row of 576 or 1,536
        bits = int(method[-1]) + 32 * 30 * (3 * 576 + 2 * 192 + 2 * 1536) / size.num_weights
    assert size.bits_per_weight == pytest.approx(bits)
    assert size.nbytes == size.bits_per_weight * size.num_weights / 8


def test_every_format_is_a_method():
    assert set(METHODS) == {*FORMATS, "q4_0+importance", "q4_0+grid"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_weights_come_back_after_an_error_in_the_block(error):
    module = loaded().hf[0]
    before = state_of(module)
    with pytest.raises(error), quantized_weights(module, "mobile_int2"):
        raise error
    assert_unchanged(module, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CancelledError("Stopped.", "", "")])
def test_weights_come_back_when_quantizing_is_stopped(error):
    module, seen = loaded().hf[0], []
    before = state_of(module)

    def stop(progress):
        seen.append(progress)
        if len(seen) == 20:
            raise error

    with pytest.raises(type(error)), quantized_weights(loaded(), "q4_0", report=stop):
        raise AssertionError("the block must not run")
    assert_unchanged(module, before)
    assert seen[-1].stage == "quantizing"
    assert 0 < seen[-1].done_bytes < seen[-1].total_bytes == 4 * 106_168_320


def test_collecting_importance_can_be_stopped_and_leaves_no_hooks():
    def stop(progress):
        assert (progress.stage, progress.unit) == ("collecting importance", "tokens")
        raise CancelledError("Stopped.", "", "")

    with pytest.raises(CancelledError):
        collect_importance(loaded(), max_tokens=32, report=stop)
    assert not any(part._forward_pre_hooks for part in loaded().hf[0].modules())


def test_bfloat16_weights_stay_bfloat16(tiny):
    with gqk.load(tiny("12B", "bf16")) as model, quantized_weights(model, "q8_0"):
        assert {weight.dtype for weight in linears(model.hf[0]).values()} == {torch.bfloat16}


def test_a_weight_that_a_format_cannot_hold_is_named_and_the_others_come_back():
    module = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Linear(30, 4))
    before = state_of(module)
    with pytest.raises(BadTensorError, match=r"1\.weight"), quantized_weights(module, "q4_0"):
        raise AssertionError("the block must not run")
    assert_unchanged(module, before)
    with torch.no_grad():
        module[0].weight[2, 3] = math.nan
    with pytest.raises(BadTensorError, match=r"0\.weight"), quantized_weights(module, "q8_0"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("format", "words"), [("nf4", "quantized"), ("w4a16", "quantized"), ("mobile", "linear layers")]
)
def test_a_model_that_is_quantized_already_is_refused(tiny, format, words):
    with (
        gqk.load(tiny("E2B", format), format, engine="transformers") as model,
        pytest.raises(BadSettingError, match=words),
    ):
        linears(model.hf[0])


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(BadSettingError, match=r"Embedding has no linear layers\. .* float32"):
        linears(torch.nn.Embedding(3, 4))


def test_another_engine_has_no_weights_to_change(tiny):
    with gqk.load(tiny("12B", "q4_0")) as model, pytest.raises(BadSettingError, match="runs in llama_cpp"):
        module_of(model)
    with pytest.raises(BadSettingError, match="cannot be measured"):
        module_of("E2B")
    with gqk.load(tiny("12B", "bf16")) as model:
        pass
    with pytest.raises(ModelClosedError):
        module_of(model)


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_0'"), quantized_weights(loaded(), "q4"):
        pass


@pytest.mark.parametrize("importance", [None, {}])
def test_importance_has_to_be_there(importance):
    with (
        pytest.raises(BadSettingError, match=r"no importance for model\.layers\.0\..*collect_importance\(model\)"),
        quantized_weights(loaded(), "q4_0+importance", importance=importance),
    ):
        pass


def test_a_grid_is_sought_within_the_rounding_that_the_weights_were_stored_with():
    # Codes times a bfloat16 step, rounded to bfloat16 and loaded as float32: no exact multiples any more.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-5, 6, (64, 32, 4), generator=generator)
    step = (0.01 + torch.rand(64, 1, 4, generator=generator)).to(torch.bfloat16).float()
    weight = (codes * step).to(torch.bfloat16).float().transpose(1, 2).flatten(1)
    module = torch.nn.Sequential(torch.nn.Linear(128, 64))
    module[0].weight.data = weight
    with quantized_weights(module, "q4_0+grid"):
        assert torch.equal(module[0].weight.to(torch.bfloat16).float(), weight)
    with quantized_weights(module, "q4_0"):
        assert not torch.equal(module[0].weight.to(torch.bfloat16).float(), weight)
