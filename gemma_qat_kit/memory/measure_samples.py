"""Looks at memory over time: a bounded number of them, however long it takes, and the most that was seen."""

import threading
from dataclasses import dataclass

from gemma_qat_kit.memory.measure_process import Moment

PLACES_IN_MEMORY = ("ram", "mapped", "gpu")
MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Peak:
    """The most that was seen.

    Attributes:
        moment: When the total was highest.
        gpu: Most in torch's tensors, at whatever moment; torch counts it exactly, also between two looks.
        ram: Most private memory.
        mapped: Most pages of files.
    """

    moment: Moment
    gpu: int
    ram: int
    mapped: int

    def in_place(self, place: str) -> int:
        """Return the most bytes in one of `parts.PLACES`, each at its own moment; nothing measured is on "disk"."""
        return 0 if place == "disk" else getattr(self, place)

    @property
    def total_bytes(self) -> int:
        """Most bytes together at one moment, at most the sum of the places."""
        return max(self.moment.total_bytes, self.gpu)


class Samples:
    """What was seen so far. When there are too many, each two become the higher one, and later ones stand for more."""

    def __init__(self):
        self.first: Moment | None = None
        self.newest: Moment | None = None
        self._highest: Moment | None = None
        self._most = dict.fromkeys(PLACES_IN_MEMORY, 0)
        self._kept: list[Moment] = []
        self._stride, self._in_last = 1, 0  # looks that one kept sample stands for, and those in the last one so far
        self._lock = threading.Lock()  # the sampler's thread adds, others add and read

    def add(self, moment: Moment) -> None:
        """Take one more look into account; one that is older than the newest comes too late."""
        with self._lock:
            if self.newest is not None and moment.seconds < self.newest.seconds:
                return
            self.first, self.newest = self.first or moment, moment
            self._highest = _higher(self._highest or moment, moment)
            for place in PLACES_IN_MEMORY:
                self._most[place] = max(self._most[place], moment.in_place(place))
            self._keep(moment)

    def add_gpu_peak(self, nbytes: int) -> None:
        """Take torch's own peak into account."""
        with self._lock:
            self._most["gpu"] = max(self._most["gpu"], nbytes)

    def _keep(self, moment: Moment) -> None:
        if self._in_last % self._stride == 0:
            self._kept.append(moment)
            self._in_last = 0
        else:
            self._kept[-1] = _higher(self._kept[-1], moment)
        self._in_last += 1
        if len(self._kept) > MOST_SAMPLES:
            self._kept = [_higher(*self._kept[i : i + 2]) for i in range(0, len(self._kept), 2)]
            self._in_last, self._stride = self._stride, 2 * self._stride  # the last one had no other

    @property
    def all(self) -> tuple[Moment, ...]:
        """The samples kept, oldest first, between the first look and the newest."""
        with self._lock:
            ends = (self.first, self.newest) if self.first else ()
            between = [m for m in self._kept if all(m is not end for end in ends)]
            return tuple(dict.fromkeys((*ends[:1], *between, *ends[1:])))

    @property
    def peak(self) -> Peak | None:
        """The most at once, None where nothing was seen."""
        with self._lock:
            return Peak(self._highest, **self._most) if self._highest else None


def _higher(moment: Moment, *others: Moment) -> Moment:
    return max((moment, *others), key=lambda moment: moment.total_bytes)
