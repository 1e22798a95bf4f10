"""Out of memory: what is recognised and said, that what failed is really freed, and the note of a kernel that died."""

import json
import os
import subprocess
import sys
import types
import warnings
import weakref
from dataclasses import asdict, replace

import pytest
import torch

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.errors import KitError, NotEnoughMemoryError
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for, plan_memory
from gemma_qat_kit.out_of_memory import OutOfMemoryError, explain_oom, free, is_out_of_memory, last_failure

SETTINGS = plan_memory("E4B", "bf16").settings
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 14.56 GiB, 1.20 GiB are free."
HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 42949672960 bytes. Error code 12"
RAN_OUT = (
    torch.cuda.OutOfMemoryError(CUDA),
    RuntimeError(CUDA),
    RuntimeError(HOST),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),
    OSError(12, "Cannot allocate memory"),
    NotEnoughMemoryError("E4B bf16 needs 14.9 GiB.", "4.00 GiB are free.", "Close other models."),
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder for notes; and cheaper settings that are a shorter context."""
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))

    def cheaper(plan):
        return [("a context of 512 tokens", plan_for(replace(plan.settings, context_length=512)))]

    monkeypatch.setattr(MemoryPlan, "cheaper", cheaper, raising=False)
    return tmp_path / "kit"


class Model:
    """Something big that can be watched."""

    def __init__(self):
        self.weight = torch.zeros(1000)
        self.itself = self  # as modules and hooks refer to each other: only the collector finds it


def build(watched, error):
    """Make a model, and fail while this frame still holds it."""
    model = Model()
    watched.append(weakref.ref(model.weight))
    raise error


def build_with_a_cause(watched, error):
    """Fail while another failure is handled, each with a model in its frame."""
    model = Model()
    watched.append(weakref.ref(model.weight))
    try:
        build(watched, ValueError("first"))
    except ValueError as err:
        raise error from err


@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: type(error).__name__)
def test_every_way_of_running_out_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(2, "No such file"), ValueError(CUDA)])
def test_no_other_error_is_taken_for_it(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, out_of_memory.help(SETTINGS):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: type(error).__name__)
def test_the_error_names_the_largest_part_and_what_would_take_less(error):
    plan = plan_for(SETTINGS)
    failure = explain_oom(error, SETTINGS)
    assert plan.largest().name in failure.allowed
    assert "a context of 512 tokens" in failure.next_step
    assert failure.cheaper[0][1].settings.context_length == 512
    assert isinstance(failure, KitError)
    assert isinstance(failure, MemoryError)


def test_what_was_asked_for_is_in_the_message():
    assert (
        explain_oom(RuntimeError(CUDA), SETTINGS).wrong == "E4B bf16 ran out of GPU memory, asking for 2.50 GiB more."
    )
    on_cpu = replace(SETTINGS, device="cpu")
    assert "42949672960 bytes" in explain_oom(RuntimeError(HOST), on_cpu).wrong
    assert explain_oom(RAN_OUT[-1], SETTINGS).wrong == RAN_OUT[-1].wrong


def test_where_nothing_is_cheaper_the_advice_is_another_machine(monkeypatch):
    monkeypatch.setattr(MemoryPlan, "cheaper", lambda plan: [])
    assert explain_oom(MemoryError(), SETTINGS).next_step == "Close other models, or take a machine with more memory."


@pytest.mark.parametrize("fail", [build, build_with_a_cause])
def test_what_failed_is_freed_while_its_error_is_still_held(fail):
    watched = []
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory.help(SETTINGS):
        fail(watched, RuntimeError(CUDA))
    assert [ref() for ref in watched] == [None] * len(watched)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_it_is_a_decorator_too():
    watched = []
    with pytest.raises(OutOfMemoryError):
        out_of_memory.help(SETTINGS)(build)(watched, MemoryError())
    assert watched[0]() is None


def test_an_inner_error_is_not_explained_twice():
    outer, inner = out_of_memory.help(replace(SETTINGS, size="E2B")), out_of_memory.help(SETTINGS)
    with pytest.raises(OutOfMemoryError) as caught, outer, inner:
        raise MemoryError
    assert caught.value.settings is SETTINGS


def test_free_clears_what_the_interpreter_remembers():
    watched = []
    try:
        build(watched, ValueError("earlier"))
    except ValueError as err:
        sys.last_value, sys.last_traceback = err, err.__traceback__
    assert watched[0]() is not None
    free()
    assert watched[0]() is None
    assert not hasattr(sys, "last_value")


CELL = """
def train():
    with out_of_memory.help(SETTINGS):
        model = Model()  # in a frame that still runs when the error is raised
        watched.append(weakref.ref(model.weight))
        FAIL(watched, RuntimeError(CUDA))
train()
"""


@pytest.mark.parametrize("fail", [build, build_with_a_cause])
def test_in_ipython_nothing_keeps_the_failed_model(fail, capsys):
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    shell = shell_module.InteractiveShell.instance()
    try:
        watched = []
        shell.user_ns.update(globals() | {"watched": watched, "FAIL": fail})
        result = shell.run_cell(CELL)
        assert isinstance(result.error_in_exec, OutOfMemoryError)
        assert [ref() for ref in watched] == [None] * len(watched)
        assert "the largest part is" in capsys.readouterr().out
        assert shell.user_ns["watched"] is watched, "the notebook's own variables stay"
    finally:
        shell_module.InteractiveShell.clear_instance()


def test_in_ipython_a_model_of_an_earlier_failed_cell_is_freed_too(capsys):
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    shell = shell_module.InteractiveShell.instance()
    try:
        watched = []
        shell.user_ns.update(globals() | {"watched": watched, "FAIL": build})
        shell.run_cell("build(watched, ValueError('earlier'))")
        assert watched[0]() is not None
        shell.run_cell(CELL)
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        shell_module.InteractiveShell.clear_instance()


def test_the_message_comes_also_where_the_buttons_cannot(monkeypatch):
    monkeypatch.setattr(out_of_memory, "_show_buttons", lambda failure: 1 / 0)
    lines = explain_oom(MemoryError(), SETTINGS)._render_traceback_()
    assert lines == [f"OutOfMemoryError: {explain_oom(MemoryError(), SETTINGS)}"]


def test_a_notebook_shows_the_buttons(monkeypatch):
    shown = []
    monkeypatch.setattr(out_of_memory, "_ipython", lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.display", shown.append)
    failure = explain_oom(MemoryError(), SETTINGS)
    assert failure._render_traceback_() == failure._render_traceback_(), "IPython 9 asks twice"
    assert [len(panel._buttons) for panel in shown] == [1]


def test_a_note_lies_there_while_a_model_is_loaded(home):
    with out_of_memory.note_loading(SETTINGS):
        (path,) = home.glob("loading-*.json")
        assert path.name == f"loading-{os.getpid()}.json"
        assert json.loads(path.read_text())["needed_bytes"] == plan_for(SETTINGS).needed_bytes
        assert last_failure() is None, "its process lives"
        assert path.exists()
    assert list(home.iterdir()) == []


def test_the_note_goes_also_when_the_load_fails(home):
    with pytest.raises(RuntimeError), out_of_memory.note_loading(SETTINGS):
        raise RuntimeError("x")
    assert list(home.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "file"))
    with out_of_memory.note_loading(SETTINGS):
        pass
    assert last_failure() is None


def test_a_kernel_that_was_killed_while_it_loaded_is_told_of_once(home):
    code = (
        "import dataclasses, os, signal, sys; from gemma_qat_kit import out_of_memory\n"
        "from gemma_qat_kit.memory.plan import plan_memory\n"
        "with out_of_memory.note_loading(plan_memory('E4B', 'bf16').settings): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode != 0
    assert len(list(home.iterdir())) == 1
    needs = out_of_memory.readable_bytes(plan_for(SETTINGS).needed_bytes)
    said = f"ended while it loaded E4B bf16, which needs {needs}. Cheaper: a context"
    with pytest.warns(UserWarning, match=said), out_of_memory.note_loading(SETTINGS):
        pass
    assert list(home.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with out_of_memory.note_loading(SETTINGS):
            pass


def write_note(home, **changes):
    import psutil

    home.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    note = {"pid": me.pid, "started": me.create_time(), "host": out_of_memory.socket.gethostname(),
            "needed_bytes": 2**30, "settings": asdict(SETTINGS)} | changes  # fmt: skip
    path = home / f"loading-{note['pid']}.json"
    path.write_text(json.dumps(note))
    return path


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_dead_one(home):
    path = write_note(home, started=1.0)
    assert last_failure().settings == SETTINGS
    assert not path.exists()


def test_a_note_of_another_machine_with_the_same_home_is_left_alone(home):
    path = write_note(home, host="elsewhere", started=1.0)
    assert last_failure() is None
    assert path.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_note_that_cannot_be_read_is_removed_without_a_word(home, text):
    home.mkdir()
    (home / "loading-1.json").write_text(text)
    assert last_failure() is None
    assert list(home.iterdir()) == []


def test_a_note_of_another_version_of_the_kit_is_removed_without_a_word(home):
    path = write_note(home, started=1.0, settings={"size": "E9Z", "lora_targets": []})
    assert last_failure() is None
    assert not path.exists()
