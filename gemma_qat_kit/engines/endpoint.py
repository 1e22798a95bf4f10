"""Talk to an OpenAI-compatible server: llama.cpp's (ours or another's), vLLM, Ollama.

Plain `http.client`, because a chunk of one token is read here some hundred times a second on the cores that compute
the next one: it costs 0.17 ms a token where a full client costs more than llama.cpp's budget leaves.
"""

import codecs
import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator
from functools import cached_property

from gemma_qat_kit.engines.server import MAX_BYTES, Server
from gemma_qat_kit.engines.server_queue import Queue, parse_queue
from gemma_qat_kit.engines.sockets import Gatherer, keep_alive
from gemma_qat_kit.errors import BadSettingError, EndpointError, KitError, ModelClosedError
from gemma_qat_kit.generation import Delta, Finish, Message, Settings
from gemma_qat_kit.memory.parts import Part

_COUNTERS = (("/v1/chat/completions/input_tokens", "input_tokens"), ("/tokenize", "count"))  # llama.cpp's, vLLM's


class EndpointEngine(Server):
    """A server reached by URL.

    Args:
        url: Base address, with or without "/v1".
        api_key: Sent as a bearer token; never printed.
        model: The server's name for the model; None takes the first it lists.

    Raises:
        EndpointError: The server is down, refuses the key, or is no OpenAI-compatible server.
    """

    name = "endpoint"
    _answering = contextlib.nullcontext  # entered with a stream before its request, left after its end
    gather_seconds = 0.0  # text is shown as it comes
    first_token_seconds = 3600.0
    """Longest wait for the first piece of an answer: others may come first, and a long prompt is read for minutes."""
    stall_seconds = 120.0
    """Longest pause after it; what came is kept, and an EndpointError says so."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None):
        super().__init__(url, api_key)
        self._is_closed, self._counters, self.asks_also = False, list(_COUNTERS), {}  # the last: in every request
        entry = {"id": model} if model else self._first_model()
        about = entry.get("meta")
        length = about.get("n_ctx") if isinstance(about, dict) else entry.get("max_model_len")  # llama.cpp, vLLM
        self.model, self.context_length = str(entry["id"]), length if isinstance(length, int) else None

    def _first_model(self) -> dict:
        """Return the server's entry of the first model it lists."""
        try:
            listed = [entry for entry in self._get("/v1/models")["data"] or () if entry.keys() >= {"id"}]
        except (KeyError, TypeError, AttributeError) as err:
            raise self._not_a_server() from err
        if not listed:
            raise EndpointError(f"{self.address} lists no model.", "A server offers at least one.", "Load one there.")
        return listed[0]

    def stream(self, conversation: str | list[Message], settings: Settings) -> "_ServerStream":
        """Return the stream of the answer to a conversation (or, given a string, of what follows a raw text).

        The request goes out when the stream is first read, so that it can be cancelled while the server still reads
        the prompt or answers somebody else.
        """
        if self._is_closed:
            raise _closed()
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k if settings.temperature else 1,  # spares sorting the whole vocabulary
            **self.asks_also,
        }
        if settings.seed is not None:
            body["seed"] = settings.seed
        if isinstance(conversation, str):
            return _ServerStream(self, "/v1/completions", body | {"prompt": conversation})
        thinking = {"chat_template_kwargs": {"enable_thinking": settings.thinking}}
        return _ServerStream(self, "/v1/chat/completions", body | thinking | {"messages": conversation})

    def queue(self) -> Queue | None:
        """Return how many answers are computed and how many wait; None of a server that does not tell (Ollama)."""
        try:
            figures = self._read("/metrics").decode("utf-8", "replace")
        except KitError:
            return None
        return parse_queue(figures, self._num_places)

    @cached_property
    def _num_places(self) -> int | None:
        """How many answers llama.cpp's server computes at once; others do not say."""
        try:
            count = self._get("/props")["total_slots"]
        except (KitError, KeyError, TypeError):
            return None
        return count if isinstance(count, int) else None

    def num_tokens(self, messages: list[Message], *, thinking: bool = False) -> int | None:
        """Return the tokens of a prompt, template included, or None where the server does not count them."""
        if self._is_closed:
            raise _closed()
        body = {"model": self.model, "messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        while self._counters:
            path, name = self._counters[0]
            count = self._post(path, body).get(name)
            if isinstance(count, int):
                return count
            del self._counters[0]
        return None

    def _explained(self, error: KitError) -> KitError:
        """Return what is really wrong when an answer fails with `error`."""
        return _closed() if self._is_closed else error

    def tokenize(self, text: str) -> list[int]:
        """Refuse: a server of this kind has no call for it."""
        raise self._no_scores()

    def logits(self, ids: list[int]):
        """Refuse: a server of this kind has no call for it."""
        raise self._no_scores()

    def _no_scores(self) -> BadSettingError:
        return BadSettingError(
            f"{self.address} cannot be measured.",
            "An OpenAI-compatible server gives no probabilities for a text that it did not write.",
            'Load the checkpoint itself here, as in gqk.load("E2B", "q4_0").',
        )

    def memory(self) -> tuple[Part, ...]:
        """Return no parts: the server's memory is not this machine's."""
        return ()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Stop using the server; it goes on running."""
        self._is_closed = True


def _closed() -> ModelClosedError:
    return ModelClosedError("This model is closed.", "A closed model answers no more.", "Load it again.")


class _ServerStream:
    """The answer to one request, read from server-sent events."""

    def __init__(self, engine: EndpointEngine, path: str, body: dict):
        self._engine, self._path, self._body = engine, path, body
        self._socket: socket.socket | None = None
        self._is_cancelled = False
        self._reason, self._counts, self._patience, self.timings = None, (), None, {}

    @property
    def drafts(self) -> tuple[int | None, int | None]:
        """Tokens drafted and accepted so far, where the server is llama.cpp and drafts; else (None, None)."""
        found = (self.timings.get("draft_n"), self.timings.get("draft_n_accepted"))
        return found if all(isinstance(count, int) for count in found) else (None, None)

    def __iter__(self) -> Iterator[Delta | Finish]:
        with self._engine._answering(self):
            yield from self._answer()

    def _answer(self) -> Iterator[Delta | Finish]:
        try:
            if not self._is_cancelled:
                yield from self._deltas()
            if self._reason is None and not self._is_cancelled:
                raise self._lost("was closed")
        except KitError as err:
            if not self._is_cancelled:
                raise self._engine._explained(err) from err.__cause__
        drafts = dict(zip(("drafted_tokens", "accepted_tokens"), self.drafts, strict=True))
        yield Finish(self._reason or "cancelled", *self._counts, **drafts)

    def _deltas(self) -> Iterator[Delta]:
        """Send the request and yield the pieces of the answer."""
        connection = self._engine._connect()
        self._socket = connection.sock
        keep_alive(self._socket)
        self._be_patient(self._engine.first_token_seconds)
        response = None
        try:
            if self._is_cancelled:  # while it connected
                return
            response = self._engine._request(connection, "POST", self._path, json.dumps(self._body))
            for event in self._events(response):
                for delta in self._read(event):
                    self._be_patient(self._engine.stall_seconds)
                    yield delta
        except KitError:
            raise
        except TimeoutError as err:
            raise self._stalled() from err
        except (OSError, http.client.HTTPException) as err:
            raise self._lost(f"was lost ({type(err).__name__})") from err
        except (ValueError, AttributeError, TypeError, RecursionError) as err:
            raise self._nonsense() from err
        finally:
            connection.close()
            if response is not None:
                response.close()

    def _be_patient(self, seconds: float) -> None:
        """Set how long the next event may take."""
        if seconds != self._patience:
            self._patience = seconds
            self._socket.settimeout(seconds)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict]:
        """Yield the JSON of each event. Source: HTML Living Standard, "Server-sent events"."""
        text = codecs.getincrementaldecoder("utf-8-sig")("replace")
        decode = io.IncrementalNewlineDecoder(text, translate=True).decode
        rest = data = ""
        chunk = b"begin"
        gather = Gatherer(self._socket, self._engine.gather_seconds)
        since = time.monotonic()
        while chunk and not self._is_cancelled:
            chunk = response.read1(65536)
            gather.took(len(chunk))
            *lines, rest = (rest + decode(chunk, final=not chunk)).split("\n")
            for line in lines:
                if line.startswith("data:"):
                    data += line[5:]
                elif data and not line:  # an empty line ends an event
                    if data.strip() == "[DONE]":
                        self._reason = self._reason or "stop"
                        return
                    yield json.loads(data)
                    data, since = "", time.monotonic()
            if time.monotonic() - since > self._patience:  # comments keep the connection alive, not the answer
                raise TimeoutError
            if len(rest) + len(data) > MAX_BYTES:
                raise ValueError("an event without end")

    def _read(self, event: dict) -> Iterator[Delta]:
        """Yield the text in an event and note why the answer ended and what it cost."""
        if error := event.get("error"):
            raise self._failed(error)
        if usage := event.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens"), cached
            self._counts = [count if isinstance(count, int) else None for count in counts]
        if isinstance(timings := event.get("timings"), dict):  # llama.cpp's
            self.timings = timings
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                yield Delta.thought(thought)
            if text := delta.get("content") or delta.get("text"):
                yield Delta(text)
            self._reason = choice.get("finish_reason") or self._reason

    def _failed(self, error: object) -> EndpointError:
        text = error.get("message") if isinstance(error, dict) else error
        return EndpointError(
            f"{self._engine.address} stopped with an error: {self._engine._shown(text)}.",
            "An answer ends with a finish reason.",
            "Shorten the conversation, or load the model again with a larger context_length.",
        )

    def _lost(self, how: str) -> EndpointError:
        return EndpointError(
            f"The connection to {self._engine.address} {how} before the answer ended.",
            "What came so far is kept.",
            "Ask again; load the model again if its server has stopped.",
        )

    def _stalled(self) -> EndpointError:
        return EndpointError(
            f"{self._engine.address} has sent nothing for {self._patience:g} seconds.",
            "An answer comes without such a pause; what came so far is kept.",
            "Ask again; if the server is only slow, set model.runner.stall_seconds higher.",
        )

    def _nonsense(self) -> EndpointError:
        return EndpointError(
            f"{self._engine.address} sent something else than an answer.",
            "Answers come as an OpenAI-compatible server streams them.",
            "Ask again; look at the server's log if it happens twice.",
        )

    def cancel(self) -> None:
        """Close the connection: the server stops generating, a blocked read returns."""
        self._is_cancelled = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # already closed by the other side
                self._socket.shutdown(socket.SHUT_RDWR)
