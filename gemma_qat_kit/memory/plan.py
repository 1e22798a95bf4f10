"""What a model will take in memory, added up from its tensor list before a download: no torch, no network."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from gemma_qat_kit.catalog import BUILT_IN_SIZE, Checkpoint, find_checkpoint
from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.memory.advice import cheaper_settings
from gemma_qat_kit.memory.key_values import kv_cache_bytes
from gemma_qat_kit.memory.loading import load_peak_bytes, loaded_parts
from gemma_qat_kit.memory.network import find_network
from gemma_qat_kit.memory.parts import KEY_VALUES, Part, Parts, describe_parts, merged
from gemma_qat_kit.memory.settings import KV_FORMATS, MemorySettings, check_context_length, check_tokens
from gemma_qat_kit.memory.training import trained_weights, training_parts
from gemma_qat_kit.memory.weights import projector_bytes, reads_projector, weight_parts, written_bytes
from gemma_qat_kit.memory.work import chat_parts, engine_parts

_TRAINABLE = ("bf16", "q4_0-unquantized", "float32")


class Memory(Protocol):
    """A machine's memory in bytes; None where nobody knows."""

    gpu_bytes: int | None
    ram_bytes: int | None


@dataclass(frozen=True, repr=False)
class MemoryPlan(Parts):
    """Predicted bytes, part by part, at the peak of a task.

    Attributes:
        settings: What the plan is made for.
        download_bytes: Bytes of the weight files, which they take on disk, too; None where nobody knows.
        written_bytes: Bytes of the file that is written beside them at the first load: a mobile checkpoint's GGUF.
        loaded: What of it is there once the model is loaded, before the first question.
        load_peak_bytes: Most memory at once while it is loaded.
    """

    settings: MemorySettings
    download_bytes: int | None
    written_bytes: int
    loaded: Parts
    load_peak_bytes: int

    def __str__(self) -> str:
        return describe_parts(self, "predicted")

    __repr__ = __str__

    @property
    def needed(self) -> dict[str, int]:
        """Bytes that have to be there: in "gpu" memory, and in "ram", private or pages of the file."""
        parts = [part for part in self.placed if not part.is_spare]
        places = {"gpu": ("gpu",), "ram": ("ram", "mapped")}
        return {name: sum(p.nbytes for p in parts if p.place in those) for name, those in places.items()}

    def fits(self, budget: "int | Memory") -> bool:
        """Tell whether it runs in a budget.

        Args:
            budget: Bytes of the memory of its device, or a machine with `gpu_bytes` and `ram_bytes`
                (`memory.budgets`); of None, nobody knows how much there is, so it refuses nothing.
        """
        if isinstance(budget, int):
            return self.needed["gpu" if self.settings.device == "cuda" else "ram"] <= budget
        there = {"gpu": budget.gpu_bytes, "ram": budget.ram_bytes}
        return all(there[name] is None or nbytes <= there[name] for name, nbytes in self.needed.items())

    def cheaper(self, budget: "int | Memory | None" = None) -> list[tuple[str, "MemoryPlan"]]:
        """Return what to change for less memory, in words, with the plan that results; the least loss first.

        Args:
            budget: As in `fits`: only what fits then; where no single change is enough, changes are added up.
        """
        smaller = list(self._smaller())
        if budget is None:
            return smaller
        fitting = [step for step in smaller if step[1].fits(budget)]
        return fitting or self._added_up(budget)

    def _smaller(self) -> Iterator[tuple[str, "MemoryPlan"]]:
        """Yield single changes that take less of the memory that is used most."""
        where = max(self.needed, key=self.needed.get)
        for words, settings in cheaper_settings(self.settings):
            with contextlib.suppress(KitError):  # what such a model or engine cannot do
                plan = plan_for(settings)
                if plan.needed[where] < self.needed[where]:
                    yield words, plan

    def _added_up(self, budget: "int | Memory") -> list[tuple[str, "MemoryPlan"]]:
        """Return the shortest row of changes that fits, or nothing."""
        said, plan = [], self
        while (step := next(plan._smaller(), None)) is not None:
            said, plan = [*said, step[0]], step[1]
            if plan.fits(budget):
                return [(", ".join(said), plan)]
        return []


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
    engine = settings.pop("engine", None) or usual_engine(row, settings.get("task", "chat"))
    device = device or ("cpu" if engine == "llama_cpp" or row.size == BUILT_IN_SIZE else "cuda")
    return plan_for(MemorySettings(row.size, row.format, engine, device, **settings))


def usual_engine(row: Checkpoint, task: str = "chat") -> str:
    """Return what runs a checkpoint where nothing else is asked for: a Gemma is trained in transformers only."""
    return row.engine if task == "chat" or row.size == BUILT_IN_SIZE else "transformers"


def plan_for(settings: MemorySettings) -> MemoryPlan:
    """Predict the memory for settings that are written out; see `plan_memory`."""
    check_possible(settings)
    row = None if settings.config else find_checkpoint(settings.size, settings.format)
    weights, engine = weight_parts(settings), engine_parts(settings)
    if settings.task == "chat":
        work = [Part(KEY_VALUES, _kv_bytes(settings), settings.place), *chat_parts(settings)]
    else:
        work = [*trained_weights(settings), *training_parts(settings)]
    placed = merged([*weights, *engine, *work])
    loaded = loaded_parts(settings, placed)
    peak = load_peak_bytes(settings, loaded)
    return MemoryPlan(placed, settings, _download_bytes(row, settings), written_bytes(settings), Parts(loaded), peak)


def _download_bytes(row: Checkpoint | None, settings: MemorySettings) -> int | None:
    if row is None or row.weights_bytes is None or not reads_projector(settings):
        return row and row.weights_bytes
    return row.weights_bytes + projector_bytes(row.size)


def check_possible(settings: MemorySettings) -> None:
    """Refuse what a model or its engine cannot do.

    Raises:
        BadSettingError: The message says which settings exclude each other, or what the model's limit is.
    """
    longest = find_network(settings).longest_context
    check_context_length(settings.context_length, longest)
    check_tokens("sequence_length", settings.sequence_length, longest)
    if settings.task != "chat" and settings.engine != "transformers":
        raise BadSettingError(
            f"{settings.size} {settings.format} cannot be trained: it runs in {settings.engine}.",
            "Training needs transformers.",
            'Leave the engine out, or plan it with "q4_0-unquantized" or "float32".',
        )
    if settings.task == "qat" and settings.format not in _TRAINABLE:
        raise BadSettingError(
            f"{settings.format} weights cannot be trained: they are packed.",
            f"QAT starts from {', '.join(_TRAINABLE)}.",
            'Take "q4_0-unquantized", or task="finetune", which trains adapters beside them.',
        )
    if settings.kv_format != "bf16" and settings.engine != "llama_cpp":
        raise BadSettingError(
            f"{settings.engine} has no key/value cache in {settings.kv_format}.",
            "llama.cpp has one, for q4_0 and mobile.",
            'Leave kv_format="bf16", or take one of these formats in llama.cpp.',
        )


def _kv_bytes(settings: MemorySettings) -> int:
    return kv_cache_bytes(
        find_network(settings),
        settings.context_length,
        engine=settings.engine,
        bytes_per_value=4 if settings.format == "float32" else KV_FORMATS[settings.kv_format],
        batch_size=settings.batch_size,
    )
