"""The built-in model as a torch network: its file's numbers, its tokenizer's words, and llama.cpp's answers."""

import contextlib
import io
import shutil
from dataclasses import replace

import pytest
import torch
from built_in_network import loaded

import gemma_qat_kit as gqk
from gemma_qat_kit.engines import transformers_gguf
from gemma_qat_kit.engines.llama_cpp_scores import Scores
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, CancelledError, ModelClosedError
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.comparison import compare

QUESTION = "Name three colors."


@pytest.fixture(scope="module")
def scores(built_in):
    scores = Scores(built_in)
    yield scores
    scores.close()


def quiet(progress):
    pass


def test_it_is_a_plain_float32_network_that_can_be_trained():
    model = loaded()
    module, tokenizer = model.hf
    assert (model.name, model.engine) == ("smollm2-135m float32", "transformers")
    assert type(module).__name__ == "LlamaForCausalLM"
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in module.parameters()) == 134_515_008  # as the hub counts them
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert getattr(module.config, "quantization_config", None) is None
    assert not module.training
    assert tokenizer.eos_token == "<|im_end|>"


def test_its_weights_are_those_that_transformers_reads_from_the_file(built_in):
    from transformers import LlamaForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        expected = LlamaForCausalLM.from_pretrained(built_in.parent, gguf_file=built_in.name, dtype=torch.float32)
    module, ids = loaded().hf[0], torch.tensor([[504, 3575, 282]])
    state = module.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(module(ids).logits, expected(ids).logits)


TEXTS = (
    "The capital of France is 1,234.5 km away.",
    "don't I'LL é ü 日本 🙂 ²³½ Ⅷ\u00a0a",
    "x  12\n    4\n\n\n  y\t\t7\r\n",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "\0a",
)


@pytest.mark.parametrize("text", TEXTS)
def test_words_get_the_ids_that_llama_cpp_gives_them(scores, text):
    assert loaded().runner.tokenize(text) == scores.tokenize(text)


@pytest.mark.parametrize("name", texts.built_in_names())
def test_whole_texts_get_the_ids_that_llama_cpp_gives_them(scores, name):
    text = texts.read(name).content
    assert loaded().runner.tokenize(text) == scores.tokenize(text)


def test_it_chats_with_the_template_of_the_file_and_stops_by_itself():
    reply = loaded().chat(QUESTION, temperature=0, max_new_tokens=40)
    assert (reply.text, reply.finish_reason) == ("1. Red\n2. Blue\n3. Green", "stop")  # as llama.cpp, in test_llama_cpp


def test_llama_cpp_says_of_the_file_what_the_network_says():
    # llama.cpp rounds each activation to 8 bits, about 1/250 of the largest of 32. The network's own answer changes by
    # as much when its inputs are rounded so, so agreement is close and not exact.
    with gqk.load("smollm2-135m", report=quiet) as model:
        found = compare(model, loaded(), max_tokens=512, report=quiet)
    assert found.kl_divergence < 0.01
    assert found.kl_divergence_p99 < 0.05
    assert found.top1_agreement > 0.93
    assert found.perplexity_ratio == pytest.approx(1, abs=0.01)


def test_progress_is_told_and_can_stop_the_load():
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 3:
            raise CancelledError("Stopped.", "", "")

    with pytest.raises(CancelledError):
        gqk.load("smollm2-135m", "float32", report=stop)
    assert [progress.stage for progress in seen] == ["loading"] * 3
    assert seen[0].total_bytes == pytest.approx(98_362_432, rel=0.03)


def test_it_loads_in_silence_where_somebody_listens_and_closed_it_scores_no_more():
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        model = gqk.load("smollm2-135m", "float32", report=quiet)
    model.close()
    assert output.getvalue() == ""
    for call in (lambda: model.runner.logits([1]), lambda: model.runner.tokenize("a")):
        with pytest.raises(ModelClosedError):
            call()


def test_a_copy_of_the_file_loads_by_its_path_and_a_damaged_one_says_so(built_in, tmp_path):
    data = bytearray(built_in.read_bytes())
    place = data.index(b"blk.7.attn_q.weight")
    data[place : place + 3] = b"blx"
    path = tmp_path / "renamed.gguf"
    path.write_bytes(data)
    with pytest.raises(BrokenCheckpointError, match=r"cannot be read as a float32 network: .*llama\.cpp runs it"):
        gqk.load(path, "float32", report=quiet)
    shutil.copy(built_in, path)
    with gqk.load(path, "float32", report=quiet) as model:
        assert (model.size, model.format, model.engine) == ("smollm2-135m", "float32", "transformers")


def test_a_missing_tensor_is_named(monkeypatch):
    def read(path):
        header = read_gguf_header(path)
        return replace(header, tensors=tuple(t for t in header.tensors if t.name != "blk.7.attn_q.weight"))

    monkeypatch.setattr(transformers_gguf, "read_gguf_header", read)
    with pytest.raises(BrokenCheckpointError) as caught:
        gqk.load("smollm2-135m", "float32", report=quiet)
    assert "1 tensors are missing, the first is model.layers.7.self_attn.q_proj.weight" in caught.value.wrong


def test_gemmas_files_stay_with_llama_cpp(tiny):
    with pytest.raises(BadSettingError, match="holds q4_0, not float32"):
        gqk.load(tiny("E2B", "q4_0"), "float32", report=quiet)


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(BadSettingError, match="1 to 8,192 tokens"):
        gqk.load("smollm2-135m", "float32", context_length=9000, report=quiet)
