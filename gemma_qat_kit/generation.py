"""What goes into a generation and what comes out, the same for every engine."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Protocol

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.messages import Message
from gemma_qat_kit.tools import ToolCall, call_message

STOP_IDS = [1, 106, 50]
"""Ids that end Gemma 4's turn: <eos>, <turn|> and <|tool_response>. Source: the model cards' generation_config.json."""
_MAX_INT = 2**31 - 1  # the engines count in int32
_MAX_SEED = 2**32 - 2  # llama.cpp takes 32 bits, all ones for "draw one"


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        thinking: Let the model think before it answers, where it can.
        max_new_tokens: Most tokens to generate, thoughts included.
        temperature: Spread of the sampling; 0 always takes the likeliest token.
        top_p: Keep the likeliest tokens that together reach this probability.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        seed: Makes sampling repeatable; None draws a new one.
    """

    thinking: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None

    def __post_init__(self) -> None:
        is_bool = isinstance(self.thinking, bool)
        _check("thinking", self.thinking, is_bool, "True or False", "False")
        self._take("max_new_tokens", int, 1 <= _number(self.max_new_tokens) <= _MAX_INT, "an integer of 1 or more", 512)
        self._take("temperature", float, 0 <= _number(self.temperature) <= 10, "a number from 0 to 10", 1.0)
        self._take("top_p", float, 0 < _number(self.top_p) <= 1, "a number above 0, up to 1", 0.95)
        self._take("top_k", int, 0 <= _number(self.top_k) <= _MAX_INT, "0 (all) or a positive integer", 64)
        if self.seed is not None:
            self._take("seed", int, 0 <= _number(self.seed) <= _MAX_SEED, f"None or an integer up to {_MAX_SEED:,}", 0)

    def _take(self, name: str, kind: type, is_good: bool, allowed: str, example: float) -> None:
        """Check a number and keep it as Python's own, which JSON can carry; numpy's are taken, too."""
        value = getattr(self, name)
        _check(name, value, is_good and (kind is float or isinstance(value, Integral)), allowed, example)
        object.__setattr__(self, name, kind(value))


def _number(value: object) -> float:
    """Return a number as it is, anything else as one that is in no range: text and booleans are mistakes."""
    return value if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _check(name: str, value: object, is_good: bool, allowed: str, example: object) -> None:
    if not is_good:
        raise BadSettingError(f"{name}={value!r} cannot be used.", f"It is {allowed}.", f"Try {name}={example}.")


class Delta(str):
    """A piece of generated text; `is_thought` tells a thought from the answer."""

    is_thought: bool = False

    @classmethod
    def thought(cls, text: str) -> "Delta":
        """Return a piece of the model's thinking."""
        delta = cls(text)
        delta.is_thought = True
        return delta


@dataclass(frozen=True)
class Finish:
    """The last thing an engine yields: why it stopped and what it counted.

    Attributes:
        reason: "stop" (the model ended its turn), "length" (max_new_tokens or the context is full) or "cancelled".
        prompt_tokens: Tokens of the prompt, or None where the engine does not say.
        new_tokens: Tokens generated, or None.
        cached_prompt_tokens: Of the prompt, those that the engine still knew from the turn before, or None.
        drafted_tokens: Tokens that an MTP drafter proposed, or None where there was none.
        accepted_tokens: Of these, what the model would have said, too.
    """

    reason: str
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True)
class Reply:
    """A finished answer; `str(reply)` is its text.

    Attributes:
        text: The answer.
        thoughts: What the model thought before it; never part of the history.
        finish_reason: "stop", "length", "cancelled", or "unfinished" of a reply that is still coming or broke off.
        prompt_tokens: Tokens read, or None where the engine does not say.
        new_tokens: Tokens generated.
        first_token_seconds: From the call to the first piece of text.
        seconds: From the call to the end.
        cached_prompt_tokens: Of the prompt, those that were not read again, or None where the engine does not say.
        drafted_tokens: Tokens that an MTP drafter proposed so far, or None where there was none.
        accepted_tokens: Of these, what the model would have said, too.
        tool_calls: The functions that the model asks for; nobody has run them.
    """

    text: str
    thoughts: str
    finish_reason: str
    prompt_tokens: int | None
    new_tokens: int
    first_token_seconds: float
    seconds: float
    cached_prompt_tokens: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def message(self) -> Message:
        """The reply as a turn to append to the conversation: the answer and the calls, without the thoughts."""
        calls = [call_message(call) for call in self.tool_calls if call.name]
        return {"role": "assistant", "content": self.text} | ({"tool_calls": calls} if calls else {})

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first one over the time after it, in tokens/s."""
        decoding = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / decoding if self.new_tokens > 1 and decoding > 0 else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that the model took, 0 to 1; None where nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


class EngineStream(Protocol):
    """What an engine returns for one request: an iterator of Deltas that ends with a Finish, and a way to stop it.

    One that drafts also has `drafts`: the tokens drafted and accepted so far, or (None, None).
    Calls of tools come between the Deltas, each when it is whole.
    """

    def __iter__(self) -> Iterator[Delta | ToolCall | Finish]: ...

    def cancel(self) -> None:
        """Stop from any thread; the iterator then ends."""


@dataclass
class Stream:
    """An answer while it is being generated: iterate over it for its pieces, read `reply` at any time.

    Attributes:
        source: The engine's stream.
        around: Entered before the first piece and left after the last.
    """

    source: EngineStream
    around: AbstractContextManager = field(default_factory=nullcontext)
    _started: float = field(default_factory=time.perf_counter)
    _answer: list[str] = field(default_factory=list)
    _thoughts: list[str] = field(default_factory=list)
    _calls: list[ToolCall] = field(default_factory=list)
    _first: float | None = None
    _ended: float | None = None
    _finish: Finish | None = None
    _cancelled: bool = False

    def __post_init__(self) -> None:
        self._pieces = self._read()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._pieces)

    def _read(self) -> Iterator[Delta]:
        with self.around:
            yield from self._pieces_of_source()

    def _pieces_of_source(self) -> Iterator[Delta]:
        try:
            for piece in self.source:
                if isinstance(piece, Finish):
                    self._finish = piece
                    break
                if self._first is None:
                    self._first = time.perf_counter()
                if isinstance(piece, ToolCall):
                    self._calls.append(piece)
                    continue
                (self._thoughts if piece.is_thought else self._answer).append(piece)
                yield piece
        except BaseException:
            self.source.cancel()  # Ctrl-C between two tokens must not leave the engine busy
            raise
        finally:
            self._ended = time.perf_counter()

    def cancel(self) -> None:
        """Stop generating, from any thread; what was generated stays in `reply`. After the end it changes nothing."""
        if self._ended is None:
            self._cancelled = True
            self.source.cancel()

    close = cancel

    @property
    def reply(self) -> Reply:
        """The answer so far; complete once the iteration has ended."""
        drafted, accepted = getattr(self.source, "drafts", (None, None))
        finish = self._finish or Finish("unfinished", drafted_tokens=drafted, accepted_tokens=accepted)
        end = self._ended or time.perf_counter()
        pieces = len(self._answer) + len(self._thoughts)
        return Reply(
            text="".join(self._answer),
            thoughts="".join(self._thoughts),
            finish_reason="cancelled" if self._cancelled else finish.reason,
            prompt_tokens=finish.prompt_tokens,
            new_tokens=pieces if finish.new_tokens is None else finish.new_tokens,
            first_token_seconds=(self._first or end) - self._started,
            seconds=end - self._started,
            cached_prompt_tokens=finish.cached_prompt_tokens,
            drafted_tokens=finish.drafted_tokens,
            accepted_tokens=finish.accepted_tokens,
            tool_calls=tuple(self._calls),
        )
