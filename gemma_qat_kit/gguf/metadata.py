"""The keys of a GGUF: made from a checkpoint's config.json and tokenizer.json, or copied from another GGUF.

Source of Gemma's keys: llama.cpp's `conversion/gemma.py` and `src/models/gemma4.cpp`, and those of Google's own files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.gguf.header import broken_file, read_keys
from gemma_qat_kit.parameters import layer_geometry

_NORMAL, CONTROL, USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # gguf.TokenType
# llama.cpp always shows these, because its chat parser reads them (`visible_tokens` in conversion/gemma.py).
ALWAYS_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
                 '<|"|>'}  # fmt: skip
DRAFTER_ARCHITECTURE = "gemma4-assistant"
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}
_OF_THE_FILE = ("split.", "general.architecture", "general.alignment", "general.file_type",
                "general.quantization_version")  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """What a GGUF says of its model.

    Attributes:
        architecture: llama.cpp's name of the network, such as "gemma4".
        keys: Full key to (value, gguf's type of it, type of an array's items or None to infer it).
    """

    architecture: str
    keys: dict[str, tuple]


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF stores of a tokenizer.

    Attributes:
        tokens: Every piece, by id.
        merges: Byte-pair merges as "left right", in order.
        token_types: gguf.TokenType of each piece.
        chat_template: Jinja source, "" where there is none.
        eos_token_id: The id that ends a text.
        eot_token_id: The id that ends a turn.
    """

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    chat_template: str
    eos_token_id: int = 1
    eot_token_id: int = 106

    @classmethod
    def from_tokenizer_json(cls, tokenizer: dict, chat_template: str) -> "Vocabulary":
        """Read the content of a tokenizer.json; ids that it leaves free are filled."""
        added = {token["id"]: token for token in tokenizer["added_tokens"]}
        by_id = {number: text for text, number in tokenizer["model"]["vocab"].items()}
        by_id |= {number: token["content"] for number, token in added.items()}
        tokens = [by_id.get(number, _filler(number)) for number in range(max(by_id) + 1)]
        special = {token["content"] for token in added.values() if token["special"]}
        kinds = [_kind(text, special) if number in by_id else _UNUSED for number, text in enumerate(tokens)]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
        return cls(tokens, merges, kinds, chat_template)

    @classmethod
    def from_folder(cls, folder: Path) -> "Vocabulary":
        """Read tokenizer.json, the chat template and the ids that end a turn from a checkpoint's folder.

        Raises:
            BrokenCheckpointError: There is no tokenizer, or it is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise broken_file(path, "it is missing, and a GGUF holds the tokenizer")
        tokenizer, settings = _read_json(path), _read_json(folder / "tokenizer_config.json")
        try:
            found = cls.from_tokenizer_json(tokenizer, _chat_template(folder, settings))
        except (LookupError, TypeError, AttributeError, ValueError) as err:
            raise broken_file(path, "it is not a byte-pair tokenizer") from err
        ids = {text: number for number, text in enumerate(found.tokens)}
        eos = settings.get("eos_token")
        eos = ids.get(eos.get("content") if isinstance(eos, dict) else eos, found.eos_token_id)
        return replace(found, eos_token_id=eos, eot_token_id=ids.get("<turn|>", found.eot_token_id))

    def filled(self, size: int) -> "Vocabulary":
        """Return it with unused pieces up to `size`: llama.cpp wants one for each row of the embedding."""
        missing = range(len(self.tokens), size)
        tokens = self.tokens + [_filler(number) for number in missing]
        return replace(self, tokens=tokens, token_types=self.token_types + [_UNUSED] * len(missing))


def _filler(number: int) -> str:
    return f"[PAD{number}]"  # as llama.cpp's own converter names it


def _kind(token: str, special: set[str]) -> int:
    if token in ALWAYS_SHOWN:
        return USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return CONTROL if token in special else _BYTE if is_byte else _NORMAL


def _chat_template(folder: Path, settings: dict) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def _read_json(path: Path) -> dict:
    """Return the object in a JSON file, nothing where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise broken_file(path, "it is not JSON") from err
    if not isinstance(content, dict):
        raise broken_file(path, "it is not a JSON object")
    return content


def folder_metadata(folder: Path, config: dict) -> Metadata:
    """Return the keys for a Gemma 4 model, whose tokenizer and generation defaults lie in a folder.

    Raises:
        BrokenCheckpointError: The tokenizer is missing, damaged or too large.
    """
    vocabulary, size = Vocabulary.from_folder(folder), config["text_config"]["vocab_size"]
    if len(vocabulary.tokens) > size:
        raise BrokenCheckpointError(
            f"{folder / 'tokenizer.json'} has {len(vocabulary.tokens):,} pieces.",
            f"The embedding of this model has rows for {size:,}.",
            "Take the tokenizer that belongs to this model.",
        )
    return gemma_metadata(config, vocabulary.filled(size), _read_json(folder / "generation_config.json"))


def gemma_metadata(config: dict, vocabulary: Vocabulary, generation: dict | None = None) -> Metadata:
    """Return the keys for a Gemma 4 config, a tokenizer and the content of a generation_config.json."""
    generation = generation or {}
    keys = {"general.type": "model"}
    keys |= {f"general.sampling.{short}": generation[name] for name, short in _SAMPLING.items() if name in generation}
    keys |= {f"gemma4.{key}": value for key, value in model_keys(config).items()}
    keys |= _tokenizer_keys(vocabulary)
    if generation.get("suppress_tokens"):
        keys["tokenizer.ggml.suppress_tokens"] = generation["suppress_tokens"]
    return Metadata("gemma4", {key: _typed(value) for key, value in keys.items() if value != []})


def drafter_metadata(config: dict, model: Path) -> Metadata:
    """Return the keys for an MTP drafter, with the tokenizer of the model that it belongs to, a GGUF or folder."""
    keys = {"general.type": "model"}
    keys |= {f"{DRAFTER_ARCHITECTURE}.{key}": value for key, value in drafter_keys(config).items()}
    if model.is_dir():
        vocabulary = Vocabulary.from_folder(model).filled(config["text_config"]["vocab_size"])
        tokenizer = {key: _typed(value) for key, value in _tokenizer_keys(vocabulary).items()}
    else:
        tokenizer = copied_metadata(model).keys
    tokenizer = {key: typed for key, typed in tokenizer.items() if key.startswith("tokenizer.ggml.")}
    return Metadata(DRAFTER_ARCHITECTURE, {key: _typed(value) for key, value in keys.items()} | tokenizer)


def drafter_keys(config: dict) -> dict:
    """Return llama.cpp's keys for the shape of an MTP drafter, without the prefix."""
    layers = config["text_config"]["num_hidden_layers"]
    return model_keys(config) | {"embedding_length_out": config["backbone_hidden_size"], "nextn_predict_layers": layers}


def model_keys(config: dict) -> dict:
    """Return llama.cpp's keys for the shape of a Gemma 4 config, without the `gemma4.` prefix."""
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
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        "attention.key_length": text["global_head_dim"],
        "attention.value_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "attention.sliding_window": text["sliding_window"],
        "attention.shared_kv_layers": text["num_kv_shared_layers"],
        "embedding_length_per_layer_input": text["hidden_size_per_layer_input"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in text["layer_types"]],
        "rope.dimension_count": text["global_head_dim"],
        "rope.dimension_count_swa": text["head_dim"],
    }
    if text["final_logit_softcapping"]:
        keys["final_logit_softcapping"] = float(text["final_logit_softcapping"])
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


def _tokenizer_keys(vocabulary: Vocabulary) -> dict:
    keys = {
        "model": "gemma4",
        "tokens": vocabulary.tokens,
        "scores": [0.0] * len(vocabulary.tokens),
        "token_type": vocabulary.token_types,
        "merges": vocabulary.merges,
        "bos_token_id": 2,
        "eos_token_id": vocabulary.eos_token_id,
        "eot_token_id": vocabulary.eot_token_id,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": False,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return keys | ({"tokenizer.chat_template": vocabulary.chat_template} if vocabulary.chat_template else {})


def _typed(value) -> tuple:
    """Return a value with the type that llama.cpp reads: bool, uint32, float32, a string, or an array of these."""
    from gguf import GGUFValueType

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
             str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}  # fmt: skip
    return value, kinds[type(value)], None


def copied_metadata(path: Path) -> Metadata:
    """Return the keys of another GGUF, tokenizer and chat template included, without those of the file itself.

    Raises:
        BrokenCheckpointError: They cannot be read.
    """
    from gguf import GGUFValueType

    keys = read_keys(path)
    return Metadata(
        keys["general.architecture"][0],
        {
            key: (value, GGUFValueType(kind), None if item is None else GGUFValueType(item))
            for key, (value, kind, item) in keys.items()
            if not key.startswith(_OF_THE_FILE)
        },
    )
