"""Which formats will work on a machine, in which sizes, and why not the others; judged before any download."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gemma_qat_kit.catalog import BUILT_IN_SIZE, KNOWN_FORMATS, Checkpoint, catalog, find_checkpoint
from gemma_qat_kit.machine import Gpu
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import readable_bytes

# What each engine needs beside the checkpoint's own list; the bounds are those of pyproject.toml.
ENGINE_REQUIRES = {"transformers": ("torch>=2.6", "transformers>=5.15", "accelerate>=1.0"), "llama_cpp": ()}


class Machine(Protocol):
    """What a verdict needs to know of a machine; `environment.Environment` knows it."""

    ram_available_bytes: int | None
    disk_free_bytes: int | None
    gpu: Gpu | None
    gpus: tuple[Gpu, ...]
    libraries: Mapping[str, str | None]
    downloaded: frozenset[str]


@dataclass(frozen=True)
class FormatVerdict:
    """Whether a format works here, in which sizes, and in words how, or why not and what to do."""

    format: str
    works: bool
    sizes: tuple[str, ...]
    reason: str


def judge_formats(here: Machine) -> tuple[FormatVerdict, ...]:
    """Judge every format for a machine, in the catalog's order, the built-in model last."""
    return tuple(_judge(format, here) for format in KNOWN_FORMATS)


def missing_requirements(here: Machine) -> list[str]:
    """List what this machine lacks for checkpoints that would fit it, as in "bitsandbytes>=0.48", each once."""
    rows = (row for row in catalog(role="chat") if row.is_available and _device(row, here))
    needs = (need for row in rows for need in _lacks(row, here.libraries))
    return list(dict.fromkeys(needs))


def needed_bytes(row: Checkpoint, device: str = "cpu") -> int:
    """Return the least memory of a device that a checkpoint answers in, by the plan for a short conversation."""
    plan = plan_memory(row.size, row.format, device=device, context_length=2048)
    return plan.needed["gpu" if device == "cuda" else "ram"]


def _judge(format: str, here: Machine) -> FormatVerdict:
    rows = [row for row in catalog(format=format, role="chat") if row.is_available]
    fitting = [row for row in rows if _device(row, here)]
    if not fitting:
        return FormatVerdict(format, False, (), _why_too_big(rows[0], here))
    ready = {row.size: _device(row, here) for row in fitting if not _lacks(row, here.libraries)}
    if not ready:
        lacks = with_versions(_lacks(fitting[0], here.libraries), here.libraries)
        return FormatVerdict(format, False, (), f"needs {lacks}; then {', '.join(row.size for row in fitting)}")
    return FormatVerdict(format, True, tuple(ready), _how(format, ready, here))


def _device(row: Checkpoint, here: Machine) -> str | None:
    """Where the checkpoint would run, None where memory or disk is too small for it."""
    return _memory_for(row, here) if _has_disk(row, here) else None


def _memory_for(row: Checkpoint, here: Machine) -> str | None:
    """Name the memory that is big enough: "GPU", "CPU" (also where free memory is unknown) or None."""
    if row.engine == "transformers" and here.gpu and needed_bytes(row, "cuda") <= here.gpu.free_bytes:
        return "GPU"
    return "CPU" if here.ram_available_bytes is None or needed_bytes(row) <= here.ram_available_bytes else None


def _has_disk(row: Checkpoint, here: Machine) -> bool:
    if row.repo_id is None or row.repo_id in here.downloaded or here.disk_free_bytes is None:
        return True
    return _disk_bytes(row) <= here.disk_free_bytes


def _disk_bytes(row: Checkpoint) -> int:
    """Bytes of the download, and of what is written beside it."""
    return row.weights_bytes + plan_memory(row.size, row.format).written_bytes


def _how(format: str, devices: dict[str, str], here: Machine) -> str:
    """Say where the sizes run, and what to expect of it."""
    on_gpu = "on the GPU" if not here.gpu or here.gpu.has_bf16 else "on the GPU in float16"
    on_cpu = [size for size, device in devices.items() if device == "CPU"]
    if not on_cpu:
        words = on_gpu
    elif len(on_cpu) == len(devices):
        words = "on the CPU"
    else:
        words = f"{on_gpu}, but {', '.join(on_cpu)} on the CPU"
    if format == "q4_0" and here.gpu:
        words += "; on the GPU with a CUDA build of xllamacpp"
    more = {"mobile": "; re-blocked once, then as q4_0", "w4a16": "; unpacked to 16 bits in memory"}
    return words + more.get(format, "")


def _why_too_big(row: Checkpoint, here: Machine) -> str:
    """Say what the smallest size lacks, and what to do."""
    if _memory_for(row, here):
        size, free = readable_bytes(_disk_bytes(row)), readable_bytes(here.disk_free_bytes)
        return f"{row.size} takes {size} on disk, disk {free} free; free some or set HF_HOME to a bigger disk"
    free = f"RAM {readable_bytes(here.ram_available_bytes)}"
    if here.gpu:
        free += f" and GPU {readable_bytes(here.gpu.free_bytes)}"
    return f"{row.size} needs about {readable_bytes(needed_bytes(row))}, {free} free; {_instead(row, here)}"


def _instead(row: Checkpoint, here: Machine) -> str:
    """Name the nearest thing that does work here."""
    for smaller in (*(find_checkpoint("E2B", format) for format in ("q4_0", "mobile")), find_checkpoint(BUILT_IN_SIZE)):
        if smaller != row and _device(smaller, here):
            return f"take {smaller.size if smaller.size == BUILT_IN_SIZE != row.size else smaller.key}"
    return "close other notebooks or take a machine with more"


def _lacks(row: Checkpoint, libraries: Mapping[str, str | None]) -> list[str]:
    """List the requirements of a checkpoint that are missing or too old; of two for one library, the stricter."""
    strictest: dict[str, str] = {}
    for need in (*ENGINE_REQUIRES[row.engine], *row.requires):
        name, _, minimum = need.partition(">=")
        strictest[name] = max(strictest.get(name, "0"), minimum, key=_release)
    needs = (f"{name}>={minimum}" for name, minimum in strictest.items())
    return [need for need in needs if not _is_met(need, libraries)]


def _is_met(requirement: str, libraries: Mapping[str, str | None]) -> bool:
    name, _, minimum = requirement.partition(">=")
    version = libraries.get(name)
    return version is not None and _release(version) >= _release(minimum)


def _release(version: str) -> tuple[int, ...]:
    """Read the numbers of a version, as in "2.11.0+cu128" -> (2, 11, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number)


def with_versions(needs: Iterable[str], libraries: Mapping[str, str | None]) -> str:
    """Join requirements to one text, each with the version that is here, as in "transformers>=5.15 (here: 5.0.0)"."""
    named = []
    for need in needs:
        version = libraries.get(need.partition(">=")[0])
        named.append(f"{need} (here: {version})" if version else need)
    return ", ".join(named)
