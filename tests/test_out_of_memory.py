"""Out of memory: what is recognised and said, and that what failed is really freed."""

import sys
import types
import weakref
from dataclasses import replace

import pytest
import torch

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.errors import KitError, NotEnoughMemoryError
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for, plan_memory
from gemma_qat_kit.out_of_memory import OutOfMemoryError, explain_oom, free, is_out_of_memory

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
def cheaper(monkeypatch):
    """Cheaper settings that are a shorter context."""

    def cheaper(plan):
        return [("a context of 512 tokens", plan_for(replace(plan.settings, context_length=512)))]

    monkeypatch.setattr(MemoryPlan, "cheaper", cheaper, raising=False)


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


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**55), lambda: bytearray(2**60)], ids=["torch", "python"])
def test_what_really_says_so_here_is_recognised(ask):
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory.help(replace(SETTINGS, device="cpu")):
        ask()
    assert caught.value.wrong.startswith("E4B bf16 ran out of memory")


@pytest.mark.gpu
def test_what_a_gpu_says_is_recognised_and_its_memory_comes_back():
    def fill():
        blocks = []
        while True:
            blocks.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))

    before = torch.cuda.memory_reserved()
    with pytest.raises(OutOfMemoryError, match=r"GPU memory, asking for 1\.00 GiB"), out_of_memory.help(SETTINGS):
        fill()
    assert torch.cuda.memory_reserved() <= before


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
    assert "asking for 40.0 GiB more" in explain_oom(RuntimeError(HOST), on_cpu).wrong
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
