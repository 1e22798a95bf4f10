"""A GGUF is written whole or not at all: what is there already, a full disk, an interruption, wrong bytes read back."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_export import export
from test_export_refusals import refused

from gemma_qat_kit.errors import CancelledError, ExportError, NotEnoughDiskError
from gemma_qat_kit.export.gguf import export_gguf
from gemma_qat_kit.gguf import writer as gguf_writer
from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.gguf.writer import write_gguf
from gemma_qat_kit.layouts import Tensor


def test_a_file_that_is_there_is_kept_unless_told_otherwise(tiny, target):
    target.write_bytes(b"mine")
    told = []
    with pytest.raises(ExportError, match=r"is there already.*overwrite=True"):
        export_gguf(tiny("12B", "bf16"), target, report=told.append)
    assert (target.read_bytes(), told) == (b"mine", [])
    export(tiny("12B", "bf16"), target, overwrite=True)
    assert target.read_bytes().startswith(b"GGUF")
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_appears_meanwhile_is_kept(tiny, target):
    with pytest.raises(ExportError, match="is there already"):
        export_gguf(tiny("12B", "bf16"), target, report=lambda progress: target.write_bytes(b"theirs"))
    assert target.read_bytes() == b"theirs"
    assert list(target.parent.iterdir()) == [target]


def test_a_target_must_be_a_file_in_a_folder_that_can_be_written(tiny, target):
    folder = tiny("12B", "bf16")
    with pytest.raises(ExportError, match=r"The folder .*no does not exist"):
        export(folder, target.parent / "no" / "x.gguf")
    with pytest.raises(ExportError, match=r"is a folder.*model\.gguf"):
        export(folder, target.parent)
    if Path("/proc").is_dir():  # nobody can write there, not even root
        with pytest.raises(ExportError, match="cannot be written"):
            export(folder, "/proc/x.gguf")
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_is_too_small_is_found_before_the_first_tensor(tiny, target, monkeypatch):
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr("gemma_qat_kit.gguf.writer.shutil.disk_usage", lambda path: usage)
    told = []
    with pytest.raises(NotEnoughDiskError, match=r"needs 1\.\d\d MiB more on its disk; 1\.00 MiB are free"):
        export_gguf(tiny("12B", "bf16"), target, report=told.append)
    assert (list(target.parent.iterdir()), told) == ([], [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fills_up_all_the_same_leaves_nothing(tiny, target, monkeypatch, code):
    def fail(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("gemma_qat_kit.gguf.writer.os.fsync", fail)
    kind = ExportError if code == errno.EIO else NotEnoughDiskError
    refused(tiny("12B", "bf16"), target, kind, os.strerror(code))


@pytest.mark.parametrize("stage", ["writing", "verifying"])
@pytest.mark.parametrize("how", ["cancel", "Ctrl-C"])
@pytest.mark.parametrize("before", [None, b"mine"])
def test_an_export_that_is_stopped_leaves_what_was_there(tiny, target, stage, how, before):
    if before:
        target.write_bytes(before)

    def stop(progress):
        if progress.stage == stage and progress.fraction > 0.5:
            if how == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            raise CancelledError("Stopped.", "a", "b")

    with pytest.raises(CancelledError if how == "cancel" else KeyboardInterrupt):
        export_gguf(tiny("12B", "bf16"), target, overwrite=True, report=stop)
    assert [path.read_bytes() for path in target.parent.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("place", "words"),
    [(0.9, r"has other bytes in blk\.\d+\.\w+\.weight than were written"), (0.0, "has a damaged header")],
)
def test_a_disk_that_gives_other_bytes_back_is_found(tiny, target, monkeypatch, place, words):
    sync = os.fsync

    def damage(number):
        sync(number)
        (partial,) = target.parent.iterdir()
        with partial.open("r+b") as file:
            file.seek(int(place * partial.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr("gemma_qat_kit.gguf.writer.os.fsync", damage)
    refused(tiny("12B", "bf16"), target, ExportError, words)


def test_a_header_that_says_something_else_is_found(target, monkeypatch):
    read = gguf_writer.read_gguf_header
    monkeypatch.setattr(gguf_writer, "read_gguf_header", lambda path: SimpleNamespace(tensors=read(path).tensors[:1]))
    pairs = [(Tensor(name, "F32", (4,)), lambda: [np.zeros(4, np.float32)]) for name in ("a", "b")]
    with pytest.raises(ExportError, match="does not describe b as it was meant"):
        write_gguf(target, Metadata("gemma4", {}), pairs)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("count", [3, 5])
def test_data_of_another_length_are_refused(target, count):
    pairs = [(Tensor("a", "F32", (4,)), lambda: [np.zeros(count, np.float32)])]
    with pytest.raises(ExportError, match=rf"The data of a came to {4 * count} bytes.*take 16"):
        write_gguf(target, Metadata("gemma4", {}), pairs)
    assert list(target.parent.iterdir()) == []
