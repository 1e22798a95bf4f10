"""What a token reads, against the inventories of the files; and the limit that follows from the measured memory."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit import speed
from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.layouts import bf16_tensors, gguf_tensors, is_text, mobile_tensors
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.memory.traffic import kv_bytes_per_token, weight_bytes_per_token


def settings(size, format, engine="llama_cpp", **more):
    return MemorySettings(size, format, engine, "cpu", **more)


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_token_reads_the_file_without_its_table_and_idle_experts(size):
    config = hf_config(size)
    text = config["text_config"]
    sizes = {tensor.name: tensor.nbytes for tensor in gguf_tensors(config)}
    expected = sum(sizes.values()) - sizes.get("per_layer_token_embd.weight", 0)
    experts = sum(nbytes for name, nbytes in sizes.items() if "_exps.weight" in name)
    if experts:
        expected -= experts - experts * 8 // 128  # 8 of 128 experts, says the model card of 26B-A4B
        assert experts > 0.8 * sum(sizes.values())
    assert text["top_k_experts"] in (None, 8)
    assert weight_bytes_per_token(settings(size, "q4_0")) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("size", "gigabytes"), [("E2B", 1.4), ("E4B", 2.8), ("12B", 6.96), ("26B-A4B", 2.4)])
def test_the_bytes_of_a_token_are_those_that_others_count(size, gigabytes):
    # 12B: all of the published file but its keys, 6.98 GB; 26B-A4B: about 4 B parameters of 4.5 bits and a Q6_K head.
    assert weight_bytes_per_token(settings(size, "q4_0")) == pytest.approx(1e9 * gigabytes, rel=0.02)


def test_a_mobile_head_is_read_and_the_embeddings_are_looked_up():
    sizes = {t.name: t.nbytes for t in mobile_tensors(hf_config("E2B", "mobile")) if is_text(t.name)}
    looked_up = sum(n for name, n in sizes.items() if ".embedding_" in name)
    read = weight_bytes_per_token(settings("E2B", "mobile", "transformers"))
    assert sizes["lm_head.weight"] < read <= sum(sizes.values()) - looked_up  # and no keys that a layer shares
    assert read < weight_bytes_per_token(settings("E2B", "mobile"))  # llama.cpp's groups have scales of their own


def test_in_16_bits_it_is_two_bytes_a_weight():
    tensors = bf16_tensors(hf_config("12B"), has_shared_kv=False)
    expected = sum(t.nbytes for t in tensors if is_text(t.name))
    assert weight_bytes_per_token(settings("12B", "bf16", "transformers")) == expected


def test_fewer_bits_are_fewer_bytes():
    read = [weight_bytes_per_token(settings("E2B", format, "transformers")) for format in ("bf16", "int8", "nf4")]
    packed = [weight_bytes_per_token(settings("E2B", format)) for format in ("q4_0", "mobile")]
    assert sorted([*read, *packed], reverse=True) == [*read, *packed]
    assert weight_bytes_per_token(settings("E2B", "w4a16", "transformers")) == read[0]  # unpacked in memory
    in_blocks = weight_bytes_per_token(settings("E2B", "q4_0", "transformers"))
    assert packed[0] < in_blocks < read[0]  # its head is multiplied with in 16 bits
    built_in = [weight_bytes_per_token(settings("smollm2-135m", format)) for format in ("float32", "q4_1")]
    assert built_in == [4 * 134_515_008, 96_576_768]


def test_a_folder_of_its_own_config_counts_as_the_catalogs():
    own = settings("mine", "q4_0", config=hf_config("26B-A4B"))
    assert weight_bytes_per_token(own) == weight_bytes_per_token(settings("26B-A4B", "q4_0"))


def test_keys_and_values_grow_with_the_conversation_in_full_layers_only():
    # E2B: 7 layers see everything, 512 wide, 28 a window of 512 tokens, 256 wide; keys and values in 16 bits.
    for tokens, in_window in ((100, 100), (512, 512), (4096, 512)):
        expected = 2 * 2 * (7 * 512 * tokens + 28 * 256 * in_window)
        assert kv_bytes_per_token(settings("E2B", "q4_0"), tokens) == expected
    for kv_format, share in (("q8_0", 34 / 64), ("q4_0", 18 / 64)):
        found = kv_bytes_per_token(settings("E2B", "q4_0", kv_format=kv_format), 4096)
        assert found == pytest.approx(expected * share)


@pytest.fixture
def bandwidths(monkeypatch):
    """A machine that reads 10 GB/s of RAM and 300 GB/s on its GPU."""
    monkeypatch.setattr(speed, "ram_bandwidth", lambda: 1e10)
    monkeypatch.setattr(speed, "gpu_bandwidth", lambda device: {"cuda:0": 3e11}[device])


class Device(str):
    type = "cuda"


def model_of(size, format, engine, **runner):
    runner = SimpleNamespace(name=engine, context_length=4096, **runner)
    return gqk.Model(size, format, None, runner)


def test_the_limit_is_bandwidth_over_bytes(bandwidths):
    limit = gqk.speed_limit(model_of("E2B", "q4_0", "llama_cpp"), num_tokens=4096)
    assert limit.bytes_per_token == limit.weight_bytes + limit.kv_bytes == pytest.approx(1.48e9, rel=0.01)
    assert limit.tokens_per_second * limit.bytes_per_token == pytest.approx(1e10)
    assert str(limit) == "at most 6.76 tokens/s: 1.38 GiB a token, RAM read at 10 GB/s (measured)"
    assert gqk.speed_limit(model_of("E2B", "mobile", "llama_cpp")).tokens_per_second > 9


def test_on_a_gpu_it_is_the_gpus_memory(bandwidths):
    limit = gqk.speed_limit(model_of("E2B", "bf16", "transformers", device=Device("cuda:0")))
    assert (limit.bytes_per_second, limit.place) == (3e11, "GPU memory")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(None, "endpoint", "endpoint", model="served"), "What a token of served reads is not known"),
        (model_of(None, "q4_0", "llama_cpp"), "What a token of custom q4_0 reads is not known"),
    ],
)
def test_what_nobody_knows_is_refused(model, words):
    with pytest.raises(BadSettingError, match=words):
        gqk.speed_limit(model)


@pytest.mark.parametrize("num_tokens", [0, 4097, 1.5, True])
def test_more_tokens_than_the_context_are_refused(bandwidths, num_tokens):
    with pytest.raises(BadSettingError, match="num_tokens="):
        gqk.speed_limit(model_of("E2B", "q4_0", "llama_cpp"), num_tokens=num_tokens)


def test_the_memory_is_measured_without_torch_once():
    code = "import sys; from gemma_qat_kit.speed import ram_bandwidth as measure; first = measure();"
    code += "print(first, measure() == first, 'torch' in sys.modules, measure.cache_info().misses)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert answer[1:] == ["True", "False", "1"]
    assert 1e7 < float(answer[0]) < 1e13  # slower than a disk or faster than any memory would be a mistake


def test_every_byte_is_read_whatever_the_number_of_threads(monkeypatch):
    seen = []

    class Values(list):
        def __getitem__(self, index):
            piece = super().__getitem__(index)
            return SimpleNamespace(max=lambda: seen.append(piece), __len__=lambda: 0)

    for num_threads in (1, 3):
        seen.clear()
        monkeypatch.setattr(speed, "len", lambda value: 1000 if isinstance(value, Values) else 0, raising=False)
        assert speed._seconds_to_read(Values(range(1000)), num_threads) > 0
        assert sorted(number for piece in seen for number in piece) == list(range(1000))


@pytest.mark.parametrize(("cache", "free", "expected"), [("32768K", None, 2**28), ("512000K", None, 2**29),
                                                         ("none", 2**28, 2**26), ("none", 1, 2**24)])  # fmt: skip
def test_more_is_read_than_a_cache_holds_and_less_than_is_free(monkeypatch, tmp_path, cache, free, expected):
    (tmp_path / "size").write_text(cache)
    monkeypatch.setattr(speed, "_LAST_CACHE", tmp_path / "size")
    monkeypatch.setattr(speed, "read_memory", lambda: (None, free))
    assert speed._bytes_to_read() == expected


@pytest.mark.gpu
def test_a_gpus_memory_is_measured_by_copies():
    assert 1e10 < speed.gpu_bandwidth("cuda") < 2e13
