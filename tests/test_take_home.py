"""What was tuned is taken home: peft's files, a GGUF of the adapters alone, a merged GGUF, and Ollama's Modelfile."""

import json

import numpy as np
import pytest
import torch
from small_network import quiet
from test_finetune import ROWS, SETTINGS
from test_load import IDS, gguf_values, kl_divergence, log_probs, write_float32

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines.transformers_packed import load_packed
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, ExportError
from gemma_qat_kit.finetune.lora import ADAPTER, adapters
from gemma_qat_kit.layouts import gguf_name
from gemma_qat_kit.testing import write_tiny_checkpoint


def load(path, **options):
    options = {"engine": "transformers", "device": "cpu", "report": quiet} | options
    return gqk.load(str(path), "q4_0", **options)


def tune(model, qat="q4_0", **changes):
    settings = gqk.FinetuneSettings(**SETTINGS | {"num_steps": 3, "num_evaluations": 1} | changes)
    gqk.finetune(model, ROWS, qat=qat, settings=settings, report=quiet)


def says(model):
    with torch.no_grad():
        return model.hf[0](torch.tensor([IDS])).logits


@pytest.mark.parametrize("qat", ["q4_0", None])
def test_saved_adapters_are_loaded_again_bit_for_bit(tiny, tmp_path, qat):
    path = tiny("E2B", "q4_0")
    with load(path) as model:
        tune(model, qat)
        before = says(model)
        folder = gqk.save_adapter(model, tmp_path / "adapter")
    with load(path) as model:
        gqk.load_adapter(model, folder)
        assert torch.equal(says(model), before)
        tune(model, qat)  # and goes on


def test_peft_reads_what_was_saved(tiny, tmp_path):
    from peft import PeftModel

    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
        tune(model, None)
        before = says(model)
        gqk.save_adapter(model, tmp_path)
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
        found = PeftModel.from_pretrained(model.hf[0], tmp_path)
        with torch.no_grad():
            assert torch.equal(found(torch.tensor([IDS])).logits, before)


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_merged_gguf_holds_what_was_trained(tiny, tmp_path, size):
    source = tiny(size, "q4_0")
    with load(source) as model:
        tune(model)
        before = says(model)
        gqk.merge_adapters(model)
        target = gqk.export_gguf(model, tmp_path / "tuned.gguf", report=quiet).path
    with load(target) as again:
        assert torch.equal(says(again), before)
    first, second = gguf_values(source), gguf_values(target)
    changed = {name for name in first if not np.array_equal(first[name], second[name])}
    assert changed
    assert all(name.split(".")[-2].startswith(("attn", "ffn")) for name in changed)
    with gqk.load(target, report=quiet) as chatting:
        assert chatting.chat("the sky", max_new_tokens=2, temperature=0).new_tokens > 0
    # With Q4_0 llama.cpp rounds activations to 8 bits; the same values in float32 it multiplies as they are.
    module, _ = load_packed(target, dtype=torch.float32, device=torch.device("cpu"), per_layer_table="disk")
    with torch.no_grad():
        expected = module(torch.tensor([IDS])).logits[0].log_softmax(-1)
    with gqk.load(write_float32(tmp_path / "float32.gguf", size, second), report=quiet) as exact:
        found = exact.runner.logits(IDS).log_softmax(-1)
    assert kl_divergence(expected, found) < 0.001 * len(IDS)


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_llama_cpp_computes_adapters_beside_the_base(tiny, tmp_path, size):
    """llama.cpp adds W·x and s·B·A·x; the reference is a GGUF that holds their sum in float32."""
    source = tiny(size, "q4_0")
    with load(source) as model:
        tune(model, None, rank=8, learning_rate=0.02)
        adapter = gqk.export_adapter(model, tmp_path / "adapter.gguf")
        parts = {gguf_name(name): part for name, part in adapters(model.hf[0]).items()}
        deltas = {name: part.scaling[ADAPTER] * part.lora_B[ADAPTER].weight @ part.lora_A[ADAPTER].weight
                  for name, part in parts.items()}  # fmt: skip
        sizes = [value.norm() for value in deltas.values()]
    values = gguf_values(source)
    values |= {name: values[name] + delta.detach().numpy() for name, delta in deltas.items()}
    with gqk.load(write_float32(tmp_path / "sum.gguf", size, values), report=quiet) as reference:
        expected = log_probs(reference)
    with gqk.load(source, adapter=adapter, report=quiet) as adapted, gqk.load(source, report=quiet) as base:
        found, without = kl_divergence(expected, log_probs(adapted)), kl_divergence(expected, log_probs(base))
        assert adapted.chat("the sky", max_new_tokens=2, temperature=0).new_tokens == 2
    assert min(sizes) > 0
    assert found < 0.2 * without, (found, without)


def test_a_modelfile_says_how_to_sample(tiny, tmp_path):
    with load(tiny("E2B", "q4_0"), context_length=512) as model:
        path = gqk.write_modelfile(model, tmp_path / "tuned.gguf", adapter=tmp_path / "adapter.gguf")
        assert path.read_text().splitlines() == [
            "FROM ./tuned.gguf", "ADAPTER ./adapter.gguf", "PARAMETER temperature 1", "PARAMETER top_k 64",
            "PARAMETER top_p 0.95", "PARAMETER num_ctx 512",
        ]  # fmt: skip
        with pytest.raises(ExportError, match="cannot be written"):
            gqk.write_modelfile(model, tmp_path / "no" / "tuned.gguf")


def test_adapters_of_another_base_are_refused(tiny, tmp_path):
    with load(tiny("E2B", "q4_0")) as model:
        tune(model)
        folder = gqk.save_adapter(model, tmp_path / "adapter")
    other = write_tiny_checkpoint(tmp_path / "other", "E2B", "q4_0", seed=1)
    for path, message in ((tiny("12B", "q4_0"), "is no linear of"), (other, "its weights are others")):
        with load(path) as model:
            before = says(model)
            with pytest.raises(BadSettingError, match=f"belong to another model: .*{message}"):
                gqk.load_adapter(model, folder)
            assert torch.equal(says(model), before)
            assert not adapters(model.hf[0])


def test_damaged_adapters_are_refused(tiny, tmp_path):
    with load(tiny("E2B", "q4_0")) as model:
        tune(model)
        folder = gqk.save_adapter(model, tmp_path / "adapter")
        gqk.merge_adapters(model)
        for name, content in (("adapter_config.json", "{"), ("adapter_config.json", "{}"),
                              ("adapter_model.safetensors", "no"), ("base.json", "[]")):  # fmt: skip
            kept = (folder / name).read_bytes()
            (folder / name).write_text(content)
            with pytest.raises(BrokenCheckpointError, match="no adapters that can be loaded"):
                gqk.load_adapter(model, folder)
            (folder / name).write_bytes(kept)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        with pytest.raises(BrokenCheckpointError, match="more than plain LoRA"):
            gqk.load_adapter(model, folder)
        with pytest.raises(BrokenCheckpointError, match="no adapters"):
            gqk.load_adapter(model, tmp_path / "nowhere")


def test_what_is_not_adapted_has_nothing_to_save(tiny, tmp_path):
    with load(tiny("E2B", "q4_0")) as model:
        for call in (gqk.save_adapter, gqk.export_adapter):
            with pytest.raises(BadSettingError, match="has no adapters"):
                call(model, tmp_path / "a.gguf")
        tune(model)
        (tmp_path / "file").write_text("")
        with pytest.raises(BadSettingError, match="cannot be written"):
            gqk.save_adapter(model, tmp_path / "file")
        with pytest.raises(ExportError):
            gqk.export_adapter(model, tmp_path / "file")


def test_nf4_is_trained_and_not_merged(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    with gqk.load(str(tiny("12B", "bf16")), "nf4", device="cpu", report=quiet) as model:
        tune(model, None)
        gqk.save_adapter(model, tmp_path)
        with pytest.raises(BadSettingError, match="held by bitsandbytes"):
            gqk.merge_adapters(model)
        assert adapters(model.hf[0])


def test_an_adapter_is_for_llama_cpp(tiny, tmp_path):
    with pytest.raises(BadSettingError, match="is no file"):
        gqk.load(tiny("E2B", "q4_0"), adapter=tmp_path / "none.gguf")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadSettingError, match=r"runs in transformers.*load_adapter"):
        gqk.load(tiny("E2B", "bf16"), adapter=tmp_path / "some.gguf")
    with pytest.raises(BrokenCheckpointError):
        gqk.load(tiny("E2B", "q4_0"), adapter=tmp_path / "some.gguf", report=quiet)
