"""Read the header of a GGUF without touching its weights: keys, tensor descriptions, and whether the file is whole.

gguf-py's reader builds an array per token (seconds for 262,144 of them); this one walks over them in a fraction of a
second. Source of the layout: ggml's `docs/gguf.md`, version 3.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.errors import BrokenCheckpointError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY_KEPT = 4096
# What no file has: beyond these a length is damaged, and following it would take minutes or all of the memory.
_MAX_ARRAY, _MAX_STRING, _MAX_AXES = 2**24, 2**24, 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF: ggml's type number, shape (slowest axis first), first byte and bytes in the file."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself; of arrays longer than 4,096 entries only the length is kept."""

    metadata: dict[str, object]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the network, such as "gemma4" or "llama"."""
        return str(self.metadata.get("general.architecture", "unknown"))


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        BrokenCheckpointError: Not a GGUF, of another version, damaged, or shorter than its header says.
    """
    with _opened(path) as cursor:
        header, size = _read(cursor), len(cursor.data)
    missing = max((t.start + t.nbytes for t in header.tensors), default=0) - size
    if missing > 0:
        raise broken_file(path, f"its last {missing:,} bytes are missing")
    return header


def longest_context(path: Path) -> int | None:
    """Return the tokens that a GGUF's model was trained to take; reads no further than that, and None if not told.

    Raises:
        BrokenCheckpointError: As `read_gguf_header`, where the damage lies before it.
    """
    with _opened(path) as cursor:
        _, num_keys = cursor.number("<Q"), cursor.number("<Q")
        lengths = (value for key, value in _read_keys(cursor, num_keys) if key.endswith(".context_length"))
        length = next(lengths, None)
    return length if isinstance(length, int) else None


def read_keys(path: Path) -> dict[str, tuple[object, int, int | None]]:
    """Return every key with its whole value, the number of its type and, of an array, that of its items' type.

    Raises:
        BrokenCheckpointError: As `read_gguf_header`, where the damage lies before the tensors.
    """
    found = {}
    with _opened(path) as cursor:
        _, num_keys = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(num_keys):
            key, kind = cursor.string(), cursor.number("<I")
            item = struct.unpack_from("<I", cursor.data, cursor.at)[0] if kind == _ARRAY else None
            found[key] = cursor.value(kind, max_kept=_MAX_ARRAY), kind, item
    return found


@contextmanager
def _opened(path: Path) -> Iterator["_Cursor"]:
    """Open a GGUF for reading behind its version, and turn what a damaged header raises into one error."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise broken_file(path, "it is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, 4)
            try:
                version = cursor.number("<I")
                if version not in (2, 3):
                    raise _other_version(path, version)
                yield cursor
            except (struct.error, UnicodeDecodeError, LookupError, OverflowError) as err:
                raise broken_file(path, f"its header is damaged or cut short near byte {cursor.at:,}") from err


def broken_file(path: Path, what: str) -> BrokenCheckpointError:
    """Build the error for a file that cannot be used as it is."""
    return BrokenCheckpointError(
        f"{path} cannot be read: {what}.",
        "A complete file is needed.",
        "Delete it and download it again.",
    )


def _other_version(path: Path, version: int) -> BrokenCheckpointError:
    is_big_endian = version & 0xFFFF == 0
    return BrokenCheckpointError(
        f"{path} is a {'big-endian GGUF' if is_big_endian else f'GGUF of version {version}'}.",
        "Versions 2 and 3, little-endian, are read.",
        "Take a newer GGUF of this model.",
    )


class _Cursor:
    """A position in the file's bytes."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def number(self, layout: str):
        value = struct.unpack_from(layout, self.data, self.at)[0]
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > min(_MAX_STRING, len(self.data) - self.at):
            raise IndexError(length)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int, max_kept: int = _MAX_ARRAY_KEPT):
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        item, count = self.number("<I"), self.number("<Q")
        if item == _ARRAY or count > _MAX_ARRAY:  # llama.cpp reads no arrays of arrays
            raise IndexError(count)
        if count <= max_kept:
            return [self.value(item) for _ in range(count)]
        if item == _STRING:
            self._skip_strings(count)
        else:
            self.at += count * struct.calcsize(_SCALARS[item])
        return f"{count} values"

    def _skip_strings(self, count: int) -> None:
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at


def _read(cursor: _Cursor) -> GgufHeader:
    """Return the header that follows the version; a LookupError is a damaged one."""
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    metadata = dict(_read_keys(cursor, num_keys))
    described = {}
    for _ in range(num_tensors):
        name, num_axes = cursor.string(), cursor.number("<I")
        if name in described or num_axes > _MAX_AXES:
            raise KeyError(name)
        shape = tuple(cursor.number("<Q") for _ in range(num_axes))
        described[name] = shape[::-1], cursor.number("<I"), cursor.number("<Q")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or cursor.at > len(cursor.data):
        raise IndexError(alignment)
    return GgufHeader(metadata, tuple(_placed(described, -(-cursor.at // alignment) * alignment)))


def _read_keys(cursor: _Cursor, num_keys: int) -> Iterator[tuple[str, object]]:
    seen = set()
    for _ in range(num_keys):
        key = cursor.string()
        if key in seen:  # also what a file has that is zeros from some byte on
            raise KeyError(key)
        seen.add(key)
        yield key, cursor.value(cursor.number("<I"))


def _placed(described: dict[str, tuple], first: int) -> Iterator[GgufTensor]:
    """Yield the tensors with their place in the file, whose data start at byte `first`."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}
    for name, (shape, kind, offset) in described.items():
        group_size, group_bytes = sizes.get(kind, (1, 0))  # a type newer than gguf-py: its length cannot be checked
        yield GgufTensor(name, kind, shape, first + offset, math.prod(shape) // group_size * group_bytes)
