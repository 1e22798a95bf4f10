"""What the notebook on memory says in words is what the plans say."""

from pathlib import Path

import nbformat

from gemma_qat_kit.memory.budgets import KNOWN, T4, room
from gemma_qat_kit.memory.parts import ADAPTERS, EMBEDDINGS, KEY_VALUES, LOGITS, TABLE, TEXT_LAYERS
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import GIB, readable_bytes

NOTEBOOK = nbformat.read(Path(__file__).parent.parent / "notebooks" / "02_memory.ipynb", as_version=4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells}
TRAINING = {"task": "finetune", "batch_size": 2, "logits_chunk_length": None}


def _words(name):
    return " ".join(CELLS[name].split())


def test_the_first_panel_is_described_as_it_starts():
    plan = plan_memory("E2B", "q4_0")
    assert f"needs about {plan.needed_bytes / GIB:.1f} GiB and fits everywhere" in _words("fits-static")
    assert all(room(plan, budget).fits for budget in KNOWN)


def test_four_bits_fill_a_t4_for_the_reasons_given():
    full, lean = (plan_memory("E4B", "nf4", per_layer_table=place, **TRAINING) for place in ("memory", "disk"))
    words = _words("four-bits-why")
    assert {part.name for part in sorted(full.placed, key=lambda p: -p.nbytes)[:2]} == {TABLE, LOGITS}
    assert f"{(full.parts[TABLE] + full.parts[EMBEDDINGS]) / GIB:.1f} GiB" in words
    assert f"wants {full.needed['gpu'] / GIB:.1f}." in words
    assert f"{T4.gpu_bytes / GIB:.2f} GiB" in words
    assert not full.fits(T4)
    assert lean.fits(T4)
    chunked = plan_memory("E4B", "nf4", **TRAINING | {"logits_chunk_length": 256})
    assert f"take {chunked.parts[LOGITS] / GIB:.2f} GiB instead of {full.parts[LOGITS] / GIB:.0f}." in words
    assert round(full.parts[TEXT_LAYERS] / GIB) == 2
    assert full.parts[ADAPTERS] < 0.1 * GIB


def test_a_context_costs_what_is_said():
    words = _words("context-see")
    for size, per_token in (("31B", (880, 80)), ("E2B", (18, 6))):
        cache = [plan_memory(size, "bf16", context_length=n).parts[KEY_VALUES] for n in (100, 101, 8000, 8001)]
        assert (cache[1] - cache[0], cache[3] - cache[2]) == tuple(1024 * number for number in per_token)
        assert all(str(number) in words for number in per_token)
    for size in ("E2B", "31B"):
        long = plan_memory(size, "bf16", context_length=131_072).parts[KEY_VALUES]
        assert readable_bytes(long) in words


def test_the_longest_cache_outgrows_the_weights():
    assert "outgrow the weights" in _words("try")
    plan = plan_memory("31B", "q4_0", context_length=262_144)
    assert plan.parts[KEY_VALUES] > plan.download_bytes
