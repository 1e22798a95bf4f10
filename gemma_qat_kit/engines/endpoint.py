"""Talk to an OpenAI-compatible server: llama.cpp's (ours or another's), vLLM, Ollama.

Plain `http.client`, because a chunk of one token is read here some hundred times a second on the cores that compute
the next one: it costs 0.17 ms a token where a full client costs more than llama.cpp's budget leaves.
"""

import contextlib
from functools import cached_property

from gemma_qat_kit.engines.openai_form import openai_messages
from gemma_qat_kit.engines.server import Server
from gemma_qat_kit.engines.server_queue import Queue, parse_queue
from gemma_qat_kit.engines.server_stream import ServerStream
from gemma_qat_kit.errors import BadSettingError, EndpointError, KitError, ModelClosedError
from gemma_qat_kit.generation import Settings
from gemma_qat_kit.memory.parts import Part
from gemma_qat_kit.messages import Message

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
    takes: tuple[str, ...] = ("image", "audio")  # as far as its model does; a server says so itself where it does not
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

    def stream(
        self, conversation: str | list[Message], settings: Settings, tools: list[dict] | None = None
    ) -> "ServerStream":
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
            return ServerStream(self, "/v1/completions", body | {"prompt": conversation})
        thinking = {"chat_template_kwargs": {"enable_thinking": settings.thinking}}
        offered = {"tools": tools} if tools else {}
        messages = {"messages": openai_messages(conversation)}
        return ServerStream(self, "/v1/chat/completions", body | thinking | offered | messages)

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
        body = {"model": self.model, "messages": openai_messages(messages)}
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
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
