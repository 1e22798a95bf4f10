"""Which settings fit the memory that is there: what a run of `finetune` is planned as, and its defaults."""

from dataclasses import replace

from torch import nn

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.environment import free_memory
from gemma_qat_kit.finetune.losses import CHUNK
from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.memory.parts import WEIGHTS
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.model import Model
from gemma_qat_kit.recording import settings_of

_ROOM = 0.7  # of the free memory: the rest is for what a plan does not know
# The fastest first. All four conversations of an update at once need each weight out of its blocks once.
_CHOICES = ({"batch_size": 4, "gradient_accumulation": 1, "gradient_checkpointing": False},
            {"batch_size": 4, "gradient_accumulation": 1, "gradient_checkpointing": True})  # fmt: skip


def memory_settings(
    model: Model, settings: FinetuneSettings, qat: str | None, longest: int | None = None
) -> MemorySettings | None:
    """Return what the plan of a run is made for, None of a model that is not in the catalog.

    Args:
        model: Of `gqk.load`.
        settings: Of the run.
        qat: As in `finetune`.
        longest: Tokens of the longest conversation, None where they are not known.
    """
    known = settings_of(model)
    is_packed = qat is not None and model.size != BUILT_IN_SIZE  # as the plan takes that one to be in any case
    format = "q4_0" if is_packed else known and known.format
    return known and replace(known, format=format, **_wanted(settings, longest))


def plan_run(
    model: Model | str, settings: FinetuneSettings, qat: str | None, longest: int | None = None
) -> tuple[MemoryPlan | None, int | None]:
    """Return the plan of a run and the bytes that are there for it, each None where nobody knows.

    Args:
        model: A loaded model, whose weights count as there; or a size that is not loaded yet.
        settings: Of the run.
        qat: As in `finetune`.
        longest: Tokens of the longest conversation, None where they are not known.
    """
    ram, gpu = free_memory()
    if isinstance(model, str):
        format = "float32" if model == BUILT_IN_SIZE else "q4_0"
        device = "cuda" if gpu else "cpu"
        wanted = _wanted(settings, longest) | {"format": format, "engine": "transformers", "device": device}
        plan = plan_for(MemorySettings(size=model, **wanted))
    else:
        wanted = memory_settings(model, settings, qat, longest)
        plan = wanted and plan_for(wanted)
    free = gpu.free_bytes if plan and plan.settings.device == "cuda" and gpu else ram
    if plan and not isinstance(model, str) and free:
        free += sum(p.nbytes for p in plan.placed if p.name in WEIGHTS and p.place == plan.settings.place)
    return plan, free


def _wanted(settings: FinetuneSettings, longest: int | None) -> dict:
    """Return what a plan takes from the settings of a run."""
    return {
        "task": "finetune",
        "batch_size": settings.batch_size,
        "sequence_length": min(settings.sequence_length, longest or settings.sequence_length),
        "gradient_accumulation": settings.gradient_accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "lora_rank": settings.rank,
        "lora_targets": settings.targets,
        "logits_chunk_length": CHUNK,
    }


def has_room(module: nn.Module, planned: MemorySettings | None) -> bool:
    """Tell whether a CPU can keep what a step frees for the next one, as much as a step takes."""
    if module.device.type != "cpu" or planned is None:
        return False
    return 2 * _work(planned) < _ROOM * (free_memory()[0] or 0)


def _work(planned: MemorySettings) -> int:
    """Return the bytes that training takes beside the weights."""
    return sum(p.nbytes for p in plan_for(planned).placed if p.name not in WEIGHTS and p.place == planned.place)


def fitting_settings(model: Model, qat: str | None, longest: int) -> FinetuneSettings:
    """Return the fastest settings whose plan fits what is free now; those that take least where nothing is known.

    Args:
        model: Of `gqk.load`.
        qat: As in `finetune`.
        longest: Tokens of the longest conversation.
    """
    ram, gpu = free_memory()
    for choice in _CHOICES:
        settings = FinetuneSettings(**choice)
        planned = memory_settings(model, settings, qat, longest)
        if planned is None:
            break
        free = gpu.free_bytes if planned.device == "cuda" and gpu else ram
        if free is not None and _work(planned) < _ROOM * free:
            return settings
    return FinetuneSettings()
