"""A multimodal projector in llama.cpp's layout: what sees of a tiny E2B, as `tiny("E2B", "bf16")` has it."""

import gguf
import numpy as np

from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import Tensor, bf16_tensors
from gemma_qat_kit.testing import random_weights, tiny_config

_SUFFIXES = (".weight", ".input_min", ".input_max", ".output_min", ".output_max")
_VALUES = gguf.GGUFValueType


def write_projector(path, *, width=256, architecture="clip"):
    """Write the tower of E2B; `width` is what its file says that the text model takes."""
    config = tiny_config("E2B")
    vision = config["vision_config"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    tensors = []
    for name, weight in random_weights(bf16_tensors(config)).items():
        if "vision" in name:
            values = _arranged(name, weight.float().numpy(), vision["patch_size"])
            tensor = Tensor(names.get_name(_converters(name), _SUFFIXES), "F32", values.shape)
            tensors.append((tensor, lambda values=values: [values]))
    write_gguf(path, Metadata(architecture, _keys(vision, width)), tensors)
    return path


def _converters(name):
    """The name that gguf's table knows: convert_hf_to_gguf.py gives it to the table so."""
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    return name + ".weight" * name.endswith("position_embedding_table")


def _arranged(name, values, patch):
    if "patch_embedder.input_proj" in name:  # (width, patch, patch, colour) to that of a convolution
        values = values.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(np.atleast_1d(values))


def _keys(vision, width):
    numbers = {"image_size": 224, "patch_size": vision["patch_size"], "embedding_length": vision["hidden_size"],
               "feed_forward_length": vision["intermediate_size"], "projection_dim": width,
               "block_count": vision["num_hidden_layers"],
               "attention.head_count": vision["num_attention_heads"]}  # fmt: skip
    return {
        "clip.has_vision_encoder": (True, _VALUES.BOOL, None),
        "clip.use_gelu": (True, _VALUES.BOOL, None),
        "clip.vision.projector_type": (gguf.VisionProjectorType.GEMMA4V, _VALUES.STRING, None),
        "clip.vision.attention.layer_norm_epsilon": (vision["rms_norm_eps"], _VALUES.FLOAT32, None),
        "clip.vision.image_mean": ([0.0] * 3, _VALUES.ARRAY, _VALUES.FLOAT32),
        "clip.vision.image_std": ([1.0] * 3, _VALUES.ARRAY, _VALUES.FLOAT32),
        **{f"clip.vision.{name}": (number, _VALUES.UINT32, None) for name, number in numbers.items()},
    }
