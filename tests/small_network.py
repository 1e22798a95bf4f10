"""A Llama of two layers and random weights with a tokenizer of 512 pieces: a whole network, made in milliseconds."""

import torch

from gemma_qat_kit.testing import tiny_tokenizer

WIDTH, WORDS = 64, 512
TEXT = " ".join(f"the sky is blue and the user was {n} {n * n % 97} thought" for n in range(400))


def make_pair(seed=0, dtype=torch.float32, **changes):
    """Return a pair (module, tokenizer), as `prepare_qat` takes it; changes are of the config."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
              "initializer_range": 0.2, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
    torch.manual_seed(seed)
    module = LlamaForCausalLM(LlamaConfig(**config | changes)).to(dtype).eval()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return module, PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **names)


def quiet(progress):
    """Show nothing."""


def logits(module, rows=1, length=24):
    """Return the logits of a fixed random text, with more than one window of it."""
    ids = torch.randint(110, 500, (rows, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module(ids, use_cache=False).logits
