"""A multimodal projector in llama.cpp's layout: what sees and hears of a tiny E2B, as `tiny("E2B", "bf16")` has it."""

import gguf
import numpy as np

from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import Tensor, bf16_tensors
from gemma_qat_kit.testing import random_weights, tiny_config

_SUFFIXES = (".weight", ".bias", ".input_min", ".input_max", ".output_min", ".output_max")
_VALUES = gguf.GGUFValueType


def write_projector(path, *, width=256, architecture="clip", hears=False):
    """Write the towers of E2B; `width` is what its file says that the text model takes."""
    config = tiny_config("E2B")
    vision, audio = config["vision_config"], config["audio_config"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    tensors = []
    for name, weight in random_weights(bf16_tensors(config)).items():
        if "vision" in name or (hears and "audio" in name):
            values = _arranged(name, weight.float().numpy(), vision["patch_size"])
            tensor = Tensor(names.get_name(_converters(name), _SUFFIXES), "F32", values.shape)
            tensors.append((tensor, lambda values=values: [values]))
    keys = _vision_keys(vision, width) | (_audio_keys(audio, width) if hears else {})
    write_gguf(path, Metadata(architecture, keys), tensors)
    return path


def _converters(name):
    """The name that gguf's table knows: convert_hf_to_gguf.py gives it to the table so."""
    name = name.replace("model.audio_tower.", "conformer.").replace(".linear.weight", ".weight")
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.")
    return name + ".weight" * name.endswith(("position_embedding_table", "per_dim_scale"))


def _arranged(name, values, patch):
    if "patch_embedder.input_proj" in name:  # (width, patch, patch, colour) to that of a convolution
        values = values.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2)
    if name.endswith("per_dim_scale"):  # the file has what it comes to
        values = np.log1p(np.exp(values))
    if "depthwise_conv1d" in name:
        values = values[:, 0]
    return np.ascontiguousarray(np.atleast_1d(values))


def _vision_keys(vision, width):
    numbers = {"image_size": 224, "patch_size": vision["patch_size"]}
    return {
        "clip.has_vision_encoder": (True, _VALUES.BOOL, None),
        "clip.use_gelu": (True, _VALUES.BOOL, None),
        "clip.vision.image_mean": ([0.0] * 3, _VALUES.ARRAY, _VALUES.FLOAT32),
        "clip.vision.image_std": ([1.0] * 3, _VALUES.ARRAY, _VALUES.FLOAT32),
        **_keys("vision", "GEMMA4V", vision, vision["intermediate_size"], width, numbers),
    }


def _audio_keys(audio, width):
    numbers = {"num_mel_bins": 128}
    keys = _keys("audio", "GEMMA4A", audio, 4 * audio["hidden_size"], width, numbers)
    return {"clip.has_audio_encoder": (True, _VALUES.BOOL, None), **keys}


def _keys(kind, projector, config, feed_forward, width, more):
    numbers = {"embedding_length": config["hidden_size"], "feed_forward_length": feed_forward, "projection_dim": width,
               "block_count": config["num_hidden_layers"],
               "attention.head_count": config["num_attention_heads"], **more}  # fmt: skip
    return {
        f"clip.{kind}.projector_type": (getattr(gguf.VisionProjectorType, projector), _VALUES.STRING, None),
        f"clip.{kind}.attention.layer_norm_epsilon": (config["rms_norm_eps"], _VALUES.FLOAT32, None),
        **{f"clip.{kind}.{name}": (number, _VALUES.UINT32, None) for name, number in numbers.items()},
    }
