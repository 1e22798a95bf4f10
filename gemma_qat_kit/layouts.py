"""Every tensor of every Gemma 4 checkpoint, computed from its config: name, dtype and shape, without a byte of weights.

One description of the model (`parameters.modules`) is written out in each layout that Google publishes. The planner
adds up these tensors, the tiny and the full-size random checkpoints are built from them, and the tests compare them
with the published files' inventories.

Dtypes are safetensors' names (F32, BF16, U8, I8, I32, I64) or, in a GGUF, ggml's (F32, BF16, Q4_0, Q6_K …).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gemma_qat_kit.parameters import Module, layer_modules, modules

# Bytes per group and weights per group of each dtype (ggml: gguf-py's GGML_QUANT_SIZES).
GROUP_BYTES = {"F32": (4, 1), "BF16": (2, 1), "F16": (2, 1), "U8": (1, 1), "I8": (1, 1), "I32": (4, 1), "I64": (8, 1),
               "Q4_0": (18, 32), "Q8_0": (34, 32), "Q2_K": (84, 256), "Q6_K": (210, 256),
               "TQ2_0": (66, 256)}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint file; `shape` is PyTorch's order, slowest axis first, in a GGUF too."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """Number of stored elements (bytes of packed codes count as one each)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        group_bytes, group_size = GROUP_BYTES[self.dtype]
        return self.num_values // group_size * group_bytes


def is_text(name: str) -> bool:
    """Tell whether a tensor or module belongs to the language model rather than to a tower or projector."""
    return ".language_model." in name or name.startswith("lm_head")


def bf16_tensors(config: dict, *, has_shared_kv: bool = True) -> Iterator[Tensor]:
    """Yield the tensors of a bf16 checkpoint; `has_shared_kv=False` as the QAT ones of E2B and E4B have it."""
    for module in modules(config):
        if has_shared_kv or not module.is_kv_shared:
            yield Tensor(module.name + ("" if module.kind == "plain" else ".weight"), "BF16", module.shape)


def w4a16_tensors(config: dict) -> Iterator[Tensor]:
    """Yield the tensors of a compressed-tensors checkpoint: text linears as int4 groups of 32, the rest bf16."""
    for module in modules(config):
        if module.is_kv_shared:
            continue
        if module.kind == "linear" and is_text(module.name):
            out_features, in_features = module.shape
            yield Tensor(module.name + ".weight_packed", "I32", (out_features, in_features // 8))
            yield Tensor(module.name + ".weight_scale", "BF16", (out_features, in_features // 32))
            yield Tensor(module.name + ".weight_shape", "I64", (2,))
        else:
            yield Tensor(module.name + ("" if module.kind == "plain" else ".weight"), "BF16", module.shape)
    yield Tensor("lm_head.weight", "BF16", head_shape(config))


def mobile_bits(config: dict, name: str) -> int | None:
    """Return the bits that a mobile config gives to a linear or embedding, or None where it stays a float."""
    quantization = config["quantization_config"]
    if any(part in name for part in quantization["modules_to_not_convert"]):
        return None
    patterns = quantization["module_quant_configs"]
    return next((rule["num_bits"] for pattern, rule in patterns.items() if re.search(pattern, name)), 4)


def mobile_tensors(config: dict) -> Iterator[Tensor]:
    """Yield the tensors of a mobile checkpoint: packed codes, a scale per output row, static activation scales."""
    for module in [*modules(config), Module("lm_head", head_shape(config), "linear")]:
        bits = mobile_bits(config, module.name) if module.kind != "plain" else None
        if module.kind == "embedding":
            rows, width = module.shape
            layers = config["text_config"]["num_hidden_layers"] if "per_layer" in module.name else 1
            yield Tensor(module.name + ".embedding_quantized", "U8", (rows, width * bits // 8))
            yield Tensor(module.name + ".embedding_scale", "F32", (rows, layers))
        elif bits:
            out_features, in_features = module.shape
            yield Tensor(module.name + ".weight", "I8" if bits == 8 else "U8", (out_features, in_features * bits // 8))
            yield Tensor(module.name + ".weight_scale", "F32", (out_features, 1))
            yield Tensor(module.name + ".input_activation_scale", "F32", ())
            yield Tensor(module.name + ".output_activation_scale", "F32", ())
        elif not module.is_kv_shared:
            is_float32 = not is_text(module.name) and ".vision_tower." not in module.name
            name = module.name + (".weight" if module.kind == "linear" else "")
            yield Tensor(name, "F32" if is_float32 else "BF16", module.shape)
    for index in range(config["text_config"]["num_hidden_layers"]):
        for part in ("k_cache_scale", "v_cache_scale"):
            yield Tensor(f"model.language_model.layers.{index}.self_attn.{part}", "F32", ())


def head_shape(config: dict) -> tuple[int, int]:
    """Return (words, hidden size) of the output head."""
    return config["text_config"]["vocab_size"], config["text_config"]["hidden_size"]


def drafter_tensors(config: dict) -> Iterator[Tensor]:
    """Yield the tensors of an MTP drafter: four text layers without keys and values between two projections."""
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    hidden = text["hidden_size"]
    yield Tensor("model.embed_tokens.weight", "BF16", (text["vocab_size"], hidden))
    for index in range(text["num_hidden_layers"]):
        for module in layer_modules(text, index, f"model.layers.{index}."):
            if not module.is_kv_shared:
                yield Tensor(module.name + ("" if module.kind == "plain" else ".weight"), "BF16", module.shape)
    yield Tensor("model.norm.weight", "BF16", (hidden,))
    yield Tensor("pre_projection.weight", "BF16", (hidden, 2 * backbone))
    yield Tensor("post_projection.weight", "BF16", (backbone, hidden))
    if config["use_ordered_embeddings"]:
        yield Tensor("masked_embedding.centroids.weight", "BF16", (config["num_centroids"], hidden))
        yield Tensor("masked_embedding.token_ordering", "I64", (text["vocab_size"],))


# Hugging Face name inside a layer (or the model) -> name in a GGUF (llama.cpp's gemma4 graph).
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2", "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2", "layer_scalar": "layer_output_scale",
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
    "experts.gate_up_proj": "ffn_gate_up_exps", "experts.down_proj": "ffn_down_exps", "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
    "embed_tokens": "token_embd", "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj", "per_layer_projection_norm": "per_layer_proj_norm",
    "norm": "output_norm", "lm_head": "output",
    "pre_projection": "nextn.pre_projection", "post_projection": "nextn.post_projection",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Return the GGUF name of a parameter of a text model or drafter, given its module or tensor name."""
    name = name.removeprefix("model.").removeprefix("language_model.").removesuffix(".weight")
    block, part = "", name
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        block, part = f"blk.{match[1]}.", match[2]
    short = GGUF_NAMES[part]
    return block + short + ("" if short.endswith(".scale") else ".weight")


GGUF_FORMATS = ("q4_0", "q8_0", "bf16", "float32")
_TABLES = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


def gguf_dtype(name: str, shape: tuple[int, ...], format: str = "q4_0") -> str:
    """Return the ggml type that a tensor of a GGUF has in one of `GGUF_FORMATS`.

    In "q4_0" these are Google's own choices: Q4_0 matrices, Q6_K tables, a BF16 projection to the per-layer inputs.
    Norms, scales and routers are F32 everywhere. Where groups of 256 do not fit, a table is Q8_0, as llama.cpp's
    quantizer has it.
    """
    if len(shape) < 2 or format == "float32" or ".ffn_gate_inp." in name:
        return "F32"
    if format == "bf16" or name == "per_layer_model_proj.weight":
        return "BF16"
    if format == "q4_0" and name in _TABLES:
        return "Q8_0" if shape[-1] % GROUP_BYTES["Q6_K"][1] else "Q6_K"
    return format.upper()


def gguf_tensors(config: dict, format: str = "q4_0") -> Iterator[Tensor]:
    """Yield the tensors of a text model's GGUF in one of `GGUF_FORMATS`; "q4_0" is what Google publishes."""
    yield Tensor("rope_freqs.weight", "F32", (config["text_config"]["global_head_dim"] // 2,))
    for module in modules(config):
        if is_text(module.name) and not module.is_kv_shared:
            name = gguf_name(module.name)
            yield Tensor(name, gguf_dtype(name, module.shape, format), module.shape)


def reblocked_dtype(bits: int, slice_width: int, device: str = "cpu") -> str:
    """Return the ggml type that holds a mobile checkpoint's codes exactly, with so many weights under one scale.

    On a "cpu" 2 bits are TQ2_0, 2.06 bits a weight, which llama.cpp has no CUDA kernels for; Q2_K is 2.63.
    """
    if bits == 8:
        return "Q8_0"
    return ("TQ2_0" if device == "cpu" else "Q2_K") if bits == 2 and slice_width % 256 == 0 else "Q4_0"


def reblocked_tensors(config: dict, device: str = "cpu") -> Iterator[Tensor]:
    """Yield the tensors of the GGUF that a mobile checkpoint is re-blocked into for a device, its own head included."""
    yield Tensor("rope_freqs.weight", "F32", (config["text_config"]["global_head_dim"] // 2,))
    for module in [*modules(config), Module("lm_head", head_shape(config), "linear")]:
        if not is_text(module.name) or module.is_kv_shared:
            continue
        name, bits = gguf_name(module.name), None if module.kind == "plain" else mobile_bits(config, module.name)
        slices = config["text_config"]["num_hidden_layers"] if "per_layer_token" in name else 1
        dtype = reblocked_dtype(bits, module.shape[-1] // slices, device) if bits else gguf_dtype(name, module.shape)
        yield Tensor(name, dtype, module.shape)


def drafter_gguf_tensors(config: dict) -> Iterator[Tensor]:
    """Yield the tensors of an MTP drafter's GGUF, in Q8_0; llama.cpp scores every word, so no centroids."""
    yield Tensor("rope_freqs.weight", "F32", (config["text_config"]["global_head_dim"] // 2,))
    for tensor in drafter_tensors(config):
        if not tensor.name.startswith("masked_embedding."):
            name = gguf_name(tensor.name)
            yield Tensor(name, gguf_dtype(name, tensor.shape, "q8_0"), tensor.shape)


def safetensors_bytes(tensors: Iterable[Tensor], *, has_metadata: bool = True) -> int:
    """Return the size of a .safetensors file with these tensors, its header included.

    Args:
        tensors: In any order; safetensors writes the widest dtypes first, then by name.
        has_metadata: It says {"format": "pt"}, as transformers writes; the mobile checkpoints do not.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}} if has_metadata else {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: (-GROUP_BYTES[t.dtype][0], t.dtype, t.name)):
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end
