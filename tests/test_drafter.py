"""The MTP drafter of a model: the right one is found, told from a wrong one, and turned into a GGUF once."""

import os
import shutil

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_files import change_config

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES, drafter_config
from gemma_qat_kit.catalog import find_checkpoint
from gemma_qat_kit.drafter import matching_drafter, published_drafter
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, MissingLibraryError, NotPublishedError
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.layouts import drafter_gguf_tensors, drafter_tensors
from gemma_qat_kit.memory.parts import DRAFTER
from gemma_qat_kit.testing import tiny_drafter_config, write_tiny_drafter


@pytest.fixture
def pair(tiny, tmp_path):
    """Return a function that puts a model and a drafter beside each other, the drafter as a copy."""

    def put(size, format="q4_0", drafter=None):
        source = tiny(size, format)
        model = tmp_path / "model"
        if source.is_file():
            model.mkdir()
            shutil.copy(source, model)
        else:
            shutil.copytree(source, model)
        shutil.copytree(tiny(drafter or size, "drafter"), model / "drafter")
        return model / source.name if source.is_file() else model

    return put


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("bf16", "bf16"), ("nf4", "bf16"), ("int8", "bf16"), ("q4_0", "q4_0-unquantized"),
        ("q4_0-unquantized", "q4_0-unquantized"), ("w4a16", "q4_0-unquantized"), ("mobile", "q4_0-unquantized"),
    ],
)  # fmt: skip
def test_qat_weights_get_the_drafter_that_was_trained_for_them(format, kind):
    found = published_drafter(find_checkpoint("E2B", format))
    assert (found.size, found.format, found.role) == ("E2B", kind, "drafter")


def test_a_size_is_loaded_with_the_hubs_drafter(tiny, hub):
    repo = "google/gemma-4-E2B-it-qat-q4_0-"
    hub.commit(f"{repo}gguf", {"gemma-4-E2B_q4_0-it.gguf": tiny("E2B", "q4_0").read_bytes()})
    files = {file.name: file.read_bytes() for file in tiny("E2B", "drafter").iterdir() if file.suffix != ".gguf"}
    hub.commit(f"{repo}unquantized-assistant", files)
    for _ in range(2):  # the GGUF that the first load leaves in the drafter's folder disturbs no later download
        with gqk.load("E2B", "q4_0", drafter=True, context_length=256) as model:
            assert "drafter" in model.drafter_note
            assert model.chat("why", max_new_tokens=6, temperature=0).drafted_tokens > 0


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_a_drafters_gguf_holds_its_weights_and_what_llama_cpp_asks_for(pair, size):
    path = matching_drafter(pair(size), None, "llama_cpp", report=lambda progress: None)
    reader, config = gguf.GGUFReader(path), tiny_drafter_config(size)
    stored = load_file(path.parent / "model.safetensors")
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    assert len(found) == len([n for n in stored if "masked" not in n]) + 1  # rope_freqs
    for ours, theirs in {
        "token_embd.weight": "model.embed_tokens.weight",
        "nextn.pre_projection.weight": "pre_projection.weight",
        "nextn.post_projection.weight": "post_projection.weight",
        "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
        "blk.0.layer_output_scale.weight": "model.layers.0.layer_scalar",
        "output_norm.weight": "model.norm.weight",
    }.items():
        expected = stored[theirs].float().numpy()
        tolerance = 0 if expected.ndim == 1 else np.abs(expected).max() / 127  # Q8_0 rounds matrices to half a step
        np.testing.assert_allclose(found[ours], expected, rtol=0, atol=tolerance)
    keys = read_gguf_header(path).metadata
    assert keys["general.architecture"] == "gemma4-assistant"
    assert keys["gemma4-assistant.embedding_length_out"] == config["backbone_hidden_size"]
    assert keys["gemma4-assistant.nextn_predict_layers"] == keys["gemma4-assistant.attention.shared_kv_layers"] == 4
    assert keys["gemma4-assistant.attention.sliding_window_pattern"] == [True, True, True, False]
    assert "tokenizer.chat_template" not in keys
    target = read_gguf_header(next(path.parent.parent.glob("*.gguf"))).metadata
    assert keys["tokenizer.ggml.tokens"] == target["tokenizer.ggml.tokens"]


def test_a_drafter_is_converted_once_and_again_when_its_weights_are_newer(pair):
    model = pair("12B")
    made = [matching_drafter(model, None, "llama_cpp") for _ in range(2)]
    assert made[0] == made[1]
    written = made[0].stat().st_mtime_ns
    assert matching_drafter(model, None, "llama_cpp").stat().st_mtime_ns == written
    os.utime(made[0].parent / "model.safetensors", ns=(written + 10**9, written + 10**9))
    assert matching_drafter(model, None, "llama_cpp").stat().st_mtime_ns != written
    assert matching_drafter(model, None, "transformers").is_dir()


def test_a_drafter_in_a_folder_that_cannot_be_written_is_converted_elsewhere(pair, tmp_path, monkeypatch):
    model = pair("12B")
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    monkeypatch.setattr("gemma_qat_kit.drafter.os.access", lambda *_: False)  # root may write everywhere
    made = matching_drafter(model, None, "llama_cpp")
    assert made.is_relative_to(tmp_path / "kit")
    assert made == matching_drafter(model, None, "llama_cpp")
    assert not list((model.parent / "drafter").glob("*.gguf"))


def test_a_drafters_gguf_beside_the_model_is_taken_and_is_no_model(pair):
    model = pair("12B")
    file = matching_drafter(model, None, "llama_cpp").rename(model.parent / "drafter.gguf")
    shutil.rmtree(model.parent / "drafter")
    assert matching_drafter(model, None, "llama_cpp") == file
    with gqk.load(model.parent, context_length=256) as alone:  # the folder still holds one model
        assert (alone.size, alone.drafter_note) == (None, None)
    with pytest.raises(BadSettingError, match=r"drafter does not exist.*folder 'drafter'"):
        matching_drafter(model, None, "transformers")


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_the_plan_counts_the_drafter_in_llama_cpp_as_its_gguf(size):
    matrices = sum(t.num_values for t in drafter_tensors(drafter_config(size)) if len(t.shape) == 2
                   and "masked" not in t.name)  # fmt: skip
    vectors = sum(t.num_values for t in drafter_tensors(drafter_config(size)) if len(t.shape) == 1
                  and "masked" not in t.name)  # fmt: skip
    plan = gqk.plan_memory(size, "q4_0", drafter=True)
    assert plan.parts[DRAFTER] == matrices * 34 // 32 + 4 * vectors + 4 * 256  # blocks of 34 bytes; float32; rope_freqs
    assert [part.place for part in plan.placed if part.name == DRAFTER] == ["mapped"]
    gpu = gqk.plan_memory(size, "q4_0", drafter=True, device="cuda")
    assert [part.place for part in gpu.placed if part.name == DRAFTER] == ["gpu"]


def test_a_written_drafter_has_the_tensors_that_the_plan_counts(pair):
    path = matching_drafter(pair("E2B"), None, "llama_cpp")
    expected = {(t.name, t.shape, t.nbytes) for t in drafter_gguf_tensors(tiny_drafter_config("E2B"))}
    assert {(t.name, t.shape, t.nbytes) for t in read_gguf_header(path).tensors} == expected


@pytest.mark.parametrize("format", ["q4_0", "bf16"])
def test_a_drafter_of_another_size_is_refused_before_anything_is_loaded(pair, format):
    with pytest.raises(BadSettingError, match="is the drafter of another model") as caught:
        gqk.load(pair("12B", format, drafter="E2B"), drafter=True)
    assert "states of 256 values and keys of 1 x 32 and 1 x 64" in caught.value.wrong
    assert "2 x 32 and 1 x 64" in caught.value.allowed


def test_what_has_no_drafter_is_refused(tiny, built_in):
    with pytest.raises(NotPublishedError, match="the built-in model has none"):
        gqk.load("smollm2-135m", drafter=True)
    with pytest.raises(BadSettingError, match=r"architecture 'llama', which has no MTP drafter"):
        gqk.load(built_in, drafter=True)
    for format in ("q4_0", "bf16"):
        with pytest.raises(BadSettingError, match="folder 'drafter'"):
            gqk.load(tiny("12B", format), drafter=True)


def test_what_lies_there_and_is_no_drafter_is_refused(pair, tiny):
    model = pair("12B")
    folder = model.parent / "drafter"
    shutil.rmtree(folder)
    shutil.copytree(tiny("12B", "bf16"), folder)
    with pytest.raises(BrokenCheckpointError, match="is no MTP drafter"):
        gqk.load(model, drafter=True)
    shutil.rmtree(folder)
    shutil.copy(model, folder.with_suffix(".gguf"))
    with pytest.raises(BrokenCheckpointError, match="is no MTP drafter"):
        gqk.load(model, drafter=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "damaged or cut short"),
        (lambda folder: change_config(folder, lambda config: config.pop("backbone_hidden_size")), "does not describe"),
        (lambda folder: change_config(folder, lambda it: it["text_config"].update(layer_types=["full_attention"] * 4)),
         "does not say what a drafter must fit"),
        (lambda folder: save_file({"model.norm.weight": load_file(folder / "model.safetensors")["model.norm.weight"]},
                                  folder / "model.safetensors"), r"its tensor model.embed_tokens.weight has 0 bytes"),
    ],
)  # fmt: skip
def test_a_damaged_drafter_is_said(tmp_path, tiny, damage, said):
    shutil.copy(tiny("12B", "q4_0"), tmp_path)
    damage(write_tiny_drafter(tmp_path / "drafter", "12B"))
    with pytest.raises(BrokenCheckpointError, match=said):
        gqk.load(tmp_path, drafter=True)
    assert not list((tmp_path / "drafter").glob("*.gguf"))


@pytest.mark.parametrize(
    ("release", "can_draft"), [("5.15.0", True), ("5.18.0", False), ("5.19.1", False), ("5.20.0", True)]
)
def test_releases_that_cannot_draft_are_named(monkeypatch, release, can_draft):
    import transformers

    from gemma_qat_kit.engines.transformers_traps import check_release

    monkeypatch.setattr(transformers, "__version__", release)
    check_release()
    if can_draft:
        check_release(drafter=True)
        return
    with pytest.raises(MissingLibraryError, match=r"cannot generate with MTP drafters.*without the drafter"):
        check_release(drafter=True)
