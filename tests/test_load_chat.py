"""`load` on every published layout: one face whatever runs it: chat, drafters, thoughts, stops."""

import sys
import threading

import pytest
import torch

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines.transformers_stream import ThoughtSplitter
from gemma_qat_kit.errors import CancelledError
from gemma_qat_kit.generation import STOP_IDS
from gemma_qat_kit.hub.cache import cache_folder
from gemma_qat_kit.layouts import bf16_tensors, is_text

CHATTING = [
    *((size, format) for size in GEMMA_SIZES for format in ("bf16", "q4_0")),
    *(("E2B", format) for format in ("q4_0-unquantized", "w4a16", "mobile", "nf4", "int8")),
    ("E4B", "mobile"),
]


@pytest.mark.parametrize(("size", "format"), CHATTING)
def test_every_layout_chats(tiny, size, format):
    asked = format if format in ("nf4", "int8") else None
    engine = "transformers" if format == "mobile" else None  # in llama.cpp: test_mobile_gguf.py
    with gqk.load(tiny(size, format), asked, engine=engine, context_length=256) as model:
        pieces = list(model.stream("the sky", max_new_tokens=4, temperature=0))
        reply = model.chat([{"role": "user", "content": "the sky"}], max_new_tokens=4, temperature=0)
        assert reply.text == "".join(pieces)
        assert 0 < reply.new_tokens <= 4
        assert reply.prompt_tokens > 5
        assert model.memory().total_bytes > 0
        assert model.format == format
        assert model.sampling == gqk.catalog(size=size)[0].sampling


def test_text_only_builds_no_tower_and_all_of_it_can_be_had(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        assert not any("tower" in name or "embed_vision" in name for name, _ in model.hf[0].named_parameters())
        assert model.hf[1].convert_tokens_to_ids("<|turn>") == 105
        held = {t.data_ptr(): t.nbytes for t in model.hf[0].state_dict().values()}
    expected = sum(t.nbytes for t in bf16_tensors(testing.tiny_config("E2B"), has_shared_kv=False) if is_text(t.name))
    assert sum(held.values()) == expected
    with gqk.load(tiny("E2B", "bf16"), text_only=False) as model:
        assert any("vision_tower" in name for name, _ in model.runner.model.named_parameters())


def test_size_and_repository_load_through_the_hub(tiny, hub):
    folder = tiny("E2B", "mobile")
    repo_id = "google/gemma-4-E2B-it-qat-mobile-transformers"
    hub.commit(repo_id, {file.name: file.read_bytes() for file in folder.iterdir()})
    with gqk.load("E2B", "mobile", engine="transformers") as model:
        assert (model.name, model.engine) == ("E2B mobile", "transformers")
    with gqk.load(repo_id) as model:
        assert (model.name, model.engine) == ("E2B mobile", "llama_cpp")
        assert model.runner.path.parent == cache_folder() / f"models--{repo_id.replace('/', '--')}" / "reblocked"


def test_built_in_model_answers_sensibly():
    with gqk.load("smollm2-135m") as model:
        assert model.name == "smollm2-135m q4_1"
        assert "Rayleigh scattering" in model.chat("Why is the sky blue?", max_new_tokens=60, temperature=0).text


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


def test_stop_ends_an_answer_while_a_token_is_still_computed_and_the_next_one_is_whole(tiny):
    with gqk.load(tiny("E2B", "bf16"), context_length=256) as model:
        whole = model.chat("the sky", max_new_tokens=4, temperature=0).text
        holding = threading.Event()
        model.runner.model.register_forward_pre_hook(lambda *_: (holding.wait(30), None)[1])
        stream = model.stream("the sky", max_new_tokens=4, temperature=0)
        stream.cancel()
        assert list(stream) == []
        assert stream.reply.finish_reason == "cancelled"
        assert not holding.is_set(), "the token is still being computed"
        holding.set()
        assert model.chat("the sky", max_new_tokens=4, temperature=0).text == whole


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_both_engines_count_the_tokens_that_they_then_read(tiny, size):
    for format in ("bf16", "q4_0"):
        with gqk.load(tiny(size, format), context_length=256) as model:
            count = model.num_tokens("the sky")
            assert model.chat("the sky", max_new_tokens=1).prompt_tokens == count
            assert model.num_tokens("the sky", thinking=True) > count


@pytest.mark.parametrize(
    ("devices", "asked", "expected"),
    [((), "auto", "cpu"), (("CUDA0",), "auto", "cuda"), (("CUDA0",), "cpu", "cpu"), (None, "auto", "cpu")],
)
def test_a_mobile_checkpoint_is_reblocked_for_what_llama_cpp_computes_on(tiny, monkeypatch, devices, asked, expected):
    seen = []

    def stop(folder, report, *, device):
        seen.append(device)
        raise CancelledError("Stopped.", "", "")

    monkeypatch.setattr(sys.modules["gemma_qat_kit.load"], "read_llama_cpp_devices", lambda: devices)
    monkeypatch.setattr("gemma_qat_kit.engines.mobile_gguf.mobile_gguf", stop)
    with pytest.raises(CancelledError):
        gqk.load(tiny("E2B", "mobile"), device=asked)
    assert seen == [expected]
