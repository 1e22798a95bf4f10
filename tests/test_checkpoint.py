"""What lies at a path: every layout is recognised, with its size and its bytes."""

import shutil
import struct

import pytest
from small_files import ARRAY, GEMMA, U32, key, write_gguf

from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES, hf_config
from gemma_qat_kit.checkpoint import inspect_checkpoint
from gemma_qat_kit.layouts import bf16_tensors, gguf_tensors, is_text, mobile_tensors, w4a16_tensors
from gemma_qat_kit.testing import tiny_config

LAYOUTS = [
    *((size, format) for size in GEMMA_SIZES for format in ("bf16", "q4_0-unquantized", "q4_0")),
    *((size, "w4a16") for size in GEMMA_SIZES if size != "26B-A4B"),
    *((size, "mobile") for size in MOBILE_SIZES),
]


def expected_tensors(size, format):
    if format == "q4_0-unquantized":
        return bf16_tensors(tiny_config(size), has_shared_kv=False)
    layouts = {"bf16": bf16_tensors, "w4a16": w4a16_tensors, "mobile": mobile_tensors, "q4_0": gguf_tensors}
    return layouts[format](tiny_config(size, format if format in ("w4a16", "mobile") else "bf16"))


@pytest.mark.parametrize(("size", "format"), LAYOUTS)
def test_every_layout_is_recognised_with_its_bytes(tiny, size, format):
    path, tensors = tiny(size, format), list(expected_tensors(size, format))
    found = inspect_checkpoint(path)
    everything = sum(tensor.nbytes for tensor in tensors)
    is_gguf = format == "q4_0"
    assert (found.path, found.format, found.size) == (path, format, None)
    assert found.engine == ("llama_cpp" if is_gguf else "transformers")
    assert found.all_bytes == everything
    assert found.text_bytes == (everything if is_gguf else sum(t.nbytes for t in tensors if is_text(t.name)))
    tables = sum(t.nbytes for t in tensors if t.name == "per_layer_token_embd.weight")
    assert found.looked_up_bytes == tables
    assert (tables > 0) == (is_gguf and size in MOBILE_SIZES)


def test_a_folder_with_one_gguf_is_that_gguf(tiny):
    path = tiny("E2B", "q4_0")
    assert inspect_checkpoint(path.parent) == inspect_checkpoint(str(path)) == inspect_checkpoint(path)


def test_the_built_in_model_is_recognised(built_in):
    found = inspect_checkpoint(built_in)
    assert (found.size, found.format, found.engine) == ("smollm2-135m", "q4_1", "llama_cpp")
    assert found.looked_up_bytes == 0
    assert 0.95 * built_in.stat().st_size < found.all_bytes < built_in.stat().st_size  # the rest is the tokenizer


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_published_shape_gives_the_size(folder, size):
    assert inspect_checkpoint(folder(hf_config(size))).size == size


def test_a_shape_that_is_no_number_gives_no_size(folder):
    text = {"hidden_size": [1536], "num_hidden_layers": "35"}
    assert inspect_checkpoint(folder(GEMMA | {"text_config": text})).size is None


def test_text_bytes_leave_out_the_towers(folder):
    found = inspect_checkpoint(folder())
    assert (found.text_bytes, found.all_bytes) == (8 * 4, 12 * 4)


W4A16 = hf_config("12B", "w4a16")["quantization_config"]


@pytest.mark.parametrize(
    ("quantization", "format"),
    [
        (None, "bf16"),
        ({}, "bf16"),
        ({"num_bits": 4, "quantize_embeddings": True}, "q4_0-unquantized"),
        ({"quant_method": "gemma"}, "mobile"),
        (W4A16, "w4a16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    ],
)
def test_the_config_says_the_format(folder, quantization, format):
    assert inspect_checkpoint(folder(GEMMA | {"quantization_config": quantization})).format == format


def test_the_name_of_the_repository_says_that_bf16_weights_are_qat(tmp_path, folder):
    place = tmp_path / "models--google--gemma-4-E2B-it-qat-q4_0-unquantized" / "snapshots" / "0123abcd"
    shutil.copytree(folder(), place)
    assert inspect_checkpoint(place).format == "q4_0-unquantized"


def test_a_projector_beside_a_model_is_not_taken_for_one(tiny, tmp_path):
    (tmp_path / "gemma-4-12B-it-mmproj.gguf").write_bytes(b"not looked at")
    shutil.copy(tiny("12B", "q4_0"), tmp_path / "model.gguf")
    assert inspect_checkpoint(tmp_path).path == tmp_path / "model.gguf"


@pytest.mark.parametrize(("kind", "format"), [(2, "q4_0"), (12, "q4_k"), (30, "bf16"), (999, "unknown")])
def test_the_type_of_most_matrices_is_the_format(tmp_path, kind, format):
    assert inspect_checkpoint(write_gguf(tmp_path / "some.gguf", kind=kind)).format == format


def test_a_gguf_whose_width_is_a_list_has_no_size(tmp_path):
    width = key("gemma4.embedding_length", ARRAY, struct.pack("<IQI", U32, 1, 1536))
    assert inspect_checkpoint(write_gguf(tmp_path / "some.gguf", keys=[width])).size is None
