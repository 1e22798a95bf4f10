"""Images and sound in a conversation: what a person passes, checked and in one form, and that form as JSON and back.

The content of a message is a text or a list of parts. Inside the kit a part is {"type": "text", "text": …}, or
{"type": "image" or "audio", "media_type": "image/png", "data": bytes}. Files are known by their first bytes, never by
their name, and nothing is ever fetched from an address.
"""

import base64
import binascii
import io
import os
import struct
import wave
from pathlib import Path

from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.units import readable_bytes

MAX_BYTES = 20 * 2**20  # of one file; what a phone's camera writes is smaller
MAX_PIXELS = 64_000_000  # a few bytes can claim more pixels than memory holds; Gemma looks at 2.6 million at most
MAX_SECONDS = 30  # of sound; Gemma 4's model cards
KINDS = {"image": "a PNG, JPEG, WebP or GIF picture", "audio": "a WAV recording of PCM samples"}
Part = dict[str, object]

_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers of a frame; ITU-T T.81, table B.1


def checked_content(content: object) -> str | list[Part]:
    """Return a message's content as a text, or as parts in the kit's own form where it has images or sound.

    Args:
        content: A text, or a list of {"type": "text", "text": …}, {"type": "image", "image": …} and {"type": "audio",
            "audio": …} with a path, bytes, a data: URL or (images) a picture of PIL; also what this function returned.

    Raises:
        BadSettingError: Another kind of part; a file that is missing, too large, or no picture or recording.
    """
    if isinstance(content, str):
        return content
    parts = [_checked_part(part) for part in content] if isinstance(content, (list, tuple)) and content else [None]
    if None in parts:
        raise BadSettingError(
            f"{content!r:.200} is no content of a message.",
            'It is a text, or a list of {"type": "text", "text": "…"}, {"type": "image", "image": path or bytes} and '
            '{"type": "audio", "audio": path or bytes}.',
            'Pass a text, or a list such as [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}].',
        )
    has_text_only = all(part["type"] == "text" for part in parts)
    return "\n".join(part["text"] for part in parts) if has_text_only else parts


def kinds_in(messages: list[dict]) -> set[str]:
    """Return which kinds of attachment there are in messages whose contents were checked: "image", "audio"."""
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    return {part["type"] for parts in lists for part in parts} - {"text"}


def text_of(content: str | list[Part]) -> str:
    """Return the text in a message's content, without its images and sound."""
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def encode_attachments(messages: list[dict]) -> list[dict]:
    """Return messages that JSON can carry: checked, with the bytes of images and sound in base64.

    Raises:
        BadSettingError: As in `checked_content`.
    """
    return [message | {"content": _each_part(checked_content(message["content"]), _encoded)} for message in messages]


def decode_attachments(messages: list[dict]) -> list[dict]:
    """Return what `encode_attachments` was given; a file that says so is not read from any path.

    Raises:
        BadSettingError: A part that it did not write.
    """
    return [message | {"content": _each_part(message["content"], _decoded)} for message in messages]


def _each_part(content: object, change) -> object:
    return [change(part) for part in content] if isinstance(content, list) else content


def _encoded(part: Part) -> Part:
    return part | {"data": base64.b64encode(part["data"]).decode()} if part["type"] != "text" else part


def _decoded(part: object) -> Part:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if isinstance(part, dict) and part.get("type") in list(KINDS) and isinstance(part.get("data"), str):
        return _sniffed(part["type"], _from_base64(part["type"], part["data"]))
    raise BadSettingError(
        f"{part!r:.200} is no part of a saved message.",
        'It has "type" and "text", or "type" and "data" in base64.',
        "Take the message out of the file, or save the conversation again.",
    )


def _checked_part(part: object) -> Part | None:
    """Return a part in the kit's own form, None where it is nothing of the kind."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    source = (part.get(kind, part.get("data"))) if kind in list(KINDS) else None
    return None if source is None else _sniffed(kind, _bytes_of(kind, source))


def _bytes_of(kind: str, source: object) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _not_too_large(kind, source, memoryview(source).nbytes)
    if isinstance(source, str) and source.startswith("data:"):
        head, _, data = source.partition(",")
        return _from_base64(kind, data if head.endswith(";base64") else "?")
    if isinstance(source, str) and "://" in source[:20]:
        raise BadSettingError(
            f"{source!r:.200} is an address; the kit fetches nothing for a model.",
            "An attachment is a file on this machine, its bytes, or a data: URL.",
            "Download it, look at it, and pass its path.",
        )
    if isinstance(source, (str, os.PathLike)):
        return _read(kind, source)
    if kind == "image" and hasattr(source, "mode") and hasattr(source, "save"):
        return _as_png(source)
    raise _not_one(kind, f"{type(source).__name__} {source!r:.100}")


def _read(kind: str, path: str | os.PathLike) -> bytes:
    try:
        file = Path(path).expanduser()
        if file.is_file():
            return _not_too_large(kind, lambda: file.read_bytes(), file.stat().st_size)
    except KitError:
        raise
    except (OSError, ValueError, RuntimeError):  # a name that can be none, no permission, no such user's home
        pass
    raise BadSettingError(
        f"{str(path)!r:.200} is no file that can be read.",
        f"The path of an {kind} names {KINDS[kind]}.",
        "Check the spelling, or pass the bytes.",
    )


def _not_too_large(kind: str, source, num_bytes: int) -> bytes:
    if num_bytes > MAX_BYTES:
        raise BadSettingError(
            f"The {kind} has {readable_bytes(num_bytes)}.",
            f"At most {readable_bytes(MAX_BYTES)} are taken.",
            "Make it smaller; Gemma looks at fewer than 3 million pixels." if kind == "image" else "Cut it shorter.",
        )
    return source() if callable(source) else bytes(source)


def _from_base64(kind: str, text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise BadSettingError(
            f"The data of the {kind} is not base64.",
            "A data: URL looks like data:image/png;base64,iVBORw0…, whole.",
            "Copy it again, or pass the file's path.",
        ) from err
    return _not_too_large(kind, data, len(data))


def _as_png(picture) -> bytes:
    """Return a PIL picture as a file, which every engine reads."""
    file = io.BytesIO()
    try:
        picture.save(file, "PNG")
    except OSError:  # CMYK and others, which PNG does not have
        picture.convert("RGB").save(file, "PNG")
    return _not_too_large("image", file.getvalue(), file.tell())


def _sniffed(kind: str, data: bytes) -> Part:
    """Return a part for the bytes of a file, whose type its first bytes tell."""
    try:
        media_type, size = _audio_type(data) if kind == "audio" else _image_type(data)
    except (struct.error, IndexError, wave.Error, EOFError, ZeroDivisionError):
        media_type = None
    if media_type is None:
        raise _not_one(kind, f"{data[:12]!r}… ({readable_bytes(len(data))})")
    if kind == "image" and size > MAX_PIXELS:
        raise BadSettingError(
            f"The image has {size:,} pixels.", f"At most {MAX_PIXELS:,} are taken.", "Make it smaller."
        )
    if kind == "audio" and size > MAX_SECONDS:
        raise BadSettingError(
            f"The audio is {size:.1f} s long.", f"Gemma 4 listens to {MAX_SECONDS} s at most.", "Cut it into pieces."
        )
    return {"type": kind, "media_type": media_type, "data": data}


def _not_one(kind: str, shown: str) -> BadSettingError:
    return BadSettingError(
        f"{shown} is not {KINDS[kind]}.",
        f"An {kind} is {KINDS[kind]}, as a path or bytes.",
        "Convert it, for instance with PIL." if kind == "image" else "Convert it: ffmpeg -i in.mp3 -ar 16000 out.wav",
    )


def _audio_type(data: bytes) -> tuple[str | None, float]:
    """Return the media type of a recording and its length in seconds."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None, 0
    with wave.open(io.BytesIO(data)) as recording:
        frame_bytes = recording.getnchannels() * recording.getsampwidth()
        frames = min(recording.getnframes(), len(data) // frame_bytes)  # a header that was never finished claims more
        return "audio/wav", frames / recording.getframerate()


def _image_type(data: bytes) -> tuple[str | None, int]:
    """Return the media type of a picture and its number of pixels, from its header."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack(">II", data[16:24])
        return "image/png", width * height
    if data[:6] in (b"GIF87a", b"GIF89a"):
        width, height = struct.unpack("<HH", data[6:10])
        return "image/gif", width * height
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg", _jpeg_pixels(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp", _webp_pixels(data)
    return None, 0


def _jpeg_pixels(data: bytes) -> int:
    at = 2
    while data[at + 1] not in _JPEG_SIZES:
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]  # 0xFF only fills up
    height, width = struct.unpack(">HH", data[at + 5 : at + 9])
    return width * height


def _webp_pixels(data: bytes) -> int:
    """Source: RFC 9649, sections 2.5 to 2.7."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return (1 + int.from_bytes(body[4:7], "little")) * (1 + int.from_bytes(body[7:10], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    width, height = struct.unpack("<HH", body[6:10])
    return (width & 0x3FFF) * (height & 0x3FFF)
