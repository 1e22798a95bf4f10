"""Which files of a repository make the checkpoint, and what is known of them without asking the hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import Checkpoint, catalog_checkpoint_for_repo
from gemma_qat_kit.errors import BadSettingError, KitError, NotPublishedError
from gemma_qat_kit.hub import failures
from gemma_qat_kit.hub.cache import DIGEST, RepoFile, Snapshot, cached_files

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what a safetensors checkpoint is made of


@dataclass(frozen=True)
class Wanted:
    """A repository and, where the catalog knows them, the names of the files to take from it."""

    repo_id: str
    names: tuple[str, ...] = ()
    with_projector: bool = False

    def select(self, files: list[RepoFile]) -> tuple[RepoFile, ...]:
        """Pick the files to download; code and pickles are never among them."""
        by_name = {file.name: file for file in files}
        for name in self.names:
            if name not in by_name:
                raise failures.file_not_listed(self.repo_id, name, list(by_name))
        if self.names:
            return tuple(by_name[name] for name in self.names)
        top = [file for file in files if "/" not in file.name and "\\" not in file.name]
        if any(file.name.endswith(".safetensors") for file in top):
            return tuple(file for file in top if file.name.endswith(_SUFFIXES))
        gguf = [file for file in top if file.name.endswith(".gguf")]
        projectors = [file for file in gguf if "mmproj" in file.name]
        if len(gguf) - len(projectors) != 1:
            raise failures.no_weights(self.repo_id, list(by_name))
        return tuple(file for file in gguf if self.with_projector or file not in projectors)


def wanted_files(checkpoint: Checkpoint | str, with_projector: bool) -> Wanted:
    """Read a row of the catalog, or a repo id that may be one, as the files to take."""
    if isinstance(checkpoint, str):
        if not _REPO_ID.fullmatch(checkpoint) or ".." in checkpoint or "--" in checkpoint:
            raise BadSettingError(
                f"{checkpoint!r} is not a repo id.",
                "A repo id is owner/name, as in 'google/gemma-4-E2B-it-qat-q4_0-gguf'.",
                "Print gemma_qat_kit.catalog() for the repositories that exist.",
            )
        row = catalog_checkpoint_for_repo(checkpoint)
        if row is None:
            return Wanted(checkpoint, with_projector=with_projector)
        checkpoint = row
    if checkpoint.repo_id is None:
        raise NotPublishedError(
            f"{checkpoint.key} has no repository to download from.",
            "Only a row of the catalog that has one can be downloaded.",
            f"Call load({checkpoint.size!r}), which knows where else a model comes from.",
        )
    kinds = ("weights", "projector") if with_projector else ("weights",)
    names = tuple(file.name for file in checkpoint.files if file.kind in kinds and file.name.endswith(".gguf"))
    return Wanted(checkpoint.repo_id, names)


def noted_snapshot(wanted: Wanted, commit: str | None, notes: dict) -> Snapshot | None:
    """Describe a commit from the file list noted when the hub was last asked about it."""
    if commit not in notes["listings"]:
        return None
    files = [
        RepoFile(name, num_bytes, digest if DIGEST.fullmatch(digest or "") else None)
        for name, num_bytes, digest in notes["listings"][commit]
    ]
    return Snapshot(wanted.repo_id, commit, wanted.select(files))


def cached_snapshot(wanted: Wanted, commit: str) -> Snapshot:
    """Describe a cached commit whose file list is not known, by what the folder itself says; no files if incomplete."""
    nothing = Snapshot(wanted.repo_id, commit, ())
    here = cached_files(nothing.folder)
    try:
        files = wanted.select(here)
    except KitError:
        return nothing
    needed = {"config.json"} if not files[0].name.endswith(".gguf") else set()
    for file in files:
        if file.name.endswith(".safetensors.index.json"):
            needed.update(_shards(nothing.path(file)))
    return Snapshot(wanted.repo_id, commit, files) if needed <= {file.name for file in files} else nothing


def _shards(index: Path) -> set[str]:
    """Read which files an index names; one that cannot be read names itself as missing."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return {f"what {index.name} names"}
