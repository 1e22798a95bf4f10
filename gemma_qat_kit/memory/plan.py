"""What a model will take in memory, added up from its tensor list before a download: no torch, no network."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE, find_checkpoint
from gemma_qat_kit.memory.key_values import kv_cache_bytes
from gemma_qat_kit.memory.parts import KEY_VALUES, Part, Parts, describe_parts, merged
from gemma_qat_kit.memory.settings import KV_FORMATS, MemorySettings, check_context_length
from gemma_qat_kit.memory.weights import weight_parts
from gemma_qat_kit.memory.work import chat_parts, engine_parts

BUILT_IN_CONTEXT = 8192
_BUILT_IN_KV_VALUES = 30 * 3 * 64 * 2  # layers * key/value heads * head_dim * (keys, values)


@dataclass(frozen=True, repr=False)
class MemoryPlan(Parts):
    """Predicted bytes, part by part, at the peak of a task.

    Attributes:
        settings: What the plan is made for.
        download_bytes: Bytes of the weight files, which they take on disk, too; None where nobody knows.
        load_peak_bytes: Most memory at once while it is loaded.
    """

    settings: MemorySettings
    download_bytes: int | None
    load_peak_bytes: int

    def __str__(self) -> str:
        return describe_parts(self, "predicted")

    __repr__ = __str__

    def fits(self, available_bytes: int) -> bool:
        """Tell whether it runs in so many bytes."""
        return self.needed_bytes <= available_bytes


def plan_memory(size: str, format: str | None = None, *, device: str | None = None, **settings) -> MemoryPlan:
    """Predict the memory that a checkpoint takes, without torch and without a download.

    Args:
        size: A size of the catalog.
        format: A format of the catalog; None as in `find_checkpoint`.
        device: "cuda" or "cpu"; None takes what the format is for: a GPU for what runs in transformers, the CPU for
            the GGUF and the built-in model.
        **settings: The other attributes of `MemorySettings`: `task`, `context_length`, …

    Raises:
        UnknownNameError: Unknown size, format, task, optimizer, …
        NotPublishedError: There is no such checkpoint.
        BadSettingError: A number that cannot be used, or settings that exclude each other.
    """
    row = find_checkpoint(size, format)
    device = device or ("cpu" if row.engine == "llama_cpp" or row.size == BUILT_IN_SIZE else "cuda")
    engine = settings.pop("engine", None) or row.engine
    return plan_for(MemorySettings(row.size, row.format, engine, device, **settings))


def plan_for(settings: MemorySettings) -> MemoryPlan:
    """Predict the memory for settings that are written out; see `plan_memory`."""
    row = find_checkpoint(settings.size, settings.format)
    _check(settings)
    parts = merged(_parts(settings))
    return MemoryPlan(parts, settings, row.weights_bytes, _load_peak(settings))


def _parts(settings: MemorySettings) -> Iterator[Part]:
    yield from weight_parts(settings)
    yield from engine_parts(settings)
    yield Part(KEY_VALUES, _kv_bytes(settings), "gpu" if settings.device == "cuda" else "ram")
    yield from chat_parts(settings)


def longest_context(settings: MemorySettings) -> int:
    """Return the most tokens that a model takes."""
    if settings.size == BUILT_IN_SIZE:
        return BUILT_IN_CONTEXT
    return hf_config(settings.size)["text_config"]["max_position_embeddings"]


def _check(settings: MemorySettings) -> None:
    """Refuse what a model or engine cannot do."""
    check_context_length(settings.context_length, longest_context(settings))


def _kv_bytes(settings: MemorySettings) -> int:
    if settings.size == BUILT_IN_SIZE:
        bytes_per_value = 4 if settings.format == "float32" else KV_FORMATS[settings.kv_format]
        return round(_BUILT_IN_KV_VALUES * bytes_per_value * settings.context_length) * settings.batch_size
    return kv_cache_bytes(
        hf_config(settings.size)["text_config"],
        settings.context_length,
        engine=settings.engine,
        bytes_per_value=KV_FORMATS[settings.kv_format],
        batch_size=settings.batch_size,
    )


def _load_peak(settings: MemorySettings) -> int:
    """Return the most memory at once while the weights are read."""
    return sum(part.nbytes for part in (*weight_parts(settings), *engine_parts(settings)) if part.place != "disk")
