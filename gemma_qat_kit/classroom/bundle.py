"""`bundle`: one folder with all that a class needs where there is no network, from wheels to checkpoints.

start.py                installs and opens JupyterLab; `python start.py verify` reads every file
manifest.json           bytes and sha256 of every file
requirements-KIND.txt   what to install on one kind of machine; one for each that made the bundle
wheels/                 the kit, its libraries, and the built-in model
models/                 checkpoints, in huggingface_hub's layout, without links: they survive any USB stick
notebooks/, docs/       the course and its pictures
texts/                  the built-in texts, the same for all whatever Python they have
recordings/             receipts of runs at full size
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import PANEL_STYLE, Checkpoint, find_checkpoint
from gemma_qat_kit.classroom import start, wheels
from gemma_qat_kit.download import download
from gemma_qat_kit.errors import BadSettingError, NotEnoughDiskError
from gemma_qat_kit.hub.cache import free_bytes
from gemma_qat_kit.memory.measured import MEASURED
from gemma_qat_kit.progress import Report
from gemma_qat_kit.quality import texts
from gemma_qat_kit.units import readable_bytes

ROOT = Path(__file__).parents[2]  # of a clone; an installed kit has no notebooks beside it
_WORK = ".work"  # what the kit noted while it made the bundle: which commit, which files
_SPARE_BYTES = 2**28  # left free: notebooks, notes and what a file system adds


@dataclass(frozen=True, repr=False)
class Bundle:
    """A finished bundle; draws itself as a few lines.

    Attributes:
        folder: Where it lies.
        checkpoints: What was asked for, in this call and earlier ones.
        num_files: In the manifest.
        nbytes: All of them.
        repaired: Files that were damaged or missing and were made or fetched again.
    """

    folder: Path
    checkpoints: tuple[str, ...]
    num_files: int
    nbytes: int
    repaired: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.num_files} files, {readable_bytes(self.nbytes)}, every one in {start.MANIFEST}",
                 f"Checkpoints: {', '.join(self.checkpoints) or 'the built-in one alone'}"]  # fmt: skip
        lines += [f"Was damaged, and is whole again: {name}" for name in self.repaired]
        return "\n".join([*lines, "Copy the folder to each machine, then there: python start.py"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        lines = "".join(f"<div>{html.escape(line)}</div>" for line in str(self).split("\n"))
        return f'{PANEL_STYLE}<div class="gqk-panel" role="status">{lines}</div>'


def bundle(
    folder: str | Path,
    checkpoints: Iterable[str | Checkpoint] = (),
    *,
    with_wheels: bool = True,
    report: Report | None = None,
) -> Bundle:
    """Make a folder that runs the course without a network, or complete and repair one.

    The bytes to fetch are said first. Called again it goes on where it stopped, and fetches only files that are damaged
    or missing. Wheels are those of this kind of machine: call it on each kind with the same folder, and they add up.

    Args:
        folder: To make, or made before; what was asked for then is kept.
        checkpoints: Size and format, as in "E2B q4_0"; rows of `catalog()`; or repo ids.
        with_wheels: Also what is to be installed; without it the machines have the kit already.
        report: Called with the progress of downloads; raise CancelledError in it to stop.

    Raises:
        UnknownNameError: Unknown size or format.
        BadSettingError: The kit is not used from a clone, so it has no notebooks; or a name that is none.
        NotEnoughDiskError: It does not fit; said before the first byte.
        DownloadError: A download failed; the next call goes on there.
    """
    if not (ROOT / "notebooks").is_dir():
        raise BadSettingError(
            f"{ROOT} holds no notebooks: the kit was installed without them.",
            "A bundle is made from a clone of the kit's repository.",
            "Clone it, and run make lab there.",
        )
    folder = Path(folder).expanduser().resolve()
    asked = list(dict.fromkeys([*_asked_before(folder), *(c if isinstance(c, str) else c.key for c in checkpoints)]))
    rows = [_row(name) for name in asked]
    repaired = _remove_damaged(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _wanted_wheels(folder) if with_wheels else ()
    missing = [wheel for wheel in wanted if not wheel.is_in(folder / "wheels")]
    _say_and_check(folder, missing, rows)
    wheels.fetch(missing, folder / "wheels")
    if wanted:
        (folder / f"requirements-{start.machine_kind()}.txt").write_text(wheels.requirements(wanted))
    for row in rows:
        with _settings_of(folder):
            _without_links(download(row, report=report))
    _write_course(folder)
    return _finish(folder, asked, repaired)


def _asked_before(folder: Path) -> list[str]:
    try:
        return [str(name) for name in start.read_manifest(folder).get("checkpoints", [])]
    except ValueError:  # none yet, or itself damaged: all files are looked at again
        return []


def _row(name: str) -> Checkpoint | str:
    if "/" in name:
        return name
    size, _, format = name.partition(" ")
    row = find_checkpoint(size, format.strip() or None)
    if row.repo_id is None:
        raise BadSettingError(
            f"{row.key} has no repository.",
            "The built-in model comes with the wheels, in every bundle.",
            'Leave it out, or name another, as in "E2B q4_0".',
        )
    return row


def _remove_damaged(folder: Path) -> tuple[str, ...]:
    """Delete files that are not as the manifest says, and name them."""
    if not (folder / start.MANIFEST).exists():
        return ()
    try:
        names = start.damaged(folder)
    except ValueError:
        (folder / start.MANIFEST).unlink()
        return (start.MANIFEST,)
    for name in names:
        print(f"{name} is damaged or missing, and is fetched again")
        (folder / name).unlink(missing_ok=True)
    return tuple(names)


def _wanted_wheels(folder: Path) -> tuple[wheels.Wheel, ...]:
    (folder / "wheels").mkdir(exist_ok=True)
    return wheels.needed(wheels.build_kit(ROOT, folder / "wheels"), ROOT)


def _say_and_check(folder: Path, missing: list[wheels.Wheel], rows: list[Checkpoint | str]) -> None:
    """Say the bytes that are to come, and refuse what does not fit."""
    packages = sum(wheel.nbytes or 0 for wheel in missing)
    models = (path for path in (folder / "models").rglob("*") if path.is_file() and not path.is_symlink())
    weights = sum(row.weights_bytes for row in rows if isinstance(row, Checkpoint))
    weights = max(0, weights - sum(path.stat().st_size for path in models))
    needed, free = packages + weights, free_bytes(folder)
    unknown = sum(wheel.nbytes is None for wheel in missing) + sum(isinstance(row, str) for row in rows)
    print(f"To fetch: {readable_bytes(packages)} in {len(missing)} wheels, {readable_bytes(weights)} of checkpoints. "
          f"{readable_bytes(free)} free in {folder}.")  # fmt: skip
    if unknown:
        print(f"The size of {unknown} of them is not known before they are fetched.")
    if needed + _SPARE_BYTES > free:
        raise NotEnoughDiskError(
            f"The bundle needs {readable_bytes(needed)} more and {folder} has {readable_bytes(free)} free.",
            f"It must fit, with {readable_bytes(_SPARE_BYTES)} to spare.",
            "Free some space, name fewer checkpoints, or another folder.",
        )


@contextmanager
def _settings_of(folder: Path) -> Iterator[None]:
    """Make `download` put its files and notes into the bundle; it takes both places from the environment."""
    own = {"HF_HUB_CACHE": str(folder / "models"), "GEMMA_QAT_KIT_HOME": str(folder / _WORK)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _without_links(snapshot: Path) -> None:
    """Put the files themselves where links were, and note which commit the newest is."""
    repository = snapshot.parents[1]
    for link in snapshot.rglob("*"):
        if link.is_symlink():
            os.replace(link.resolve(), link)
    shutil.rmtree(repository / "blobs", ignore_errors=True)
    shutil.rmtree(repository.parent / ".locks", ignore_errors=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(snapshot.name)


def _write_course(folder: Path) -> None:
    """Copy what the clone has: notebooks, pictures, the starter, texts and recordings."""
    for name, pattern in (("notebooks", "*.ipynb"), ("docs", "*")):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        for path in sorted((ROOT / name).glob(pattern)):
            shutil.copy(path, folder / name / path.name)
    for name in ("texts", "recordings"):
        (folder / name).mkdir(exist_ok=True)
    for name in texts.built_in_names():
        (folder / "texts" / f"{name}.txt").write_text(texts.read(name).content, encoding="utf-8")
    shutil.copy(MEASURED, folder / "recordings" / "receipts_at_full_size.jsonl")
    shutil.copy(start.__file__, folder / "start.py")


def _finish(folder: Path, asked: list[str], repaired: tuple[str, ...]) -> Bundle:
    """Write the manifest, in one step."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _WORK not in path.relative_to(folder).parts)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": start.file_digest(path)}
        for path in paths if path != folder / start.MANIFEST
    }  # fmt: skip
    draft = folder / f"{start.MANIFEST}.draft"
    draft.write_text(json.dumps({"version": 1, "checkpoints": asked, "files": files}, indent=1), encoding="utf-8")
    draft.replace(folder / start.MANIFEST)
    return Bundle(folder, tuple(asked), len(files), sum(entry["bytes"] for entry in files.values()), repaired)
