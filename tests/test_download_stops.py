"""Downloads that are cut, stand still, are stopped or run out of disk, and how they go on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from loopback_hub import Fault
from tiny_repo import REPO, SHA256, SLOW, WEIGHTS, blobs, leave_partial, quiet, stop_after

from gemma_qat_kit import download as download_module
from gemma_qat_kit.download import download
from gemma_qat_kit.errors import CancelledError, DownloadError, NotEnoughDiskError
from gemma_qat_kit.hub import process

pytestmark = pytest.mark.usefixtures("hub")


def test_cut_connections_are_gone_on_with(hub):
    hub.faults["model.safetensors"] = Fault("cut", after=100_000, times=2)
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    first, *later = hub.ranges("model.safetensors")
    assert first is None
    assert len(later) == 2
    assert all(asked.startswith("bytes=") for asked in later)


@pytest.mark.parametrize("error", [CancelledError("Stopped.", "", ""), KeyboardInterrupt()])
def test_a_stopped_download_propagates_and_the_next_call_goes_on_where_it_stopped(hub, error):
    hub.faults["model.safetensors"] = Fault(**SLOW, times=1)
    with pytest.raises(type(error)):
        download(REPO, report=stop_after(100_000, error))
    partial = blobs() / f"{SHA256}.incomplete"
    size = partial.stat().st_size
    assert WEIGHTS.startswith(partial.read_bytes())
    assert not (partial.parent / SHA256).exists()
    time.sleep(0.3)
    assert partial.stat().st_size == size, "somebody is still downloading"
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, f"bytes={size}-"]


def test_ctrl_c_ends_the_download_at_once(hub):
    hub.faults["model.safetensors"] = Fault("stall", after=100_000)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download(REPO, report=quiet)
    assert time.monotonic() - started < 3
    assert not (blobs() / SHA256).exists()


def test_what_a_killed_client_left_behind_is_gone_on_with_and_cleaned_up(hub):
    leave_partial(120_000, f"{SHA256}.0a1b2c3d.incomplete")
    leave_partial(5_000, f"{SHA256}.ffffffff.incomplete")
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=120000-"]
    assert not [path for path in blobs().iterdir() if "incomplete" in path.name]


def test_a_standstill_is_ended_and_tried_again_without_xet(hub, monkeypatch):
    monkeypatch.setattr(download_module, "STALL_SECONDS", 1)
    started = []
    monkeypatch.setattr(
        download_module,
        "FetchProcess",
        lambda *args, use_xet: started.append(use_xet) or process.FetchProcess(*args, use_xet=use_xet),
    )
    hub.faults["model.safetensors"] = Fault("stall", after=100_000, times=1)
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert started == [True, False]
    assert "HF_HUB_DISABLE_XET" not in process._environment(None, True)
    assert process._environment(None, False)["HF_HUB_DISABLE_XET"] == "1"


@pytest.fixture
def xet(hub, tmp_path):
    """The weights also in a storage that hf_xet reads, written by a process of its own, as it locks the storage."""
    pytest.importorskip("hf_xet")
    (tmp_path / "storage").mkdir()
    (tmp_path / "weights").write_bytes(WEIGHTS)
    storage = f"local://{tmp_path / 'storage'}"  # hf_xet's own kind for tests
    code = (
        "import hf_xet, sys\n"
        "with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as upload:\n"
        "    stored = upload.start_upload_file(sys.argv[2])\n"
        "print(stored.result().xet_info.hash)"
    )
    command = [sys.executable, "-c", code, storage, str(tmp_path / "weights")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    hub.xet["model.safetensors"] = (output.strip(), storage)


@pytest.mark.usefixtures("xet")
def test_xet_is_used_where_it_is_offered(hub):
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == []


@pytest.mark.usefixtures("xet")
def test_what_was_begun_is_gone_on_with_without_xet(hub):
    leave_partial(1000, f"{SHA256}.0a1b2c3d.incomplete")
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=1000-"]


@pytest.mark.usefixtures("xet")
def test_a_failure_of_xet_is_tried_again_without_it(hub, tmp_path):
    hub.xet["model.safetensors"] = ("0" * 64, f"local://{tmp_path / 'storage'}")
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [None]


def test_a_second_standstill_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(download_module, "STALL_SECONDS", 1)
    hub.faults["model.safetensors"] = Fault("stall")
    with pytest.raises(DownloadError, match=r"stood still \(no new byte for 1 seconds\).*goes on"):
        download(REPO, report=quiet)


def test_the_child_ends_when_its_parent_is_gone(hub):
    hub.faults["model.safetensors"] = Fault("stall")
    with process.FetchProcess(REPO, "main", None, use_xet=True) as child:
        listing = child.hear(10)
        files = [dict(zip(("name", "bytes", "digest"), file, strict=True)) for file in listing["files"]]
        child.tell(commit=listing["commit"], files=files)
        assert child.hear(0.5) is None
        child.process.stdin.close()
        assert child.process.wait(5) == 1


def test_a_child_that_dies_is_tried_again_and_then_quoted(hub, monkeypatch):
    monkeypatch.setattr(process.sys, "executable", shutil.which("false"))
    with pytest.raises(DownloadError, match=r"failed \(the process ended with code 1: no message\)"):
        download(REPO, report=quiet)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_in_the_middle_is_named(hub):
    blobs().mkdir(parents=True)
    (blobs() / f"{SHA256}.incomplete").symlink_to("/dev/full")
    with pytest.raises(NotEnoughDiskError, match=r"became full while owner/tiny-model was downloading.*goes on"):
        download(REPO, report=quiet)
