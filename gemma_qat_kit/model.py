"""A loaded model: one face, whatever engine runs it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.attachments import kinds_in
from gemma_qat_kit.catalog import BUILT_IN_SIZE, Sampling
from gemma_qat_kit.engines.server_queue import Queue
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.generation import Reply, Settings, Stream
from gemma_qat_kit.memory.measure import MemoryUse
from gemma_qat_kit.messages import Message, as_messages
from gemma_qat_kit.recording import chat_receipt, settings_of
from gemma_qat_kit.tools import tool_schemas


@dataclass(eq=False)
class Model:
    """A model that is ready to chat; use it in a `with` block or call `close` when done.

    Attributes:
        size: "E2B" … "31B", "smollm2-135m", or None where the checkpoint is no published one.
        format: As in the catalog; "endpoint" for a server, whose format nobody here knows.
        sampling: The defaults of the model card.
        runner: The engine that runs it.
    """

    size: str | None
    format: str
    sampling: Sampling
    runner: object

    @property
    def name(self) -> str:
        """What to call it: size and format, or the server's name for it."""
        return (
            getattr(self.runner, "model", "") if self.format == "endpoint" else f"{self.size or 'custom'} {self.format}"
        )

    @property
    def engine(self) -> str:
        """ "llama_cpp", "transformers" or "endpoint"."""
        return self.runner.name

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, None where the server does not say."""
        return self.runner.context_length

    @property
    def drafter_note(self) -> str | None:
        """Whether the MTP drafter pays here, and is on, as a sentence with both speeds; None without a drafter."""
        drafting = getattr(self.runner, "drafting", None)
        return drafting.note if drafting else None

    @property
    def takes(self) -> tuple[str, ...]:
        """What a question may hold besides text: "image", "audio", both or nothing. A server refuses for itself."""
        return getattr(self.runner, "takes", ())

    @property
    def hf(self) -> tuple:
        """The plain (model, processor) of transformers.

        Raises:
            BadSettingError: Another engine runs this model.
        """
        if self.engine != "transformers":
            raise BadSettingError(
                f"{self.name} runs in {self.engine}, which has no transformers model.",
                'bf16, q4_0-unquantized, w4a16, nf4 and int8 have one, and mobile with engine="transformers".',
                f'Load one of these: gqk.load("{self.size or "E2B"}", "q4_0-unquantized").hf.',
            )
        return self.runner.hf

    def stream(
        self,
        conversation: str | list[Message],
        *,
        thinking: bool = False,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        tools: Sequence[dict | Callable] | None = None,
    ) -> Stream:
        """Answer a question or conversation piece by piece.

        Args:
            conversation: A question, or messages whose last one is the user's or a tool's; thoughts in earlier answers
                are left out. A user's content may hold images and sound; see `attachments`.
            thinking: Let the model think first; the pieces then say which of them `is_thought`.
            max_new_tokens: Most tokens to generate, thoughts included.
            temperature: None takes the model card's value, as for `top_p` and `top_k`; 0 is repeatable without a seed.
            top_p: Keep the likeliest tokens that together reach this probability.
            top_k: Keep this many of the likeliest tokens; 0 keeps all.
            seed: Makes sampling repeatable.
            tools: Functions that the model may ask for: Python functions, or JSON schemas. None is ever run: the calls
                are in the reply's `tool_calls`, and a message {"role": "tool", "name": …, "content": text} after
                `reply.message` says what came of one.

        Returns:
            An iterator of text pieces with `reply` (the answer so far) and `cancel()`.

        Raises:
            BadSettingError: A setting or message that cannot be used, or a prompt beyond `context_length`, which
                llama.cpp finds at the first piece.
            ModelClosedError: The model was closed.
            EndpointError: At the first piece: the server is down or refuses the request.
        """
        if thinking and self.size == BUILT_IN_SIZE:
            raise BadSettingError(
                f"{self.size} cannot think.", "Gemma 4 can, in every size.", "Leave thinking=False, or load E2B."
            )
        settings = self._settings(thinking, max_new_tokens, temperature, top_p, top_k, seed)
        offered = {"tools": tool_schemas(tools)} if tools else {}
        return self._recorded(Stream(self.runner.stream(self._messages(conversation), settings, **offered)))

    def chat(self, conversation: str | list[Message], **settings) -> Reply:
        """Answer a question or conversation and return the whole reply; takes what `stream` takes."""
        return _finish(self.stream(conversation, **settings))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Continue a raw text without the chat template; the arguments are those of `stream`.

        Raises:
            BadSettingError: There is no text to continue, or a setting cannot be used.
        """
        if not isinstance(prompt, str) or not prompt:
            raise BadSettingError(
                f"{prompt!r:.200} is no prompt.", "There must be a text to continue.", "Pass some text, or use chat()."
            )
        settings = self._settings(False, max_new_tokens, temperature, top_p, top_k, seed)
        return _finish(self._recorded(Stream(self.runner.stream(prompt, settings))))

    def queue(self) -> Queue | None:
        """Return how many answers are computed and how many wait for a place: what to show before the first token.

        llama.cpp tells, here and as a server, and vLLM. None where the engine or its server does not, or not now.
        """
        ask = getattr(self.runner, "queue", None)
        return ask() if ask else None

    def num_tokens(self, conversation: str | list[Message], *, thinking: bool = False) -> int | None:
        """Count what the model would read of a question or conversation: tokens, the chat template's included.

        Returns:
            The number, or None where a server does not count.

        Raises:
            BadSettingError: A message that cannot be used.
            EndpointError: The server is down.
        """
        return self.runner.num_tokens(self._messages(conversation), thinking=thinking)

    def _messages(self, conversation: str | list[Message]) -> list[Message]:
        """Return a checked conversation that this model can take in whole."""
        messages = as_messages(conversation)
        if extra := kinds_in(messages) - set(self.takes):
            raise BadSettingError(
                f"{self.name} takes no {' and no '.join(sorted(extra))}.",
                f"As it was loaded, it takes text{''.join(f' and {kind}' for kind in self.takes)}.",
                f'Load it with its towers: gqk.load("{self.size or "…"}", "{self.format}", text_only=False).'
                if not self.takes and self.size != BUILT_IN_SIZE
                else "Take E2B, E4B or 12B, which see and hear; 26B-A4B and 31B see.",
            )
        return messages

    def _recorded(self, stream: Stream) -> Stream:
        """Keep a receipt of the memory that an answer takes, and say what would take less where it was too much."""
        stream.around = self._around(stream)
        return stream

    @contextmanager
    def _around(self, stream: Stream) -> Iterator[None]:
        settings = settings_of(self)
        with out_of_memory.help(settings) if settings else nullcontext(), chat_receipt(self, stream):
            yield

    def _settings(self, thinking, max_new_tokens, temperature, top_p, top_k, seed) -> Settings:
        """Fill in the model card's sampling where the caller says nothing."""
        return Settings(
            thinking,
            max_new_tokens,
            self.sampling.temperature if temperature is None else temperature,
            self.sampling.top_p if top_p is None else top_p,
            self.sampling.top_k if top_k is None else top_k,
            seed,
        )

    def memory(self) -> MemoryUse:
        """Measure what the model holds now, in bytes."""
        return MemoryUse(self.runner.memory())

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.runner.is_closed

    def close(self) -> None:
        """Free the model's memory; calling it twice does no harm."""
        self.runner.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        threads = getattr(self.runner, "num_threads", None)
        engine = f"{self.engine} on {threads} thread{'s' * (threads > 1)}" if threads else self.engine
        return f"<Model {self.name}, {engine}, context_length={self.context_length}>"


def _finish(stream: Stream) -> Reply:
    for _ in stream:
        pass
    return stream.reply
