"""Settings that take less memory, the least loss first: what to change when something does not fit."""

from collections.abc import Iterator
from dataclasses import replace

from gemma_qat_kit.catalog import BUILT_IN_FORMAT, BUILT_IN_SIZE, SIZES, find_checkpoint
from gemma_qat_kit.errors import NotPublishedError
from gemma_qat_kit.memory.settings import MemorySettings

Step = tuple[str, MemorySettings]
# Formats that lose less than the next one, of those that take less memory than 16 bits.
_CHAT_FORMATS = {"bf16": ("q4_0", "int8", "nf4", "mobile"), "q4_0-unquantized": ("q4_0", "mobile"),
                 "w4a16": ("q4_0", "mobile"), "int8": ("nf4", "mobile"), "nf4": ("mobile",),
                 "mobile": ("q4_0",), "q4_0": ()}  # fmt: skip


def cheaper_settings(settings: MemorySettings) -> Iterator[Step]:
    """Yield single changes with their words, the least loss first. Not every one takes less: plan them and see."""
    yield from _without_loss(settings)
    yield from _chat(settings) if settings.task == "chat" else _training(settings)
    yield from _formats(settings)
    yield from _sizes(settings)


def _without_loss(settings: MemorySettings) -> Iterator[Step]:
    """What changes no result, only speed, or leaves out what a text needs not."""
    if settings.engine == "transformers" and settings.per_layer_table != "disk":
        yield "leave the per-layer table on disk", replace(settings, per_layer_table="disk")
    if not settings.gradient_checkpointing and settings.task != "chat":
        yield "gradient checkpointing", replace(settings, gradient_checkpointing=True)
    if settings.task != "chat" and (settings.logits_chunk_length or 2**20) > 128:
        yield "logits in chunks of 128 tokens", replace(settings, logits_chunk_length=128)
    if settings.drafter:
        yield "no drafter", replace(settings, drafter=False)
    if not settings.text_only:
        yield "text only", replace(settings, text_only=True)


def _chat(settings: MemorySettings) -> Iterator[Step]:
    if settings.engine == "llama_cpp" and settings.kv_format == "bf16":
        yield "key/value cache in q8_0", replace(settings, kv_format="q8_0")
    yield from _halved(settings, "batch_size", 1)
    yield from _halved(settings, "context_length", 1024)


def _training(settings: MemorySettings) -> Iterator[Step]:
    if settings.optimizer == "adamw":
        yield "8-bit optimizer", replace(settings, optimizer="adamw_8bit")
    if settings.task == "qat" and settings.teacher == "memory":
        yield 'the teacher\'s likeliest words (teacher="cache")', replace(settings, teacher="cache")
    yield from _halved(settings, "batch_size", 1)
    yield from _halved(settings, "sequence_length", 256)
    if settings.task == "qat":
        yield "adapters instead of all weights (finetune)", replace(settings, task="finetune")


def _halved(settings: MemorySettings, name: str, smallest: int) -> Iterator[Step]:
    """Yield half and a quarter of a number."""
    for value in (getattr(settings, name) // 2, getattr(settings, name) // 4):
        if value >= smallest:
            yield f"{name}={value}", replace(settings, **{name: value})


def _formats(settings: MemorySettings) -> Iterator[Step]:
    others = _CHAT_FORMATS.get(settings.format, ()) if settings.task == "chat" else ()
    if settings.task == "finetune" and settings.format in ("bf16", "q4_0-unquantized"):
        others = ("q4_0", "int8", "nf4")
    for format in others:
        if (changed := _moved(settings, settings.size, format)) is not None:
            yield f"{settings.size} {format}", changed


def _sizes(settings: MemorySettings) -> Iterator[Step]:
    """Yield the same format in smaller sizes, then the built-in model."""
    if settings.size not in SIZES or settings.size == BUILT_IN_SIZE:
        return
    for size in reversed(SIZES[: SIZES.index(settings.size)]):
        for format in dict.fromkeys((settings.format, "q4_0-unquantized" if settings.task == "qat" else "q4_0")):
            if (changed := _moved(settings, size, format)) is not None:
                yield f"{size} {format}", changed
    format = BUILT_IN_FORMAT if settings.task == "chat" else "float32"
    if (changed := _moved(settings, BUILT_IN_SIZE, format)) is not None:
        yield f"{BUILT_IN_SIZE} {format}", changed


def _moved(settings: MemorySettings, size: str, format: str) -> MemorySettings | None:
    """Return the settings for another checkpoint, None where it does not exist or cannot take them."""
    try:
        row = find_checkpoint(size, format)
    except NotPublishedError:
        return None
    if row.unavailable:
        return None
    engine = row.engine if settings.task == "chat" else "transformers"
    is_llama = engine == "llama_cpp"
    changes = {"size": row.size, "format": row.format, "engine": engine, "config": None}
    if is_llama or size == BUILT_IN_SIZE:
        changes |= {"drafter": False, "text_only": True, "per_layer_table": "disk"}
    if not is_llama:
        changes["kv_format"] = "bf16"
    return replace(settings, **changes)
