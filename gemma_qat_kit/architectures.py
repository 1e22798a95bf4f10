"""The five Gemma 4 architectures as the config.json of each checkpoint, from one table of what differs.

Keys are the Hugging Face config keys, unchanged. `hf_config` gives the whole config of a size in a format,
`drafter_config` that of its MTP drafter, and `tiny_config` shrinks either to a few hundred kilobytes without touching
a key, which is what the tests load.

Source: the config.json of google/gemma-4-{E2B,E4B,12B,26B-A4B,31B}-it, -it-assistant and -it-qat-mobile-transformers
    (2026-06 to 2026-08).
"""

import copy

from gemma_qat_kit.errors import NotPublishedError, unknown_name

GEMMA_SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
MOBILE_SIZES = ("E2B", "E4B")

_TOKENS = {
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "eoa_token_id": 258883,
    "eoa_token_index": 258883,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "video_token_id": 258884,
}
_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
_SMALL = {  # E2B and E4B: per-layer embeddings, key/value heads shared between the later layers, a short window
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "sliding_window": 512,
    "use_bidirectional_attention": None,
}
_LARGE = {"attention_k_eq_v": True}
# (layers per full-attention layer, number of layers, what differs from _TEXT)
_SIZES = {
    "E2B": (5, 35, {**_SMALL, "hidden_size": 1536, "intermediate_size": 6144, "num_key_value_heads": 1,
                    "num_kv_shared_layers": 20, "use_double_wide_mlp": True}),
    "E4B": (6, 42, {**_SMALL, "hidden_size": 2560, "intermediate_size": 10240, "num_key_value_heads": 2,
                    "num_kv_shared_layers": 18}),
    "12B": (6, 48, {**_LARGE, "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
                    "num_key_value_heads": 8, "num_global_key_value_heads": 1, "model_type": "gemma4_unified_text"}),
    "26B-A4B": (6, 30, {**_LARGE, "hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16,
                        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "enable_moe_block": True,
                        "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}),
    "31B": (6, 60, {**_LARGE, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
                    "num_key_value_heads": 16, "num_global_key_value_heads": 4}),
}  # fmt: skip
_VISION = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": 280,
    "dtype": "bfloat16",
    "global_head_dim": 64,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 12,
    "num_hidden_layers": 16,
    "num_key_value_heads": 12,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": True,
}
_LARGE_VISION = {"global_head_dim": 72, "head_dim": 72, "hidden_size": 1152, "intermediate_size": 4304,
                 "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
                 "standardize": True, "use_clipped_linears": False}  # fmt: skip
_AUDIO = {
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1000000000.0,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 5,
    "dtype": "bfloat16",
    "gradient_clipping": 10000000000.0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "model_type": "gemma4_audio",
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "output_proj_dims": 1536,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-06,
    "subsampling_conv_channels": [128, 32],
    "use_clipped_linears": True,
}
_UNIFIED_VISION = {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "model_patch_size": 48,
                   "model_type": "gemma4_unified_vision", "num_soft_tokens": 280, "output_proj_dims": 3840,
                   "patch_size": 16, "pooling_kernel_size": 3, "rms_norm_eps": 1e-06}  # fmt: skip
_UNIFIED_AUDIO = {"audio_embed_dim": 640, "audio_samples_per_token": 640, "hidden_size": 640,
                  "model_type": "gemma4_unified_audio", "output_proj_dims": 640, "rms_norm_eps": 1e-06}  # fmt: skip

_LAYERS = r"language_model\.layers\."
_MOBILE_BITS = {  # ordered: the first expression that matches a module's name gives its bits
    "E2B": {r"^lm_head$": 2, r"language_model\.embed_tokens$": 2, r"language_model\.embed_tokens_per_layer$": 4,
            _LAYERS + r"(\d|1[0-4])\.mlp\.": 4, _LAYERS + r"\d+\.mlp\.": 2},
    "E4B": {r"^lm_head$": 2, r"language_model\.embed_tokens$": 2, r"language_model\.embed_tokens_per_layer$": 2,
            _LAYERS + r"\d+\.mlp\.": 4},
}  # fmt: skip
_MOBILE_BITS_BOTH = {
    _LAYERS + r"\d+\.self_attn\.": 4,
    _LAYERS + r"\d+\.per_layer_input_gate$": 8,
    _LAYERS + r"\d+\.per_layer_projection$": 8,
    r"vision_tower": 8,
    r"audio_tower(?!.*lconv1d\.linear_start)": 2,
    r"audio_tower\.layers\.\d+\.lconv1d\.linear_start\.": 4,
}
_MOBILE_FLOAT = ["model.vision_tower.patch_embedder", "model.audio_tower.subsample_conv_projection",
                 "model.audio_tower.output_proj", "relative_k_proj", "model.embed_audio", "model.embed_vision",
                 "per_layer_model_projection"]  # fmt: skip
_W4A16 = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                        "observer": "memoryless_minmax", "observer_kwargs": {}, "strategy": "group",
                        "symmetric": True, "type": "int"},
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*embed_vision.*", "re:.*vision_embedder.*",
               "re:.*audio_tower.*", "re:.*embed_audio.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


def layer_types(num_layers: int, period: int) -> list[str]:
    """Return the attention kind of each layer: every `period`-th one, and the last one, sees the whole context."""
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]
    kinds[-1] = "full_attention"
    return kinds


def hf_config(size: str, format: str = "bf16") -> dict:
    """Return the config.json of a Gemma 4 checkpoint, as a new dict.

    Args:
        size: One of `GEMMA_SIZES`.
        format: "bf16" (also for q4_0-unquantized), "w4a16" or "mobile".

    Raises:
        UnknownNameError: `size` is not a Gemma 4 size.
        NotPublishedError: `size` has no checkpoint in `format`.
    """
    if size not in _SIZES:
        raise unknown_name("Gemma 4 size", size, GEMMA_SIZES)
    unified = size == "12B"
    config = {
        "architectures": [f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        "audio_config": _audio_config(size),
        **_TOKENS,
        "dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": _text_config(size),
        "tie_word_embeddings": True,
        "vision_config": copy.deepcopy(_UNIFIED_VISION) if unified else _vision_config(size),
    }
    if not unified:
        config["vision_soft_tokens_per_image"] = 280
    if format == "mobile":
        _make_mobile(config, size)
    elif format == "w4a16":
        if size == "26B-A4B":
            raise NotPublishedError(
                "26B-A4B has no w4a16 checkpoint.", "It exists for E2B, E4B, 12B, 31B.", "Take q4_0 for 26B-A4B."
            )
        config["quantization_config"] = copy.deepcopy(_W4A16)
    return config


def _text_config(size: str) -> dict:
    period, num_layers, differences = _SIZES[size]
    return {
        **copy.deepcopy(_TEXT),
        **differences,
        "num_hidden_layers": num_layers,
        "layer_types": layer_types(num_layers, period),
    }


def _vision_config(size: str) -> dict:
    return copy.deepcopy(_VISION) | ({} if size in MOBILE_SIZES else _LARGE_VISION)


def _audio_config(size: str) -> dict | None:
    if size == "12B":
        return dict(_UNIFIED_AUDIO)
    return copy.deepcopy(_AUDIO) if size in MOBILE_SIZES else None


def _make_mobile(config: dict, size: str) -> None:
    """Turn a bf16 config, in place, into that of the mobile checkpoint."""
    if size not in MOBILE_SIZES:
        raise NotPublishedError(
            f"{size} has no mobile checkpoint.", "It exists for E2B and E4B.", f"Take q4_0 for {size}."
        )
    del config["architectures"], config["dtype"]
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["vision_config"]["use_clipped_linears"] = config["audio_config"]["use_clipped_linears"] = False
    bits = _MOBILE_BITS[size] | _MOBILE_BITS_BOTH
    config["quantization_config"] = {
        "module_quant_configs": {pattern: {"num_bits": n} for pattern, n in bits.items()},
        "modules_to_not_convert": list(_MOBILE_FLOAT),
        "num_bits": 4,
        "quant_method": "gemma",
        "quantize_embeddings": True,
    }


def drafter_config(size: str) -> dict:
    """Return the config.json of the MTP drafter that belongs to `size`: four layers that own no key/value cache.

    Raises:
        UnknownNameError: `size` is not a Gemma 4 size.
    """
    target = hf_config(size)
    text, small = target["text_config"], size in MOBILE_SIZES
    unified = "Unified" if size == "12B" else ""
    hidden = {"hidden_size": 1024, "intermediate_size": 8192}
    if small:
        hidden = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
    fixed = {"enable_moe_block": False, "final_logit_softcapping": None, "hidden_size_per_layer_input": 0,
             "moe_intermediate_size": None, "num_experts": None, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
             "top_k_experts": None, "use_bidirectional_attention": None, "use_double_wide_mlp": False,
             "vocab_size_per_layer_input": 0}  # fmt: skip
    return {
        "architectures": [f"Gemma4{unified}AssistantForCausalLM"],
        **{key: value for key, value in _TOKENS.items() if key not in ("eoa_token_index", "video_token_id")},
        "backbone_hidden_size": text["hidden_size"],
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": {**text, **fixed, **hidden, "layer_types": layer_types(4, 4)},
        "tie_word_embeddings": True,
        "use_ordered_embeddings": small,
    }
