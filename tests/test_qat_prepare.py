"""Preparing: which weights end on which grid, what the model computes then, and what is refused."""

import functools
import warnings

import pytest
import torch
from small_network import TEXT, logits, make_pair, quiet

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.formats import mobile, q4_0
from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize, starting_scale
from gemma_qat_kit.formats.quantized import quantize
from gemma_qat_kit.layouts import mobile_bits
from gemma_qat_kit.qat.fake_quantizer import FLOAT, PLAIN, FrozenTable, computing, masters, quantizers
from gemma_qat_kit.qat.prepare import KeptInFloatWarning, count_trained, prepare_qat
from gemma_qat_kit.qat.ranges import StaticRange
from gemma_qat_kit.qat.state import trained
from gemma_qat_kit.quality.post_training import collect_importance, linears

FORMATS = ("q4_0", "mobile")
SHORT = TEXT[:80]
NONE = {}  # no importance: the plain search for scales
prepare = functools.partial(prepare_qat, report=quiet)


def grids(module):
    """Return by a weight's name that of its grid."""
    return {name: quantizer.grid.name for name, (_, quantizer) in masters(module).items()}


def load(tiny, size):
    return gqk.load(str(tiny(size, "bf16")), device="cpu", report=quiet)


def in_transformers(tiny, size):
    """Return a tiny Gemma as transformers loads it, its per-layer table in memory, and nothing to calibrate with."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny(size, "bf16"), dtype=torch.bfloat16)


@functools.cache
def prepared(tiny, size, format):
    """Return a tiny Gemma's module, prepared, with the names of its linears, its logits before, and the warnings."""
    model = load(tiny, size)
    module = model.hf[0]
    names, before = set(linears(module)), logits(module)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", KeptInFloatWarning)
        prepare(model, format, calibration=SHORT)
    said = [str(warning.message) for warning in warned if warning.category is KeptInFloatWarning]
    if format == "mobile" and size == "26B-A4B":
        assert "layers.0.experts.gate_up_proj (8, 64, 256), " in said[0]
        assert "experts, which mobile has no place for" in said[0]
    elif size in ("E2B", "E4B"):
        assert "embed_tokens_per_layer is looked up outside the model" in said[0]
    assert len(said) == (size in ("E2B", "E4B") or (size, format) == ("26B-A4B", "mobile"))
    return module, names, before


EVERY = pytest.mark.parametrize(("size", "format"), [(size, format) for size in GEMMA_SIZES for format in FORMATS])


@EVERY
def test_every_linear_is_on_its_grid_and_experts_are_under_q4_0(tiny, size, format):
    module, names, _ = prepared(tiny, size, format)
    experts = {name for name in names if ".experts." in name}
    assert bool(experts) is (size == "26B-A4B")
    assert set(masters(module)) == names - (experts if format == "mobile" else set())
    assert all(grid == "q4_0" if format == "q4_0" else grid.startswith("mobile") for grid in grids(module).values())


@EVERY
def test_each_weight_computes_as_the_codes_and_scales_that_are_stored(tiny, size, format):
    module, _, _ = prepared(tiny, size, format)
    for name, (part, last, quantizer) in quantizers(module).items():
        weight, stored = getattr(part, last), quantizer.store(part.parametrizations[last].original)
        if format == "q4_0" or isinstance(quantizer, FrozenTable):
            assert torch.equal(weight, stored.dequantize(torch.bfloat16)), name
        else:  # transformers multiplies mobile's codes in the model's own dtype
            assert torch.equal(weight, stored.codes.bfloat16() * stored.scale.bfloat16()), name


@EVERY
def test_without_quantization_the_logits_are_the_original_ones_bit_for_bit(tiny, size, format):
    module, _, before = prepared(tiny, size, format)
    with computing(module, FLOAT):
        assert torch.equal(logits(module), before)
    assert not torch.equal(logits(module), before)


@EVERY
def test_gradients_reach_every_master_and_scale_and_nothing_else(tiny, size, format):
    module, _, _ = prepared(tiny, size, format)
    module.zero_grad()
    module(torch.arange(110, 134)[None], use_cache=False).logits.float().square().mean().backward()
    expected = {f"{name.rpartition('.')[0]}.parametrizations.{name.rpartition('.')[2]}.{last}"
                for name in masters(module) for last in ("original", "0.scale")}  # fmt: skip
    if format == "mobile":
        expected |= {f"{name.removesuffix('.weight')}.{side}_range.scale"
                     for name in masters(module) for side in ("input", "output")}  # fmt: skip
    touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == expected == set(trained(module))
    assert all(p.dtype == torch.float32 for p in trained(module).values())


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_mobile_bits_are_those_of_the_published_schedule(tiny, size):
    module, _, _ = prepared(tiny, size, "mobile")
    config = hf_config(size, "mobile")
    expected = {name: mobile_bits(config, name.removesuffix(".weight")) for name in masters(module)}
    assert {name: quantizer.grid.bits for name, (_, quantizer) in masters(module).items()} == expected
    assert set(expected.values()) == ({2, 4, 8} if size == "E2B" else {4, 8})


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_mobile_tables_have_the_published_bits_and_a_scale_for_each_layers_slice(tiny, size):
    module = in_transformers(tiny, size)
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters() if "embed_tokens" in name}
    prepare(module, "mobile")
    config, layers = hf_config(size, "mobile"), module.config.get_text_config().num_hidden_layers
    tables = {name: q.stored for name, (_, _, q) in quantizers(module).items() if isinstance(q, FrozenTable)}
    assert len(tables) == 3
    for name, stored in tables.items():
        assert stored.format == f"mobile_int{mobile_bits(config, name.removesuffix('.weight'))}"
        assert stored.scale.shape == (512, layers if "per_layer" in name else 1)
        before = weights.get(name, weights["model.language_model.embed_tokens.weight"]).float()
        rounding = (before - stored.dequantize()).square().mean() / before.square().mean()
        assert rounding < 3 * 4.0 ** -int(stored.format[-1])


@pytest.mark.parametrize("size", ["12B", "26B-A4B", "31B"])
def test_a_size_without_a_mobile_checkpoint_gets_the_schedule_of_e4b(tiny, size):
    module, _, _ = prepared(tiny, size, "mobile")
    assert set(grids(module).values()) <= {"mobile_int4", "mobile_int8"}


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_mobile_ranges_are_calibrated(tiny, size):
    module, _, _ = prepared(tiny, size, "mobile")
    scales = [part.scale.item() for part in module.modules() if isinstance(part, StaticRange)]
    assert len(scales) == 2 * len(masters(module))
    assert all(0 < scale < 1 for scale in scales)


def test_towers_stay_out_of_it():
    module, _ = pair = make_pair()
    module.vision_tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64)})
    prepare(pair, "q4_0", calibration=NONE)
    assert len(masters(module)) == 14
    assert not any("vision" in name for name in masters(module))
    assert not module.vision_tower["q_proj"].weight.requires_grad


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_may_be_taken_for_every_weight(name):
    module, _ = pair = make_pair()
    prepare(pair, name, calibration=SHORT)
    assert set(grids(module).values()) == {name}
    assert not any(isinstance(part, StaticRange) for part in module.modules())


def test_the_first_override_that_matches_counts_and_none_keeps_a_float():
    module, _ = pair = make_pair()
    before = module.model.layers[0].mlp.up_proj.weight.detach().clone()
    overrides = {r"layers\.0\.mlp\.up": None, "mlp": "int3_g32", r"layers\.0": "mobile_int4"}
    prepare(pair, "q4_0", overrides=overrides, calibration=NONE)
    for name, grid in grids(module).items():
        expected = "int3_g32" if "mlp" in name else "mobile_int4" if "layers.0" in name else "q4_0"
        assert grid == expected, name
    assert len(masters(module)) == 13
    assert torch.equal(module.model.layers[0].mlp.up_proj.weight, before)
    assert not module.model.layers[0].mlp.up_proj.weight.requires_grad


def test_overrides_come_before_the_mobile_schedule_and_reach_experts(tiny):
    model = load(tiny, "26B-A4B")
    prepare(model, "mobile_weight_only", overrides={"experts": "q4_0"}, calibration=NONE)
    found = grids(model.hf[0])
    assert {grid for name, grid in found.items() if ".experts." in name} == {"q4_0"}
    assert sum(".experts." in name for name in found) == 2 * 12
    assert {grid for name, grid in found.items() if ".experts." not in name} <= {"mobile_int4", "mobile_int8"}


def test_an_override_may_be_for_an_embedding_alone():
    module, _ = pair = make_pair()
    before = module.model.embed_tokens.weight.detach().clone()
    prepare(pair, "q4_0", overrides={"embed|lm_head": None}, calibration=NONE)
    assert torch.equal(module.lm_head.weight, before)
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_tables_are_rounded_once_to_what_ships_and_not_trained():
    module, _ = pair = make_pair()
    table = module.model.embed_tokens.weight.detach().clone()
    prepare(pair, "q4_0", calibration=NONE)
    expected = quantize(table, "q8_0").dequantize()  # rows of 64 do not divide into Q6_K's groups of 256
    assert torch.equal(module.model.embed_tokens.weight, expected)
    assert torch.equal(module.lm_head.weight, expected)
    assert module.lm_head.parametrizations.weight.original is module.model.embed_tokens.parametrizations.weight.original
    assert not any("embed" in name or "lm_head" in name for name in trained(module))


@pytest.mark.parametrize("format", ["q4_0", "int3_g32", "mobile_weight_only"])
def test_a_tied_table_is_trained_once_where_embeddings_are(format):
    module, _ = pair = make_pair()
    prepare(pair, format, embeddings=True, calibration=NONE)
    head, embedding = module.lm_head, module.model.embed_tokens
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original
    assert torch.equal(head.weight, embedding.weight)
    assert [name for name in masters(module) if "layers" not in name] == ["model.embed_tokens.weight"]
    assert len([name for name in trained(module) if "layers" not in name]) == 2
    master, quantizer = masters(module)["model.embed_tokens.weight"]
    optimizer = torch.optim.SGD([master], 0.1)
    module(torch.arange(110, 134)[None], use_cache=False).logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(head.weight, learned_fake_quantize(master, quantizer.scale, quantizer.grid))
    assert torch.equal(head.weight, embedding.weight)


def test_untied_tables_are_two():
    module, _ = pair = make_pair(tie_word_embeddings=False)
    prepare(pair, "q4_0", embeddings=True, calibration=NONE)
    assert [name for name in masters(module) if "layers" not in name] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert not torch.equal(module.lm_head.weight, module.model.embed_tokens.weight)


def test_a_trained_per_layer_table_has_a_scale_for_each_layer_and_plain_rules_of_its_own(tiny):
    module = in_transformers(tiny, "E4B")
    prepare(module, "mobile_weight_only", embeddings=True)
    name = next(name for name in masters(module) if name.endswith("per_layer.weight"))
    master, quantizer = masters(module)[name]
    assert quantizer.scale.shape == (512, 12)
    quantizer.take_plain_scale(master)
    assert torch.equal(quantizer.scale, mobile.quantize(master, quantizer.grid.bits, group_size=64)[1])
    with computing(module, PLAIN):
        assert torch.isfinite(logits(module)).all()


def test_scales_may_stay_where_they_begin():
    module, _ = pair = make_pair()
    prepare(pair, "q4_0", learn_scales=False, calibration=NONE)
    assert all(name.endswith("original") for name in trained(module))
    assert len(trained(module)) == 14


def test_what_is_trained_is_counted():
    module, _ = pair = make_pair()
    assert count_trained(pair) == 0
    num_weights = sum(weight.numel() for weight in linears(module).values())
    prepare(pair, "q4_0", calibration=NONE)
    assert count_trained(pair) == num_weights + num_weights // 32
    module, _ = pair = make_pair()
    prepare(pair, "mobile", calibration=SHORT)
    num_rows = sum(weight.shape[0] for weight, _ in masters(module).values())
    assert count_trained(pair) == num_weights + num_rows + 2 * 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_lie_on_a_q4_0_grid_keep_it(dtype):
    module, _ = pair = make_pair(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in linears(module).values():
            codes = torch.randint(-5, 6, weight.shape, generator=generator).float()  # none reaches -8: no plain rule
            step = (0.02 + 0.1 * torch.rand(weight.numel() // 32, 1, generator=generator)).half().float()
            weight.copy_((codes.view(-1, 32) * step.to(dtype).float()).view(weight.shape))
    before = logits(module)
    prepare(pair, "q4_0", overrides={"embed|lm_head": None}, calibration=SHORT)
    assert torch.equal(logits(module), before)
    with computing(module, PLAIN):
        assert not torch.equal(logits(module), before)


def test_scales_begin_by_the_importance_of_the_inputs():
    pair, other = make_pair(), make_pair()
    weights = {name: weight.detach().clone() for name, weight in linears(pair[0]).items()}
    importance = collect_importance(pair, SHORT, report=quiet)
    prepare(pair, "q4_0", calibration=SHORT)
    prepare(other, "q4_0", calibration=importance)
    for name, (_, quantizer) in masters(pair[0]).items():
        assert torch.equal(quantizer.scale, starting_scale(weights[name], GRIDS["q4_0"], importance[name]))
        assert torch.equal(quantizer.scale, masters(other[0])[name][1].scale)
    third = make_pair()
    prepare(third[0], "q4_0", calibration=SHORT)  # no tokenizer, no text: the format's own rule
    name = "model.layers.1.mlp.up_proj.weight"
    expected = q4_0.unpack(q4_0.quantize(weights[name]))[1]
    assert torch.equal(masters(third[0])[name][1].scale, expected)
