"""Google's published memory table, computed again cell by cell, beside the bytes that are really there."""

import functools
import html
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gemma_qat_kit.architectures import GEMMA_SIZES, hf_config
from gemma_qat_kit.catalog import PANEL_STYLE, format_label
from gemma_qat_kit.errors import unknown_name
from gemma_qat_kit.layouts import bf16_tensors, is_text, mobile_tensors
from gemma_qat_kit.memory.parts import TABLE, WEIGHTS, Parts
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.weights import part_of
from gemma_qat_kit.units import GIB, readable_bytes

SOURCE, SOURCE_DATE = "https://ai.google.dev/gemma/docs/core", "2026-11-23"
"""The page with the table, and the day on which it was read; older copies have other numbers and no 20 %."""
BF16, SFP8, Q4_0, MOBILE, MOBILE_TEXT = COLUMNS = ("BF16", "SFP8", "Q4_0", "Mobile", "Mobile, text only")
FIGURES = {"E2B": ("11.4", "5.7", "2.9", "1.1", "0.84"), "E4B": ("17.9", "8.9", "4.5", "2.5", "2.2"),
           "12B": ("26.7", "13.4", "6.7"), "26B-A4B": ("57.7", "28.8", "14.4"),
           "31B": ("69.9", "34.9", "17.5")}  # fmt: skip
"""GiB as printed there, in the order of `COLUMNS`; the mobile format is for the first two sizes."""
MARGIN = 1.2  # for loading, as the page says
_BYTES = {BF16: 2, SFP8: 1, Q4_0: 0.5}  # per parameter
_FORMATS = {BF16: "bf16", Q4_0: "q4_0", MOBILE: "mobile", MOBILE_TEXT: "mobile"}
_HEADINGS = ("Google", "Rule", "File", "Memory")
_LEGEND = (
    "Weights only, in GiB (2³⁰ bytes): no key/value cache, no activations, no engine. Google: as printed on {source}, "
    "read {date}. Rule: the same number, computed. File: the download, to the byte. Memory: the weights that "
    "have to be there when this kit runs it."
)


@dataclass(frozen=True)
class PublishedCell:
    """One number of the table, and what there is.

    Attributes:
        size: One of `GEMMA_SIZES`.
        column: One of `COLUMNS`.
        figure: GiB, as printed.
        rule_bytes: What the rule behind the column gives.
        file_bytes: Bytes of the weight files, None where nothing is published in this format.
        resident_bytes: Bytes of the weights that have to be in memory, by the plan; None as above.
        reason: Why the three differ.
    """

    size: str
    column: str
    figure: str
    rule_bytes: int
    file_bytes: int | None
    resident_bytes: int | None
    reason: str

    @property
    def reproduced(self) -> str:
        """The rule's GiB, written with as many decimals as Google's."""
        return f"{self.rule_bytes / GIB:.{len(self.figure.partition('.')[2])}f}"


@dataclass(frozen=True, repr=False)
class PublishedMemory(Sequence):
    """The cells, size by size; draws itself as a table."""

    rows: tuple[PublishedCell, ...]

    def __getitem__(self, index):
        return PublishedMemory(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [f"  {'Column':<18}" + "".join(f"{name:>10}" for name in _HEADINGS) + "  Why"]
        for size, rows in groupby(self.rows, key=lambda row: row.size):
            lines.append(size)
            for row in rows:
                start = f"  {row.column:<18}" + "".join(f"{text:>10}" for text in _numbers(row)) + "  "
                lines += textwrap.wrap(row.reason, 120, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join([*lines, *textwrap.wrap(_legend(), 120)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        groups = groupby(self.rows, key=lambda row: row.size)
        heads = "".join(f'<th class="gqk-bytes" scope="col">{name}</th>' for name in _HEADINGS)
        return (
            f'{PANEL_STYLE}<div class="gqk-panel"><table class="gqk-table" style="max-width:46em"><thead><tr>'
            f'<th scope="col">Column</th>{heads}</tr></thead>'
            f"{''.join(_html_group(size, rows) for size, rows in groups)}</table>"
            f'<div class="gqk-dim">{html.escape(_legend())}</div></div>'
        )


def published_memory(size: str | None = None) -> PublishedMemory:
    """Compute Google's published memory table again, and say for each number why the real one is another.

    Its first three columns are parameters × bytes × 1.2, its Mobile columns the tensors without the per-layer table.

    Args:
        size: One of `GEMMA_SIZES`, upper or lower case; None takes all.

    Raises:
        UnknownNameError: The table has no such size.

    Source: https://ai.google.dev/gemma/docs/core
    """
    sizes = GEMMA_SIZES if size is None else [name for name in GEMMA_SIZES if name.lower() == str(size).lower()]
    if not sizes:
        raise unknown_name("size", size, GEMMA_SIZES)
    return PublishedMemory(tuple(cell for name in sizes for cell in _cells(name)))


@functools.cache
def _cells(size: str) -> tuple[PublishedCell, ...]:
    return tuple(_cell(size, column, figure) for column, figure in zip(COLUMNS, FIGURES[size], strict=False))


def _cell(size: str, column: str, figure: str) -> PublishedCell:
    rule_bytes, format = _rule_bytes(size, column), _FORMATS.get(column)
    file_bytes = resident_bytes = None
    if format:
        engine = "transformers" if format == "mobile" else None  # what the figure is of; llama.cpp runs another file
        plan = plan_memory(size, format, engine=engine, text_only=column in (Q4_0, MOBILE_TEXT))
        file_bytes, resident_bytes = plan.download_bytes, _needed_weights(plan)
    return PublishedCell(size, column, figure, rule_bytes, file_bytes, resident_bytes,
                         _reason(size, column, rule_bytes, file_bytes))  # fmt: skip


def _rule_bytes(size: str, column: str) -> int:
    if column in _BYTES:
        return round(_rounded_parameters(size) * _BYTES[column] * MARGIN)
    return sum(_mobile_bytes(size, column == MOBILE_TEXT))


def _rounded_parameters(size: str) -> int:
    """Return what a file stores, also keys and values that no layer uses, to hundredths of a billion: E2B's 5.12."""
    return round(sum(tensor.num_values for tensor in bf16_tensors(hf_config(size))), -7)


def _mobile_bytes(size: str, text_only: bool) -> Iterator[int]:
    """Yield the bytes of the tensors of a mobile checkpoint that a model computes with, floats in 16 bits; the
    per-layer table stays on disk."""
    config = hf_config(size, "mobile")
    used = {tensor.name for tensor in bf16_tensors(config, has_shared_kv=False)}
    for tensor in mobile_tensors(config):
        module = tensor.name.rpartition(".")[0]
        is_unused = module.endswith((".k_proj", ".v_proj")) and module + ".weight" not in used
        if part_of(tensor.name) == TABLE or is_unused or (text_only and not is_text(tensor.name)):
            continue
        is_float = tensor.dtype == "F32" and not tensor.name.endswith("_scale")
        yield tensor.nbytes // 2 if is_float else tensor.nbytes


def _needed_weights(plan: Parts) -> int:
    parts = (part for part in plan.placed if part.name in WEIGHTS and part.place != "disk" and not part.is_spare)
    return sum(part.nbytes for part in parts)


def _reason(size: str, column: str, rule_bytes: int, file_bytes: int | None) -> str:
    count = f"{_rounded_parameters(size) / 1e9:.2f} billion stored parameters"
    if column == BF16:
        table = _table_bytes(size, "bf16")
        rest = f" Of it the per-layer table, {readable_bytes(table)}, can stay on disk." if table else ""
        return f"{count} at 16 bits, and 20 % for loading, which the file does not have.{rest}"
    if column == SFP8:
        return f"{count} at 8 bits and 20 %. Nothing is published in this format."
    if column == Q4_0:
        share = file_bytes / rule_bytes - 1
        verdict = "larger than the table says" if share > 0 else "smaller, thanks to the margin"
        return (
            f"{count} at 4.0 bits and 20 %. A block of Q4_0 takes 4.5 bits, the embeddings are Q6_K (6.56), vision and "
            f"audio are in another file: this one is {abs(share) * 100:.0f} % {verdict}."
        )
    table = readable_bytes(_table_bytes(size, "mobile"))
    if column == MOBILE:
        return (
            f"No margin: every tensor but the per-layer table, {table}, which stays on disk, and the keys and values "
            "that no layer uses. In the file some of the rest are 32-bit."
        )
    return f"The same without vision and audio. The file has them, and the per-layer table, {table}."


def _table_bytes(size: str, format: str) -> int:
    tensors = {"bf16": bf16_tensors, "mobile": mobile_tensors}[format](hf_config(size, format))
    return sum(tensor.nbytes for tensor in tensors if part_of(tensor.name) == TABLE)


def _legend() -> str:
    return _LEGEND.format(source=SOURCE, date=SOURCE_DATE)


def _numbers(row: PublishedCell) -> tuple[str, ...]:
    real = (row.file_bytes, row.resident_bytes)
    return row.figure, row.reproduced, *("–" if nbytes is None else f"{nbytes / GIB:#.3g}" for nbytes in real)


def _html_group(size: str, rows: Iterable[PublishedCell]) -> str:
    heading = f'<tr><th class="gqk-size" scope="rowgroup" colspan="{1 + len(_HEADINGS)}">{html.escape(size)}</th></tr>'
    return f"<tbody>{heading}{''.join(map(_html_rows, rows))}</tbody>"


def _html_rows(row: PublishedCell) -> str:
    """Draw a cell's numbers, and below them the reason, which has the width of the page on a phone, too."""
    numbers = "".join(f'<td class="gqk-bytes">{html.escape(text)}</td>' for text in _numbers(row))
    format = _FORMATS.get(row.column)
    dot = format_label(format).removesuffix(format) if format else ""
    return (
        f"<tr><td>{dot}{html.escape(row.column)}</td>{numbers}</tr>"
        f'<tr><td class="gqk-text gqk-dim" style="padding-bottom:8px" colspan="{1 + len(_HEADINGS)}">'
        f"{html.escape(row.reason)}</td></tr>"
    )
