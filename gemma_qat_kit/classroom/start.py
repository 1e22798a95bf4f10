"""Check this bundle and start from it, with no network and nothing installed but Python: `python start.py`.

    python start.py                    installs the kit from the bundle's wheels, opens JupyterLab on the notebooks
    python start.py --into FOLDER      the same, into a folder of your choice; the usual one is ~/gemma_qat_kit_class
    python start.py verify             reads every file and names those that are damaged
    python start.py python my.py       runs a command with the kit instead of JupyterLab

A copy lies in each bundle, and only the standard library is used, since the kit is what this file installs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

MANIFEST = "manifest.json"
FOLDER = Path("~/gemma_qat_kit_class")
_CHUNK_BYTES = 2**22


def machine_kind() -> str:
    """Name what wheels depend on: system, processor and Python, as in "linux-x86_64-py311"."""
    return f"{sysconfig.get_platform()}-py{sys.version_info[0]}{sys.version_info[1]}".replace("/", "_")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict:
    """Return what a bundle says of its files.

    Raises:
        ValueError: There is no manifest, or it cannot be read as one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values()):
            raise TypeError("an entry is none")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise TypeError("a file lies outside")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{folder / MANIFEST} cannot be read as the list of a bundle's files: {err}") from err
    return manifest


def damaged(folder: Path, start: str = "") -> list[str]:
    """Return the names of files that are missing or have other bytes than the manifest says.

    Args:
        folder: Of the bundle.
        start: Looks only at names that begin so.
    """
    files = {name: entry for name, entry in read_manifest(folder)["files"].items() if name.startswith(start)}
    return [name for name, entry in files.items() if not _is_whole(folder / name, entry)]


def _is_whole(path: Path, entry: dict) -> bool:
    try:
        return path.is_file() and path.stat().st_size == entry["bytes"] and file_digest(path) == entry["sha256"]
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """Verify, or install and run; return the exit status."""
    bundle, into = Path(__file__).resolve().parent, FOLDER
    if arguments[:1] == ["--into"] and len(arguments) > 1:
        into, arguments = Path(arguments[1]), arguments[2:]
    try:
        if arguments == ["verify"]:
            return _report(damaged(bundle))
        return _run(bundle, into.expanduser().resolve(), arguments)
    except (OSError, ValueError, subprocess.CalledProcessError) as err:
        print(f"start: {err}")
        return 1


def _report(names: list[str]) -> int:
    for name in names:
        print(f"start: {name} is damaged or missing")
    if names:
        print(
            "start: copy these files again, or call gqk.bundle(folder) where there is a network: it fetches only them."
        )
    else:
        print("start: every file is as it was made.")
    return 1 if names else 0


def _run(bundle: Path, into: Path, command: list[str]) -> int:
    python = _install(bundle, into)
    for name in ("notebooks", "docs", "texts"):
        if (bundle / name).is_dir() and not (into / name).exists():  # a student's own work is never replaced
            shutil.copytree(bundle / name, into / name)
    lab = ["-m", "jupyterlab", "--ServerApp.root_dir=.", "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"]
    line = [python, *command[1:]] if command[:1] == ["python"] else command or [python, *lab]
    return subprocess.run(line, cwd=into, env=os.environ | offline_settings(bundle)).returncode


def offline_settings(bundle: Path) -> dict[str, str]:
    """Return the variables that make the kit look into a bundle, and nowhere else."""
    return {"HF_HUB_CACHE": str(bundle / "models"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _install(bundle: Path, into: Path) -> Path:
    """Make the environment, or find it as it was made from the same wheels."""
    wanted = bundle / f"requirements-{machine_kind()}.txt"
    if not wanted.exists():
        kinds = ", ".join(path.stem.removeprefix("requirements-") for path in sorted(bundle.glob("requirements-*.txt")))
        raise ValueError(
            f"This machine is {machine_kind()}; the bundle has wheels for {kinds or 'none'}. Make one there."
        )
    python = into / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = into / ".venv" / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted.read_text() and python.exists():
        return python
    if names := damaged(bundle, "wheels/"):
        _report(names)
        raise ValueError("Nothing was installed from a damaged bundle.")
    print(f"start: installing into {into}, from this bundle only")
    venv.create(into / ".venv", with_pip=True, clear=True)
    flags = ["--no-index", "--no-deps", "--require-hashes", "--disable-pip-version-check", "-qq"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    environment["PIP_CONFIG_FILE"] = os.devnull  # no index, no constraint and no folder but the bundle's
    subprocess.run([python, "-m", "pip", "install", *flags, "--find-links", bundle / "wheels", "-r", wanted],
                   env=environment, check=True)  # fmt: skip
    stamp.write_text(wanted.read_text())
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
