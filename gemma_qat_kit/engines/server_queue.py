"""How many answers a server computes and how many wait for a place, from the figures that it gives to monitors."""

import math
from collections import Counter
from dataclasses import dataclass

# Their names in llama.cpp's and in vLLM's /metrics; vLLM has a line for each of its engines.
_BUSY = ("llamacpp:requests_processing", "vllm:num_requests_running")
_WAITING = ("llamacpp:requests_deferred", "vllm:num_requests_waiting")
_TOKENS = ("llamacpp:tokens_predicted_total", "vllm:generation_tokens_total")


@dataclass(frozen=True)
class Queue:
    """What a server does at this moment; as text, a line to show.

    Attributes:
        busy: Answers that it computes.
        waiting: Questions that wait for a place, the first to come first; llama.cpp counts those that were cancelled
            until it would be their turn.
        places: Answers that it can compute at once, None where it does not say.
        new_tokens: Tokens of all answers since it started, those that have not ended left out by llama.cpp.
    """

    busy: int
    waiting: int
    places: int | None = None
    new_tokens: int | None = None

    def __str__(self) -> str:
        answering = f"{self.busy} answering" if self.places is None else f"{self.busy} of {self.places} places busy"
        return f"{answering}, {self.waiting or 'none'} waiting"


def parse_queue(metrics: str, places: int | None = None) -> Queue | None:
    """Read a queue from a server's metrics.

    Args:
        metrics: In Prometheus' text format, `name{labels} value` a line; the values of one name are added up.
        places: Answers that the server can compute at once, if known.

    Returns:
        The queue, None where the metrics do not tell.

    Source: Prometheus' "Exposition formats"; tools/server/README.md of llama.cpp; vLLM's "Production metrics".
    """
    figures: Counter[str] = Counter()
    for line in metrics.splitlines():
        name, _, value = line.partition("}" if "{" in line else " ")
        try:
            number = float(value.split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(number) and number >= 0:
            figures[name.partition("{")[0]] += int(number)
    busy, waiting, new_tokens = (_first(figures, names) for names in (_BUSY, _WAITING, _TOKENS))
    return None if busy is None or waiting is None else Queue(busy, waiting, places, new_tokens)


def _first(figures: Counter[str], names: tuple[str, ...]) -> int | None:
    return next((figures[name] for name in names if name in figures), None)
