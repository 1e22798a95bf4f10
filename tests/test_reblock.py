"""Mobile checkpoints as GGUF: the same codes in other groups, which llama.cpp runs."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import copy_of
from test_export import export, text_names
from test_load import LARGEST_DIVERGENCE, dequantized, gguf_values, kl_divergence, log_probs, plain_logits

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.architectures import MOBILE_SIZES
from gemma_qat_kit.errors import BadSettingError, BadTensorError, BrokenCheckpointError
from gemma_qat_kit.export.reblock import MobileWeight, ScaleTally, reblocked
from gemma_qat_kit.formats import mobile
from gemma_qat_kit.layouts import gguf_name, mobile_bits
from gemma_qat_kit.weights import Weight

ROUNDED = 2.0**-11  # of a value: float16 has 11 significant bits
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
TABLE = "model.language_model.embed_tokens"


def exact(folder, size):
    """The float32 weights that a mobile checkpoint's codes and scales stand for, by name."""
    config, state = testing.tiny_config(size, "mobile"), load_file(folder / "model.safetensors")
    weights = {}
    for name in [*text_names(size), "lm_head.weight"]:
        module = name.removesuffix(".weight")
        packed = state.get(name, state.get(module + ".embedding_quantized"))
        scale = state.get(module + ".weight_scale", state.get(module + ".embedding_scale"))
        if scale is None:
            weights[name] = packed.float()
        else:
            weights[name] = mobile.dequantize(mobile.unpack(packed, mobile_bits(config, module)), scale)
    return weights


def with_tensors(folder, tmp_path, **changes):
    """A copy of a checkpoint with other tensors; the names' dots are written as __."""
    copy = copy_of(folder, tmp_path)
    state = load_file(copy / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_every_value_is_the_checkpoints_up_to_the_scales_rounding(tiny, tmp_path, size):
    folder = tiny(size, "mobile")
    values, weights = gguf_values(export(folder, tmp_path / "a.gguf").path), exact(folder, size)
    assert set(values) == {"rope_freqs.weight"} | {gguf_name(name) for name in text_names(size)}
    for name in text_names(size):
        found, expected = torch.from_numpy(values[gguf_name(name)].copy()), weights[name]
        assert ((found - expected).abs() <= ROUNDED * expected.abs()).all(), name
        assert torch.equal(found == 0, expected == 0), name


@pytest.mark.parametrize(("device", "two_bits"), [("cpu", "TQ2_0"), ("cuda", "Q2_K")])
@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_each_width_of_codes_has_its_type(tiny, tmp_path, size, device, two_bits):
    config = testing.tiny_config(size, "mobile")
    path = export(tiny(size, "mobile"), tmp_path / "a.gguf", device=device).path
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in text_names(size):
        tensor, bits = found[gguf_name(name)], mobile_bits(config, name.removesuffix(".weight"))
        if len(tensor.shape) > 1 and bits and "per_layer_model_proj" not in tensor.name:
            # A tiny row is often too short for a group of 256, and a tiny slice of the per-layer table always is.
            fits = tensor.shape[0] % 256 == 0 and "per_layer" not in tensor.name
            assert tensor.tensor_type.name == {8: "Q8_0", 4: "Q4_0", 2: two_bits if fits else "Q4_0"}[bits], name


def test_slices_of_256_with_2_bits_become_q2_k(tmp_path, monkeypatch):
    # As in the real E4B, whose per-layer table has a scale for each 256 values of 2 bits.
    config = testing.tiny_config("E4B", "mobile")
    config["text_config"] |= {"hidden_size_per_layer_input": 256}
    monkeypatch.setattr(testing, "tiny_config", lambda size, format="bf16": config)
    folder = testing.write_tiny_checkpoint(tmp_path / "E4B", "E4B", "mobile")
    path = export(folder, tmp_path / "a.gguf").path
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}["per_layer_token_embd.weight"] == "Q2_K"
    found = torch.from_numpy(gguf_values(path)["per_layer_token_embd.weight"].copy())
    expected = exact(folder, "E4B")["model.language_model.embed_tokens_per_layer.weight"]
    assert ((found - expected).abs() <= ROUNDED * expected.abs()).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_llama_cpp_computes_what_transformers_computes_without_the_ranges(tiny, tmp_path, size, device):
    folder = tiny(size, "mobile")
    path = export(folder, tmp_path / "a.gguf", device=device).path
    values = gguf_values(path)
    weights = {name: torch.from_numpy(values[gguf_name(name)].copy()) for name in text_names(size)}
    expected = plain_logits(size, weights, {}, torch.float32)[-1].log_softmax(-1)
    with gqk.load(path) as model:
        assert kl_divergence(expected, log_probs(model)) < LARGEST_DIVERGENCE[size]
    # The values without their groups, so that no activation is rounded.
    with gqk.load(export(folder, tmp_path / "float32.gguf", "float32").path) as model:
        expected = plain_logits(size, exact(folder, size), {}, torch.float32)[-1].log_softmax(-1)
        assert kl_divergence(expected, log_probs(model)) < 0.001


@pytest.mark.parametrize("size", MOBILE_SIZES)
def test_what_the_lost_ranges_change_is_said_and_small(tiny, tmp_path, size):
    folder = tiny(size, "mobile")
    made = export(folder, tmp_path / "a.gguf")
    state = load_file(folder / "model.safetensors")
    linears = {name.removesuffix(".weight") for name in text_names(size)}
    ranges = [name for name, value in state.items() if name.endswith(".input_activation_scale") and value != 0]
    calibrated = sum(name.removesuffix(".input_activation_scale") in linears for name in ranges)
    assert any(f"ranges of {calibrated:,} layers are lost" in note for note in made.notes)
    weights, activations = dequantized(folder, size, "mobile")
    rounded, free = (plain_logits(size, weights, ranges)[-1].log_softmax(-1) for ranges in (activations, {}))
    assert 0 < kl_divergence(rounded, free) < LARGEST_DIVERGENCE[size]


def test_a_head_of_its_own_is_written_and_used(tiny, tmp_path):
    folder = tiny("E2B", "mobile")
    assert "output.weight" not in gguf_values(export(folder, tmp_path / "tied.gguf").path)
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (512, 64), generator=generator, dtype=torch.uint8)
    own = with_tensors(folder, tmp_path, lm_head__weight=packed)
    path = export(own, tmp_path / "own.gguf").path
    values = gguf_values(path)
    expected = exact(own, "E2B")["lm_head.weight"]
    assert (torch.from_numpy(values["output.weight"].copy()) - expected).abs().max() <= ROUNDED * expected.abs().max()
    weights = {
        name: torch.from_numpy(values[gguf_name(name)].copy()) for name in [*text_names("E2B"), "lm_head.weight"]
    }
    with gqk.load(path) as model:
        found = log_probs(model)
    logits = plain_logits("E2B", weights, {}, torch.float32)[-1].log_softmax(-1)
    assert kl_divergence(logits, found) < LARGEST_DIVERGENCE["E2B"]
    del weights["lm_head.weight"]
    tied = plain_logits("E2B", weights, {}, torch.float32)[-1].log_softmax(-1)
    assert kl_divergence(tied, found) > 2 * LARGEST_DIVERGENCE["E2B"]


def test_a_loaded_mobile_model_gives_the_file_of_its_folder(tiny, tmp_path):
    folder = tiny("E2B", "mobile")
    with gqk.load(folder, engine="transformers") as model:
        found = export(model, tmp_path / "model.gguf").path.read_bytes()
    assert found == export(folder, tmp_path / "folder.gguf").path.read_bytes()


def test_tiny_scales_are_kept_as_well_as_float16_can_and_counted(tiny, tmp_path):
    scale = load_file(tiny("E2B", "mobile") / "model.safetensors")[Q_PROJ + ".weight_scale"]
    scale[:3] = torch.tensor([[1e-6], [3e-9], [0.0]])
    folder = with_tensors(tiny("E2B", "mobile"), tmp_path, **{Q_PROJ.replace(".", "__") + "__weight_scale": scale})
    made = export(folder, tmp_path / "a.gguf")
    found = gguf_values(made.path)["blk.0.attn_q.weight"]
    expected = exact(folder, "E2B")[Q_PROJ + ".weight"].numpy()
    assert np.abs(found - expected)[:3].max() <= 8 * 2.0**-25  # half of float16's smallest step, and codes up to 8
    assert any(note.startswith("2 of ") and "moved by" in note for note in made.notes)


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_a_scale_that_float16_cannot_hold_is_refused_by_name(tiny, tmp_path, value):
    scale = load_file(tiny("E2B", "mobile") / "model.safetensors")[Q_PROJ + ".weight_scale"]
    scale[5] = value
    folder = with_tensors(tiny("E2B", "mobile"), tmp_path, **{Q_PROJ.replace(".", "__") + "__weight_scale": scale})
    with pytest.raises(BadTensorError, match=r"q_proj\.weight_scale\[5, 0\] is .*at most 65,504"):
        export(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        (Q_PROJ + ".weight", (128, 100), torch.uint8, r"in codes of 2, 4 or 8 bits"),
        (Q_PROJ + ".weight", (64, 128), torch.uint8, r"in codes of 2, 4 or 8 bits"),
        (Q_PROJ + ".weight", (128, 256), torch.uint8, r"in codes of 2, 4 or 8 bits"),
        (Q_PROJ + ".weight_scale", (127, 1), torch.float32, r"has scales of shape \(127, 1\)"),
        (Q_PROJ + ".weight_scale", (128, 3), torch.float32, r"has scales of shape \(128, 3\)"),
    ],
)
def test_codes_and_scales_of_another_shape_are_refused(tiny, tmp_path, name, shape, dtype, words):
    folder = with_tensors(tiny("E2B", "mobile"), tmp_path, **{name.replace(".", "__"): torch.ones(shape).to(dtype)})
    with pytest.raises(BrokenCheckpointError, match=words):
        export(folder, tmp_path / "a.gguf")


def test_slices_narrower_than_a_group_are_refused(tiny, tmp_path):
    name = Q_PROJ.replace(".", "__") + "__weight_scale"
    folder = with_tensors(tiny("E2B", "mobile"), tmp_path, **{name: torch.ones(128, 16)})
    with pytest.raises(BadTensorError, match=r"a scale for every 16 weights.*float32"):
        export(folder, tmp_path / "a.gguf")
    export(folder, tmp_path / "a.gguf", "float32")


def test_mobile_codes_are_not_rounded_a_second_time(tiny, tmp_path):
    with pytest.raises(BadSettingError, match="holds mobile codes, which are kept"):
        export(tiny("E2B", "mobile"), tmp_path / "a.gguf", "q8_0")
    with pytest.raises(BadSettingError, match="without an importance matrix"):
        export(tiny("E2B", "mobile"), tmp_path / "a.gguf", importance={Q_PROJ: torch.ones(256)})


def test_a_mobile_file_can_take_its_description_from_a_gguf(tiny, tmp_path):
    folder = tiny("E2B", "mobile")
    like = export(folder, tmp_path / "like.gguf").path
    found = export(load_file(folder / "model.safetensors"), tmp_path / "found.gguf", like=like).path
    ours, theirs = gguf_values(found), gguf_values(like)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("bits", "device", "kind"), [(2, "cpu", "TQ2_0"), (2, "cuda", "Q2_K"), (4, "cpu", "Q4_0"), (8, "cpu", "Q8_0")]
)
def test_gguf_reads_the_groups_as_the_codes_under_their_scales(bits, device, kind):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 768), generator=generator, dtype=torch.int8)
    scale = torch.rand(7, 3, generator=generator)
    packed = mobile.pack(codes, bits)
    weight = MobileWeight(*(in_memory(name, value) for name, value in (("w", packed), ("s", scale))), (7, 768), device)
    assert weight.ggml_type == kind
    groups = np.concatenate(list(reblocked(weight, ScaleTally())))
    found = gguf.quants.dequantize(groups, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, mobile.dequantize(codes, scale.half().float()).numpy())


def in_memory(name, tensor):
    return Weight(name, tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop])
