"""What lies at a path: which format, which size, whether it is whole and safe, before anything loads it."""

import json
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.errors import BrokenCheckpointError, UnsafeCheckpointError
from gemma_qat_kit.gguf.header import broken_file, read_gguf_header

GGUF_ARCHITECTURES = ("gemma4", "llama")  # Gemma 4, and the built-in SmolLM2
MODEL_TYPES = ("gemma4", "gemma4_unified")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PER_LAYER_TABLE = "per_layer_token_embd.weight"


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on disk that has been looked at.

    Attributes:
        path: The .gguf file, or the folder of safetensors.
        format: As in the catalog; of a GGUF, the type of most of its matrices.
        size: A Gemma 4 size, "smollm2-135m", or None where the shape is no published one.
        engine: "llama_cpp" or "transformers".
        text_bytes: Bytes of the weights that a text-only load reads.
        all_bytes: Bytes of all weights.
        looked_up_bytes: Of these, tables read a row at a time, which llama.cpp may leave on disk.
    """

    path: Path
    format: str
    size: str | None
    engine: str
    text_bytes: int
    all_bytes: int
    looked_up_bytes: int = 0


def inspect_checkpoint(path: Path | str) -> LocalCheckpoint:
    """Look at a .gguf file or a folder and say what it is.

    Raises:
        BrokenCheckpointError: Nothing there, incomplete, damaged, or of an architecture that the kit does not know.
        UnsafeCheckpointError: Weights as pickle, which can run code when opened.
    """
    try:
        return _inspect(Path(path).expanduser())
    except (OSError, RuntimeError) as err:  # RuntimeError: no such user's home
        raise BrokenCheckpointError(
            f"{path} cannot be read: {getattr(err, 'strerror', None) or err}.",
            "A checkpoint is a file or folder that this user may read.",
            "Check the path and its permissions.",
        ) from err


def _inspect(path: Path) -> LocalCheckpoint:
    if not path.exists():
        raise BrokenCheckpointError(
            f"{path} does not exist.", "A path names a .gguf file or a folder with safetensors.", "Check the spelling."
        )
    if path.is_file() and _is_pickle(path):
        raise _unsafe(path)
    if path.is_file() and path.suffix == ".safetensors":
        raise BrokenCheckpointError(
            f"{path} is one file of a checkpoint.", "config.json belongs to it.", f'Pass its folder, "{path.parent}".'
        )
    if path.is_file():
        return _inspect_gguf(path)
    models = sorted(file for file in path.glob("*.gguf") if not _is_beside(file.name))
    if len(models) > 1:
        raise BrokenCheckpointError(
            f"{path} holds {len(models)} GGUF models: {', '.join(file.name for file in models)}.",
            "A folder is loaded when it holds one.",
            "Pass the path of the file you mean.",
        )
    return _inspect_gguf(models[0]) if models else _inspect_folder(path)


def _is_beside(name: str) -> bool:
    """Tell the file of a projector or an MTP drafter, which lies beside a model's."""
    return "mmproj" in name or name.startswith(("drafter", "mtp-"))


def _inspect_gguf(path: Path) -> LocalCheckpoint:
    header = read_gguf_header(path)
    if header.architecture not in GGUF_ARCHITECTURES:
        raise _other_architecture(path, header.architecture, GGUF_ARCHITECTURES)
    prefix, metadata = header.architecture, header.metadata
    shape = (metadata.get(f"{prefix}.embedding_length"), metadata.get(f"{prefix}.block_count"))
    nbytes = sum(tensor.nbytes for tensor in header.tensors)
    looked_up = sum(tensor.nbytes for tensor in header.tensors if tensor.name == _PER_LAYER_TABLE)
    return LocalCheckpoint(path, _gguf_format(header), _size_of(shape), "llama_cpp", nbytes, nbytes, looked_up)


def _gguf_format(header) -> str:
    """Return the type that holds most of the matrices' bytes, in the catalog's spelling."""
    from gguf.constants import GGMLQuantizationType

    bytes_of: dict[int, int] = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1 and "token_embd" not in tensor.name:
            bytes_of[tensor.ggml_type] = bytes_of.get(tensor.ggml_type, 0) + tensor.nbytes
    if not bytes_of:
        return "unknown"
    most = max(bytes_of, key=bytes_of.__getitem__)
    return GGMLQuantizationType(most).name.lower() if most in set(GGMLQuantizationType) else "unknown"


def _size_of(shape: tuple) -> str | None:
    if not all(isinstance(number, int) for number in shape):
        return None
    known = {(576, 30): "smollm2-135m"}
    for size in GEMMA_SIZES:
        text = hf_config(size)["text_config"]
        known[text["hidden_size"], text["num_hidden_layers"]] = size
    return known.get(shape)


def read_config(folder: Path) -> dict:
    """Return the config.json of a folder.

    Raises:
        BrokenCheckpointError: It is missing or is not JSON.
    """
    path = folder / "config.json"
    if not path.exists():
        raise BrokenCheckpointError(
            f"{folder} has no config.json.",
            "A checkpoint folder holds config.json and safetensors.",
            "Download it again.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise broken_file(path, "it is not JSON") from err
    if not isinstance(config, dict):
        raise broken_file(path, "it is not a JSON object")
    return config


def _inspect_folder(folder: Path) -> LocalCheckpoint:
    shards = weight_files(folder)
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in DRAFTER_TYPES:
        raise BrokenCheckpointError(
            f"{folder} is an MTP drafter.",
            "A drafter only helps the model it belongs to.",
            "Load that with drafter=True.",
        )
    if kind not in MODEL_TYPES:
        raise _other_architecture(folder, kind, MODEL_TYPES)
    text, quantization = config.get("text_config"), config.get("quantization_config") or {}
    if not isinstance(text, dict) or not isinstance(quantization, dict):
        raise broken_file(folder / "config.json", "its text_config or quantization_config is not a JSON object")
    size = _size_of((text.get("hidden_size"), text.get("num_hidden_layers")))
    return LocalCheckpoint(folder, _folder_format(folder, quantization), size, "transformers", *_count_bytes(shards))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, all of which exist.

    Raises:
        BrokenCheckpointError: None there, some missing, or several without an index.
        UnsafeCheckpointError: Only a pickle.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _listed_shards(folder, index)
    if single.exists():
        return [single]
    pickles = sorted(file for file in folder.iterdir() if _is_pickle(file))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles and not others:
        raise _unsafe(pickles[0])
    raise BrokenCheckpointError(
        f"{folder} holds {', '.join(others)} without an index." if others else f"{folder} holds no weights.",
        "A checkpoint is a .gguf file, or a folder with model.safetensors or several files and their index.",
        "Download it again; what is there already is kept." if others else "Check the path.",
    )


def _listed_shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
        raise broken_file(index, "it does not list the files of the checkpoint") from err
    if not names or not all(isinstance(name, str) and _is_file_name(name) for name in names):
        raise broken_file(index, "it names something else than files beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BrokenCheckpointError(
            f"{folder} lacks {', '.join(missing)}.",
            f"The index names {len(names)} files and all are needed.",
            "Download it again; what is there already is kept.",
        )
    return [folder / name for name in names]


def _is_file_name(name: str) -> bool:
    """Tell a plain name from a path, which could lead out of the folder."""
    return name.endswith(".safetensors") and not any(mark in name for mark in "/\\\0")


def _count_bytes(shards: list[Path]) -> tuple[int, int]:
    """Return the bytes of the text model's tensors and of all tensors, from the shards' checked headers."""
    from safetensors import SafetensorError, safe_open

    from gemma_qat_kit.layouts import GROUP_BYTES, Tensor, is_text

    text = everything = 0
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    part = file.get_slice(name)
                    nbytes = Tensor(name, part.get_dtype(), tuple(part.get_shape())).nbytes
                    everything += nbytes
                    text += nbytes if is_text(name) else 0
        except SafetensorError as err:
            raise broken_file(shard, f"it is damaged or cut short ({err})") from err
        except KeyError as err:
            raise BrokenCheckpointError(
                f"{shard} holds values of type {err.args[0]}.",
                f"The published checkpoints hold {', '.join(GROUP_BYTES)}.",
                "Take one of the catalog's checkpoints.",
            ) from err
    return text, everything


def _folder_format(folder: Path, quantization: dict) -> str:
    method = quantization.get("quant_method")
    if method == "gemma":
        return "mobile"
    if method == "bitsandbytes":
        return "int8" if quantization.get("load_in_8bit") else "nf4"
    if method == "compressed-tensors" and _bits(quantization) == {4}:
        return "w4a16"
    if method is not None:
        layout = f" ({quantization.get('format')})" if method == "compressed-tensors" else ""
        raise BrokenCheckpointError(
            f"{folder} is quantized with {method!r}{layout}.",
            "The kit loads mobile, w4a16, bitsandbytes and unquantized weights.",
            "Take one of the catalog's checkpoints.",
        )
    # The QAT weights' config carries quantization keys without a method, and their repositories say it in the name.
    return "q4_0-unquantized" if quantization or "q4_0-unquantized" in str(folder.resolve()) else "bf16"


def _bits(quantization: dict) -> set:
    """Return the widths of a compressed-tensors checkpoint's packed integers; of any other layout, nothing."""
    try:
        groups = [group["weights"] for group in quantization["config_groups"].values()]
        return {group["num_bits"] for group in groups if quantization["format"] == "pack-quantized"}
    except (KeyError, TypeError, AttributeError):
        return set()


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in _PICKLES


def _unsafe(path: Path) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} holds weights as a Python pickle.",
        "A pickle can run any code when it is opened, so only safetensors and GGUF are loaded.",
        "Take a safetensors or GGUF version of this checkpoint.",
    )


def _other_architecture(path: Path, found: object, known: tuple[str, ...]) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{path} is of architecture {found!r}.",
        f"The kit loads {' and '.join(known)}.",
        "Pick a checkpoint from gqk.catalog().",
    )
