"""The multimodal projector that llama.cpp sees and hears with: the towers of a model in a GGUF of their own."""

from pathlib import Path

from gemma_qat_kit.catalog import Checkpoint
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.memory.parts import AUDIO, VISION, Part, merged

_ARCHITECTURE, _WIDTH = "clip", "clip.vision.projection_dim"


def check_published(row: Checkpoint) -> None:
    """Refuse a checkpoint that has no projector, before anything is downloaded.

    Raises:
        BadSettingError: The message says what sees images.
    """
    if any(file.kind == "projector" for file in row.files):
        return
    raise BadSettingError(
        f"{row.key} has no projector, which llama.cpp sees and hears with.",
        "The q4_0 of every Gemma 4 has one in a file beside it; transformers reads the towers of mobile.",
        'Leave text_only=False out, or take format="q4_0"; of mobile, engine="transformers".',
    )


def projector_beside(model: Path) -> Path:
    """Return the projector that lies beside a model: the one .gguf file there with "mmproj" in its name.

    Args:
        model: The .gguf file, or the folder of a mobile checkpoint.

    Raises:
        BadSettingError: There is none, several, or that of another model.
        BrokenCheckpointError: It is damaged, or no projector.
    """
    folder = model if model.is_dir() else model.parent
    found = sorted(folder.glob("*mmproj*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise BadSettingError(
            f"{folder} holds {len(found)} projectors: {names}." if found else f"{folder} holds no projector.",
            "llama.cpp sees and hears with one *mmproj*.gguf beside the model.",
            "Leave one there, or load without text_only=False; a mobile checkpoint's towers run in "
            'engine="transformers".',
        )
    _check_width(found[0], model)
    return found[0]


def _check_width(projector: Path, model: Path) -> None:
    """Refuse what llama.cpp would end for, in words of its own."""
    header = read_gguf_header(projector)
    if header.architecture != _ARCHITECTURE:
        raise BrokenCheckpointError(
            f"{projector} is of architecture {header.architecture!r}.",
            f"A projector is of architecture {_ARCHITECTURE!r}.",
            "Download the projector again, or load without text_only=False.",
        )
    if model.is_dir():
        return
    about = read_gguf_header(model)
    widths = header.metadata.get(_WIDTH), about.metadata.get(f"{about.architecture}.embedding_length")
    if None not in widths and widths[0] != widths[1]:
        raise BadSettingError(
            f"{projector} is the projector of another model: it gives {widths[0]} numbers for a token.",
            f"This model takes {widths[1]}.",
            "Put the projector of this size there, or load without text_only=False.",
        )


def projector_parts(path: Path, place: str) -> tuple[Part, ...]:
    """Return the bytes of what sees and of what hears, which llama.cpp copies out of the file."""
    named = ((tensor.name, tensor.nbytes) for tensor in read_gguf_header(path).tensors)
    return merged(Part(AUDIO if name.startswith(("a.", "mm.a.")) else VISION, size, place) for name, size in named)
