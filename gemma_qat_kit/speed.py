"""How fast a model can be here at most: memory is read once for every token, and it has a speed of its own."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.machine import read_cpu_count, read_memory
from gemma_qat_kit.memory.settings import check_tokens
from gemma_qat_kit.memory.traffic import kv_bytes_per_token, weight_bytes_per_token
from gemma_qat_kit.model import Model
from gemma_qat_kit.recording import settings_of
from gemma_qat_kit.units import readable_bytes

_USUAL_TOKENS = 512  # of a conversation, where nothing is said
_BYTES = 2**28  # to read; more where a cache could hold that
_MOST_BYTES = 2**29
_SECONDS = 0.6
_PIECES = 8  # for each thread, so that one that is held up leaves the rest to the others
_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class SpeedLimit:
    """What one token reads, and what the memory of this machine lets through.

    Attributes:
        weight_bytes: Of the weights that a token is multiplied with, the head among them; without what is looked up
            and experts that it is not sent to.
        kv_bytes: Of the keys and values that it attends to.
        num_tokens: Tokens that the conversation has by then.
        bytes_per_second: Measured speed of reading this memory.
        place: "RAM" or "GPU memory".
    """

    weight_bytes: int
    kv_bytes: int
    num_tokens: int
    bytes_per_second: float
    place: str

    @property
    def bytes_per_token(self) -> int:
        """Weights, keys and values."""
        return self.weight_bytes + self.kv_bytes

    @property
    def tokens_per_second(self) -> float:
        """The limit: bandwidth over bytes per token. A drafter that guesses right may pass it, nothing else."""
        return self.bytes_per_second / self.bytes_per_token

    def __str__(self) -> str:
        return (
            f"at most {self.tokens_per_second:.3g} tokens/s: {readable_bytes(self.bytes_per_token)} a token, "
            f"{self.place} read at {self.bytes_per_second / 1e9:.3g} GB/s (measured)"
        )


def speed_limit(model: Model, *, num_tokens: int = _USUAL_TOKENS) -> SpeedLimit:
    """Return how many tokens a second the memory of this machine allows a loaded model, one conversation at a time.

    Every new token is multiplied with all weights once, so tokens/s cannot exceed bandwidth / bytes per token. The
    bandwidth is measured at the first call of a session, in about a second; on a GPU by torch, else by numpy.

    Args:
        model: A model of `gqk.load`.
        num_tokens: Tokens of the conversation by then; more of them are more keys and values to read.

    Raises:
        BadSettingError: A server, whose machine is not this one; a model that is not in the catalog; a number of
            tokens that the model does not take.
    """
    settings = settings_of(model)
    if settings is None:
        raise BadSettingError(
            f"What a token of {model.name} reads is not known.",
            "It is for what the catalog has, loaded on this machine.",
            'Ask for a model such as gqk.load("E2B", "q4_0").',
        )
    check_tokens("num_tokens", num_tokens, model.context_length)
    is_on_gpu = settings.device == "cuda"
    return SpeedLimit(
        weight_bytes_per_token(settings),
        kv_bytes_per_token(settings, num_tokens),
        num_tokens,
        gpu_bandwidth(str(model.runner.device)) if is_on_gpu else ram_bandwidth(),
        "GPU memory" if is_on_gpu else "RAM",
    )


@functools.cache
def ram_bandwidth() -> float:
    """Measure how many bytes of RAM all cores together read in a second: the best of several passes, without torch."""
    import numpy as np

    values = np.ones(_bytes_to_read() // 4, np.float32)
    best, end = 0.0, time.perf_counter() + _SECONDS
    num_cores = read_cpu_count()
    counts = sorted({1, num_cores, max(1, num_cores // 2)})
    while not best or time.perf_counter() < end:
        best = max([best, *(values.nbytes / _seconds_to_read(values, n) for n in counts)])
    return best


def _bytes_to_read() -> int:
    """Return several times what the last cache holds, as far as free memory allows."""
    try:
        cache = int(_LAST_CACHE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):  # another system, or one that does not tell
        cache = 0
    free = read_memory()[1]
    wanted = min(max(_BYTES, 3 * cache), _MOST_BYTES)
    return wanted if free is None else max(2**24, min(wanted, free // 4))


def _seconds_to_read(values, num_threads: int) -> float:
    length = -(-len(values) // (_PIECES * num_threads))
    pieces = [values[start : start + length] for start in range(0, len(values), length)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(len, pieces))  # its threads are there
        started = time.perf_counter()
        list(pool.map(lambda piece: piece.max(), pieces))  # numpy lets go of Python's lock meanwhile
        return time.perf_counter() - started


@functools.cache
def gpu_bandwidth(device: str) -> float:
    """Measure how many bytes a second a GPU's memory moves: the best of several copies, read and written."""
    import torch

    source = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = max(best, 2 * _BYTES / (time.perf_counter() - started))
    return best
