"""What lies at a path and is damaged, unsafe or foreign is refused by name, in three parts."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from small_files import GEMMA, write_gguf

from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.checkpoint import inspect_checkpoint, read_config
from gemma_qat_kit.errors import BrokenCheckpointError, UnsafeCheckpointError

AGAIN = "Download it again; what is there already is kept."
W4A16 = hf_config("12B", "w4a16")["quantization_config"]
EIGHT_BITS = json.loads(json.dumps(W4A16).replace('"num_bits": 4', '"num_bits": 8'))


def refusal(path, kind=BrokenCheckpointError, name=None):
    """Inspect a path, expect a refusal in three parts that names it, and return the refusal."""
    with pytest.raises(kind) as caught:
        inspect_checkpoint(path)
    assert all(part and part[-1] in ".)" for part in (caught.value.wrong, caught.value.allowed, caught.value.next_step))
    assert str(name or path) in caught.value.wrong
    return caught.value


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"quant_method": ["gemma"]}, "['gemma']"),
        (W4A16 | {"format": "float-quantized"}, "'compressed-tensors' (float-quantized)"),
        (EIGHT_BITS, "'compressed-tensors' (pack-quantized)"),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, "'compressed-tensors' (None)"),
    ],
)
def test_an_unknown_quantization_is_refused(folder, quantization, named):
    error = refusal(folder(GEMMA | {"quantization_config": quantization}))
    assert named in error.wrong
    assert "w4a16" in error.allowed


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    error = refusal(tmp_path / "gone.gguf")
    assert error.wrong.endswith("does not exist.")
    assert error.next_step == "Check the spelling."


@pytest.mark.parametrize("name", ["empty.gguf", "empty", "notes.txt"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    assert "it is not a GGUF file" in refusal(tmp_path / name).wrong


def test_an_empty_folder_is_refused(tmp_path):
    assert "holds no weights" in refusal(tmp_path).wrong


def test_several_ggufs_in_a_folder_are_named(tiny, tmp_path):
    for name in ("b.gguf", "a.gguf"):
        shutil.copy(tiny("12B", "q4_0"), tmp_path / name)
    assert "holds 2 GGUF models: a.gguf, b.gguf." in refusal(tmp_path).wrong


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    error = refusal(write_gguf(tmp_path / "some.gguf", "qwen3"))
    assert "'qwen3'" in error.wrong
    assert error.allowed == "The kit loads gemma4 and llama."


@pytest.mark.parametrize("kind", ["llama", "gemma3", None])
def test_a_folder_of_another_architecture_is_refused(folder, kind):
    error = refusal(folder(GEMMA | {"model_type": kind}))
    assert repr(kind) in error.wrong
    assert error.next_step == "Pick a checkpoint from gqk.catalog()."


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_drafter_alone_is_refused(tiny, size):
    error = refusal(tiny(size, "drafter"))
    assert "is an MTP drafter" in error.wrong
    assert "drafter=True" in error.next_step


def test_a_folder_without_config_is_refused(folder):
    assert "has no config.json" in refusal(folder(config=None)).wrong


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "it is not JSON"),
        ('{"model_type": "gemma4"', "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[1, 2]", "it is not a JSON object"),
        ('{"model_type": "gemma4"}', "its text_config or quantization_config is not a JSON object"),
        (json.dumps(GEMMA | {"text_config": "x"}), "its text_config or quantization_config is not a JSON object"),
        (json.dumps(GEMMA | {"quantization_config": [1]}), "its text_config or quantization_config is not a JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, content, what):
    path = folder(content)
    assert what in refusal(path, name=path / "config.json").wrong


def test_a_config_that_is_not_text_is_refused(folder):
    (folder() / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BrokenCheckpointError, match=r"config\.json cannot be read: it is not JSON"):
        read_config(folder(config=None))


def broken(content, start):
    """Name the ways in which a safetensors file can be damaged, each with its bytes."""
    return {
        "empty": b"",
        "cut in the length": content[:5],
        "cut in the header": content[: start // 2],
        "cut in the data": content[:-3],
        "longer than it says": content + b"x",
        "garbage": b"\x00\xff" * 500,
        "a header of terabytes": struct.pack("<Q", 2**42) + content[8:],
        "a header that is not JSON": content[:8] + b"[" * (start - 8) + content[start:],
    }


@pytest.mark.parametrize("damage", broken(b"", 0))
def test_damaged_safetensors_are_refused(folder, damage):
    path = folder() / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(broken(content, 8 + struct.unpack("<Q", content[:8])[0])[damage])
    error = refusal(path.parent, name=path)
    assert "it is damaged or cut short (" in error.wrong
    assert error.next_step == "Delete it and download it again."


def test_values_of_a_type_that_no_checkpoint_has_are_refused(folder):
    path = folder(dtype=np.float64)
    assert "holds values of type F64" in refusal(path, name=path / "model.safetensors").wrong


def sharded(path, weight_map):
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    content = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(content)
    return path


def test_every_file_of_an_index_is_counted(folder):
    path = sharded(folder(), dict(zip("ab", (f"model-0000{n}-of-00002.safetensors" for n in (1, 2)), strict=True)))
    assert "lacks model-00002-of-00002.safetensors" in refusal(path).wrong
    assert refusal(path).next_step == AGAIN
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    assert inspect_checkpoint(path).all_bytes == 2 * 12 * 4


def test_several_files_without_an_index_are_refused(folder):
    error = refusal(folder(name="model-00001-of-00002.safetensors"))
    assert "holds model-00001-of-00002.safetensors without an index." in error.wrong
    assert error.next_step == AGAIN


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "x"}}', "[" * 10**5]
)
def test_an_index_that_lists_no_files_is_refused(folder, content):
    path = sharded(folder(), content)
    assert "it does not list the files" in refusal(path, name=path / "model.safetensors.index.json").wrong


@pytest.mark.parametrize(
    "name",
    ["../../etc/x", "../model.safetensors", "/etc/model.safetensors", "..", "", "a\\b.safetensors", "model.bin", 7],
)
def test_an_index_cannot_lead_out_of_the_folder(folder, name):
    path = folder()
    shutil.copy(path / "model.safetensors", path.parent / "model.safetensors")
    sharded(path, {"a": name})
    assert (
        "names something else than files beside it" in refusal(path, name=path / "model.safetensors.index.json").wrong
    )


def test_an_index_of_nothing_is_refused(folder):
    path = sharded(folder(), {})
    assert "names something else" in refusal(path, name=path / "model.safetensors.index.json").wrong


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PTH", "a.pkl", "last.ckpt"])
def test_a_pickle_is_refused_as_folder_and_as_file(folder, name):
    path = folder(name=None)
    (path / name).write_bytes(b"\x80\x04.")
    for asked in (path, path / name):
        error = refusal(asked, UnsafeCheckpointError, path / name)
        assert "Python pickle" in error.wrong
        assert "run any code" in error.allowed
        assert "safetensors or GGUF" in error.next_step


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder() / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert inspect_checkpoint(folder()).format == "bf16"


def test_one_file_of_a_folder_leads_to_its_folder(folder):
    error = refusal(folder() / "model.safetensors")
    assert str(folder()) in error.next_step


@pytest.mark.parametrize("name", ["exists", "open", "stat"])
def test_what_may_not_be_read_is_said(tiny, monkeypatch, name):
    path = tiny("12B", "q4_0")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, name, refuse)
    error = refusal(path)
    assert error.wrong == f"{path} cannot be read: Permission denied."
    assert "permissions" in error.next_step


def test_an_unknown_user_is_said():
    assert "cannot be read" in refusal("~no-such-user-here/model.gguf").wrong


def test_a_device_is_no_checkpoint():
    assert "cannot be read: Not a directory" in refusal("/dev/null").wrong
