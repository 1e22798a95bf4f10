"""`export_gguf`: the file holds what its source holds, and llama.cpp computes with it what transformers computes."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import copy_of
from test_load import LARGEST_DIVERGENCE, dequantized, gguf_values, kl_divergence, log_probs, plain_logits

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines.transformers_gguf import load_gguf
from gemma_qat_kit.export.gguf import export_gguf
from gemma_qat_kit.formats.quantized import quantize
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.layouts import bf16_tensors, gguf_name, gguf_tensors, is_text


def silent(progress):
    pass


def text_names(size):
    """The weights of a tiny model that a GGUF holds."""
    return [t.name for t in bf16_tensors(testing.tiny_config(size), has_shared_kv=False) if is_text(t.name)]


def export(source, path, *arguments, **options):
    return export_gguf(source, path, *arguments, report=silent, **options)


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_file_computes_what_transformers_computes(tiny, tmp_path, size):
    folder = tiny(size, "q4_0-unquantized")
    # In float32 only llama.cpp's float16 keys and values differ.
    expected = plain_logits(size, *dequantized(folder, size, "bf16"), torch.float32)[-1].log_softmax(-1)
    with gqk.load(export(folder, tmp_path / "float32.gguf", "float32").path) as model:
        assert kl_divergence(expected, log_probs(model)) < 0.001
    # In Q4_0 llama.cpp also rounds each activation to 8 bits.
    path = export(folder, tmp_path / "q4_0.gguf").path
    values = gguf_values(path)
    weights = {name: torch.from_numpy(values[gguf_name(name)].copy()) for name in text_names(size)}
    expected = plain_logits(size, weights, {}, torch.float32)[-1].log_softmax(-1)
    with gqk.load(path) as model:
        assert (model.format, model.engine) == ("q4_0", "llama_cpp")
        assert kl_divergence(expected, log_probs(model)) < LARGEST_DIVERGENCE[size]


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_file_has_googles_types_and_every_value_is_the_formats(tiny, tmp_path, size):
    folder = tiny(size, "q4_0-unquantized")
    made = export(folder, tmp_path / "a.gguf")
    found = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    meant = list(gguf_tensors(testing.tiny_config(size)))
    assert {name: t.tensor_type.name for name, t in found.items()} == {t.name: t.dtype for t in meant}
    assert made.nbytes == made.path.stat().st_size
    assert sum(made.num_tensors.values()) == len(found)
    source, values = load_file(folder / "model.safetensors"), gguf_values(made.path)
    for name in text_names(size):
        tensor, value = found[gguf_name(name)], torch.from_numpy(values[gguf_name(name)].copy())
        if tensor.tensor_type.name == "Q4_0":
            assert torch.equal(value, quantize(source[name], "q4_0", recover_grid=True).dequantize()), name
        elif tensor.tensor_type.name != "Q6_K":
            assert torch.equal(value, source[name].float()), name
        else:
            assert torch.norm(value - source[name].float()) < 0.02 * torch.norm(source[name].float()), name


@pytest.mark.parametrize("format", ["bf16", "float32"])
def test_16_and_32_bit_files_hold_the_very_weights(tiny, tmp_path, format):
    folder = tiny("26B-A4B", "bf16")
    values = gguf_values(export(folder, tmp_path / "a.gguf", format).path)
    source = load_file(folder / "model.safetensors")
    assert all(torch.equal(torch.from_numpy(values[gguf_name(name)].copy()), source[name].float())
               for name in text_names("26B-A4B"))  # fmt: skip


def test_q8_0_holds_what_gguf_makes_of_the_weights(tiny, tmp_path):
    folder = tiny("12B", "bf16")
    reader = gguf.GGUFReader(export(folder, tmp_path / "a.gguf", "q8_0").path)
    source = load_file(folder / "model.safetensors")
    weights = {gguf_name(name): source[name].float().numpy() for name in text_names("12B")}
    blocks = [t for t in reader.tensors if t.tensor_type.name == "Q8_0"]
    assert len(blocks) == sum(value.ndim > 1 for value in weights.values())
    assert all(np.array_equal(t.data, gguf.quants.quantize(weights[t.name], t.tensor_type)) for t in blocks)


@pytest.mark.parametrize("kind", ["model", "module", "saved", "state dict", "text-only names", "shards", "pieces"])
def test_every_source_of_the_same_weights_gives_the_same_file(tiny, tmp_path, monkeypatch, kind):
    folder = tiny("E2B", "q4_0-unquantized")
    expected = export(folder, tmp_path / "expected.gguf").path.read_bytes()
    state, like = load_file(folder / "model.safetensors"), None
    if kind == "model":
        with gqk.load(folder) as source:
            found = export(source, tmp_path / "found.gguf")
    else:
        source = folder
        if kind == "module":
            source, like = gqk.load(folder).hf[0], folder
        elif kind == "saved":  # transformers writes a config.json of its own kind
            source = tmp_path / "saved"
            with gqk.load(folder) as model:
                model.hf[0].save_pretrained(source)
                model.hf[1].save_pretrained(source)
        elif kind == "state dict":
            source, like = state, str(folder)
        elif kind == "text-only names":
            source, like = (
                {name.replace("language_model.", ""): t for name, t in state.items() if is_text(name)},
                folder,
            )
        elif kind == "shards":
            source = shards(folder, tmp_path)
        else:
            monkeypatch.setattr("gemma_qat_kit.weights.CHUNK_VALUES", 1000)
        found = export(source, tmp_path / "found.gguf", like=like)
    assert found.path.read_bytes() == expected


def shards(folder, tmp_path):
    """A copy of a checkpoint in three files and an index."""
    copy = copy_of(folder, tmp_path)
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names, index = list(state), {}
    for number in range(3):
        part = {name: state[name] for name in names[number::3]}
        save_file(part, copy / f"model-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return copy


def on_a_grid(folder, tmp_path):
    """A copy of a checkpoint whose text matrices lie on Q4_0 grids that peak anywhere from 1 to 8, and its weights."""
    copy, generator = copy_of(folder, tmp_path), torch.Generator().manual_seed(0)
    state = load_file(copy / "model.safetensors")
    for name, weight in state.items():
        if is_text(name) and (
            weight.ndim == 3 or (name.endswith(("_proj.weight", "_projection.weight", "gate.weight")))
        ):
            groups = weight.float().unflatten(-1, (-1, 32))
            peak = torch.randint(1, 9, groups.shape[:-1], generator=generator)
            step = (groups.abs().amax(-1) / peak).bfloat16().float()[..., None]
            state[name] = (torch.round(groups / step) * step).flatten(-2).bfloat16()
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy, state


def test_weights_on_a_grid_are_kept_to_the_bit(tiny, tmp_path):
    folder, state = on_a_grid(tiny("26B-A4B", "q4_0-unquantized"), tmp_path)
    made = export(folder, tmp_path / "a.gguf")
    values, types = gguf_values(made.path), {t.name: t.dtype for t in gguf_tensors(testing.tiny_config("26B-A4B"))}
    names = [name for name in text_names("26B-A4B") if types[gguf_name(name)] == "Q4_0"]
    same = [torch.from_numpy(values[gguf_name(name)].copy()).bfloat16() == state[name] for name in names]
    assert torch.cat([part.flatten() for part in same]).float().mean() > 0.999
    assert made.fit.num_values == sum(state[name].numel() for name in names)
    assert made.fit.share_exact > 0.999 > made.fit.naive_share_exact
    assert not any("no Q4_0 grid" in note for note in made.notes)


def test_importance_rounds_the_weights_it_names_and_no_others(tiny, tmp_path):
    folder = tiny("12B", "q4_0-unquantized")
    name = "model.language_model.layers.1.mlp.gate_proj"
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0))
    plain = gguf_values(export(folder, tmp_path / "plain.gguf").path)
    weighted = gguf_values(export(folder, tmp_path / "weighted.gguf", importance={name: importance}).path)
    weight = load_file(folder / "model.safetensors")[name + ".weight"]
    expected = quantize(weight, "q4_0", importance=importance).dequantize()
    assert torch.equal(torch.from_numpy(weighted["blk.1.ffn_gate.weight"].copy()), expected)
    assert [key for key in plain if not np.array_equal(plain[key], weighted[key])] == ["blk.1.ffn_gate.weight"]


def test_the_tokenizer_and_the_chat_template_are_in_the_file(tiny, tmp_path):
    folder = tiny("E4B", "q4_0-unquantized")
    path = export(folder, tmp_path / "a.gguf").path
    metadata = {field.name: field.contents() for field in gguf.GGUFReader(path).fields.values()}
    assert metadata["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert metadata["general.sampling.top_k"] == 64
    with gqk.load(path) as model, gqk.load(folder) as reference:
        text = "the sky is blue, and 7 was thought"
        assert model.runner.tokenize(text) == reference.runner.tokenize(text)
        assert model.chat("sky", max_new_tokens=4).new_tokens <= 4


def test_ids_without_a_piece_are_filled(tiny, tmp_path):
    # llama.cpp wants a piece for each row of the embedding.
    folder = copy_of(tiny("12B", "q4_0-unquantized"), tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {text: number for text, number in tokenizer["model"]["vocab"].items() if number < 507}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = export(folder, tmp_path / "a.gguf").path
    assert len(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()) == 512
    gqk.load(path).close()


@pytest.fixture(scope="module")
def smollm2():
    with gqk.load("smollm2-135m", "float32", report=silent) as model:
        yield model


def test_the_built_in_model_comes_back_as_it_was(smollm2, built_in, tmp_path):
    # Query and key rows are ordered otherwise in transformers, so this also proves the order.
    path = export(smollm2, tmp_path / "float32.gguf", "float32").path
    expected, found = gguf_values(built_in), gguf_values(path)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    ours, theirs = read_gguf_header(path).metadata, read_gguf_header(built_in).metadata
    assert {key: value for key, value in ours.items() if key != "general.file_type"} == {
        key: value for key, value in theirs.items() if key != "general.file_type"
    }


@pytest.mark.parametrize(("format", "largest"), [("float32", 1e-4), ("q4_0", 0.05)])
def test_the_built_in_model_computes_what_transformers_computes(smollm2, tmp_path, format, largest):
    # In Q4_0 llama.cpp also rounds each activation to 8 bits.
    path = export(smollm2, tmp_path / "a.gguf", format).path
    network, _, _ = load_gguf(path, "cpu")
    ids = smollm2.runner.tokenize("The sky is blue because sunlight is scattered by the air.")
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    with gqk.load(path) as model:
        found = model.runner.logits(ids).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < largest


def test_progress_runs_over_all_bytes_of_writing_and_of_verifying(tiny, tmp_path):
    told = []
    made = export_gguf(tiny("12B", "bf16"), tmp_path / "a.gguf", report=told.append)
    stages = [progress.stage for progress in told]
    assert stages == sorted(stages, key=["writing", "verifying"].index)
    for stage in ("writing", "verifying"):
        moments = [progress for progress in told if progress.stage == stage]
        done = [progress.done_bytes for progress in moments]
        assert done == sorted(done)
        assert moments[-1].fraction > 0.99
        assert len({progress.total_bytes for progress in moments}) == 1
    assert told[0].total_bytes == made.nbytes


def test_without_a_report_a_bar_is_drawn(tiny, tmp_path, capsys):
    export_gguf(tiny("12B", "bf16"), tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").exists()


def test_an_export_draws_itself(tiny, tmp_path):
    made = export(tiny("12B", "bf16"), tmp_path / "<b>.gguf")
    assert str(made).startswith(f"{made.path}: 1.50 MiB, written and verified in ")
    assert "82 Q4_0" in str(made)
    assert "are not QAT weights" in str(made)
    assert "&lt;b&gt;.gguf" in made._repr_html_()
    assert "<b>" not in made._repr_html_()


def test_what_is_left_out_is_said(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    (folder / "chat_template.jinja").unlink()
    state = load_file(folder / "model.safetensors")
    extra = {"model.language_model.layers.0.mlp.lora_A.weight": torch.ones(2, 2)}
    notes = export(state | extra, tmp_path / "a.gguf", like=folder).notes
    assert any("sees and hears" in note for note in notes)
    assert any("no chat template" in note for note in notes)
    assert [note for note in notes if "no place" in note] == [
        f"1 tensors have no place in a GGUF and are left out, such as {next(iter(extra))}."
    ]
