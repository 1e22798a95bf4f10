"""What an engine takes to compute with, beside weights and cache: sums over the tensors that live at the peak.

Widths and counts come from the config. The few constants are measured (`bench/memory_measured.py` prints what they
miss by) and named for what they stand for.
"""

import math

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.layouts import head_shape
from gemma_qat_kit.memory.key_values import LLAMA_CPP_BATCH, kv_cache_bytes
from gemma_qat_kit.memory.parts import ACTIVATIONS, ENGINE, LOGITS, Part
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.parameters import layer_geometry

MIB = 2**20
PREFILL_CHUNK = 512  # tokens of a prompt that transformers computes at once
UNPACK_CHUNK = 2**22  # weights of a mobile matrix that are unpacked at once
# Measured in fresh processes on Linux: torch and transformers imported and a model's thousands of modules made; the
# pages of their shared libraries. llama.cpp: its child process and the Python that talks to it.
TRANSFORMERS_RAM, TRANSFORMERS_LIBRARIES = 290 * MIB, 116 * MIB
LLAMA_CPP_RAM, LLAMA_CPP_LIBRARIES = 100 * MIB, 60 * MIB
CUDA_CONTEXT = 512 * MIB  # an estimate: a T4's driver takes 0.3 to 0.5 GiB before the first tensor, cuBLAS the rest
_MALLOC_SLACK = 1.3  # freed blocks that glibc keeps, over the tensors that live at once
_UNPACKING_BYTES = 12  # per weight of a mobile matrix: int2 or int4 codes, int8, the stack of them, two bf16 products


def engine_parts(settings: MemorySettings) -> list[Part]:
    """Return what an engine takes before it has a model."""
    if settings.engine == "llama_cpp":
        parts = [Part(ENGINE, LLAMA_CPP_RAM, "ram"), Part(ENGINE, LLAMA_CPP_LIBRARIES, "mapped")]
    else:
        parts = [Part(ENGINE, TRANSFORMERS_RAM, "ram"), Part(ENGINE, TRANSFORMERS_LIBRARIES, "mapped")]
    if settings.device == "cuda":
        parts.append(Part(ENGINE, CUDA_CONTEXT, "gpu"))
    return parts


def chat_parts(settings: MemorySettings) -> list[Part]:
    """Return activations and logits at the peak of an answer: the last chunk of the longest prompt."""
    place = "gpu" if settings.device == "cuda" else "ram"
    if settings.size == BUILT_IN_SIZE:
        return [Part(ACTIVATIONS, _built_in_activations(settings), place)]
    config = hf_config(settings.size)
    vocab = head_shape(config)[0]
    if settings.engine == "llama_cpp":
        return [Part(ACTIVATIONS, llama_cpp_compute_bytes(config["text_config"], settings.context_length), place),
                Part(LOGITS, 4 * vocab * settings.batch_size, "ram")]  # fmt: skip
    activations = prefill_bytes(config["text_config"], settings.context_length) * settings.batch_size
    if settings.format == "mobile":
        activations += _UNPACKING_BYTES * UNPACK_CHUNK
    if settings.device == "cpu":
        activations = round(activations * _MALLOC_SLACK)
    # The last token's logits in 16 bits, in float32, and capped; sampling sorts and copies them.
    return [Part(ACTIVATIONS, activations, place), Part(LOGITS, 24 * vocab * settings.batch_size, place)]


def prefill_bytes(text: dict, context_length: int) -> int:
    """Return the bytes of the tensors that live at once while transformers computes one chunk of a prompt."""
    chunk = min(PREFILL_CHUNK, context_length)
    layers = range(text["num_hidden_layers"])
    mlp = max(layer_geometry(text, index)[2] for index in layers)
    per_layer = len(layers) * text["hidden_size_per_layer_input"]
    experts = _expert_values(text)
    values = 3 * mlp + experts + 2 * per_layer + 6 * text["hidden_size"]
    masks = chunk * context_length + chunk * min(context_length, text["sliding_window"] + chunk)
    return 2 * chunk * values + masks + _growing_cache(text, context_length, chunk)


def _expert_values(text: dict) -> int:
    """Return the values per token of a mixture of experts: gate and up, product and result of each expert picked."""
    if not text["enable_moe_block"]:
        return 0
    return text["top_k_experts"] * (3 * text["moe_intermediate_size"] + 2 * text["hidden_size"])


def _growing_cache(text: dict, context_length: int, chunk: int) -> int:
    """Return what the cache takes for a moment beyond itself: a full layer's old and new keys and values together,
    and each sliding layer's chunk, which stays until the next one."""
    head_dim, kv_heads, _, _ = layer_geometry(text, text["layer_types"].index("full_attention"))
    longer = kv_cache_bytes(text, min(context_length, chunk + text["sliding_window"]))
    sliding_cap = kv_cache_bytes(text, min(context_length, text["sliding_window"]))
    return 2 * kv_heads * head_dim * 2 * context_length + longer - sliding_cap


def llama_cpp_compute_bytes(text: dict, context_length: int) -> int:
    """Return the bytes of llama.cpp's compute buffer, for a batch of 512 tokens in float32."""
    layers = range(text["num_hidden_layers"])
    mlp = max(layer_geometry(text, index)[2] for index in layers)
    per_layer = len(layers) * text["hidden_size_per_layer_input"]
    return 4 * LLAMA_CPP_BATCH * (2 * mlp + 2 * per_layer + 4 * text["hidden_size"])


def _built_in_activations(settings: MemorySettings) -> int:
    if settings.engine == "llama_cpp":
        return 100 * MIB
    return 4 * math.prod((min(PREFILL_CHUNK, settings.context_length), 3 * 1536 + 6 * 576)) + 64 * MIB
