"""What the planner says of activations and training, against what the engines report or take."""

import pytest

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.memory.network import read_network
from gemma_qat_kit.memory.parts import ACTIVATIONS, ADAPTERS, GRADIENTS, LOGITS, OPTIMIZER
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.training import num_trained
from gemma_qat_kit.memory.work import llama_cpp_compute_bytes

MIB = 2**20
# llama.cpp's own "compute buffer size" in MiB at 512, 2048, 8192 and 32768 tokens of context, 512 at once.
COMPUTE_BUFFERS = {
    "E2B": (123.03, 125.03, 131.03, 155.03),
    "E4B": (108.03, 110.03, 116.03, 140.03),
    "12B": (128.53, 131.03, 137.03, 161.03),
    "26B-A4B": (105.53, 108.03, 114.03, 138.03),
    "31B": (179.53, 182.03, 188.03, 212.03),
}


@pytest.mark.parametrize("size", COMPUTE_BUFFERS)
def test_llama_cpp_reports_the_compute_buffer_that_is_planned(size):
    network = read_network(hf_config(size)["text_config"])
    planned = [llama_cpp_compute_bytes(network, length) / MIB for length in (512, 2048, 8192, 32_768)]
    assert planned == pytest.approx(COMPUTE_BUFFERS[size], abs=0.01)


def test_adapters_are_counted_as_peft_counts_them():
    # Unsloth's notebook on E2B: rank 8 on every linear of the text layers, 12.67 million trainable parameters; on E4B
    # 18.35. They adapt the keys and values of all layers; here those of shared layers are no modules.
    plans = {size: plan_memory(size, "bf16", task="finetune", lora_rank=8) for size in ("E2B", "E4B")}
    counts = {size: num_trained(plan.settings) for size, plan in plans.items()}
    shared = {"E2B": 8 * 20 * 2 * (1536 + 256) + 8 * 4 * 2 * 256, "E4B": 8 * 18 * 2 * (2560 + 512) + 8 * 3 * 2 * 512}
    assert counts["E2B"] + shared["E2B"] == pytest.approx(12.67e6, rel=0.01)
    assert counts["E4B"] + shared["E4B"] == pytest.approx(18.35e6, rel=0.01)


def test_all_matrices_of_the_built_in_layers_are_trained_in_qat():
    plan = plan_memory(BUILT_IN_SIZE, "float32", task="qat", gradient_accumulation=2)
    num_values = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert num_trained(plan.settings) == num_values
    assert plan.parts[GRADIENTS] == 4 * num_values
    assert plan.parts[OPTIMIZER] == 8 * num_values


def test_training_settings_change_the_parts_that_they_name():
    def parts(**settings):
        return plan_memory("E4B", "nf4", task="finetune", gradient_accumulation=4, **settings).parts

    base = parts()
    assert parts(lora_rank=16)[ADAPTERS] == 2 * base[ADAPTERS]
    assert parts(optimizer="adamw_8bit")[OPTIMIZER] == base[OPTIMIZER] / 4
    assert OPTIMIZER not in parts(optimizer="sgd")
    assert parts(logits_chunk_length=128)[LOGITS] == base[LOGITS] / 2
    assert parts(logits_chunk_length=None, sequence_length=2048)[LOGITS] == 8 * base[LOGITS]
    assert parts(gradient_checkpointing=False)[ACTIVATIONS] > 3 * base[ACTIVATIONS]
    assert parts(lora_targets=("q_proj", "v_proj"))[ADAPTERS] < base[ADAPTERS] / 2


def test_without_accumulation_the_larger_of_two_moments_counts():
    """Gradients and activations never meet at their largest: the one grows while the other is freed."""
    once, twice = (plan_memory("E2B", "bf16", task="qat", gradient_accumulation=n, sequence_length=2048).parts
                   for n in (1, 2))  # fmt: skip
    assert sum(once.values()) < sum(twice.values())
    assert (GRADIENTS in once) != (LOGITS in once)
