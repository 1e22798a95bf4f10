"""The child process that holds llama.cpp: takes one JSON order, answers with its address, ends with its parent."""

import contextlib
import json
import os
import sys

_HTTP_THREADS = 320  # every question that waits, and everyone who asks for how long yet, holds one

_IMAGE_TOKENS = 280  # Gemma 4's default_output_length, as in transformers; llama.cpp would take up to 512


def main() -> None:
    """Load the model that the first line of stdin names, say where it listens, and live until stdin closes."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    order = json.loads(sys.stdin.readline())
    _end_with_parent()
    try:
        server, own_bytes = _load(order)
        _log_errors_only()
        ready = {"address": server.listening_address, "own_bytes": own_bytes}
        print(json.dumps(ready), file=answer, flush=True)
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


def _load(order: dict) -> tuple:
    """Return llama.cpp's server, listening where the order says and wanting its key, and what this process
    held before, in private bytes."""
    import xllamacpp

    own_bytes = _private_bytes()
    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.model_alias = {os.path.basename(order["path"])}  # others need not know where it lies
    if order["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(order["adapter"], 1.0)]
    if order["projector"]:
        params.mmproj.path, params.mmproj_use_gpu = order["projector"], order["num_gpu_layers"] != 0
        params.image_max_tokens = _IMAGE_TOKENS
    params.hostnames, params.port, params.api_keys = [order["host"]], order["port"], [order["key"]]
    params.n_ctx, params.n_parallel = order["context_length"] * order["num_chats"], order["num_chats"]
    if order["num_chats"] > 1:
        params.n_threads_http = _HTTP_THREADS
        params.n_batch = params.n_ubatch  # one reads a long prompt in small steps, and the others go on in between
    params.n_gpu_layers = order["num_gpu_layers"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["num_threads"]
    params.fit_params = False  # it would shorten the context without saying so
    # It keeps copies of prompts (8 GiB), and of the sliding window as it was in up to 32 places (160 MiB each in 12B).
    # One chat goes on where it stopped without the first, and needs the second only where it is taken back a step.
    params.cache_ram_mib, params.n_ctx_checkpoints = order["kept_mib"], 2
    kv_format = "F16" if order["kv_format"] == "bf16" else order["kv_format"].upper()
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv_format}")
    params.cache_type_k = params.cache_type_v = kind
    if order["drafter"]:
        draft = params.speculative.draft
        draft.mparams.path, draft.n_gpu_layers = order["drafter"], order["num_gpu_layers"]
        draft.cache_type_k = draft.cache_type_v = kind  # it reads the model's own
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = order["num_threads"]
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    params.sampling.min_p = 0  # no model card asks for llama.cpp's 0.05
    params.ui, params.endpoint_slots, params.endpoint_metrics = False, False, True
    params.verbosity = 4  # the lowest level that tells of its buffers
    return xllamacpp.Server(params), own_bytes


def _private_bytes() -> int:
    """Return the private memory of this process, 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/status") as file:
        return int(file.read().split("RssAnon:")[1].split()[0]) * 1024
    return 0


def _log_errors_only() -> None:
    """Let llama.cpp write errors only from now on: a request would add 2 KB to the log."""
    import ctypes

    import xllamacpp

    with contextlib.suppress(AttributeError, OSError):  # a release that lacks it goes on writing
        ctypes.CDLL(xllamacpp.xllamacpp.__file__)._Z30common_log_set_verbosity_tholdi(1)


if __name__ == "__main__":
    main()
