"""Q6_K, ggml's 6-bit format of Google's embedding tables: groups of 256 as 16 parts of 16, 210 bytes.

A value is `d * scale * (q - 32)`: a float16 `d` for the group, an int8 `scale` per part, a 6-bit `q` per weight.
Layout of a group: 128 bytes of low nibbles, 64 bytes of high bits, 16 scales, then `d`. gguf reads this format but
does not write it.
Source: ggml's `block_q6_K` and `dequantize_row_q6_K`.
"""

import numpy as np

GROUP_SIZE, GROUP_BYTES = 256, 210


def quantize(weight: np.ndarray) -> np.ndarray:
    """Return the bytes, uint8 (..., in / 256 * 210), of a float32 array (..., in).

    Each part is scaled by its largest value: round-to-nearest with the signed extremum at -32, without ggml's search
    over 18 scales a part.
    """
    parts = weight.astype(np.float32).reshape(-1, 16, 16)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    step = extreme / -32
    largest = np.take_along_axis(step, np.abs(step).argmax(-1)[:, None], -1)
    d = (largest / -128).astype(np.float16)
    safe_d = np.where(d == 0, 1, d).astype(np.float32)
    scale = np.clip(np.rint(step / safe_d), -128, 127).astype(np.int8)
    effective = scale.astype(np.float32) * d.astype(np.float32)
    inverse = np.divide(1, effective, out=np.zeros_like(effective), where=effective != 0)
    codes = (np.clip(np.rint(parts * inverse[..., None]), -32, 31) + 32).astype(np.uint8)
    packed = np.concatenate([_pack(codes.reshape(-1, 2, 4, 32)), scale.view(np.uint8), d.view(np.uint8)], axis=-1)
    return packed.reshape(*weight.shape[:-1], -1)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Return low nibbles then high bits, uint8 (groups, 192), of codes (groups, halves, quarters, 32)."""
    low, high = codes & 15, codes >> 4
    nibbles = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    bits = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.concatenate([nibbles.reshape(-1, 128), bits.reshape(-1, 64)], axis=-1)
