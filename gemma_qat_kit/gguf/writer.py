"""Write a GGUF file whole or not at all: one tensor at a time, read back and compared before it gets its name.

The file grows under a temporary name in the folder where it belongs. When its last byte is on the disk, it is read
again: the header must describe what was meant, and every tensor must have the checksum of what was written. Only then
it is renamed. Whatever happens before (an error, Ctrl-C, a full disk), nothing is left behind.
"""

import contextlib
import errno
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from gemma_qat_kit.errors import BrokenCheckpointError, ExportError, KitError, NotEnoughDiskError
from gemma_qat_kit.gguf.header import GgufTensor, read_gguf_header
from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.layouts import Tensor
from gemma_qat_kit.progress import Progress, Report
from gemma_qat_kit.units import readable_bytes

ALIGNMENT = 32  # GGUF's default
_READ_BYTES = 2**22
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Data = Callable[[], Iterable]
"""Called when a tensor's turn has come; yields its bytes in pieces that have the buffer protocol (numpy arrays)."""


def write_gguf(
    path: Path,
    metadata: Metadata,
    tensors: Iterable[tuple[Tensor, Data]],
    *,
    overwrite: bool = False,
    report: Report | None = None,
) -> int:
    """Write a GGUF file, asking for one piece of one tensor at a time.

    Args:
        path: The file to write; its folder exists.
        metadata: Its keys. Those of the file itself (its type, the version of the formats) are added.
        tensors: Pairs of a tensor's description, with ggml's name of its type, and its data: float32 or bfloat16
            numbers, or the format's bytes.
        overwrite: Replace a file that is there.
        report: Told the bytes done while writing, then while verifying.

    Returns:
        The bytes of the file.

    Raises:
        ExportError: A file is there already, the folder cannot be written, or the disk gives other bytes back.
        NotEnoughDiskError: It does not fit, found before the first tensor or when the disk is full all the same.
    """
    check_target(path, overwrite)
    pending = list(tensors)
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        start = _write_header(partial, path, metadata, [tensor for tensor, _ in pending])
        total = start + sum(_padded(tensor.nbytes) for tensor, _ in pending)
        _check_room(path, total - start)
        checksums = _write_data(partial, path, pending, report, start, total)
        _verify(partial, [tensor for tensor, _ in pending], checksums, report)
        check_target(path, overwrite)  # someone else may have written it meanwhile
        with _explained(path):
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return total


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, or a folder that is not there.

    Raises:
        ExportError: With the reason.
    """
    with _explained(path):
        if not path.parent.is_dir():
            raise ExportError(
                f"The folder {path.parent} does not exist.", "A file is written into one.", "Make it, or name another."
            )
        if path.is_dir():
            raise ExportError(
                f"{path} is a folder.", "The name of a file is needed.", f'Write to "{path / "model.gguf"}".'
            )
        if path.exists() and not overwrite:
            raise ExportError(
                f"{path} is there already.", "What is there is kept.", "Pass overwrite=True, or name another file."
            )


def _write_header(partial: Path, path: Path, metadata: Metadata, tensors: list[Tensor]) -> int:
    """Write everything before the tensors' data and return where these start."""
    import gguf

    writer = gguf.GGUFWriter(None, metadata.architecture)
    for key, (value, kind, item) in metadata.keys.items():
        writer.add_key_value(key, value, kind, item)
    writer.add_file_type(file_type(tensors))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        group_size, group_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // group_size * group_bytes)  # the writer wants it in bytes
        writer.add_tensor_info(tensor.name, shape, _uint8(), tensor.nbytes, raw_dtype=kind)
    with _explained(path):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as file:
            file.write(bytes(_padded(file.tell()) - file.tell()))
            return file.tell()


def _uint8():
    import numpy as np

    return np.dtype(np.uint8)


def file_type(tensors: Iterable[Tensor]):
    """Return gguf's LlamaFileType of a model: the type of most of its matrices' weights, tables left aside."""
    from gguf import LlamaFileType

    counts: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and "token_embd" not in tensor.name:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_values
    most = max(counts, key=counts.__getitem__, default="F32")
    return LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise _no_room(path, f"needs {readable_bytes(needed)} more on its disk; {readable_bytes(free)} are free")


def _no_room(path: Path, what: str) -> NotEnoughDiskError:
    return NotEnoughDiskError(
        f"{path} {what}.",
        "The whole file must fit beside what it may replace. Nothing was left behind.",
        "Free some space, or write to another disk.",
    )


def _write_data(
    partial: Path, path: Path, pending: list[tuple[Tensor, Data]], report: Report | None, start: int, total: int
) -> list[int]:
    """Append every tensor's data and return their checksums."""
    checksums, done = [], start
    with partial.open("ab", buffering=0) as file:
        for tensor, data in pending:
            checksum, first = 0, done
            for piece in data():
                view = memoryview(piece).cast("B")
                checksum = zlib.crc32(view, checksum)
                with _explained(path):
                    _write_all(file, view)
                done += len(view)
                if report:
                    report(Progress("writing", done, total))
            if done - first != tensor.nbytes:
                raise ExportError(
                    f"The data of {tensor.name} came to {done - first:,} bytes.",
                    f"Its type and shape take {tensor.nbytes:,}.",
                    "Give each row of it, once.",
                )
            checksums.append(checksum)
            with _explained(path):
                _write_all(file, memoryview(bytes(_padded(done) - done)))
            done = _padded(done)
        with _explained(path):
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # forget the copy in memory: what is read back comes from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksums


def _write_all(file, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into an error that says what to do."""
    try:
        yield
    except KitError:
        raise
    except OSError as err:
        if err.errno in _NO_ROOM:
            raise _no_room(path, f"does not fit: {err.strerror}") from err
        raise ExportError(
            f"{path} cannot be written: {err.strerror or err}.",
            "Its folder must be one that this user may write to.",
            "Check its permissions, or write to another folder.",
        ) from err


def _verify(partial: Path, tensors: list[Tensor], checksums: list[int], report: Report | None) -> None:
    """Compare the file on the disk with what was meant and with what was written."""
    from gguf import GGMLQuantizationType

    try:
        found = read_gguf_header(partial).tensors
    except BrokenCheckpointError as err:
        raise _differs(partial, "has a damaged header") from err
    meant = [(tensor.name, GGMLQuantizationType[tensor.dtype].value, tensor.shape, tensor.nbytes) for tensor in tensors]
    for tensor, expected in zip_longest(found, meant):
        if tensor is None or (tensor.name, tensor.ggml_type, tensor.shape, tensor.nbytes) != expected:
            raise _differs(partial, f"does not describe {expected[0] if expected else tensor.name} as it was meant")
    total, done = sum(tensor.nbytes for tensor in found), 0
    with partial.open("rb", buffering=0) as file:
        for tensor, expected in zip(found, checksums, strict=True):
            checksum = 0
            for piece in _pieces(file, tensor):
                checksum, done = zlib.crc32(piece, checksum), done + len(piece)
                if report:
                    report(Progress("verifying", done, total))
            if checksum != expected:
                raise _differs(partial, f"has other bytes in {tensor.name} than were written")


def _pieces(file, tensor: GgufTensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes from the disk, each piece in the place of the one before."""
    buffer = memoryview(bytearray(min(_READ_BYTES, tensor.nbytes)))
    file.seek(tensor.start)
    left = tensor.nbytes
    while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
        yield buffer[:count]
        left -= count


def _differs(partial: Path, what: str) -> ExportError:
    return ExportError(
        f"The file just written {what}.",
        "Every byte on the disk must be the one that was written. Nothing was left behind.",
        f"The disk of {partial.parent} may be failing: try again, then another disk.",
    )
