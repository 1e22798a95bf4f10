"""The file of receipts: one line each, added whole, never lost. What cannot be read or has no room is moved aside."""

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from gemma_qat_kit.memory.receipts_line import Receipt, from_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST_BYTES = 2**24  # of one file: some 10,000 receipts
_PATIENCE, _PAUSE = 1.0, 0.01  # seconds to wait for another process that writes
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_said: set[str] = set()


class ReceiptsWarning(UserWarning):
    """Receipts that could not be kept or read, or that were moved."""


def receipts_path() -> Path | None:
    """Return this machine's file of receipts, None where `GQK_RECEIPTS=off` says that there is none.

    Raises:
        OSError: There is no home folder to keep it in.
    """
    wanted = os.environ.get("GQK_RECEIPTS", "")
    if wanted.lower() == "off":
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gemma_qat_kit"
    home = Path(os.environ.get("GEMMA_QAT_KIT_HOME") or cache)
    try:
        return Path(wanted or home / "receipts.jsonl").expanduser()
    except RuntimeError as err:
        raise OSError(errno.ENOENT, str(err)) from err


def append(line: bytes) -> None:
    """Add a line to this machine's file. A disk that does not take it is worth one warning and nothing more."""
    try:
        path = receipts_path()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _opened(path) as (file, is_ours):
                if os.fstat(file).st_size + len(line) > MOST_BYTES and is_ours:
                    _make_room(file, path)
                _write(file, (b"" if _ends_with_a_line(file) else b"\n") + line)
    except OSError as err:
        warn_once(f"This run's memory receipt could not be kept: {err}. GQK_RECEIPTS names another file, or is off.")


def read_own() -> list[Receipt]:
    """Read this machine's file; a broken one is moved aside, and its good lines stay."""
    try:
        path = receipts_path()
        if path is None or not path.exists():
            return []
        found, _, num_bad, is_whole = _read(path)
        if num_bad and is_whole:
            found = _repair(path)
    except OSError as err:
        warn_once(f"The memory receipts could not be read: {err}.")
        return []
    return found


def read_other(path: Path) -> tuple[list[Receipt], int]:
    """Read somebody's file, and count the lines that are no receipts; nothing is written.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise OSError(errno.EINVAL, "it is no file")
    found, _, num_bad, is_whole = _read(path)
    return found, num_bad + (not is_whole)


def _read(path: Path) -> tuple[list[Receipt], list[bytes], int, bool]:
    """Return receipts, their lines, the number of other lines, and whether that is the whole file."""
    with path.open("rb") as file:
        data = file.read(2 * MOST_BYTES + 1)
    return *_parse(data), len(data) <= 2 * MOST_BYTES


def _parse(data: bytes) -> tuple[list[Receipt], list[bytes], int]:
    found, lines, num_bad = [], [], 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            found.append(from_line(line))
            lines.append(line + b"\n")
        except ValueError:
            num_bad += 1
    return found, lines, num_bad


def _repair(path: Path) -> list[Receipt]:
    """Move a file with broken lines aside and keep the good ones; a line that is being written now is none of them."""
    with _opened(path) as (file, is_ours):
        data = _all_of(file)
        found, lines, num_bad = _parse(data)
        if num_bad and is_ours:
            aside = _set_aside(path, "corrupt", data)
            _rewrite(file, b"".join(lines))
            warn_once(
                f"Lines of {path} that are no receipts: {num_bad}. The file as it was is {aside}; the other "
                f"{len(lines)} stay."
            )
    return found


def _make_room(file: int, path: Path) -> None:
    """Move the older half of a full file aside."""
    data = _all_of(file)
    half = data.find(b"\n", len(data) // 2) + 1 or len(data)
    aside = _set_aside(path, "old", data[:half])
    _rewrite(file, data[half:])
    warn_once(f"{path} was full: the older half of its receipts is now {aside}.")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """Open a file to add to it; the second value says whether nobody else writes meanwhile."""
    file = os.open(path, _FLAGS, 0o600)
    try:
        yield file, _lock(file)
    finally:
        os.close(file)  # which unlocks it


def _lock(file: int) -> bool:
    if fcntl is None:
        return True
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:  # a process that was stopped holds it: one line can be added all the same
                return False
            time.sleep(_PAUSE)
        except OSError:  # some network disks have no locks
            return False


def _ends_with_a_line(file: int) -> bool:
    """Whether the last write was whole: a full disk or a lost machine leaves half a line."""
    if os.lseek(file, 0, os.SEEK_END) == 0:
        return True
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) == b"\n"


def _all_of(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    pieces = []
    while piece := os.read(file, 2**20):
        pieces.append(piece)
    return b"".join(pieces)


def _rewrite(file: int, data: bytes) -> None:
    os.ftruncate(file, 0)
    _write(file, data)


def _write(file: int, data: bytes) -> None:
    """Write in one call, so that two processes do not mix."""
    if os.write(file, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _set_aside(path: Path, kind: str, data: bytes) -> Path:
    """Write data to the first free name beside a file."""
    for number in count(1):
        aside = path.with_name(f"{path.name}.{kind}-{number}")
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return aside
        except FileExistsError:
            continue
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    raise AssertionError("unreachable")


def warn_once(text: str) -> None:
    """Say something, once in this process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, ReceiptsWarning, stacklevel=2)
