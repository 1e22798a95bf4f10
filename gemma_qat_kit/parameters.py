"""Every parameter of a Gemma 4 model, computed from its config: names and shapes, before any layout or format.

Names are those of the bf16 checkpoints (a tower' linear is wrapped, hence `.linear`). `layouts` writes them out as
each published file does.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """One parameter of the model before any layout: a linear, an embedding or a plain tensor.

    Attributes:
        name: Module path for a linear or embedding (no ".weight"), full tensor name for a plain tensor.
        shape: Of the weight; a linear's is (out, in).
        kind: "linear", "embedding" or "plain".
        is_kv_shared: A key/value tensor of a layer that reads another layer's cache: stored by some layouts, used by
            none.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "plain"
    is_kv_shared: bool = False


def modules(config: dict) -> Iterator[Module]:
    """Yield every parameter of a Gemma 4 model, text first, then projectors and towers."""
    text, prefix = config["text_config"], "model.language_model."
    hidden, per_layer = text["hidden_size"], text["hidden_size_per_layer_input"]
    yield Module(prefix + "embed_tokens", (text["vocab_size"], hidden), "embedding")
    if per_layer:
        width = per_layer * text["num_hidden_layers"]
        yield Module(prefix + "embed_tokens_per_layer", (text["vocab_size_per_layer_input"], width), "embedding")
        yield Module(prefix + "per_layer_model_projection", (width, hidden), "linear")
        yield Module(prefix + "per_layer_projection_norm.weight", (per_layer,))
    for index in range(text["num_hidden_layers"]):
        yield from layer_modules(text, index, f"{prefix}layers.{index}.")
    yield Module(prefix + "norm.weight", (hidden,))
    if not config.get("vision_config"):  # saved after a text-only load
        return
    if config["model_type"] == "gemma4_unified":
        yield from _unified_embedders(config)
        return
    yield Module("model.embed_vision.embedding_projection.weight", (hidden, config["vision_config"]["hidden_size"]))
    yield from _vision_tower(config["vision_config"])
    if config["audio_config"]:
        audio = config["audio_config"]
        yield Module("model.embed_audio.embedding_projection.weight", (hidden, audio["output_proj_dims"]))
        yield from _audio_tower(audio)


def layer_geometry(text: dict, index: int) -> tuple[int, int, int, bool]:
    """Return (head_dim, key/value heads, MLP width, shares another layer's cache) of one text layer."""
    full = text["layer_types"][index] == "full_attention"
    shared = index >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    kv_heads = (full and text["num_global_key_value_heads"]) or text["num_key_value_heads"]
    mlp = text["intermediate_size"] * (2 if text["use_double_wide_mlp"] and shared else 1)
    return text["global_head_dim"] if full else text["head_dim"], kv_heads, mlp, shared


def layer_modules(text: dict, index: int, prefix: str) -> Iterator[Module]:
    """Yield the parameters of one text layer."""
    hidden, per_layer = text["hidden_size"], text["hidden_size_per_layer_input"]
    head_dim, kv_heads, mlp, shared = layer_geometry(text, index)
    values_are_keys = text["attention_k_eq_v"] and text["layer_types"][index] == "full_attention"
    query = text["num_attention_heads"] * head_dim
    yield Module(prefix + "self_attn.q_proj", (query, hidden), "linear")
    yield Module(prefix + "self_attn.k_proj", (kv_heads * head_dim, hidden), "linear", shared)
    if not values_are_keys:
        yield Module(prefix + "self_attn.v_proj", (kv_heads * head_dim, hidden), "linear", shared)
    yield Module(prefix + "self_attn.o_proj", (hidden, query), "linear")
    yield Module(prefix + "self_attn.q_norm.weight", (head_dim,))
    yield Module(prefix + "self_attn.k_norm.weight", (head_dim,), is_kv_shared=shared)
    yield Module(prefix + "mlp.gate_proj", (mlp, hidden), "linear")
    yield Module(prefix + "mlp.up_proj", (mlp, hidden), "linear")
    yield Module(prefix + "mlp.down_proj", (hidden, mlp), "linear")
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if text["enable_moe_block"]:
        experts, width = text["num_experts"], text["moe_intermediate_size"]
        yield Module(prefix + "experts.gate_up_proj", (experts, 2 * width, hidden))
        yield Module(prefix + "experts.down_proj", (experts, hidden, width))
        yield Module(prefix + "router.proj.weight", (experts, hidden))
        yield Module(prefix + "router.scale", (hidden,))
        yield Module(prefix + "router.per_expert_scale", (experts,))
        norms += ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    if per_layer:
        yield Module(prefix + "per_layer_input_gate", (per_layer, hidden), "linear")
        yield Module(prefix + "per_layer_projection", (hidden, per_layer), "linear")
        norms.append("post_per_layer_input_norm")
    for norm in norms:
        yield Module(f"{prefix}{norm}.weight", (hidden,))
    yield Module(prefix + "layer_scalar", (1,))


def _unified_embedders(config: dict) -> Iterator[Module]:
    hidden, vision = config["text_config"]["hidden_size"], config["vision_config"]
    width, patch = vision["mm_embed_dim"], 3 * vision["model_patch_size"] ** 2
    yield Module("model.embed_vision.embedding_projection.weight", (hidden, width))
    yield Module("model.embed_audio.embedding_projection.weight", (hidden, config["audio_config"]["audio_embed_dim"]))
    yield Module("model.vision_embedder.patch_dense.weight", (width, patch))
    yield Module("model.vision_embedder.patch_dense.bias", (width,))
    for norm, size in (("patch_ln1", patch), ("patch_ln2", width), ("pos_norm", width)):
        yield Module(f"model.vision_embedder.{norm}.weight", (size,))
        yield Module(f"model.vision_embedder.{norm}.bias", (size,))
    yield Module("model.vision_embedder.pos_embedding", (vision["mm_posemb_size"], 2, width))


def _tower_linear(name: str, out_features: int, in_features: int, clipped: bool) -> Iterator[Module]:
    yield Module(name + ".linear", (out_features, in_features), "linear")
    if clipped:
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            yield Module(f"{name}.{bound}", ())


def _vision_tower(vision: dict) -> Iterator[Module]:
    prefix, hidden, mlp = "model.vision_tower.", vision["hidden_size"], vision["intermediate_size"]
    heads = vision["num_attention_heads"] * vision["head_dim"]
    yield Module(prefix + "patch_embedder.input_proj.weight", (hidden, 3 * vision["patch_size"] ** 2))
    yield Module(prefix + "patch_embedder.position_embedding_table", (2, vision["position_embedding_size"], hidden))
    for index in range(vision["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{index}."
        shapes = {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (heads, hidden),
                  "self_attn.v_proj": (heads, hidden), "self_attn.o_proj": (hidden, heads),
                  "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
                  "mlp.down_proj": (hidden, mlp)}  # fmt: skip
        for name, shape in shapes.items():
            yield from _tower_linear(layer + name, *shape, vision["use_clipped_linears"])
        yield Module(layer + "self_attn.q_norm.weight", (vision["head_dim"],))
        yield Module(layer + "self_attn.k_norm.weight", (vision["head_dim"],))
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield Module(f"{layer}{norm}_layernorm.weight", (hidden,))
    if vision["standardize"]:
        yield Module(prefix + "std_bias", (hidden,))
        yield Module(prefix + "std_scale", (hidden,))


def _audio_tower(audio: dict) -> Iterator[Module]:
    prefix, hidden = "model.audio_tower.", audio["hidden_size"]
    first, second = audio["subsampling_conv_channels"]
    conv = prefix + "subsample_conv_projection."
    yield Module(conv + "layer0.conv.weight", (first, 1, 3, 3))
    yield Module(conv + "layer0.norm.weight", (first,))
    yield Module(conv + "layer1.conv.weight", (second, first, 3, 3))
    yield Module(conv + "layer1.norm.weight", (second,))
    # Two stride-2 convolutions leave a quarter of the mel bins, and there are as many of those as first-layer channels.
    yield Module(conv + "input_proj_linear.weight", (hidden, first // 4 * second))
    for index in range(audio["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}."
        shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
                  "self_attn.v_proj": (hidden, hidden), "self_attn.post": (hidden, hidden),
                  "lconv1d.linear_start": (2 * hidden, hidden), "lconv1d.linear_end": (hidden, hidden)}  # fmt: skip
        for part in ("feed_forward1", "feed_forward2"):
            shapes |= {f"{part}.ffw_layer_1": (4 * hidden, hidden), f"{part}.ffw_layer_2": (hidden, 4 * hidden)}
            yield Module(f"{layer}{part}.pre_layer_norm.weight", (hidden,))
            yield Module(f"{layer}{part}.post_layer_norm.weight", (hidden,))
        for name, shape in shapes.items():
            yield from _tower_linear(layer + name, *shape, audio["use_clipped_linears"])
        yield Module(layer + "self_attn.per_dim_scale", (hidden // audio["num_attention_heads"],))
        yield Module(layer + "self_attn.relative_k_proj.weight", (hidden, hidden))
        yield Module(layer + "lconv1d.depthwise_conv1d.weight", (hidden, 1, audio["conv_kernel_size"]))
        for norm in ("lconv1d.conv_norm", "lconv1d.pre_layer_norm", "norm_out", "norm_pre_attn", "norm_post_attn"):
            yield Module(f"{layer}{norm}.weight", (hidden,))
    yield Module(prefix + "output_proj.weight", (audio["output_proj_dims"], hidden))
    yield Module(prefix + "output_proj.bias", (audio["output_proj_dims"],))
