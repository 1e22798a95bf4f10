"""A child process that finds out how many threads llama.cpp is fastest with here, and answers with one JSON line.

The number of cores does not tell: all threads wait for the slowest after every step, hundreds of times a token, so on a
machine that others use, too, two threads can be ten times slower than one. What is timed is what a token goes through:
ggml's own product of a matrix and a vector, some small steps, and the next matrix.
"""

import ctypes
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

_WIDTH, _LAYERS, _SMALL_STEPS = 2048, 20, 10  # 47 MB of weights in Q4_0, 0.2 MB a step; E2B has 1 MB, SmolLM2 0.1 MB
_Q4_0, _F32 = 2, 0  # ggml's numbers of its types
_GROUP_BYTES, _GROUP_SIZE = 18, 32
_ROUNDS, _SECONDS = 15, 1.2  # at most so many, and none begun later than that
_GAIN = 1.15  # more threads must be worth it: where others come, each of them is one more to wait for
_POINTER = ctypes.c_void_p


class _Memory(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("nbytes", ctypes.c_size_t), ("buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_FUNCTIONS = {
    "ggml_cpu_init": (None,),
    "ggml_init": (_POINTER, _Memory),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_add": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_graph_compute_with_ctx": (ctypes.c_int, _POINTER, _POINTER, ctypes.c_int),
}


def main() -> None:
    """Measure every number of threads that stdin names, and answer with milliseconds for each and the best."""
    candidates = json.loads(sys.stdin.readline())
    timings = time_threads(candidates)
    print(json.dumps({"num_threads": fewest_fast(timings), "milliseconds": timings}), flush=True)


def fewest_fast(timings: dict[int, float]) -> int:
    """Return the fewest threads that are about as fast as the fastest number of them."""
    best = min(timings.values())
    return min(n for n, milliseconds in timings.items() if milliseconds <= _GAIN * best)


def time_threads(candidates: list[int]) -> dict[int, float]:
    """Return the mean milliseconds of a pass through the layers for each number of threads, taken in turns.

    The mean, because a pass that had to wait for a core is a part of what a chat will meet.
    """
    compute = _graph()
    taken: dict[int, list[float]] = {n: [] for n in candidates}
    end = time.perf_counter() + _SECONDS
    for number in range(_ROUNDS):
        for n in candidates:
            if number == 0:
                compute(n)  # starts the threads
            started = time.perf_counter()
            if started > end and taken[n]:
                break
            compute(n)
            taken[n].append(1000 * (time.perf_counter() - started))
    return {n: round(statistics.fmean(times), 3) for n, times in taken.items()}


def _graph():
    """Return a function that computes the layers with so many threads."""
    ggml, nbytes = _library(), _WIDTH * _WIDTH // _GROUP_SIZE * _GROUP_BYTES
    ggml.ggml_cpu_init()
    context = ggml.ggml_init(_Memory(_LAYERS * (nbytes + 8 * _SMALL_STEPS * _WIDTH) + 2**22, None, False))
    values = ggml.ggml_new_tensor_2d(context, _F32, _WIDTH, 1)
    ctypes.memset(ggml.ggml_get_data(values), 0, 4 * _WIDTH)
    graph = ggml.ggml_new_graph(context)
    for _ in range(_LAYERS):
        weight = ggml.ggml_new_tensor_2d(context, _Q4_0, _WIDTH, _WIDTH)
        ctypes.memset(ggml.ggml_get_data(weight), 0, nbytes)
        values = ggml.ggml_mul_mat(context, weight, values)
        for _ in range(_SMALL_STEPS):
            values = ggml.ggml_add(context, values, values)
    ggml.ggml_build_forward_expand(graph, values)
    return lambda num_threads: ggml.ggml_graph_compute_with_ctx(context, graph, num_threads)


def _library() -> ctypes.CDLL:
    """Return ggml's C interface, which xllamacpp's extension module exports; its Python side is not needed."""
    folder = Path(importlib.util.find_spec("xllamacpp").submodule_search_locations[0])
    library = ctypes.CDLL(str(next(file for file in folder.glob("xllamacpp*") if file.suffix in (".so", ".pyd"))))
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


if __name__ == "__main__":
    main()
