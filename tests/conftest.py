"""What every test file shares."""

import functools
import os
import signal
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import pytest
from loopback_hub import LoopbackHub
from small_files import write_folder
from tiny_repo import FILES, REPO

# A run that was started in the background inherits an ignored Ctrl-C, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Runs of the tests are nobody's, and what they leave is in nobody's home; also for the kernels that they start. Each of
# several test processes has its own.
_home = f"gemma_qat_kit-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
os.environ["GQK_RECEIPTS"] = "off"
os.environ["GEMMA_QAT_KIT_HOME"] = os.path.join(tempfile.gettempdir(), _home)
with suppress(OSError):  # an earlier run that was killed is none of this one's: its note would be a warning here
    for note in os.scandir(os.environ["GEMMA_QAT_KIT_HOME"]):
        if note.is_file():
            os.remove(note)

SHOWN = ("torch", "transformers", "huggingface_hub", "tokenizers", "xllamacpp", "numpy", "ipywidgets", "ipykernel")


def pytest_report_header():
    """Say on which versions this run really is, since `make test` runs on several."""
    return "versions: " + ", ".join(f"{name} {_version(name)}" for name in SHOWN)


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def pytest_collection_modifyitems(items):
    """Begin with the files that have slow tests, so that two processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1 with one tiny repository, an empty cache, and an environment that knows no other."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit(REPO, FILES)
        yield hub


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function that gives the path of a tiny checkpoint of a size and format, written on first use."""
    from gemma_qat_kit.testing import write_tiny_checkpoint, write_tiny_drafter

    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def write(size, format):
        if format == "drafter":
            return write_tiny_drafter(root / f"{size}-drafter", size)
        stored = "bf16" if format in ("nf4", "int8") else format
        return write_tiny_checkpoint(root / f"{size}-{stored}", size, stored)

    return write


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a small checkpoint folder: `write_folder`, always at the same place."""
    return functools.partial(write_folder, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def built_in():
    """The GGUF of the built-in model."""
    from gemma_qat_kit.load import built_in_checkpoint

    return built_in_checkpoint()


@pytest.fixture
def target(tmp_path):
    """A folder for the file, which a test leaves empty; and the file's path."""
    folder = tmp_path / "target"
    folder.mkdir()
    return folder / "model.gguf"
