"""Images and sound that people pass: known by their bytes, refused early where they are none, the same from JSON."""

import base64
import io
import json
import wave

import pytest
from PIL import Image

from gemma_qat_kit import attachments
from gemma_qat_kit.attachments import (
    checked_content,
    decode_attachments,
    encode_attachments,
    kinds_in,
    text_of,
)
from gemma_qat_kit.errors import BadSettingError

TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def picture(kind="PNG", size=(7, 5), **options):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()


def recording(seconds=0.1, rate=16000, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(channels)
        wav.setsampwidth(width)
        wav.setframerate(rate)
        wav.writeframes(bytes(int(seconds * rate) * channels * width))
    return file.getvalue()


def image(source):
    return {"type": "image", "image": source}


def audio(source):
    return {"type": "audio", "audio": source}


def refused(content):
    with pytest.raises(BadSettingError) as caught:
        checked_content(content)
    return caught.value


def test_a_text_is_its_own_content_and_a_list_of_texts_is_one_text():
    assert checked_content("Why?") == "Why?"
    assert checked_content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"


@pytest.mark.parametrize("kind", TYPES)
def test_a_picture_is_known_by_its_bytes_and_not_by_its_name(kind, tmp_path):
    data = picture(kind)
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    address = "data:text/plain;base64," + base64.b64encode(data).decode()
    wanted = [{"type": "image", "media_type": TYPES[kind], "data": data}]
    for source in (path, str(path), data, bytearray(data), memoryview(data), address):
        assert checked_content([image(source)]) == wanted


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "YCbCr", "F"])
def test_a_picture_of_pil_becomes_a_png_of_its_size(mode):
    [part] = checked_content([image(Image.new(mode, (7, 5)))])
    assert part["media_type"] == "image/png"
    assert Image.open(io.BytesIO(part["data"])).size == (7, 5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": b"Exif\0\0" + bytes(60000)}),
     ("GIF", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0" + bytes(10)})],
)  # fmt: skip
def test_pixels_are_counted_as_pil_counts_them(kind, options, monkeypatch):
    data = picture(kind, (123, 45), **options)
    width, height = Image.open(io.BytesIO(data)).size
    monkeypatch.setattr(attachments, "MAX_PIXELS", width * height)
    assert checked_content([image(data)])[0]["data"] == data
    monkeypatch.setattr(attachments, "MAX_PIXELS", width * height - 1)
    assert refused([image(data)]).wrong == "The image has 5,535 pixels."


@pytest.mark.parametrize(("channels", "width", "rate"), [(1, 2, 16000), (2, 2, 44100), (1, 1, 8000), (2, 3, 48000)])
def test_a_recording_is_taken_up_to_half_a_minute(channels, width, rate):
    data = recording(30, rate, channels, width)
    assert checked_content([audio(data)]) == [{"type": "audio", "media_type": "audio/wav", "data": data}]
    assert refused([audio(recording(30.1, rate, channels, width))]).wrong == "The audio is 30.1 s long."


def test_a_header_that_was_never_finished_counts_what_is_there():
    data = bytearray(recording(0.5))
    data[40:44] = b"\xff\xff\xff\x7f"
    assert checked_content([audio(bytes(data))])[0]["data"] == data


def test_content_that_was_checked_stays_as_it_is():
    content = checked_content([image(picture()), {"type": "text", "text": "What?"}, audio(recording())])
    assert checked_content(content) == content


@pytest.mark.parametrize(
    "content",
    [None, 7, [], {}, b"x", ["text"], [None], [{"type": "text"}], [{"type": "image"}],
     [{"type": "video", "video": "x"}], [{"type": ["image"], "image": b""}], [{"type": "text", "text": 7}]],
)  # fmt: skip
def test_what_is_no_content_is_shown(content):
    error = refused(content)
    assert error.wrong == f"{content!r} is no content of a message."
    assert '"image"' in error.allowed
    assert "Pass a text" in error.next_step


@pytest.mark.parametrize("address", ["https://example.com/cat.png", "http://127.0.0.1/a", "file:///etc/passwd"])
def test_nothing_is_fetched_from_an_address(address):
    error = refused([image(address)])
    assert error.wrong.startswith(repr(address))
    assert "fetches nothing" in error.wrong
    assert "Download it" in error.next_step


@pytest.mark.parametrize("path", ["nowhere.png", "", "\0", "x" * 5000, ".", "~nobody-at-all/cat.png"])
def test_a_path_without_a_file_is_shown(path):
    error = refused([image(path)])
    assert "is no file that can be read" in error.wrong
    assert len(error.wrong) < 300


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\0" * 100, b"%PDF-1.7",
             b"RIFF\0\0\0\0WEBP", b"<svg onload='x'>", recording()],
)  # fmt: skip
def test_what_is_no_picture_is_refused(data):
    error = refused([image(data)])
    assert error.wrong.startswith(repr(data[:12]))
    assert "Convert it" in error.next_step


@pytest.mark.parametrize("data", [b"", b"ID3\4", b"RIFF\0\0\0\0WAVE", recording()[:30], picture(), picture("WEBP")])
def test_what_is_no_recording_is_refused(data):
    assert "is not a WAV recording" in refused([audio(data)]).wrong
    assert "ffmpeg" in refused([audio(data)]).next_step


def test_a_recording_without_a_rate_is_refused():
    data = bytearray(recording())
    data[24:28] = bytes(4)
    assert "is not a WAV recording" in refused([audio(bytes(data))]).wrong


@pytest.mark.parametrize("source", [7, object(), {"a": 1}, Image])
def test_a_source_of_another_type_is_refused(source):
    assert f"{type(source).__name__} " in refused([image(source)]).wrong


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"
    path.write_bytes(picture() + bytes(1000))
    monkeypatch.setattr(attachments, "MAX_BYTES", 1000)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: pytest.fail("read"))
    for source in (path, bytes(1001), "data:image/png;base64," + base64.b64encode(bytes(1001)).decode()):
        assert "1000 bytes are taken" in refused([image(source)]).allowed
    assert "Cut it shorter" in refused([audio(path)]).next_step


@pytest.mark.parametrize("address", ["data:", "data:image/png,abc", "data:image/png;base64,a b", "data:;base64,é"])
def test_a_data_address_that_is_cut_is_refused(address):
    assert refused([image(address)]).wrong == "The data of the image is not base64."


def test_kinds_and_texts_are_found():
    parts = checked_content([image(picture()), {"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]
    assert kinds_in(messages) == {"image"}
    assert kinds_in(messages[:1]) == set()
    assert (text_of(parts), text_of("x")) == ("a\nb", "x")


def test_messages_come_back_from_json_as_they_went():
    content = [image(Image.new("RGB", (3, 3))), {"type": "text", "text": "What?"}, audio(recording())]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red.", "more": [1]}]
    back = decode_attachments(json.loads(json.dumps(encode_attachments(messages))))
    assert back == [messages[0] | {"content": checked_content(content)}, messages[1]]


@pytest.mark.parametrize(
    "part",
    [None, "x", {}, {"type": "image", "image": "/etc/passwd"}, {"type": "image", "data": None}, {"type": "text"},
     {"type": {}, "data": "x"}],
)  # fmt: skip
def test_a_saved_part_that_was_edited_is_refused_and_no_path_is_read(part):
    with pytest.raises(BadSettingError, match="is no part of a saved message"):
        decode_attachments([{"role": "user", "content": [part]}])


def test_saved_data_that_is_no_picture_is_refused():
    part = {"type": "image", "media_type": "image/png", "data": base64.b64encode(b"#!/bin/sh").decode()}
    with pytest.raises(BadSettingError, match="is not a PNG"):
        decode_attachments([{"role": "user", "content": [part]}])
