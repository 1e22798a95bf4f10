"""The numbers of a text model that its memory depends on, layer by layer, whatever the model."""

import functools
from dataclasses import dataclass

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.parameters import layer_geometry

# HuggingFaceTB/SmolLM2-135M-Instruct's config.json, under Gemma's names where the two differ.
_BUILT_IN = {
    "attention_k_eq_v": False, "enable_moe_block": False, "global_head_dim": 64, "head_dim": 64, "hidden_size": 576,
    "hidden_size_per_layer_input": 0, "intermediate_size": 1536, "layer_types": ["full_attention"] * 30,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_global_key_value_heads": None,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "num_kv_shared_layers": 0, "sliding_window": 8192,
    "use_double_wide_mlp": False, "vocab_size": 49_152,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer: widths of its parts, in values per token.

    Attributes:
        query: All heads' queries.
        key: All heads' keys; as many values.
        mlp: Of the dense feed-forward network.
        experts: Hidden values of the experts that a token is sent to.
        num_experts: Of those.
        is_full: It attends to the whole context.
        is_shared: It reads another layer's keys and values.
        has_values: It has a projection for values.
    """

    query: int
    key: int
    mlp: int
    experts: int
    num_experts: int
    is_full: bool
    is_shared: bool
    has_values: bool


@dataclass(frozen=True)
class Network:
    """A text model.

    Attributes:
        hidden: Width of the residual stream.
        vocab: Words.
        per_layer: Width of one layer's slice of the per-layer embeddings, 0 without them.
        window: Tokens that a sliding layer attends to.
        longest_context: Most tokens it takes.
        layers: Its layers.
        is_gemma: Norms behind attention and MLP, too, and on queries, keys and values.
    """

    hidden: int
    vocab: int
    per_layer: int
    window: int
    longest_context: int
    layers: tuple[Layer, ...]
    is_gemma: bool


def read_network(text: dict, *, is_gemma: bool = True) -> Network:
    """Return the numbers of a config.json's `text_config`."""
    return Network(
        text["hidden_size"],
        text["vocab_size"],
        text["hidden_size_per_layer_input"],
        text["sliding_window"],
        text["max_position_embeddings"],
        tuple(_layer(text, index) for index in range(text["num_hidden_layers"])),
        is_gemma,
    )


def find_network(settings: MemorySettings) -> Network:
    """Return the numbers of the model that a plan is for."""
    return read_network(settings.config["text_config"]) if settings.config else _of_size(settings.size)


@functools.cache
def _of_size(size: str) -> Network:
    if size == BUILT_IN_SIZE:
        return read_network(_BUILT_IN, is_gemma=False)
    return read_network(hf_config(size)["text_config"])


def _layer(text: dict, index: int) -> Layer:
    head_dim, kv_heads, mlp, is_shared = layer_geometry(text, index)
    is_full = text["layer_types"][index] == "full_attention"
    num_experts = text["top_k_experts"] if text["enable_moe_block"] else 0
    return Layer(
        query=text["num_attention_heads"] * head_dim,
        key=kv_heads * head_dim,
        mlp=mlp,
        experts=num_experts * text["moe_intermediate_size"] if num_experts else 0,
        num_experts=num_experts,
        is_full=is_full,
        is_shared=is_shared,
        has_values=not (text["attention_k_eq_v"] and is_full),
    )
