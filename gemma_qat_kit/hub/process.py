"""The parent's side of the child process: start it, hear what it says, end it whatever happens."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gemma_qat_kit.hub.cache import cache_folder
from gemma_qat_kit.hub.failures import without_token

_SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_XET_RECONSTRUCT_WRITE_SEQUENTIALLY": "1",  # older hf_xet: so that what a killed download left is a prefix
}
# hf_xet's own buffers grow to gigabytes, more than a small machine has to spare.
_XET_BUFFERS = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": str(256 * 2**20),
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": str(64 * 2**20),
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": str(512 * 2**20),
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": str(128 * 2**20),
}
_OVERRIDES_BUFFERS = "HF_XET_HIGH_PERFORMANCE"


class FetchFailedError(Exception):
    """A child that failed, or had to be given up; `failure` holds kind, detail, status and file."""

    def __init__(self, kind: str, detail: str, status: int | None = None, file: str | None = None):
        super().__init__(f"{kind}: {detail}")
        self.failure = {"kind": kind, "detail": detail, "status": status, "file": file}

    @property
    def is_no_answer(self) -> bool:
        """Whether the hub could not even be asked for the list of files."""
        return self.failure["kind"] == "no_answer"


class FetchProcess:
    """The child process; leaving the `with` block ends it.

    Args:
        repo_id: Repository to ask about.
        revision: Branch, tag or commit.
        token: Access token, which travels in the environment.
        use_xet: Whether huggingface_hub may use hf_xet.
    """

    def __init__(self, repo_id: str, revision: str, token: str | None, *, use_xet: bool):
        self.token = token
        self.said: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed on exit)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_qat_kit.hub.fetch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=_environment(token, use_xet),
            start_new_session=True,  # Ctrl-C reaches the parent only, and that ends the child
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.tell(repo_id=repo_id, revision=revision)

    def __enter__(self) -> "FetchProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was still to be told to it
            self.process.stdin.close()
        self.stderr.close()

    def tell(self, **facts) -> None:
        """Send one line; a child that is gone already is noticed by `hear`."""
        with suppress(OSError):
            self.process.stdin.write(json.dumps(facts) + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float) -> dict | None:
        """Return what the child says within `seconds`, or None.

        Raises:
            FetchFailedError: The child failed, or ended without a word.
        """
        try:
            message = self.said.get(timeout=seconds)
        except queue.Empty:
            return None
        if message["event"] == "failed":
            detail = without_token(message["detail"], self.token)
            raise FetchFailedError(message["kind"], detail, message["status"], message["file"])
        if message["event"] == "ended":
            raise FetchFailedError("died", self._last_words())
        return message

    def _listen(self) -> None:
        with self.process.stdout as stdout:
            for line in stdout:
                self.said.put(json.loads(line))
        self.said.put({"event": "ended"})

    def _last_words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return without_token(f"the process ended with code {self.process.wait()}: {last}", self.token)


def _environment(token: str | None, use_xet: bool) -> dict[str, str]:
    """Build the child's environment: the same packages and cache as here, quiet, with the token."""
    environment = _XET_BUFFERS | dict(os.environ) | _SETTINGS
    environment.pop(_OVERRIDES_BUFFERS, None)
    environment["HF_HUB_CACHE"] = str(cache_folder())
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    if token:
        environment["HF_TOKEN"] = token
        environment.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    if not use_xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    return environment
