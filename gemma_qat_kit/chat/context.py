"""What of a conversation fits in the context, and what would have to be left out: counted before anything is asked."""

from dataclasses import dataclass

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.messages import Message


@dataclass(frozen=True)
class Fit:
    """What a model reads of a conversation.

    Attributes:
        messages: Those that it reads.
        num_tokens: Of these, with the chat template; None where the engine cannot count.
        num_dropped: Oldest messages that are left out, system not counted.
        context_length: Tokens of prompt and answer together, or None.
    """

    messages: list[Message]
    num_tokens: int | None
    num_dropped: int
    context_length: int | None


def fit_context(model, messages: list[Message], max_new_tokens: int | None = None, *, may_drop: bool = False) -> Fit:
    """Count what a model will read, and leave out the oldest turns where there is no room and that is wanted.

    Room for an answer is kept: `max_new_tokens`, or a quarter of the context if that is less.

    Args:
        model: A `Model`.
        messages: The conversation; its last message is the question.
        max_new_tokens: Longest answer, in tokens; None for 512.
        may_drop: Leave the oldest questions out with their answers. False refuses a prompt that is too long.

    Raises:
        BadSettingError: The prompt is too long, or the last question is by itself.
    """
    length, count = model.context_length, model.num_tokens(messages)
    if length is None or count is None:
        return Fit(messages, count, 0, length)
    room = length - min(max_new_tokens or 512, length // 4)
    if count <= room or (count < length and not may_drop):
        return Fit(messages, count, 0, length)
    first = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(first) :]
    starts = [i for i, message in enumerate(rest) if i and message["role"] == "user"] if may_drop else []
    for start in starts:
        kept = first + rest[start:]
        count = model.num_tokens(kept)
        if count <= room or (start == starts[-1] and count < length):
            return Fit(kept, count, start, length)
    raise BadSettingError(
        f"The prompt has {count:,} tokens.",
        f"With its answer it must fit in context_length={length:,}.",
        "Shorten it, start a new conversation, or load the model with a larger context_length.",
    )
