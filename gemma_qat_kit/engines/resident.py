"""Which bytes of the files that a process maps are in RAM: from Linux's own page tables, to the page."""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_NOT_PRESENT = bytes(range(128))  # the highest bit of a page's entry says that it is in RAM


class Mapping(NamedTuple):
    """Addresses [start, end) that show a file from `offset` on."""

    start: int
    end: int
    offset: int
    path: str


@dataclass(frozen=True)
class FilePages:
    """The files that a process maps.

    Attributes:
        pid: Of the process, or "self".
        mappings: In the order of their addresses; none where the system does not tell.
    """

    pid: int | str
    mappings: tuple[Mapping, ...]

    def at(self, address: int) -> Mapping | None:
        """Return the mapping that an address lies in, None for memory that is no file's."""
        return next((m for m in self.mappings if m.start <= address < m.end), None)

    def of(self, path: str) -> tuple[Mapping, ...]:
        """Return the mappings of one file."""
        return tuple(mapping for mapping in self.mappings if mapping.path == os.path.realpath(path))

    def resident_bytes(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Return how much of each range (address, bytes) is in this process's RAM; all where nothing tells."""
        ranges = list(ranges)
        try:
            pages = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY)
        except OSError:
            return [nbytes for _, nbytes in ranges]
        try:
            return [_resident(pages, *each) for each in ranges]
        finally:
            os.close(pages)


def file_pages(pid: int | str = "self") -> FilePages:
    """Look at the files that a process maps."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n").split(maxsplit=5) for line in file]
    except OSError:
        return FilePages(pid, ())
    found = []
    for addresses, _, offset, _, inode, *path in lines:
        if path and inode != "0":
            start, end = (int(text, 16) for text in addresses.split("-"))
            found.append(Mapping(start, end, int(offset, 16), path[0]))
    return FilePages(pid, tuple(found))


def _resident(pages: int, start: int, nbytes: int) -> int:
    """Count the bytes of a range whose pages are in RAM; `pages` is the open page map, 8 bytes a page."""
    if nbytes == 0:
        return 0
    end, first = start + nbytes, start // mmap.PAGESIZE
    count = -(-end // mmap.PAGESIZE) - first
    flags = os.pread(pages, 8 * count, 8 * first)[7::8]
    found = len(flags.translate(None, _NOT_PRESENT)) * mmap.PAGESIZE
    if flags and flags[0] >= 128:
        found -= start % mmap.PAGESIZE
    if len(flags) == count and flags[-1] >= 128:
        found -= -end % mmap.PAGESIZE
    return found
