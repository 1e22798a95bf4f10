"""Between two turns only what is new is read: llama.cpp's own count says so, also with a window and with thoughts."""

import pytest

import gemma_qat_kit as gqk

TURNS = ("Why is the sky blue?", "And at night?", "Thanks. What is gravity?")


def turns(model, questions, **settings):
    """Chat, and yield each reply with the one before it."""
    conversation, last = [], None
    for question in questions:
        conversation.append({"role": "user", "content": question})
        reply = model.chat(conversation, max_new_tokens=24, temperature=0, **settings)
        if last is not None:
            yield last, reply
        conversation.append(reply.message)
        last = reply


def test_a_turn_reads_only_the_new_tokens():
    with gqk.load("smollm2-135m", context_length=1024) as model:
        replies = list(turns(model, TURNS))
    for before, after in replies:
        known = before.prompt_tokens + before.new_tokens
        assert known - 2 <= after.cached_prompt_tokens <= known  # the last token was drawn and not yet computed with
        assert after.cached_prompt_tokens < after.prompt_tokens


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("kv_format", ["bf16", "q8_0"])
def test_gemma_keeps_the_prompt_beyond_its_window_and_without_its_thoughts(tiny, thinking, kv_format):
    """The tiny E2B's window is 8 tokens and its cache of it 768: the second prompt is longer than that.

    What a random model says is not split into the same tokens again, so only the prompt is surely known.
    """
    questions = ("the sky", "the sky is blue " * 160, "the sun", "the sea")
    with gqk.load(tiny("E2B", "q4_0"), context_length=4096, kv_format=kv_format) as model:
        replies = list(turns(model, questions, thinking=thinking))
    assert replies[0][1].prompt_tokens > 768
    assert all(after.cached_prompt_tokens >= before.prompt_tokens for before, after in replies)


def test_a_class_with_more_chats_than_places_has_no_conversation_read_again():
    topics = ("gravity", "a whale", "bread", "a comet")
    with gqk.serve("smollm2-135m", num_chats=2, context_length=1024, report=lambda progress: None) as served:
        model = gqk.load(served.address, token=served.key)
        talks = [[{"role": "user", "content": f"{topic}, " * 40 + "what is it?"}] for topic in topics]
        firsts = [model.chat(talk, max_new_tokens=24, temperature=0) for talk in talks]
        for talk, first in zip(talks, firsts, strict=True):
            talk += [first.message, {"role": "user", "content": "Say more."}]
        seconds = [model.chat(talk, max_new_tokens=1, temperature=0) for talk in talks]
    for first, second in zip(firsts, seconds, strict=True):
        assert second.cached_prompt_tokens >= first.prompt_tokens


def test_where_nobody_counts_it_is_not_known(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        assert model.chat("sky", max_new_tokens=1).cached_prompt_tokens is None
