"""What the engines do to take less memory, against what they would answer without it; and what they say they hold."""

import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines import transformers_stream

PROMPT = "the sky is blue and the system was the model user " * 2  # the window of the tiny models is 8 tokens


def answer(model, monkeypatch, chunk):
    """Return the reply to a long prompt that is read in chunks, and the lengths of what the network was given."""
    monkeypatch.setattr(transformers_stream, "PREFILL_CHUNK", chunk)
    lengths = []
    hook = model.hf[0].register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    reply = model.generate(PROMPT, max_new_tokens=24, temperature=0)
    hook.remove()
    return reply, lengths


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_prompt_read_in_chunks_is_answered_like_the_whole(tiny, monkeypatch, size):
    with gqk.load(tiny(size, "bf16")) as model:
        model.hf[0].float()  # in bf16 random weights give ties, which a chunk may break the other way
        whole, lengths = answer(model, monkeypatch, 4096)
        assert lengths[0] == whole.prompt_tokens > 24
        for chunk in (5, 8, 16):
            reply, lengths = answer(model, monkeypatch, chunk)
            assert (reply.text, reply.new_tokens) == (whole.text, whole.new_tokens)
            assert max(lengths) == chunk
            assert sum(lengths) == whole.prompt_tokens + whole.new_tokens - 1


def test_the_built_in_network_reads_in_chunks_too(monkeypatch):
    with gqk.load("smollm2-135m", "float32") as model:
        whole, chunked = (answer(model, monkeypatch, chunk)[0] for chunk in (4096, 7))
    assert chunked.text == whole.text
