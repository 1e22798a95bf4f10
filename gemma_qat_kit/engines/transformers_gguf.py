"""Read the built-in model's GGUF as a plain float32 torch network: every weight is what its code stands for.

float32, because a bfloat16 forward pass is itself off by more than a good format costs; at 135 million parameters it is
affordable. The weights are read here and not by transformers' `gguf_file=`, which parses the file's 49,152 words three
times (7 s instead of 2), draws a bar of its own, leaves weights packed where it finds kernels for that, and marks the
network as quantized and not to be trained. The tokenizer is transformers' conversion, with what it leaves out.
Gemma's GGUF files stay with llama.cpp: their unquantized weights are published as such.
"""

from pathlib import Path

from gemma_qat_kit.errors import BrokenCheckpointError, KitError
from gemma_qat_kit.gguf.header import GgufHeader, read_gguf_header
from gemma_qat_kit.progress import Progress, Report

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path: Path, device, report: Report | None = None) -> tuple:
    """Return the network, its tokenizer and the id that ends an answer.

    Args:
        path: A .gguf file of the llama architecture.
        device: torch device.
        report: Told how many of the file's bytes have been read; may stop the load by raising.

    Raises:
        BrokenCheckpointError: The file lacks something that the architecture has.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    header = read_gguf_header(path)
    try:
        config = LlamaConfig(**_config(header))
        state = _read_weights(path, header, config, report)
        model, info = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, device_map={"": device},
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _repair(tokenizer, header)
    except KitError:  # somebody pressed Cancel
        raise
    except (KeyError, ValueError, RuntimeError) as err:
        raise _unreadable(path, f"{type(err).__name__} {err}") from err
    missing = set(info["missing_keys"]) - {"lm_head.weight"}
    if missing:
        raise _unreadable(path, f"{len(missing)} tensors are missing, the first is {min(missing)}")
    return model.eval(), tokenizer, config.eos_token_id


def _repair(tokenizer, header: GgufHeader) -> None:
    """Change in place what transformers' conversion gets wrong."""
    from tokenizers import pre_tokenizers

    end = header.metadata["tokenizer.ggml.eos_token_id"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # 5.15 takes another token for it
    tokenizer.clean_up_tokenization_spaces = False  # it would drop the spaces before punctuation
    if header.metadata.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM2's tokenizer.json splits off every digit first; the file says so, the conversion does not read it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _config(header: GgufHeader) -> dict:
    """Return config.json's keys from the GGUF's."""
    about = {key.removeprefix("llama."): value for key, value in header.metadata.items()}
    return {
        "vocab_size": about["vocab_size"],
        "hidden_size": about["embedding_length"],
        "intermediate_size": about["feed_forward_length"],
        "num_hidden_layers": about["block_count"],
        "num_attention_heads": about["attention.head_count"],
        "num_key_value_heads": about["attention.head_count_kv"],
        "max_position_embeddings": about["context_length"],
        "rms_norm_eps": about["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": about["rope.freq_base"]},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "pad_token_id": about.get("tokenizer.ggml.padding_token_id"),
    }


def _read_weights(path: Path, header: GgufHeader, config, report: Report | None) -> dict:
    """Return the dequantized weights under transformers' names."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    data, state, done = np.memmap(path, np.uint8, "r"), {}, 0
    total = sum(tensor.nbytes for tensor in header.tensors)
    for tensor in header.tensors:
        stored = data[tensor.start : tensor.start + tensor.nbytes]
        values = quants.dequantize(stored, GGMLQuantizationType(tensor.ggml_type)).reshape(tensor.shape)
        block, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        name = (f"model.layers.{block.removeprefix('blk.')}." if block else "") + _NAMES[part] + ".weight"
        state[name] = torch.from_numpy(np.array(_halves(values, heads) if heads else values, np.float32))
        done += tensor.nbytes
        if report:
            report(Progress("loading", done, total))
    return state


def _halves(values, num_heads: int):
    """Order a head's rows as transformers rotates them, the first half against the second; llama.cpp's are in pairs."""
    pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _unreadable(path: Path, what: str) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{path} cannot be read as a float32 network: {what}.",
        "A complete GGUF of the llama architecture is needed.",
        "Load it without a format, so that llama.cpp runs it.",
    )
