"""What is downloaded, which commit, and what is said first: the real client against a hub on 127.0.0.1."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from loopback_hub import Fault
from tiny_repo import FILES, NEW_WEIGHTS, REPO, SLOW, WEIGHTS, leave_partial, quiet

from gemma_qat_kit.catalog import CheckpointFile, find_checkpoint
from gemma_qat_kit.download import download
from gemma_qat_kit.errors import (
    BadSettingError,
    DownloadError,
    NotEnoughDiskError,
    NotPublishedError,
    UnsafeCheckpointError,
)
from gemma_qat_kit.hub import cache

pytestmark = pytest.mark.usefixtures("hub")

GGUF = replace(
    find_checkpoint("E2B", "q4_0"),
    repo_id="owner/tiny-gguf",
    files=(CheckpointFile("tiny_q4_0.gguf", None, "weights"), CheckpointFile("tiny-mmproj.gguf", None, "projector")),
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is downloaded


def test_a_safetensors_repository_comes_without_code_and_pickles(hub):
    extra = {
        "tokenizer.model": b"t",
        "pytorch_model.bin": b"p",
        "model.py": b"c",
        "README.md": b"r",
        "sub/a.json": b"{}",
    }
    hub.commit(REPO, FILES | extra)
    folder = download(REPO, report=quiet)
    assert names(folder) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("with_projector", [False, True])
def test_a_gguf_checkpoint_is_its_named_file_and_the_projector_when_asked(hub, with_projector):
    hub.commit(GGUF.repo_id, {"tiny_q4_0.gguf": WEIGHTS, "tiny-mmproj.gguf": b"m" * 999, "other_q8_0.gguf": b"o"})
    folder = download(GGUF, with_projector=with_projector, report=quiet)
    assert names(folder) == (["tiny-mmproj.gguf"] if with_projector else []) + ["tiny_q4_0.gguf"]


def test_an_unknown_gguf_repository_gives_its_only_model(hub):
    hub.commit("owner/any", {"model.gguf": WEIGHTS, "mmproj-model.gguf": b"m" * 999})
    assert names(download("owner/any", report=quiet)) == ["model.gguf"]
    assert names(download("owner/any", with_projector=True, report=quiet)) == ["mmproj-model.gguf", "model.gguf"]


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({"a-Q4.gguf": b"a", "b-Q8.gguf": b"b"}, DownloadError, r"2 GGUF files.*a-Q4.gguf, b-Q8.gguf.*local path"),
        (
            {"pytorch_model.bin": b"a"},
            UnsafeCheckpointError,
            r"only as pickle \(pytorch_model.bin\).*safetensors or GGUF",
        ),
        ({"README.md": b"a"}, DownloadError, r"no weights.*safetensors.*catalog"),
    ],
)
def test_a_repository_without_one_set_of_safe_weights_is_refused(hub, files, error, match):
    hub.commit("owner/odd", files)
    with pytest.raises(error, match=match):
        download("owner/odd", report=quiet)


@pytest.mark.parametrize("repo_id", ["gemma", "a/b/c", "../x/y", "a/..", "own er/x", "/etc", ""])
def test_something_that_is_no_repo_id_is_refused(repo_id):
    with pytest.raises(BadSettingError, match=r"is not a repo id.*owner/name"):
        download(repo_id)


def test_a_row_without_repository_is_refused():
    with pytest.raises(NotPublishedError, match=r"no repository to download from.*load\('smollm2-135m'\)"):
        download(replace(find_checkpoint("smollm2-135m"), repo_id=None))


def test_a_repo_id_of_the_catalog_means_its_row():
    row = find_checkpoint("E2B", "q4_0")
    from gemma_qat_kit.hub.files import wanted_files

    assert wanted_files(row.repo_id, False) == wanted_files(row, False)
    assert wanted_files(row, False).names == ("gemma-4-E2B_q4_0-it.gguf",)


# Revisions


def test_a_second_call_asks_nobody(hub):
    folder = download(REPO, report=quiet)
    hub.asked.clear()
    assert download(REPO, report=pytest.fail) == folder
    assert hub.asked == []


def test_a_new_commit_changes_nothing_until_main_is_asked_for(hub):
    first = download(REPO, report=quiet)
    hub.commit(REPO, FILES | {"model.safetensors": NEW_WEIGHTS})
    assert download(REPO, report=quiet) == first
    newest = download(REPO, revision="main", report=quiet)
    assert (newest / "model.safetensors").read_bytes() == NEW_WEIGHTS
    assert download(REPO, report=quiet) == newest
    assert download(REPO, revision=first.name, report=quiet) == first
    assert download(REPO, report=quiet) == newest


def test_an_unknown_revision_says_what_to_do(hub):
    with pytest.raises(DownloadError, match=r"has no revision 'v9'.*branch, a tag.*revision=\"main\""):
        download(REPO, revision="v9", report=quiet)


def test_a_corrupt_note_is_put_aside_and_the_download_goes_on(hub, tmp_path):
    notes = tmp_path / "kit" / "repositories"
    notes.mkdir(parents=True)
    (notes / "owner--tiny-model.json").write_text('{"revisions": ["half a')
    assert download(REPO, report=quiet).name == hub.branches[REPO]
    aside = [path for path in notes.iterdir() if ".corrupt-" in path.name]
    assert [path.read_text() for path in aside] == ['{"revisions": ["half a']
    assert json.loads((notes / "owner--tiny-model.json").read_text())["revisions"] == {"main": hub.branches[REPO]}


def test_a_hub_that_names_no_commit_is_refused(hub):
    hub.commits[REPO]["not a commit"] = FILES
    hub.branches[REPO] = "not a commit"
    with pytest.raises(DownloadError, match=r"names the commit 'not a commit'"):
        download(REPO, report=quiet)


# Bytes and disk, said first


def test_the_first_progress_is_the_total_and_the_last_is_all_of_it(hub):
    hub.faults["model.safetensors"] = Fault(**SLOW)
    seen = []
    download(REPO, report=seen.append)
    total = sum(map(len, FILES.values()))
    downloading = [progress.done_bytes for progress in seen if progress.stage == "downloading"]
    assert {progress.total_bytes for progress in seen if progress.stage != "connecting"} == {total}
    assert downloading[0] == 0
    assert downloading[-1] == total
    assert downloading == sorted(downloading)
    assert len(set(downloading)) > 3
    assert (seen[-1].stage, seen[-1].done_bytes) == ("verifying", total)


def test_without_a_report_the_bytes_and_the_free_disk_are_printed_once(hub, capsys):
    download(REPO)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{REPO}: 293 KiB to download of 293 KiB, " in out
    assert "free in " in out


def test_what_does_not_fit_is_refused_before_the_first_byte(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200_000))
    seen = []
    with pytest.raises(NotEnoughDiskError, match=r"needs 293 KiB more and .* has 195 KiB free.*HF_HUB_CACHE"):
        download(REPO, report=seen.append)
    assert all(progress.done_bytes == 0 for progress in seen)
    assert hub.ranges("model.safetensors") == []


def test_what_is_already_there_needs_no_room(hub, monkeypatch):
    leave_partial(200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=110_000))
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS


# The rest


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE")
    assert cache.cache_folder() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "old"))
    assert cache.cache_folder() == tmp_path / "old"


def test_importing_it_loads_no_client():
    code = "import gemma_qat_kit.download, sys; print({'huggingface_hub', 'torch', 'tqdm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
