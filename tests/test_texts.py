"""The texts that need no download, and what a caller can pass instead."""

import sys
from pathlib import Path

import pytest

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.quality import texts


def test_built_in_texts_are_long_enough_for_steady_figures_and_name_pythons_version():
    for name in texts.built_in_names():
        text = texts.read(name)
        assert len(text.content) > 100_000
        assert text.name.startswith(f"{name} of Python {sys.version_info.major}.{sys.version_info.minor}.")


def test_the_default_is_the_manual():
    assert texts.read() == texts.read(None) == texts.read("python-manual")


def test_the_manual_is_what_help_shows_without_its_repetitions():
    from pydoc_data.topics import topics

    paragraphs = texts.read("python-manual").content.split("\n\n") + texts.read("calibration").content.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    known = {part.strip("\n") for topic in topics.values() for part in topic.split("\n\n")}
    assert set(paragraphs) == {part for part in known if part.strip()}


def test_what_is_learned_from_calibration_is_not_measured_on_the_manual():
    manual, calibration = (set(texts.read(name).content.split("\n\n")) for name in ("python-manual", "calibration"))
    assert not manual & calibration


def test_the_code_is_the_standard_librarys_own():
    import statistics

    assert Path(statistics.__file__).read_text(encoding="utf-8") in texts.read("python-code").content


def test_a_text_is_taken_as_it_is_and_a_path_is_read(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_bytes("\ufeffThe sky is blue, é.\r\n".encode())
    assert texts.read(path) == texts.Text("poem.txt", "The sky is blue, é.\r\n")
    assert texts.read("The sky is blue.") == texts.Text("your text", "The sky is blue.")
    assert texts.read("half a pair \ud800").content == "half a pair ?"


def test_of_a_large_file_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_BYTES", 9)
    path = tmp_path / "large.txt"
    path.write_text("blue é é é é", encoding="utf-8")
    assert texts.read(path).content == "blue é "  # not half of a character


@pytest.mark.parametrize(
    ("content", "wrong"),
    [(None, "cannot be read: No such file"), (b"", "is empty"), (b" \n\t", "is empty"), (b"abc\xff", "byte 3")],
)
def test_a_file_without_words_is_refused(tmp_path, content, wrong):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSettingError) as caught:
        texts.read(path)
    assert wrong in caught.value.wrong
    assert str(path) in caught.value.wrong
    assert caught.value.next_step


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(BadSettingError, match="cannot be read: Is a directory"):
        texts.read(tmp_path)


@pytest.mark.parametrize("source", [7, b"bytes", ["a", "list"]])
def test_other_things_are_no_text(source):
    with pytest.raises(BadSettingError, match=r"is no text\. Known: python-manual, python-code, calibration; .*Path"):
        texts.read(source)


def test_an_empty_text_is_refused():
    with pytest.raises(BadSettingError, match="The text is empty"):
        texts.read("  ")


def test_a_python_without_its_manual_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(BadSettingError, match=r"'python-manual' is made of: .*pass|Pass a text of your own"):
        texts.read()
