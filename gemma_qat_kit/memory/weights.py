"""The bytes of a checkpoint's tensors by component, and where an engine keeps them."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_qat_kit.architectures import drafter_config, hf_config
from gemma_qat_kit.catalog import BUILT_IN_SIZE, find_checkpoint
from gemma_qat_kit.layouts import (
    GROUP_BYTES,
    Tensor,
    bf16_tensors,
    drafter_gguf_tensors,
    drafter_tensors,
    gguf_tensors,
    is_text,
    mobile_tensors,
    reblocked_tensors,
    w4a16_tensors,
)
from gemma_qat_kit.memory.network import find_network
from gemma_qat_kit.memory.parts import AUDIO, DRAFTER, EMBEDDINGS, REPACKED, TABLE, TEXT_LAYERS, VISION, Part, merged
from gemma_qat_kit.memory.settings import MemorySettings

BUILT_IN_PARAMETERS = 134_515_008  # HuggingFaceTB/SmolLM2-135M-Instruct, as the hub counts them
BUILT_IN_TENSOR_BYTES, BUILT_IN_EMBEDDING_BYTES = 96_576_768, 30_081_024  # of its Q4_1 file; embeddings are Q8_0
_REPACKED_TYPES = ("Q4_0",)  # whose matrices llama.cpp copies into the order that its CPU kernels read
# What llama.cpp sees with, as its log says for E2B's tower and 31B's: float32 values per patch and unit of width.
_IMAGE_TOKENS, _VALUES_PER_PATCH = 280, 15
_PACKED = "packed"  # stands for the dtypes of what w4a16 unpacks
_BITS = {"nf4": 4.5, "int8": 8}  # bitsandbytes: a float32 scale per 64 weights; a row scale is a rounding error
# Formats whose tensors transformers uses as they lie in the file; on a CPU it then reads the file's pages in place.
_AS_STORED = ("bf16", "q4_0-unquantized", "mobile")


def weight_parts(settings: MemorySettings) -> tuple[Part, ...]:
    """Return a checkpoint's weights once it is loaded and has run."""
    if settings.size == BUILT_IN_SIZE:
        return _built_in(settings)
    if settings.config:
        sums = _add_up(_in_memory(settings.config, settings.format, settings.engine, settings.device), settings.format)
    else:
        sums = _sums_of_size(settings.size, settings.format, settings.text_only, settings.engine, settings.device)
    parts = [part for total in sums for part in _placed(total, settings)]
    if settings.drafter:
        parts.append(_drafter(settings))
    if reads_projector(settings):
        parts += _projector(settings)
    return merged(part for part in parts if not (settings.text_only and part.name in (VISION, AUDIO)))


def written_bytes(settings: MemorySettings) -> int:
    """Return the bytes of the file that a checkpoint is re-blocked into before it runs, 0 where it runs as it is."""
    if (settings.engine, settings.format) != ("llama_cpp", "mobile"):
        return 0
    if settings.config:
        return sum(tensor.nbytes for tensor in reblocked_tensors(settings.config, settings.device))
    return _reblocked_bytes(settings.size, settings.device)


@functools.cache
def _reblocked_bytes(size: str, device: str) -> int:
    return sum(tensor.nbytes for tensor in reblocked_tensors(hf_config(size, "mobile"), device))


def _drafter(settings: MemorySettings) -> Part:
    """Return the weights of the MTP drafter; llama.cpp uses its GGUF in place."""
    config = drafter_config(settings.size)
    is_gguf = settings.engine == "llama_cpp"
    nbytes = sum(tensor.nbytes for tensor in (drafter_gguf_tensors if is_gguf else drafter_tensors)(config))
    return Part(DRAFTER, nbytes, "mapped" if is_gguf and settings.device == "cpu" else settings.place)


def reads_projector(settings: MemorySettings) -> bool:
    """Tell whether towers come from a file of their own: none is published for mobile."""
    return (settings.engine, settings.format, settings.text_only) == ("llama_cpp", "q4_0", False)


def projector_bytes(size: str) -> int:
    """Return the bytes of the file that llama.cpp sees and hears with."""
    return sum(file.bytes for file in find_checkpoint(size, "q4_0").files if file.kind == "projector")


def _projector(settings: MemorySettings) -> list[Part]:
    """Return the towers, which llama.cpp copies out of their file; what it sees with counts as theirs."""
    config = settings.config or hf_config(settings.size)
    towers = {VISION: 0, AUDIO: 0}
    for tensor in bf16_tensors(config, has_shared_kv=False):
        if (name := part_of(tensor.name)) in towers:
            towers[name] += tensor.nbytes
    share = 1 if settings.config else projector_bytes(settings.size) / sum(towers.values())
    towers = {name: round(share * nbytes) for name, nbytes in towers.items()}  # some tensors are float32 there
    vision = config["vision_config"] or {}
    patches = _IMAGE_TOKENS * vision.get("pooling_kernel_size", 0) ** 2  # the 12B has no tower
    towers[VISION] += 4 * _VALUES_PER_PATCH * patches * vision.get("hidden_size", 0)
    return [Part(name, nbytes, settings.place) for name, nbytes in towers.items()]


@dataclass(frozen=True)
class _Sum:
    """Bytes of a component's tensors that an engine treats alike; rows of a token table are looked up."""

    name: str
    nbytes: int
    dtype: str
    is_token_table: bool


@functools.cache
def _sums_of_size(size: str, format: str, text_only: bool, engine: str, device: str) -> tuple[_Sum, ...]:
    config = hf_config(size, format if format == "mobile" else "bf16")
    if text_only:  # half of the tensors are the towers'
        config = config | {"vision_config": None, "audio_config": None}
    return _add_up(_in_memory(config, format, engine, device), format)


def _add_up(tensors: Iterator[Tensor], format: str) -> tuple[_Sum, ...]:
    sums: dict[tuple[str, str, bool], int] = {}
    for tensor in tensors:
        is_token_table = tensor.name == "token_embd.weight" or "embed_tokens.embedding_" in tensor.name
        dtype = _PACKED if _is_packed(tensor.name) and format == "w4a16" else tensor.dtype
        key = part_of(tensor.name), dtype, is_token_table
        sums[key] = sums.get(key, 0) + _nbytes(tensor, format)
    return tuple(_Sum(name, nbytes, dtype, is_table) for (name, dtype, is_table), nbytes in sums.items())


def _built_in(settings: MemorySettings) -> tuple[Part, ...]:
    network = find_network(settings)
    embeddings, everything = network.vocab * network.hidden, BUILT_IN_PARAMETERS
    if settings.format == "float32":
        group_bytes, group_size = GROUP_BYTES["Q4_0" if settings.is_packed else "F32"]
        layers = group_bytes / group_size
        place, everything = settings.place, round(layers * (everything - embeddings)) + 4 * embeddings
        embeddings *= 4
    else:
        place = "gpu" if settings.device == "cuda" else "mapped"
        embeddings, everything = BUILT_IN_EMBEDDING_BYTES, BUILT_IN_TENSOR_BYTES
    return Part(TEXT_LAYERS, everything - embeddings, place), Part(EMBEDDINGS, embeddings, place)


def _in_memory(config: dict, format: str, engine: str, device: str) -> Iterator[Tensor]:
    """Yield the tensors that are in memory once a checkpoint is loaded and has run."""
    if format == "q4_0":
        return gguf_tensors(config)
    if format == "mobile" and engine == "llama_cpp":
        return reblocked_tensors(config, device)
    if format == "mobile":
        used = {tensor.name for tensor in bf16_tensors(config, has_shared_kv=False)}
        return (t for t in mobile_tensors(config) if not _is_shared_kv(t.name, used) and "_cache_scale" not in t.name)
    if format == "w4a16":  # compressed-tensors unpacks it to bf16 at the first forward
        packed = (tensor for tensor in w4a16_tensors(config) if _is_packed(tensor.name))
        return itertools.chain(bf16_tensors(config, has_shared_kv=False), packed)
    return bf16_tensors(config, has_shared_kv=False)


def tensors_in_memory(config: dict, format: str, engine: str, device: str) -> Iterator[tuple[Tensor, int]]:
    """Yield the tensors that an engine computes with, each with the bytes that it has in memory by then."""
    for tensor in _in_memory(config, format, engine, device):
        if format == "w4a16" and _is_packed(tensor.name):
            continue
        is_unpacked = format == "q4_0" and engine == "transformers" and tensor.name == "token_embd.weight"
        yield tensor, 2 * tensor.num_values if is_unpacked else _nbytes(tensor, format)


def _is_packed(name: str) -> bool:
    """Tell a tensor of a w4a16 checkpoint that a linear's weight is made from."""
    return name.endswith((".weight_packed", ".weight_scale", ".weight_shape"))


def _is_shared_kv(name: str, used: set[str]) -> bool:
    """Tell a stored key or value projection that no layer uses."""
    module = name.rpartition(".")[0]
    return module.endswith((".k_proj", ".v_proj")) and module + ".weight" not in used


def _placed(total: _Sum, settings: MemorySettings) -> Iterator[Part]:
    """Yield the part or parts of a plan that some tensors are."""
    name, nbytes = total.name, total.nbytes
    if settings.engine == "llama_cpp":
        yield from _placed_by_llama_cpp(total, settings)
    elif name == TABLE and settings.per_layer_table != "memory":
        yield Part(name, nbytes, "disk" if settings.per_layer_table == "disk" else "ram")
    elif total.dtype == _PACKED:  # gone from a GPU once it is unpacked; on a CPU its pages were read
        yield Part(name, nbytes if settings.device == "cpu" else 0, "mapped", is_spare=True)
    elif settings.format == "q4_0":  # blocks, but a head to multiply with; its own blocks are read once, while loading
        group_bytes, group_size = GROUP_BYTES[total.dtype]
        in_16_bit = 2 * nbytes // group_bytes * group_size
        place = "gpu" if settings.device == "cuda" else "ram" if total.is_token_table else "mapped"
        yield Part(name, in_16_bit if total.is_token_table else nbytes, place)
        if total.is_token_table:
            yield Part(name, nbytes, "mapped", is_spare=True)
    elif settings.device == "cuda":
        yield Part(name, nbytes, "gpu")
    elif settings.format == "w4a16" and name != TABLE:
        yield Part(name, nbytes, "ram" if name == TEXT_LAYERS else "mapped")
    elif settings.format in _AS_STORED and name != TABLE:
        yield Part(name, nbytes, "disk" if total.is_token_table else "mapped")  # mobile has a head of its own
    else:
        yield Part(name, nbytes, "ram")


def _placed_by_llama_cpp(total: _Sum, settings: MemorySettings) -> Iterator[Part]:
    """Yield where llama.cpp keeps tensors of a GGUF: the whole file is read; on a CPU, Q4_0 matrices are copied."""
    name, nbytes = total.name, total.nbytes
    is_looked_up = name == TABLE or (total.is_token_table and settings.format == "mobile")  # it has a head of its own
    if settings.device == "cuda":
        if not is_looked_up:
            yield Part(name, nbytes, "gpu")
        if is_looked_up or total.is_token_table:  # rows are looked up on the CPU
            yield Part(name, nbytes, "mapped", is_spare=True)
        return
    is_repacked = total.dtype in _REPACKED_TYPES and not is_looked_up
    yield Part(name, nbytes, "mapped", is_spare=is_repacked or is_looked_up)
    if is_repacked:
        yield Part(REPACKED, nbytes, "ram")


def _nbytes(tensor: Tensor, format: str) -> int:
    is_linear = tensor.name.endswith(("_proj.weight", "_projection.weight", "per_layer_input_gate.weight"))
    if format in _BITS and is_text(tensor.name) and is_linear:
        return int(tensor.num_values * _BITS[format] / 8)
    return tensor.nbytes


def part_of(name: str) -> str:
    """Return the part of the plan that a tensor belongs to, whatever its layout's naming."""
    if "embed_tokens_per_layer" in name or "per_layer_token_embd" in name:
        return TABLE
    if "embed_tokens" in name or "token_embd" in name or name.startswith(("lm_head", "output.")):
        return EMBEDDINGS
    if "vision" in name:
        return VISION
    return AUDIO if "audio" in name else TEXT_LAYERS
