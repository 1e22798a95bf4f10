"""llama.cpp's own C quantizers, called inside the xllamacpp extension: what every GGUF tool's bytes come from.

The kit writes with them what it has no rule of its own for (Q6_K), and its tests hold its own rules against them.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from gemma_qat_kit.errors import MissingLibraryError


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Round a float32 array with llama.cpp's `ggml_quantize_chunk`, on one core; other threads can run meanwhile.

    Args:
        weight: Finite float32, (..., in), contiguous; `in` a multiple of the type's group (32, K-quants 256).
        kind: Name of a ggml type, such as "Q6_K".
        importance: Mean squared inputs, float32 (in,), or None.

    Returns:
        The bytes, uint8 (..., bytes of a row).

    Raises:
        MissingLibraryError: xllamacpp is not installed, or exports no such function.
    """
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    out = np.empty(gguf.quant_shape_to_byte_shape(weight.shape, number), np.uint8)
    importance_at = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
    _quantize_chunk()(
        number.value, weight.ctypes.data, out.ctypes.data, 0, weight.size // weight.shape[-1], weight.shape[-1],
        importance_at,
    )  # fmt: skip
    return out


def extension() -> Path:
    """Return the file of the extension.

    Raises:
        FileNotFoundError: xllamacpp is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")) if spec else []
    if not files:
        raise FileNotFoundError("no extension named xllamacpp")
    return files[0]


@functools.cache
def _quantize_chunk():
    try:
        function = ctypes.CDLL(str(extension())).ggml_quantize_chunk
    except (OSError, AttributeError) as err:
        raise MissingLibraryError(
            "llama.cpp's quantizers cannot be reached.",
            "They are part of the xllamacpp extension.",
            "Run: pip install xllamacpp",
        ) from err
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    function.restype = ctypes.c_size_t
    return function
