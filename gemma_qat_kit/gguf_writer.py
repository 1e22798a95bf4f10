"""Write a Gemma 4 GGUF: llama.cpp's metadata keys from a Hugging Face config, then tensors one at a time.

Source of the keys: llama.cpp's `conversion/gemma.py` and `src/models/gemma4.cpp`, and the keys of Google's own files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.layouts import Tensor
from gemma_qat_kit.parameters import layer_geometry

_NORMAL, _CONTROL, _BYTE = 1, 3, 6  # gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF stores of a tokenizer.

    Attributes:
        tokens: Every piece, by id.
        merges: Byte-pair merges as "left right", in order.
        token_types: gguf.TokenType of each piece.
        chat_template: Jinja source.
        eos_token_id: The id that ends a turn.
    """

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    chat_template: str
    eos_token_id: int

    @classmethod
    def from_tokenizer_json(cls, tokenizer: dict, chat_template: str, eos_token_id: int) -> "Vocabulary":
        """Read the content of a tokenizer.json."""
        ids = dict(tokenizer["model"]["vocab"])
        special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
        ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        tokens = sorted(ids, key=ids.__getitem__)
        kinds = [_CONTROL if t in special else _BYTE if _is_byte(t) else _NORMAL for t in tokens]
        merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
        return cls(tokens, merges, kinds, chat_template, eos_token_id)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def metadata(config: dict) -> dict:
    """Return llama.cpp's keys for a Gemma 4 config, without the `gemma4.` prefix."""
    text = config["text_config"]
    layers = [layer_geometry(text, index) for index in range(text["num_hidden_layers"])]
    widths, kv_heads = [mlp for _, _, mlp, _ in layers], [heads for _, heads, _, _ in layers]
    rope = text["rope_parameters"]
    keys = {
        "block_count": text["num_hidden_layers"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": widths if len(set(widths)) > 1 else widths[0],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "attention.key_length": text["global_head_dim"],
        "attention.value_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "final_logit_softcapping": text["final_logit_softcapping"],
        "attention.sliding_window": text["sliding_window"],
        "attention.shared_kv_layers": text["num_kv_shared_layers"],
        "embedding_length_per_layer_input": text["hidden_size_per_layer_input"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in text["layer_types"]],
        "rope.dimension_count": text["global_head_dim"],
        "rope.dimension_count_swa": text["head_dim"],
    }
    if text["enable_moe_block"]:
        keys |= {
            "expert_count": text["num_experts"],
            "expert_used_count": text["top_k_experts"],
            "expert_feed_forward_length": text["moe_intermediate_size"],
        }
    return keys


def rope_frequencies(config: dict) -> Iterator[float]:
    """Yield the divisors of the full-attention rotary frequencies: 1 where a dimension rotates, else 1e30."""
    text = config["text_config"]
    half = text["global_head_dim"] // 2
    rotating = int(half * text["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    yield from (1.0 if i < rotating else 1e30 for i in range(half))


def write_gguf(path: Path, config: dict, vocabulary: Vocabulary, tensors: Iterable[tuple[Tensor, object]]) -> None:
    """Write a GGUF file, asking for one tensor's data at a time.

    Args:
        path: The file to write.
        config: A Gemma 4 config.json (see `architectures.hf_config`).
        vocabulary: The tokenizer.
        tensors: Pairs of a tensor's description and a function without arguments that returns its data as a numpy
            array: float32 for F32, otherwise the uint8 bytes with the last axis in bytes.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for key, value in metadata(config).items():
        _add(writer, f"gemma4.{key}", value)
    _add_vocabulary(writer, vocabulary)
    pending = list(tensors)
    for tensor, _ in pending:
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if tensor.dtype != "F32" else tensor.shape
        dtype = gguf_numpy_dtype(tensor.dtype)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data in pending:
        writer.write_tensor_data(data())
    writer.close()


def gguf_numpy_dtype(dtype: str):
    """Return the numpy dtype in which a tensor of a ggml type is handed over."""
    import numpy as np

    return np.dtype(np.float32 if dtype == "F32" else np.uint8)


def _add(writer, key: str, value) -> None:
    """Add a key with the type that llama.cpp reads: bool, uint32, float32, or an array of these."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_vocabulary(writer, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores([0.0] * len(vocabulary.tokens))
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(vocabulary.eos_token_id)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(vocabulary.chat_template)
