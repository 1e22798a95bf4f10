"""The memory that llama.cpp says it allocates, read from its log."""

import re
from typing import NamedTuple

from gemma_qat_kit.memory.parts import (
    ACTIVATIONS,
    DRAFTER,
    KEY_VALUES,
    LOGITS,
    REPACKED,
    TEXT_LAYERS,
    VISION,
    Part,
    merged,
)
from gemma_qat_kit.memory.work import MIB

# "load_tensors:   CPU_Mapped model buffer size =    92.10 MiB"
_LINE = re.compile(r"(\w+): +(\S+) +(model|KV|compute|output) buffer size += +([\d.]+) MiB")
_NAMES = {"KV": KEY_VALUES, "compute": ACTIVATIONS, "output": LOGITS}


class Buffer(NamedTuple):
    """One line: who allocated what kind of buffer on which device, in bytes (rounded to 0.01 MiB)."""

    caller: str
    device: str
    kind: str
    nbytes: int

    @property
    def is_projectors(self) -> bool:
        """Whether the multimodal projector computes with it: one for what sees, one for what hears."""
        return self.caller.endswith("_compute_meta")


def find_buffers(log: str) -> tuple[Buffer, ...]:
    """Return the buffers that a log tells of; of compute buffers that were made again, the last."""
    found, made_again = [], {}
    for caller, device, kind, mib in _LINE.findall(log):
        buffer = Buffer(caller, device, kind, round(float(mib) * MIB))
        if kind == "compute" and not buffer.is_projectors:
            made_again[caller, device] = buffer
        else:
            found.append(buffer)
    return (*found, *made_again.values())


def buffer_parts(log: str) -> tuple[Part, ...]:
    """Return the buffers as parts. The weights count as text layers: llama.cpp does not say which tensor is where.

    A drafter's come last; what it computes with counts as its own, and keys and values it reads from the model.
    """
    log, _, of_drafter = log.partition("loading draft model")
    parts = [Part(_name(buffer), buffer.nbytes, _place(buffer)) for buffer in find_buffers(log)]
    return merged([*parts, *(Part(DRAFTER, buffer.nbytes, _place(buffer)) for buffer in find_buffers(of_drafter))])


def _name(buffer: Buffer) -> str:
    if buffer.kind == "model":
        return REPACKED if buffer.device.endswith("_REPACK") else TEXT_LAYERS
    return VISION if buffer.is_projectors else _NAMES[buffer.kind]


def _place(buffer: Buffer) -> str:
    """Return where a device's memory lies: CUDA_Host is RAM that a GPU can read."""
    if buffer.device.endswith("_Mapped"):
        return "mapped"
    return "ram" if buffer.device.startswith("CPU") or buffer.device.endswith("_Host") else "gpu"
