"""The child process that scores a text: takes JSON orders, answers with raw numbers, ends with its parent.

It calls llama.cpp's C interface, which xllamacpp's extension module exports, through ctypes. The interface passes big
structs by value and their fields move between releases. What is safe: both ABIs in use (System V on x86-64, AArch64)
pass such a struct in memory, so a declaration that is longer than any release's copies some bytes too many and breaks
nothing; and the first four fields of the context's parameters have stayed where they are since 2024. They are read back
after they were set.
"""

import array
import contextlib
import ctypes
import importlib.util
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO

# Tokens computed at a time: llama.cpp keeps their logits, 67 MB with Gemma's 262,144 words.
BATCH = 64
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params, of which only n_ctx, n_batch, n_ubatch and n_seq_max are named."""

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint8 * 1008))


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (("n_tokens", _INT), *((name, _POINTER) for name in ("token", "embd", "pos", "n_seq_id", "seq_id")),
                ("logits", _POINTER), ("rest", ctypes.c_uint8 * 512))  # fmt: skip


_FUNCTIONS = {
    "llama_backend_init": (None,),
    "llama_model_default_params": (_Params,),
    "llama_context_default_params": (_Params,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, _Params),
    "llama_init_from_model": (_POINTER, _POINTER, _Params),
    "llama_free": (None, _POINTER),
    "llama_n_ctx": (ctypes.c_uint32, _POINTER),
    "llama_n_batch": (ctypes.c_uint32, _POINTER),
    "llama_n_ubatch": (ctypes.c_uint32, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT, _INT),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, ctypes.c_bool),
    "llama_batch_get_one": (_Batch, _POINTER, _INT),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits": (_POINTER, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_adapter_lora_init": (_POINTER, _POINTER, ctypes.c_char_p),
    "llama_set_adapters_lora": (
        _INT,
        _POINTER,
        ctypes.POINTER(_POINTER),
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_float),
    ),
    "llama_tokenize": (_INT, _POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool),
}


class OtherReleaseError(Exception):
    """This llama.cpp lacks a function, or takes its settings elsewhere."""


def load_library(path: str | None = None) -> ctypes.CDLL:
    """Return llama.cpp's C interface with its functions declared."""
    try:
        library = ctypes.CDLL(path or _extension())
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError) as err:
        raise OtherReleaseError(str(err)) from err
    return library


def _extension() -> str:
    """Return the path of xllamacpp's extension module, without importing it."""
    folder = Path(importlib.util.find_spec("xllamacpp").submodule_search_locations[0])
    found = sorted(file for file in folder.glob("xllamacpp*") if file.suffix in (".so", ".pyd"))
    return str(found[0] if found else folder)  # a folder is no library, and the error then names it


class Model:
    """A GGUF in llama.cpp, with an adapter or none, and a context as long as the longest text so far."""

    def __init__(self, path: str, num_threads: int, adapter: str | None = None):
        self._llama, self._num_threads = load_library(), num_threads
        self._llama.llama_backend_init()
        self._model = self._llama.llama_model_load_from_file(
            os.fsencode(path), self._llama.llama_model_default_params()
        )
        if not self._model:
            raise ValueError("")  # llama.cpp's own message is in the log
        self._adapter = self._llama.llama_adapter_lora_init(self._model, os.fsencode(adapter)) if adapter else None
        if adapter and not self._adapter:
            raise ValueError("")
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self._context, self._length = None, 0

    def tokenize(self, text: str) -> array.array:
        """Return the int32 ids of a text, with what the model wants before and after it."""
        data = text.encode()
        ids = array.array("i", bytes(4 * (len(data) + 16)))
        address, room = ids.buffer_info()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), address, room, True, True)
        if count < 0:
            raise ValueError(f"the text has {-count} tokens, more than bytes")
        return ids[:count]

    def logits(self, ids: list[int], pipe: BinaryIO) -> None:
        """Write the length of the answer as a line of JSON, then the float32 logits, a row per id."""
        llama, context = self._llama, self._context_for(len(ids))
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        num_words = llama.llama_vocab_n_tokens(self._vocab)
        for start in range(0, len(ids), BATCH):
            tokens = array.array("i", ids[start : start + BATCH])
            wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
            batch = llama.llama_batch_get_one(tokens.buffer_info()[0], len(tokens))
            batch.logits = ctypes.addressof(wanted)
            code = llama.llama_decode(context, batch)
            if code:
                raise ValueError(f"llama_decode answers {code}")
            if start == 0:
                answer(pipe, {"bytes": 4 * len(ids) * num_words})
            size = 4 * len(tokens) * num_words
            write(pipe, memoryview((ctypes.c_uint8 * size).from_address(llama.llama_get_logits(context))).cast("B"))

    def _context_for(self, length: int) -> int:
        """Return a context for so many tokens, with BATCH of them computed at a time."""
        if self._context and length <= self._length:
            return self._context
        llama, params = self._llama, self._llama.llama_context_default_params()
        if self._context:
            llama.llama_free(self._context)
        self._length = -(-length // 256) * 256  # llama.cpp rounds up to this
        params.first[:] = (self._length, BATCH, BATCH, 1)
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("there is no memory for its context")
        read = [getattr(llama, name)(self._context) for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")]
        if read != [self._length, BATCH, BATCH]:
            raise OtherReleaseError(f"it took n_ctx, n_batch and n_ubatch as {read}, not {list(params.first[:3])}")
        if self._adapter:
            llama.llama_set_adapters_lora(self._context, (_POINTER * 1)(self._adapter), 1, (ctypes.c_float * 1)(1.0))
        llama.llama_set_n_threads(self._context, self._num_threads, self._num_threads)
        return self._context


def answer(pipe: BinaryIO, content: dict) -> None:
    """Write a line of JSON."""
    write(pipe, json.dumps(content).encode() + b"\n")


def write(pipe: BinaryIO, data) -> None:
    """Write all of the data to an unbuffered pipe."""
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


def main() -> None:
    """Load the model that the first line of stdin names, then answer one order per line until stdin closes."""
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    orders: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    try:
        model = Model(**orders.get())
        answer(pipe, {"bytes": 0})
        while True:
            order = orders.get()
            if "text" in order:
                ids = model.tokenize(order["text"])
                answer(pipe, {"bytes": 4 * len(ids)})
                write(pipe, ids.tobytes())
            else:
                model.logits(order["ids"], pipe)
    except OtherReleaseError as err:
        answer(pipe, {"missing": str(err)})
    except Exception as err:
        answer(pipe, {"error": str(err)})


def _read(orders: queue.SimpleQueue) -> None:
    """Hand on the lines of stdin, and end this process with its parent, whatever it is computing."""
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent has gone
        main()
