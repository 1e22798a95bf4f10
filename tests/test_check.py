"""Exercises: the answers are those of other sources, hints come in steps, and nothing else is taken for right."""

import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.classroom import tries
from gemma_qat_kit.classroom.exercises import EXERCISES, find_problem
from gemma_qat_kit.errors import BadSettingError, UnknownNameError
from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize
from gemma_qat_kit.qat.run import Evaluation, Lines, QatRun, Step
from gemma_qat_kit.qat.settings import TrainSettings

ROOT = Path(__file__).parent.parent
STUDENTS = ("", "Ada", "Grace Hopper", "Kōji")
NUMBERS = [number for number in EXERCISES if number not in ("02.1", "02.2", "03.3", "04.3")]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    return tmp_path / "kit"


def _numbers(question):
    return [float(digits.replace(",", "").rstrip(".")) for digits in re.findall(r"-?(?<![\w])\d[\d,.]*", question)]


def _q4_0(weights):
    """Scale and codes of one group, by the gguf library."""
    import gguf

    group = np.zeros(32, np.float32)
    group[: len(weights)] = weights
    block = gguf.quants.quantize(group, gguf.GGMLQuantizationType.Q4_0)
    low, high = block[2:] & 15, block[2:] >> 4
    return float(block[:2].view(np.float16)[0]), np.concatenate([low, high]).astype(int) - 8


def _gradient(weight, scale):
    scale = torch.tensor([[scale]], requires_grad=True)
    group = torch.zeros(1, 32)
    group[0, 0] = weight
    learned_fake_quantize(group, scale, GRIDS["q4_0"]).backward(torch.ones(1, 32))
    return scale.grad.item()


def _arriving(num_weights, percent):
    """Count in an experiment: dither, then the nearest integer."""
    dither = (np.arange(100_000) + 0.5) / 100_000 - 0.5
    return num_weights * np.mean(np.floor(percent / 100 + dither + 0.5))


def _answer(number, question):
    """The answer from another source: gguf, autograd, the planner, an experiment, or the definition."""
    n = _numbers(question.replace("Q4_0", "").replace("per cent", ""))
    if number == "01.1":
        import gguf

        return float(
            np.prod(gguf.quants.quant_shape_to_byte_shape((int(n[0]), int(n[1])), gguf.GGMLQuantizationType.Q4_0))
        )
    if number == "01.2":
        return _q4_0([n[1], n[2]])[0]
    if number == "01.3":
        return float(_q4_0([n[0], n[1]])[1][1])
    if number == "02.3":
        tokens = next(v for v in n if v > 5000)
        return (8 * tokens * 2 * 512 * 2 + 40 * 1024 * 2 * 8 * 256 * 2) / 2**20
    if number == "03.1":
        return _gradient(n[0], n[1])
    if number == "03.2":
        before, plain, trained = map(math.log, n)
        return 100 * Lines(before, Evaluation(0, plain, 0.0)).share_recovered(trained)
    if number == "04.1":
        linear = torch.nn.Linear(int(n[0]), int(n[1]), bias=False, device="meta")
        return float(n[2] * sum(linear.weight.shape))
    if number == "04.2":
        return _arriving(n[0], n[1])
    if number == "05.1":
        gib, bandwidth = re.search(r"reads ([\d.]+) GiB", question)[1], re.search(r"delivers (\d+) GB", question)[1]
        return float(bandwidth) * 1e9 / (float(gib) * 2**30)
    return n[1] / n[0]


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_answer_is_that_of_another_source(number, student):
    shown = gqk.check(number, student=student)
    assert shown.state == "open"
    answer = _answer(number, shown.question)
    assert gqk.check(number, answer, student=student).is_right, (shown.question, answer)
    assert gqk.check(number, np.float64(answer), student=student).is_right
    assert gqk.check(number, torch.tensor(answer, dtype=torch.float64), student=student).is_right
    for wrong in (answer * 1.05 + 0.6, -answer, answer / 2, answer * 2):
        assert not gqk.check(number, wrong, student=student).is_right


@pytest.mark.parametrize("number", EXERCISES)
def test_nothing_else_is_right_and_nothing_breaks(number):
    for answer in (0, math.nan, math.inf, "right", "5308416", [1], {"a": 1}, {}, True, object(), 10**400, np.zeros(3)):
        said = gqk.check(number, answer)
        assert said.state == "wrong"
        assert said.hints
        assert said.exercise in str(said)


@pytest.mark.parametrize("student", [f"Student {i}" for i in range(12)])
def test_the_longest_context_exists_for_everybody(student):
    problem = find_problem("02.1", student)
    size, gib = re.search(r"has (\S+) in .* with (\d+) GiB", problem.question).groups()
    fitting = [n for n in range(1024, 262_144, 1024)
               if gqk.plan_memory(size, "q4_0", context_length=n, device="cpu").fits(int(gib) * 2**30)]  # fmt: skip
    assert 1024 < max(fitting) < 261_120
    assert problem.judge(max(fitting)).is_right
    assert problem.judge(max(fitting) - 2048).remark == "More fits."
    assert problem.judge(max(fitting) + 2048).remark == "Too long."


@pytest.mark.parametrize("student", ["", *(f"Student {i}" for i in range(8))])
def test_the_adapter_needs_both_settings(student):
    table, chunk = {"per_layer_table": "disk"}, {"logits_chunk_length": 256}
    judge = find_problem("02.2", student).judge
    assert judge(table | chunk).is_right
    for half in (table, chunk, {}):
        assert "largest part" in judge(half).remark
    assert "batch_size is no setting" in judge(table | chunk | {"batch_size": 1}).remark
    assert "cannot be used" in judge({"logits_chunk_length": "few"}).remark


def _run(share, start):
    lines = Lines(2.0, Evaluation(0, 3.0, 0.5))
    looks = (Evaluation(0, 3 - start, 0.4), Evaluation(9, 3 - share, 0.1))
    return QatRun("smollm2-135m float32", TrainSettings(9), "float32", 5, lines, (Step(1, 2.0, 0.5),), looks, looks[1],
                  "Ran to its end.", 5.0)  # fmt: skip


def test_a_run_is_right_when_training_did_it_and_not_scales():
    assert gqk.check("03.3", _run(0.8, 0.6)).is_right
    said = gqk.check("03.3", _run(0.95, 0.9))
    assert not said.is_right
    assert "Scales alone won back 90%, with training it is 95%" in said.remark
    assert "A run of finetune" in gqk.check("04.3", _run(0.8, 0.6)).remark
    assert [run.answer.end for run in tries.recall()] == pytest.approx([0.8, 0.95, 0.8])


def test_hints_come_one_by_one_and_the_same_answer_is_no_new_try():
    hints = [len(gqk.check("01.1", wrong).hints) for wrong in (1, 1, 2, 2, 3, 4)]
    assert hints == [1, 1, 2, 2, 3, 3]
    assert gqk.check("01.1", 4).num_tries == 4
    assert gqk.check("01.1", 1, student="Ada").num_tries == 1


def test_a_usual_mistake_gets_its_own_remark():
    assert "codes alone" in gqk.check("01.1", 1536 * 6144 / 2).remark
    assert "sign" in gqk.check("01.2", 0.36 / 8).remark
    assert "Take logarithms first" in gqk.check("03.2", 100 * (25.8 - 18.9) / (25.8 - 17.2)).remark


def test_a_name_has_its_own_numbers_and_always_the_same():
    ask = {name: gqk.check("02.3", student=name).question for name in ("Ada", " ada ", "Grace", "Emmy", "")}
    assert ask["Ada"] == ask[" ada "]
    assert len(set(ask.values())) == 4


@pytest.mark.parametrize("name", ["  ", "a" * 81, "a\nb", "\u202eabc", 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(BadSettingError, match=r"is no name.*printable.*student="):
        gqk.check("01.1", 1, student=name)


def test_an_unknown_exercise_is_refused():
    with pytest.raises(UnknownNameError, match=r"exercise '1\.1'.*Known: 01\.1"):
        gqk.check("1.1", 3)


def test_feedback_is_announced_escaped_and_never_colour_alone():
    drawn = gqk.check("02.1", "<img src=x>", student="<b>Ada</b>")._repr_html_()
    assert 'role="status"' in drawn
    assert "✗ 02.1 not yet" in drawn
    assert "<b>" not in drawn
    assert "<img" not in drawn
    assert "<code>q4_0</code>" in drawn


def test_without_a_place_for_the_file_hints_still_come_in_steps(home, monkeypatch):
    home.write_text("a file, where the folder would be")
    monkeypatch.setattr(tries, "_unkept", [])
    with pytest.warns(tries.TriesWarning, match="until the kernel ends"):
        assert len(gqk.check("01.1", 1).hints) == 1
    assert len(gqk.check("01.1", 2).hints) == 2


def test_lines_that_are_no_tries_are_passed_over(home):
    gqk.check("01.1", 1)
    good = json.loads((home / "tries.jsonl").read_text())
    broken = [good | {"exercise": "99.9"}, good | {"when": 3}, good | {"answer": [1]}, good | {"is_right": 1},
              good | {"student": "a\u202e"}, good | {"answer": {"run": {}}}, [], {}]  # fmt: skip
    text = "\n".join(["{half", "[" * 9999, *map(json.dumps, broken), json.dumps(good)])
    (home / "tries.jsonl").write_text(text)
    assert len(tries.recall()) == 1


def test_a_full_file_makes_room(home, monkeypatch):
    monkeypatch.setattr(tries, "MOST_BYTES", 200)
    for wrong in range(5):
        gqk.check("01.1", wrong)
    assert (home / "tries.jsonl.old").exists()
    assert tries.recall()


def _sources():
    return [*ROOT.glob("gemma_qat_kit/classroom/*.py"), *ROOT.glob("notebooks/*.ipynb")]


@pytest.mark.parametrize("number", NUMBERS)
def test_no_answer_stands_in_the_source(number):
    answer = _answer(number, find_problem(number, None).question)
    spellings = {f"{answer:.4g}", f"{answer:g}", f"{answer:,.0f}", f"{answer:.0f}"}
    long = [text for text in spellings if len(re.sub(r"\D", "", text).strip("0")) >= 3]
    assert [
        (path.name, text) for path in _sources() for text in long if re.search(rf"\b{text}\b", path.read_text())
    ] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/0[1-5]*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_asks_its_exercises_and_answers_none_of_them(path):
    cells = nbformat.read(path, as_version=4).cells
    asked = [number for number in EXERCISES if number.startswith(path.stem[:2])]
    assert len(asked) >= 2
    places = {cell.source: i for i, cell in enumerate(cells)}
    for number in asked:
        at = next(i for source, i in places.items() if source.startswith(f'gqk.check("{number}", '))
        assert re.fullmatch(r'gqk\.check\("[\d.]+", (None|run)\)', cells[at].source)
        words = " ".join(cells[at - 1].source.split())
        assert words == f"**{number}** {find_problem(number, None).question}"
