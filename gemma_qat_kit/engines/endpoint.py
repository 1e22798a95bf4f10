"""Talk to an OpenAI-compatible server: llama.cpp's (ours or another's), vLLM, Ollama.

Plain `http.client`, because a chunk of one token is read here some hundred times a second on the cores that compute
the next one: it costs 0.17 ms a token where a full client costs more than llama.cpp's budget leaves.
"""

import contextlib
import http.client
import json
import socket
import ssl
import urllib.parse
from collections.abc import Iterator

from gemma_qat_kit.errors import EndpointError, ModelClosedError
from gemma_qat_kit.generation import Delta, Finish, Message, Settings

CONNECT_SECONDS = 10
STALL_SECONDS = 600  # a long prompt on a slow machine sends nothing for minutes


class EndpointEngine:
    """A server reached by URL.

    Args:
        url: Base address, with or without "/v1".
        api_key: Sent as a bearer token; never printed.
        model: The server's name for the model; None takes the first it lists.

    Raises:
        EndpointError: The server is down, refuses the key, or is no OpenAI-compatible server.
    """

    name = "endpoint"

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(
                f"{url!r} is not a server's address.", "It looks like http://host:port/v1.", "Check it."
            )
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._is_closed = False
        listed = [entry["id"] for entry in self._get("/models").get("data", []) if "id" in entry]
        if model is None and not listed:
            raise EndpointError(f"{self.address} lists no model.", "A server offers at least one.", "Load one there.")
        self.model = model or listed[0]
        self.context_length: int | None = None

    @property
    def address(self) -> str:
        """The server's address without path, user or key."""
        port = f":{self._parts.port}" if self._parts.port else ""
        return f"{self._parts.scheme}://{self._parts.hostname}{port}"

    def stream(self, conversation: str | list[Message], settings: Settings) -> "_ServerStream":
        """Send a conversation (or, as a string, a raw prompt) and return the stream of the answer."""
        if self._is_closed:
            raise ModelClosedError("This model is closed.", "A closed model answers no more.", "Load it again.")
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if settings.top_k:
            body["top_k"] = settings.top_k
        if settings.seed is not None:
            body["seed"] = settings.seed
        if isinstance(conversation, str):
            return self._open("/completions", body | {"prompt": conversation})
        thinking = {"chat_template_kwargs": {"enable_thinking": settings.thinking}}
        return self._open("/chat/completions", body | thinking | {"messages": conversation})

    def _open(self, path: str, body: dict) -> "_ServerStream":
        connection = self._connect()
        response = self._request(connection, "POST", path, json.dumps(body))
        return _ServerStream(self, connection, response)

    def _get(self, path: str) -> dict:
        connection = self._connect()
        try:
            return json.loads(self._request(connection, "GET", path).read())
        except ValueError as err:
            raise self._not_a_server() from err
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname, self._parts.port, timeout=CONNECT_SECONDS)

    def _request(self, connection, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        try:
            connection.connect()
            connection.sock.settimeout(STALL_SECONDS)
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
        except ssl.SSLError as err:
            raise EndpointError(
                f"{self.address} answers without a valid certificate.", "https needs one.", "Check the address."
            ) from err
        except (OSError, http.client.HTTPException) as err:
            raise EndpointError(
                f"{self.address} does not answer ({type(err).__name__}).",
                "A running OpenAI-compatible server is needed.",
                "Start the server, or check the address and port.",
            ) from err
        if response.status in (401, 403):
            raise EndpointError(f"{self.address} refused the key.", "It wants its own API key.", 'Pass token="…".')
        if response.status == 404:
            raise self._not_a_server()
        if response.status != 200:
            raise EndpointError(
                f"{self.address} answered {response.status}: {_error_text(response.read())}.",
                "A request within the server's limits gets 200.",
                "Shorten the conversation or max_new_tokens, or look at the server's log.",
            )
        return response

    def _not_a_server(self) -> EndpointError:
        return EndpointError(
            f"{self.address}{self._path} is not an OpenAI-compatible server.",
            "It answers /v1/models and /v1/chat/completions.",
            "Check the address.",
        )

    def memory(self) -> dict[str, int]:
        """Return no parts: the server's memory is not this machine's."""
        return {}

    def close(self) -> None:
        """Stop using the server; it goes on running."""
        self._is_closed = True


def _error_text(raw: bytes) -> str:
    """Return the message of a server's error body, shortened: it is somebody else's text."""
    try:
        text = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = raw.decode("utf-8", "replace")
    return str(text)[:300]


class _ServerStream:
    """The answer of one request, read from server-sent events."""

    def __init__(self, engine: EndpointEngine, connection, response):
        self._engine, self._connection, self._response = engine, connection, response
        self._is_cancelled = False

    def __iter__(self) -> Iterator[Delta | Finish]:
        reason, usage, has_ended = "length", {}, False
        try:
            for event in self._events():
                usage = event.get("usage") or usage
                for choice in event.get("choices", []):
                    delta = choice.get("delta", choice)
                    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                        yield Delta.thought(thought)
                    if text := delta.get("content") or delta.get("text"):
                        yield Delta(text)
                    if choice.get("finish_reason"):
                        reason, has_ended = choice["finish_reason"], True
        except (OSError, ValueError, AttributeError, http.client.HTTPException) as err:
            if not self._is_cancelled:
                raise self._lost() from err
        finally:
            self._connection.close()
        if not has_ended and not self._is_cancelled:
            raise self._lost()
        yield Finish(reason, usage.get("prompt_tokens"), usage.get("completion_tokens"))

    def _events(self) -> Iterator[dict]:
        """Yield the JSON of each `data:` line."""
        rest = b""
        while not self._is_cancelled and (data := self._response.read1(65536)):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise self._failed(_error_text(line[6:]))
                    yield event

    def _failed(self, text: str) -> EndpointError:
        return EndpointError(
            f"{self._engine.address} stopped with an error: {text}.",
            "An answer ends with a finish reason.",
            "Shorten the conversation, or load the model again with a larger context_length.",
        )

    def _lost(self) -> EndpointError:
        return EndpointError(
            f"The connection to {self._engine.address} was lost before the answer ended.",
            "What came so far is kept.",
            "Ask again; load the model again if its server has stopped.",
        )

    def cancel(self) -> None:
        """Close the connection: the server stops generating, a blocked read returns."""
        self._is_cancelled = True
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):  # already closed by the other side
                self._connection.sock.shutdown(socket.SHUT_RDWR)
