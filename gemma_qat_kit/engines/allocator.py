"""What glibc's allocator is told, so that memory that torch frees on a CPU goes back to the system.

As it comes, glibc raises the size above which a block is mapped by itself, up to 32 MB, with every such block that is
freed. Smaller tensors then come from a heap that only shrinks at its end: after a few layers most of it is holes.
Fine-tuning SmolLM2 on 1,024 tokens took 1,960 MB that way, of which 1,000 were in use.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_USUAL_MMAP_MAX, _USUAL_TRIM_THRESHOLD = 65536, 2**17
_LARGE_BYTES = 2**20  # mapped by itself, so that freeing it gives it back; costs 6 % of the time of a training step


@functools.cache
def give_freed_memory_back() -> bool:
    """Map every block of a megabyte or more by itself, from now on in this process; return whether that was possible.

    Other C libraries than glibc do something of the kind on their own, or have no such setting.
    """
    try:
        return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES) == 1
    except (OSError, AttributeError, TypeError):
        return False


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let a training loop use its memory again at each step, and give all of it back when the block ends.

    Pages that come from the system must be cleared first: without them a step of QAT on SmolLM2, 512 tokens, took 4.9 s
    instead of 6.9. In return the peak was 5.2 GiB instead of 3.8.
    """
    try:
        libc = ctypes.CDLL(None)
        is_glibc = libc.mallopt(_M_MMAP_MAX, 0) == 1 and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
    except (OSError, AttributeError, TypeError):
        is_glibc = False
    try:
        yield
    finally:
        if is_glibc:
            libc.mallopt(_M_MMAP_MAX, _USUAL_MMAP_MAX)
            libc.mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD)
            libc.malloc_trim(0)
