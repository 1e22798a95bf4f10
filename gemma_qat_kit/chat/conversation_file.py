"""Conversations as files: JSON that keeps everything, Markdown to read, JSONL to train on."""

import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

from gemma_qat_kit.attachments import encode_attachments
from gemma_qat_kit.chat.conversation import Conversation, Turn
from gemma_qat_kit.errors import BadSettingError

VERSION = 1
MOST_BYTES = 2**28  # of a file: a conversation with a hundred pictures
_KIND = "gemma_qat_kit conversation"
_TYPES = {field.name: field.type for field in fields(Turn)}


def save(conversation: Conversation, path: Path) -> Path:
    """See `Conversation.save`."""
    about = {"kind": _KIND, "version": VERSION, "system": conversation.system, "tip": conversation.tip}
    turns = [asdict(turn) for turn in conversation.turns]
    return write_text(path, json.dumps(about | {"turns": turns}, ensure_ascii=False, indent=1))


def load(path: Path) -> Conversation:
    """See `Conversation.load`."""
    return _conversation(read_json(path, _KIND, VERSION), path.expanduser())


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, and return its path.

    Raises:
        BadSettingError: It cannot be written there.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as err:
        raise BadSettingError(
            f"{path} cannot be written: {err.strerror}.", "It must be a place for a file.", "Name another path."
        ) from err
    return path


def read_json(path: Path, kind: str, version: int, most_bytes: int = MOST_BYTES) -> dict:
    """Return what a file holds that says what it is.

    Raises:
        BadSettingError: There is no file, or one of another kind or version.
    """
    path, noun = path.expanduser(), kind.split()[-1]
    try:
        if path.stat().st_size > most_bytes:
            raise _broken(path, f"it is larger than {most_bytes >> 20} MiB", noun)
        kept = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except OSError as err:
        raise BadSettingError(
            f"{path} cannot be read: {err.strerror}.", f"It is the file of a {noun}.", "Check the path."
        ) from err
    except (ValueError, RecursionError) as err:
        raise _broken(path, f"it is no JSON ({err})", noun) from err
    if not isinstance(kept, dict) or kept.get("kind") != kind:
        raise _broken(path, "it is another kind of file", noun)
    if kept.get("version") != version:
        raise BadSettingError(
            f"{path} is of version {kept.get('version')!r:.20}.",
            f"This kit reads version {version}.",
            "Open it with the kit that wrote it, or make it again.",
        )
    return kept


def _conversation(kept: dict, path: Path) -> Conversation:
    """Build the conversation, checking whatever a hand may have changed."""
    turns, tip = kept.get("turns"), kept.get("tip")
    if not isinstance(kept.get("system"), str) or not isinstance(turns, list):
        raise _broken(path, "system must be a text and turns a list")
    found = Conversation(kept["system"])
    for number, turn in enumerate(turns):
        found.turns.append(_turn(turn, number, turns, path))
    if not (tip is None or (_is_int(tip) and 0 <= tip < len(turns))):
        raise _broken(path, f"tip is {tip!r:.20}, and there are {len(turns)} turns")
    found.tip = tip
    return found


def _turn(kept: object, number: int, turns: list, path: Path) -> Turn:
    where = f"turn {number}"
    if not isinstance(kept, dict) or kept.get("number") != number:
        raise _broken(path, f"{where} is not numbered so")
    if unknown := kept.keys() - _TYPES.keys():
        raise _broken(path, f"{where} has {sorted(unknown)[0]!r:.30}, which no turn has")
    if missing := [name for name in ("parent", "role", "content") if name not in kept]:
        raise _broken(path, f"{where} has no {missing[0]}")
    parent = kept["parent"]
    if not (parent is None or (_is_int(parent) and 0 <= parent < number)):
        raise _broken(path, f"{where} follows {parent!r:.20}, which is no earlier turn")
    before = None if parent is None else turns[parent].get("role")
    if kept.get("role") not in ("user", "assistant") or (kept["role"] == "assistant") != (before == "user"):
        raise _broken(path, f"{where} is said by {kept.get('role')!r:.20} after {before}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    wrong = [name for name, value in values.items() if not _is_of(value, _TYPES[name])]
    if wrong:
        raise _broken(path, f"{where} has a {wrong[0]} that is {type(kept[wrong[0]]).__name__}")
    return Turn(**values)


def _is_of(value: object, kind: object) -> bool:
    if kind is int or kind == int | None:
        return value is None or _is_int(value)
    if kind == tuple[dict, ...]:
        return isinstance(value, tuple) and all(isinstance(part, dict) for part in value)
    return isinstance(value, kind)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _broken(path: Path, how: str, noun: str = "conversation") -> BadSettingError:
    return BadSettingError(
        f"{path} is no {noun} that can be read: {how}.",
        f"{noun.capitalize()}.save writes such files.",
        "Mend that place, or take a copy from before it was edited.",
    )


def to_markdown(conversation: Conversation) -> str:
    """See `Conversation.to_markdown`."""
    parts = [f"**System**\n\n{conversation.system}"] if conversation.system.strip() else []
    for turn in conversation.path:
        who = "You" if turn.role == "user" else turn.model or "Model"
        thoughts = f"<details><summary>Thoughts</summary>\n\n{turn.thoughts}\n\n</details>\n\n" if turn.thoughts else ""
        pictures = "".join(f"*[{part.get('type')} attached]*\n\n" for part in turn.attachments)
        parts.append(f"**{who}**\n\n{pictures}{thoughts}{turn.content}{_figures(turn)}")
    return "\n\n---\n\n".join(parts) + "\n"


def _figures(turn: Turn) -> str:
    new, seconds = turn.timings.get("new_tokens"), turn.timings.get("seconds")
    seed = f", seed {turn.settings['seed']}" if "seed" in turn.settings else ""
    return f"\n\n*{new} tokens in {seconds:.3g} s{seed}*" if new and seconds else ""


def to_jsonl(conversation: Conversation) -> str:
    """See `Conversation.to_jsonl`."""
    return json.dumps({"messages": encode_attachments(conversation.messages)}, ensure_ascii=False) + "\n"
