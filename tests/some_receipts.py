"""Receipts of made-up runs, and the lines they are kept as."""

import json

from gemma_qat_kit.memory.parts import ENGINE, KEY_VALUES, TEXT_LAYERS, Part, Parts
from gemma_qat_kit.memory.receipts import record

MIB = 2**20
MEASURED = Parts((Part(TEXT_LAYERS, 80 * MIB, "gpu"), Part(ENGINE, 20 * MIB, "ram")))
PREDICTED = Parts((Part(TEXT_LAYERS, 84 * MIB, "gpu"), Part(KEY_VALUES, 6 * MIB, "gpu"), Part(ENGINE, 15 * MIB, "ram"),
                   Part(TEXT_LAYERS, 500 * MIB, "disk")))  # fmt: skip


def keep(event="chat", size="E2B", format="q4_0", predicted=PREDICTED, measured=MEASURED, **numbers):
    record(event, {"size": size, "format": format, "context_length": 4096}, predicted, measured, **numbers)


def line_with(**changes):
    """A good line with other values in it."""
    data = {"version": 1, "when": "2026-01-02T03:04:05Z", "event": "chat", "machine": {}, "libraries": {},
            "settings": {"size": "E2B", "format": "q4_0"}, "predicted": None,
            "measured": [[ENGINE, "ram", MIB]], "numbers": {}}  # fmt: skip
    return json.dumps(data | changes).encode() + b"\n"


GOOD = line_with()
