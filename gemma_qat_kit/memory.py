"""What a model will take in memory, added up from its tensor list before a download, and what it takes once loaded.

Weights and key/value cache are exact sums; the engine's own buffers are an estimate and say so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE, find_checkpoint
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.layouts import Tensor, bf16_tensors, gguf_tensors, head_shape, is_text, mobile_tensors
from gemma_qat_kit.parameters import layer_geometry
from gemma_qat_kit.units import GIB

# Beside weights and cache, an estimate. transformers: 0.3 GiB for it and torch, about 0.5 GiB for a CUDA context, the
# rest activations. llama.cpp: its compute buffers at a batch of 512.
ENGINE_BYTES = {"transformers": 3 * 2**29, "llama_cpp": 2**29}
# Of the built-in model in transformers: measured at its peak, while loading, 0.6 GiB beside the weights on a CPU.
BUILT_IN_ENGINE_BYTES = 3 * 2**28
# transformers unpacks the mobile head whole at every token: int8 codes, their bfloat16 copy and the product.
UNPACKED_HEAD_BYTES = 4
_BUILT_IN_KV_VALUES = 30 * 3 * 64 * 2  # layers * key/value heads * head_dim * (keys, values)
_BUILT_IN_PARAMETERS = 134_515_008  # HuggingFaceTB/SmolLM2-135M-Instruct, as the hub counts them
_BITS = {"nf4": 4.5, "int8": 8}  # bitsandbytes: a float32 scale per 64 weights; a row scale is a rounding error


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes, part by part.

    Attributes:
        parts: Name of a part to its bytes in memory.
        download_bytes: Bytes of the weight files, None where nobody knows.
        on_disk: Parts that llama.cpp reads row by row and may leave on disk.
    """

    parts: dict[str, int]
    download_bytes: int | None
    on_disk: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def resident_bytes(self) -> int:
        """Least memory that it runs in: the total without what can stay on disk."""
        return self.total_bytes - sum(self.parts[name] for name in self.on_disk)

    def fits(self, available_bytes: int) -> bool:
        """Tell whether it runs in so many bytes."""
        return self.resident_bytes <= available_bytes

    def __str__(self) -> str:
        return describe_parts(self.parts, "predicted")


@dataclass(frozen=True)
class MemoryUse:
    """Measured bytes, part by part, of a loaded model."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return describe_parts(self.parts, "measured")


def describe_parts(parts: dict[str, int], how: str) -> str:
    """Return the parts as lines of text, largest first, with their sum."""
    rows = [*sorted(parts.items(), key=lambda row: -row[1]), (f"total, {how}", sum(parts.values()))]
    return "\n".join(f"{name:<24}{nbytes / GIB:>9.3f} GiB" for name, nbytes in rows)


def plan_memory(
    size: str, format: str | None = None, *, context_length: int = 4096, text_only: bool = True
) -> MemoryPlan:
    """Predict the memory that a checkpoint takes for chat, without torch and without a download.

    Args:
        size: A size of the catalog.
        format: A format of the catalog; None as in `find_checkpoint`.
        context_length: Tokens of prompt and answer together.
        text_only: Without the vision and audio towers.

    Raises:
        UnknownNameError: Unknown size or format.
        NotPublishedError: There is no such checkpoint.
        BadSettingError: `context_length` is not a positive integer or is beyond the model's.
    """
    row = find_checkpoint(size, format)
    if row.size == BUILT_IN_SIZE:
        check_context_length(context_length, 8192)
        is_float32 = row.format == "float32"
        weights = {"text layers": 4 * _BUILT_IN_PARAMETERS if is_float32 else row.weights_bytes}
        kv_bytes = _BUILT_IN_KV_VALUES * (4 if is_float32 else 2) * context_length
    else:
        config = hf_config(row.size, row.format if row.format == "mobile" else "bf16")
        check_context_length(context_length, config["text_config"]["max_position_embeddings"])
        weights = _add_up(_in_memory(config, row.format), row.format, text_only)
        kv_bytes = kv_cache_bytes(config, context_length)
        if row.format == "mobile":
            weights["head, unpacked"] = UNPACKED_HEAD_BYTES * math.prod(head_shape(config))
    engine_bytes = BUILT_IN_ENGINE_BYTES if row.format == "float32" else ENGINE_BYTES[row.engine]
    parts = weights | {"key/value cache": kv_bytes, "engine": engine_bytes}
    tables = ("per-layer embeddings",) if row.engine == "llama_cpp" and "per-layer embeddings" in parts else ()
    return MemoryPlan(parts, row.weights_bytes, tables)


def check_context_length(context_length: int, longest: int) -> None:
    """Refuse what is no number of tokens that a model takes.

    Raises:
        BadSettingError: Not an integer from 1 to `longest`.
    """
    is_count = isinstance(context_length, Integral) and not isinstance(context_length, bool)
    if not is_count or not 1 <= context_length <= longest:
        raise BadSettingError(
            f"context_length={context_length!r} cannot be used.",
            f"This model takes 1 to {longest:,} tokens.",
            f"Try context_length={min(longest, 4096)}.",
        )


def _in_memory(config: dict, format: str) -> Iterator[Tensor]:
    """Yield the tensors that are in memory once a checkpoint is loaded and has run."""
    if format == "q4_0":
        return gguf_tensors(config)
    if format == "mobile":
        used = {tensor.name for tensor in bf16_tensors(config, has_shared_kv=False)}
        return (t for t in mobile_tensors(config) if not _is_shared_kv(t.name, used) and "_cache_scale" not in t.name)
    # compressed-tensors unpacks w4a16 to bf16 at the first forward, so that is what it takes.
    return bf16_tensors(config, has_shared_kv=False)


def _is_shared_kv(name: str, used: set[str]) -> bool:
    """Tell a stored key or value projection that no layer uses."""
    module = name.rpartition(".")[0]
    return module.endswith((".k_proj", ".v_proj")) and module + ".weight" not in used


def _add_up(tensors: Iterator[Tensor], format: str, text_only: bool) -> dict[str, int]:
    parts: dict[str, int] = {}
    for tensor in tensors:
        part = _part_of(tensor.name)
        if not (text_only and part in ("vision", "audio")):
            parts[part] = parts.get(part, 0) + _nbytes(tensor, format)
    return parts


def _nbytes(tensor: Tensor, format: str) -> int:
    is_linear = tensor.name.endswith(("_proj.weight", "_projection.weight", "per_layer_input_gate.weight"))
    if format in _BITS and is_text(tensor.name) and is_linear:
        return int(tensor.num_values * _BITS[format] / 8)
    return tensor.nbytes


def _part_of(name: str) -> str:
    """Return the part of the plan that a tensor belongs to, whatever its layout's naming."""
    if "embed_tokens_per_layer" in name or "per_layer_token_embd" in name:
        return "per-layer embeddings"
    if "embed_tokens" in name or "token_embd" in name or name.startswith("lm_head"):
        return "token embeddings and head"
    if "vision" in name:
        return "vision"
    return "audio" if "audio" in name else "text layers"


def kv_cache_bytes(config: dict, context_length: int) -> int:
    """Return the bytes of a 16-bit key/value cache: sliding layers keep their window, shared ones keep nothing."""
    text = config["text_config"]
    total = 0
    for index, kind in enumerate(text["layer_types"]):
        head_dim, kv_heads, _, is_shared = layer_geometry(text, index)
        kept = context_length if kind == "full_attention" else min(context_length, text["sliding_window"])
        total += 0 if is_shared else 2 * kv_heads * head_dim * 2 * kept
    return total
