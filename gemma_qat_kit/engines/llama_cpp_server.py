"""The child process that holds llama.cpp: takes one JSON order, answers with its address, ends with its parent."""

import json
import os
import sys


def main() -> None:
    """Load the model that the first line of stdin names, say where it listens, and live until stdin closes."""
    order = json.loads(sys.stdin.readline())
    answer = sys.stdout
    try:
        server = _load(order)
        print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    except Exception as err:
        print(json.dumps({"error": str(err)}), file=answer, flush=True)
        return
    sys.stdin.read()  # the parent closed the pipe or is gone
    os._exit(0)


def _load(order: dict):
    """Return llama.cpp's server, listening on a free loopback port that wants the order's key."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [order["key"]]
    params.n_ctx, params.n_parallel = order["context_length"], 1
    params.n_gpu_layers = order["num_gpu_layers"]
    params.fit_params = False  # it would shorten the context without saying so
    params.cache_ram_mib = order["prompt_cache_mib"]
    params.ui = params.endpoint_slots = False
    params.verbosity = 1  # errors only
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
