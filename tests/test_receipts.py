"""Receipts: what is written comes back, nothing is lost, a stranger's file is not believed, no run is disturbed."""

import os
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from some_receipts import GOOD, MEASURED, MIB, keep, line_with

from gemma_qat_kit.errors import BadSettingError, UnknownNameError
from gemma_qat_kit.memory import receipts as receipts_module
from gemma_qat_kit.memory import receipts_file, receipts_line, receipts_picture
from gemma_qat_kit.memory.parts import ENGINE, KEY_VALUES, TEXT_LAYERS, Part, Parts
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.receipts import receipts, record


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """This machine's file, in a folder that does not exist yet, and a process that has warned of nothing."""
    path = tmp_path / "cache" / "receipts.jsonl"
    monkeypatch.setenv("GQK_RECEIPTS", str(path))
    monkeypatch.setattr(receipts_file, "_said", set())
    return path


def test_a_receipt_comes_back_as_it_was_recorded():
    plan = plan_memory("E2B", "q4_0", context_length=2048)
    record("load", plan.settings, plan, MEASURED, predicted_peak_bytes=plan.load_peak_bytes, seconds=1.5)
    (row,) = receipts()
    assert row.settings == {name: value for name, value in asdict(plan.settings).items() if name != "config"}
    assert [(p.name, p.place, p.nbytes) for p in row.predicted.placed] == [
        (p.name, p.place, p.nbytes) for p in plan.placed
    ]
    assert (row.predicted.total_bytes, row.measured) == (plan.total_bytes, MEASURED)
    assert row.numbers == {"predicted_peak_bytes": plan.load_peak_bytes, "seconds": 1.5}
    assert (row.event, row.name, row.version) == ("load", "E2B q4_0", 1)
    assert set(row.machine) == {"place", "system", "cpu_count", "ram_bytes", "gpu"}


def test_a_receipt_names_no_user_host_or_path(own):
    keep()
    import getpass
    import platform

    text = own.read_text()
    for word in (getpass.getuser(), platform.node(), str(own.parent), os.getcwd()):
        assert f'"{word}' not in text
        assert len(word) < 5 or word not in text


def test_a_local_checkpoint_keeps_its_name_to_itself(own):
    plan = plan_memory("E2B", "q4_0")
    local = replace(plan.settings, size="/home/ann/my-gemma", config={"model_type": "gemma4"})
    record("load", local, plan, MEASURED)
    record("chat", {"size": "/home/ann/my-gemma", "format": "/x", "context_length": 64}, None, MEASURED)
    assert [row.name for row in receipts()] == ["local q4_0", "local"]
    assert [row.settings["context_length"] for row in receipts()] == [4096, 64]
    assert "ann" not in own.read_text()


def test_errors_are_predicted_less_measured_part_by_part():
    keep(predicted_peak_bytes=120 * MIB, measured_peak_bytes=100 * MIB)
    keep(measured=Parts((Part(TEXT_LAYERS, 94 * MIB, "gpu"),)))
    keep(predicted=None)
    (first, second, third), errors = receipts(), {error.name: error for error in receipts().errors()}
    assert (first.error_bytes, first.error) == (5 * MIB, 0.05)
    assert second.error == pytest.approx(11 / 94)
    assert (third.error_bytes, third.error) == (None, None)
    assert list(errors) == ["total", "peak", TEXT_LAYERS, KEY_VALUES, ENGINE]
    layers = errors[TEXT_LAYERS]
    assert (layers.count, layers.mean_bytes, layers.worst_bytes) == (2, -3 * MIB, -10 * MIB)
    assert layers.mean_ratio == pytest.approx((4 / 80 + 10 / 94) / 2)
    assert (errors[KEY_VALUES].mean_bytes, errors[KEY_VALUES].mean_ratio) == (6 * MIB, None)
    assert errors["peak"].worst_bytes == 20 * MIB


def test_receipts_are_selected_by_event_and_size():
    keep("load", "E2B")
    keep("chat", "E2B")
    keep("chat", "E4B")
    found = receipts()
    assert [len(found.select(event="chat")), len(found.select(size="E2B"))] == [2, 2]
    assert [row.name for row in found.select(event="chat", size="E2B")] == ["E2B q4_0"]
    assert len(found.select(event="train")) == 0
    with pytest.raises(UnknownNameError, match=r"Unknown event 'cat'.*Did you mean 'chat'"):
        found.select(event="cat")
    with pytest.raises(UnknownNameError, match="Unknown size"):
        found.select(size="e9")


def test_what_could_not_be_read_back_is_not_written(own):
    with pytest.raises(UnknownNameError, match="Unknown event 'chatt'"):
        keep("chatt")
    for numbers in ({"seconds": float("nan")}, {"seconds": float("inf")}):
        with pytest.raises(BadSettingError, match=r"cannot be written.*finite numbers.*Leave out"):
            keep(**numbers)
    for settings, message in (
        ({"engine": "e" * 81}, "up to 80 characters"),
        ({"engine": object()}, "cannot be written"),
    ):
        with pytest.raises(BadSettingError, match=message):
            record("chat", settings, None, MEASURED)
    assert not own.exists()


def test_a_class_pools_its_files_which_are_only_read(tmp_path):
    folder = tmp_path / "class"
    for student, content in (("ann", GOOD), ("bob", b"broken\n" + GOOD + b"\xff\n"), ("eve", b"")):
        (folder / student).mkdir(parents=True)
        (folder / student / "receipts.jsonl").write_bytes(content)
    (folder / "bob" / "notes.txt").write_text("hello")
    single = tmp_path / "single.jsonl"
    single.write_bytes(line_with(when="2020-01-01T00:00:00Z"))
    found = receipts(folder, single, single)
    assert len(found) == 3
    assert found[0].when == "2020-01-01T00:00:00Z"
    assert found.notes == ("Lines of receipts.jsonl that are no receipts and are left out: 2.",)
    assert (folder / "bob" / "receipts.jsonl").read_bytes() == b"broken\n" + GOOD + b"\xff\n"
    assert not list(folder.rglob("*corrupt*"))
    assert isinstance(found[:1], receipts_module.Receipts)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadSettingError, match=r"does not exist.*JSON lines.*or call receipts\(\)"):
        receipts(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert receipts(tmp_path).notes == ()
    assert receipts(tmp_path / "pipe.jsonl").notes == ("pipe.jsonl could not be read: it is no file.",)


def test_of_a_huge_file_only_the_start_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(receipts_file, "MOST_BYTES", 5 * len(GOOD))
    path = tmp_path / "huge.jsonl"
    path.write_bytes(GOOD * 1000)
    found = receipts(path)
    assert len(found) == 10
    assert "no receipts and are left out" in found.notes[0]
    monkeypatch.setattr(receipts_module, "_MOST_RECEIPTS", 7)
    assert len(receipts(path)) == 7
    assert "more than 7 receipts" in receipts(path).notes[-1]


def test_a_huge_own_file_is_shown_and_left_alone(own, monkeypatch):
    monkeypatch.setattr(receipts_file, "MOST_BYTES", 5 * len(GOOD))
    own.parent.mkdir()
    own.write_bytes(GOOD * 1000)
    assert len(receipts()) == 10
    assert own.stat().st_size == 1000 * len(GOOD)


class Page(HTMLParser):
    """Collects what a page shows."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    hostile = '"><script>x()</script><img src=x onerror=y()>'
    path = tmp_path / f"{'<b>'}.jsonl"
    parts = [[hostile, "ram", MIB], [ENGINE, "ram", 5 * MIB]]
    settings = {"size": hostile, "format": hostile, "engine": hostile, "context_length": hostile, "kv_format": hostile}
    train = {"task": "finetune", "lora_rank": hostile, "optimizer": "{0.__class__}", "batch_size": hostile}
    path.write_bytes(b"broken\n" + line_with(settings=settings, predicted=parts, measured=parts)
                     + line_with(settings=train, event="train", predicted=parts, measured=parts))  # fmt: skip
    found = receipts(path)
    page = Page(found._repr_html_())
    assert len(found) == 2
    assert not {"script", "img", "b"} & set(page.tags)
    assert any(hostile in word for word in page.words)
    assert hostile in str(found)
    assert "{0.__class__}" in str(found)


def test_the_picture_has_one_sign_per_run_on_the_line_of_a_perfect_plan():
    for event in ("load", "chat", "train"):
        keep(event, predicted=MEASURED)
    keep(predicted=None)
    page = Page(receipts()._repr_html_())
    assert [page.tags.count(tag) for tag in ("rect", "circle", "polygon")] == [1, 1, 2]  # the band is a polygon, too
    assert page.tags.count("title") == 3
    circle = next(part for part in receipts()._repr_html_().split("<") if part.startswith("circle"))
    line = next(part for part in receipts()._repr_html_().split("<") if part.startswith("line"))
    at, height = (float(circle.split(f'{name}="')[1].split('"')[0]) for name in ("cx", "cy"))
    x1, y1, x2, y2 = (float(line.split(f'{name}="')[1].split('"')[0]) for name in ("x1", "y1", "x2", "y2"))
    assert height == pytest.approx(y1 + (at - x1) / (x2 - x1) * (y2 - y1), abs=0.2)


def test_many_runs_stay_a_short_table():
    for _ in range(25):
        keep()
    assert "5 earlier runs are not listed" in str(receipts())
    assert receipts()._repr_html_().count("<tr>") == 2 + 20 + len(receipts().errors())


def test_no_receipts_is_no_error():
    assert "No receipts yet" in str(receipts())
    assert "No receipts yet" in receipts()._repr_html_()
    assert receipts().errors() == ()


def test_text_tells_predicted_from_measured():
    keep()
    first = str(receipts()).splitlines()[1]
    assert "≈ 105 MiB" in first
    assert " 100 MiB" in first
    assert "+5 MiB" in first
    assert "+5.0" in first
    assert receipts_picture.BAND == 0.05
    assert receipts_line.VERSION == 1
