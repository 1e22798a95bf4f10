"""One answer of an OpenAI-compatible server while it comes: server-sent events to text, thoughts and calls."""

import codecs
import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator

from gemma_qat_kit.engines.openai_form import Calls
from gemma_qat_kit.engines.server import MAX_BYTES
from gemma_qat_kit.engines.sockets import Gatherer, keep_alive
from gemma_qat_kit.errors import EndpointError, KitError
from gemma_qat_kit.generation import Delta, Finish
from gemma_qat_kit.tools import ToolCall


class ServerStream:
    """The answer to one request, read from server-sent events."""

    def __init__(self, engine, path: str, body: dict):
        self._engine, self._path, self._body = engine, path, body
        self._socket: socket.socket | None = None
        self._is_cancelled = False
        self._reason, self._counts, self._patience, self.timings = None, (), None, {}
        self._calls = Calls()

    @property
    def drafts(self) -> tuple[int | None, int | None]:
        """Tokens drafted and accepted so far, where the server is llama.cpp and drafts; else (None, None)."""
        found = (self.timings.get("draft_n"), self.timings.get("draft_n_accepted"))
        return found if all(isinstance(count, int) for count in found) else (None, None)

    def __iter__(self) -> Iterator[Delta | ToolCall | Finish]:
        with self._engine._answering(self):
            yield from self._answer()

    def _answer(self) -> Iterator[Delta | ToolCall | Finish]:
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

    def _deltas(self) -> Iterator[Delta | ToolCall]:
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
            yield from self._calls
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
            self._calls.add(delta.get("tool_calls"))
            reason = choice.get("finish_reason") or self._reason
            self._reason = "stop" if reason == "tool_calls" else reason

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
