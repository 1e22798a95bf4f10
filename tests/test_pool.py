"""What students hand in: one file, read by somebody who believes nothing in it, and a class drawn from thirty."""

import json

import pytest
from some_receipts import keep

import gemma_qat_kit as gqk
from gemma_qat_kit.classroom import hand_in as module
from gemma_qat_kit.classroom import tries
from gemma_qat_kit.classroom.training import Training, from_json, to_json
from gemma_qat_kit.errors import BadSettingError, BrokenFileError, ExportError

RUN = Training("qat", "smollm2-135m float32", 60, 0.005, (2.5, 2.2), 1, 2.0, 3.0, 12.5)
TUNED = Training("finetune", "smollm2-135m float32", 40, 8e-4, (4.0, 0.2), 1, None, None, 30.0)
OTHER_KIND = {"run": to_json(TUNED)}
RIGHT = 1536 * 6144 * 18 // 32


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    monkeypatch.setenv("GQK_RECEIPTS", str(tmp_path / "receipts.jsonl"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    return folder


def _machine(monkeypatch, tmp_path, name):
    """Go to another student's machine."""
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / name))
    monkeypatch.setenv("GQK_RECEIPTS", str(tmp_path / f"{name}.jsonl"))


def _with_run(run, number="03.3"):
    tries.remember(tries.Try(tries.now(), number, "", run, True))


def _rewrite(path, **changes):
    """Change a file as somebody would who has read the source: the checksum fits."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data | {"sha256": module.digest(data)}))


def test_a_file_holds_what_was_solved_and_comes_back_whole(folder):
    gqk.check("01.1", 3)
    gqk.check("01.1", RIGHT)
    gqk.check("02.1", 5, student="Ada")
    gqk.check("02.1", 5, student="Grace")
    keep(seconds=1.5)
    _with_run(RUN)
    written = gqk.hand_in("Ada", folder / "ada.json")
    assert module.read(folder / "ada.json") == written
    assert written.solved == {"01.1": 2, "03.3": 1}
    assert [t.student for t in written.tries] == ["", "", "Ada", ""]
    assert written.trainings == (RUN,)
    assert written.receipts[0].numbers["seconds"] == 1.5
    assert "01.1 at try 2" in str(written)
    assert 'role="status"' in written._repr_html_()


def test_the_usual_place_is_named_after_the_student_and_replaced_by_nobody_else(tmp_path):
    assert gqk.hand_in("Ada Lovelace").path.name == "hand_in_ada_lovelace.json"
    gqk.hand_in("Ada Lovelace")
    with pytest.raises(ExportError, match=r"no file of Grace.*same student.*Remove it"):
        gqk.hand_in("Grace", "hand_in_ada_lovelace.json")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ExportError, match=r"no file of Ada"):
        gqk.hand_in("Ada", "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ExportError, match=r"cannot be written.*folder must be there.*another place"):
        gqk.hand_in("Ada", tmp_path / "nowhere" / "ada.json")


BROKEN = [
    ("cut off, or no JSON", lambda path: path.write_text(path.read_text()[:200])),
    ("cut off, or no JSON", lambda path: path.write_text("[" * 100_000)),
    ("cut off, or no JSON", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    ("is no hand-in", lambda path: path.write_text("[]")),
    ("is no hand-in", lambda path: _rewrite(path, kind="something else")),
    ("is larger than", lambda path: path.write_text(" " * (module.MOST_BYTES + 1))),
    ("is of form 2, and this kit reads 1", lambda path: _rewrite(path, version=2)),
    ("changed or damaged", lambda path: path.write_text(path.read_text().replace('"Ada"', '"Eve"'))),
    ("changed or damaged", lambda path: _rewrite(path, more=1)),
    ("cannot be: time or kit", lambda path: _rewrite(path, when="yesterday")),
    ("cannot be: .*no name", lambda path: _rewrite(path, student="a\u202eb")),
    ("cannot be: a try lacks", lambda path: _rewrite(path, tries=[{}])),
    ("cannot be: .*version", lambda path: _rewrite(path, receipts=[{}])),
    ("cannot be: the machine", lambda path: _rewrite(path, machine=[])),
    ("cannot be: there is too much", lambda path: _rewrite(path, tries=[{}] * 6000)),
    ("cannot be: ", lambda path: _rewrite(path, tries=3)),
    ("says that 01.1 is right", lambda path: _claim(path, answer=7, is_right=True)),
    (
        "says that 03.3 is right",
        lambda path: _claim(path, exercise="03.3", answer={"run": to_json(TUNED)}, is_right=True),
    ),
    ("exercises of 'Eve'", lambda path: _claim(path, student="Eve")),
    ("from after it was written", lambda path: _claim(path, when="2999-01-01T00:00:00Z")),
    ("it is no file", lambda path: (path.unlink(), path.mkdir())),
]


def _claim(path, **changes):
    data = json.loads(path.read_text())
    _rewrite(path, tries=[data["tries"][0] | changes])


@pytest.mark.parametrize(("match", "damage"), BROKEN)
def test_a_file_that_is_broken_or_forged_is_left_out_and_named(match, damage, folder):
    gqk.check("01.1", 3)
    gqk.hand_in("Ada", folder / "ada.json")
    gqk.hand_in("Grace", folder / "grace.json")
    damage(folder / "ada.json")
    with pytest.raises(BrokenFileError, match=rf"ada.json .*{match}"):
        module.read(folder / "ada.json")
    results = gqk.pool(folder)
    assert [student.name for student in results.students] == ["Grace"]
    assert len(results.notes) == 1
    assert results.notes[0].startswith("Left out: ada.json")
    assert "Left out: ada.json" in results._repr_html_()


@pytest.mark.parametrize(
    "changes",
    [{"kind": "x"}, {"name": "a\u202e"}, {"nats": []}, {"nats": ["a"]}, {"kept": 2}, {"kept": -1}, {"plain_nats": None},
     {"seconds": float("nan")}, {"num_steps": 1.5}, {"nats": 3}, {"more": 1}],
)  # fmt: skip
def test_a_training_run_that_cannot_be_is_none(changes):
    data = json.loads(json.dumps(to_json(RUN)))
    assert from_json(data) == RUN
    with pytest.raises(ValueError, match="a training run"):
        from_json(data | changes)


def test_files_of_one_name_are_put_together_and_count_once(folder, tmp_path, monkeypatch):
    (folder / "colab").mkdir()
    gqk.check("01.1", 3)
    keep(seconds=1.5)
    gqk.hand_in("Ada", folder / "one.json")
    gqk.check("01.1", RIGHT)
    gqk.hand_in("Ada", folder / "two.json")
    _machine(monkeypatch, tmp_path, "colab-machine")
    keep(seconds=2.5)
    gqk.hand_in("ada", folder / "colab" / "three.json")
    (student,) = gqk.pool(folder).students
    assert sorted(student.files) == ["one.json", "three.json", "two.json"]
    assert student.solved == {"01.1": 2}
    assert len(student.receipts) == 2
    assert gqk.pool(folder).notes == ()


def test_what_two_names_share_is_named(folder):
    keep(seconds=1.5)
    gqk.hand_in("Ada", folder / "ada.json")
    gqk.hand_in("Eve", folder / "eve.json")
    results = gqk.pool(folder)
    assert results.notes == ("The same receipts or runs are in the files of Ada, Eve: one machine, or a copy.",)
    assert len(results.receipts) == 1


def test_thirty_files_become_a_table_and_two_pictures(folder, tmp_path, monkeypatch):
    for i in range(30):
        _machine(monkeypatch, tmp_path, f"machine-{i}")
        keep(seconds=float(i))
        gqk.check("01.1", RIGHT if i % 3 else 4)
        if i == 7:
            _with_run(RUN)
            _with_run(TUNED, "04.3")
        gqk.hand_in(f"Student {i:02}", folder / f"{i:02}.json")
    results = gqk.pool(folder)
    assert len(results.students) == 30
    assert len(results.receipts) == 30
    assert results.exercises == ("01.1", "03.3", "04.3")
    lines = str(results).splitlines()
    assert lines[8].split() == ["Student", "07", "✓", "1", "✓", "1", "✓", "1", "3", "of", "3"]
    assert lines[31].split() == [*["Solved", "by", "20", "of", "30", "1", "of", "30", "1", "of", "30"]]
    drawn = results._repr_html_()
    assert drawn.count("<svg") == drawn.count('role="img"') == 3
    assert "50% by scales alone, 80% with training" in drawn
    assert "95% of the surprise gone" in drawn
    assert "Predicted against measured memory of 30 runs" in drawn


def test_names_that_are_code_are_shown_as_text(folder):
    _with_run(RUN)
    gqk.hand_in("<script>alert(1)</script>", folder / "x.json")
    drawn = gqk.pool(folder)._repr_html_()
    assert "<script" not in drawn
    assert "&lt;script&gt;" in drawn
    assert "<script" not in gqk.hand_in("<script>", folder / "y.json")._repr_html_()


def test_a_folder_without_files_is_said(folder):
    with pytest.raises(BadSettingError, match=r"has no \.json file.*handed in.*Collect"):
        gqk.pool(folder)
    with pytest.raises(BadSettingError, match="is no folder"):
        gqk.pool(folder / "nowhere")
