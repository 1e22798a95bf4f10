"""The per-layer embeddings of E2B and E4B: where they lie changes what they take and no logit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import copy_of

import gemma_qat_kit as gqk
from gemma_qat_kit.engines import transformers as engine_module
from gemma_qat_kit.engines.resident import file_pages
from gemma_qat_kit.engines.transformers_table import NAME, HostTable
from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.memory.settings import TABLE_PLACES

IDS = [[2, 105, 93, 0, 80, 4, 511], [7, 7, 300, 106, 9, 1, 2]]
STEM = f"model.language_model.{NAME}."


def table_of(model):
    return next(module for name, module in model.hf[0].named_modules() if name.endswith(NAME))


def logits(model, device="cpu"):
    with torch.inference_mode():
        return model.hf[0](torch.tensor(IDS, device=device)).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "format"),
    [("E2B", "bf16"), ("E4B", "bf16"), ("E2B", "mobile"), ("E4B", "mobile"), ("E2B", "w4a16"), ("E2B", "nf4"),
     ("E2B", "int8")],
)  # fmt: skip
def test_the_logits_are_those_of_the_librarys_own_table(tiny, monkeypatch, size, format, dtype):
    monkeypatch.setattr(engine_module, "best_dtype", lambda device: dtype)  # float16 is a T4's
    with gqk.load(tiny(size, format), format, engine="transformers") as model:
        assert type(table_of(model)) is HostTable
        ours = logits(model)
    with gqk.load(tiny(size, format), format, engine="transformers", per_layer_table="memory") as model:
        assert type(table_of(model)) is not HostTable
        assert torch.equal(logits(model), ours)
    assert ours.dtype == dtype


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("format", ["bf16", "mobile"])
def test_only_on_disk_is_it_the_files_own_pages(tiny, monkeypatch, format, place):
    monkeypatch.setattr(engine_module, "best_dtype", lambda device: torch.float16)  # not that of the file
    stored = {
        name: tensor for name, tensor in load_file(tiny("E2B", format) / "model.safetensors").items() if STEM in name
    }
    with gqk.load(tiny("E2B", format), engine="transformers", per_layer_table=place) as model:
        held = {name: tensor for name, tensor in model.hf[0].state_dict().items() if STEM in name}
        pages = file_pages()
        is_mapped = {pages.at(tensor.data_ptr()) is not None for tensor in held.values()}
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())
    assert is_mapped == {place == "disk"}


@pytest.mark.parametrize("size", ["12B", "26B-A4B", "31B"])
def test_a_size_without_one_ignores_its_place(tiny, size):
    with gqk.load(tiny(size, "bf16"), per_layer_table="cpu") as model:
        assert not any(isinstance(module, HostTable) for module in model.hf[0].modules())
        assert model.chat("sky", max_new_tokens=1).new_tokens == 1


def without(state, name):
    return {key: value for key, value in state.items() if key != STEM + name}


def cut(state, name, axis):
    tensor = state[STEM + name]
    return state | {STEM + name: tensor.narrow(axis, 0, tensor.shape[axis] - 1).clone()}


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("bf16", lambda state: without(state, "weight")),
        ("bf16", lambda state: cut(state, "weight", 0)),
        ("mobile", lambda state: without(state, "embedding_scale")),
        ("mobile", lambda state: without(state, "embedding_quantized")),
        ("mobile", lambda state: cut(state, "embedding_scale", 1)),
        ("mobile", lambda state: cut(state, "embedding_scale", 0)),
        ("mobile", lambda state: cut(state, "embedding_quantized", 1)),
    ],
)  # fmt: skip
def test_a_table_that_is_not_whole_is_refused(tiny, tmp_path, format, change):
    folder = copy_of(tiny("E2B", format), tmp_path)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match="per-layer embeddings are missing, or have other shapes"):
        gqk.load(folder, engine="transformers")


def test_modules_built_after_a_load_are_left_alone(tiny):
    gqk.load(tiny("E2B", "bf16")).close()
    parent = torch.nn.Module()
    parent.embed_tokens_per_layer = torch.nn.Embedding(2, 2)
    assert type(parent.embed_tokens_per_layer) is torch.nn.Embedding


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "mobile", "nf4"])
def test_on_a_gpu_the_table_stays_outside_and_the_logits_stay(tiny, format):
    found = {}
    for place in TABLE_PLACES:
        where = {"per_layer_table": place, "device": "cuda"}
        with gqk.load(tiny("E2B", format), format, engine="transformers", **where) as model:
            assert {p.device.type for p in table_of(model).parameters()} == {"cuda" if place == "memory" else "cpu"}
            found[place] = logits(model, "cuda").cpu()
            assert model.chat("sky", max_new_tokens=2, temperature=0).new_tokens > 0
            assert model.memory().in_place("gpu") > 0
    assert torch.equal(found["disk"], found["memory"])
    assert torch.equal(found["cpu"], found["memory"])
