"""Wrong bytes, refusals, no network: each is one clear message, and nothing wrong is kept."""

import hashlib
import os
import socket
import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from loopback_hub import Fault
from tiny_repo import FILES, NEW_WEIGHTS, REPO, SHA256, SLOW, WEIGHTS, blobs, quiet, stop_after

from gemma_qat_kit import download as download_module
from gemma_qat_kit.catalog import CheckpointFile, find_checkpoint
from gemma_qat_kit.download import download
from gemma_qat_kit.errors import (
    CancelledError,
    DownloadError,
    KitError,
    MissingLibraryError,
    NotEnoughDiskError,
)
from gemma_qat_kit.hub import failures, fetch, process

pytestmark = pytest.mark.usefixtures("hub")

GGUF = replace(
    find_checkpoint("E2B", "q4_0"),
    repo_id="owner/tiny-gguf",
    files=(CheckpointFile("tiny_q4_0.gguf", None, "weights"), CheckpointFile("tiny-mmproj.gguf", None, "projector")),
)


@pytest.fixture
def offline(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def closed_endpoint():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# Wrong bytes


def test_wrong_bytes_are_removed_and_named_with_what_was_expected_and_found(hub):
    hub.faults["model.safetensors"] = Fault("corrupt", after=7, times=1)
    wrong = hashlib.sha256(WEIGHTS[:7] + bytes([WEIGHTS[7] ^ 1]) + WEIGHTS[8:]).hexdigest()
    with pytest.raises(DownloadError, match=rf"model.safetensors .* sha256 {wrong}, .* says sha256 {SHA256}.*removed"):
        download(REPO, report=quiet)
    assert list(blobs().glob(f"{SHA256}*")) == []
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS


def test_wrong_bytes_of_a_small_file_are_found_by_its_git_sha1(hub):
    hub.faults["config.json"] = Fault("corrupt", after=3, times=1)
    with pytest.raises(DownloadError, match=r"config.json of owner/tiny-model has wrong bytes: git sha1"):
        download(REPO, report=quiet)
    assert (download(REPO, report=quiet) / "config.json").read_bytes() == FILES["config.json"]


def test_a_file_of_another_size_than_listed_is_not_kept(hub):
    hub.faults["model.safetensors"] = Fault("short", after=1000, times=1)
    with pytest.raises(DownloadError, match=r"model.safetensors of owner/tiny-model has wrong bytes.*300000.*1000"):
        download(REPO, report=quiet)
    assert list(blobs().glob(f"{SHA256}*")) == []


def test_a_truncated_file_in_the_cache_is_downloaded_again(hub):
    weights = download(REPO, report=quiet) / "model.safetensors"
    os.truncate(weights, 1000)
    download(REPO, report=quiet)
    assert weights.read_bytes() == WEIGHTS


def test_a_file_is_verified_once_and_again_when_it_changes(hub):
    weights = download(REPO, report=quiet) / "model.safetensors"
    download(REPO, report=pytest.fail)
    weights.write_bytes(NEW_WEIGHTS)
    with pytest.raises(DownloadError, match=r"model.safetensors .* wrong bytes"):
        download(REPO, report=quiet)
    assert not weights.exists()


# Refusals


def test_a_file_missing_in_the_repository_is_named_with_those_that_are_there(hub):
    hub.commit(GGUF.repo_id, {"renamed_q4_0.gguf": WEIGHTS})
    with pytest.raises(DownloadError, match=r"has no file 'tiny_q4_0.gguf'.*\.gguf files: renamed_q4_0.gguf.*revision"):
        download(GGUF, report=quiet)


def test_a_listed_file_that_is_not_there_is_named(hub):
    hub.faults["model.safetensors"] = Fault("missing")
    with pytest.raises(DownloadError, match=r"lists model.safetensors but has no such file \(HTTP 404\)"):
        download(REPO, report=quiet)


def test_an_unknown_repository_is_named():
    with pytest.raises(DownloadError, match=r"no repository 'owner/nothing' \(HTTP 404\).*catalog"):
        download("owner/nothing", report=quiet)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_speaks_of_the_token_and_the_licence(hub, status):
    hub.refused[REPO] = status
    with pytest.raises(DownloadError, match=rf"refuses access.*HTTP {status}.*Apache-2.0.*HF_TOKEN"):
        download(REPO, report=quiet)


@pytest.mark.parametrize("given", ["argument", "environment", "colab"])
def test_a_token_opens_a_gated_repository_and_goes_nowhere_else(hub, monkeypatch, capfd, given):
    hub.refused[REPO], hub.token = 403, "hf_" + "x" * 30
    userdata = SimpleNamespace(get=lambda name: hub.token + "\n")
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    if given == "colab":
        monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(userdata=userdata))
    download(REPO, token=hub.token if given == "argument" else None)
    assert {asked.authorization for asked in hub.asked if asked.host.startswith("localhost")} == {None}
    assert hub.token not in "".join(capfd.readouterr())


def test_colabs_secret_may_fail_in_any_way(hub, monkeypatch):
    def get(name):
        raise RuntimeError("no front end")

    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(userdata=SimpleNamespace(get=get)))
    assert download(REPO, report=quiet).name == hub.branches[REPO]


@pytest.mark.parametrize("token", ["hf_" + "y" * 30, "hf_bad\nheader", "secret\x7fvalue"])
def test_a_token_never_appears_in_an_error(hub, token):
    hub.refused[REPO] = 401
    with pytest.raises(DownloadError) as error:
        download(REPO, token=token, report=quiet)
    assert token not in str(error.value)
    assert repr(token)[1:-1] not in str(error.value)


# Without a network


def test_no_network_is_said_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"No answer from http://127.*about owner/tiny-model.*HTTPS_PROXY"):
        download(REPO, report=quiet)
    assert time.monotonic() - started < 5


def test_a_hub_that_is_down_is_said(hub):
    hub.down = 503
    with pytest.raises(DownloadError, match=r"No answer from .*503"):
        download(REPO, report=quiet)


def test_an_answer_that_does_not_come_is_waited_for_only_so_long(hub, monkeypatch):
    monkeypatch.setattr(download_module, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(process.FetchProcess, "tell", lambda self, **facts: None)
    monkeypatch.setattr(download_module, "SILENT_SECONDS", 0.5)
    seen = []
    with pytest.raises(DownloadError, match=r"No answer from .*nothing came within 1 seconds"):
        download(REPO, report=seen.append)
    assert {progress.stage for progress in seen} == {"connecting"}


def test_a_connection_that_breaks_for_good_is_said(hub, monkeypatch):
    hub.faults["model.safetensors"] = Fault("error")
    with pytest.raises(DownloadError, match=r"connection broke while owner/tiny-model was downloading.*500.*goes on"):
        download(REPO, report=quiet)


def test_without_a_network_the_newest_is_the_one_on_the_disk(hub, monkeypatch, capsys):
    folder = download(REPO, report=quiet)
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    assert download(REPO, revision="main") == folder
    assert f"no answer from the hub; using commit {folder.name[:8]} from the disk" in capsys.readouterr().out


def test_offline_a_complete_copy_is_used(hub, monkeypatch):
    folder = download(REPO, report=quiet)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert download(REPO, report=quiet) == folder
    assert download(REPO, revision="main", report=quiet) == folder
    assert hub.asked == []


def test_offline_an_incomplete_copy_is_refused(hub, monkeypatch):
    hub.faults["model.safetensors"] = Fault(**SLOW, times=1)
    with pytest.raises(CancelledError):
        download(REPO, report=stop_after(1000, CancelledError("Stopped.", "", "")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set.*everything.*unset HF_HUB_OFFLINE"):
        download(REPO, report=quiet)
    with pytest.raises(DownloadError, match=r"missing: model.safetensors"):
        download(REPO, revision=hub.branches[REPO], report=quiet)


def foreign_cache(tmp_path, files):
    """Lay out a cache as another program would have left it, without any note of ours."""
    repo = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    commit = "c" * 40
    for name, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        for folder in (repo / "blobs", repo / "refs", repo / "snapshots" / commit):
            folder.mkdir(parents=True, exist_ok=True)
        (repo / "blobs" / digest).write_bytes(data)
        (repo / "snapshots" / commit / name).symlink_to(f"../../blobs/{digest}")
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


@pytest.mark.usefixtures("offline")
def test_offline_a_copy_that_another_program_downloaded_is_used_and_verified(tmp_path):
    folder = foreign_cache(tmp_path, FILES)
    assert download(REPO, report=quiet) == folder
    (folder / "model.safetensors").write_bytes(NEW_WEIGHTS)
    with pytest.raises(DownloadError, match=r"model.safetensors .* wrong bytes"):
        download(REPO, report=quiet)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": WEIGHTS},
        {"config.json": b"{}"},
        {
            "config.json": b"{}",
            "model-00001-of-00002.safetensors": WEIGHTS,
            "model.safetensors.index.json": b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
        },
        {"config.json": b"{}", "model.safetensors": WEIGHTS, "model.safetensors.index.json": b"cut off {"},
    ],
)
def test_offline_a_copy_without_config_weights_or_a_shard_is_refused(tmp_path, files):
    foreign_cache(tmp_path, files)
    with pytest.raises(DownloadError, match=r"not complete in .*everything"):
        download(REPO, report=quiet)


# The rest


def busy():
    error = OSError("429 Too Many Requests")
    error.response = SimpleNamespace(status_code=429)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "error_class"),
    [
        (OSError(28, "No space left on device"), "disk_full", NotEnoughDiskError),
        (PermissionError(13, "Permission denied", "/cache"), "not_writable", DownloadError),
        (PermissionError(13, "Permission denied"), "other", DownloadError),  # no path: a connection
        (busy(), "other", DownloadError),
        (ModuleNotFoundError("No module named 'huggingface_hub'"), "no_library", MissingLibraryError),
    ],
)
def test_every_kind_of_failure_has_its_three_parts(error, kind, error_class):
    failure = fetch._failure(error, False)
    assert failure["kind"] == kind
    worded = failures.child_error(REPO, "main", failure)
    assert type(worded) is error_class
    assert isinstance(worded, KitError)
    assert all(part.endswith((".", '"')) for part in worded.args)
