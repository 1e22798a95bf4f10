"""Memory as it is: what this process and its children hold now, apart by place."""

from dataclasses import dataclass

from gemma_qat_kit.memory.parts import Parts, describe_parts


@dataclass(frozen=True, repr=False)
class MemoryUse(Parts):
    """Measured bytes, part by part, of a loaded model."""

    def __str__(self) -> str:
        return describe_parts(self, "measured")

    __repr__ = __str__
