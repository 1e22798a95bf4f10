"""The bytes of a key/value cache, as each engine lays it out."""

from gemma_qat_kit.parameters import layer_geometry

LLAMA_CPP_BATCH = 512  # tokens that llama.cpp computes at once; sliding layers hold so many beyond their window
_CELLS = 256  # llama.cpp rounds the length of a cache up to a multiple of this


def kv_cache_bytes(
    text: dict, context_length: int, *, engine: str = "transformers", bytes_per_value: float = 2, batch_size: int = 1
) -> int:
    """Return the bytes of a key/value cache: sliding layers keep their window, shared ones keep nothing.

    Args:
        text: The config.json's `text_config`.
        context_length: Tokens in the cache.
        engine: "transformers", which keeps a window less the token that comes next, or "llama_cpp", which allocates
            the window and one batch.
        bytes_per_value: 2 for 16-bit floats, 34 / 32 for q8_0.
        batch_size: Sequences.
    """
    total = 0
    for index, kind in enumerate(text["layer_types"]):
        head_dim, kv_heads, _, is_shared = layer_geometry(text, index)
        kept = _kept(kind, text["sliding_window"], context_length, engine)
        total += 0 if is_shared else round(2 * kv_heads * head_dim * bytes_per_value * kept)
    return total * batch_size


def _kept(kind: str, window: int, context_length: int, engine: str) -> int:
    """Return the tokens that a layer's cache has room for."""
    is_full = kind == "full_attention"
    if engine == "transformers":
        return context_length if is_full else min(context_length, window - 1)
    length = rounded_up(context_length)
    return length if is_full else min(length, rounded_up(window + LLAMA_CPP_BATCH))


def rounded_up(context_length: int) -> int:
    """Return the context length that llama.cpp allocates."""
    return -(-context_length // _CELLS) * _CELLS
