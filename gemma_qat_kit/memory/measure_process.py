"""One look at memory: what a process and its children hold in RAM, and torch on the GPUs. It imports no torch."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PROC = "/proc"
# The kernel keeps these counts, so reading them takes microseconds. smaps_rollup walks every page, and counts pages of
# a file that nobody else maps as private.
_COUNTS = re.compile(rb"^Rss(Anon|Shmem|File):\s+(\d+) kB$", re.MULTILINE)


class ProcessMemory(NamedTuple):
    """Bytes in RAM.

    Attributes:
        ram: The process's own: heap, stacks, shared memory.
        mapped: Pages of files, which the system can take back. Of two processes that map the same pages, each counts
            them. 0 where the system does not tell them apart (macOS, Windows): they are in `ram` then.
    """

    ram: int
    mapped: int


class GpuMemory(NamedTuple):
    """Bytes that torch takes on all GPUs: in tensors, in its allocator, most in tensors since the last reset."""

    allocated: int
    reserved: int
    peak: int


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment, place by place.

    Attributes:
        seconds: From the start of the measurement.
        gpu: In torch's tensors, without what its allocator keeps free and the driver's own.
        ram: Private memory of this process and its children.
        mapped: Pages of files in RAM.
        gpu_reserved: What torch's allocator holds on the GPUs, its tensors included.
    """

    seconds: float
    gpu: int
    ram: int
    mapped: int
    gpu_reserved: int = 0

    def in_place(self, place: str) -> int:
        """Return the bytes in one of `parts.PLACES`; nothing measured is on "disk"."""
        return 0 if place == "disk" else getattr(self, place)

    @property
    def total_bytes(self) -> int:
        """GPU, private and mapped together."""
        return self.gpu + self.ram + self.mapped


def process_memory(pid: int | None = None, children: bool = True) -> ProcessMemory | None:
    """Return what a process and its children hold in RAM, None where that cannot be read.

    Args:
        pid: Of the process; None means this one.
        children: With the processes it started, and theirs.
    """
    pid = os.getpid() if pid is None else pid
    return add_up(pid, child_pids(pid) if children else ())


def add_up(pid: int, others: Iterable[int]) -> ProcessMemory | None:
    """Return what a process and others hold together; of the others, those that have ended count nothing."""
    own = _read(pid)
    if own is None:
        return None
    found = [own, *filter(None, map(_read, others))]
    return ProcessMemory(sum(memory.ram for memory in found), sum(memory.mapped for memory in found))


def _read(pid: int) -> ProcessMemory | None:
    """Read one process: from the kernel's own counts, else through psutil."""
    counts = {name: int(count) * 1024 for name, count in _COUNTS.findall(_read_bytes(f"{PROC}/{pid}/status"))}
    if len(counts) < 3:
        return _read_with_psutil(pid)
    return ProcessMemory(counts[b"Anon"] + counts[b"Shmem"], counts[b"File"])


def _read_with_psutil(pid: int) -> ProcessMemory | None:
    try:
        import psutil

        memory = psutil.Process(pid).memory_info()
    except Exception:  # not installed, ended, not ours, or a system it cannot read
        return None
    shared = getattr(memory, "shared", 0)
    return ProcessMemory(memory.rss - shared, shared)


def child_pids(pid: int) -> Sequence[int]:
    """Return the processes that a process started, and those that they started; none where that cannot be read."""
    if not os.path.exists(f"{PROC}/self/task/{os.getpid()}/children"):  # a kernel may be built without
        return _child_pids_with_psutil(pid)
    found = []
    for task in _names(f"{PROC}/{pid}/task"):
        for child in map(int, _read_bytes(f"{PROC}/{pid}/task/{task}/children").split()):
            found += [child, *child_pids(child)]
    return found


def _child_pids_with_psutil(pid: int) -> Sequence[int]:
    try:
        import psutil

        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except Exception:  # as above
        return ()


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the process has ended
        return []


def _read_bytes(path: str) -> bytes:
    """Read a small file of the kernel's in one piece, with as few calls as can be: each waits for the GIL."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(file, 2**16)
    except OSError:  # it ended in between
        return b""
    finally:
        os.close(file)


def _cuda():
    """Return torch.cuda where somebody has started it: asking an idle one would take its context's half GiB."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_started = getattr(cuda, "is_initialized", None)  # torch may be half imported, in another thread
    return cuda if is_started is not None and is_started() else None


def gpu_memory() -> GpuMemory:
    """Return what torch takes on all GPUs; zeros without torch or before it uses CUDA."""
    cuda, sums = _cuda(), [0, 0, 0]
    try:
        for device in range(cuda.device_count() if cuda else 0):
            stats = cuda.memory_stats_as_nested_dict(device)
            if stats:  # empty for a device that was never used
                allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
                for i, nbytes in enumerate((allocated["current"], reserved["current"], allocated["peak"])):
                    sums[i] += nbytes
    except (RuntimeError, KeyError):  # after a CUDA error every call fails
        return GpuMemory(0, 0, 0)
    return GpuMemory(*sums)


def reset_gpu_peak() -> None:
    """Let torch count its peak from now on."""
    cuda = _cuda()
    try:
        for device in range(cuda.device_count() if cuda else 0):
            if cuda.memory_stats_as_nested_dict(device):
                cuda.reset_peak_memory_stats(device)
    except RuntimeError:  # as above
        return
