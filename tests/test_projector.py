"""Images and sound in llama.cpp: a real server with a projector beside a tiny GGUF, against transformers."""

import dataclasses
import io
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from test_attachments import audio, image, recording
from test_media import encoded, tone
from tiny_projector import write_projector

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.catalog import BUILT_IN_SIZE, find_checkpoint
from gemma_qat_kit.engines.openai_form import openai_messages
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.hub.cache import cache_folder
from gemma_qat_kit.memory.plan import plan_memory

WORDS = {"type": "text", "text": "the sky"}
PATCH, POOLED = 16, 3
LOW, LOWER = tone(16000, hertz=500, seconds=1), tone(16000, hertz=200, seconds=2)


def picture(seed=None, tokens=(7, 10)):
    """A PNG that neither engine resizes, as many tokens high and wide: red, or noise."""
    shape = *(count * POOLED * PATCH for count in tokens), 3
    rows = np.full(shape, (255, 0, 0)) if seed is None else np.random.default_rng(seed).integers(0, 255, shape)
    file = io.BytesIO()
    Image.fromarray(rows.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def noise():
    """A recording of one second, in which every frequency is."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, 16000, 0, "NONE", ""))
        wav.writeframes(np.random.default_rng(1).integers(-9830, 9830, 16000).astype("<i2").tobytes())
    return file.getvalue()


def asking(*pictures):
    return [{"role": "user", "content": [*map(image, pictures), WORDS]}]


def asking_of(recorded):
    return [{"role": "user", "content": [WORDS, audio(recorded)]}]


@pytest.fixture(scope="module")
def gguf(tiny, tmp_path_factory):
    """A tiny q4_0 with a projector beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    write_projector(folder / "tiny-mmproj.gguf")
    path = folder / "tiny.gguf"
    path.symlink_to(tiny("E2B", "q4_0"))
    return path


@pytest.fixture(scope="module")
def seeing(gguf):
    with gqk.load(gguf, text_only=False, context_length=512) as model:
        yield model


def test_a_picture_is_read_and_another_is_answered_otherwise(seeing):
    assert seeing.takes == ("image",)  # the file holds nothing that hears
    replies = [seeing.chat(asking(data), max_new_tokens=4, temperature=0) for data in map(picture, (None, 0, None))]
    assert replies[0].text == replies[2].text != replies[1].text
    added = replies[0].prompt_tokens - seeing.chat("the sky", max_new_tokens=1).prompt_tokens
    assert added == 7 * 10 + 2  # with the marks of its start and end
    assert seeing.num_tokens(asking(picture())) == replies[0].prompt_tokens


def test_a_large_picture_takes_as_many_tokens_as_in_transformers(seeing):
    assert 200 < seeing.num_tokens(asking(picture(tokens=(20, 20)))) - seeing.num_tokens("the sky") <= 280 + 2


def test_sound_is_refused_by_a_projector_that_does_not_hear(seeing):
    with pytest.raises(BadSettingError, match=r"takes no audio.* takes text and image\."):
        seeing.num_tokens([{"role": "user", "content": [audio(recording()), WORDS]}])


def test_the_projectors_memory_is_measured_as_vision(seeing, gguf):
    weights = sum(tensor.nbytes for tensor in read_gguf_header(gguf.with_name("tiny-mmproj.gguf")).tensors)
    assert seeing.memory().parts["vision"] >= weights


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A tiny E2B whose text is in float32, so that rounding hides nothing, with a projector that sees and hears."""
    folder, all_of = tmp_path_factory.mktemp("exact"), testing.gguf_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "gguf_tensors", lambda c: [dataclasses.replace(t, dtype="F32") for t in all_of(c)])
        path = testing.write_tiny_checkpoint(folder, "E2B", "q4_0")
    write_projector(folder / "mmproj.gguf", hears=True)
    return path


@pytest.mark.parametrize(
    ("asked", "margin"),
    [
        ([asking(picture(seed)) for seed in (None, 0, 1)], 0.05),
        ([asking_of(recorded) for recorded in (LOW, LOWER, noise())], 0.01),
    ],
    ids=["sees", "hears"],
)
def test_llama_cpp_takes_in_what_transformers_does(exact, tiny, asked, margin):
    """Of every picture and sound, what the two say next is most alike, and its prompt has as many tokens."""
    with gqk.load(exact, text_only=False, context_length=256) as model:
        assert model.takes == ("image", "audio")
        ours, counts = [next_words(model, each) for each in asked], list(map(model.num_tokens, asked))
    with gqk.load(tiny("E2B", "bf16"), text_only=False, context_length=256) as model, torch.no_grad():
        assert list(map(model.num_tokens, asked)) == counts
        theirs = [model.runner.model(**encoded(model, each)).logits[0, -1].float() for each in asked]
        theirs = [torch.log_softmax(logits, 0).numpy() for logits in theirs]
    alike = np.corrcoef(ours, theirs)[:3, 3:]
    others = alike[~np.eye(3, dtype=bool)]
    assert alike.diagonal().min() > max(0.7, others.max() + margin)


def test_a_sound_is_heard_and_another_is_answered_otherwise(exact):
    with gqk.load(exact, text_only=False, context_length=256) as model:
        heard = map(asking_of, (LOW, noise(), LOW))
        replies = [model.chat(asked, max_new_tokens=4, temperature=0) for asked in heard]
        assert replies[0].text == replies[2].text != replies[1].text
        added = replies[0].prompt_tokens - model.chat("the sky", max_new_tokens=1).prompt_tokens
        assert added == 25 + 2  # a token for 40 ms, with the marks of its start and end
        parts = model.memory().parts
        sizes = {t.name: t.nbytes for t in read_gguf_header(exact.with_name("mmproj.gguf")).tensors}
        assert parts["audio"] == sum(size for name, size in sizes.items() if name.startswith(("a.", "mm.a.")))


def next_words(model, conversation):
    """The log probability of every word as the next one; "a" is taken, because a half letter would not be told."""
    asked = {"messages": openai_messages(model._messages(conversation)), "max_tokens": 1, "logprobs": True,
             "top_logprobs": 512, "logit_bias": [["a", 100]]}  # fmt: skip
    told = model.runner._post("/v1/chat/completions", asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = {word["id"]: word["logprob"] for word in told}
    return np.array([values[index] for index in range(512)])


def test_text_only_leaves_the_projector_alone(gguf):
    with gqk.load(gguf, context_length=256) as model:
        assert model.takes == ()
        assert "vision" not in model.memory().parts


def test_a_projector_goes_with_a_drafter(gguf, tiny):
    drafter = gguf.with_name("drafter")
    drafter.symlink_to(tiny("E2B", "drafter"))
    with gqk.load(gguf, text_only=False, drafter=True, context_length=256) as model:
        assert model.chat(asking(picture()), max_new_tokens=4, temperature=0).drafted_tokens > 0
        model.runner.drafting.is_on = False
        assert model.chat("the sky", max_new_tokens=2).new_tokens == 2  # the server started again
        assert model.takes == ("image",)


def test_a_size_is_downloaded_with_its_projector(tiny, gguf, hub):
    row = find_checkpoint("E2B", "q4_0")
    names = {file.kind: file.name for file in row.files}
    files = {names["weights"]: gguf.read_bytes(), names["projector"]: gguf.with_name("tiny-mmproj.gguf").read_bytes()}
    hub.commit(row.repo_id, files)
    with gqk.load("E2B", text_only=False) as model:
        assert (model.name, model.takes) == ("E2B q4_0", ("image",))
    assert list(cache_folder().rglob(names["projector"]))


@pytest.mark.parametrize("source", [(BUILT_IN_SIZE,), ("E2B", "mobile")])
def test_what_has_no_projector_is_refused_before_the_download(source):
    with pytest.raises(BadSettingError, match=r"has no projector.*q4_0 of every Gemma 4.*engine=\"transformers\"\."):
        gqk.load(*source, text_only=False)


def test_a_projector_that_cannot_be_used_is_refused(tiny, tmp_path):
    path = tmp_path / "model.gguf"
    path.symlink_to(tiny("E2B", "q4_0"))

    def refused(error, words):
        with pytest.raises(error, match=words):
            gqk.load(path, text_only=False)

    refused(BadSettingError, r"holds no projector\. .*mmproj.* without text_only=False")
    write_projector(tmp_path / "a-mmproj.gguf", width=255)
    refused(BadSettingError, "projector of another model: it gives 255 numbers for a token. This model takes 256")
    write_projector(tmp_path / "mmproj-b.gguf", architecture="gemma4")
    refused(BadSettingError, r"holds 2 projectors: a-mmproj.gguf, mmproj-b.gguf\.")
    (tmp_path / "a-mmproj.gguf").unlink()
    refused(BrokenCheckpointError, "is of architecture 'gemma4'. A projector is of architecture 'clip'")


@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
def test_a_plan_counts_the_projectors_bytes(size):
    text, all_of_it = (plan_memory(size, "q4_0", text_only=flag) for flag in (True, False))
    (nbytes,) = (file.bytes for file in find_checkpoint(size, "q4_0").files if file.kind == "projector")
    assert all_of_it.download_bytes - text.download_bytes == nbytes
    working = all_of_it.needed_bytes - text.needed_bytes - nbytes
    assert -2 < working < 200 * 2**20  # what it sees with: at most the 151 MiB that llama.cpp reports for 31B's, in all
    assert {part.place for part in all_of_it.placed if part.name in ("vision", "audio")} == {"ram"}


def test_the_name_of_a_tool_is_in_the_prompt(seeing):
    tool = {"type": "function", "function": {"name": "weather", "description": "the sky", "parameters": {}}}
    asked = {"messages": [{"role": "user", "content": "the sky"}]}
    with_tool, without = (seeing.runner._post("/apply-template", asked | more) for more in ({"tools": [tool]}, {}))
    assert "declaration:weather" in with_tool["prompt"]
    assert "weather" not in without["prompt"]
    plain, offered = (seeing.chat("the sky", tools=them, max_new_tokens=1) for them in ((), [tool]))
    assert offered.prompt_tokens > plain.prompt_tokens
