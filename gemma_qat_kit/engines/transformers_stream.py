"""One answer of a transformers model while it is generated: tokens to text, thoughts apart from the answer."""

import queue
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

from gemma_qat_kit.engines.packed import holding_values
from gemma_qat_kit.generation import STOP_IDS, Delta, Finish, Settings
from gemma_qat_kit.memory.work import PREFILL_CHUNK
from gemma_qat_kit.tools import ToolCall, parse_call


class GenerateStream:
    """One `generate` call in a worker thread; it is also the streamer that `generate` hands its tokens to."""

    def __init__(self, engine, inputs, settings: Settings, max_new_tokens: int):
        self._engine, self._inputs, self._settings, self._max = engine, inputs, settings, max_new_tokens
        self._pieces: queue.SimpleQueue = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._num_prompt, self._num_new, self._last_id = inputs["input_ids"].shape[1], 0, None
        self._splitter = ThoughtSplitter(engine.tokenizer)
        self._is_prompt, self._times = True, []
        # transformers draws other words with a drafter than without it, and a seed must always give the same.
        is_seeded = settings.seed is not None and settings.temperature > 0
        self._is_drafted = bool(engine.drafting and engine.drafting.is_on and not is_seeded)
        self.drafts = (0, 0) if self._is_drafted else (None, None)  # tokens drafted and accepted so far
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            with self._engine._lock:
                self._generate()
            for piece in self._splitter.flush():
                self._pieces.put(piece)
            is_stop = self._last_id in self._engine.stop_ids or self._cancelled.is_set()
            self._pieces.put(self._finish("stop" if is_stop else "length"))
        except BaseException as err:
            self._pieces.put(err)

    def _generate(self) -> None:
        import torch

        settings, model = self._settings, self._engine.model
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p,
                        "top_k": settings.top_k}  # fmt: skip
        with torch.inference_mode(), holding_values(model), self._counted():
            model.generate(
                **self._inputs,
                **sampling,
                max_new_tokens=self._max,
                eos_token_id=[i for i in self._engine.stop_ids if i < model.config.get_text_config().vocab_size],
                pad_token_id=0,
                streamer=self,
                stopping_criteria=[
                    lambda ids, scores: torch.full((len(ids),), self._cancelled.is_set(), device=ids.device)
                ],
                **self._reading(),
            )

    def _reading(self) -> dict:
        """Return how `generate` reads the prompt: in chunks, whose activations take a fraction of the whole's.

        With a drafter `generate` reads in a way of its own, and of a prompt with images it would cut only the ids.
        """
        if self._is_drafted:
            return {"assistant_model": self._engine.drafter}
        is_text = self._inputs.keys() <= {"input_ids", "attention_mask"}
        return {"prefill_chunk_size": PREFILL_CHUNK} if is_text else {}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count what the drafter proposes, a token in each of its forwards, and time the answer for its trial."""
        if not self._is_drafted:
            yield
            return

        def count(*_) -> None:
            self.drafts = (self.drafts[0] + 1, self.drafts[1])

        hook = self._engine.drafter.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
        if self._times:
            (first, before), (last, after) = self._times[0], self._times[-1]
            self._engine.drafting.record(after - before, last - first)

    def put(self, ids) -> None:
        """Take token ids from `generate`; the first ones are the prompt. Of a draft, all but the last were accepted."""
        if self._is_prompt:
            self._is_prompt = False
            return
        if self._is_drafted:
            self.drafts = (self.drafts[0], self.drafts[1] + ids.numel() - 1)
            self._times.append((time.perf_counter(), self._num_new + ids.numel()))
        for token_id in ids.flatten().tolist():
            self._num_new += 1
            self._last_id = token_id
            for piece in self._splitter.push(token_id):
                self._pieces.put(piece)

    def end(self) -> None:
        """Called by `generate` after the last token; the end is told by `_run`."""

    def __iter__(self) -> Iterator[Delta | ToolCall | Finish]:
        while True:
            piece = self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, Finish):
                return

    def cancel(self) -> None:
        """End the answer now; the model is free again after the token that is being computed."""
        self._cancelled.set()
        self._pieces.put(self._finish("cancelled"))

    def _finish(self, reason: str) -> Finish:
        drafts = dict(zip(("drafted_tokens", "accepted_tokens"), self.drafts, strict=True))
        return Finish(reason, self._num_prompt, self._num_new, **drafts)


def plain_speed(model) -> float:
    """Return the tokens/s of a transformers model that nothing drafts for: the middle one of a few steps."""
    import torch

    times = []
    streamer = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
    ids = torch.tensor([[2]], device=model.device)
    with torch.inference_mode(), holding_values(model):
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, temperature=None, top_p=None,
                       top_k=None, pad_token_id=0, streamer=streamer)  # fmt: skip
    steps = [after - before for before, after in pairwise(times[1:])]  # the first time is the prompt's
    return 1 / statistics.median(steps)


class ThoughtSplitter:
    """Turn token ids into text as they come, thoughts and calls of tools apart from the answer.

    A thought block is `<|channel>thought\\n … <channel|>`; its first line names the channel and is dropped.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._open, self._close = (_id_of(tokenizer, token) for token in ("<|channel>", "<channel|>"))
        self._call, self._call_end = (_id_of(tokenizer, token) for token in ("<|tool_call>", "<tool_call|>"))
        self._is_thought = self._is_header = self._is_call = False
        self._ids: list[int] = []
        self._shown = 0  # characters of the decoded ids that have been given out

    def push(self, token_id: int) -> Iterator[Delta | ToolCall]:
        """Yield the text, or the call, that one more token completes."""
        if token_id in (self._call, self._call_end) or (self._is_call and token_id in STOP_IDS):
            yield from self.flush()
            self._is_call = token_id == self._call
            return
        if self._is_call:
            self._ids.append(token_id)
            return
        if token_id in (self._open, self._close):
            yield from self.flush()
            self._is_thought = self._is_header = token_id == self._open
            return
        self._ids.append(token_id)
        yield from self._new_text(is_last=False)

    def flush(self) -> Iterator[Delta | ToolCall]:
        """Yield what is left, incomplete characters included, and start a new segment."""
        if self._is_call:
            yield parse_call(self._tokenizer.decode(self._ids, skip_special_tokens=False))
        else:
            yield from self._new_text(is_last=True)
        self._ids, self._shown, self._is_header, self._is_call = [], 0, False, False

    def _new_text(self, *, is_last: bool) -> Iterator[Delta]:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not is_last:
            return  # a character whose last bytes are still to come
        if self._is_header:
            if "\n" not in text:
                return
            self._is_header, self._shown = False, text.index("\n") + 1
        if new := text[self._shown :]:
            self._shown = len(text)
            yield Delta.thought(new) if self._is_thought else Delta(new)
            if new.endswith("\n") and not self._is_header:
                self._ids, self._shown = [], 0  # decode from here: the cost of a token stays constant


def _id_of(tokenizer, token: str) -> int | None:
    """Return a token's id, None where there is no such token; transformers gives that of <unk> then."""
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == getattr(tokenizer, "unk_token_id", None) else found
