"""What a GGUF of a model must hold, said by a folder's config.json and tokenizer.json or by another GGUF of the model.

Nothing is read here but names and shapes, and the tokenizer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemma_qat_kit.checkpoint import MODEL_TYPES, inspect_checkpoint, read_config
from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.gguf.header import GgufHeader, broken_file, read_gguf_header
from gemma_qat_kit.gguf.metadata import Metadata, copied_metadata, folder_metadata, rope_frequencies
from gemma_qat_kit.layouts import Tensor, bf16_tensors, gguf_dtype, gguf_name, gguf_tensors, is_text

_TEXT = "model.language_model."


@dataclass(frozen=True)
class Blueprint:
    """What a GGUF must hold, before any weights are looked at.

    Attributes:
        metadata: Its keys.
        tensors: Its tensors made of weights, with the types that floats get.
        sources: GGUF name to the name of the weight.
        constants: Tensors that are no weights, float32, by GGUF name.
        known: Names of weights that a checkpoint may have and a GGUF does not.
        is_tied: Whether the head is the embedding, whatever is stored as a head.
        num_heads: GGUF name to the number of heads in whose rows llama.cpp wants rotary pairs side by side.
    """

    metadata: Metadata
    tensors: tuple[Tensor, ...]
    sources: dict[str, str]
    constants: dict[str, np.ndarray]
    known: frozenset[str] = frozenset()
    is_tied: bool = False
    num_heads: dict[str, int] = field(default_factory=dict)


def read_blueprint(path: Path, names: Iterable[str], format: str) -> Blueprint:
    """Return what a GGUF in a format of `layouts.GGUF_FORMATS` must hold.

    Args:
        path: A folder with config.json and tokenizer.json, whose weights are not looked at; or a GGUF.
        names: Of the weights there are, to be found again under other names in a GGUF.
        format: Of the floats.

    Raises:
        BrokenCheckpointError: The config, tokenizer or GGUF cannot be read, or is of another architecture.
    """
    if (path / "config.json").exists():
        return _from_folder(path, format)
    found = inspect_checkpoint(path)
    return _from_gguf(found.path, read_gguf_header(found.path), names, format)


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name the one that it has in a bf16 checkpoint: a text-only Gemma 4 says `model.layers…`."""
    names = list(names)
    is_text_only = not any(_TEXT in name for name in names) and any("layer_scalar" in name for name in names)
    return {name: name.replace("model.", _TEXT, 1) if is_text_only and name.startswith("model.") else name
            for name in names}  # fmt: skip


def _from_folder(folder: Path, format: str) -> Blueprint:
    config = read_config(folder)
    if config.get("model_type") not in MODEL_TYPES:
        raise BrokenCheckpointError(
            f"{folder} is of architecture {config.get('model_type')!r}.",
            f"A folder can say what a GGUF of {' or '.join(MODEL_TYPES)} holds.",
            "Pass a GGUF of this model: like=path.",
        )
    try:
        config = _as_published(config)
        tensors = [tensor for tensor in gguf_tensors(config, format) if tensor.name != "rope_freqs.weight"]
        sources = {gguf_name(t.name): t.name for t in bf16_tensors(config, has_shared_kv=False) if is_text(t.name)}
        frequencies = np.array(list(rope_frequencies(config)), np.float32)
        metadata = folder_metadata(folder, config)
    except (LookupError, TypeError, AttributeError) as err:
        raise broken_file(folder / "config.json", f"it does not describe a Gemma 4 model ({err!r})") from err
    return Blueprint(
        metadata,
        tuple(tensors),
        sources,
        {"rope_freqs.weight": frequencies},
        frozenset(tensor.name for tensor in bf16_tensors(config)),
        config.get("tie_word_embeddings", True),
    )


def _as_published(config: dict) -> dict:
    """Return a config with the published keys, where transformers' `save_pretrained` wrote them layer by layer."""
    text = config["text_config"]
    if "global_head_dim" in text or not text.get("per_layer_config"):
        return config
    full = next(iter(text["per_layer_config"].values()))  # only full-attention layers differ, and all in the same way
    heads = {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
    return config | {"text_config": text | heads}


def _from_gguf(path: Path, header: GgufHeader, names: Iterable[str], format: str) -> Blueprint:
    rename = _renamer(header)
    names = [name.replace(".embedding_quantized", ".weight") for name in names]  # a mobile embedding
    weights = {found: name for name in names if (found := rename(name))}
    constants = {t.name: np.fromfile(path, np.float32, t.nbytes // 4, offset=t.start)
                 for t in header.tensors if t.name.startswith("rope_")}  # fmt: skip
    tensors = tuple(Tensor(t.name, gguf_dtype(t.name, t.shape, format), t.shape)
                    for t in header.tensors if t.name not in constants)  # fmt: skip
    # What these weights do not have keeps its GGUF name, and is missed under it.
    sources = {tensor.name: weights.get(tensor.name, tensor.name) for tensor in tensors}
    return Blueprint(copied_metadata(path), tensors, sources, constants, num_heads=_interleaved(header))


def _renamer(header: GgufHeader) -> Callable[[str], str | None]:
    """Return a function that gives a weight's name in a GGUF of this architecture, None where it has none."""
    if header.architecture == "gemma4":
        return _gemma_name
    import gguf

    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[header.architecture]
    names = gguf.get_tensor_name_map(architecture, header.metadata[f"{header.architecture}.block_count"])
    return lambda name: names.get_name(name, (".weight", ".bias"))


def _gemma_name(name: str) -> str | None:
    try:
        return gguf_name(name)
    except KeyError:  # a tower, or a scale of the mobile format
        return None


def _interleaved(header: GgufHeader) -> dict[str, int]:
    """Return the heads of each query and key projection of a llama, whose rows llama.cpp's converter reorders."""
    if header.architecture != "llama":
        return {}
    heads = header.metadata["llama.attention.head_count"]
    counts = {"attn_q.weight": heads, "attn_k.weight": header.metadata.get("llama.attention.head_count_kv", heads)}
    parts = {tensor.name: tensor.name.split(".", 2)[-1] for tensor in header.tensors}
    return {name: counts[part] for name, part in parts.items() if part in counts}
