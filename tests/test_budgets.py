"""Budgets: what known machines have, what this one has, and what a plan lacks on each."""

import importlib
import types
from dataclasses import replace

import pytest
from machines import T4 as COLAB_GPU
from machines import made_up

from gemma_qat_kit import machine
from gemma_qat_kit.errors import NotPublishedError
from gemma_qat_kit.memory import budgets
from gemma_qat_kit.memory.budgets import BINDER, KNOWN, T4, TWO_T4, Budget, room, this_machine
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import GIB

ENVIRONMENT = importlib.import_module("gemma_qat_kit.environment")
ENDLESS = Budget("endless", 2**50, 1, 2**50, 2**50)


def in_memory(plan, *places):
    return sum(part.nbytes for part in plan.placed if part.place in places and not part.is_spare)


def test_what_people_have_is_as_torch_and_psutil_see_it():
    assert T4.gpu_bytes / GIB == pytest.approx(14.56, abs=0.005)
    assert TWO_T4.gpu_bytes == T4.gpu_bytes
    assert (BINDER.num_gpus, BINDER.ram_bytes) == (0, 2_000_000_000)
    cards = {budget.name: budget for budget in KNOWN if budget.name.endswith("card")}
    assert [round(budget.gpu_bytes / GIB, 1) for budget in cards.values()] == [7.6, 11.6, 15.6, 23.6]
    assert {budget.ram_bytes for budget in cards.values()} == {None}


def test_transformers_takes_the_gpu_where_there_is_one_and_a_gguf_the_cpu():
    bf16, gguf = plan_memory("E2B", "bf16"), plan_memory("E2B", "q4_0")
    assert [room(bf16, budget).device for budget in (T4, BINDER)] == ["cuda", "cpu"]
    assert [room(gguf, budget).device for budget in (T4, BINDER)] == ["cpu", "cpu"]
    assert room(gguf, KNOWN[-1]).device == "cuda", "of a card the RAM is not known"
    assert room(gguf, T4, device="cuda").device == "cuda"


def test_a_plan_is_held_against_each_memory_that_it_uses():
    plan = plan_memory("E4B", "bf16", per_layer_table="cpu")
    found = room(plan, ENDLESS)
    assert [(need.memory, need.nbytes) for need in found.needs] == [
        ("GPU memory", in_memory(plan, "gpu")),
        ("RAM", in_memory(plan, "ram", "mapped")),
        ("disk", plan.download_bytes),
    ]
    assert found.fits is True
    assert found.words.startswith("fits, ")


def test_what_is_missing_is_said_in_the_memory_that_is_short():
    plan = plan_memory("E2B", "bf16")
    gpu, ram = in_memory(plan, "gpu"), in_memory(plan, "ram", "mapped")
    short = replace(ENDLESS, gpu_bytes=gpu - 2**30)
    assert room(plan, short).fits is False
    assert room(plan, short).words == "needs 1.00 GiB more GPU memory"
    both = replace(short, ram_bytes=ram - 2**29)
    assert room(plan, both).words == "needs 1.00 GiB more GPU memory and 512 MiB more RAM"
    full = replace(ENDLESS, disk_bytes=plan.download_bytes - 2**20)
    assert room(plan, full).words == "needs 1.00 MiB more disk"
    assert room(plan, replace(full, downloaded=frozenset({"google/gemma-4-E2B-it"}))).fits is True


def test_exactly_enough_fits_and_one_byte_less_does_not():
    plan = plan_memory("E2B", "q4_0")
    need = in_memory(plan, "ram", "mapped")
    assert room(plan, Budget("x", 0, 0, need, None)).fits is True
    assert room(plan, Budget("x", 0, 0, need - 1, None)).fits is False


def test_a_gpu_that_is_asked_for_and_not_there_is_missing():
    assert room(plan_memory("E2B", "q4_0"), BINDER, device="cuda").words == "needs a GPU"


def test_a_second_card_does_not_help_and_that_is_said():
    plan = plan_memory("12B", "bf16")
    assert in_memory(plan, "gpu") < 2 * TWO_T4.gpu_bytes
    assert room(plan, TWO_T4).fits is False
    assert "not spread over two" in room(plan, TWO_T4).note
    assert room(plan, T4).note == ""


def test_the_built_in_model_needs_no_download():
    assert [need.memory for need in room(plan_memory("smollm2-135m"), ENDLESS).needs] == ["RAM"]


def test_unknown_memory_is_left_open_and_said():
    found = room(plan_memory("E2B", "q4_0"), Budget("?", 0, 0, None, None))
    assert found.fits is None
    assert found.words.endswith("how much there is is not known")


def test_a_plan_is_made_once_for_machines_of_one_kind(monkeypatch):
    made = []
    monkeypatch.setattr(budgets, "_plan", budgets.functools.lru_cache(made.append))
    settings = plan_memory("E2B", "bf16").settings
    cards = [budget for budget in KNOWN if budget.num_gpus]
    for budget in cards:
        budgets.cached_plan(settings, budgets._device(settings, budget))
    assert len(made) == 1


def test_what_nobody_published_has_no_room_anywhere():
    settings = replace(plan_memory("E2B", "q4_0").settings, size="26B-A4B", format="w4a16", engine="transformers")
    with pytest.raises(NotPublishedError):
        room(settings, T4)


def test_this_machine_is_what_is_free_of_it(monkeypatch):
    monkeypatch.setattr(ENVIRONMENT, "environment", made_up)
    here = this_machine()
    assert here.gpu_bytes == COLAB_GPU.free_bytes
    assert here.num_gpus == 1
    assert here.ram_bytes == made_up().ram_available_bytes
    old = types.SimpleNamespace(**vars(made_up()), gpu=None)
    monkeypatch.setattr(ENVIRONMENT, "environment", lambda: old)
    assert (this_machine().gpu_bytes, this_machine().num_gpus) == (0, 0)


def test_memory_that_cannot_be_read_is_unknown_and_never_guessed(monkeypatch):
    monkeypatch.setattr(machine, "read_memory", lambda: (None, None))
    here = this_machine()
    assert here.ram_bytes is None
    assert room(plan_memory("E2B", "q4_0"), replace(here, gpu_bytes=0, num_gpus=0)).fits is None


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    group = tmp_path / "cgroup"
    group.mkdir()
    (tmp_path / "self").write_text("0::/\n")
    for name, text in {"memory.max": str(2**30), "memory.current": str(2**28), "memory.stat": ""}.items():
        (group / name).write_text(text)
    read = machine.read_memory
    monkeypatch.setattr(machine, "read_memory", lambda: read(group, tmp_path / "self"))
    assert this_machine().ram_bytes <= 2**30 - 2**28
