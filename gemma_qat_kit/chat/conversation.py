"""A conversation with a model, as data: every question and answer, its branches, and how each answer came about."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from gemma_qat_kit.attachments import decode_attachments, encode_attachments
from gemma_qat_kit.chat.answer import Answer
from gemma_qat_kit.chat.context import fit_context
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.messages import Message
from gemma_qat_kit.tools import tool_schemas


@dataclass(frozen=True)
class Turn:
    """One message, and what is known of how it came about.

    Attributes:
        number: Its place in `Conversation.turns`.
        parent: The number of the turn that it follows, None of a first one.
        role: "user" or "assistant".
        content: What was said, as text.
        attachments: Images and sounds that a question came with, as `encode_attachments` writes them.
        thoughts: What the model thought first; no later prompt has them.
        tool_calls: The functions that an answer wants called, as in a message; "unread" has what could not be read.
        model: What answered.
        settings: Those of the answer: thinking, max_new_tokens, temperature, top_p, top_k, seed.
        timings: What was measured: the numbers of a `Reply`, and `num_dropped`, the turns that had no room.
    """

    number: int
    parent: int | None
    role: str
    content: str
    attachments: tuple[dict, ...] = ()
    thoughts: str = ""
    tool_calls: tuple[dict, ...] = ()
    model: str = ""
    settings: dict = field(default_factory=dict)
    timings: dict = field(default_factory=dict)

    @property
    def message(self) -> Message:
        """The turn as a model reads it."""
        if self.attachments:
            parts = [*self.attachments, {"type": "text", "text": self.content}]
            return decode_attachments([{"role": self.role, "content": parts}])[0]
        read = [{"type": c["type"], "function": c["function"]} for c in self.tool_calls if not c.get("unread")]
        return {"role": self.role, "content": self.content} | ({"tool_calls": read} if read else {})


class Conversation:
    """Questions and answers as a tree: what is asked or answered again stands beside what was there, and stays.

    Args:
        system: Instructions that every prompt begins with.

    Attributes:
        turns: Every turn of every branch, in the order in which they came.
        tip: Number of the last turn of the branch that is shown, None before the first.
    """

    def __init__(self, system: str = ""):
        self.system, self.turns, self.tip = system, [], None

    @property
    def path(self) -> list[Turn]:
        """The turns of the branch that is shown, oldest first."""
        return self.path_to(self.tip)

    def path_to(self, number: int | None) -> list[Turn]:
        """Return the turns from the first to this one."""
        found = []
        while number is not None:
            found.append(self.turns[number])
            number = found[-1].parent
        return found[::-1]

    @property
    def messages(self) -> list[Message]:
        """The branch that is shown, as `Model.chat` takes it, thoughts left out."""
        return self._messages(self.path)

    def _messages(self, turns: list[Turn]) -> list[Message]:
        first = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*first, *(turn.message for turn in turns)]

    def beside(self, number: int) -> list[int]:
        """Return the numbers of the turns that stand in the same place, this one among them."""
        parent = self.turns[number].parent
        return [turn.number for turn in self.turns if turn.parent == parent]

    def turn(self, number: int) -> Turn:
        """Return a turn.

        Raises:
            BadSettingError: There is none of that number.
        """
        if not (isinstance(number, int) and 0 <= number < len(self.turns)):
            raise BadSettingError(
                f"There is no turn {number!r:.50}.",
                f"This conversation has turns 0 to {len(self.turns) - 1}." if self.turns else "There are no turns yet.",
                "Pass one of them." if self.turns else "Ask something first.",
            )
        return self.turns[number]

    def show(self, number: int) -> None:
        """Show the branch of a turn, to the end of what was said last in it, in place.

        Raises:
            BadSettingError: There is no such turn.
        """
        self.tip = self.turn(number).number
        while following := [turn.number for turn in self.turns if turn.parent == self.tip]:
            self.tip = following[-1]

    def add(self, role: str, content: str, *, after: int | None = None, **known) -> Turn:
        """Add a turn behind another one, show its branch, and return it.

        Args:
            role: "user" or "assistant".
            content: What was said.
            after: Number of the turn that it follows, None at the beginning.
            known: More of `Turn`.
        """
        turn = Turn(len(self.turns), after, role, content, **known)
        self.turns.append(turn)
        self.tip = turn.number
        return turn

    def ask(
        self,
        model,
        question: str,
        *,
        attachments: tuple[dict, ...] = (),
        instead_of: int | None = None,
        drop_oldest: bool = False,
        **settings,
    ) -> Answer:
        """Ask a question behind the branch that is shown, and return the answer as it comes.

        Question and answer are added when the answer has ended or was stopped; one that said nothing leaves no trace.

        Args:
            model: A `Model`.
            question: What to ask.
            attachments: Images and sounds to ask about, as in a message: {"type": "image", "image": path or bytes}, ….
            instead_of: Number of an earlier question: this one takes its place in a branch of its own.
            drop_oldest: Leave the oldest turns out of the prompt where the context is too short for all. False refuses.
            settings: Those of `Model.stream`. Without a seed one is drawn and kept, so that the answer can be replayed.

        Raises:
            BadSettingError: The question is empty, there is no turn `instead_of`, a setting is wrong, or the prompt is
                longer than the context.
        """
        if not isinstance(question, str) or not question.strip():
            raise BadSettingError("There is no question to answer.", "It is some text.", "Write one and try again.")
        before = self.tip if instead_of is None else self.turn(instead_of).parent
        asked = Turn(-1, before, "user", question.strip(), as_attachments(attachments))
        return self._answer(model, [*self.path_to(before), asked], drop_oldest, settings)

    def answer_again(self, model, *, drop_oldest: bool = False, **settings) -> Answer:
        """Answer the last question of the branch once more, beside the answer that is there; see `ask`.

        Raises:
            BadSettingError: Nothing was asked yet.
        """
        path = self.path
        while path and path[-1].role != "user":
            path.pop()
        if not path:
            raise BadSettingError("Nothing was asked yet.", "A question can be answered again.", "Ask one first.")
        return self._answer(model, path, drop_oldest, settings)

    def _answer(self, model, path: list[Turn], drop_oldest: bool, settings: dict) -> Answer:
        settings = settings | ({"seed": random.randrange(2**31)} if settings.get("seed") is None else {})
        if settings.get("tools"):
            settings["tools"] = tool_schemas(settings["tools"])
        fit = fit_context(model, self._messages(path), settings.get("max_new_tokens"), may_drop=drop_oldest)
        return Answer(self, model.stream(fit.messages, **settings), path[-1], model.name, settings, fit)

    def keep(self, question: Turn, **answer) -> None:
        """Add an answer behind its question, which is added first where it is new, in place."""
        if question.number < 0:
            question = self.add(**_fields(question))
        self.add("assistant", after=question.number, **answer)

    def replay(self, model) -> "Conversation":
        """Ask another model, or the same one, the same questions with the same settings and seeds.

        Returns:
            A new conversation; this one stays as it is.
        """
        again = Conversation(self.system)
        questions = {turn.parent: turn for turn in self.path if turn.role == "assistant"}
        for turn in self.path:
            if turn.role == "user":
                kept = questions.get(turn.number)
                answer = again.ask(model, turn.content, attachments=turn.attachments, **(kept.settings if kept else {}))
                answer.finish()
        return again

    def save(self, path: str | Path) -> Path:
        """Write the conversation to a file, whole or not at all, and return its path.

        Raises:
            BadSettingError: It cannot be written there.
        """
        from gemma_qat_kit.chat.conversation_file import save

        return save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> "Conversation":
        """Read a conversation that `save` wrote.

        Raises:
            BadSettingError: There is no file, or one of another version or kind; the message says where it is wrong.
        """
        from gemma_qat_kit.chat.conversation_file import load

        return load(Path(path))

    def to_markdown(self) -> str:
        """Return the branch that is shown as Markdown."""
        from gemma_qat_kit.chat.conversation_file import to_markdown

        return to_markdown(self)

    def to_jsonl(self) -> str:
        """Return the branch that is shown as one line of JSON, {"messages": […]}: a row for `finetune`."""
        from gemma_qat_kit.chat.conversation_file import to_jsonl

        return to_jsonl(self)

    def __len__(self) -> int:
        return len(self.path)

    def __str__(self) -> str:
        return self.to_markdown()


def as_attachments(parts: tuple[dict, ...]) -> tuple[dict, ...]:
    """Return parts of a message as a turn keeps them, in base64; what a turn has kept stays as it is.

    Raises:
        BadSettingError: See `checked_content`.
    """
    given = [{"role": "user", "content": [part]} for part in parts]
    kept = ("data" in part and isinstance(part["data"], str) for part in parts)
    checked = [decode_attachments([m])[0] if is_kept else m for m, is_kept in zip(given, kept, strict=True)]
    return tuple(part for message in encode_attachments(checked) for part in message["content"])


def _fields(turn: Turn) -> dict:
    """Return what `add` needs to make a turn once more."""
    return {"role": turn.role, "content": turn.content, "after": turn.parent, "attachments": turn.attachments}
