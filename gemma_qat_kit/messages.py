"""The conversation that an engine answers: a list of messages, checked before anything reads it."""

from gemma_qat_kit.attachments import checked_content
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.tools import linked_calls

Message = dict[str, object]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}. A user's content may have
images and sound (see `attachments`), an assistant's message "tool_calls"; {"role": "tool", "name": …, "content": text}
answers a call."""

ROLES = ("system", "user", "assistant", "tool")


def as_messages(conversation: str | list[Message]) -> list[Message]:
    """Return a conversation as a list of messages: checked, with the thoughts of earlier answers left out.

    Args:
        conversation: A question, or a list of messages whose last one is the user's or a tool's.

    Raises:
        BadSettingError: Empty, a role that is not in `ROLES`, a content that is none, or no question at the end.
    """
    is_list = isinstance(conversation, (list, tuple))
    messages = list(conversation) if is_list else [{"role": "user", "content": conversation}]
    for message in messages:
        if not _is_message(message):
            raise BadSettingError(
                f"{message!r:.200} is not a message." if is_list else f"{conversation!r:.200} is not a conversation.",
                'A message is {"role": "system", "user" or "assistant", "content": text}; the content of a user may be '
                'a list with images and sound, and {"role": "tool", "name": …, "content": text} answers a call.',
                'Pass a string, or a list such as [{"role": "user", "content": "Hello"}].',
            )
    messages = linked_calls([message | {"content": _content(message)} for message in messages])
    if not messages or messages[-1]["role"] not in ("user", "tool") or _is_empty(messages[-1]):
        raise BadSettingError(
            "There is no question to answer.",
            "The last message is the user's and is not empty, or a tool's.",
            "Add one and try again.",
        )
    return messages


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return False
    if message["role"] == "tool" and not isinstance(message.get("name"), str):
        return False
    return isinstance(message.get("content"), (str, list, tuple) if message["role"] == "user" else str)


def _content(message: Message) -> object:
    content = checked_content(message["content"])
    return strip_thoughts(content) if message["role"] == "assistant" else content


def _is_empty(message: Message) -> bool:
    return message["role"] == "user" and isinstance(message["content"], str) and not message["content"].strip()


def strip_thoughts(text: str) -> str:
    """Remove Gemma's thought blocks, `<|channel>` to `<channel|>`, from a text."""
    kept = [part.split("<|channel>")[0] for part in text.split("<channel|>")]
    return "".join(kept).strip() if len(kept) > 1 or "<|channel>" in text else text
