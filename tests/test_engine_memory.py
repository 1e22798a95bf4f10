"""What the engines do to take less memory, against what they would answer without it; and what they say they hold."""

import pytest
import torch
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.engines import transformers_mobile, transformers_stream
from gemma_qat_kit.formats import mobile

PROMPT = "the sky is blue and the system was the model user " * 2  # the window of the tiny models is 8 tokens


def answer(model, monkeypatch, chunk):
    """Return the reply to a long prompt that is read in chunks, and the lengths of what the network was given."""
    monkeypatch.setattr(transformers_stream, "PREFILL_CHUNK", chunk)
    lengths = []
    hook = model.hf[0].register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    reply = model.generate(PROMPT, max_new_tokens=24, temperature=0)
    hook.remove()
    return reply, lengths


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_a_prompt_read_in_chunks_is_answered_like_the_whole(tiny, monkeypatch, size):
    with gqk.load(tiny(size, "bf16")) as model:
        model.hf[0].float()  # in bf16 random weights give ties, which a chunk may break the other way
        whole, lengths = answer(model, monkeypatch, 4096)
        assert lengths[0] == whole.prompt_tokens > 24
        for chunk in (5, 8, 16):
            reply, lengths = answer(model, monkeypatch, chunk)
            assert (reply.text, reply.new_tokens) == (whole.text, whole.new_tokens)
            assert max(lengths) == chunk
            assert sum(lengths) == whole.prompt_tokens + whole.new_tokens - 1


def test_the_built_in_network_reads_in_chunks_too(monkeypatch):
    with gqk.load("smollm2-135m", "float32") as model:
        whole, chunked = (answer(model, monkeypatch, chunk)[0] for chunk in (4096, 7))
    assert chunked.text == whole.text


def linear(num_bits, n_in, n_out, *, is_static):
    """Return a packed layer of the library with random codes, and scales for its activations where `is_static`."""
    generator = torch.Generator().manual_seed(num_bits)
    layer = QuantizedLinear(n_in, n_out, num_bits=num_bits).requires_grad_(False)
    top = 2 ** (num_bits - 1)
    layer.weight.data = mobile.pack(torch.randint(-top, top, (n_out, n_in), generator=generator), num_bits)
    layer.weight_scale.data = 0.05 * torch.rand(n_out, 1, generator=generator)
    layer.input_activation_scale.data.fill_(0.03 * is_static)
    layer.output_activation_scale.data.fill_(0.2 * is_static)
    return layer


@pytest.mark.parametrize("num_tokens", [1, transformers_mobile.FEW_TOKENS, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_bits", "is_static"), [(2, False), (4, True), (8, False)])
def test_a_large_packed_matrix_gives_the_same_bits_in_chunks(num_bits, is_static, dtype, num_tokens):
    layer = linear(num_bits, 1536, 3000, is_static=is_static)  # 4.6 million weights: two chunks, the second is short
    x = torch.randn(1, num_tokens, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = layer(x)
    transformers_mobile.unpack_in_chunks(layer)
    assert type(layer) is transformers_mobile.ChunkedLinear
    assert len(layer._chunks()) == 2
    assert torch.equal(layer(x), expected)


def test_a_matrix_too_large_to_be_whole_gives_the_same_products(monkeypatch):
    layer = linear(4, 1536, 3000, is_static=False)
    x = torch.randn(2, 70, 1536, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    transformers_mobile.unpack_in_chunks(layer)
    monkeypatch.setattr(transformers_mobile, "LARGEST_WHOLE", 0)
    torch.testing.assert_close(layer(x), expected)  # kernels may add up in another order


def test_a_small_packed_matrix_is_left_as_it_is():
    layer = linear(4, 1536, 256, is_static=False)
    transformers_mobile.unpack_in_chunks(layer)
    assert type(layer) is QuantizedLinear


def test_a_loaded_mobile_checkpoint_multiplies_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr(transformers_mobile, "UNPACK_CHUNK", 2**14)
    with gqk.load(tiny("E2B", "mobile"), engine="transformers") as model:
        network = model.hf[0]
        chunked = [m for m in network.modules() if type(m) is transformers_mobile.ChunkedLinear]
        assert network.lm_head in chunked
        assert len(chunked) > 50
        ids = torch.tensor([[2, 105, 93]])
        ours = network(ids).logits
        embeddings = network.get_input_embeddings()
        assert type(embeddings) is transformers_mobile.RowEmbedding
        for layer in chunked:
            layer.__class__ = QuantizedLinear
        embeddings.__class__ = QuantizedEmbedding
        assert torch.equal(ours, network(ids).logits)


@pytest.mark.parametrize("index", [3, (3, slice(None)), (3, 5), (None, None, slice(None), slice(None)), slice(2, 4)])
def test_a_row_of_packed_embeddings_is_that_of_the_whole(tiny, index):
    with gqk.load(tiny("E2B", "mobile"), engine="transformers") as model:
        embeddings = model.hf[0].get_input_embeddings()
        row, shape = embeddings.weight[index], embeddings.weight.shape
        embeddings.__class__ = QuantizedEmbedding
        assert torch.equal(row, embeddings.weight[index])
        assert shape == embeddings.weight.shape


def test_a_forward_unpacks_no_more_than_the_rows_of_its_tokens(tiny, monkeypatch):
    unpacked, original = [], QuantizedEmbedding._dequantize_weights

    def noted(self, codes, scale):
        unpacked.append(codes.shape[:-1].numel())
        return original(self, codes, scale)

    monkeypatch.setattr(QuantizedEmbedding, "_dequantize_weights", noted)
    with gqk.load(tiny("E2B", "mobile"), engine="transformers") as model:
        model.hf[0](torch.tensor([[2, 105, 93]]))
    assert sorted(unpacked) == [1, 3]  # the padding's row, which the network takes in any case, and the tokens'
