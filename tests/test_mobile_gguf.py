"""A mobile checkpoint runs in llama.cpp: its GGUF is written once, found again, and made anew when it is not right."""

import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import gguf
import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.engines import mobile_gguf as module
from gemma_qat_kit.engines.mobile_gguf import mobile_gguf
from gemma_qat_kit.errors import (
    BadSettingError,
    BrokenCheckpointError,
    CancelledError,
    ExportError,
    MissingLibraryError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
)
from gemma_qat_kit.layouts import reblocked_tensors

CHAT = """
import sys
import gemma_qat_kit as gqk
with gqk.load(sys.argv[1], report=lambda progress: None) as model:
    assert (model.format, model.engine) == ("mobile", "llama_cpp")
    assert model.chat("sky", max_new_tokens=2, temperature=0).new_tokens
    print(*(name in sys.modules for name in ("torch", "transformers")))
"""
COPY = """
import json, shutil, sys
order = json.loads(sys.stdin.readline())
shutil.copy({made!r}, order["target"])
print(json.dumps({{"stage": "re-blocking", "done": 1, "total": 2}}))
print(json.dumps({{"nbytes": 1}}))
"""


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A mobile folder, its GGUF as the kit wrote it, and the stages of progress that were told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path_factory.mktemp("home")))
        seen = []
        path = mobile_gguf(tiny("E2B", "mobile"), seen.append)
        return SimpleNamespace(folder=tiny("E2B", "mobile"), path=path, stages={progress.stage for progress in seen})


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The folder that the GGUF goes to."""
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "reblocked"


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Return a function that lets a script of a test do what the child does."""

    def become(text):
        script = tmp_path / "child.py"
        script.write_text(text)
        monkeypatch.setattr(module, "_SCRIPT", script)

    return become


def test_the_file_is_that_of_the_export_and_the_planners(made, tmp_path):
    exported = gqk.export_gguf(made.folder, tmp_path / "a.gguf", device="cpu", report=lambda progress: None).path
    assert made.path.read_bytes() == exported.read_bytes()
    assert made.stages == {"re-blocking", "verifying"}
    found = {
        t.name: (t.tensor_type.name, tuple(map(int, reversed(t.shape)))) for t in gguf.GGUFReader(exported).tensors
    }
    planned = {t.name: (t.dtype, t.shape) for t in reblocked_tensors(testing.tiny_config("E2B", "mobile"))}
    assert planned.pop("output.weight") == planned["token_embd.weight"]  # a tiny head is the embedding again
    assert found == planned


def test_the_second_load_and_a_chat_import_no_torch(made, home):
    home.mkdir(parents=True)
    shutil.copy(made.path, home)
    command = [sys.executable, "-c", CHAT, str(made.folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_damaged_file_is_made_anew_and_a_whole_one_is_not(made, home, child):
    child(COPY.format(made=str(made.path)))
    path = mobile_gguf(made.folder)
    for damaged in (made.path.read_bytes()[:-64], b"", b"GGUF"):
        path.write_bytes(damaged)
        assert mobile_gguf(made.folder).read_bytes() == made.path.read_bytes()
    child("raise SystemExit(1)")
    assert mobile_gguf(made.folder) == path


def test_a_changed_checkpoint_gets_a_file_of_its_own_and_the_old_one_goes(made, home, child, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "E2B")
    child(COPY.format(made=str(made.path)))
    first = mobile_gguf(folder)
    (folder / "chat_template.jinja").write_text("another")
    second = mobile_gguf(folder)
    assert first != second
    assert list(home.iterdir()) == [second]


def test_what_a_killed_process_left_is_deleted_and_what_another_writes_now_is_not(made, home, child, monkeypatch):
    child(COPY.format(made=str(made.path)))
    path = mobile_gguf(made.folder)
    draft = path.with_name(f".{path.name}.1234.part")
    for later, is_kept in ((0, True), (3600, False)):
        draft.write_bytes(b"half")
        path.unlink()
        now = time.time()
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda at=now + later: at))
        mobile_gguf(made.folder)
        assert draft.exists() == is_kept


def test_a_download_has_it_beside_it_for_everybody_who_shares_the_cache(made, child, tmp_path, home):
    child(COPY.format(made=str(made.path)))
    snapshot = tmp_path / "models--google--mobile" / "snapshots" / ("a" * 40)
    shutil.copytree(made.folder, snapshot)
    path = mobile_gguf(snapshot)
    assert path.parent == tmp_path / "models--google--mobile" / "reblocked"
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("nothing can be made here")
    assert mobile_gguf(snapshot).parent == home


def test_a_cancelled_load_leaves_nothing(made, home):
    def stop(progress):
        raise CancelledError("Stopped.", "", "")

    with pytest.raises(CancelledError):
        mobile_gguf(made.folder, stop)
    assert list(home.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_started(made, home, child, monkeypatch):
    child("raise SystemExit(1)")
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(NotEnoughDiskError, match="are free in") as caught:
        mobile_gguf(made.folder)
    assert 'engine="transformers"' in caught.value.next_step


def test_without_torch_it_is_said_what_needs_it(made, home, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingLibraryError, match="with it, once"):
        mobile_gguf(made.folder)


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", NotEnoughMemoryError, "too small while"),
        ("raise SystemExit('it broke')", ExportError, r"\(code 1\): it broke"),
        ("raise SystemExit(0)", ExportError, "it said nothing"),
    ],
)
def test_a_child_that_ends_early_says_why(made, home, child, script, error, words):
    child(script)
    with pytest.raises(error, match=words):
        mobile_gguf(made.folder)


def test_nowhere_to_write_names_the_setting(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "file"))
    with pytest.raises(ExportError, match="Set GEMMA_QAT_KIT_HOME"):
        mobile_gguf(made.folder)


def test_a_broken_checkpoint_is_called_so(made, home, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "E2B")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match="holds no weights"):
        mobile_gguf(folder)


def test_towers_are_left_to_transformers(made):
    for source in (("E2B", "mobile"), (made.folder,)):
        with pytest.raises(BadSettingError, match=r'no projector.*engine="transformers"'):
            gqk.load(*source, text_only=False)
