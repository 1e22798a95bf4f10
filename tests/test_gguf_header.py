"""The GGUF header reader against gguf-py's own, and on files that are cut, flipped or hostile."""

import struct
import tracemalloc

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_files import ARRAY, STRING, U32, gguf_bytes, key, tensor, text

from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.errors import BrokenCheckpointError
from gemma_qat_kit.gguf.header import GgufHeader, longest_context, read_gguf_header, read_keys

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "some.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def sample(tiny):
    """A tiny GGUF's bytes and where its data start."""
    content = tiny("12B", "q4_0").read_bytes()
    return content, min(t.start for t in read_gguf_header(tiny("12B", "q4_0")).tensors)


def plain(field):
    """The value of one of gguf-py's fields, as far as the header keeps it."""
    kept = field.contents()
    return f"{len(kept)} values" if isinstance(kept, list) and len(kept) > 4096 else kept


@pytest.mark.parametrize("size", [*GEMMA_SIZES, "built-in"])
def test_a_header_says_what_gguf_py_reads(tiny, built_in, size):
    path = built_in if size == "built-in" else tiny(size, "q4_0")
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    assert all(ours.metadata[name] == plain(field) for name, field in fields.items())
    assert [(t.name, t.ggml_type, t.shape, t.start, t.nbytes) for t in ours.tensors] == [
        (t.name, t.tensor_type, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_the_architecture_is_named(tiny, built_in, write):
    assert read_gguf_header(tiny("E2B", "q4_0")).architecture == "gemma4"
    assert read_gguf_header(built_in).architecture == "llama"
    assert read_gguf_header(write(gguf_bytes())).architecture == "unknown"


def test_the_longest_context_is_found_without_reading_on(tiny, built_in, write):
    assert longest_context(built_in) == 8192
    assert longest_context(tiny("E2B", "q4_0")) == 4096  # testing.py's
    content = tiny("E2B", "q4_0").read_bytes()
    assert longest_context(write(content[: content.index(b"tokenizer.ggml")])) == 4096


@pytest.mark.parametrize("keys", [[], [key("a.context_length", STRING, text("long"))]])
def test_a_context_that_is_not_told_is_none(write, keys):
    assert longest_context(write(gguf_bytes(keys))) is None


def test_a_damaged_header_has_no_longest_context(write):
    with pytest.raises(BrokenCheckpointError, match="damaged or cut short"):
        longest_context(write(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40))


def test_version_2_is_read_like_version_3(write):
    keys, tensors = [key("a", U32, struct.pack("<I", 7))], [tensor("t")]
    headers = [read_gguf_header(write(gguf_bytes(keys, tensors, version=version))) for version in (2, 3)]
    assert headers[0] == headers[1] == GgufHeader({"a": 7}, headers[0].tensors)


@pytest.mark.parametrize(
    ("version", "name"), [(1, "of version 1"), (4, "of version 4"), (0x03000000, "big-endian"), (0x02000000, "big")]
)
def test_other_versions_are_refused_by_name(write, version, name):
    path = write(gguf_bytes(version=version))
    with pytest.raises(BrokenCheckpointError) as caught:
        read_gguf_header(path)
    assert str(path) in caught.value.wrong
    assert name in caught.value.wrong
    assert caught.value.allowed == "Versions 2 and 3, little-endian, are read."
    assert caught.value.next_step == "Take a newer GGUF of this model."


@pytest.mark.parametrize("content", [b"", b"G", b"PK\x03\x04" + bytes(40), b"ggml" + bytes(40)])
def test_another_file_is_no_gguf(write, content):
    path = write(content)
    with pytest.raises(BrokenCheckpointError) as caught:
        read_gguf_header(path)
    assert caught.value.wrong == f"{path} cannot be read: it is not a GGUF file."
    assert caught.value.allowed == "A complete file is needed."
    assert caught.value.next_step == "Delete it and download it again."


def test_missing_bytes_are_counted(write, sample):
    content, _ = sample
    with pytest.raises(BrokenCheckpointError, match="its last 1,000 bytes are missing"):
        read_gguf_header(write(content[:-1000]))


def test_a_header_cut_anywhere_is_refused(write, sample):
    content, data_start = sample
    for length in range(4, data_start, 97):
        with pytest.raises(BrokenCheckpointError, match=r"damaged or cut short near byte|bytes are missing"):
            read_gguf_header(write(content[:length]))


def test_a_file_cut_anywhere_in_its_weights_is_refused(write, sample):
    content, data_start = sample
    for length in range(data_start, len(content), 99_991):
        with pytest.raises(BrokenCheckpointError, match="bytes are missing"):
            read_gguf_header(write(content[:length]))


def test_a_download_that_is_zeros_from_some_byte_on_is_refused(write, sample):
    content, data_start = sample
    for length in range(24, data_start - 2000, 997):
        with pytest.raises(BrokenCheckpointError):
            read_gguf_header(write(content[:length] + bytes(len(content) - length)))


def refused_or_whole(path, size):
    """Read a header that may be damaged: it is refused, or every tensor lies within the file."""
    try:
        header = read_gguf_header(path)
    except BrokenCheckpointError:
        return
    assert all(t.start + t.nbytes <= size for t in header.tensors)


@QUICK
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(write, sample, data):
    content, data_start = sample
    damaged = bytearray(content)
    for place in data.draw(st.lists(st.integers(4, data_start - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    refused_or_whole(write(bytes(damaged)), len(damaged))


@QUICK
@given(content=st.binary(max_size=400))
def test_garbage_behind_the_magic_is_refused_or_harmless(write, content):
    refused_or_whole(write(b"GGUF\x03\x00\x00\x00" + content), 8 + len(content))


HUGE = struct.pack("<Q", 2**62)
HOSTILE = {
    "a string longer than the file": gguf_bytes([HUGE]),
    "a string of gigabytes": gguf_bytes([struct.pack("<Q", 2**25)], data=bytes(2**25 + 100)),
    "text that is not UTF-8": gguf_bytes([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", U32, 1)]),
    "a value of unknown type": gguf_bytes([key("a", 13, bytes(8))]),
    "more keys than bytes": gguf_bytes(num_keys=2**62),
    "more tensors than bytes": gguf_bytes(num_tensors=2**62),
    "more values than bytes": gguf_bytes([key("a", ARRAY, struct.pack("<I", U32) + HUGE)]),
    "an array that ends behind the file": gguf_bytes([key("a", ARRAY, struct.pack("<IQ", U32, 2**20))]),
    "strings that end behind the file": gguf_bytes([key("a", ARRAY, struct.pack("<IQ", STRING, 2**20))]),
    "arrays in arrays": gguf_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)]),
    "the same key twice": gguf_bytes([key("a", U32, bytes(4))] * 2),
    "the same tensor twice": gguf_bytes(tensors=[tensor("t")] * 2),
    "a million axes": gguf_bytes(tensors=[tensor("t", (2**63,) * 9999, num_axes=2**20)], data=bytes(2**20)),
    "an alignment of 0": gguf_bytes([key("general.alignment", U32, bytes(4))], [tensor("t")]),
    "an alignment that is text": gguf_bytes([key("general.alignment", STRING, text("32"))], [tensor("t")]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_at_once_and_in_little_memory(write, content):
    path = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(BrokenCheckpointError, match="damaged or cut short near byte"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tensors", [[tensor("t", (2**40,))], [tensor("t", offset=2**63)], [tensor("t", (2**63,) * 4)]])
def test_a_tensor_behind_the_end_is_a_missing_part(write, tensors):
    with pytest.raises(BrokenCheckpointError, match="bytes are missing"):
        read_gguf_header(write(gguf_bytes(tensors=tensors)))


def test_the_length_of_an_unknown_type_is_left_to_llama_cpp(write):
    header = read_gguf_header(write(gguf_bytes(tensors=[tensor("t", (2**40,), kind=999)])))
    assert (header.tensors[0].ggml_type, header.tensors[0].nbytes) == (999, 0)


@pytest.mark.parametrize("size", ["E2B", "built-in"])
def test_keys_are_read_whole_with_their_types(tiny, built_in, size):
    path = built_in if size == "built-in" else tiny(size, "q4_0")
    fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    ours = read_keys(path)
    assert {key: value for key, (value, _, _) in ours.items()} == {key: f.contents() for key, f in fields.items()}
    types = {key: [kind] if item is None else [kind, item] for key, (_, kind, item) in ours.items()}
    assert types == {key: [kind.value for kind in field.types] for key, field in fields.items()}
