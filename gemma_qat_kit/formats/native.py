"""Build, cache and call the C kernels of the formats, on every core of a CPU.

The machine's own compiler builds a kernel the first time it is used, in about two seconds, into the kit's cache folder.
Where there is no compiler, or with GEMMA_QAT_KIT_NATIVE=0, the formats compute the same bytes with torch, slower, and
this module says so once.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gemma_qat_kit.formats.groups import LARGEST, not_usable
from gemma_qat_kit.machine import read_cpu_count

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the enum in the C files
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("q4_0.c", "learned.c"))
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_VALUES_A_CALL = 2**20  # enough for a thread to be worth waking, and Ctrl-C comes between two
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


class SlowKernelsWarning(UserWarning):
    """The fast kernels could not be built; everything works, several times slower."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, built on first use, or None (after a warning) where they cannot be had."""
    if os.environ.get("GEMMA_QAT_KIT_NATIVE") == "0":
        return None
    try:
        return _loaded(_built())
    except (OSError, subprocess.SubprocessError) as err:
        warnings.warn(
            f"The fast kernels could not be built ({_reason(err)}); torch computes the same bytes, slower. "
            "A C compiler (gcc or clang) mends that.",
            SlowKernelsWarning,
            stacklevel=3,
        )
        return None


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # damaged: the next start builds it again
        raise
    kernels = [f"q4_0_{name}" for name in ("quantize", "fake_quantize", "dequantize", "recover", "importance")]
    for name in (*kernels, "learned_forward", "learned_backward"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def _built() -> Path:
    """Return the shared library for this processor, compiling it if the cache does not have it."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler on PATH")
    # A home folder may be shared by machines of several kinds, and -march=native is for this one.
    sources = [source.read_text(encoding="utf-8") for source in _SOURCES]
    facts = (*sources, *_FLAGS, compiler, platform.machine(), _processor_features())
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    home = Path(os.environ.get("GEMMA_QAT_KIT_HOME") or "~/.cache/gemma_qat_kit").expanduser()
    target = home / "kernels" / f"formats-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(draft), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    return target


def _processor_features() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _reason(err: Exception) -> str:
    said = (getattr(err, "stderr", None) or "").strip().splitlines()
    if isinstance(err, subprocess.CalledProcessError):
        return said[0][:200] if said else f"{err.cmd[0]} ended with code {err.returncode}"
    return str(err)[:200]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(read_cpu_count(), thread_name_prefix="gemma_qat_kit")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of its parent's threads


def can_run(tensor: torch.Tensor) -> bool:
    """Tell whether the kernels take this tensor: in this machine's memory, and built."""
    return tensor.device.type == "cpu" and library() is not None


def run(
    kernel: str,
    source: torch.Tensor,
    *arguments: int,
    target: torch.Tensor,
    group_size: int,
    multiple: int = 1,
    beside: tuple[torch.Tensor, ...] = (),
    results: tuple[torch.Tensor, ...] = (),
    tail: Callable[[], object] | None = None,
    name: str = "This tensor",
) -> list:
    """Run a kernel over all groups of a tensor, on all cores, as
    `kernel(source, *beside, *arguments, count, target, *results[, tail])`.

    Args:
        kernel: Name of the C function; it returns the first group that it cannot use, or -1.
        source: Contiguous, a multiple of `group_size` elements.
        arguments: Handed on between the source and the count.
        target: Contiguous, as many groups as the source.
        group_size: Elements of the source in a group.
        multiple: Groups that stay together (those of a row, where a kernel needs whole rows).
        beside: More sources, contiguous, with as many groups.
        results: More targets, likewise.
        tail: Makes the last argument of each call, or None for kernels without one.
        name: What an error calls the source.

    Returns:
        The tails, one a call.

    Raises:
        BadTensorError: A group cannot be used; the message names its first such value.
    """
    num_groups, function = source.numel() // group_size, getattr(library(), kernel)
    inputs, outputs = (source, *beside), (target, *results)
    size = max(1, _VALUES_A_CALL // group_size // multiple) * multiple

    def call(first: int) -> tuple[int, object]:
        places = [ctypes.c_void_p(t.data_ptr() + first * (t.nbytes // num_groups)) for t in (*inputs, *outputs)]
        count = ctypes.c_int64(min(size, num_groups - first))
        last = [tail()] if tail else []
        sources, targets = places[: len(inputs)], places[len(inputs) :]
        bad = function(*sources, *arguments, count, *targets, *map(ctypes.byref, last))
        return (-1 if bad < 0 else first + bad), *last

    pool = _threads() if num_groups > size else None
    results = list((pool.map if pool else map)(call, range(0, num_groups, size)))
    if unusable := [bad for bad, *_ in results if bad >= 0]:
        raise _first_unusable(source, min(unusable) * group_size, group_size, name)
    return [last[0] for _, *last in results if last]


def _first_unusable(source: torch.Tensor, start: int, group_size: int, name: str):
    group = source.flatten()[start : start + group_size].float()
    return not_usable(source, name, start + int(torch.nonzero(~(group.abs() < LARGEST))[0]))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor, in huge pages where it is large: faults on small ones cost more than the work."""
    tensor = torch.empty(shape, dtype=dtype)
    if _HUGE_PAGES is not None and tensor.nbytes >= 2**23:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _HUGE_PAGES)  # advice: a refusal costs speed
    return tensor


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
