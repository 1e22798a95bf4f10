"""The bytes of a key/value cache, as each engine lays it out."""

from gemma_qat_kit.memory.network import Layer, Network

LLAMA_CPP_BATCH = 512  # tokens that llama.cpp computes at once; sliding layers hold so many beyond their window
LLAMA_CPP_CHECKPOINTS = 2  # copies of the sliding layers' window that it keeps, to go back to in a conversation
KEPT_MIB = 32  # for each of several chats: conversations whose place another took, so that they need not be read again
_CELLS = 256  # llama.cpp rounds the length of a cache up to a multiple of this


def kv_cache_bytes(
    network: Network,
    context_length: int,
    *,
    engine: str = "transformers",
    bytes_per_value: float = 2,
    batch_size: int = 1,
) -> int:
    """Return the bytes of a key/value cache: sliding layers keep their window, shared ones keep nothing.

    Args:
        network: The model.
        context_length: Tokens in the cache.
        engine: "transformers", which keeps a window less the token that comes next, or "llama_cpp", which allocates
            the window and one batch.
        bytes_per_value: 2 for 16-bit floats, 34 / 32 for q8_0.
        batch_size: Sequences.
    """
    own = (layer for layer in network.layers if not layer.is_shared)
    values = sum(2 * layer.key * _kept(layer, network.window, context_length, engine) for layer in own)
    return round(values * bytes_per_value) * batch_size


def checkpoint_bytes(network: Network, context_length: int, bytes_per_value: float = 2) -> int:
    """Return what llama.cpp's copies of the sliding layers' window take, once a prompt is longer than that."""
    sliding = sum(2 * layer.key for layer in network.layers if not (layer.is_full or layer.is_shared))
    return LLAMA_CPP_CHECKPOINTS * round(sliding * bytes_per_value) * min(network.window, context_length)


def _kept(layer: Layer, window: int, context_length: int, engine: str) -> int:
    """Return the tokens that a layer's cache has room for."""
    if engine == "transformers":
        return context_length if layer.is_full else min(context_length, window - 1)
    length = rounded_up(context_length)
    return length if layer.is_full else min(length, rounded_up(window + LLAMA_CPP_BATCH))


def rounded_up(context_length: int) -> int:
    """Return the context length that llama.cpp allocates."""
    return -(-context_length // _CELLS) * _CELLS
