"""What lies on the disk of a repository, in the layout of huggingface_hub's cache, and whether its bytes are right.

    <cache>/models--owner--name/snapshots/<commit>/<file>  ->  ../../blobs/<digest>

A blob's name is its digest: the sha256 of a large file, the git blob sha1 of a small one. `<digest>.incomplete` is a
download that was cut.
"""

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.errors import DownloadError
from gemma_qat_kit.progress import Progress, Report

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
REPORT_SECONDS = 0.2  # five reports a second
_CHUNK_BYTES = 4 * 2**20


def cache_folder() -> Path:
    """Return the folder of huggingface_hub's cache, from the environment as it is now."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository; `digest` is its sha256 (64 digits), its git blob sha1 (40), or None if nobody said."""

    name: str
    bytes: int | None
    digest: str | None


@dataclass(frozen=True)
class Snapshot:
    """The files wanted from one commit of a repository, and where they lie."""

    repo_id: str
    commit: str
    files: tuple[RepoFile, ...]

    @property
    def repo_folder(self) -> Path:
        """The repository's folder in the hub's cache."""
        return cache_folder() / f"models--{self.repo_id.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The folder that a loader reads."""
        return self.repo_folder / "snapshots" / self.commit

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, as far as the hub says."""
        return sum(file.bytes or 0 for file in self.files)

    @property
    def done_bytes(self) -> int:
        """Bytes that are on the disk, unfinished files included."""
        return sum(self._bytes_here(file) for file in self.files)

    @property
    def missing(self) -> tuple[RepoFile, ...]:
        """The files that are not whole on the disk."""
        return tuple(file for file in self.files if not self.is_whole(file))

    @property
    def is_complete(self) -> bool:
        """Whether every file is whole on the disk."""
        return bool(self.files) and not self.missing

    def path(self, file: RepoFile) -> Path:
        """Return where a file lies once it is whole."""
        return self.folder / file.name

    def is_whole(self, file: RepoFile) -> bool:
        """Whether a file is on the disk with the bytes that the hub says."""
        path = self.path(file)
        return path.is_file() and file.bytes in (None, path.stat().st_size)

    def remove(self, file: RepoFile) -> None:
        """Delete a file, its link and what it links to, as far as that lies inside the cache."""
        blob = self.repo_folder / "blobs" / (file.digest or "")
        for path in (self.path(file), blob) if file.digest else (self.path(file),):
            target = Path(os.path.realpath(path))
            if target.is_relative_to(os.path.realpath(cache_folder())):
                _unlink(target)
            _unlink(path)

    def remove_damaged(self) -> None:
        """Delete files whose size is not the hub's, so that the client does not take them for downloaded."""
        for file in self.missing:
            blob = self.repo_folder / "blobs" / (file.digest or "?")
            if self.path(file).exists() or (blob.is_file() and blob.stat().st_size != file.bytes):
                self.remove(file)

    def _bytes_here(self, file: RepoFile) -> int:
        """Count the bytes of a file that are on the disk, finished or not."""
        places = [self.path(file)]
        if file.digest:
            blob = self.repo_folder / "blobs" / file.digest
            partial = blob.with_name(f"{file.digest}.incomplete")
            # In the order in which a file is renamed, so that one that is renamed meanwhile is still met.
            places = [*blob.parent.glob(f"{file.digest}.*.incomplete"), partial, blob, *places]
        most = max(map(_size, places))
        return most if file.bytes is None else min(most, file.bytes)


def cached_files(folder: Path) -> list[RepoFile]:
    """List a snapshot folder; the links' targets tell the digests."""
    files = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            digest = blob if DIGEST.fullmatch(blob) else None
            files.append(RepoFile(path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return files


def verify(snapshot: Snapshot, verified: dict[str, list[int]], report: Report) -> None:
    """Check size and digest of every file that did not yet pass as it is now; adds to `verified` in place.

    Raises:
        DownloadError: A file has wrong bytes; it was removed, so that the next call downloads it anew.
    """
    todo = []
    for file in snapshot.files:
        real = os.path.realpath(snapshot.path(file))
        stamp = [os.stat(real).st_size, os.stat(real).st_mtime_ns]
        if verified.get(real) != stamp:
            todo.append((file, real, stamp))
    progress = _Ticker(report, "verifying", sum(stamp[0] for _, _, stamp in todo))
    for file, real, stamp in todo:
        found = _digest(real, file.digest, progress) if file.digest else None
        if file.bytes not in (None, stamp[0]) or found != file.digest:
            snapshot.remove(file)
            raise _wrong_bytes(snapshot, file, stamp[0], found)
        verified[real] = stamp
    progress.close()


def _wrong_bytes(snapshot: Snapshot, file: RepoFile, found_bytes: int, found: str | None) -> DownloadError:
    kind = "sha256" if len(file.digest or "") == 64 else "git sha1"
    gone = not snapshot.path(file).exists()
    removed = "It was removed: call it again to download it anew; if it stays wrong, a proxy or mirror alters it."
    return DownloadError(
        f"{file.name} of {snapshot.repo_id} has wrong bytes: {kind} {found}, {found_bytes} bytes.",
        f"The hub says {kind} {file.digest}, {file.bytes} bytes.",
        removed if gone else f"Delete {snapshot.path(file)}, which cannot be deleted from here, and call it again.",
    )


class _Ticker:
    """Adds bytes up and reports them at most five times a second, and at the end."""

    def __init__(self, report: Report, stage: str, total_bytes: int):
        self.report, self.stage, self.total_bytes, self.done_bytes, self.last = report, stage, total_bytes, 0, 0.0

    def add(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if time.monotonic() - self.last >= REPORT_SECONDS:
            self.last = time.monotonic()
            self.report(Progress(self.stage, self.done_bytes, self.total_bytes))

    def close(self) -> None:
        if self.total_bytes:
            self.report(Progress(self.stage, self.done_bytes, self.total_bytes))


def _digest(path: str, like: str, progress: _Ticker) -> str:
    """Compute the digest of the same kind as `like`."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(like) == 40:
        digest.update(b"blob %d\0" % os.path.getsize(path))  # how git names a file's content
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
            progress.add(num_bytes)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not there (any more)
        return 0


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
