"""The notebooks keep the course's form, are stored without outputs, and run from top to bottom."""

import ast
import math
import os
import re
import statistics
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from built_in_network import FEWER_TOKENS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WHICH_WIDGETS = "import ipywidgets; print(ipywidgets.__version__)"
PARTS = ("## Set-up", "## Settings", "## Try", "## Remember")


def _read(path):
    return nbformat.read(path, as_version=4)


def _code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _python(source):
    """The cell without the lines that only IPython understands."""
    return ast.parse(source.replace("%pip", "pass  # %pip"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return _read(request.param)


def test_there_is_a_course_in_reading_order():
    assert NOTEBOOKS[0].name == "00_start_here.ipynb"
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(len(NOTEBOOKS))]


def test_nothing_is_stored_but_the_source(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in notebook.metadata


def test_the_parts_come_in_their_order(notebook):
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert text[0].startswith("# ")
    assert "?" in text[0].splitlines()[0]
    assert "Colab" in text[0]
    assert "Binder" in text[0]
    assert all(fact in text[1] for fact in ("Time", "Memory", "GPU", "Download"))
    whole = "\n".join(text)
    places = [whole.index(part) for part in PARTS]
    assert places == sorted(places)
    assert "class " not in "".join(_code(notebook))


def test_cells_are_short_and_define_nothing_long(notebook):
    cells = _code(notebook)
    lines = [len(source.splitlines()) for source in cells]
    assert sum(lines) <= 60
    assert statistics.median(lines) <= 4
    assert len(set(cells)) == len(cells)
    for node in (node for source in cells for node in ast.walk(_python(source))):
        assert not isinstance(node, ast.ClassDef | ast.Try)
        assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 5


def test_the_settings_are_capitals_with_form_comments(notebook):
    settings = _code(notebook)[1]
    for line in settings.splitlines():
        assert line.split(" = ")[0].isupper()
        assert "# @param" in line


def test_every_widget_is_the_last_line_of_its_cell_and_said_again_in_words(notebook):
    shown = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and "widgets." in cell.source]
    assert shown
    for index in shown:
        last = _python(notebook.cells[index].source).body[-1]
        assert isinstance(last, ast.Expr | ast.With), "MemoryChart shows itself for as long as its block runs"
        assert notebook.cells[index + 1].cell_type == "markdown"
        assert "panel above" in notebook.cells[index + 1].source


ON_OVERLAY = bool(os.environ.get("GQK_OVERLAY"))  # other releases: whether its code runs there, not what is learnt

# Less of the same where it takes long: enough for the order of formats, and for the form of a ticket.
SHORTER = {"04_finetune": {"STEPS = 40": "STEPS = 2", "orders(160": "orders(24", "orders(10": "orders(1"}
                          if ON_OVERLAY else {"STEPS = 40": "STEPS = 20", "orders(10": "orders(3"},
           "05_chat": {"MAX_NEW_TOKENS = 120": "MAX_NEW_TOKENS = 40"},
           "06_teach": {"NUM_STUDENTS = 30": "NUM_STUDENTS = 4", "NUM_RUNS = 2": "NUM_RUNS = 1"}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_offline(path, monkeypatch, tmp_path):
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("GQK_RECEIPTS", str(tmp_path / "receipts.jsonl"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep))
    notebook = _read(path)
    _shorten(notebook, path.stem, tmp_path)
    notebook.cells.append(nbformat.v4.new_code_cell(WHICH_WIDGETS))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert outputs[-1].text.strip() == version("ipywidgets"), "the kernel is not the one that these tests are about"
    stored = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    states = [state["state"] for state in stored]
    checks = {"00_start_here": _check_start_here, "01_quantize": _check_quantize, "02_memory": _check_memory}
    checks |= {"03_qat": _check_qat, "04_finetune": _check_finetune, "05_chat": _check_chat,
               "06_teach": _check_teach}  # fmt: skip
    checks[path.stem](notebook, states)


def _shorten(notebook, name, folder):
    """Change numbers in a notebook's code, and folders; importance comes from fewer tokens."""
    changes = SHORTER.get(name, {}) | {f'"{own}"': f'"{folder}/{own}"' for own in ("tuned", "chats")}
    for cell in notebook.cells:
        for was, now in changes.items() if cell.cell_type == "code" else ():
            cell.source = cell.source.replace(was, now)
    if name in ("01_quantize", "04_finetune"):
        notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER_TOKENS))


def _check_start_here(notebook, states):
    shown = " ".join(str(state.get("value", "")) for state in states)
    assert len(_printed(notebook, "for text in model.stream").split()) > 10
    assert "smollm2-135m q4_1 is loaded" in shown
    assert "Talking to smollm2-135m q4_1" in shown
    assert "A recording: nothing is computed here." in shown
    assert "A recording: press Replay." in shown


def _check_quantize(notebook, states):
    """What holds whatever the machine and Python's version: the prose says it of these outputs."""
    first = next(state["shown"] for state in states if state.get("shown", {}).get("title", "").startswith("token_embd"))
    words = " ".join(next(cell.source for cell in notebook.cells if "the very\nfirst group" in cell.source).split())
    facts = dict(first["facts"])
    assert f"scale {facts['Scale'].split()[0]}, {len(first['bytes'])} bytes" in words
    assert f"error {facts['Signal over error (SQNR)']};" in words
    assert "weight 13, the largest at -0.322, gets the code -8" in words
    assert first["lines"][13].startswith("w[13] = -0.322 → code -8 → -0.322,")
    assert "weight 15 moves from 0.0203 to 0.0403" in words
    assert first["lines"][15].startswith("w[15] = 0.0203 → code 1 → 0.0403,")
    ratios = dict(re.findall(r"^(\w+) .* ([\d.]+) dB$", _printed(notebook, "for format in"), re.M))
    ratios = {name: float(ratio) for name, ratio in ratios.items()}
    assert (ratios["q8_0"] - ratios["q4_0"]) / 4 == pytest.approx(6, abs=0.5)
    assert ratios["mobile_int4"] < min(ratios["q4_0"], ratios["w4a16"], ratios["nf4"])
    losses = {row[0]: float(row[6]) for row in _table(notebook, "table = panel.run()")}
    assert losses["q8_0"] < losses["q4_0+importance"] < losses["q4_0"] < losses["mobile_int4"] < losses["mobile_int2"]
    assert len(losses) == 7
    assert "application/vnd.plotly.v1+json" in _cell(notebook, "table.figure()").outputs[-1].data
    recovered, plain = re.findall(r"([\d.]+)%", _printed(notebook, "is_qat = "))
    assert recovered == "100.00"
    assert float(plain) < 50
    assert "is not on a grid" in _cell(notebook, "gqk.grid_report").outputs[-1].data["text/html"]
    assert "verified" in _cell(notebook, "import tempfile").outputs[-1].data["text/html"]
    assert re.search("force|mass|gravit", _printed(notebook, "with gqk.load(file.path)"))


def _check_chat(notebook, states):
    shown = " ".join(str(state.get("value", "")) for state in states)
    assert "Talking to smollm2-135m q4_1" in shown
    assert "3 models are ready" in shown
    assert re.search(r"\d+ tokens at [\d.]+/s", _printed(notebook, "model = gqk.load"))
    assert "'text/plain': 'True'" in str(_cell(notebook, "talk = gqk.Conv").outputs[-1].data), "replayed word for word"
    assert "**smollm2-135m q4_1**" in _printed(notebook, "path = talk.save")
    assert "'seed': 0" in str(_cell(notebook, "path = talk.save").outputs[-1].data)
    assert len(re.findall(r"\d % as in unrounded", _printed(notebook, "comparison ="))) == 2


def _check_memory(notebook, states):
    shown = " ".join(str(state.get("value", "")) for state in states)
    assert "E2B q4_0 on this machine" in shown
    assert "Memory over time, measured" in shown
    assert ">loaded<" in shown
    assert "smollm2-135m q4_1, loaded here" in shown
    assert "smollm2-135m q4_1 ran out of memory." in shown
    assert any(state.get("description", "").startswith("Load: context_length=4096") for state in states)
    assert _printed(notebook, "training = ").count("total in memory, predicted") == 2
    assert "per-layer embeddings" in _cell(notebook, 'gqk.plan_memory("E2B", "mobile"').outputs[-1].data["text/plain"]
    published = [row[1] for row in _table(notebook, "gqk.published_memory") if len(row) == 5]
    assert published == ["11.4", "5.7", "2.9", "1.1", "0.84"]
    figure = _cell(notebook, "import plotly").outputs[-1].data["application/vnd.plotly.v1+json"]
    assert len(figure["data"]) == 5
    assert [row[0] for row in _table(notebook, "gqk.receipts()")[:2]] == ["chat", "load"]
    assert "Predicted" in _cell(notebook, "gqk.measured_receipts").outputs[-1].data["text/html"]
    offers = _printed(notebook, "for words, smaller in").splitlines()
    assert offers
    assert all(float(line.split()[0]) <= 12 for line in offers)


def _check_qat(notebook, states):
    shown = " ".join(str(state.get("value", "")) for state in states)
    assert "The model is at its best point, after step" in shown
    assert "of 32 codes changed" in shown
    assert "distance of hidden states" in shown
    assert "A recording: nothing is computed here." in shown
    rows = {row[0]: row[1:] for row in _table(notebook, "run = panel.run()")}
    plain, start = (float(rows[name][1]) for name in ("plain rule", next(name for name in rows if "prepared" in name)))
    kept = float(next(row[1] for name, row in rows.items() if "kept" in name))
    assert kept <= start < plain, "careful scales win back much, and training keeps the best point"
    assert "every weight goes through its grid" in _printed(notebook, "import inspect").lower()
    damaged = float(_table(notebook, "gqk.compare_formats")[-1][3])
    read = _cell(notebook, "gqk.perplexity").outputs[-1].data["text/plain"]
    assert math.exp(float(re.search(r"nats=([\d.]+)", read)[1])) < damaged
    assert "verified" in _cell(notebook, "import tempfile").outputs[-1].data["text/html"]
    for start in ("model = gqk.load(SIZE", "with gqk.load(file.path)"):
        assert re.search("force|mass|gravit", _printed(notebook, start))


def _cell(notebook, start):
    return next(cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start))


def _printed(notebook, start):
    return "".join(output.text for output in _cell(notebook, start).outputs if output.get("name") == "stdout")


def _table(notebook, start):
    """The cells of a table that was drawn, as texts, without its heading."""
    drawn = _cell(notebook, start).outputs[-1].data["text/html"]
    rows = re.findall(r"<tr>(.*?)</tr>", drawn[drawn.index("<tbody>") :], re.S)
    return [re.findall(r"<td[^>]*>(?:<span.*?</span>)?(.*?)</td>", row) for row in rows]


def _check_finetune(notebook, states):
    """It learns the form of a ticket: the exported file writes one for a name that it never saw."""
    ticket = _printed(notebook, "with gqk.load(path)").splitlines()[0].split(" → ")[1].strip()
    is_ticket = re.fullmatch(r"\w+ \| \d x [a-z ]+ \| (small|medium|large) \| (TO GO|HERE)", ticket)
    assert is_ticket or ON_OVERLAY, ticket
    assert "Modelfile" in _printed(notebook, "path = panel.export()")
    shown = " ".join(str(state.get("value", "")) for state in states)
    assert f"after {2 if ON_OVERLAY else 20} steps" in shown
    assert "Written:" in shown


def _check_teach(notebook, states):
    """A class is drawn from real runs, and a file that was changed is named."""
    drawn = _cell(notebook, "results = gqk.pool(folder)").outputs[-1].data["text/html"]
    assert re.findall(r'<th scope="row">(.*?)</th>', drawn) == [*(f"Student {i:02}" for i in range(1, 5)), "Solved by"]
    assert "Predicted against measured memory of 8 runs" in drawn
    assert "by scales alone" in drawn
    assert "Left out" not in drawn
    said = _cell(notebook, "import shutil").outputs[-1].data["text/plain"]
    assert "Left out: student_01.json was changed or damaged" in said
    assert len(_table(notebook, "results.receipts")) >= 3
