"""Answers with an MTP drafter: the same words, how many drafts were accepted, and when it is switched off."""

import shutil

import pytest
from fake_server import FakeServer, event
from repeating import write_repeating

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines import transformers_traps
from gemma_qat_kit.engines.drafting import MIN_TOKENS, Drafting, pays
from gemma_qat_kit.engines.llama_cpp_buffers import buffer_parts
from gemma_qat_kit.errors import MissingLibraryError
from gemma_qat_kit.generation import Delta, Finish, Stream
from gemma_qat_kit.memory.parts import ACTIVATIONS, DRAFTER, TEXT_LAYERS, Part

GREEDY = {"temperature": 0}
MIB = 2**20


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A model that repeats its last word, whose drafter knows it: a folder, and its GGUF beside the same drafter."""
    folder = write_repeating(tmp_path_factory.mktemp("repeating") / "E2B", "E2B")
    gqk.export_gguf(folder, folder.parent / "model.gguf", "q8_0", report=lambda progress: None)
    (folder.parent / "drafter").symlink_to(folder / "drafter")
    return {"transformers": folder, "llama_cpp": folder.parent / "model.gguf"}


RUNS = [(size, format) for size in GEMMA_SIZES for format in ("bf16", "q4_0")] + [("E2B", "mobile")]


@pytest.mark.parametrize(("size", "format"), RUNS)
def test_a_drafter_changes_the_speed_and_not_the_answer(tiny, tmp_path, monkeypatch, size, format):
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    source, engine = tiny(size, format), "transformers" if format == "bf16" else "llama_cpp"
    model = tmp_path / source.name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, model)
    shutil.copytree(tiny(size, "drafter"), (model if source.is_dir() else tmp_path) / "drafter")
    if engine == "transformers" and not _can_draft():
        with pytest.raises(MissingLibraryError, match="cannot generate with MTP drafters"):
            gqk.load(model, drafter=True)
        return
    with gqk.load(model, drafter=True, context_length=256) as drafted, gqk.load(model, context_length=256) as alone:
        if engine == "transformers":
            for part in (drafted.runner.model, drafted.runner.drafter, alone.runner.model):
                part.float()  # random weights in bf16 give ties, which a batch of drafts may break the other way
        replies = [model.generate("the sky", max_new_tokens=24, **GREEDY) for model in (drafted, alone)]
        assert drafted.memory().parts[DRAFTER] > 0
    assert replies[0].text == replies[1].text
    assert replies[0].drafted_tokens > 20
    assert replies[0].accepted_tokens <= replies[0].drafted_tokens
    assert (replies[1].drafted_tokens, replies[1].accepted_tokens, replies[1].acceptance_rate) == (None, None, None)


def _can_draft():
    try:
        transformers_traps.check_release(drafter=True)
    except MissingLibraryError:
        return False
    return True


def test_a_drafter_reads_keys_and_values_in_eight_bits(repeating):
    with gqk.load(repeating["llama_cpp"], drafter=True, context_length=256, kv_format="q8_0") as model:
        reply = model.generate("the sky", max_new_tokens=9, **GREEDY)
    assert (reply.text, reply.acceptance_rate) == ("sky" * 9, 1)


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_what_a_drafter_foresees_is_accepted_and_counted_while_it_comes(repeating, engine):
    with gqk.load(repeating[engine], drafter=True, context_length=256) as model:
        assert model.engine == engine
        stream, seen = _raw_stream(model), []
        for _ in stream:
            seen.append((stream.reply.drafted_tokens or 0, stream.reply.accepted_tokens or 0))
        reply = stream.reply
        assert reply.text == "sky" * 41
        assert reply.acceptance_rate == 1
        # The first token is the prompt's; each round gives three drafts and the model's own next one.
        assert (reply.new_tokens, reply.drafted_tokens) == (41, 30)
        assert seen == sorted(seen)
        assert (30, 30) in seen
        assert any(0 < drafted < 30 for drafted, _ in seen) or engine == "transformers"  # a thread ahead of the reader
        assert "The drafter" in model.drafter_note
        assert model.runner.drafting.drafted_speed > 0


def _raw_stream(model):
    settings = model._settings(False, 41, 0, None, None, None)
    return Stream(model.runner.stream("the sky", settings))


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_a_drafter_that_does_not_pay_is_switched_off_and_the_answers_stay(repeating, engine):
    with gqk.load(repeating[engine], drafter=True, context_length=256) as model:
        drafting = model.runner.drafting
        drafting.plain_speed = 1e9  # whatever is measured now, it was faster without
        first = model.generate("the sky", max_new_tokens=41, **GREEDY)
        assert first.drafted_tokens == 30
        assert not drafting.is_on
        assert "is switched off" in model.drafter_note
        second = model.generate("the sky", max_new_tokens=41, **GREEDY)
        assert (second.text, second.drafted_tokens) == (first.text, None)
        note = model.drafter_note
        assert model.generate("the sky", max_new_tokens=41, **GREEDY).text == first.text
        assert model.drafter_note == note
        if engine == "llama_cpp":
            assert DRAFTER not in model.memory().parts  # its process is a new one


def test_llama_cpp_starts_again_only_when_nobody_is_answered(repeating):
    with gqk.load(repeating["llama_cpp"], drafter=True, context_length=256) as model:
        before = model.runner._child
        under_way = iter(_raw_stream(model))
        next(under_way)
        model.runner.drafting.is_on, model.runner.drafting.plain_speed = False, 1e9
        model.generate("the", max_new_tokens=2, **GREEDY)
        assert model.runner._child is before
        assert "".join(under_way).endswith("sky")
        model.generate("the", max_new_tokens=2, **GREEDY)
        assert model.runner._child is not before


def test_a_seed_gives_the_same_words_whatever_the_trial_says(repeating):
    with gqk.load(repeating["transformers"], drafter=True, context_length=256) as model:
        seeded = model.generate("the sky", max_new_tokens=8, temperature=1.0, seed=3)
        assert seeded.drafted_tokens is None
        model.runner.drafting.is_on = False
        assert model.generate("the sky", max_new_tokens=8, temperature=1.0, seed=3).text == seeded.text


def test_the_drafter_stays_where_it_is_faster_and_goes_where_it_is_not():
    assert pays(10.1, 10)
    assert not pays(10, 10)
    trial = Drafting(plain_speed=10)
    trial.record(MIN_TOKENS - 1, 1)
    assert (trial.is_on, trial.drafted_speed) == (True, None)
    assert "32 tokens" in trial.note
    trial.record(1, 3)  # 32 tokens in 4 seconds
    assert (trial.is_on, trial.drafted_speed) == (False, 8)
    assert trial.note == (
        "The drafter is switched off, it does not pay: 8 tokens/s with it, 10 without, measured here on the first "
        "answers."
    )
    trial.record(1000, 1)  # decided once
    assert not trial.is_on
    quick = Drafting(plain_speed=10)
    quick.record(0, 1), quick.record(5, 0)  # nothing was timed
    quick.record(64, 2)
    assert quick.is_on
    assert quick.note == "The drafter stays on: 32 tokens/s with it, 10 without, measured here on the first answers."


def test_a_servers_drafts_are_read_and_its_nonsense_is_not():
    told = [event({"content": "a"}, timings={"draft_n": 6, "draft_n_accepted": 3}), event({}, "stop")]
    for pieces, expected in (
        (told, (6, 3, 0.5)),
        ([event({"content": "a"}, "stop", timings={"draft_n": "6", "draft_n_accepted": 3})], (None, None, None)),
        ([event({"content": "a"}, "stop", timings=[6])], (None, None, None)),
        ([event({"content": "a"}, "stop", timings={"predicted_n": 3})], (None, None, None)),
    ):
        with FakeServer([*pieces, b"data: [DONE]\n\n"]) as server:
            reply = gqk.load(server.url).chat("Why?")
        assert (reply.drafted_tokens, reply.accepted_tokens, reply.acceptance_rate) == expected


def test_a_stream_says_what_was_drafted_so_far():
    class Source:
        drafts = (None, None)

        def __iter__(self):
            self.drafts = (3, 1)
            yield Delta("a")
            yield Finish("stop", 1, 1, drafted_tokens=6, accepted_tokens=2)

    stream = Stream(Source())
    assert stream.reply.drafted_tokens is None
    next(stream)
    assert (stream.reply.drafted_tokens, stream.reply.accepted_tokens) == (3, 1)
    list(stream)
    assert (stream.reply.drafted_tokens, stream.reply.acceptance_rate) == (6, 2 / 6)


def test_a_drafters_buffers_are_told_from_the_models():
    log = """
load_tensors:   CPU_Mapped model buffer size =   100.00 MiB
sched_reserve:        CPU compute buffer size =    30.00 MiB
common_speculative_init_result: loading draft model 'drafter.gguf'
load_tensors:   CPU_Mapped model buffer size =     5.00 MiB
sched_reserve:        CPU compute buffer size =     2.00 MiB
sched_reserve:        CPU compute buffer size =     3.00 MiB
"""
    assert set(buffer_parts(log)) == {
        Part(TEXT_LAYERS, 100 * MIB, "mapped"),
        Part(ACTIVATIONS, 30 * MIB, "ram"),
        Part(DRAFTER, 5 * MIB, "mapped"),
        Part(DRAFTER, 3 * MIB, "ram"),
    }
