"""What an engine takes to compute with, beside weights and cache: sums over the tensors that live at the peak.

Widths and counts come from the config. The few constants are measured (`bench/memory_measured.py` prints what they
miss by) and named for what they stand for.
"""

from gemma_qat_kit.memory.key_values import KEPT_MIB, LLAMA_CPP_BATCH, checkpoint_bytes, kv_cache_bytes, rounded_up
from gemma_qat_kit.memory.network import Network, find_network
from gemma_qat_kit.memory.parts import ACTIVATIONS, ENGINE, LOGITS, Part
from gemma_qat_kit.memory.settings import KV_FORMATS, MemorySettings
from gemma_qat_kit.memory.training import FLOAT32, compute_bytes, unpacked_bytes

MIB = 2**20
PREFILL_CHUNK = 512  # tokens of a prompt that transformers computes at once
UNPACK_CHUNK = 2**22  # weights of a mobile matrix that are unpacked at once
# Measured in fresh processes on Linux: torch and transformers imported and a model's thousands of modules made; the
# pages of their shared libraries. llama.cpp: its child process, whose tokenizer grows with the vocabulary.
TRANSFORMERS_RAM, TRANSFORMERS_LIBRARIES = 300 * MIB, 116 * MIB
LLAMA_CPP_RAM, LLAMA_CPP_LIBRARIES, _TOKEN_BYTES = 12 * MIB, 19 * MIB, 190
CUDA_CONTEXT = 512 * MIB  # an estimate: a T4's driver takes 0.3 to 0.5 GiB before the first tensor, cuBLAS the rest
_LLAMA_CPP_INPUTS = 32 * 1024  # token ids, positions and the like
_MALLOC_SLACK = 1.3  # freed blocks that glibc keeps, over the tensors that live at once
_UNPACKING_BYTES = 12  # per weight of a mobile matrix: int2 or int4 codes, int8, the stack of them, two bf16 products


def engine_parts(settings: MemorySettings) -> list[Part]:
    """Return what an engine takes beside what it computes with; libraries are pages of files."""
    if settings.engine == "llama_cpp":
        ram, libraries = LLAMA_CPP_RAM + _TOKEN_BYTES * find_network(settings).vocab, LLAMA_CPP_LIBRARIES
    else:
        ram, libraries = TRANSFORMERS_RAM, TRANSFORMERS_LIBRARIES
    parts = [Part(ENGINE, ram, "ram"), Part(ENGINE, libraries, "mapped")]
    return [*parts, Part(ENGINE, CUDA_CONTEXT, "gpu")] if settings.device == "cuda" else parts


def chat_parts(settings: MemorySettings) -> list[Part]:
    """Return activations and logits at the peak of an answer: the last chunk of the longest prompt."""
    place, network = settings.place, find_network(settings)
    if settings.engine == "llama_cpp":
        kept = checkpoint_bytes(network, settings.context_length, KV_FORMATS[settings.kv_format])
        kept += KEPT_MIB * MIB if settings.batch_size > 1 else 0
        return [
            Part(ACTIVATIONS, llama_cpp_compute_bytes(network, settings.context_length), place),
            Part(LOGITS, FLOAT32 * network.vocab * settings.batch_size, "ram"),
            Part(ENGINE, kept * settings.batch_size, "ram"),
        ]
    activations = prefill_bytes(network, settings) * settings.batch_size
    if settings.is_packed:
        activations += unpacked_bytes(network, settings)
    if settings.format == "mobile":
        activations += _UNPACKING_BYTES * UNPACK_CHUNK
    if settings.device == "cpu":
        activations = round(activations * _MALLOC_SLACK)
    # The last token's logits in 16 bits, in float32, and capped; sampling sorts and copies them.
    return [Part(ACTIVATIONS, activations, place), Part(LOGITS, 24 * network.vocab * settings.batch_size, place)]


def prefill_bytes(network: Network, settings: MemorySettings) -> int:
    """Return the bytes of the tensors that live at once while transformers computes one chunk of a prompt."""
    length = settings.context_length
    chunk, value = min(PREFILL_CHUNK, length), compute_bytes(settings)
    widest = max(3 * layer.mlp + 3 * layer.experts + 2 * layer.num_experts * network.hidden for layer in network.layers)
    values = widest + 2 * len(network.layers) * network.per_layer + 6 * network.hidden
    masks = chunk * length + chunk * min(length, network.window + chunk)
    return value * chunk * values + masks + _growing_cache(network, length, chunk, value)


def _growing_cache(network: Network, length: int, chunk: int, value: int) -> int:
    """Return what the cache takes for a moment beyond itself: a full layer's old and new keys and values together,
    and each sliding layer's chunk, which stays until the next one."""
    full = max(layer.key for layer in network.layers if layer.is_full)
    caps = (min(length, network.window + more) for more in (chunk, 0))
    with_chunk, without = (kv_cache_bytes(network, cap, bytes_per_value=value) for cap in caps)
    return 2 * full * value * length + with_chunk - without


def llama_cpp_compute_bytes(network: Network, context_length: int) -> int:
    """Return the bytes of llama.cpp's compute buffer for a batch of 512 tokens.

    Float32 values per token and 16-bit masks, as llama.cpp reports them for each size and four context lengths; which
    tensors share memory follows from its graph and differs with experts and per-layer embeddings.
    """
    hidden, mlps = network.hidden, {layer.mlp for layer in network.layers}
    layer = network.layers[0]
    if layer.num_experts:
        values = 2 * layer.experts + (layer.num_experts + 7) * hidden
    elif network.per_layer:
        values = 2 * sum(mlps) + 2 * len(network.layers) * network.per_layer + 5 * hidden
    else:
        values = 2 * max(mlps) + 9 * hidden
    length = rounded_up(context_length)
    masked = length + min(length, rounded_up(network.window + LLAMA_CPP_BATCH)) * _any_sliding(network)
    return LLAMA_CPP_BATCH * (FLOAT32 * values + 2 * masked) + _LLAMA_CPP_INPUTS


def _any_sliding(network: Network) -> bool:
    """Tell whether some layers see a window only."""
    return not all(layer.is_full for layer in network.layers)
