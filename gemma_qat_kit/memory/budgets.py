"""The machines that people have, as bytes to spend, and whether a plan has room on them."""

import functools
from dataclasses import dataclass, replace

from gemma_qat_kit.catalog import find_checkpoint
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.units import GIB, readable_bytes

_DRIVER = 0.4  # GiB of a card that its driver keeps


@dataclass(frozen=True)
class Budget:
    """The memory of a machine; None stands for what is not known.

    Attributes:
        name: What people call it.
        gpu_bytes: What torch can use of one graphics card; 0 where there is none.
        num_gpus: Cards. A model lies on one: a second one does not help.
        ram_bytes: RAM.
        disk_bytes: Free disk for downloads.
        downloaded: Repositories that need no disk, since they are there already.
    """

    name: str
    gpu_bytes: int | None
    num_gpus: int
    ram_bytes: int | None
    disk_bytes: int | None
    downloaded: frozenset[str] = frozenset()


def _card(gigabytes: int) -> Budget:
    return Budget(f"{gigabytes} GB card", round((gigabytes - _DRIVER) * GIB), 1, None, None)


T4 = Budget("T4 (Colab)", round(14.56 * GIB), 1, round(12.67 * GIB), 70 * GIB)
TWO_T4 = Budget("2×T4 (Kaggle)", round(14.56 * GIB), 2, 29 * GIB, None)
BINDER = Budget("Binder", 0, 0, 2 * 10**9, None)
KNOWN = (BINDER, T4, TWO_T4, _card(8), _card(12), _card(16), _card(24))
"""Budgets to plan for. Colab and Kaggle as torch and psutil see them there; Binder's limit is 2 GB."""


def this_machine() -> Budget:
    """Return what is free here and now: of the GPU that torch would take, of RAM and of the disk for downloads.

    A container's limit counts where it is lower than the machine's memory. What cannot be read is None.
    """
    from gemma_qat_kit.environment import environment

    here = environment()
    gpu_bytes, num_gpus = (here.gpu.free_bytes, len(here.gpus)) if here.gpu else (0, 0)
    return Budget(
        "This machine, free", gpu_bytes, num_gpus, here.ram_available_bytes, here.disk_free_bytes, here.downloaded
    )


@dataclass(frozen=True)
class Need:
    """What a plan wants of one memory, and what is there.

    Attributes:
        memory: "GPU memory", "RAM" or "disk".
        nbytes: Bytes needed.
        there_bytes: Bytes there, None where nobody knows.
    """

    memory: str
    nbytes: int
    there_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether there are so many; None where nobody knows."""
        return None if self.there_bytes is None else self.nbytes <= self.there_bytes


@dataclass(frozen=True)
class Room:
    """Whether a plan fits a budget.

    Attributes:
        budget: The machine.
        plan: The plan made for the device that it would run on there.
        needs: What it wants of each memory, that of the device first.
    """

    budget: Budget
    plan: MemoryPlan
    needs: tuple[Need, ...]

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.plan.settings.device

    @property
    def fits(self) -> bool | None:
        """False where anything known is too small, None where the device's own memory is not known."""
        if any(need.fits is False for need in self.needs):
            return False
        return self.needs[0].fits

    @property
    def words(self) -> str:
        """What is missing or left, as in "needs 1.20 GiB more GPU memory"."""
        short = [need for need in self.needs if need.fits is False]
        if short:
            return "needs " + " and ".join(_shortage(need) for need in short)
        first = self.needs[0]
        if first.fits is None:
            return f"needs {readable_bytes(first.nbytes)} of {first.memory}, how much there is is not known"
        return f"fits, {readable_bytes(first.there_bytes - first.nbytes)} of {first.memory} left"

    @property
    def note(self) -> str:
        """What else there is to know, or nothing."""
        is_unused = self.device == "cuda" and self.budget.num_gpus > 1
        return "One card counts: a model is not spread over two here." if is_unused else ""


def room(plan: MemoryPlan | MemorySettings, budget: Budget, device: str | None = None) -> Room:
    """Tell whether something fits a machine, planned for the device that it would run on there.

    Args:
        plan: A plan, or the settings of one. Its own device does not count.
        budget: The machine.
        device: "cuda" or "cpu"; None takes the GPU for what runs in transformers where there is one, and for a GGUF
            the CPU (llama.cpp's wheels on the package index have no GPU code) unless only a card is known.

    Raises:
        KitError: Whatever `plan_for` raises.
    """
    settings = plan.settings if isinstance(plan, MemoryPlan) else plan
    wanted = device or _device(settings, budget)
    made = plan if isinstance(plan, MemoryPlan) and settings.device == wanted else cached_plan(settings, wanted)
    return Room(budget, made, _needs(made, budget))


def cached_plan(settings: MemorySettings, device: str) -> MemoryPlan:
    """Return the plan for a device; one that was made before is not made again."""
    return _plan(replace(settings, device=device))


_plan = functools.lru_cache(512)(plan_for)


def _device(settings: MemorySettings, budget: Budget) -> str:
    is_on_gpu = settings.engine == "transformers" or budget.ram_bytes is None
    return "cuda" if budget.num_gpus and is_on_gpu else "cpu"


def _needs(plan: MemoryPlan, budget: Budget) -> tuple[Need, ...]:
    needed = [part for part in plan.placed if not part.is_spare]
    gpu = Need("GPU memory", sum(p.nbytes for p in needed if p.place == "gpu"), budget.gpu_bytes)
    ram = Need("RAM", sum(p.nbytes for p in needed if p.place in ("ram", "mapped")), budget.ram_bytes)
    on_device = (gpu, ram) if plan.settings.device == "cuda" else (ram,)
    return (*on_device, *_disk_needs(plan, budget))


def _disk_needs(plan: MemoryPlan, budget: Budget) -> tuple[Need, ...]:
    """Return what the download takes, where that is known and not there already."""
    if plan.settings.config is not None:  # a checkpoint that lies on disk
        return ()
    row = find_checkpoint(plan.settings.size, plan.settings.format)
    is_here = row.repo_id is None or row.repo_id in budget.downloaded
    if is_here or plan.download_bytes is None or budget.disk_bytes is None:
        return ()
    return (Need("disk", plan.download_bytes + plan.written_bytes, budget.disk_bytes),)


def _shortage(need: Need) -> str:
    if need.memory == "GPU memory" and not need.there_bytes:
        return "a GPU"
    return f"{readable_bytes(need.nbytes - need.there_bytes)} more {need.memory}"
