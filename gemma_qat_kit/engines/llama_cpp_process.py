"""A child process that runs llama.cpp: how it starts, why it ended, and how all of its memory comes back."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from gemma_qat_kit.errors import BrokenCheckpointError, KitError, MissingLibraryError, NotEnoughMemoryError
from gemma_qat_kit.machine import read_cpu_count
from gemma_qat_kit.memory.measure_process import ProcessMemory, process_memory

_INFORMATION = re.compile(r"[\d.]+ [IDT] ")  # what llama.cpp's log marks as such; it quotes from the file
_THREADS = Path(__file__).with_name("llama_cpp_threads.py")
_MEASURE_SECONDS = 10
_NO_MEMORY = ("bad_alloc", "out of memory", "failed to allocate", "unable to allocate")


def start(script: Path, **environment: str) -> tuple[subprocess.Popen, IO[bytes]]:
    """Start a script of this folder in a process of its own; return it and the file that its messages go to."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
    child = subprocess.Popen(
        [sys.executable, "-P", script],  # -P: no file beside it or in the working folder is taken for a module
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        bufsize=0,
        env=_environment() | environment,
        start_new_session=True,  # Ctrl-C in a terminal reaches Python, not the model
    )
    return child, log


def end(child: subprocess.Popen, log: IO[bytes]) -> None:
    """End a child and free all of its memory."""
    if child.poll() is None:
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, log):
        pipe.close()


def load_error(child: subprocess.Popen, log: IO[bytes], path: Path, error: str) -> KitError:
    """Build the error for a child that did not load a file, from its own words, its log and its exit code."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=10)
    code = child.poll()
    detail = first_error(log) or error or f"its process ended with code {code}"
    if code in (-9, 137) or any(sign in detail for sign in _NO_MEMORY):
        return NotEnoughMemoryError(
            f"The memory was too small while llama.cpp loaded {path}.",
            "The model and its context must fit in free memory.",
            "Close other models, or take a smaller size or context_length.",
        )
    return BrokenCheckpointError(
        f"llama.cpp cannot load {path}: {detail.strip().rstrip('.')}.",
        "A complete GGUF of an architecture that llama.cpp knows is needed.",
        "Download it again, or update xllamacpp.",
    )


def first_error(log: IO[bytes]) -> str:
    """Return the first error in the log, which the later ones follow from."""
    lines = [line for line in read_log(log).splitlines() if not _INFORMATION.match(line)]
    telling = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
    return telling[0].rpartition("error loading model: ")[2][-300:] if telling else ""


def read_log(log: IO[bytes]) -> str:
    """Return what a child has written to its log."""
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def memory(child: subprocess.Popen | None) -> ProcessMemory:
    """Return the bytes that a child holds, none where there is none or it has ended."""
    found = process_memory(child.pid, children=False) if child is not None and child.poll() is None else None
    return found or ProcessMemory(0, 0)


def _environment() -> dict[str, str]:
    """Return the child's environment variables."""
    added = {"GGML_NO_BACKTRACE": "1"}  # an abort would start a debugger, for seconds
    if read_cpu_count() <= 4:
        # OpenMP's threads wait for each other in a busy loop. Where anything else wants one of a few cores, that makes
        # the model twice to ten times slower; a shorter wait costs nothing where nothing does (two cores, SmolLM2).
        added["GOMP_SPINCOUNT"] = "10000"
    return added | os.environ


@functools.cache
def num_threads() -> int:
    """Return how many threads to compute with: measured once, in a second or less, where there is more than one core.

    A llama.cpp that cannot be measured gets the cores that this process may use; a machine too busy for it, one.
    """
    usable = read_cpu_count()
    candidates = sorted({2**power for power in range(usable.bit_length())} | {usable})
    if usable == 1:
        return 1
    child, log = start(_THREADS)
    try:
        answer, _ = child.communicate(json.dumps(candidates).encode() + b"\n", timeout=_MEASURE_SECONDS)
        return json.loads(answer)["num_threads"]
    except subprocess.TimeoutExpired:
        return 1
    except (OSError, ValueError, KeyError):  # this release exports other functions
        return usable
    finally:
        end(child, log)


def is_readable(pipe: IO[bytes], seconds: float) -> bool:
    """Wait for output (or the end) of a child, at most so long."""
    import select

    return bool(select.select([pipe], [], [], seconds)[0])


def require_xllamacpp() -> None:
    """Say how to install llama.cpp where it is missing.

    Raises:
        MissingLibraryError: xllamacpp is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingLibraryError(
            "xllamacpp is not installed.", "GGUF files run in llama.cpp through it.", "Run: pip install xllamacpp"
        )
