"""What llama.cpp says after every token of a text, as numbers: its server only gives them for words that it wrote.

A second child process maps the same file (the weights are the same pages in memory) and calls llama.cpp's C interface.
It starts when it is first needed. Logits come through the pipe in pieces, so the child never holds a window of them.
"""

import contextlib
import json
import threading
import weakref
from pathlib import Path

from gemma_qat_kit.engines import llama_cpp_process as process
from gemma_qat_kit.errors import BadSettingError, EndpointError, KitError, MissingLibraryError, ModelClosedError

_CHILD = Path(__file__).with_name("llama_cpp_logits.py")


class Scores:
    """The child that tokenizes and scores for one GGUF file.

    Args:
        path: The .gguf file.
        adapter: A LoRA in a GGUF of its own, or None.
        use_gpu: Compute on a GPU where llama.cpp has one.
    """

    def __init__(self, path: Path, adapter: Path | None = None, *, use_gpu: bool = True):
        self._adapter = {"adapter": str(adapter)} if adapter else {}
        self._path, self._hidden = path, {} if use_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        self._child = self._log = self._end = None
        self._is_closed = False
        self._lock = threading.Lock()  # two threads may use one model: one after the other

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, with the first token that the model wants."""
        import array

        found = array.array("i")
        with self._lock:
            found.frombytes(self._ask({"text": text}, lambda size: bytearray(size)))
        return found.tolist()

    def logits(self, ids: list[int], context_length: int):
        """Return what the model says after each token: float32 (tokens, words), on the CPU."""
        import torch

        if not 1 <= len(ids) <= context_length:
            raise BadSettingError(
                f"{len(ids):,} tokens cannot be scored at once.",
                f"This model was loaded with context_length={context_length:,}.",
                "Take a smaller window, or load the model with a larger context_length.",
            )
        with self._lock:
            flat = self._ask({"ids": list(map(int, ids))}, lambda size: torch.empty(size // 4))
        return flat.view(len(ids), -1)

    @property
    def private_bytes(self) -> int:
        """Bytes that the child holds beside the file's pages; 0 where it was not needed yet."""
        return process.memory(self._child).ram

    def _ask(self, order: dict, make_buffer):
        """Send an order and return the answer's bytes in what `make_buffer(number of bytes)` made for them."""
        if self._is_closed:
            raise ModelClosedError("This model is closed.", "A closed model answers no more.", "Load it again.")
        try:
            if self._child is None:
                self._start()
            answer = self._exchange(order)
            buffer = make_buffer(answer["bytes"])
            self._read_into(buffer)
        except BaseException:  # also Ctrl-C: half an answer may lie in the pipe, so the next call starts afresh
            self._stop()
            raise
        return buffer

    def _start(self) -> None:
        self._child, self._log = process.start(_CHILD, **self._hidden)
        self._end = weakref.finalize(self, process.end, self._child, self._log)
        self._end.atexit = False  # the child notices by itself
        self._exchange({"path": str(self._path), "num_threads": process.num_threads()} | self._adapter, is_load=True)

    def _exchange(self, order: dict, *, is_load: bool = False) -> dict:
        """Send an order and return the first line of the answer."""
        with contextlib.suppress(OSError):  # it has ended already; its log says why
            self._send(json.dumps(order).encode() + b"\n")
        line = self._child.stdout.readline()
        answer = json.loads(line) if line.startswith(b"{") else {}
        if "bytes" in answer:
            return answer
        if "missing" in answer:
            raise _other_release(answer["missing"])
        raise process.load_error(self._child, self._log, self._path, answer.get("error", "")) if is_load else (
            self._score_error(answer.get("error")))  # fmt: skip

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._child.stdin.write(view) :]

    def _read_into(self, buffer) -> None:
        view = memoryview(buffer if isinstance(buffer, bytearray) else buffer.numpy()).cast("B")
        while view:
            count = self._child.stdout.readinto(view)
            if not count:
                raise self._score_error(None)
            view = view[count:]

    def _score_error(self, error: str | None) -> KitError:
        """Build the error for a child that could not answer, or ended instead."""
        if error is None:
            with contextlib.suppress(Exception):
                self._child.wait(timeout=10)
            detail = process.first_error(self._log) or f"its process ended with code {self._child.poll()}"
        return EndpointError(
            f"llama.cpp cannot score with {self._path}: {(error or detail).rstrip('.')}.",
            "It takes ids of its own vocabulary, and memory for one window of the text.",
            "Take a smaller window, or close other models.",
        )

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._child = self._log = self._end = None

    def close(self) -> None:
        """End the child and free its memory."""
        self._is_closed = True
        self._stop()


def _other_release(what: str) -> MissingLibraryError:
    import importlib.metadata

    return MissingLibraryError(
        f"xllamacpp {importlib.metadata.version('xllamacpp')} cannot be asked for the logits of a text: {what}.",
        "Releases from 2026.4 to 2026.10 can.",
        'Run: pip install "xllamacpp>=2026.4,<2026.11"',
    )
