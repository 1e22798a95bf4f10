"""Texts to measure a model with: three that every Python carries, and any file.

Built in is what is there without a download, in prose and in code. `pydoc_data.topics` is the language reference that
`help()` shows, 370 kB once its repeated paragraphs are left out; licences, the other prose in every environment, are
short and many models know them by heart. The code is that of some modules of the standard library. Both change with
Python's version, so their names carry it: figures of two versions are not for comparing.
"""

import codecs
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.errors import BadSettingError

MAX_BYTES = 2**24  # of a file: 4 million tokens, hours of measuring
# Pure Python with much documentation inside, unchanged in kind for many versions; never frozen into the interpreter.
_MODULES = ("statistics", "textwrap", "heapq", "fractions", "csv", "calendar", "shlex", "sched", "difflib", "argparse")


@dataclass(frozen=True)
class Text:
    """A text and what to call it in a result."""

    name: str
    content: str


def built_in_names() -> tuple[str, ...]:
    """Return the names of the built-in texts.

    "python-manual" is the default and "python-code" another kind of text. No paragraph of "calibration" is in
    "python-manual": what is learned from one can be measured on the other.
    """
    return tuple(_BUILT_IN)


def read(source: str | Path | None = None) -> Text:
    """Return the text that a caller means.

    Args:
        source: None for "python-manual", a name of `built_in_names`, a text itself, or the path of a UTF-8 file, of
            which the first 16 MiB are read.

    Raises:
        BadSettingError: The file cannot be read, is no text, or is empty.
    """
    if source is None or (isinstance(source, str) and source in _BUILT_IN):
        return _built_in(source or "python-manual")
    if isinstance(source, Path):
        return Text(source.name, _checked(_read_file(source.expanduser()), str(source)))
    if isinstance(source, str):
        return Text("your text", _checked(source.encode("utf-8", "replace").decode(), "The text"))
    raise BadSettingError(
        f"{source!r:.100} is no text.",
        f"Known: {', '.join(_BUILT_IN)}; a text itself; or the path of a file.",
        'Pass a string, or Path("my_text.txt").',
    )


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) < MAX_BYTES)
    except UnicodeDecodeError as err:
        raise BadSettingError(
            f"{path} is not UTF-8 text: byte {err.start:,} cannot be read.",
            "A text file in UTF-8 is needed.",
            "Convert it, or pass another file.",
        ) from err
    except OSError as err:
        raise BadSettingError(
            f"{path} cannot be read: {err.strerror or err}.",
            "The path names a text file that this user may read.",
            'Check the spelling; a text itself is passed as a string, and None takes "python-manual".',
        ) from err


def _checked(content: str, name: str) -> str:
    if content.strip():
        return content
    raise BadSettingError(f"{name} is empty.", "There must be words to measure on.", "Pass another text, or None.")


def _built_in(name: str) -> Text:
    try:
        return Text(f"{name} of Python {platform.python_version()}", _BUILT_IN[name]())
    except (ImportError, OSError, AttributeError) as err:
        raise BadSettingError(
            f"This Python has not brought what {name!r} is made of: {err}.",
            "A full CPython has the modules pydoc_data.topics and argparse with their source.",
            'Pass a text of your own, as in Path("my_text.txt").',
        ) from err


def _manual_paragraphs() -> list[str]:
    """Return the paragraphs of the language reference, each once: sections are repeated inside larger ones."""
    from pydoc_data.topics import topics

    parts = (part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    return list(dict.fromkeys(part for part in parts if part.strip()))


def _manual() -> str:
    paragraphs = _manual_paragraphs()
    return "\n\n".join(paragraphs[: len(paragraphs) // 2])


def _calibration() -> str:
    paragraphs = _manual_paragraphs()
    return "\n\n".join(paragraphs[len(paragraphs) // 2 :])


def _code() -> str:
    from importlib.util import find_spec

    return "\n\n".join(find_spec(name).loader.get_source(name) for name in _MODULES)


_BUILT_IN: dict[str, Callable[[], str]] = {
    "python-manual": _manual,
    "python-code": _code,
    "calibration": _calibration,
}
