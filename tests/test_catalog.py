"""The catalog's lookup and the tables it draws; `test_published` checks the rows themselves."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from gemma_qat_kit.catalog import (
    FORMAT_COLOURS,
    KNOWN_FORMATS,
    Catalog,
    catalog,
    catalog_checkpoint_for_repo,
    find_checkpoint,
)
from gemma_qat_kit.errors import NotPublishedError, UnknownNameError

STORED = [row for row in catalog() if row.repo_id and not row.made_from]


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
        (
            "smollm2-135m",
            "q4_0",
            "chat",
            r"Formats there: q4_1, float32. Take q4_1: load\(\"smollm2-135m\", \"q4_1\"\)",
        ),
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
    assert "  q4_0              chat       3.12 GiB  google/gemma-4-E2B-it-qat-q4_0-gguf" in text
    assert "≈10.7 GiB" in text  # computed, not published
    assert "mobile            chat              -  not published (mobile is for E2B and E4B only); take q4_0" in text
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
    code = "import sys, gemma_qat_kit; str(gemma_qat_kit.catalog()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "ipywidgets", "psutil"} & set(loaded)
