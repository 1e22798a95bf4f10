"""What the notebook on fine-tuning says in words is what the plans and the settings say."""

import ast
from pathlib import Path

import nbformat

from gemma_qat_kit.catalog import find_checkpoint
from gemma_qat_kit.finetune.orders import orders
from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import GIB, readable_bytes

NOTEBOOK = nbformat.read(Path(__file__).parent.parent / "notebooks" / "04_finetune.ipynb", as_version=4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells}
SETTINGS = {line.split(" = ")[0]: ast.literal_eval(line.split(" = ")[1].split("#")[0].strip())
            for line in CELLS["settings"].splitlines()}  # fmt: skip


def test_the_facts_are_those_of_the_plans():
    settings = {"task": "finetune", "batch_size": 4, "sequence_length": 64, "lora_rank": SETTINGS["RANK"]}
    small = plan_memory("smollm2-135m", "float32", device="cpu", gradient_checkpointing=False, **settings)
    large = plan_memory("E2B", "q4_0", device="cuda", **settings)
    assert f"planned: {small.needed['ram'] / GIB:.1f} GiB)" in CELLS["facts"]
    gpu, ram = large.needed["gpu"] / GIB, large.needed["ram"] / GIB
    assert f"{gpu:.1f} GiB on the GPU, {ram:.1f} GiB in RAM (planned)" in CELLS["facts"]
    assert readable_bytes(find_checkpoint("E2B", "q4_0").weights_bytes) in CELLS["facts"]


def test_the_settings_are_the_defaults():
    default = FinetuneSettings()
    assert (SETTINGS["RANK"], SETTINGS["LEARNING_RATE"]) == (default.rank, default.learning_rate)


def test_no_held_out_name_is_in_the_dataset():
    trained, unseen = ({ticket["content"].split(" | ")[0] for _, ticket in rows}
                       for rows in (orders(160), orders(160, held_out=True)))  # fmt: skip
    assert len(trained) == 20
    assert len(unseen) == 10
    assert not trained & unseen
    assert all(name in question["content"] for question, ticket in orders(9) for name in [ticket["content"].split()[0]])
