"""Converting: the model computes exactly what it did in training, and what ships stands beside each weight."""

import copy

import pytest
import torch
from small_network import TEXT, logits, make_pair, quiet

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats.blocks import Blocks
from gemma_qat_kit.formats.grids import GRIDS
from gemma_qat_kit.formats.quantized import Quantized
from gemma_qat_kit.qat.convert import convert_qat
from gemma_qat_kit.qat.fake_quantizer import masters, quantizers
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.state import trained

SHORT = TEXT[:80]


def disturb(module):
    """Move every master and scale as training does, so that nothing lies where preparing left it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(module).values():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))


@pytest.mark.filterwarnings("ignore::gemma_qat_kit.qat.prepare.KeptInFloatWarning")  # mobile has no experts
@pytest.mark.parametrize("format", ["q4_0", "mobile"])
@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_converted_gemma_says_what_the_prepared_one_said_bit_for_bit(tiny, size, format):
    with gqk.load(str(tiny(size, "bf16")), device="cpu", report=quiet) as model:
        module = model.hf[0]
        names = {name for name, _ in module.named_parameters()}
        prepare_qat(model, format, calibration=SHORT, report=quiet)
        disturb(module)
        found, before = set(quantizers(module)), logits(module)
        convert_qat(model)
        assert torch.equal(logits(module), before)
        assert not quantizers(module)
        assert {name for name, _ in module.named_parameters() if not name.endswith("_range.scale")} == names
        assert module.lm_head.weight is module.get_input_embeddings().weight
        assert not any(parameter.requires_grad for parameter in module.parameters())
        for name in found:
            prefix, _, last = name.rpartition(".")
            part = module.get_submodule(prefix)
            weight, stored = getattr(part, last), part.quantized[last]
            assert weight.dtype == torch.bfloat16
            if stored.format == "q4_0" if isinstance(stored, Quantized) else True:
                assert torch.equal(stored.dequantize(torch.bfloat16), weight), name
            else:
                torch.testing.assert_close(stored.dequantize(), weight.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_scales_dequantize_to_the_weight_on_every_grid(name, dtype):
    module, _ = pair = make_pair(dtype=dtype)
    prepare_qat(pair, name, calibration=SHORT, report=quiet)
    disturb(module)
    codes = {
        full: quantizer.grid.codes(master, quantizer.scale) for full, (master, quantizer) in masters(module).items()
    }
    before, grid = logits(module), GRIDS[name]
    convert_qat(pair)
    assert torch.equal(logits(module), before)
    for full, expected in codes.items():
        part = module.get_submodule(full.removesuffix(".weight"))
        stored = part.quantized["weight"]
        assert torch.equal(stored.codes, expected)
        assert stored.codes.min() >= grid.low
        assert stored.codes.max() <= grid.high
        if grid.is_half or dtype == torch.float32:
            assert torch.equal(stored.dequantize(dtype), part.weight)
        else:
            assert torch.equal(stored.codes.to(dtype) * stored.scale.to(dtype), part.weight)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_tied_table_stays_tied_and_is_stored_once(is_trained):
    module, _ = pair = make_pair()
    prepare_qat(pair, "q4_0", embeddings=is_trained, calibration={}, report=quiet)
    convert_qat(pair)
    head, embedding = module.lm_head, module.model.embed_tokens
    assert head.weight is embedding.weight
    assert head.quantized["weight"] is embedding.quantized["weight"]
    stored = embedding.quantized["weight"]
    assert isinstance(stored, Quantized if is_trained else Blocks)
    assert torch.equal(stored.dequantize(), embedding.weight)
    assert len({p.data_ptr() for p in module.parameters()}) == len(list(module.parameters()))


def test_untied_tables_stay_apart():
    module, _ = pair = make_pair(tie_word_embeddings=False)
    prepare_qat(pair, "q4_0", calibration={}, report=quiet)
    convert_qat(pair)
    assert module.lm_head.quantized["weight"] is not module.model.embed_tokens.quantized["weight"]
    assert torch.equal(module.lm_head.quantized["weight"].dequantize(), module.lm_head.weight)


def test_ranges_of_activations_stay():
    module, _ = pair = make_pair()
    prepare_qat(pair, "mobile", calibration=SHORT, report=quiet)
    before = logits(module)
    convert_qat(pair)
    layer = module.model.layers[0].mlp.up_proj
    assert layer.input_range.scale > 0
    assert torch.equal(logits(module), before)
    layer.input_range.scale.zero_()
    assert not torch.equal(logits(module), before)


def test_a_converted_model_is_a_plain_one():
    module, _ = pair = make_pair()
    classes = [type(part) for part in module.modules()]
    prepare_qat(pair, "q4_0", calibration={}, report=quiet)
    convert_qat(pair)
    assert [type(part) for part in module.modules()] == classes
    twin, _ = make_pair(seed=1)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(logits(twin), logits(module))
    assert torch.equal(logits(copy.deepcopy(module)), logits(module))


def test_weights_that_stayed_floats_have_nothing_beside_them():
    module, _ = pair = make_pair()
    prepare_qat(pair, "q4_0", overrides={"mlp": None}, calibration={}, report=quiet)
    convert_qat(pair)
    assert not hasattr(module.model.layers[0].mlp.up_proj, "quantized")
    assert module.model.layers[0].self_attn.q_proj.quantized["weight"].format == "q4_0"


def test_converting_ends_what_preparing_began_and_only_that():
    pair = make_pair()
    with pytest.raises(BadSettingError, match=r'not prepared\. .*prepare_qat\(model, "q4_0"\) first'):
        convert_qat(pair)
    prepare_qat(pair, "q4_0", calibration={}, report=quiet)
    convert_qat(pair)
    with pytest.raises(BadSettingError, match="needs no second call"):
        convert_qat(pair)


def test_a_converted_model_can_be_prepared_again_and_keeps_its_grid():
    module, _ = pair = make_pair()
    prepare_qat(pair, "q4_0", calibration=SHORT, report=quiet)
    convert_qat(pair)
    before = logits(module)
    prepare_qat(pair, "q4_0", overrides={"embed|lm_head": None}, calibration=SHORT, report=quiet)
    assert len(masters(module)) == 14
    assert torch.equal(logits(module), before)


def test_ranges_of_a_model_that_is_prepared_again_are_its_only_ones():
    module, _ = pair = make_pair()
    for _ in range(2):
        prepare_qat(pair, "mobile", calibration=SHORT, report=quiet)
        convert_qat(pair)
    layer = module.model.layers[0].mlp.up_proj
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
