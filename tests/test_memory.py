"""The planner's sums against published file sizes, parameter counts and cache sizes."""

import pytest

from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES, hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE, catalog
from gemma_qat_kit.errors import BadSettingError, NotPublishedError, UnknownNameError
from gemma_qat_kit.memory import (
    BUILT_IN_ENGINE_BYTES,
    ENGINE_BYTES,
    MemoryPlan,
    MemoryUse,
    describe_parts,
    kv_cache_bytes,
    plan_memory,
)

MIB = 2**20
ROWS = [row for row in catalog() if row.is_available and row.role == "chat"]
WEIGHTS = ("text layers", "token embeddings and head", "per-layer embeddings", "vision", "audio")
# Parameters of the published checkpoints, as the hub counts them, split by part: token embeddings, per-layer table,
# text layers, vision, audio. The last few hundred (clip bounds and scalars) are left out.
PARAMETERS = {
    "E2B": (402_653_184, 2_348_810_240, 1_877_105_920, 168_544_256, 307_183_904),
    "E4B": (671_088_640, 2_818_572_288, 3_973_352_448, 169_330_688, 308_756_768),
    "31B": (1_409_286_144, 0, 29_288_059_136, 575_741_232, 0),
}
# Bytes of the tensors of Google's own GGUF files, each padded to 32.
GGUF_BYTES = {"E2B": 3_333_700_704, "E4B": 5_139_118_400, "12B": 6_960_055_808, "26B-A4B": 14_423_539_648,
              "31B": 17_635_168_128}  # fmt: skip


def weights(plan):
    return sum(plan.parts.get(name, 0) for name in WEIGHTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_parts_sum_to_the_total(row):
    plan = plan_memory(row.size, row.format)
    assert all(isinstance(nbytes, int) and nbytes > 0 for nbytes in plan.parts.values())
    assert (
        plan.total_bytes
        == sum(plan.parts.values())
        == weights(plan) + sum(nbytes for name, nbytes in plan.parts.items() if name not in WEIGHTS)
    )
    assert plan.resident_bytes == plan.total_bytes - sum(plan.parts[name] for name in plan.on_disk)
    assert plan.parts["engine"] == (BUILT_IN_ENGINE_BYTES if row.format == "float32" else ENGINE_BYTES[row.engine])
    assert plan.download_bytes == row.weights_bytes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_towers_only_add(row):
    text, everything = (plan_memory(row.size, row.format, text_only=flag).parts for flag in (True, False))
    assert {name: nbytes for name, nbytes in everything.items() if name not in ("vision", "audio")} == text


@pytest.mark.parametrize("size", PARAMETERS)
def test_bf16_takes_two_bytes_for_each_published_parameter(size):
    plan = plan_memory(size, "bf16", text_only=False)
    for name, count in zip(("token embeddings and head", "per-layer embeddings", "text layers", "vision", "audio"),
                           PARAMETERS[size], strict=True):  # fmt: skip
        assert plan.parts.get(name, 0) == pytest.approx(2 * count, abs=2 * 2400), name


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_gguf_takes_the_bytes_of_its_tensors(size):
    padding = 28 * hf_config(size)["text_config"]["num_hidden_layers"]  # of each layer's output scale, one float32
    assert weights(plan_memory(size, "q4_0")) == GGUF_BYTES[size] - padding


@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_mobile_takes_its_file_and_an_unpacked_head(size):
    plan = plan_memory(size, "mobile", text_only=False)
    assert 0.985 * plan.download_bytes < weights(plan) < plan.download_bytes  # without the unused keys and values
    text = hf_config(size)["text_config"]
    assert plan.parts["head, unpacked"] == 4 * text["vocab_size"] * text["hidden_size"]


@pytest.mark.parametrize(("size", "linears"), [("E2B", 1_557_135_360 + 278_412_288), ("31B", 29_286_763_520)])
def test_nf4_and_int8_shrink_the_linears_of_the_text_layers(size, linears):
    bf16, int8, nf4 = (plan_memory(size, format).parts["text layers"] for format in ("bf16", "int8", "nf4"))
    assert bf16 - int8 == pytest.approx(linears, rel=0.025)  # the count has no per-layer projections but query norms
    assert (bf16 - nf4) / (bf16 - int8) == pytest.approx((16 - 4.5) / (16 - 8))


@pytest.mark.parametrize(
    ("size", "at_8k", "at_128k"),
    [("E2B", 54, 774), ("E4B", 148, 2068), ("12B", 448, 2368), ("26B-A4B", 360, 2760), ("31B", 1440, 11040)],
)
def test_the_cache_is_what_the_shapes_say(size, at_8k, at_128k):
    assert [kv_cache_bytes(hf_config(size), length) for length in (8192, 131_072)] == [at_8k * MIB, at_128k * MIB]
    assert plan_memory(size, "q4_0", context_length=8192).parts["key/value cache"] == at_8k * MIB


@pytest.mark.parametrize(("size", "per_token"), [("E2B", 18_432), ("12B", 344_064), ("26B-A4B", 225_280)])
def test_below_the_window_every_layer_keeps_every_token(size, per_token):
    assert kv_cache_bytes(hf_config(size), 100) == 100 * per_token


def test_the_built_in_model_keeps_keys_and_values_of_all_its_layers():
    # config.json of SmolLM2-135M: 30 layers, 3 key/value heads of 64, kept as float16
    plan = plan_memory(BUILT_IN_SIZE, context_length=1000)
    assert plan.parts["key/value cache"] == 1000 * 30 * 3 * 64 * 2 * 2


def test_the_built_in_model_as_a_network_takes_four_bytes_for_each_number():
    # HuggingFaceTB/SmolLM2-135M-Instruct on the hub: 134,515,008 parameters
    plan = plan_memory(BUILT_IN_SIZE, "float32", context_length=1000)
    assert plan.parts["text layers"] == 4 * 134_515_008
    assert plan.parts["key/value cache"] == 1000 * 30 * 3 * 64 * 2 * 4


def test_llama_cpp_may_leave_the_per_layer_table_on_disk():
    plan = plan_memory("E2B", "q4_0")
    assert plan.on_disk == ("per-layer embeddings",)
    assert plan_memory("12B", "q4_0").on_disk == plan_memory("E2B", "mobile").on_disk == ()
    assert plan.fits(plan.resident_bytes)
    assert not plan.fits(plan.resident_bytes - 1)


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


def test_unknown_names_and_missing_combinations_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        plan_memory("E2", "q4_0")
    with pytest.raises(NotPublishedError, match="12B"):
        plan_memory("12B", "mobile")


def test_parts_are_listed_largest_first_with_their_unit():
    lines = describe_parts({"small": 2**20, "large": 3 * 2**30}, "measured").splitlines()
    assert [line.split("  ")[0] for line in lines] == ["large", "small", "total, measured"]
    assert lines[2].endswith("3.001 GiB")


def test_a_plan_and_a_measurement_never_look_the_same():
    parts = {"a": 2**30}
    assert "total, predicted" in str(MemoryPlan(parts, None))
    assert "total, measured" in str(MemoryUse(parts))
    assert MemoryUse(parts).total_bytes == MemoryPlan(parts, None).total_bytes == 2**30
