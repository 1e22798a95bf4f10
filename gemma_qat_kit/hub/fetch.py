"""The child process of `download`: whatever huggingface_hub is doing, ending this process ends it.

Speaks JSON lines. stdin: {"repo_id", "revision"}, later {"commit", "files": [{"name", "bytes", "digest"}, ...]}; its
end means that the parent is gone. stdout: {"event": "listing", ...}, {"event": "done"} or {"event": "failed", ...}.
The token comes in the environment.

huggingface_hub keeps no half-finished file for the next process (its temporary names are unique), so large files go
through its `http_get` into `blobs/<digest>.incomplete`, which the next process continues with a Range request. Only
the very first attempt at a file may use xet, which cannot continue; what it wrote is a prefix of the file (its writer
is sequential) and is adopted as such.
"""

import errno
import json
import os
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

LISTING_TIMEOUT_SECONDS = 8
CHUNK_BYTES = 64 * 1024  # each is on the disk when it has come; the client would collect 10 MiB and lose them in a cut
NUM_WORKERS = 4
NUM_TRIES = 3  # in a row without one new byte
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
WRONG_SIZE = "Consistency check failed"  # how `http_get` begins its message, in 1.27 and in 2.4


def main() -> None:
    """Do what the parent process asks on standard input, and answer in lines of JSON."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def say(event: str, **facts) -> None:
        print(json.dumps({"event": event, **facts}), file=out, flush=True)

    is_asking = True
    try:
        request = json.loads(sys.stdin.readline())
        say("listing", **_listing(request["repo_id"], request["revision"]))
        is_asking = False
        order = sys.stdin.readline()
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _fetch_all(request["repo_id"], **json.loads(order))
        say("done")
    except Exception as err:
        say("failed", **_failure(err, is_asking))
    os._exit(0)  # other files' threads are not waited for


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def _listing(repo_id: str, revision: str) -> dict:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT_SECONDS)
    files = [
        [sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id]
        for sibling in info.siblings or ()
    ]
    return {"commit": info.sha, "files": files}


def _fetch_all(repo_id: str, commit: str, files: list) -> None:
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    small_first = sorted(files, key=lambda file: file["bytes"] or 0)
    pool = ThreadPoolExecutor(NUM_WORKERS)
    futures = {pool.submit(_fetch, repo_id, commit, **file): file["name"] for file in small_first}
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if err := future.exception():
            err.file_name = futures[future]
            raise err


def _fetch(repo_id: str, commit: str, *, name: str, bytes: int | None, digest: str | None) -> None:
    from huggingface_hub import hf_hub_download

    if digest and len(digest) == 64 and bytes:
        _complete_blob(repo_id, commit, name, bytes, digest)
    hf_hub_download(repo_id, name, revision=commit)  # links the blob, or downloads a small file


def _complete_blob(repo_id: str, commit: str, name: str, num_bytes: int, digest: str) -> None:
    """Download a large file into the cache's blobs, from where the last attempt stopped, under the client's lock."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    folder = f"models--{repo_id.replace('/', '--')}"
    blobs, locks = (Path(constants.HF_HUB_CACHE) / part for part in (f"{folder}/blobs", f".locks/{folder}"))
    blobs.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{digest}.lock"):
        if (blobs / digest).exists():
            return
        partial = _partial(blobs, digest, num_bytes)
        url = hf_hub_url(repo_id, name, revision=commit)
        metadata = get_hf_file_metadata(url)
        can_xet = metadata.xet_file_data and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet")
        if can_xet and not partial.exists():
            return  # `hf_hub_download` does it
        headers = build_hf_headers()
        if urlsplit(url).netloc != urlsplit(metadata.location).netloc:
            headers.pop("authorization", None)  # a signed address elsewhere needs no token and must not see it
        _continue(metadata.location, headers, partial, num_bytes)
        os.replace(partial, blobs / digest)


def _partial(blobs: Path, digest: str, num_bytes: int) -> Path:
    """Return the half-finished file, after keeping the longest of what ended processes left and deleting the rest."""
    partial = blobs / f"{digest}.incomplete"
    for orphan in blobs.glob(f"{digest}.*.incomplete"):
        if orphan.stat().st_size > (partial.stat().st_size if partial.exists() else 0):
            os.replace(orphan, partial)
        else:
            orphan.unlink()
    if partial.exists() and partial.stat().st_size > num_bytes:
        partial.unlink()
    return partial


def _continue(url: str, headers: dict, partial: Path, num_bytes: int) -> None:
    """Append to `partial` until it is whole; `http_get` retries some kinds of cut by itself, this the others."""
    from huggingface_hub.file_download import http_get

    tries = NUM_TRIES
    while True:
        size = partial.stat().st_size if partial.exists() else 0
        try:
            with partial.open("ab") as file:
                http_get(url, file, resume_size=size, headers=headers, expected_size=num_bytes)
            return
        except Exception as err:
            if WRONG_SIZE in str(err):
                partial.unlink()
            tries = NUM_TRIES if _is_network(err) and partial.stat().st_size > size else tries - 1
            if not _is_network(err) or not tries:
                raise
            time.sleep(1)


def _is_network(err: BaseException) -> bool:
    """Whether httpx, under either of the names that huggingface_hub uses, could not talk to the other side."""
    return any(base.__name__ == "TransportError" for base in type(err).__mro__)


def _chain(err: BaseException | None) -> list[BaseException]:
    errors = []
    while err is not None and err not in errors:
        errors.append(err)
        err = err.__cause__ or err.__context__
    return errors


def _failure(err: Exception, is_asking: bool) -> dict:
    chain = _chain(err)
    status = next((link.response.status_code for link in chain if getattr(link, "response", None) is not None), None)
    lines = str(err).strip().splitlines() or [""]
    return {
        "kind": _kind(chain, status, is_asking),
        "status": status,
        "detail": f"{type(err).__name__}: {lines[0]}",
        "file": getattr(err, "file_name", None),
    }


def _kind(chain: list[BaseException], status: int | None, is_asking: bool) -> str:
    """Sort an error into one of the kinds that `failures` has words for."""
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    disk = [link for link in chain if isinstance(link, OSError)]
    no_connection = any(map(_is_network, chain)) or (status or 0) >= 500
    tests = {
        "disk_full": any(link.errno in DISK_FULL for link in disk),
        "not_writable": any(link.errno in NOT_WRITABLE and link.filename for link in disk),  # no name: a connection
        "no_answer": is_asking and (no_connection or "JSONDecodeError" in names),  # a portal's login page is not JSON
        "no_revision": "RevisionNotFoundError" in names,
        "no_file": "RemoteEntryNotFoundError" in names,
        "refused": status in (401, 403),
        "no_repository": "RepositoryNotFoundError" in names,
        "network": no_connection,
        "wrong_size": WRONG_SIZE in str(chain[0]),
        "no_library": "ModuleNotFoundError" in names,
    }
    return next((kind for kind, holds in tests.items() if holds), "other")


if __name__ == "__main__":
    main()
