"""Messages as an OpenAI-compatible server takes them, and the calls of tools that it streams back."""

import base64
import io
import json
from collections.abc import Iterator

from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.tools import ToolCall, call_from_json


def openai_messages(messages: list[dict]) -> list[dict]:
    """Return messages with images and sound in base64, and the arguments of calls as JSON.

    Args:
        messages: As `as_messages` returns them.

    Raises:
        MissingLibraryError: Pillow is needed, for a WebP picture.
        BadSettingError: A picture is damaged.
    """
    return [_openai_message(message) for message in messages]


def _openai_message(message: dict) -> dict:
    content = message["content"]
    changes = {} if isinstance(content, str) else {"content": [_openai_part(part) for part in content]}
    if calls := message.get("tool_calls"):
        changes["tool_calls"] = [call | {"function": _with_json(call["function"])} for call in calls]
    return message | changes


def _with_json(function: dict) -> dict:
    return function | {"arguments": json.dumps(function["arguments"])}


def _openai_part(part: dict) -> dict:
    if part["type"] == "text":
        return part
    kind, data = part["media_type"], part["data"]
    if kind == "image/webp":
        kind, data = "image/png", _webp_as_png(data)
    text = base64.b64encode(data).decode()
    if part["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{text}"}}


def _webp_as_png(data: bytes) -> bytes:
    """Return a WebP picture as a PNG: llama.cpp reads no WebP."""
    file = io.BytesIO()
    open_picture(data).save(file, "PNG")
    return file.getvalue()


def open_picture(data: bytes):
    """Return the bytes of a picture as PIL's RGB image, upright.

    Raises:
        MissingLibraryError: Pillow is not installed.
        BadSettingError: The picture is damaged.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as err:
        raise MissingLibraryError(
            "pillow is not installed.", "This picture is decoded with it.", "Run: pip install pillow"
        ) from err
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise BadSettingError(
            f"The picture is damaged: {err}.", "A whole PNG, JPEG, WebP or GIF is needed.", "Save it again."
        ) from err


class Calls:
    """The calls of one answer, which come in pieces."""

    def __init__(self):
        self._pieces: dict[object, list[str]] = {}

    def add(self, deltas: list[dict] | None) -> None:
        """Take what an event says of calls: `index` tells which call a piece belongs to."""
        for delta in deltas or ():
            function = delta.get("function") or {}
            pieces = self._pieces.setdefault(delta.get("index", len(self._pieces)), [""])
            pieces[0] += function.get("name") or ""
            arguments = function.get("arguments") or ""
            pieces.append(json.dumps(arguments) if isinstance(arguments, dict) else arguments)

    def __iter__(self) -> Iterator[ToolCall]:
        for name, *pieces in self._pieces.values():
            yield call_from_json(name, "".join(pieces))
