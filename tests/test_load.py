"""`load` on every published layout: the logits must be those of plain transformers on the dequantized weights."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES
from gemma_qat_kit.engines import transformers_traps
from gemma_qat_kit.formats import mobile, w4a16
from gemma_qat_kit.gguf.metadata import Vocabulary, gemma_metadata
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import Tensor, bf16_tensors, gguf_name, is_text, mobile_bits

W4A16_SIZES = ("E2B", "E4B", "12B", "31B")
IDS = [2, 105, 93, 107, 80, 4, 110, 4, 83, 4, 112, 309, 283, 106, 107, 20, 30, 40]
# In nats, where activations are rounded to 8 bits on the way through 12 to 20 random layers; a mixture of experts may
# then choose another one. Two random models of these shapes are 0.65 to 0.73 apart.
LARGEST_DIVERGENCE = dict.fromkeys(GEMMA_SIZES, 0.2) | {"26B-A4B": 0.4}
LAYOUTS = [
    *((size, format) for size in GEMMA_SIZES for format in ("bf16", "q4_0-unquantized", "int8", "nf4")),
    *((size, "w4a16") for size in W4A16_SIZES),
    *((size, "mobile") for size in MOBILE_SIZES),
]


def dequantized(folder, size, format):
    """Return the bf16 text weights that a checkpoint stands for, and the static activation scales by module."""
    state = {name: t for name, t in load_file(folder / "model.safetensors").items() if is_text(name)}
    config = testing.tiny_config(size, format) if format in ("mobile", "w4a16") else None
    weights, activations = {}, {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if format == "mobile" and tensor.dtype in (torch.uint8, torch.int8):
            codes = mobile.unpack(tensor, mobile_bits(config, module))
            scale = state[module + (".weight_scale" if last == "weight" else ".embedding_scale")]
            weights[module + ".weight"] = multiply_in_bf16(codes, scale)
            activations[module] = [state.get(f"{module}.{side}_activation_scale") for side in ("input", "output")]
        elif last == "weight_packed":
            weights[module + ".weight"] = w4a16.dequantize(w4a16.unpack(tensor), state[module + ".weight_scale"])
        elif "_scale" not in last or last == "per_expert_scale":
            weights[name] = tensor
    return weights, activations


def multiply_in_bf16(codes, scale):
    """Dequantize as transformers does: codes and scales are both bf16 when they meet."""
    groups = codes.to(torch.bfloat16).unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.to(torch.bfloat16)[..., None]).flatten(-2)


def plain_logits(size, weights, activations, dtype=torch.bfloat16):
    """Return the logits of a plain transformers model with these weights, its linears rounding as told."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = testing.tiny_config(size)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    config.vision_config = config.audio_config = None
    if "lm_head.weight" in weights:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    with transformers_traps.repaired():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    present = dict(model.named_modules())
    for name, (before, after) in activations.items():
        module = present.get(name)  # keys and values of layers that share another's are stored and not used
        if module is None:
            continue
        if before is not None:
            module.register_forward_pre_hook(lambda _, inputs, scale=before: round_static(inputs[0], scale))
            module.register_forward_hook(lambda _, inputs, output, scale=after: round_static(output, scale))
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float()


def round_static(x, scale):
    scale = scale.to(x.dtype)
    return x if scale == 0 else torch.clamp(torch.round(x / scale), -128, 127) * scale


@pytest.mark.parametrize(("size", "format"), [row for row in LAYOUTS if row[1] not in ("int8", "nf4")])
def test_logits_equal_plain_transformers_bit_for_bit(tiny, size, format):
    # Same products in the same bf16 arithmetic, so nothing may differ.
    folder = tiny(size, format)
    with gqk.load(folder, engine="transformers") as model, torch.inference_mode():
        assert model.format == format
        logits = model.hf[0](torch.tensor([IDS])).logits[0].float()
    assert torch.equal(logits, plain_logits(size, *dequantized(folder, size, format)))
    assert logits.std() > 0.3  # lively enough for a wrong tensor to show


@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_a_mobile_checkpoint_lies_in_memory_as_it_lies_in_its_file(tiny, size):
    folder = tiny(size, "mobile")
    stored = load_file(folder / "model.safetensors")
    with gqk.load(folder, engine="transformers", report=lambda progress: None) as model:
        loaded = {name: tensor for name, tensor in model.hf[0].state_dict().items() if name in stored}
        kept = [name for name, tensor in loaded.items() if "scale" in name or not tensor.is_floating_point()]
        changed = [name for name in kept if not torch.equal(loaded[name], stored[name])]
    assert len(kept) > 200
    assert changed == []


@pytest.mark.parametrize("size", GEMMA_SIZES)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_bitsandbytes_formats_compute_with_their_own_dequantized_weights(tiny, size, format):
    # bitsandbytes' CPU kernels sum in another order (nf4) and round the activations to 8 bits too (int8), hence a
    # tolerance; where experts are chosen, rounding may choose another one.
    with gqk.load(tiny(size, format), format) as model, torch.inference_mode():
        weights = bitsandbytes_weights(model.hf[0])  # before the first forward, which repacks them on some CPUs
        logits = model.hf[0](torch.tensor([IDS])).logits[0].float()
    expected = plain_logits(size, weights, {})
    assert kl_divergence(expected[-1].log_softmax(-1), logits[-1].log_softmax(-1)) < LARGEST_DIVERGENCE[size]


def bitsandbytes_weights(model):
    """Return the weights of a model, those of bitsandbytes' linears dequantized by bitsandbytes."""
    from bitsandbytes import functional

    weights = {name: value for name, value in model.state_dict().items() if value.dtype == torch.bfloat16}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            weights[name + ".weight"] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            weights[name + ".weight"] = module.weight.data.float() * module.weight.SCB.float()[:, None] / 127
    return weights


def log_probs(model):
    """Return llama.cpp's log-probabilities of all 512 words after `IDS`."""
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 512, "temperature": 0, "cache_prompt": False}
    connection = model.runner._connect()
    answer = json.loads(model.runner._request(connection, "POST", "/v1/completions", json.dumps(body)).read())
    if answer["choices"][0]["logprobs"] is None:  # the likeliest word ends the answer, and nothing is told of it
        return model.runner.logits(IDS)[-1].log_softmax(-1)
    values = np.full(512, -np.inf)
    for word in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        values[word["id"]] = word["logprob"]
    return torch.tensor(values, dtype=torch.float32)


def gguf_values(path):
    """Return every tensor of a GGUF, dequantized to float32 by gguf."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in tensors}


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_gguf_computes_what_transformers_computes(tiny, tmp_path, size):
    """The values of the Q4_0 file, once as they are and once written as float32, against transformers in float32."""
    path = tiny(size, "q4_0")
    values = gguf_values(path)
    weights = {t.name: torch.from_numpy(values[gguf_name(t.name)].copy())
               for t in bf16_tensors(testing.tiny_config(size), has_shared_kv=False) if is_text(t.name)}  # fmt: skip
    expected = plain_logits(size, weights, {}, torch.float32)[-1].log_softmax(-1)
    # In float32 only llama.cpp's float16 keys and values differ.
    with gqk.load(write_float32(tmp_path / "float32.gguf", size, values)) as model:
        assert kl_divergence(expected, log_probs(model)) < 0.001
    # In Q4_0 llama.cpp also rounds each activation to 8 bits.
    with gqk.load(path) as model:
        assert (model.format, model.engine) == ("q4_0", "llama_cpp")
        assert kl_divergence(expected, log_probs(model)) < LARGEST_DIVERGENCE[size]


def kl_divergence(expected, found):
    return (expected.exp() * (expected - found)).sum()


def write_float32(path, size, values):
    vocabulary = Vocabulary.from_tokenizer_json(json.loads(testing.tiny_tokenizer().to_str()), testing.CHAT_TEMPLATE)
    tensors = [(Tensor(name, "F32", value.shape), lambda value=value: [value]) for name, value in values.items()]
    write_gguf(path, gemma_metadata(testing.tiny_config(size), vocabulary), tensors)
    return path
