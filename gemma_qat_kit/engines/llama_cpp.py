"""Run a GGUF with llama.cpp: its own server in a child process, reached on loopback with a random key.

A child, because llama.cpp answers a bad file or a full memory with abort(): that ends the child and not the
notebook's kernel. It also makes Cancel during a load, freeing and measuring memory exact, and keeps llama.cpp's
signal handlers away from Python's Ctrl-C.
"""

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.errors import BrokenCheckpointError, EndpointError, MissingLibraryError, NotEnoughMemoryError
from gemma_qat_kit.progress import Progress, Report

PROMPT_CACHE_MIB = 256  # llama.cpp's default of 8 GiB would not fit a free runtime


class LlamaCppEngine(EndpointEngine):
    """A GGUF file loaded by llama.cpp.

    Args:
        path: The .gguf file.
        context_length: Tokens of prompt and answer together.
        num_gpu_layers: Layers on the GPU; -1 is all where there is one, 0 keeps the model on the CPU.
        report: Told how much of the file is in memory, several times a second.

    Raises:
        MissingLibraryError: xllamacpp is not installed.
        BrokenCheckpointError: llama.cpp cannot load the file.
        NotEnoughMemoryError: The system stopped the loader for lack of memory.
    """

    name = "llama_cpp"

    def __init__(self, path: Path, *, context_length: int, num_gpu_layers: int = -1, report: Report | None = None):
        _require_xllamacpp()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        key = secrets.token_urlsafe(24)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "gemma_qat_kit.engines.llama_cpp_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in a terminal reaches Python, not the model
        )
        try:
            address = self._start(path, key, context_length, num_gpu_layers, report)
            super().__init__(address, api_key=key)
        except BaseException:
            self.close()
            raise
        self.context_length = context_length

    def _start(self, path: Path, key: str, context_length: int, num_gpu_layers: int, report: Report | None) -> str:
        """Tell the child what to load and wait until it answers with its address."""
        order = {"path": str(path), "key": key, "context_length": context_length, "num_gpu_layers": num_gpu_layers,
                 "prompt_cache_mib": PROMPT_CACHE_MIB}  # fmt: skip
        self._child.stdin.write(json.dumps(order).encode() + b"\n")
        self._child.stdin.flush()
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

    def _load_error(self, path: Path, error: str) -> Exception:
        code = self._child.wait(timeout=10) if not error else None
        if code in (-9, 137):
            return NotEnoughMemoryError(
                f"The system stopped llama.cpp while it loaded {path.name}.",
                "The model and its context must fit in free memory.",
                "Close other models, or take a smaller size or context_length.",
            )
        detail = error or self._last_log_line() or f"llama.cpp ended with code {code}"
        return BrokenCheckpointError(
            f"llama.cpp cannot load {path}: {detail}.",
            "A complete GGUF of an architecture that llama.cpp knows is needed.",
            "Download it again, or update xllamacpp.",
        )

    def _last_log_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        telling = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        return telling[-1][-300:] if telling else ""

    def memory(self) -> dict[str, int]:
        """Return the bytes that the child holds: its own, and the file's pages that the system could take back."""
        import psutil

        try:
            info = psutil.Process(self._child.pid).memory_info()
        except psutil.Error:
            return {}
        mapped = getattr(info, "shared", 0)
        return {"private": info.rss - mapped, "mapped": mapped}

    def stream(self, conversation, settings):
        """See `EndpointEngine.stream`; also tells a server that has died from one that is busy."""
        try:
            return super().stream(conversation, settings)
        except EndpointError as err:
            if self._child.poll() is None or self._is_closed:
                raise
            raise EndpointError(
                f"llama.cpp has stopped (code {self._child.returncode}).",
                "A loaded model stays up until close().",
                "Load it again; with less context_length if memory ran out.",
            ) from err

    def close(self) -> None:
        """End the child and free all of its memory."""
        self._is_closed = True
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._log):
            pipe.close()


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
