"""Stand-ins for `load` and `Model`, so that the widgets can be tested without one, and slowly enough to be stopped."""

import threading
import time
from types import SimpleNamespace

from gemma_qat_kit.catalog import Sampling
from gemma_qat_kit.generation import Delta, Finish, Stream
from gemma_qat_kit.memory.measure import MemoryUse
from gemma_qat_kit.memory.parts import Part
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.tools import ToolCall

_BITS = {"q8_0": 8.5, "mobile_int8": 8, "mobile_int4": 4, "mobile_int2": 2}  # 4.5 of the others


class StandIn:
    """A model that answers what it is told to, with a pause before each piece; a word is a token of its prompts."""

    size, format, runner, engine, drafter_note = "E2B", "q4_0", SimpleNamespace(takes=()), "stand-in", None
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=64)

    def __init__(self, name="stand-in", answer=("Light ", "scatters."), delay=0.0, context_length=4096):
        self.name, self.answer, self.delay, self.context_length = name, answer, delay, context_length
        self.asked, self.settings, self.is_closed = [], [], False

    def stream(self, messages, **settings):
        self.asked.append(messages)
        self.settings.append(settings)
        return Stream(StandInStream(self, self.num_tokens(messages)))

    def num_tokens(self, messages, *, thinking=False):
        return sum(len(str(message["content"]).split()) for message in messages)

    def queue(self):
        return None

    def memory(self):
        return MemoryUse((Part("text layers", 2**28, "ram"),))

    def close(self):
        self.is_closed = True


class StandInStream:
    def __init__(self, model, num_tokens):
        self.model, self.num_tokens, self.cancelled = model, num_tokens, threading.Event()

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
            yield piece if isinstance(piece, Delta | ToolCall) else Delta(piece)
        yield Finish("cancelled" if self.cancelled.is_set() else "stop", self.num_tokens, count)


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
