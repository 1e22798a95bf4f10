"""What you train is what you ship: trained, converted and exported, one set of values, on every architecture.

The model in training, the converted model, the GGUF as gguf reads it and the mobile checkpoint as plain transformers
loads it hold the same numbers, the per-layer table of E2B and E4B included.
"""

import warnings

import pytest
import torch
from test_load import IDS as PROMPT
from test_load import LARGEST_DIVERGENCE, gguf_values, kl_divergence, log_probs

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.errors import BadSettingError, ExportError
from gemma_qat_kit.export.blueprint import published_names
from gemma_qat_kit.export.plan import rotary_order
from gemma_qat_kit.layouts import gguf_name
from gemma_qat_kit.qat.prepare import KeptInFloatWarning
from gemma_qat_kit.qat.stored import stored

TEXT = "The sky is blue and the sea is wide. " * 60
IDS = torch.tensor([PROMPT])
HEADS = {"q_proj": 9, "k_proj": 3}  # of the built-in model


def silent(progress):
    pass


def trained(model, format, **options):
    """Prepare a model and train it a little; return what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeptInFloatWarning)  # mobile has no place for experts
        gqk.prepare_qat(model, format, calibration=TEXT, report=silent, **options)
    settings = gqk.TrainSettings(num_steps=2, batch_size=1, sequence_length=32, num_evaluations=1, dtype="float32")
    gqk.train_qat(model, TEXT, settings=settings, report=silent)
    return says(model)


def says(model, ids=IDS):
    with torch.no_grad():
        return model.hf[0](ids).logits


def codes(model):
    """Return what stands beside each weight, by name; a tied head shows what the embedding shows."""
    return {f"{name}.{last}": value for name, part in model.hf[0].named_modules() if name != "lm_head"
            for last, value in getattr(part, "quantized", {}).items()}  # fmt: skip


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_q4_0_gguf_holds_the_values_of_training(tiny, tmp_path, size):
    with gqk.load(str(tiny(size, "bf16")), device="cpu", per_layer_table="memory", report=silent) as model:
        before = trained(model, "q4_0")
        gqk.convert_qat(model)
        assert torch.equal(says(model), before)
        path = gqk.export_gguf(model, tmp_path / "trained.gguf", report=silent).path
        values, names = gguf_values(path), published_names(codes(model))
        assert any("per_layer" in name for name in names) == size.startswith("E")
        for name, value in codes(model).items():
            assert torch.equal(torch.from_numpy(values.pop(gguf_name(names[name]))), value.dequantize()), name
        floats = {gguf_name(published): model.hf[0].get_parameter(name) for name, published in published_names(
            name for name, _ in model.hf[0].named_parameters() if "norm" in name or "projection" in name).items()
            if gguf_name(published) in values}  # fmt: skip
        assert len(floats) > 20
        assert all(torch.equal(torch.from_numpy(values[name]), weight.float()) for name, weight in floats.items())
    with gqk.load(path) as model:
        assert kl_divergence(before[0, -1].float().log_softmax(-1), log_probs(model)) < LARGEST_DIVERGENCE[size]


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_mobile_checkpoint_holds_the_values_of_training(tiny, tmp_path, size):
    from transformers import AutoModelForCausalLM

    with gqk.load(str(tiny(size, "bf16")), device="cpu", per_layer_table="memory", report=silent) as model:
        before = trained(model, "mobile")
        gqk.convert_qat(model)
        assert torch.equal(says(model), before)
        folder = gqk.export_mobile(model, tmp_path / "trained")
        path = gqk.export_gguf(model, tmp_path / "trained.gguf", like=tiny(size, "bf16"), report=silent).path
        values, names = gguf_values(path), published_names(codes(model))
        for name, value in codes(model).items():  # a GGUF rounds scales to float16
            torch.testing.assert_close(torch.from_numpy(values[gguf_name(names[name])]), value.dequantize(),
                                       rtol=2**-11, atol=1e-7)  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=before.dtype)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, before)
    with gqk.load(str(folder), device="cpu", engine="transformers", report=silent) as again:
        assert again.format == "mobile"
        assert torch.equal(says(again), before)


def test_embeddings_that_were_trained_ship_on_their_own_grid(tiny, tmp_path):
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=silent) as model:
        before = trained(model, "q4_0", embeddings=True)[0, -1].float().log_softmax(-1)
        gqk.convert_qat(model)
        path = gqk.export_gguf(model, tmp_path / "trained.gguf", report=silent).path
        values, names = gguf_values(path), published_names(codes(model))
        (table,) = (name for name in names if name.endswith("embed_tokens.weight"))
        assert codes(model)[table].format == "q4_0"
        assert torch.equal(torch.from_numpy(values[gguf_name(names[table])]), codes(model)[table].dequantize())
    with gqk.load(path) as model:
        found = model.runner.logits(PROMPT)[-1].log_softmax(-1)
    assert kl_divergence(before, found) < LARGEST_DIVERGENCE["12B"]


@pytest.mark.slow
def test_the_built_in_model_ships_as_it_was_trained(tmp_path):
    with gqk.load(BUILT_IN_SIZE, "float32", device="cpu", report=silent) as model:
        ids = torch.tensor([model.runner.tokenize("The sky is blue because sunlight is scattered by the air.")])
        trained(model, "q4_0")
        before = says(model, ids)
        gqk.convert_qat(model)
        assert torch.equal(says(model, ids), before)
        path = gqk.export_gguf(model, tmp_path / "trained.gguf", report=silent).path
        values = gguf_values(path)
        for name, value in codes(model).items():
            expected = value.dequantize()
            for part, num_heads in HEADS.items():  # llama.cpp has the rows of these in another order
                if part in name:
                    expected = expected[rotary_order(len(expected), num_heads)]
            assert torch.equal(torch.from_numpy(values[gguf_name(_as_gemma(name))]), expected), name
    expected = before[0].log_softmax(-1)
    with gqk.load(path) as model:
        found = model.runner.logits(ids[0].tolist()).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.05  # activations are rounded to 8 bits


@pytest.mark.slow
def test_the_built_in_model_is_a_mobile_checkpoint_to_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    with gqk.load(BUILT_IN_SIZE, "float32", device="cpu", report=silent) as model:
        gqk.prepare_qat(model, "mobile", calibration={}, report=silent)
        before = says(model)
        gqk.convert_qat(model)
        folder = gqk.export_mobile(model, tmp_path / "trained")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, before)


def _as_gemma(name):
    return name.replace("model.", "model.language_model.", 1)


def test_a_model_in_training_is_not_exported(tiny, tmp_path):
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=silent) as model:
        gqk.prepare_qat(model, "q4_0", calibration={}, report=silent)
        for export in (gqk.export_gguf, gqk.export_mobile):
            with pytest.raises(BadSettingError, match=r"prepared for training.*convert_qat"):
                export(model, tmp_path / "a.gguf")
        gqk.convert_qat(model)
        with pytest.raises(BadSettingError, match=r"on the Q4_0 grid.*export_gguf"):
            gqk.export_mobile(model, tmp_path / "a")
        assert stored(model.hf[0]).blocks


def test_a_mobile_export_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=silent) as model:
        with pytest.raises(BadSettingError, match=r"no mobile codes"):
            gqk.export_mobile(model, tmp_path / "a")
        gqk.prepare_qat(model, "mobile_int4", calibration={}, report=silent)
        gqk.convert_qat(model)
        gqk.export_mobile(model, tmp_path / "a")
        with pytest.raises(ExportError, match=r"exists.*overwrite=True"):
            gqk.export_mobile(model, tmp_path / "a")
        before = (tmp_path / "a" / "model.safetensors").read_bytes()
        monkeypatch.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(ExportError, match=r"No space left.*Free some space"):
            gqk.export_mobile(model, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def full_disk(*args, **options):
    raise OSError(28, "No space left on device")
