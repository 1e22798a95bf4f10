"""Images and sound as the tensors that Gemma 4 takes in transformers, on machines without torchvision, too.

transformers' own processor for Gemma 4 needs torchvision, and one that does not match torch breaks every import of the
model. The processor's parts do not: the image processor exists for PIL as well, and the feature extractors for
sound are plain numpy. 12B takes patches of 48 pixels, which are what the others' patches of 16 give, three by three.
"""

import io
import json
import wave
from pathlib import Path

import numpy as np

from gemma_qat_kit.engines.openai_form import open_picture
from gemma_qat_kit.errors import BadSettingError

RATE = 16_000  # samples per second; Gemma 4's model cards


class MediaEncoder:
    """Makes the inputs for messages with images and sound.

    Args:
        folder: Of the checkpoint; its processor_config.json says into how many tokens an image goes.
        config: transformers' config object of the whole model.
    """

    def __init__(self, folder: Path, config):
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        path = folder / "processor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._config, self._is_unified = config, config.model_type == "gemma4_unified"
        vision, images = config.vision_config, settings.get("image_processor") or {}
        size = vision.patch_size, vision.pooling_kernel_size
        size = (size[0] * size[1], 1) if self._is_unified else size
        self._images = Gemma4ImageProcessorPil(
            patch_size=size[0], pooling_kernel_size=size[1], max_soft_tokens=images.get("max_soft_tokens", 280)
        )
        self._sound = self._extractor(settings.get("feature_extractor") or {}) if config.audio_config else None
        self.takes = ("image", "audio") if self._sound else ("image",)

    def _extractor(self, settings: dict):
        from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
        from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
            Gemma4UnifiedAudioFeatureExtractor,
        )

        if not self._is_unified:
            return Gemma4AudioFeatureExtractor(**settings)
        samples = self._config.audio_config.audio_samples_per_token
        return Gemma4UnifiedAudioFeatureExtractor(feature_size=samples, audio_samples_per_token=samples)

    def inputs(self, ids: list[int], messages: list[dict]) -> dict:
        """Return the tensors for a prompt.

        Args:
            ids: Of the prompt, with one token in place of each image and recording, as the chat template leaves it.
            messages: With the images and sound themselves.

        Raises:
            BadSettingError: The text holds such a token itself, or a picture or recording is damaged.
        """
        import torch

        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        pictures = [open_picture(part["data"]) for part in parts if part["type"] == "image"]
        sounds = [samples_of(part["data"]) for part in parts if part["type"] == "audio"]
        tensors, counts = {}, {"image": [], "audio": []}
        if pictures:
            tensors, counts["image"] = self._image_tensors(pictures)
        if sounds:
            more, counts["audio"] = self._sound_tensors(sounds)
            tensors |= more
        ids = self._spread(ids, counts)
        config = self._config
        kinds = [{config.image_token_id: 1, config.audio_token_id: 3}.get(i, 0) for i in ids]
        rows = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "mm_token_type_ids": [kinds]}
        return {name: torch.tensor(row) for name, row in rows.items()} | tensors

    def _image_tensors(self, pictures: list) -> tuple[dict, list[int]]:
        made = self._images(pictures, return_tensors="pt")
        counts = [int(count) for count in made.pop("num_soft_tokens_per_image")]
        return dict(made), counts

    def _sound_tensors(self, sounds: list) -> tuple[dict, list[int]]:
        made = self._sound(sounds, return_tensors="pt")
        counts = made["input_features_mask"].sum(-1) if self._is_unified else _tokens_heard(made["input_features_mask"])
        return dict(made), [int(count) for count in counts]

    def _spread(self, ids: list[int], counts: dict[str, list[int]]) -> list[int]:
        """Return ids with as many tokens for each image and recording as it goes into, between their marks."""
        config = self._config
        end = config.eoa_token_id if hasattr(config, "eoa_token_id") else config.eoa_token_index
        marks = {config.image_token_id: ("image", config.boi_token_id, config.eoi_token_id),
                 config.audio_token_id: ("audio", config.boa_token_id, end)}  # fmt: skip
        left, spread = {kind: list(numbers) for kind, numbers in counts.items()}, []
        for i in ids:
            kind, before, after = marks.get(i, (None, None, None))
            if kind is None:
                spread.append(i)
            elif left[kind]:
                spread += [before, *[i] * left[kind].pop(0), after]
            else:
                raise _marks_in_text(kind)
        if any(left.values()):
            raise BadSettingError(
                "The chat template leaves images or sound out.",
                "Gemma 4's writes a mark for each.",
                "Take the chat_template.jinja of the published checkpoint.",
            )
        return spread


def _marks_in_text(kind: str) -> BadSettingError:
    return BadSettingError(
        f"The text holds <|{kind}|>, which stands for an {kind}.",
        f"Each {kind} has its own part in the message.",
        f"Take <|{kind}|> out of the text.",
    )


def _tokens_heard(mask):
    """Return the tokens of each recording: two convolutions, each of stride 2, over its frames."""
    for _ in range(2):
        mask = mask[:, ::2]
    return mask.sum(-1)


def samples_of(data: bytes) -> np.ndarray:
    """Return a WAV as float32 samples from -1 to 1, one channel, 16,000 a second."""
    try:
        with wave.open(io.BytesIO(data)) as recording:
            width, channels, rate = recording.getsampwidth(), recording.getnchannels(), recording.getframerate()
            raw = recording.readframes(recording.getnframes())
    except (wave.Error, EOFError) as err:
        raise BadSettingError(f"The recording is damaged: {err}.", "A whole WAV is needed.", "Save it again.") from err
    raw = np.frombuffer(raw[: len(raw) // (width * channels) * width * channels], np.uint8).reshape(-1, width)
    if width == 1:
        samples = raw[:, 0].astype(np.float64) / 128 - 1  # the only width without a sign
    else:
        padded = np.zeros((len(raw), 4), np.uint8)
        padded[:, 4 - width :] = raw
        samples = padded.view("<i4")[:, 0] / 2**31
    return resampled(samples.reshape(-1, channels).mean(1), rate).astype(np.float32)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return samples at 16,000 a second: the same frequencies, without those above 8,000 Hz."""
    wanted = round(len(samples) * RATE / rate)
    if rate == RATE or not wanted:
        return samples
    spectrum = np.fft.rfft(samples)[: wanted // 2 + 1]
    return np.fft.irfft(spectrum, wanted) * (wanted / len(samples))
