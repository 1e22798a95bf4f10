"""Gemma 4 in Q4_0 blocks: read from a GGUF, or packed from 16 bits, it computes what transformers computes with the
same values, and what it reads is what it writes again."""

import warnings

import gguf
import pytest
import torch
from small_network import quiet
from test_load import IDS, gguf_values

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.engines import transformers_traps
from gemma_qat_kit.engines.packed import PackedExperts, PackedLinear, blocks_of
from gemma_qat_kit.engines.transformers_packed import load_packed
from gemma_qat_kit.engines.transformers_table import HostTable
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, UnknownNameError
from gemma_qat_kit.finetune.lora import adapters, add_adapters, find_linears
from gemma_qat_kit.gguf.config import config_of
from gemma_qat_kit.gguf.header import GgufHeader, GgufTensor
from gemma_qat_kit.gguf.metadata import model_keys
from gemma_qat_kit.layouts import gguf_name, gguf_tensors
from gemma_qat_kit.testing import tiny_config

TEXTS = ("the sky is blue", " and Ünïcode\n\n<|turn>user\nhi<turn|>", "<|channel>thought\n12.5 (x)<channel|>", "")


@pytest.fixture
def load(tiny):
    """Load a tiny Gemma in its blocks, float32, closed at the end."""
    opened = []

    def loaded(size, format="q4_0", **options):
        model = gqk.load(str(tiny(size, format)), "q4_0", engine="transformers", device="cpu", report=quiet, **options)
        opened.append(model)
        return model

    yield loaded
    for model in opened:
        model.close()


def says(module):
    with torch.no_grad():
        return module(torch.tensor([IDS])).logits


def as_plain(tiny, size, values):
    """Return the tiny model of transformers itself, in float32, with the values of a GGUF."""
    with gqk.load(str(tiny(size, "bf16")), device="cpu", per_layer_table="memory", report=quiet) as model:
        module = model.hf[0].float()
    named = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if "layer_scalar" in n)]
    with torch.no_grad():
        for name, value in named:
            value.copy_(torch.from_numpy(values[gguf_name(name)].copy()))
    for part in module.modules():
        if hasattr(part, "embed_scale"):
            part.embed_scale = torch.tensor(part.scalar_embed_scale)
    return module


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_gguf_computes_in_transformers_what_its_values_say(tiny, size):
    path = tiny(size, "q4_0")
    module, _ = load_packed(path, dtype=torch.float32, device=torch.device("cpu"), per_layer_table="disk")
    kinds = [type(part) for part in module.modules()]
    assert PackedLinear in kinds
    assert (PackedExperts in kinds) == (size == "26B-A4B")
    expected = as_plain(tiny, size, gguf_values(path))
    # transformers adds a mixture of experts up in an order of its own, which depends on its release
    torch.testing.assert_close(says(module), says(expected), rtol=1e-4, atol=1e-4)
    if size != "26B-A4B":
        assert torch.equal(says(module), says(expected))


def test_it_chats(load):
    model = load("E2B")
    assert (model.engine, model.format) == ("transformers", "q4_0")
    assert model.chat("the sky", max_new_tokens=4, temperature=0).new_tokens == 4


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_what_is_read_is_what_is_written(tiny, load, tmp_path, size):
    source, target = tiny(size, "q4_0"), tmp_path / "again.gguf"
    gqk.export_gguf(load(size), target, report=quiet)
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type, name
        assert (after[name].data == tensor.data).all(), name


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_16_bit_weights_are_packed_as_they_are_read(tiny, load, size):
    packed = load(size, "q4_0-unquantized").hf[0]
    with gqk.load(str(tiny(size, "q4_0-unquantized")), device="cpu", report=quiet) as model:
        weights = dict(model.hf[0].named_parameters())
    count = 0
    for name, part in packed.named_modules():
        for last, value in getattr(part, "quantized", {}).items():
            if value.kind == "Q4_0":
                assert torch.equal(value.blocks, blocks_of(weights[f"{name}.{last}"], None, name))
                count += 1
    assert count >= 7 * len(packed.model.language_model.layers) - 2 * 12  # shared layers have neither keys nor values
    assert torch.equal(packed.get_input_embeddings().weight, weights["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize("place", ["disk", "cpu", "memory"])
@pytest.mark.parametrize("format", ["q4_0", "q4_0-unquantized"])
def test_the_per_layer_table_lies_where_it_was_asked_for(load, format, place):
    module = load("E2B", format, per_layer_table=place).hf[0]
    table = next(part for part in module.modules() if isinstance(part, HostTable))
    elsewhere = load("E2B", format).hf[0]
    assert torch.equal(says(module), says(elsewhere))
    ids = torch.tensor([3, 9])
    assert torch.equal(table(ids), next(p for p in elsewhere.modules() if isinstance(p, HostTable))(ids))


@pytest.mark.parametrize("size", GEMMA_SIZES)
@pytest.mark.parametrize("make", [hf_config, tiny_config])
def test_a_header_says_what_the_config_said(size, make):
    config = make(size)
    shapes = tuple(GgufTensor(t.name, 0, t.shape, 0, 0) for t in gguf_tensors(config))
    header = GgufHeader({f"gemma4.{key}": value for key, value in model_keys(config).items()}, shapes)
    found = config_of(header, config["text_config"]["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    differing = {key for key, value in config["text_config"].items() if found["text_config"].get(key) != value}
    # Both say how images are attended to, and which of two names a text model without them goes by.
    assert differing <= {"use_bidirectional_attention", "model_type"}


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_the_tokenizer_of_a_gguf_is_that_of_its_folder(tiny, load, size):
    with gqk.load(str(tiny(size, "bf16")), device="cpu", report=quiet) as model:
        expected = model.hf[1]
    found = load(size).hf[1]
    for text in TEXTS:
        ids = found(text, add_special_tokens=False).input_ids
        assert ids == expected(text, add_special_tokens=False).input_ids
        assert found(text).input_ids == [2, *ids]
        for skip in (True, False):
            assert found.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(messages, tokenize=False)


def test_what_is_packed_cannot_have_what_a_gguf_has_not(tiny):
    path = str(tiny("E2B", "q4_0"))
    for source, options, message in (("E2B", {"text_only": False}, "in Q4_0 blocks is a text model"),
                                     (path, {"text_only": False}, "in Q4_0 blocks is a text model"),
                                     (path, {"kv_format": "q8_0"}, "runs in transformers")):  # fmt: skip
        with pytest.raises(BadSettingError, match=message):
            gqk.load(source, "q4_0", engine="transformers", **options)
    with pytest.raises(BadSettingError, match="does not run in llama_cpp"):
        gqk.load(str(tiny("E2B", "bf16")), engine="llama_cpp")
    with pytest.raises(UnknownNameError, match="engine"):
        gqk.load(path, engine="vllm")
    with pytest.raises(BadSettingError, match="holds bf16, not q4_0"):
        gqk.load(str(tiny("E2B", "bf16")), "q4_0")


def test_a_gguf_that_lacks_something_is_refused(tiny, tmp_path):
    data = tiny("E2B", "q4_0").read_bytes()
    damage = {
        b"blk.0.attn_q.weight": "q_proj.weight is missing",
        b"rope_freqs.weight": "has no rope_freqs.weight",
        b"gemma4.block_count": "do not describe a Gemma 4",
        b"tokenizer.ggml.merges": "is not Gemma's",
    }
    for name, message in damage.items():
        path = tmp_path / f"{len(message)}.gguf"
        path.write_bytes(data.replace(name, name[:-1] + b"X", 1))
        with pytest.raises(BrokenCheckpointError, match=message):
            gqk.load(path, "q4_0", engine="transformers", device="cpu", report=quiet)


def test_layers_are_computed_twice_by_whatever_name_this_release_has_for_it(load):
    module = load("E2B").hf[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for is_on in (True, False):
            transformers_traps.set_checkpointing(module, is_on)
            layers = module.get_decoder().layers
            assert [layer.gradient_checkpointing for layer in layers] == [is_on] * len(layers)


def test_adapters_are_put_in_without_a_warning(load):
    module = load("E2B").hf[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        add_adapters(module, find_linears(module, ["q_proj"]), rank=2, alpha=2, qat=True)
    assert adapters(module)
