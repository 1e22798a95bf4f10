"""The planned key/value cache against the caches that the engines really make."""

import pytest
import torch

from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.load import load
from gemma_qat_kit.memory.key_values import kv_cache_bytes
from gemma_qat_kit.memory.network import read_network
from gemma_qat_kit.memory.parts import KEY_VALUES
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.testing import tiny_config, write_tiny_checkpoint

MIB = 2**20


@pytest.fixture(scope="module", params=GEMMA_SIZES)
def tiny(request, tmp_path_factory):
    path = write_tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "c", request.param, "bf16")
    with load(path, device="cpu", report=lambda progress: None) as model:
        yield model.hf[0], read_network(tiny_config(request.param)["text_config"])


def real_bytes(model, length, batch_size, chunk):
    cache, ids = None, torch.randint(5, 200, (batch_size, length))
    with torch.inference_mode():
        for part in ids.split(chunk, dim=1):
            cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if layer.keys is not None]
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("length", [3, 7, 8, 9, 30])  # the tiny models' window is 8
@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 64), (2, 4)])
def test_transformers_keeps_what_is_planned(tiny, length, batch_size, chunk):
    model, network = tiny
    assert kv_cache_bytes(network, length, batch_size=batch_size) == real_bytes(model, length, batch_size, chunk)


@pytest.mark.parametrize(
    ("size", "at_8k", "at_128k"),
    [("E2B", 54, 774), ("E4B", 148, 2068), ("12B", 448, 2368), ("26B-A4B", 360, 2760), ("31B", 1440, 11040)],
)
def test_at_full_size_it_is_what_the_shapes_say(size, at_8k, at_128k):
    network = read_network(hf_config(size)["text_config"])
    own = [layer for layer in network.layers if not (layer.is_shared or layer.is_full)]
    one_less = sum(4 * layer.key for layer in own)  # transformers keeps a window less one token
    assert kv_cache_bytes(network, 8192) == at_8k * MIB - one_less
    assert kv_cache_bytes(network, 131_072) == at_128k * MIB - one_less


# What llama.cpp itself prints on loading: "KV buffer size", of the full layers and of the sliding ones.
@pytest.mark.parametrize(
    ("size", "length", "full", "sliding"),
    [("E2B", 512, 3, 6), ("E2B", 2000, 12, 12), ("E2B", 8192, 48, 12), ("E4B", 2048, 32, 40), ("E4B", 32_768, 512, 40)],
)
def test_llama_cpp_allocates_what_is_planned(size, length, full, sliding):
    network = read_network(hf_config(size)["text_config"])
    assert kv_cache_bytes(network, length, engine="llama_cpp") == (full + sliding) * MIB


@pytest.mark.parametrize("length", [1000, 4096])
def test_q8_0_takes_34_bytes_for_32_values(length):
    bf16, q8_0 = (plan_memory("E4B", "q4_0", context_length=length, kv_format=f).parts[KEY_VALUES]
                  for f in ("bf16", "q8_0"))  # fmt: skip
    assert q8_0 / bf16 == 34 / 64


def test_the_built_in_model_keeps_keys_and_values_of_all_its_layers():
    # config.json of SmolLM2-135M: 30 layers, 3 key/value heads of 64, kept as float16 in llama.cpp
    plans = [plan_memory(BUILT_IN_SIZE, format, context_length=1024) for format in ("q4_1", "float32")]
    assert [plan.parts[KEY_VALUES] for plan in plans] == [1024 * 30 * 3 * 64 * 2 * width for width in (2, 4)]


def test_batches_multiply_it():
    one, four = (plan_memory("12B", "bf16", batch_size=count).parts[KEY_VALUES] for count in (1, 4))
    assert four == 4 * one
