"""The child process that re-blocks a mobile checkpoint: takes one order, tells its progress, ends with its parent."""

import json
import os
import sys
import threading
import time

_SECONDS = 0.2  # between two reports


def main() -> None:
    """Write the GGUF that the first line of stdin asks for; every line of the answer is JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    order = json.loads(sys.stdin.readline())
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()

    def say(**words) -> None:
        print(json.dumps(words), file=answer, flush=True)

    from gemma_qat_kit.errors import KitError, MissingLibraryError

    try:
        import torch  # noqa: F401 - the export needs it
    except ImportError:
        missing = MissingLibraryError(
            "torch is not installed.",
            "A mobile checkpoint is re-blocked for llama.cpp with it, once; what runs then needs none.",
            'Run: pip install torch, or take the format "q4_0".',
        )
        say(kind=type(missing).__name__, error=missing.args)
        return
    from gemma_qat_kit.export.gguf import export_gguf

    try:
        made = export_gguf(
            order["source"],
            order["target"],
            device=order["device"],
            overwrite=True,
            report=_reporter(say, is_over),
        )
        say(nbytes=made.nbytes)
    except KitError as err:
        say(kind=type(err).__name__, error=err.args)


def _reporter(say, is_over: threading.Event):
    """Return a report function that says how far it is now and then, and stops once the parent is gone."""
    from gemma_qat_kit.errors import CancelledError

    stages, due = {"writing": "re-blocking"}, 0.0

    def report(progress) -> None:
        nonlocal due
        if is_over.is_set():
            raise CancelledError("The loader is gone.", "It waits for the file.", "Load it again.")
        if time.monotonic() >= due or progress.done_bytes == progress.total_bytes:
            due = time.monotonic() + _SECONDS
            stage = stages.get(progress.stage, progress.stage)
            say(stage=stage, done=progress.done_bytes, total=progress.total_bytes)

    return report


if __name__ == "__main__":
    main()
