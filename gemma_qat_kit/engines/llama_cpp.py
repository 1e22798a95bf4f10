"""Run a GGUF with llama.cpp: its own server in a child process, reached on loopback with a random key.

A child, because llama.cpp answers a bad file or a full memory with abort(): that ends the child and not the
notebook's kernel. It also makes Cancel during a load, freeing and measuring memory exact, and keeps llama.cpp's
signal handlers away from Python's Ctrl-C.
"""

import contextlib
import json
import statistics
import subprocess
import threading
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from gemma_qat_kit.engines import llama_cpp_process as process
from gemma_qat_kit.engines.drafting import Drafting
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.engines.llama_cpp_buffers import buffer_parts
from gemma_qat_kit.engines.llama_cpp_scores import Scores
from gemma_qat_kit.engines.projector import projector_parts
from gemma_qat_kit.engines.resident import file_pages
from gemma_qat_kit.engines.serving import Serving
from gemma_qat_kit.errors import EndpointError, KitError
from gemma_qat_kit.gguf.header import GgufTensor, longest_context, read_gguf_header
from gemma_qat_kit.memory.parts import ACTIVATIONS, DRAFTER, ENGINE, Part, merged
from gemma_qat_kit.memory.settings import check_context_length
from gemma_qat_kit.memory.weights import part_of
from gemma_qat_kit.progress import Progress, Report

_SERVER = Path(__file__).with_name("llama_cpp_server.py")
_LONGEST_CONTEXT = 2**20  # where the file does not tell
_KINDS = (("image", "vision"), ("audio", "audio"))  # what messages hold, and llama.cpp's word for it


class LlamaCppEngine(EndpointEngine):
    """A GGUF file loaded by llama.cpp.

    Args:
        path: The .gguf file.
        context_length: Tokens of prompt and answer together, of each chat; llama.cpp rounds up to a multiple of 256.
        num_gpu_layers: Layers on the GPU; -1 is all where there is one, 0 keeps the model on the CPU.
        adapter: A LoRA in a GGUF of its own, as `export_adapter` writes it, or None.
        kv_format: Of the key/value cache: "bf16" (llama.cpp takes float16 for it), "q8_0" or "q4_0".
        drafter: GGUF of the MTP drafter to generate with, or None; where it does not pay, the server starts again
            without it before the next answer, because llama.cpp's cannot be told to stop drafting.
        projector: GGUF of the multimodal projector to see and hear with, or None.
        serving: Whom its server answers; None: this process alone.
        report: Told how much of the file is in memory, several times a second.

    Attributes:
        path: The .gguf file.
        num_threads: That it computes with, by a short measurement at the first load of a session.

    Raises:
        MissingLibraryError: xllamacpp is not installed.
        BadSettingError: The model does not take so long a context.
        BrokenCheckpointError: llama.cpp cannot load the file.
        NotEnoughMemoryError: The system stopped the loader for lack of memory.
    """

    name = "llama_cpp"
    takes: tuple[str, ...] = ()  # what its server says that the projector reads
    gather_seconds = 0.05  # it computes on the cores that read, and twenty times a second looks fluent

    def __init__(
        self,
        path: Path,
        *,
        context_length: int,
        num_gpu_layers: int = -1,
        kv_format: str = "bf16",
        adapter: Path | None = None,
        drafter: Path | None = None,
        projector: Path | None = None,
        serving: Serving | None = None,
        report: Report | None = None,
    ):
        process.require_xllamacpp()
        check_context_length(context_length, longest_context(path) or _LONGEST_CONTEXT)
        self._is_closed, self.path, self._own_bytes, self._buffers = False, path, 0, ()
        self._scores = Scores(path, adapter, use_gpu=num_gpu_layers != 0)
        self.num_threads = process.num_threads()
        self._num_answering, self._lock, self.drafting = 0, threading.RLock(), None
        self._serving = serving or Serving()
        self._order = {"path": str(path), "adapter": str(adapter or ""), "drafter": str(drafter or ""),
                       "projector": str(projector or ""), "kv_format": kv_format,
                       "context_length": int(context_length), "num_gpu_layers": num_gpu_layers,
                       "num_threads": self.num_threads, "kept_mib": self._serving.kept_mib,
                       **asdict(self._serving)}  # fmt: skip
        self._launch(report)

    def _launch(self, report: Report | None = None) -> None:
        """Start a child and let it load."""
        self._child, self._log = process.start(_SERVER)
        self._end = weakref.finalize(self, process.end, self._child, self._log)
        self._end.atexit = False  # the child notices by itself
        try:
            address = self._serving.url_here(self._start(self._order, self.path, report))
            super().__init__(address, api_key=self._serving.key)
            if self._order["projector"]:
                reads = self._get("/props")["modalities"]
                self.takes = tuple(kind for kind, name in _KINDS if reads.get(name))
            if self._order["drafter"]:
                self.drafting, self.asks_also = Drafting(self._plain_speed()), {"timings_per_token": True}
        except BaseException:
            self.close()
            raise
        self.context_length = self.context_length or self._order["context_length"]

    def _start(self, order: dict, path: Path, report: Report | None) -> str:
        """Tell the child what to load and wait until it answers with its address."""
        with contextlib.suppress(OSError):  # it has ended already; its log says why
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
        total = path.stat().st_size
        while not process.is_readable(self._child.stdout, seconds=0.2):
            if report:
                report(Progress("loading", min(total, sum(process.memory(self._child))), total))
        line = self._child.stdout.readline()
        answer = json.loads(line) if line.startswith(b"{") else {}
        if "address" not in answer:
            raise process.load_error(self._child, self._log, path, answer.get("error", ""))
        self._own_bytes, self._buffers = answer.get("own_bytes", 0), buffer_parts(process.read_log(self._log))
        if report:
            report(Progress("loading", total, total))
        return answer["address"]

    def _plain_speed(self) -> float:
        """Return the tokens/s without drafts: of an answer of two tokens, llama.cpp drafts neither."""
        asked = {"prompt": "The", "max_tokens": 2, "temperature": 0, "top_k": 1, "ignore_eos": True}
        answers = [json.loads(self._read("/v1/completions", json.dumps(asked))) for _ in range(5)]
        return 1000 / statistics.median(answer["timings"]["predicted_ms"] for answer in answers)

    @contextlib.contextmanager
    def _answering(self, stream) -> Iterator[None]:
        """Start again without a drafter that does not pay, if nobody is answered now; then time the answer."""
        with self._lock:
            is_free = not (self._num_answering or self._is_closed)
            if is_free and self._order["drafter"] and not self.drafting.is_on:
                self._order["drafter"] = ""
                self._end()
                self._launch()
            self._num_answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_answering -= 1
            if self.drafting and stream.timings.get("draft_n"):
                self.drafting.record(stream.timings["predicted_n"] - 1, stream.timings["predicted_ms"] / 1000)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, with the first token that the model wants."""
        return self._scores.tokenize(text)

    def logits(self, ids: list[int]):
        """Return what the model says after each token: float32 (tokens, words), on the CPU.

        The first call starts a second process on the same file, whose pages in memory the two share: llama.cpp's
        server does not give the probabilities of a prompt.

        Raises:
            BadSettingError: More tokens than `context_length`.
            ModelClosedError: The model was closed.
        """
        return self._scores.logits(ids, self.context_length)

    def memory(self) -> tuple[Part, ...]:
        """Return what the child holds, part by part: the pages of the file by their tensors, llama.cpp's own buffers as
        far as they are in use, and the rest as the engine, with the second process of `logits`."""
        held = process.memory(self._child)
        if not any(held):
            return ()
        pages = self._file_parts()
        rest = max(0, held.mapped - sum(part.nbytes for part in pages))
        gpu = [part for part in (*self._projector_parts, *self._buffers) if part.place == "gpu"]
        return merged([*pages, Part(ENGINE, rest, "mapped"), *gpu, *self._private_parts(held.ram)])

    def _file_parts(self) -> list[Part]:
        pages = file_pages(self._child.pid)
        shown = [
            (m, t, name)
            for file, t, name in self._tensors
            for m in pages.of(file)
            if m.offset <= t.start < m.offset + m.end - m.start
        ]
        resident = pages.resident_bytes((m.start + t.start - m.offset, t.nbytes) for m, t, _ in shown)
        return [Part(name, nbytes, "mapped") for (_, _, name), nbytes in zip(shown, resident, strict=True)]

    def _private_parts(self, ram: int) -> list[Part]:
        """Share out the child's private bytes: a buffer counts as far as it can have been touched."""
        free, parts = max(0, ram - self._own_bytes), []
        for buffer in sorted(
            (*self._projector_parts, *self._buffers), key=lambda part: part.name == ACTIVATIONS
        ):  # touched last
            if buffer.place == "ram":
                parts.append(Part(buffer.name, min(buffer.nbytes, free), "ram"))
                free -= parts[-1].nbytes
        rest = ram - sum(part.nbytes for part in parts)
        return [*parts, Part(ENGINE, rest + self._scores.private_bytes, "ram")]

    @property
    def _projector_parts(self) -> list[Part]:
        """Return what llama.cpp copies out of the projector's file, which it does not say in its log."""
        place = "gpu" if any(part.place == "gpu" for part in self._buffers) else "ram"
        return projector_parts(Path(self._order["projector"]), place) if self._order["projector"] else []

    @cached_property
    def _tensors(self) -> list[tuple[Path, GgufTensor, str]]:
        """Every tensor with its file and its part; a drafter's stay here when it is switched off, without pages."""
        found = [(self.path, tensor, part_of(tensor.name)) for tensor in read_gguf_header(self.path).tensors]
        drafter = Path(self._order["drafter"])
        return found + [(drafter, t, DRAFTER) for t in (read_gguf_header(drafter).tensors if drafter.is_file() else ())]

    def _explained(self, error: KitError) -> KitError:
        """See `EndpointEngine`; also tells a server that has died from one that refuses."""
        if not self._is_closed and error.__cause__ is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a dying process closes its connections first
                self._child.wait(timeout=1)
        if self._is_closed or self.is_running:
            return super()._explained(error)
        return EndpointError(
            f"llama.cpp has stopped (code {self._child.returncode}).",
            "A loaded model stays up until close().",
            "Load it again; with less context_length if memory ran out.",
        )

    @property
    def is_running(self) -> bool:
        """Whether its process is still there."""
        return self._child.poll() is None

    def close(self) -> None:
        """End the child and free all of its memory, as also happens to a model that is no longer referred to."""
        with self._lock:  # not while it starts again
            self._is_closed = True
            self._scores.close()
            self._end()
