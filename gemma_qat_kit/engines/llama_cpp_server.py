"""The child process that holds llama.cpp: takes one JSON order, answers with its address, ends with its parent."""

import contextlib
import json
import os
import sys


def main() -> None:
    """Load the model that the first line of stdin names, say where it listens, and live until stdin closes."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    order = json.loads(sys.stdin.readline())
    _end_with_parent()
    try:
        server = _load(order)
        print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    except Exception as err:
        print(json.dumps({"error": str(err)}), file=answer, flush=True)
        return
    sys.stdin.read()  # the parent closed the pipe or is gone
    os._exit(0)


def _end_with_parent() -> None:
    """Let the system end this process when the parent's end of stdin closes, also in the middle of a load.

    A load holds Python's lock for as long as it takes, so no thread of this process could watch. The signal for input
    on stdin, where there is none but its end, ends a process that does not handle it.
    """
    with contextlib.suppress(ImportError, OSError):  # a system without it: the child ends after the load
        import fcntl

        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _load(order: dict):
    """Return llama.cpp's server, listening on a free loopback port that wants the order's key."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [order["key"]]
    params.n_ctx, params.n_parallel = order["context_length"], 1
    params.n_gpu_layers = order["num_gpu_layers"]
    if order["num_threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["num_threads"]
    params.fit_params = False  # it would shorten the context without saying so
    params.cache_ram_mib = order["prompt_cache_mib"]
    params.sampling.min_p = 0  # no model card asks for llama.cpp's 0.05
    params.ui = params.endpoint_slots = False
    params.verbosity = 1  # errors only
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
