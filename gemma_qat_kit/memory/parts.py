"""The parts that memory is made of, under the same names in a plan and in a measurement, and the places they lie in."""

from collections.abc import Iterable
from dataclasses import dataclass

from gemma_qat_kit.units import GIB

# "gpu": the graphics card's memory. "ram": the process's own. "mapped": pages of a file that were read and that the
# system can take back. "disk": what stays in its file, of which rows are looked up.
PLACES = ("gpu", "ram", "mapped", "disk")
PLACE_LABELS = {"gpu": "GPU memory", "ram": "RAM, private", "mapped": "RAM, pages of the file", "disk": "left on disk"}

TEXT_LAYERS, TABLE, EMBEDDINGS = "text layers", "per-layer embeddings", "token embeddings and head"
VISION, AUDIO, DRAFTER = "vision", "audio", "drafter"
REPACKED = "text layers, repacked"  # llama.cpp's own copy of Q4_0 matrices in the order that its CPU kernels read
ADAPTERS, GRADIENTS, OPTIMIZER = "adapters", "gradients", "optimizer"
TEACHER = "teacher and best point"  # of QAT: the weights before quantization, and the codes of the best point so far
KEY_VALUES, ACTIVATIONS, LOGITS, ENGINE = "key/value cache", "activations", "logits", "engine"
WEIGHTS = (TEXT_LAYERS, REPACKED, EMBEDDINGS, TABLE, VISION, AUDIO, DRAFTER, ADAPTERS)
PARTS = (*WEIGHTS, KEY_VALUES, ACTIVATIONS, LOGITS, GRADIENTS, OPTIMIZER, TEACHER, ENGINE)
"""Every name, in the order to show them."""


@dataclass(frozen=True)
class Part:
    """So many bytes in one place.

    Attributes:
        name: One of `PARTS`.
        nbytes: Bytes.
        place: One of `PLACES`.
        is_spare: It runs as well without: pages that were read once, or of which a row now and then is looked up; and
            freed memory that a training loop keeps where there is room, which makes it faster.
    """

    name: str
    nbytes: int
    place: str
    is_spare: bool = False


@dataclass(frozen=True, repr=False)
class Parts:
    """What something takes, part by part; a plan and a measurement are both this.

    Attributes:
        placed: The parts, each name once per place.
    """

    placed: tuple[Part, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes in memory by name, in the order of `PARTS`; what is left on disk is not among them."""
        names = [name for name in PARTS if any(part.name == name and part.place != "disk" for part in self.placed)]
        return {name: sum(p.nbytes for p in self.placed if p.name == name and p.place != "disk") for name in names}

    def in_place(self, place: str) -> int:
        """Return the bytes in one of `PLACES`."""
        return sum(part.nbytes for part in self.placed if part.place == place)

    @property
    def total_bytes(self) -> int:
        """All that is in memory: GPU, private and mapped."""
        return sum(part.nbytes for part in self.placed if part.place != "disk")

    @property
    def needed_bytes(self) -> int:
        """Least memory that it runs well in: the total without what can stay on disk."""
        return sum(part.nbytes for part in self.placed if part.place != "disk" and not part.is_spare)

    def largest(self) -> Part:
        """Return the largest part that has to be in memory."""
        needed = (part for part in self.placed if part.place != "disk" and not part.is_spare)
        return max(needed, key=lambda part: part.nbytes)


def describe_parts(parts: Parts, how: str) -> str:
    """Return the parts as lines of text, largest first, each with its place, and their sum."""
    rows = sorted(parts.placed, key=lambda part: -part.nbytes)
    lines = [f"{p.name:<26}{p.nbytes / GIB:>9.3f} GiB  {PLACE_LABELS[p.place]}" for p in rows if p.nbytes]
    return "\n".join([*lines, f"{f'total in memory, {how}':<26}{parts.total_bytes / GIB:>9.3f} GiB"])


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Add up parts of the same name, place and kind, in the order of `PARTS`; empty ones are left out."""
    sums: dict[tuple[str, str, bool], int] = {}
    for part in parts:
        key = part.name, part.place, part.is_spare
        sums[key] = sums.get(key, 0) + part.nbytes
    rows = sorted(sums.items(), key=lambda row: (PARTS.index(row[0][0]), PLACES.index(row[0][1])))
    return tuple(Part(name, nbytes, place, spare) for (name, place, spare), nbytes in rows if nbytes)
