"""config.json's content from the header of a Gemma 4 GGUF: the inverse of `metadata.model_keys`."""

from pathlib import Path

import numpy as np

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.gguf.header import GgufHeader, broken_file

_SAME = {  # config.json -> GGUF
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "global_head_dim": "attention.key_length",
    "head_dim": "attention.key_length_swa",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
}


def gemma_config(path: Path, header: GgufHeader) -> dict:
    """Return the config of the text model in a GGUF of the architecture gemma4.

    Raises:
        BrokenCheckpointError: A key or a tensor is missing.
    """
    frequencies = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if frequencies is None:
        raise broken_file(path, "it has no rope_freqs.weight")
    divisors = np.fromfile(path, np.float32, frequencies.shape[0], offset=frequencies.start)
    try:
        return config_of(header, float((divisors == 1).mean()))
    except (LookupError, TypeError, ValueError) as err:
        raise broken_file(path, f"its keys do not describe a Gemma 4 model ({err!r})") from err


def config_of(header: GgufHeader, share_rotating: float) -> dict:
    """Return the config of a text model.

    Args:
        header: With the shapes of its tensors.
        share_rotating: Of the dimensions of a full-attention head.
    """
    about = {key.removeprefix("gemma4."): value for key, value in header.metadata.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    config = hf_config("31B")  # what all sizes share
    text = config["text_config"] | {name: about[key] for name, key in _SAME.items()}
    is_sliding = about["attention.sliding_window_pattern"]
    kinds = ["sliding_attention" if each else "full_attention" for each in is_sliding]
    kv_heads = _each(about["attention.head_count_kv"], len(kinds))
    widths = _each(about["feed_forward_length"], len(kinds))
    own = kinds[: len(kinds) - text["num_kv_shared_layers"]]
    full = own.index("full_attention")
    text |= {
        "layer_types": kinds,
        "num_key_value_heads": kv_heads[own.index("sliding_attention")],
        "intermediate_size": widths[0],
        "use_double_wide_mlp": len(set(widths)) > 1,
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        "vocab_size_per_layer_input": shapes.get("per_layer_token_embd.weight", shapes["token_embd.weight"])[0],
        "enable_moe_block": "expert_count" in about,
        "num_experts": about.get("expert_count"),
        "top_k_experts": about.get("expert_used_count"),
        "moe_intermediate_size": about.get("expert_feed_forward_length"),
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": share_rotating, "rope_theta": about["rope.freq_base"],
                               "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": about["rope.freq_base_swa"], "rope_type": "default"},
        },
    }  # fmt: skip
    if kv_heads[full] != text["num_key_value_heads"] or text["attention_k_eq_v"]:
        text["num_global_key_value_heads"] = kv_heads[full]
    else:
        text["num_global_key_value_heads"] = None
    is_tied = "output.weight" not in shapes
    text["tie_word_embeddings"] = is_tied
    return config | {"text_config": text, "vision_config": None, "audio_config": None, "tie_word_embeddings": is_tied}


def _each(value: object, count: int) -> list[int]:
    return value if isinstance(value, list) else [value] * count
