"""Every way a download can fail, in the three parts of an error message."""

import os
import re

from gemma_qat_kit.errors import (
    DownloadError,
    KitError,
    MissingLibraryError,
    NotEnoughDiskError,
    UnsafeCheckpointError,
)
from gemma_qat_kit.hub.cache import Snapshot, cache_folder
from gemma_qat_kit.units import readable_bytes

_LOOKS_LIKE_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_GOES_ON = "call it again: the download goes on where it stopped."


def without_token(text: str, token: str | None) -> str:
    """Replace the token, and whatever else looks like one, in a text that a person will see."""
    for spelling in (token, repr(token)[1:-1]) if token else ():  # an illegal header is quoted with its escapes
        text = text.replace(spelling, "<token>")
    return _LOOKS_LIKE_TOKEN.sub("<token>", text)


# kind, as the child process sorts it -> the three parts
_WORDS = {
    "no_answer": (
        "No answer from {hub} about {repo_id} ({detail}).",
        "A download needs a connection to it; what is already downloaded works without one.",
        "Check the connection (a proxy goes into HTTPS_PROXY) and call it again.",
    ),
    "network": (
        "The connection broke while {repo_id} was downloading ({detail}).",
        "It must hold until every file has come.",
        "Check the connection (a proxy goes into HTTPS_PROXY) and {goes_on}",
    ),
    "refused": (
        "The hub refuses access to {repo_id} (HTTP {status}).",
        "Gemma 4 is Apache-2.0 and its repositories normally open without a token; a private or gated one needs a "
        "token that may read it, and a repository that does not exist gets the same answer.",
        "Check the repo id; then set HF_TOKEN to a valid token, or unset an HF_TOKEN that has expired.",
    ),
    "no_repository": (
        "The hub has no repository '{repo_id}' (HTTP {status}).",
        "A repo id is owner/name, spelled as on its page.",
        "Print gemma_qat_kit.catalog() for the repositories that exist.",
    ),
    "no_revision": (
        "{repo_id} has no revision '{revision}'.",
        "A revision is a branch, a tag or a full commit hash that is still in the repository.",
        'Pass revision="main" for the newest state, which is then remembered.',
    ),
    "no_file": (
        "{repo_id} lists {file} but has no such file (HTTP {status}).",
        "Every file of the list must be there.",
        'Call it again later, or pass revision="main" for the newest state of the repository.',
    ),
    "not_writable": (
        "The cache folder {cache} cannot be written ({detail}).",
        "A download needs a folder that it may write to.",
        "Set HF_HUB_CACHE to such a folder and call it again.",
    ),
    "wrong_size": (
        "{file} of {repo_id} has wrong bytes ({detail}).",
        "The size must be the one that the hub lists.",
        "What came was thrown away: call it again; if it comes back the same, a proxy or mirror alters it.",
    ),
    "stalled": (
        "The download of {repo_id} stood still ({detail}).",
        "New bytes must keep arriving.",
        "Check the connection and {goes_on}",
    ),
    "disk_full": (
        "The disk of {cache} became full while {repo_id} was downloading.",
        "The free space was counted at the start; something else took it since.",
        "Free some space, or set HF_HUB_CACHE to a folder on a larger disk, and {goes_on}",
    ),
    "no_library": (
        "huggingface_hub cannot be imported ({detail}).",
        "Downloads go through huggingface_hub 1.0 or newer.",
        'Run: pip install "huggingface_hub>=1.0"',
    ),
    "other": (
        "The download of {repo_id} failed ({detail}).",
        "The hub must send every file whole.",
        "Wait a little and {goes_on}",
    ),
}
_CLASSES = {"disk_full": NotEnoughDiskError, "no_library": MissingLibraryError}


def child_error(repo_id: str, revision: str, failure: dict) -> KitError:
    """Word a failure that the child process has sorted into a kind."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    facts = {"repo_id": repo_id, "revision": revision, "hub": hub, "cache": cache_folder(), "goes_on": _GOES_ON}
    kind = failure["kind"] if failure["kind"] in _WORDS else "other"
    return _CLASSES.get(kind, DownloadError)(*(part.format(**facts, **failure) for part in _WORDS[kind]))


def not_enough_disk(snapshot: Snapshot, needed_bytes: int, free: int) -> NotEnoughDiskError:
    """Build the error for a download that does not fit on the disk."""
    return NotEnoughDiskError(
        f"{snapshot.repo_id} needs {readable_bytes(needed_bytes)} more and {cache_folder()} has "
        f"{readable_bytes(free)} free.",
        "What is to be downloaded must fit on that disk.",
        "Free some space, choose a smaller size or format, or set HF_HUB_CACHE to a folder on a larger disk.",
    )


def not_cached(snapshot: Snapshot) -> DownloadError:
    """Build the error for a model that is not whole in the cache while the network is switched off."""
    missing = ", ".join([file.name for file in snapshot.missing][:3]) or "everything"
    return DownloadError(
        f"HF_HUB_OFFLINE is set and {snapshot.repo_id} is not complete in {cache_folder()} (missing: {missing}).",
        "Without a network only a model that was downloaded before can be loaded.",
        "Connect, unset HF_HUB_OFFLINE and call it again, or set HF_HUB_CACHE to a folder that holds the model.",
    )


def file_not_listed(repo_id: str, name: str, listed: list[str]) -> DownloadError:
    """Build the error for a file that the repository does not have, with those that it has of its kind."""
    kind = os.path.splitext(name)[1]
    near = [other for other in listed if other.endswith(kind)][:8]
    return DownloadError(
        f"{repo_id} has no file {name!r}.",
        f"Its {kind} files: {', '.join(near) or 'none'}.",
        "If the repository was reorganised, pass the revision that still had the file.",
    )


def no_weights(repo_id: str, listed: list[str]) -> KitError:
    """Word the refusal of a repository without one loadable set of weights."""
    gguf = [name for name in listed if name.endswith(".gguf")]
    if gguf:
        return DownloadError(
            f"{repo_id} has {len(gguf)} GGUF files and nothing says which one is meant.",
            f"They are: {', '.join(gguf[:8])}.",
            "Download one of them (hf download) and load it by its local path.",
        )
    pickles = [name for name in listed if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickles:
        return UnsafeCheckpointError(
            f"{repo_id} has its weights only as pickle ({pickles[0]}), which can run code when opened.",
            "Weights must be safetensors or GGUF.",
            "Choose a repository that has one of these.",
        )
    return DownloadError(
        f"{repo_id} has no weights ({len(listed)} other files).",
        "A checkpoint has *.safetensors or *.gguf files at its top.",
        "Print gemma_qat_kit.catalog() for the repositories that can be loaded.",
    )
