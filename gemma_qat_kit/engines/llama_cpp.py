"""Run a GGUF with llama.cpp: its own server in a child process, reached on loopback with a random key.

A child, because llama.cpp answers a bad file or a full memory with abort(): that ends the child and not the
notebook's kernel. It also makes Cancel during a load, freeing and measuring memory exact, and keeps llama.cpp's
signal handlers away from Python's Ctrl-C.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.errors import (
    BrokenCheckpointError,
    EndpointError,
    KitError,
    MissingLibraryError,
    NotEnoughMemoryError,
)
from gemma_qat_kit.gguf_header import longest_context
from gemma_qat_kit.machine import read_cpu_count
from gemma_qat_kit.memory import check_context_length
from gemma_qat_kit.progress import Progress, Report

PROMPT_CACHE_MIB = 256  # llama.cpp's default of 8 GiB would not fit a free runtime
_SERVER = Path(__file__).with_name("llama_cpp_server.py")
_LONGEST_CONTEXT = 2**20  # where the file does not tell
_NO_MEMORY = ("bad_alloc", "out of memory", "failed to allocate", "unable to allocate")


class LlamaCppEngine(EndpointEngine):
    """A GGUF file loaded by llama.cpp.

    Args:
        path: The .gguf file.
        context_length: Tokens of prompt and answer together; llama.cpp rounds them up to a multiple of 256.
        num_gpu_layers: Layers on the GPU; -1 is all where there is one, 0 keeps the model on the CPU.
        report: Told how much of the file is in memory, several times a second.

    Raises:
        MissingLibraryError: xllamacpp is not installed.
        BadSettingError: The model does not take so long a context.
        BrokenCheckpointError: llama.cpp cannot load the file.
        NotEnoughMemoryError: The system stopped the loader for lack of memory.
    """

    name = "llama_cpp"
    gather_seconds = 0.05  # it computes on the cores that read, and twenty times a second looks fluent

    def __init__(self, path: Path, *, context_length: int, num_gpu_layers: int = -1, report: Report | None = None):
        _require_xllamacpp()
        check_context_length(context_length, longest_context(path) or _LONGEST_CONTEXT)
        self._is_closed = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        key = secrets.token_urlsafe(24)
        self._child = subprocess.Popen(
            [sys.executable, "-P", _SERVER],  # -P: no file beside it or in the working folder is taken for a module
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in a terminal reaches Python, not the model
        )
        self._end = weakref.finalize(self, _end, self._child, self._log)
        self._end.atexit = False  # the child notices by itself
        try:
            super().__init__(self._start(path, key, context_length, num_gpu_layers, report), api_key=key)
        except BaseException:
            self.close()
            raise
        self.context_length = self.context_length or context_length

    def _start(self, path: Path, key: str, context_length: int, num_gpu_layers: int, report: Report | None) -> str:
        """Tell the child what to load and wait until it answers with its address."""
        order = {"path": str(path), "key": key, "context_length": int(context_length),
                 "num_gpu_layers": num_gpu_layers, "num_threads": _num_threads(),
                 "prompt_cache_mib": PROMPT_CACHE_MIB}  # fmt: skip
        with contextlib.suppress(OSError):  # it has ended already; its log says why
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
        total = path.stat().st_size
        while not _is_readable(self._child.stdout, seconds=0.2):
            if report:
                report(Progress("loading", min(total, sum(self.memory().values())), total))
        line = self._child.stdout.readline()
        answer = json.loads(line) if line.startswith(b"{") else {}
        if "address" not in answer:
            raise self._load_error(path, answer.get("error", ""))
        if report:
            report(Progress("loading", total, total))
        return answer["address"]

    def _load_error(self, path: Path, error: str) -> KitError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=10)
        code = self._child.poll()
        detail = self._first_error() or error or f"its process ended with code {code}"
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

    def _first_error(self) -> str:
        """Return the first error in the log, which the later ones follow from."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        telling = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        return telling[0].rpartition("error loading model: ")[2][-300:] if telling else ""

    def memory(self) -> dict[str, int]:
        """Return the bytes that the child holds: its own, and the file's pages that the system could take back."""
        import psutil

        if self._child.poll() is not None:
            return {}
        try:
            info = psutil.Process(self._child.pid).memory_info()
        except psutil.Error:
            return {}
        mapped = getattr(info, "shared", 0)
        return {"private": info.rss - mapped, "mapped": mapped}

    def _explained(self, error: KitError) -> KitError:
        """See `EndpointEngine`; also tells a server that has died from one that refuses."""
        if not self._is_closed and error.__cause__ is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a dying process closes its connections first
                self._child.wait(timeout=1)
        if self._is_closed or self._child.poll() is None:
            return super()._explained(error)
        return EndpointError(
            f"llama.cpp has stopped (code {self._child.returncode}).",
            "A loaded model stays up until close().",
            "Load it again; with less context_length if memory ran out.",
        )

    def close(self) -> None:
        """End the child and free all of its memory, as also happens to a model that is no longer referred to."""
        self._is_closed = True
        self._end()


def _end(child: subprocess.Popen, log) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, log):
        pipe.close()


def _environment() -> dict[str, str]:
    """Return the child's environment variables."""
    added = {"GGML_NO_BACKTRACE": "1"}  # an abort would start a debugger, for seconds
    if read_cpu_count() <= 4:
        # OpenMP's threads wait for each other in a busy loop. Where anything else wants one of a few cores, that makes
        # the model twice to ten times slower; a shorter wait costs nothing where nothing does (two cores, SmolLM2).
        added["GOMP_SPINCOUNT"] = "10000"
    return added | os.environ


def _num_threads() -> int | None:
    """Return how many threads to compute with where a container has fewer cores than llama.cpp will count."""
    usable = read_cpu_count()
    return usable if usable < (os.cpu_count() or 1) else None


def _is_readable(pipe, seconds: float) -> bool:
    """Wait for output (or the end) of a child, at most so long."""
    import select

    return bool(select.select([pipe], [], [], seconds)[0])


def _require_xllamacpp() -> None:
    import importlib.util

    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingLibraryError(
            "xllamacpp is not installed.", "GGUF files run in llama.cpp through it.", "Run: pip install xllamacpp"
        )
