"""Images and sound in transformers: the tensors of transformers' own processor; a text-only load refuses."""

import io
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from test_attachments import audio, image, picture, recording

import gemma_qat_kit as gqk
from gemma_qat_kit.attachments import checked_content
from gemma_qat_kit.engines.openai_form import open_picture
from gemma_qat_kit.engines.transformers_media import MediaEncoder, resampled, samples_of
from gemma_qat_kit.errors import BadSettingError, MissingLibraryError

SIZES = {"E2B": {"image", "audio"}, "12B": {"image", "audio"}, "26B-A4B": {"image"}, "31B": {"image"}}
WORDS = {"type": "text", "text": "the sky"}


@pytest.fixture(scope="module", params=SIZES)
def model(tiny, request):
    with gqk.load(tiny(request.param, "bf16"), text_only=False, context_length=1024) as model:
        assert set(model.takes) == SIZES[request.param]
        yield model


def photo(width=240, height=200):
    rows = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


def tone(rate, channels=1, width=2, hertz=1000.0, seconds=0.5):
    times = np.arange(int(rate * seconds)) / rate
    values = np.round(np.sin(2 * np.pi * hertz * times) * 0.5 * (2 ** (8 * width - 1) - 1)).astype("<i8")
    values = values + 128 if width == 1 else values
    raw = np.repeat(values, channels).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(channels)
        wav.setsampwidth(width)
        wav.setframerate(rate)
        wav.writeframes(raw)
    return file.getvalue()


def shown(model):
    """A conversation with all that a model takes."""
    parts = [image(photo()), image(photo(100, 300)), WORDS, *([audio(tone(16000))] if "audio" in model.takes else [])]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "is"},
        {"role": "user", "content": "a"},
    ]


def encoded(model, conversation):
    from gemma_qat_kit.generation import Settings

    return model.runner._encode(model._messages(conversation), Settings(False, 1, 0.0, 1.0, 0, None))


def their_processor(model, monkeypatch):
    """transformers' processor, without the part for videos, which needs torchvision."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor

    tokenizer, media = model.runner.tokenizer, model.runner._media
    for name, token in {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>", "audio": "<|audio|>",
                        "boa": "<|audio>", "eoa": "<audio|>"}.items():  # fmt: skip
        monkeypatch.setattr(tokenizer, f"{name}_token", token, raising=False)
        monkeypatch.setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token), raising=False)
    cls = Gemma4UnifiedProcessor if media._is_unified else Gemma4Processor
    monkeypatch.setattr(cls, "check_argument_for_proper_class", lambda *_: None)
    return cls(media._sound, media._images, tokenizer, None, chat_template=tokenizer.chat_template)


def test_the_tensors_are_those_of_transformers_own_processor(model, monkeypatch):
    conversation = shown(model)
    ours = encoded(model, conversation)
    theirs = _their_inputs(model, conversation, monkeypatch)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert model.num_tokens(conversation) == theirs["input_ids"].shape[1]


def _their_inputs(model, conversation, monkeypatch):
    processor = their_processor(model, monkeypatch)
    text = processor.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    parts = conversation[0]["content"]
    pictures = [Image.open(io.BytesIO(part["image"])).convert("RGB") for part in parts if part["type"] == "image"]
    sounds = [samples_of(part["audio"]) for part in parts if part["type"] == "audio"]
    return processor(images=pictures, text=text, audio=sounds or None, return_tensors="pt", add_special_tokens=False)


def test_what_is_shown_changes_what_the_model_says(model):
    def logits(data):
        inputs = encoded(model, [{"role": "user", "content": [image(data), WORDS]}])
        with torch.no_grad():
            return model.runner.model(**inputs).logits[0, -1]

    assert torch.equal(logits(photo()), logits(photo()))
    assert not torch.allclose(logits(photo()), logits(picture("PNG", (240, 200))), atol=1e-2)


def test_a_question_with_everything_is_answered_after_another(model):
    for _ in range(2):
        reply = model.chat(shown(model), max_new_tokens=2, temperature=0)
        assert reply.new_tokens == 2
        assert reply.prompt_tokens == model.num_tokens(shown(model))
    assert model.chat("the sky", max_new_tokens=2).new_tokens == 2  # text alone goes on as before


def test_a_mark_in_the_text_is_no_image(model):
    with pytest.raises(BadSettingError, match=r"The text holds <\|image\|>"):
        model.chat([{"role": "user", "content": [image(photo()), {"type": "text", "text": "<|image|>"}]}])


def test_a_template_that_leaves_images_out_is_refused(model):
    messages = [{"role": "user", "content": checked_content([image(photo())])}]
    with pytest.raises(BadSettingError, match="The chat template leaves images or sound out"):
        model.runner._media.inputs([1, 2, 3], messages)


def test_an_image_for_a_text_only_load_is_refused(tiny, built_in):
    question = [{"role": "user", "content": [image(photo()), WORDS]}]
    with gqk.load(tiny("31B", "bf16")) as model:
        assert model.takes == ()
        with pytest.raises(BadSettingError, match=r"takes no image.*takes text\. .*text_only=False") as caught:
            model.chat(question)
        assert caught.value.next_step.endswith("text_only=False).")
        with pytest.raises(BadSettingError, match="takes no image"):
            model.num_tokens(question)
    with gqk.load("smollm2-135m") as model, pytest.raises(BadSettingError, match=r"takes no image.*Take E2B"):
        model.chat(question)


def test_a_model_that_sees_only_refuses_sound_and_loads_the_whole_processor_when_asked(tiny):
    with gqk.load(tiny("31B", "bf16"), text_only=False) as model:
        with pytest.raises(
            MissingLibraryError, match="image and audio processor"
        ):  # no torchvision, or no files for it
            _ = model.hf
        with pytest.raises(BadSettingError, match=r"takes no audio.*it takes text and image.*E2B, E4B or 12B"):
            model.chat([{"role": "user", "content": [audio(recording())]}])


@pytest.mark.parametrize(("rate", "channels", "width"), [(16000, 1, 2), (44100, 2, 2), (8000, 1, 1), (48000, 2, 3),
                                                         (22050, 1, 4)])  # fmt: skip
def test_a_recording_of_any_kind_is_the_same_tone(rate, channels, width):
    samples = samples_of(tone(rate, channels, width))
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000)
    assert samples.dtype == np.float32
    assert len(samples) == 8000
    assert np.abs(samples - wanted)[200:-200].max() < 0.02


def test_resampling_leaves_out_what_the_new_rate_cannot_hold():
    high = np.sin(2 * np.pi * 12_000 * np.arange(48_000) / 48_000)
    assert np.abs(resampled(high, 48_000)).max() < 1e-9


def test_a_picture_is_turned_upright():
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=turned)
    assert open_picture(file.getvalue()).size == (2, 4)


def test_a_damaged_picture_and_a_damaged_recording_are_refused():
    with pytest.raises(BadSettingError, match="The picture is damaged"):
        open_picture(photo()[:300])
    with pytest.raises(BadSettingError, match="The recording is damaged"):
        samples_of(b"RIFF\0\0\0\0WAVE")


def test_without_pillow_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingLibraryError, match="pip install pillow"):
        open_picture(b"")


def test_patches_of_12b_are_three_by_three_of_the_others(tiny):
    from gemma_qat_kit.engines.transformers_config import load_config

    folders = [tiny(size, "bf16") for size in ("12B", "31B")]
    pixels = []
    for folder in folders:
        made = MediaEncoder(folder, load_config(folder, False))._images(
            [open_picture(photo(192, 144))], return_tensors="pt"
        )
        pixels.append(made["pixel_values"][0])
    count = int((pixels[1].abs().sum(-1) > 0).sum()) // 9
    columns, rows = 9, count // 9
    small = pixels[1][: count * 9].reshape(rows, 3, columns, 3, 16, 16, 3).permute(0, 2, 1, 4, 3, 5, 6)
    assert torch.equal(small.reshape(count, -1), pixels[0][:count])
