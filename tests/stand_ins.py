"""Stand-ins for `load` and `Model`, so that the widgets can be tested without one, and slowly enough to be stopped."""

import threading
import time
from types import SimpleNamespace

from gemma_qat_kit.generation import Delta
from gemma_qat_kit.progress import Progress

_BITS = {"q8_0": 8.5, "mobile_int8": 8, "mobile_int4": 4, "mobile_int2": 2}  # 4.5 of the others


class StandIn:
    """A model that answers what it is told to, with a pause before each piece."""

    def __init__(self, name="stand-in", answer=("Light ", "scatters."), delay=0.0):
        self.name, self.answer, self.delay, self.asked, self.is_closed = name, answer, delay, [], False

    def stream(self, messages, **options):
        self.asked.append(messages)
        return StandInStream(self)

    def close(self):
        self.is_closed = True


class StandInStream:
    def __init__(self, model):
        self.model, self.cancelled = model, threading.Event()
        self.reply = None

    def cancel(self):
        self.cancelled.set()

    def __iter__(self):
        count = 0
        for piece in self.model.answer:
            if isinstance(piece, Exception):
                raise piece
            if self.cancelled.wait(self.model.delay):
                break
            count += 1
            yield piece if isinstance(piece, Delta) else Delta(piece)
        reason = "cancelled" if self.cancelled.is_set() else "stop"
        self.reply = SimpleNamespace(
            new_tokens=count, tokens_per_second=12.345, first_token_seconds=0.25, finish_reason=reason
        )


class Loader:
    """Stands in for `load`: reports two moments, waits for `gate`, returns or raises what it was told to."""

    def __init__(self):
        self.calls, self.models, self.gate, self.error = [], [], threading.Event(), None
        self.gate.set()

    def load(self, size, format, *, report):
        self.calls.append((size, format))
        report(Progress("downloading", 2**29, 2**30))
        self.gate.wait(5)
        report(Progress("loading", 2**30, 2**30))
        if self.error:
            raise self.error
        self.models.append(StandIn(f"{size} {format}"))
        return self.models[-1]


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def click(button):
    """Press a button as a person does."""
    button._click_handlers(button)


def format_row(method):
    """A row of a FormatTable whose divergence follows from its bits."""
    from gemma_qat_kit.quality.comparison import Comparison
    from gemma_qat_kit.quality.format_table import FormatRow
    from gemma_qat_kit.quality.post_training import QuantizedSize

    bits = _BITS.get(method, 4.5)
    quality = Comparison("q", "r", "<text>", 0.9, 10.0**-bits, 1.0, 3.1, 3.0, 255, 256)
    return FormatRow(method, QuantizedSize(int(bits * 2**17), 2**20), quality, {"layer": 20.0})
