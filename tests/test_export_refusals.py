"""What `export_gguf` refuses, and that it leaves a whole file or nothing at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import change_config, copy_of
from test_export import export, shards

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import (
    BadSettingError,
    BadTensorError,
    BrokenCheckpointError,
    ModelClosedError,
    UnknownNameError,
)
from gemma_qat_kit.export.gguf import export_gguf

UP = "model.language_model.layers.3.mlp.up_proj.weight"


def changed(folder, tmp_path, **tensors):
    """A copy of a checkpoint in which some tensors are others, or gone; the names' dots are written as __."""
    copy = copy_of(folder, tmp_path)
    state = load_file(copy / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def with_up(folder, tmp_path, tensor):
    return changed(folder, tmp_path, **{UP.replace(".", "__"): tensor})


def refused(source, target, kind, words, *arguments, **options):
    with pytest.raises(kind, match=words) as caught:
        export(source, target, *arguments, **options)
    assert all(part.endswith((".", "?")) for part in caught.value.args), caught.value
    assert list(target.parent.iterdir()) == []


def test_unknown_format_is_named(tiny, target):
    refused(tiny("12B", "bf16"), target, UnknownNameError, "Did you mean 'q4_0'", "q4_k")


def test_unknown_device_is_named(tiny, target):
    refused(tiny("E2B", "mobile"), target, UnknownNameError, r"Unknown device 'tpu'\. Known: cpu, cuda", device="tpu")


def test_what_holds_no_weights_is_refused(target):
    refused(3, target, BadSettingError, "int holds no weights")


def test_a_folder_that_is_not_there_is_refused(target, tmp_path):
    refused(tmp_path / "nowhere", target, BrokenCheckpointError, "does not exist")


def test_a_gguf_is_not_exported_again(tiny, target):
    refused(tiny("E2B", "q4_0"), target, BadSettingError, "is a GGUF already")
    with gqk.load(tiny("E2B", "q4_0")) as model:
        refused(model, target, BadSettingError, "is a GGUF already")


def test_weights_on_a_grid_of_their_own_are_refused(tiny, target):
    folder = tiny("E2B", "w4a16")
    refused(folder, target, BadSettingError, "are w4a16, a grid of its own")
    refused(load_file(folder / "model.safetensors"), target, BadSettingError, "are w4a16", like=folder)
    with gqk.load(tiny("12B", "nf4"), "nf4") as model:
        refused(model, target, BadSettingError, "are nf4, a grid of its own")
        refused(model.hf[0], target, BadTensorError, "uint8: it is quantized already", like=tiny("12B", "bf16"))


def test_a_closed_model_has_no_weights(tiny, target):
    model = gqk.load(tiny("12B", "bf16"))
    model.close()
    refused(model, target, ModelClosedError, "no weights")


def test_a_state_dict_needs_a_description(tiny, target):
    state = load_file(tiny("12B", "bf16") / "model.safetensors")
    refused(state, target, BadSettingError, "Nothing says which config and tokenizer belong to the state dict")


def test_weights_without_values_are_refused(tiny, target):
    state = load_file(tiny("12B", "bf16") / "model.safetensors")
    state[UP] = state[UP].to("meta")
    refused(state, target, BadTensorError, "up_proj.weight has no values", like=tiny("12B", "bf16"))


def test_a_missing_shard_is_named(tiny, target, tmp_path):
    folder = shards(tiny("12B", "bf16"), tmp_path)
    (folder / "model-1.safetensors").unlink()
    refused(folder, target, BrokenCheckpointError, "lacks model-1.safetensors")


def test_a_missing_tensor_is_named(tiny, target, tmp_path):
    folder = with_up(tiny("12B", "bf16"), tmp_path, None)
    refused(folder, target, BrokenCheckpointError, r"lacks model\.language_model\.layers\.3\.mlp\.up_proj\.weight\.")
    refused({}, target, BrokenCheckpointError, r"the state dict lacks .* more tensors", like=folder)


def test_a_tensor_of_another_shape_is_named(tiny, target, tmp_path):
    folder = with_up(tiny("12B", "bf16"), tmp_path, torch.ones(128, 64, dtype=torch.bfloat16))
    refused(folder, target, BrokenCheckpointError, r"up_proj\.weight has the shape \(128, 64\).*\(128, 256\)")


def test_a_file_that_is_cut_while_it_is_read_is_named(tiny, target, tmp_path):
    folder = copy_of(tiny("12B", "bf16"), tmp_path)
    file = folder / "model.safetensors"

    def cut(progress):
        os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(BrokenCheckpointError, match=r"it ends in the middle of model\."):
        export_gguf(folder, target, report=cut)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("format", ["q4_0", "q8_0", "bf16", "float32"])
def test_a_value_that_is_no_number_is_refused_with_its_place(tiny, target, tmp_path, monkeypatch, value, format):
    monkeypatch.setattr("gemma_qat_kit.weights.CHUNK_VALUES", 1024)  # so that the place lies in a later part
    weight = load_file(tiny("12B", "bf16") / "model.safetensors")[UP]
    weight[100, 7] = float(value)
    folder = with_up(tiny("12B", "bf16"), tmp_path, weight)
    refused(folder, target, BadTensorError, rf"up_proj\.weight\[100, 7\] is {value}\.", format)


def test_the_place_in_an_experts_tensor_has_three_numbers(tiny, target, tmp_path):
    name = "model.language_model.layers.0.experts.down_proj"
    weight = load_file(tiny("26B-A4B", "bf16") / "model.safetensors")[name]
    weight[3, 200, 30] = float("nan")
    folder = changed(tiny("26B-A4B", "bf16"), tmp_path, **{name.replace(".", "__"): weight})
    refused(folder, target, BadTensorError, r"experts\.down_proj\[3, 200, 30\] is nan")


def test_rows_that_do_not_divide_are_refused_with_what_to_do(tiny, target, tmp_path):
    folder = copy_of(tiny("31B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(intermediate_size=120))
    state = load_file(folder / "model.safetensors")
    for name, weight in state.items():
        if ".language_model." in name and ".mlp." in name:
            state[name] = (weight[:, :120] if "down_proj" in name else weight[:120]).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, target, BadTensorError, r'down_proj\.weight has rows of 120.*groups of 32.*format="bf16"')
    with gqk.load(export(folder, target, "bf16").path) as model:
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


def test_importance_must_fit(tiny, target):
    folder, ones = tiny("12B", "bf16"), torch.ones(256)
    refused(folder, target, BadSettingError, "changes nothing in bf16", "bf16", importance={UP: ones})
    refused(folder, target, BadSettingError, "names 'nothing'", importance={"nothing": ones})
    refused(folder, target, BadTensorError, "importance of .*up_proj", importance={UP: torch.ones(7)})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "it is missing, and a GGUF holds the tokenizer"),
        ("tokenizer.json", "{", "it is not JSON"),
        ("tokenizer.json", "[]", "it is not a JSON object"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "no.* byte-pair tokenizer"),
        ("config.json", '{"model_type": "gemma4", "text_config": {}}', "does not describe a Gemma 4 model"),
        ("config.json", '{"model_type": "llama"}', "is of architecture 'llama'"),
    ],
)
def test_a_description_that_cannot_be_read_is_named(tiny, target, tmp_path, name, content, words):
    state, folder = load_file(tiny("12B", "bf16") / "model.safetensors"), copy_of(tiny("12B", "bf16"), tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    refused(state, target, BrokenCheckpointError, words, like=folder)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(tiny, target, tmp_path):
    folder = copy_of(tiny("12B", "bf16"), tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one more"] = 512
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, target, BrokenCheckpointError, "has 513 pieces.*rows for 512")
