"""Download a checkpoint once, whole and checked; it can be stopped at any moment and goes on where it stopped."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import Checkpoint
from gemma_qat_kit.hub import failures
from gemma_qat_kit.hub.cache import COMMIT, REPORT_SECONDS, Snapshot, cache_folder, free_bytes, verify
from gemma_qat_kit.hub.files import Wanted, cached_snapshot, noted_snapshot, wanted_files
from gemma_qat_kit.hub.notes import recall, remember
from gemma_qat_kit.hub.process import FetchFailedError, FetchProcess
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.units import readable_bytes

STALL_SECONDS = 60  # without one new byte on the disk
ANSWER_SECONDS = 30  # for the file list, the start of the child included; the child itself gives up after 8
SILENT_SECONDS = 1  # before "connecting" is reported
NEWEST = "main"

_PERHAPS_XET = ("stalled", "died", "network", "other")  # failures that go away without hf_xet, if they came from it
_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its switches


def download(
    checkpoint: Checkpoint | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    with_projector: bool = False,
    report: Report | None = None,
) -> Path:
    """Download a checkpoint, or find it on the disk, and check every file.

    Without a revision the commit of the first download is used again, so that no later call changes the weights
    silently; `revision="main"` moves on to the newest commit, which is remembered from then on. A complete copy of a
    known commit is used without asking the hub.

    Args:
        checkpoint: Row of the catalog, or a repo id ("owner/name").
        revision: Branch, tag or full commit hash.
        token: Access token; by default HF_TOKEN, then Colab's secret of that name. Never printed.
        with_projector: Also the vision and audio projector, which a GGUF repository keeps in a file of its own.
        report: Called about five times a second; raise CancelledError in it to stop. Without it the bytes to download
            and the free disk are printed and a bar is drawn.

    Returns:
        The snapshot folder in huggingface_hub's cache.

    Raises:
        DownloadError: No network, access refused, missing file, wrong bytes, standstill.
        NotEnoughDiskError: It does not fit; raised before the first byte.
    """
    wanted = wanted_files(checkpoint, with_projector)
    name = revision or NEWEST
    notes = recall(wanted.repo_id)
    commit = name if COMMIT.fullmatch(name) else None if revision else notes["revisions"].get(name)
    with _reporting(report) as (report, say):
        snapshot = noted_snapshot(wanted, commit, notes)
        if snapshot is None or snapshot.missing:
            snapshot = _Errand(wanted, commit or name, notes, token, report, say).run()
        try:
            verify(snapshot, notes["verified"], report)
        finally:
            remember(wanted.repo_id, verified=notes["verified"])
    if not COMMIT.fullmatch(name):
        remember(wanted.repo_id, revisions={name: snapshot.commit})
    return snapshot.folder


@contextmanager
def _reporting(report: Report | None) -> Iterator[tuple[Report, Callable[[str], None]]]:
    if report is not None:
        yield report, lambda text: None
    else:
        with progress_bar() as bar:
            yield bar, print


@dataclass(frozen=True)
class _Errand:
    """One run to the hub for what is missing, or to the cache where the hub cannot be reached."""

    wanted: Wanted
    revision: str
    notes: dict
    token: str | None
    report: Report
    say: Callable[[str], None]

    def run(self) -> Snapshot:
        if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
            snapshot = self._cached()
            if snapshot.is_complete:
                return snapshot
            raise failures.not_cached(snapshot)
        try:
            return self._fetched(use_xet=True)
        except FetchFailedError as err:
            failed = err
        if failed.failure["kind"] in _PERHAPS_XET:
            self.say(f"{self.wanted.repo_id}: {failed.failure['detail']}; trying once more, without xet")
            try:
                return self._fetched(use_xet=False)
            except FetchFailedError as err:
                failed = err
        if failed.is_no_answer and (snapshot := self._cached()).is_complete:
            self.say(f"{snapshot.repo_id}: no answer from the hub; using commit {snapshot.commit[:8]} from the disk")
            return snapshot
        raise failures.child_error(self.wanted.repo_id, self.revision, failed.failure)

    def _fetched(self, use_xet: bool) -> Snapshot:
        with FetchProcess(self.wanted.repo_id, self.revision, _find_token(self.token), use_xet=use_xet) as child:
            listing = self._listing(child)
            self.notes["listings"][listing["commit"]] = listing["files"]
            remember(self.wanted.repo_id, listings={listing["commit"]: listing["files"]})
            snapshot = noted_snapshot(self.wanted, listing["commit"], self.notes)
            if snapshot.missing:
                snapshot.remove_damaged()
                self._announce(snapshot)
                child.tell(commit=snapshot.commit, files=[vars(file) for file in snapshot.missing])
                self._watch(child, snapshot)
            return snapshot

    def _listing(self, child: FetchProcess) -> dict:
        """Wait for the commit and its files."""
        asked = time.monotonic()
        while (listing := child.hear(REPORT_SECONDS)) is None:
            waited = time.monotonic() - asked
            if waited > ANSWER_SECONDS:
                raise FetchFailedError("no_answer", f"nothing came within {waited:.0f} seconds")
            if waited > SILENT_SECONDS:
                self.report(Progress("connecting", 0, None))
        if not COMMIT.fullmatch(listing["commit"] or ""):
            raise FetchFailedError("other", f"the hub names the commit {listing['commit']!r}")
        return listing

    def _announce(self, snapshot: Snapshot) -> None:
        """Say what is to come before the first byte, and refuse what does not fit."""
        needed, free = snapshot.total_bytes - snapshot.done_bytes, free_bytes(cache_folder())
        self.say(
            f"{snapshot.repo_id}: {readable_bytes(needed)} to download of {readable_bytes(snapshot.total_bytes)}, "
            f"{readable_bytes(free)} free in {cache_folder()}"
        )
        self.report(Progress("downloading", snapshot.done_bytes, snapshot.total_bytes))
        if needed > free:
            raise failures.not_enough_disk(snapshot, needed, free)

    def _watch(self, child: FetchProcess, snapshot: Snapshot) -> None:
        """Report the bytes on the disk until the child is done; they must keep growing."""
        done, changed = -1, time.monotonic()
        while child.hear(REPORT_SECONDS) is None:
            if snapshot.done_bytes != done:
                done, changed = snapshot.done_bytes, time.monotonic()
            elif time.monotonic() - changed > STALL_SECONDS:
                raise FetchFailedError("stalled", f"no new byte for {STALL_SECONDS} seconds")
            self.report(Progress("downloading", done, snapshot.total_bytes))
        self.report(Progress("downloading", snapshot.done_bytes, snapshot.total_bytes))

    def _cached(self) -> Snapshot:
        """Describe what the cache holds of the revision, whoever downloaded it."""
        ref = cache_folder() / f"models--{self.wanted.repo_id.replace('/', '--')}" / "refs" / self.revision
        commit = self.notes["revisions"].get(self.revision) or (ref.read_text() if ref.is_file() else self.revision)
        return noted_snapshot(self.wanted, commit, self.notes) or cached_snapshot(self.wanted, commit)


def _find_token(token: str | None) -> str | None:
    """Return the token to use: the given one, the environment's, or Colab's secret."""
    token = token or os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token and "google.colab" in sys.modules:
        try:
            from google.colab import userdata

            token = userdata.get("HF_TOKEN")
        except Exception:  # no such secret, no permission, no front end: Gemma needs no token
            token = None
    return token.strip() if token else None
