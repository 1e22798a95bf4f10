"""What is in memory while a checkpoint is loaded, and right after, before anything is asked."""

from collections.abc import Iterable

from gemma_qat_kit.catalog import BUILT_IN_SIZE, find_checkpoint
from gemma_qat_kit.memory.parts import KEY_VALUES, WEIGHTS, Part, merged
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.memory.work import engine_parts

# The built-in file turned into float32: its names and tokenizer as Python objects, and the tensor in work. Measured.
_READING_GGUF = 100 * 2**20


def loaded_parts(settings: MemorySettings, parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return those parts of a plan that are there once a model is loaded.

    llama.cpp has all but the pages of its compute buffer. In transformers there are no cache and no activations yet,
    and on a CPU none of the weights that are used as they lie in the file: their pages are read at the first answer,
    and w4a16 is unpacked then.
    """
    if settings.engine == "llama_cpp":
        kept = [part for part in parts if part.name in WEIGHTS or part.name == KEY_VALUES]
        return merged([*kept, *engine_parts(settings)])
    is_unpacked_later = settings.device == "cpu" and settings.format == "w4a16"
    held = [part for part in parts if part.name in WEIGHTS and part.place != "mapped" and not is_unpacked_later]
    return merged([*held, *engine_parts(settings)])


def load_peak_bytes(settings: MemorySettings, loaded: Iterable[Part]) -> int:
    """Return the most memory at once while a checkpoint is loaded."""
    total = sum(part.nbytes for part in loaded if part.place != "disk")
    is_converted = settings.size == BUILT_IN_SIZE and settings.format == "float32"
    return total + (find_checkpoint(BUILT_IN_SIZE).weights_bytes + _READING_GGUF if is_converted else 0)
