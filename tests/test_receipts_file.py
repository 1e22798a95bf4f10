"""The file of receipts: no line is lost, whatever lies in it, whoever else writes, and whatever the disk does."""

import errno
import os
import subprocess
import sys
import warnings

import pytest
from some_receipts import GOOD, MIB, keep, line_with

from gemma_qat_kit.memory import receipts_file
from gemma_qat_kit.memory.parts import ENGINE
from gemma_qat_kit.memory.receipts import receipts
from gemma_qat_kit.memory.receipts_file import ReceiptsWarning, receipts_path


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """This machine's file, in a folder that does not exist yet, and a process that has warned of nothing."""
    path = tmp_path / "cache" / "receipts.jsonl"
    monkeypatch.setenv("GQK_RECEIPTS", str(path))
    monkeypatch.setattr(receipts_file, "_said", set())
    return path


def test_off_writes_nothing_and_says_so(own, monkeypatch):
    monkeypatch.setenv("GQK_RECEIPTS", "OFF")
    keep()
    assert not own.parent.exists()
    assert "switched off" in str(receipts())
    assert "switched off" in receipts()._repr_html_()


def test_the_file_lies_where_caches_lie(tmp_path, monkeypatch):
    monkeypatch.delenv("GQK_RECEIPTS")
    monkeypatch.delenv("GEMMA_QAT_KIT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert receipts_path() == tmp_path / ".cache" / "gemma_qat_kit" / "receipts.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert receipts_path() == tmp_path / "xdg" / "gemma_qat_kit" / "receipts.jsonl"
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    assert receipts_path() == tmp_path / "kit" / "receipts.jsonl"


BROKEN = {
    "text": b"hello\n",
    "truncated": GOOD[:40] + b"\n",
    "binary": bytes(range(256)).replace(b"\n", b"") + b"\n",
    "nul": b"\0" * 4096 + b"\n",
    "no version": b'{"event": "chat"}\n',
    "list": b"[1]\n",
    "deep": b"[" * 60_000 + b"\n",
    "NaN": GOOD.replace(str(MIB).encode(), b"NaN"),
    "infinite": line_with(numbers={"x": 5}).replace(b'"x": 5', b'"x": 1e999'),
    "negative": GOOD.replace(str(MIB).encode(), b"-1"),
    "absurd": GOOD.replace(str(MIB).encode(), b"9" * 5000),
    "fraction": GOOD.replace(str(MIB).encode(), b"1.5"),
    "true": line_with(measured=[[ENGINE, "ram", True]]),
    "place": line_with(measured=[[ENGINE, "moon", 1]]),
    "short part": line_with(measured=[[ENGINE, "ram"]]),
    "many parts": line_with(measured=[[ENGINE, "ram", 1]] * 65),
    "event": line_with(event="party"),
    "event list": line_with(event=["chat"]),
    "time": line_with(when="yesterday"),
    "settings": line_with(settings=[]),
    "nested": line_with(settings={"size": {"a": 1}}),
    "long text": line_with(settings={"size": "x" * 81}),
    "hidden sign": line_with(settings={"size": "\u202eE2B"}),
    "long line": GOOD[:-2] + b" " * 70_000 + b"}\n",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_moved_aside_and_the_good_ones_stay(own, broken):
    own.parent.mkdir()
    content = GOOD + broken + GOOD
    own.write_bytes(content)
    with pytest.warns(ReceiptsWarning, match=r"Lines of .* that are no receipts: 1\.") as caught:
        assert len(receipts()) == 2
    aside = own.with_name("receipts.jsonl.corrupt-1")
    assert str(aside) in str(caught[0].message)
    assert (aside.read_bytes(), own.read_bytes()) == (content, GOOD + GOOD)
    assert len(receipts()) == 2  # and nothing is left to say


def test_a_second_corruption_overwrites_nothing(own):
    own.parent.mkdir()
    for content in (b"first\n", b"second\n"):
        own.write_bytes(content)
        with pytest.warns(ReceiptsWarning):
            receipts()
    assert [own.with_name(f"receipts.jsonl.corrupt-{n}").read_bytes() for n in (1, 2)] == [b"first\n", b"second\n"]


def test_half_a_line_at_the_end_does_not_spoil_the_next_receipt(own):
    own.parent.mkdir()
    own.write_bytes(GOOD + GOOD[:50])
    keep()
    assert own.read_bytes().startswith(GOOD + GOOD[:50] + b"\n{")
    with pytest.warns(ReceiptsWarning, match="no receipts: 1"):
        assert len(receipts()) == 2


def test_when_the_good_lines_cannot_be_moved_the_file_stays_as_it_is(own, monkeypatch):
    own.parent.mkdir()
    own.write_bytes(GOOD + b"broken\n")
    monkeypatch.setattr(receipts_file, "_set_aside", full_disk)
    with pytest.warns(ReceiptsWarning, match="could not be read.*No space"):
        receipts()
    assert own.read_bytes() == GOOD + b"broken\n"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_newer_record_is_kept_and_shown_as_far_as_known(own):
    newer = line_with(version=2, event="serve", measured={"gpu": 1}, when=None, colours=["blue"])
    own.parent.mkdir()
    own.write_bytes(newer + GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = next(row for row in receipts() if row.version == 2)
    assert (row.name, row.event, row.measured.placed) == ("E2B q4_0", "?", ())
    assert own.read_bytes() == newer + GOOD
    assert "E2B q4_0" in str(receipts())
    assert "E2B q4_0" in receipts()._repr_html_()


@pytest.mark.parametrize("way", ["file in the way", "read-only", "no home"])
def test_a_disk_that_takes_nothing_is_one_warning(own, monkeypatch, tmp_path, way):
    if way == "file in the way":  # works for root, too, which no permission stops
        own.parent.write_text("")
    elif way == "read-only":
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    else:
        monkeypatch.delenv("GQK_RECEIPTS")
        monkeypatch.delenv("GEMMA_QAT_KIT_HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(ReceiptsWarning, match=r"could not be kept.*GQK_RECEIPTS names another file"):
        keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep()  # it was said


def test_a_full_disk_is_a_warning(own, monkeypatch):
    keep()
    monkeypatch.setattr(receipts_file.os, "write", lambda file, data: len(data) // 2)
    with pytest.warns(ReceiptsWarning, match="No space left"):
        keep()


def test_a_full_file_moves_its_older_half_aside(own, monkeypatch):
    keep(seconds=0)
    monkeypatch.setattr(receipts_file, "MOST_BYTES", 10 * own.stat().st_size)
    for i in range(1, 10):
        keep(seconds=i)
    with pytest.warns(ReceiptsWarning, match=r"was full.*receipts\.jsonl\.old-1"):
        keep(seconds=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(11, 25):
            keep(seconds=i)
    asides = sorted(own.parent.glob("*.old-*"))
    assert [path.name for path in asides] == [f"receipts.jsonl.old-{n}" for n in range(1, len(asides) + 1)]
    kept = [row.numbers["seconds"] for path in (*asides, own) for row in receipts(path)]
    assert kept == list(range(25))
    assert own.stat().st_size <= receipts_file.MOST_BYTES


def test_two_processes_append_whole_lines(own):
    code = (
        "from gemma_qat_kit.memory.receipts import record; from gemma_qat_kit.memory.parts import Part, Parts\n"
        "import sys; measured = Parts((Part('engine', 1, 'ram'),) * 40); sys.stdin.readline()\n"
        "for i in range(200): record('chat', {'size': sys.argv[1]}, measured, measured, seconds=i)"
    )
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", code, name], stdin=subprocess.PIPE)
               for name in ("E2B", "E4B")]  # fmt: skip
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0]
    found = receipts()
    for size in ("E2B", "E4B"):
        assert sorted(row.numbers["seconds"] for row in found.select(size=size)) == list(range(200))
    assert len(found) == 400


@pytest.mark.skipif(receipts_file.fcntl is None, reason="this system has no flock")
def test_a_process_that_holds_the_file_delays_a_receipt_and_does_not_stop_it(own, monkeypatch):
    monkeypatch.setattr(receipts_file, "_PATIENCE", 0.05)
    keep()
    with own.open() as other:
        receipts_file.fcntl.flock(other, receipts_file.fcntl.LOCK_EX)
        keep()
        own.write_bytes(own.read_bytes() + b"broken\n")
        assert len(receipts()) == 2
        assert not list(own.parent.glob("*corrupt*"))  # to rewrite a file that another writes would lose a line
    with pytest.warns(ReceiptsWarning):
        receipts()
    assert list(own.parent.glob("*corrupt*"))
