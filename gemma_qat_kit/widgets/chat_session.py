"""The chat behind a ChatPanel: one conversation, the model that answers, and the answer that is coming."""

import threading
import weakref
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.chat.answer import Answer
from gemma_qat_kit.chat.conversation import Conversation, Turn
from gemma_qat_kit.chat.models import held_bytes, named_models
from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.speed import SpeedLimit, speed_limit


@dataclass(frozen=True)
class Choice:
    """The settings of the next answer; None takes the model card's.

    Attributes:
        thinking, max_new_tokens, temperature, top_p, top_k, seed: As in `Model.stream`.
    """

    thinking: bool = False
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


class ChatSession:
    """A conversation that goes on in a thread; what is shown of it is read from here at any time.

    Args:
        models: One, a list of them to choose from, or a dict of them by name.
        conversation: To go on with; a path is read if it exists and written after every answer.
        choice: The settings to begin with.

    Attributes:
        conversation: Every question and answer.
        choice: The settings of the next answer; `first_choice` are those it began with.
        model, model_name: What answers next.
        memory_bytes: What it held after the last answer, measured; None where nobody here can tell.
        answer: The one that is coming, or came last.
        error: What ended it, or None.
        num_used: Tokens of the context that the conversation has taken, None before the first answer.
        is_answering: Until it has ended.
        limit: How fast this machine could answer at most; None of a server.
        queue: Who else waits for the model, a `Queue`; None where nobody tells.
        standing: The turns to show while it is coming; the last one is its question, whose number may be -1.
        lost_question: A question that got no answer, to be asked again.
    """

    def __init__(self, models, conversation: Conversation | str | Path | None, choice: Choice):
        self.models = named_models(models)
        self.model_name, self.model = next(iter(self.models.items()))
        self._path = None if conversation is None or isinstance(conversation, Conversation) else Path(conversation)
        if self._path is not None:
            conversation = Conversation.load(self._path) if self._path.expanduser().exists() else None
        self.conversation = conversation if conversation is not None else Conversation()
        self.choice = self.first_choice = choice
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.lost_question, self._asked = "", ("", (), None)
        self.standing: list[Turn] = []
        self.is_answering = self._is_stopping = False
        self.num_used: int | None = None
        self.memory_bytes: int | None = None
        self.limit: SpeedLimit | None = None
        self.queue = None
        self._lock, self._ended = threading.RLock(), threading.Event()

    def begin(self, question: str = "", *, attachments: tuple = (), instead_of: int | None = None) -> bool:
        """Take the turn for a question, or without one for another answer to the last; False while one is coming.

        Args:
            question: What to ask.
            attachments: Images and sounds to ask about.
            instead_of: Number of an earlier question that it is asked in place of.

        Raises:
            BadSettingError: There is no such turn.
        """
        with self._lock:
            if self.is_answering:
                return False
            self.standing = self._turns_before_the_answer(question, attachments, instead_of)
            self.is_answering, self._is_stopping = True, False
            self._ended.clear()
            self.answer = self.error = None
            self.lost_question = ""
            self._asked = (question, attachments, instead_of)
            return True

    def _turns_before_the_answer(self, question: str, attachments: tuple, instead_of: int | None) -> list[Turn]:
        path = self.conversation.path
        if not question:
            return path[:-1] if path and path[-1].role == "assistant" else path
        tip = self.conversation.tip if instead_of is None else self.conversation.turn(instead_of).parent
        return [*self.conversation.path_to(tip), Turn(-1, tip, "user", question.strip(), attachments)]

    def run(self) -> None:
        """Wait for the answer in this thread, after `begin`; errors are kept. `end` must follow."""
        num_turns, (question, attachments, instead_of) = len(self.conversation.turns), self._asked
        threading.Thread(target=self._watch_queue, daemon=True).start()
        try:
            answer = self._answer(question, attachments, instead_of)
            with self._lock:
                self.answer = answer
                if self._is_stopping:
                    answer.cancel()
            answer.finish()
            if self._path is not None:
                self.conversation.save(self._path)
        except Exception as err:
            self.error = err
        if len(self.conversation.turns) == num_turns:
            self.lost_question = question
        elif self.answer.reply.prompt_tokens is not None:
            self.num_used = self.answer.reply.prompt_tokens + self.answer.reply.new_tokens
        self.memory_bytes = held_bytes(self.model)
        if not self._is_stopping:  # the first time it measures for a second, and Stop must not wait
            self.limit = self._limit()

    def _limit(self) -> SpeedLimit | None:
        try:
            return speed_limit(self.model, num_tokens=self.num_used or 1)
        except KitError:
            return None

    def _watch_queue(self) -> None:
        """Ask about once a second who else waits, until the first token or for as long as somebody tells."""
        while self.is_answering and not (self.answer and self.answer.reply.new_tokens):
            self.queue = self.model.queue()
            if self.queue is None or self._ended.wait(1):
                break
        self.queue = None

    def end(self) -> None:
        """Give the turn back."""
        self.is_answering = False
        self._ended.set()

    def wait(self) -> None:
        """Wait until no answer is coming."""
        self._ended.wait()

    def _answer(self, question: str, attachments: tuple, instead_of: int | None) -> Answer:
        place = instead_of if question else self.conversation.tip
        settings = {"drop_oldest": True, **vars(self.choice)}
        if settings["seed"] is not None and place is not None:  # another answer in the same place needs another seed
            settings["seed"] += len(self.conversation.beside(place))
        if question:
            more = {"attachments": attachments, "instead_of": instead_of}
            return self.conversation.ask(self.model, question, **more, **settings)
        return self.conversation.answer_again(self.model, **settings)

    @property
    def takes_attachments(self) -> bool:
        """Whether the model can be shown images or sounds."""
        return bool(getattr(self.model.runner, "takes", ()))

    @property
    def cannot_think(self) -> bool:
        """Whether the model has no thinking mode."""
        return self.model.size == BUILT_IN_SIZE

    def stop(self) -> None:
        """Stop the answer that is coming, from any thread; what has been said stays."""
        with self._lock:
            self._is_stopping = True
            if self.answer is not None:
                self.answer.cancel()

    def choose_model(self, name: str) -> None:
        """Let another model answer next.

        Raises:
            BadSettingError: There is none of that name.
        """
        if name not in self.models:
            raise BadSettingError(
                f"{name!r} is none of this panel's models.", f"It has {', '.join(self.models)}.", "Choose one of them."
            )
        self.model_name, self.model = name, self.models[name]

    def clear(self) -> None:
        """Begin a new conversation; a file of the old one is kept beside it under another name.

        Raises:
            BadSettingError: The file cannot be written.
        """
        if self.is_answering:
            return
        if self._path is not None and self.conversation.turns:
            self.conversation.save(_free_name(self._path.expanduser()))
        self.conversation = Conversation(self.conversation.system)
        self.answer = self.error = self.num_used = None
        self.lost_question = ""


# By their first models. Weak, like the models in it: a panel that is shown keeps its session, and nothing else does.
_sessions: "weakref.WeakKeyDictionary[object, weakref.ref[ChatSession]]" = weakref.WeakKeyDictionary()


def session_for(models, conversation: Conversation | str | Path | None, choice: Choice) -> ChatSession:
    """Return the session of a panel: a new one, or that of the same cell when it is run again.

    Args:
        models, conversation, choice: As in `ChatSession`.
    """
    wanted = named_models(models)
    first = next(iter(wanted.values()))
    found = _sessions.get(first, lambda: None)() if conversation is None else None
    if found is None or list(found.models.values()) != list(wanted.values()):
        found = ChatSession(wanted, conversation, choice)
    elif found.first_choice != choice:  # the call was changed, so what it says holds
        found.choice = found.first_choice = choice
    if conversation is None:
        _sessions[first] = weakref.ref(found)
    return found


def _free_name(path: Path) -> Path:
    """Return a name that no file has, as in chat-1.json."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
