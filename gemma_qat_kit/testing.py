"""Tiny random Gemma 4 checkpoints in every published layout, for tests that need the real loaders and no download.

Each has the keys of the real config.json and the real tensor names, a few megabytes of random weights, a 512-word
tokenizer with Gemma's own special ids below 110, and a chat template that behaves as Gemma's does.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from gemma_qat_kit.architectures import drafter_config, hf_config, layer_types
from gemma_qat_kit.layouts import (
    Tensor,
    bf16_tensors,
    drafter_tensors,
    gguf_name,
    gguf_tensors,
    mobile_bits,
    mobile_tensors,
    w4a16_tensors,
)
from gemma_qat_kit.tiny_chat import CHAT_TEMPLATE, tiny_tokenizer

TINY_FORMATS = ("bf16", "q4_0-unquantized", "w4a16", "mobile", "q4_0")
_TEXT = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32,
         "global_head_dim": 64, "vocab_size": 512, "vocab_size_per_layer_input": 512, "sliding_window": 8,
         "max_position_embeddings": 4096}  # fmt: skip
_VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 4, "head_dim": 12, "global_head_dim": 12, "position_embedding_size": 64}  # fmt: skip
_AUDIO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 48}
_IDS = {"image_token_id": 500, "audio_token_id": 501, "boi_token_id": 502, "boa_token_id": 503, "eoi_token_id": 504,
        "eoa_token_id": 505, "eoa_token_index": 505, "video_token_id": 506}  # fmt: skip


def tiny_config(size: str, format: str = "bf16") -> dict:
    """Return the config.json of `size` in `format` with every key kept and every number shrunk.

    E2B keeps 15 layers before the sharing of keys and values starts, because its mobile bit schedule names that layer.
    """
    config = hf_config(size, format)
    text, moe = config["text_config"], config["text_config"]["enable_moe_block"]
    period, num_layers, shared = {"E2B": (5, 20, 5), "E4B": (6, 12, 6)}.get(size, (6, 12, 0))
    text |= _TEXT | {"num_hidden_layers": num_layers, "num_kv_shared_layers": shared}
    text["layer_types"] = layer_types(num_layers, period)
    text["num_key_value_heads"] = min(2, text["num_key_value_heads"])
    if text["num_global_key_value_heads"]:
        text["num_global_key_value_heads"] = 1
    if text["hidden_size_per_layer_input"]:
        text["hidden_size_per_layer_input"] = 64
    if moe:
        text |= {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
    if config["model_type"] == "gemma4_unified":
        config["vision_config"] |= {"mm_embed_dim": 48, "mm_posemb_size": 64, "output_proj_dims": 48}
        config["audio_config"] |= {"audio_embed_dim": 48, "hidden_size": 48, "output_proj_dims": 48,
                                   "audio_samples_per_token": 48}  # fmt: skip
    else:
        config["vision_config"] |= _VISION
        if config["audio_config"]:
            config["audio_config"] |= _AUDIO
    return config | {key: value for key, value in _IDS.items() if key in config}


def tiny_drafter_config(size: str) -> dict:
    """Return the config.json of the tiny drafter that reads the cache of `tiny_config(size)`."""
    config, target = drafter_config(size), tiny_config(size)["text_config"]
    shapes = ("vocab_size", "sliding_window", "head_dim", "global_head_dim", "num_key_value_heads",
              "num_global_key_value_heads", "num_attention_heads", "max_position_embeddings")  # fmt: skip
    config["text_config"] |= {key: target[key] for key in shapes} | {"hidden_size": 32, "intermediate_size": 64}
    config |= {"backbone_hidden_size": target["hidden_size"], "num_centroids": 32, "centroid_intermediate_top_k": 8}
    return config | {key: value for key, value in _IDS.items() if key in config}


def write_tiny_checkpoint(folder: Path, size: str, format: str = "bf16", *, seed: int = 0) -> Path:
    """Write a tiny random checkpoint.

    Args:
        folder: Where to write; made if it does not exist.
        size: A Gemma 4 size.
        format: One of `TINY_FORMATS`.
        seed: Of the random weights; formats of one seed are made from the same weights.

    Returns:
        The folder, or for "q4_0" the path of the .gguf file in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(size, format if format in ("mobile", "w4a16") else "bf16")
    weights = random_weights(bf16_tensors(config), seed)
    if format == "q4_0":
        return _write_tiny_gguf(folder / f"tiny-{size}-q4_0.gguf", config, weights)
    writers = {"mobile": _mobile_state, "w4a16": _w4a16_state}
    state = writers[format](config, weights) if format in writers else weights
    if format == "q4_0-unquantized":
        kept = {tensor.name for tensor in bf16_tensors(config, has_shared_kv=False)}
        state = {name: tensor for name, tensor in state.items() if name in kept}
    _write_folder(folder, config, state)
    return folder


def write_tiny_drafter(folder: Path, size: str, *, seed: int = 1) -> Path:
    """Write a tiny MTP drafter for `write_tiny_checkpoint(…, size)` and return its folder."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_drafter_config(size)
    state = random_weights(drafter_tensors(config), seed)
    if config["use_ordered_embeddings"]:
        state["masked_embedding.token_ordering"] = torch.arange(config["text_config"]["vocab_size"])
    _write_folder(folder, config, state, {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"})
    return folder


def random_weights(tensors: Iterable[Tensor], seed: int = 0) -> dict:
    """Return random bfloat16 weights: norms and scalars near 1, matrices with a spread that keeps the logits lively."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    bounds = {"input_min": -8.0, "output_min": -8.0, "input_max": 8.0, "output_max": 8.0}
    state = {}
    for tensor in tensors:
        last = tensor.name.rsplit(".", 1)[-1]
        noise = torch.randn(tensor.shape, generator=generator)
        if last in bounds:
            value = torch.tensor(bounds[last])
        elif len(tensor.shape) == 1 or "norm" in tensor.name:
            value = 1 + 0.1 * noise
        else:
            value = 0.05 * noise
        state[tensor.name] = value.to(torch.bfloat16)
    return state


def _mobile_state(config: dict, weights: dict) -> dict:
    """Return the tensors of a mobile checkpoint; only every second linear has calibrated activations."""
    import torch

    from gemma_qat_kit.formats import mobile

    state, num_linears = {}, 0
    per_layer = config["text_config"]["hidden_size_per_layer_input"]
    weights = weights | {"lm_head.weight": weights["model.language_model.embed_tokens.weight"]}
    for tensor in mobile_tensors(config):
        module, _, last = tensor.name.rpartition(".")
        source, bits = weights.get(module + ".weight"), mobile_bits(config, module)
        if last == "embedding_quantized" or (last == "weight" and tensor.dtype in ("U8", "I8")):
            codes, scale = mobile.quantize(
                source, bits, group_size=per_layer if last != "weight" and "per_layer" in module else None
            )
            state[tensor.name] = mobile.pack(codes, bits)
            state[module + (".embedding_scale" if last != "weight" else ".weight_scale")] = scale
            num_linears += 1
        elif last.endswith("activation_scale"):
            state[tensor.name] = torch.tensor(0.08 if num_linears % 2 and module != "lm_head" else 0.0)
        elif last.endswith("cache_scale"):
            state[tensor.name] = torch.tensor(0.05)
        elif tensor.name not in state:
            state[tensor.name] = weights[tensor.name].to(torch.float32 if tensor.dtype == "F32" else torch.bfloat16)
    return state


def _w4a16_state(config: dict, weights: dict) -> dict:
    import torch

    from gemma_qat_kit.formats import w4a16

    state = {}
    weights = weights | {"lm_head.weight": weights["model.language_model.embed_tokens.weight"].clone()}
    for tensor in w4a16_tensors(config):
        module, _, last = tensor.name.rpartition(".")
        if last == "weight_packed":
            weight = weights[module + ".weight"]
            codes, scale = w4a16.quantize(weight)
            state |= {tensor.name: w4a16.pack(codes), module + ".weight_scale": scale}
            state[module + ".weight_shape"] = torch.tensor(weight.shape)
        elif tensor.name not in state:
            state[tensor.name] = weights[tensor.name]
    return state


def _write_tiny_gguf(path: Path, config: dict, weights: dict) -> Path:
    import gguf
    import numpy as np
    import torch

    from gemma_qat_kit.formats import k_quants
    from gemma_qat_kit.gguf.metadata import Vocabulary, gemma_metadata, rope_frequencies
    from gemma_qat_kit.gguf.writer import write_gguf

    by_name = {gguf_name(name): w.float().numpy() for name, w in weights.items() if ".language_model." in name}
    by_name["rope_freqs.weight"] = np.array(list(rope_frequencies(config)), np.float32)

    def data(tensor: Tensor) -> np.ndarray:
        values = by_name[tensor.name]
        if tensor.dtype == "Q6_K":
            return k_quants.quantize(torch.from_numpy(values), "Q6_K").numpy()
        return (
            values if tensor.dtype == "F32" else gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.dtype])
        )

    vocabulary = Vocabulary.from_tokenizer_json(json.loads(tiny_tokenizer().to_str()), CHAT_TEMPLATE)
    tensors = ((t, lambda t=t: [data(t)]) for t in gguf_tensors(config))
    write_gguf(path, gemma_metadata(config, vocabulary), tensors, overwrite=True)
    return path


def _write_folder(folder: Path, config: dict, state: dict, generation: dict | None = None) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_settings(folder, config, generation)


def write_settings(folder: Path, config: dict, generation: dict | None = None) -> None:
    """Write what lies beside the weights: config, generation defaults, tokenizer and chat template."""
    defaults = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "do_sample": True,
                "temperature": 1.0, "top_k": 64, "top_p": 0.95}  # fmt: skip
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
                        "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}  # fmt: skip
    for name, content in {
        "config.json": config,
        "generation_config.json": defaults | (generation or {}),
        "tokenizer_config.json": tokenizer_config,
        "processor_config.json": {"image_processor": {"max_soft_tokens": 70}},  # the position table has 64 rows
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
