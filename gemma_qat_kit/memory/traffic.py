"""The bytes that one new token makes an engine read: the least that it can do with, whatever the machine."""

import functools
from dataclasses import replace

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.layouts import Tensor, is_text
from gemma_qat_kit.memory.network import Network, find_network
from gemma_qat_kit.memory.parts import TABLE
from gemma_qat_kit.memory.settings import KV_FORMATS, MemorySettings
from gemma_qat_kit.memory.weights import BUILT_IN_PARAMETERS, BUILT_IN_TENSOR_BYTES, part_of, tensors_in_memory

_TOKEN_TABLES = ("token_embd.weight", "embed_tokens.")
_HEADS = ("output.weight", "lm_head.")


def weight_bytes_per_token(settings: MemorySettings) -> int:
    """Return the bytes of the weights that a token is multiplied with.

    Every matrix once, the head included. Not what is looked up (the per-layer embeddings, the token embeddings where
    the head is another tensor), and of experts only those that a token is sent to.
    """
    if settings.size == BUILT_IN_SIZE:
        return 4 * BUILT_IN_PARAMETERS if settings.format == "float32" else BUILT_IN_TENSOR_BYTES
    if settings.config:
        return _weight_bytes(settings)
    # What else is set changes nothing, and one sum is enough for a whole chat.
    return _of_size(MemorySettings(settings.size, settings.format, settings.engine, "cpu"))


@functools.cache
def _of_size(settings: MemorySettings) -> int:
    config = hf_config(settings.size, settings.format if settings.format == "mobile" else "bf16")
    return _weight_bytes(replace(settings, config=config))


def _weight_bytes(settings: MemorySettings) -> int:
    config = settings.config
    everything = tensors_in_memory(config, settings.format, settings.engine, settings.device)
    tensors = [(tensor, nbytes) for tensor, nbytes in everything if _is_multiplied(tensor)]
    if any(_starts(tensor, _HEADS) for tensor, _ in tensors):
        tensors = [(tensor, nbytes) for tensor, nbytes in tensors if not _starts(tensor, _TOKEN_TABLES)]
    return round(sum(nbytes * _share(tensor, config["text_config"]) for tensor, nbytes in tensors))


def _is_multiplied(tensor: Tensor) -> bool:
    is_of_text = not tensor.name.startswith("model.") or is_text(tensor.name)
    return is_of_text and part_of(tensor.name) != TABLE


def _starts(tensor: Tensor, names: tuple[str, ...]) -> bool:
    return tensor.name.removeprefix("model.language_model.").startswith(names)


def _share(tensor: Tensor, text: dict) -> float:
    """Return the share of a tensor that one token needs: some of its experts."""
    is_of_experts = "_exps." in tensor.name or ".experts." in tensor.name
    return text["top_k_experts"] / text["num_experts"] if is_of_experts else 1.0


def kv_bytes_per_token(settings: MemorySettings, num_tokens: int) -> int:
    """Return the bytes of keys and values that the next token attends to, `num_tokens` into a conversation.

    A layer that shares another's reads them again.
    """
    network: Network = find_network(settings)
    values = sum(2 * layer.key * (num_tokens if layer.is_full else min(num_tokens, network.window))
                 for layer in network.layers)  # fmt: skip
    return round(values * (4 if settings.format == "float32" else KV_FORMATS[settings.kv_format]))
