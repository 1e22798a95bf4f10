"""The planner's sums against the published tensor inventories, file sizes and parameter counts."""

import subprocess
import sys

import pytest

from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES, drafter_config, hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE, catalog
from gemma_qat_kit.errors import BadSettingError, NotPublishedError, UnknownNameError
from gemma_qat_kit.layouts import (
    bf16_tensors,
    drafter_tensors,
    gguf_tensors,
    mobile_tensors,
    reblocked_tensors,
    safetensors_bytes,
    w4a16_tensors,
)
from gemma_qat_kit.memory.parts import DRAFTER, EMBEDDINGS, REPACKED, TABLE, TEXT_LAYERS, WEIGHTS
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.published import PUBLISHED

ROWS = [row for row in catalog() if row.is_available and row.role == "chat"]
# Bytes of all tensors of each published file, added up from its inventory.
INVENTORIES = {
    "bf16": {"E2B": 10_246_357_958, "E4B": 15_992_314_836, "12B": 23_919_460_448, "26B-A4B": 51_611_872_412,
             "31B": 62_546_177_752},
    "q4_0": {"E2B": 3_333_699_724, "E4B": 5_139_117_224, "12B": 6_960_054_464, "26B-A4B": 14_423_538_808,
             "31B": 17_635_166_448},
    "w4a16": {"E2B": 8_315_979_014, "E4B": 11_513_497_412, "12B": 10_264_057_056, "31B": 23_265_085_560},
    "mobile": {"E2B": 2_457_736_446, "E4B": 3_524_675_900},
    "drafter": {"E2B": 157_559_816, "E4B": 159_132_680, "12B": 845_713_928, "26B-A4B": 839_422_472,
                "31B": 939_037_192},
}  # fmt: skip
# Parameters of the published checkpoints, as the hub counts them, split by part: token embeddings, per-layer table,
# text layers, vision, audio. The last few hundred (clip bounds and scalars) are left out.
PARAMETERS = {
    "E2B": (402_653_184, 2_348_810_240, 1_877_105_920, 168_544_256, 307_183_904),
    "E4B": (671_088_640, 2_818_572_288, 3_973_352_448, 169_330_688, 308_756_768),
    "31B": (1_409_286_144, 0, 29_288_059_136, 575_741_232, 0),
}


def tensors(size, format):
    if format == "drafter":
        return list(drafter_tensors(drafter_config(size)))
    config = hf_config(size, format if format in ("mobile", "w4a16") else "bf16")
    lists = {"q4_0": gguf_tensors, "mobile": mobile_tensors, "w4a16": w4a16_tensors}
    return list(lists.get(format, bf16_tensors)(config))


def weights(plan):
    """Bytes of the weights, llama.cpp's second copy and what stays on disk counted once."""
    return sum(part.nbytes for part in plan.placed if part.name in WEIGHTS and part.name != REPACKED)


@pytest.mark.parametrize(("format", "size"), [(f, s) for f, sizes in INVENTORIES.items() for s in sizes])
def test_the_tensors_of_each_inventory_add_up(format, size):
    assert sum(tensor.nbytes for tensor in tensors(size, format)) == INVENTORIES[format][size]


@pytest.mark.parametrize("size", INVENTORIES["bf16"])
def test_a_bf16_plan_takes_the_inventory_without_what_no_layer_uses(size):
    unused = 2 * {"E2B": 18_880_512, "E4B": 55_055_616}.get(size, 0)  # keys and values of layers that share others'
    assert weights(plan_memory(size, "bf16", text_only=False)) == INVENTORIES["bf16"][size] - unused


@pytest.mark.parametrize("size", INVENTORIES["q4_0"])
def test_a_gguf_plan_takes_its_whole_inventory_and_a_copy_of_the_q4_0_matrices(size):
    plan = plan_memory(size, "q4_0")
    assert weights(plan) == INVENTORIES["q4_0"][size]
    assert plan.parts[REPACKED] == sum(t.nbytes for t in gguf_tensors(hf_config(size)) if t.dtype == "Q4_0")


@pytest.mark.parametrize("size", INVENTORIES["mobile"])
def test_a_mobile_plan_takes_its_inventory_without_unused_keys_values_and_cache_scales(size):
    config = hf_config(size, "mobile")
    text = config["text_config"]
    used = {t.name for t in bf16_tensors(config, has_shared_kv=False)}
    unused = 0
    for tensor in mobile_tensors(config):
        module = tensor.name.rpartition(".")[0]
        is_projection = module.endswith(("k_proj", "v_proj")) and f"{module}.weight" not in used
        unused += tensor.nbytes if is_projection or tensor.name.endswith("_cache_scale") else 0
    assert unused > 8 * text["num_hidden_layers"]
    plan = plan_memory(size, "mobile", engine="transformers", text_only=False)
    assert weights(plan) == INVENTORIES["mobile"][size] - unused


@pytest.mark.parametrize("size", INVENTORIES["drafter"])
def test_a_drafter_takes_its_inventory(size):
    assert plan_memory(size, "bf16", drafter=True).parts[DRAFTER] == INVENTORIES["drafter"][size]


@pytest.mark.parametrize("row", [r for r in catalog() if r.is_available], ids=lambda r: f"{r.key} {r.role}")
def test_file_sizes_are_reproduced_to_the_byte(row):
    if row.size == BUILT_IN_SIZE or row.made_from:
        return  # one file of another kind, and files that another row has
    names = tensors(row.size, "drafter" if row.role == "drafter" else row.format)
    if row.format == "q4_0":  # beside its tensors, each padded to 32 bytes: names, settings and tokenizer
        padded = sum(-(-t.nbytes // 32) * 32 for t in names)
        assert row.weights_bytes - padded == pytest.approx(15_815_000, abs=20_000)
        return
    if row.format == "q4_0-unquantized" and row.role == "chat":
        names = list(bf16_tensors(hf_config(row.size), has_shared_kv=False))
    is_bare = row.format == "mobile" or (row.size in MOBILE_SIZES and row.format == "q4_0-unquantized")
    computed = safetensors_bytes(names, has_metadata=not is_bare or row.role == "drafter")
    is_exact = row.bytes_source == PUBLISHED and sum(file.kind == "weights" for file in row.files) == 1
    assert abs(computed - row.weights_bytes) <= (0 if is_exact else 300)  # each shard has a header of its own


@pytest.mark.parametrize("size", PARAMETERS)
def test_bf16_takes_two_bytes_for_each_published_parameter(size):
    plan = plan_memory(size, "bf16", text_only=False, per_layer_table="memory")
    for name, count in zip((EMBEDDINGS, TABLE, TEXT_LAYERS, "vision", "audio"), PARAMETERS[size], strict=True):
        assert plan.parts.get(name, 0) == pytest.approx(2 * count, abs=2 * 2400), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_parts_and_places_sum_to_the_total(row):
    plan = plan_memory(row.size, row.format)
    assert all(isinstance(part.nbytes, int) and part.nbytes > 0 for part in plan.placed)
    assert plan.total_bytes == sum(plan.parts.values()) == sum(map(plan.in_place, ("gpu", "ram", "mapped")))
    assert sum(plan.needed.values()) == plan.needed_bytes <= plan.total_bytes
    assert plan.download_bytes == row.weights_bytes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_towers_only_add(row):
    text, everything = (plan_memory(row.size, row.format, text_only=flag).parts for flag in (True, False))
    assert {name: nbytes for name, nbytes in everything.items() if name not in ("vision", "audio")} == text


@pytest.mark.parametrize(("size", "linears"), [("E2B", 1_557_135_360 + 278_412_288), ("31B", 29_286_763_520)])
def test_nf4_and_int8_shrink_the_linears_of_the_text_layers(size, linears):
    bf16, int8, nf4 = (plan_memory(size, format).parts[TEXT_LAYERS] for format in ("bf16", "int8", "nf4"))
    assert bf16 - int8 == pytest.approx(linears, rel=0.025)  # the count has no per-layer projections but query norms
    assert (bf16 - nf4) / (bf16 - int8) == pytest.approx((16 - 4.5) / (16 - 8))


def test_the_built_in_model_as_a_network_takes_four_bytes_for_each_number():
    # HuggingFaceTB/SmolLM2-135M-Instruct on the hub: 134,515,008 parameters
    parts = plan_memory(BUILT_IN_SIZE, "float32").parts
    assert parts[TEXT_LAYERS] + parts[EMBEDDINGS] == 4 * 134_515_008


@pytest.mark.parametrize("size", MOBILE_SIZES)
@pytest.mark.parametrize("format", ["bf16", "mobile", "nf4"])
def test_the_per_layer_table_is_where_it_is_put(size, format):
    plans = {
        place: plan_memory(size, format, engine="transformers", per_layer_table=place)
        for place in ("disk", "cpu", "memory")
    }
    lies = {place: [part.place for part in plan.placed if part.name == TABLE] for place, plan in plans.items()}
    assert lies == {"disk": ["disk"], "cpu": ["ram"], "memory": ["gpu"]}
    table = next(part.nbytes for part in plans["disk"].placed if part.name == TABLE)
    assert plans["memory"].total_bytes - plans["disk"].total_bytes == table
    on_cpu = plan_memory(size, format, engine="transformers", device="cpu", per_layer_table="memory")
    assert [part.place for part in on_cpu.placed if part.name == TABLE] == ["ram"]


def test_e2b_mobile_runs_in_a_gibibyte_of_its_own_with_the_table_left_in_its_file():
    """The published "1 GB": measured 63 to 178 MiB of private memory above the interpreter with its imports."""
    plan = plan_memory("E2B", "mobile", engine="transformers", device="cpu", context_length=2048)
    imports = next(p.nbytes for p in plan.placed if (p.name, p.place) == ("engine", "ram"))
    assert plan.in_place("ram") - imports < 2**30 / 4
    assert plan.in_place("ram") + plan.in_place("mapped") < 1.4 * 2**30
    assert plan.in_place("disk") > 1.1 * 2**30


@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_a_mobile_plan_for_llama_cpp_counts_the_file_that_is_written_and_its_types(size):
    plan, config = plan_memory(size, "mobile"), hf_config(size, "mobile")
    assert plan.written_bytes == sum(t.nbytes for t in reblocked_tensors(config))
    assert plan.written_bytes == pytest.approx({"E2B": 2.28e9, "E4B": 3.38e9}[size], rel=0.01)
    on_gpu = plan_memory(size, "mobile", device="cuda").written_bytes
    assert on_gpu == sum(t.nbytes for t in reblocked_tensors(config, "cuda")) > plan.written_bytes
    assert plan_memory(size, "mobile", engine="transformers").written_bytes == 0
    assert plan_memory(size, "q4_0").written_bytes == 0


def test_llama_cpp_runs_without_its_pages_of_the_table_and_of_what_it_repacked():
    plan = plan_memory("E2B", "q4_0")
    spare = {part.name for part in plan.placed if part.is_spare}
    assert spare == {TEXT_LAYERS, TABLE}
    assert plan.fits(plan.needed_bytes)
    assert not plan.fits(plan.needed_bytes - 1)


@pytest.mark.parametrize("length", [0, -1, 131_073, 4096.0, "4096", True, None, float("nan")])
def test_a_context_that_cannot_be_is_refused(length):
    with pytest.raises(BadSettingError) as caught:
        plan_memory("E2B", "q4_0", context_length=length)
    assert caught.value.wrong == f"context_length={length!r} cannot be used."
    assert caught.value.allowed == "This model takes 1 to 131,072 tokens."
    assert caught.value.next_step == "Try context_length=4096."


def test_each_model_has_its_own_longest_context():
    assert plan_memory("31B", "q4_0", context_length=262_144).total_bytes
    with pytest.raises(BadSettingError, match="1 to 8,192 tokens"):
        plan_memory(BUILT_IN_SIZE, context_length=8193)


@pytest.mark.parametrize("name", ["batch_size", "lora_rank", "sequence_length", "logits_chunk_length",
                                  "gradient_accumulation"])  # fmt: skip
@pytest.mark.parametrize("value", [0, -3, 10**9, 2.5, "8", True])
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(BadSettingError, match=f"{name}={value!r} cannot be used"):
        plan_memory("E2B", "bf16", task="finetune", **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "train"}, "Unknown task 'train'"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"kv_format": "q2_0"}, "Unknown kv_format"),
        ({"per_layer_table": "gpu"}, "Unknown per_layer_table"),
        ({"lora_targets": ("q",)}, "Did you mean 'q_proj'"),
        ({"device": "tpu"}, "Unknown device"),
    ],
)
def test_unknown_names_are_refused(settings, message):
    with pytest.raises(UnknownNameError, match=message):
        plan_memory("E2B", "bf16", **settings)


def test_what_excludes_each_other_is_refused():
    with pytest.raises(BadSettingError, match="cannot be trained: it runs in llama_cpp"):
        plan_memory("E2B", "q4_0", task="finetune", engine="llama_cpp")
    with pytest.raises(BadSettingError, match="nf4 weights cannot be trained: they are packed"):
        plan_memory("E2B", "nf4", task="qat")
    with pytest.raises(BadSettingError, match="transformers has no key/value cache in q8_0"):
        plan_memory("E2B", "bf16", kv_format="q8_0")
    with pytest.raises(NotPublishedError, match="12B"):
        plan_memory("12B", "mobile")


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_cheaper_plans_take_less_and_name_what_they_change(size):
    plan = plan_memory(size, "bf16", device="cuda", per_layer_table="memory", context_length=8192, text_only=False)
    steps = plan.cheaper()
    assert len(steps) > 3
    assert all(max(other.needed.values()) < plan.needed["gpu"] for _, other in steps)
    words = [word for word, _ in steps]
    assert words.index("text only") < words.index("context_length=4096") < words.index(f"{size} q4_0")
    assert (words[0] == "leave the per-layer table on disk") == (size in MOBILE_SIZES)


def test_where_one_change_is_not_enough_changes_are_added_up():
    plan = plan_memory("E2B", "q4_0-unquantized", task="finetune", batch_size=8, sequence_length=4096,
                       logits_chunk_length=None, gradient_checkpointing=False)  # fmt: skip
    budget = plan_memory("E2B", "nf4", task="finetune", sequence_length=2048).needed_bytes
    assert not any(smaller.fits(budget) for _, smaller in plan.cheaper())
    ((words, fitting),) = plan.cheaper(budget)
    assert len(words.split(", ")) > 1
    assert fitting.fits(budget)
    assert plan.cheaper(2**20) == []


def test_a_plan_loads_no_torch_and_asks_no_network():
    code = "import sys, gemma_qat_kit as gqk; gqk.plan_memory('E4B', 'nf4', task='finetune').cheaper(); "
    code += "print(*({'torch', 'socket', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_plan_is_readable():
    lines = str(plan_memory("E2B", "q4_0")).splitlines()
    assert lines[-1].startswith("total in memory, predicted")
    assert lines[0].split("  ")[0] == TABLE
    assert all("GiB" in line for line in lines)
