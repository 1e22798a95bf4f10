"""Where conversations come from: a list, JSON lines, CSV or the hub; each is a list of messages, checked."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from gemma_qat_kit.errors import BadSettingError, MissingLibraryError

Conversation = list[dict[str, str]]
# Columns that are one question and one answer, as datasets call them; the first pair that a row has is taken.
PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("instruction", "response"),
         ("input", "output"))  # fmt: skip
_LISTS = ("messages", "conversations")
_ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "model": "assistant",
          "gpt": "assistant"}  # fmt: skip
_EXPECTED = (
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or the columns '
    + ", ".join(f"{question} and {answer}" for question, answer in PAIRS)
)


def read_conversations(source: object) -> list[Conversation]:
    """Return the conversations of a dataset.

    Args:
        source: A list of conversations (lists of messages) or of rows (dicts); the path of a .jsonl, .json or .csv
            file; or a dataset of the hub, "owner/name", whose split "train" is taken.

    Raises:
        BadSettingError: Nothing is there, it cannot be read, or a row is not a conversation; the message has its line.
        MissingLibraryError: A dataset of the hub, without the library `datasets`.
    """
    if isinstance(source, str | Path):
        rows = _rows_of(str(source))
    elif isinstance(source, Iterable) and not isinstance(source, dict):
        rows = ((f"row {number}", row) for number, row in enumerate(source, 1))
    else:
        raise BadSettingError(
            f"{type(source).__name__} is no dataset.",
            'A list of conversations, a .jsonl or .csv file, or a dataset of the hub, "owner/name".',
            "Pass one of these.",
        )
    found = [_conversation(place, row) for place, row in rows]
    if not found:
        raise BadSettingError("The dataset is empty.", f"A row is {_EXPECTED}.", "Pass at least one.")
    return found


def _rows_of(source: str) -> Iterator[tuple[str, object]]:
    path = Path(source).expanduser()
    if not path.exists() and source.count("/") == 1 and not source.startswith((".", "~")) and not path.suffix:
        return _of_hub(source)
    reader = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise BadSettingError(
            f"{source} is no dataset that can be read.",
            'Read are .jsonl, .json and .csv files, and datasets of the hub, "owner/name".',
            "Save it as one of these.",
        )
    return reader(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else f"byte {err.start:,} is not UTF-8"
        raise BadSettingError(
            f"{path} cannot be read: {reason}.", "It is a text file in UTF-8.", "Check the path, or convert the file."
        ) from err


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name}, line {number}", _parsed(line, f"{path.name}, line {number}")


def _json(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parsed(_text(path), path.name)
    if not isinstance(rows, list):
        raise _malformed(path.name, "it is no list")
    return ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise _malformed(place, f"it is not JSON ({err})") from err


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield f"{path.name}, line {reader.line_num}", row
    except csv.Error as err:
        raise _malformed(f"{path.name}, line {reader.line_num}", str(err)) from err


def _of_hub(name: str) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError as err:
        raise MissingLibraryError(
            f"{name} is a dataset of the hub, and the library that reads those is not installed.",
            "It is called datasets.",
            "Run: pip install datasets",
        ) from err
    try:
        rows = load_dataset(name, split="train")
    except Exception as err:  # whatever the hub, the network or the dataset's format raise
        raise BadSettingError(
            f"{name} cannot be read: {str(err)[:300]}.",
            'A dataset of the hub has a split "train".',
            "Check its name and the network, or pass its rows as a list.",
        ) from err
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _conversation(place: str, row: object) -> Conversation:
    """Return a row's messages, with the roles "system", "user" and "assistant"."""
    messages = row if isinstance(row, list) else _messages_of(place, row)
    if not isinstance(messages, list) or not messages:
        raise _malformed(place, "it has no messages")
    checked = [_message(place, message) for message in messages]
    if not any(message["role"] == "assistant" for message in checked):
        raise _malformed(place, "nobody answers in it, so there is nothing to learn")
    return checked


def _messages_of(place: str, row: object) -> object:
    if not isinstance(row, dict):
        raise _malformed(place, f"it is {type(row).__name__}")
    if (name := next((name for name in _LISTS if row.get(name)), None)) is not None:
        return row[name]
    pair = next(((question, answer) for question, answer in PAIRS if question in row and answer in row), None)
    if pair is None:
        raise _malformed(place, f"it has the columns {', '.join(map(str, row)) or 'none'}")
    question, answer = (row[name] for name in pair)
    if pair[0] == "instruction" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(place: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _malformed(place, f"a message is {type(message).__name__}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role not in _ROLES:
        raise _malformed(place, f"a message has the role {role!r}")
    if not isinstance(content, str) or not content.strip():
        raise _malformed(place, f"a message of the {role} is empty")
    return {"role": _ROLES[role], "content": content}


def _malformed(place: str, what: str) -> BadSettingError:
    return BadSettingError(f"{place}: {what}.", f"A row is {_EXPECTED}.", "Mend the row, or leave it out.")
