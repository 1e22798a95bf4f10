"""Every official Gemma 4 checkpoint as one row: exact names, bytes, needs and the page to check; what is missing too.

`catalog()` lists the rows of `published` as a table that draws itself, `find_checkpoint` looks one up.
"""

import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from gemma_qat_kit.errors import NotPublishedError, unknown_name
from gemma_qat_kit.published import (
    BUILT_IN_FORMAT,
    BUILT_IN_FORMATS,
    BUILT_IN_PACKAGE,
    BUILT_IN_SIZE,
    CHECKPOINTS,
    COMPUTED,
    FORMATS,
    ROLES,
    SIZES,
    Checkpoint,
    CheckpointFile,
    Sampling,
)
from gemma_qat_kit.units import readable_bytes

__all__ = [
    "BUILT_IN_FORMAT",
    "BUILT_IN_FORMATS",
    "BUILT_IN_PACKAGE",
    "BUILT_IN_SIZE",
    "FORMATS",
    "FORMAT_COLOURS",
    "KNOWN_FORMATS",
    "PANEL_STYLE",
    "ROLES",
    "SIZES",
    "Catalog",
    "Checkpoint",
    "CheckpointFile",
    "Sampling",
    "catalog",
    "catalog_checkpoint_for_repo",
    "find_checkpoint",
    "format_label",
]
KNOWN_FORMATS = (*FORMATS, *BUILT_IN_FORMATS)

# One colour per format in every table, plot and widget: Okabe and Ito's palette, which colour-blind readers can tell
# apart (https://jfly.uni-koeln.de/color/). Never the only sign: the name stands beside it.
FORMAT_COLOURS = {
    "bf16": "#999999",
    "q4_0": "#0072B2",
    "q4_0-naive": "#D55E00",  # Q4_0 by the plain rule, from weights that were not trained for it
    "q4_0-unquantized": "#56B4E9",
    "w4a16": "#CC79A7",
    "mobile": "#009E73",
    "nf4": "#E69F00",
    "int8": "#F0E442",
    "q4_1": "#000000",
    "float32": "#666666",
}
# Look of the tables that results draw. Selectors are as specific as JupyterLab's own table rules, which they replace.
PANEL_STYLE = """<style>
.gqk-panel{color:var(--jp-ui-font-color1,inherit);font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);
overflow-x:auto}
.gqk-panel .gqk-table{border-collapse:collapse;margin:.4em 0;font-size:13px;table-layout:auto}
.gqk-panel .gqk-table tbody tr:nth-child(n){background:transparent}
.gqk-panel .gqk-table th,.gqk-panel .gqk-table td{text-align:left;vertical-align:top;padding:2px 16px 2px 0;
font-weight:400;line-height:1.5;border:0;background:transparent;white-space:nowrap}
.gqk-panel .gqk-table thead th{border-bottom:1px solid var(--jp-border-color1,rgba(127,127,127,.6))}
.gqk-panel .gqk-table tbody tr:first-child>*{border-top:1px solid var(--jp-border-color2,rgba(127,127,127,.35))}
.gqk-panel .gqk-table thead th,.gqk-panel .gqk-table th.gqk-size{font-weight:600}
.gqk-panel .gqk-table .gqk-bytes{text-align:right;font-variant-numeric:tabular-nums}
.gqk-panel .gqk-table td.gqk-text{white-space:normal;min-width:19em}
.gqk-panel a{color:var(--jp-content-link-color,inherit);text-decoration:none}
.gqk-panel a:hover,.gqk-panel a:focus{text-decoration:underline}
.gqk-panel .gqk-dim{opacity:.65}
.gqk-panel .gqk-dot{display:inline-block;box-sizing:border-box;width:.75em;height:.75em;border-radius:50%;
margin-right:.5em;border:1px solid rgba(127,127,127,.8)}
@media (max-width:640px){.gqk-panel .gqk-table th,.gqk-panel .gqk-table td{padding-right:8px}
.gqk-panel .gqk-table td.gqk-text{min-width:7em;overflow-wrap:anywhere}}
</style>"""


def format_label(format: str) -> str:
    """Return a format's name as HTML, with its coloured dot in front."""
    colour = FORMAT_COLOURS[format]
    return f'<span class="gqk-dot" style="background:{colour}" aria-hidden="true"></span>{html.escape(format)}'


def _size(row: Checkpoint) -> str:
    """Bytes of the weight files; "≈" where the number is computed."""
    if row.weights_bytes is None:
        return "-"
    return ("≈" if row.bytes_source == COMPUTED else "") + readable_bytes(row.weights_bytes)


def _place(row: Checkpoint) -> str:
    """Where the row's weights come from, in words."""
    if row.unavailable:
        return f"not published ({row.unavailable}); take {row.alternative}"
    if row.made_from:
        return f"made here while loading {row.made_from}"
    return row.repo_id or f"built in: comes with {BUILT_IN_PACKAGE}"


@dataclass(frozen=True, repr=False)
class Catalog(Sequence):
    """Rows of the catalog, in the order of sizes and formats; draws itself as a table."""

    rows: tuple[Checkpoint, ...]

    def __getitem__(self, index):
        return Catalog(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [f"  {'Format':<16}  {'Role':<7}  {'Download':>9}  From"]
        for size, rows in groupby(self.rows, key=lambda row: row.size):
            lines.append(size)
            for row in rows:
                start = f"  {row.format:<16}  {row.role:<7}  {_size(row):>10}  "
                lines += textwrap.wrap(_place(row), 100, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join([*lines, *textwrap.wrap(self._legend(), 100)])

    __repr__ = __str__

    def _legend(self) -> str:
        dates = sorted({row.source_date for row in self.rows})
        licences = sorted({row.license for row in self.rows})
        computed = (
            " ≈: computed from the tensor list." if any(row.bytes_source == COMPUTED for row in self.rows) else ""
        )
        return (
            f"{len(self.rows)} rows, licence {', '.join(licences) or '-'}, checked {', '.join(dates) or '-'}. "
            f"Download: the weight files, 1 GiB = 2³⁰ bytes.{computed}"
        )

    def _repr_html_(self) -> str:
        groups = groupby(self.rows, key=lambda row: row.size)
        body = "".join(_html_group(size, list(rows)) for size, rows in groups)
        return (
            f'{PANEL_STYLE}<div class="gqk-panel"><table class="gqk-table"><thead><tr><th>Size</th><th>Format</th>'
            f'<th>Role</th><th class="gqk-bytes">Download</th><th>From</th></tr></thead>{body}</table>'
            f'<div class="gqk-dim">{html.escape(self._legend())}</div></div>'
        )


def _html_group(size: str, rows: list[Checkpoint]) -> str:
    heading = f'<th class="gqk-size" scope="rowgroup" rowspan="{len(rows)}">{html.escape(size)}</th>'
    lines = [f"<tr>{heading if i == 0 else ''}{_html_cells(row)}</tr>" for i, row in enumerate(rows)]
    return f"<tbody>{''.join(lines)}</tbody>"


def _html_cells(row: Checkpoint) -> str:
    """Cells of one row after its size; greyed where there is no such checkpoint, linked to the page to check."""
    dim = "" if row.is_available else " gqk-dim"
    place = html.escape(_place(row))
    if row.is_available:
        title = html.escape(f"{row.notes} Needs {', '.join(row.requires)}.")
        place = f'<a href="{html.escape(row.source)}" title="{title}">{place}</a>'
    return (
        f'<td class="gqk-name{dim}">{format_label(row.format)}</td><td class="gqk-name{dim}">{row.role}</td>'
        f'<td class="gqk-bytes{dim}">{_size(row)}</td><td class="gqk-text{dim}">{place}</td>'
    )


def catalog(*, size: str | None = None, format: str | None = None, role: str | None = None) -> Catalog:
    """List the checkpoints, all of them or those of a size, a format or a role.

    Args:
        size: One of `SIZES`, upper or lower case.
        format: One of `KNOWN_FORMATS`.
        role: "chat" or "drafter".

    Raises:
        UnknownNameError: A filter is not a known name.
    """
    size = None if size is None else _known("size", size, SIZES)
    format = None if format is None else _known("format", format, KNOWN_FORMATS)
    role = None if role is None else _known("role", role, ROLES)
    wanted = {"size": size, "format": format, "role": role}
    return Catalog(tuple(r for r in CHECKPOINTS if all(v is None or getattr(r, k) == v for k, v in wanted.items())))


def find_checkpoint(size: str, format: str | None = None, *, role: str = "chat") -> Checkpoint:
    """Look up the one checkpoint of a size in a format.

    Args:
        size: One of `SIZES`, upper or lower case.
        format: One of `KNOWN_FORMATS`. None takes the QAT checkpoint that is easiest to run: q4_0, of a drafter
            q4_0-unquantized, of the built-in model the file as it is.
        role: "chat" or "drafter".

    Raises:
        UnknownNameError: A name is unknown; the message suggests the nearest one.
        NotPublishedError: There is no such checkpoint; the message says why and what to take instead.
    """
    rows = catalog(size=size, role=role)
    size, role = _known("size", size, SIZES), _known("role", role, ROLES)
    default = BUILT_IN_FORMAT if size == BUILT_IN_SIZE else "q4_0" if role == "chat" else "q4_0-unquantized"
    format = default if format is None else _known("format", format, KNOWN_FORMATS)
    row = next((row for row in rows if row.format == format), None)
    if row is None:
        raise _no_such_row(size, format, role, [row.format for row in rows])
    if row.unavailable:
        raise NotPublishedError(
            f"There is no {row.key} checkpoint.",
            f"{row.unavailable[0].upper()}{row.unavailable[1:]}.",
            f'Take {row.alternative}: load("{size}", "{row.alternative}").',
        )
    return row


def catalog_checkpoint_for_repo(repo_id: str) -> Checkpoint | None:
    """Return the row published under this hub repository, upper or lower case, or None where the catalog has none."""
    published = (row for row in CHECKPOINTS if row.repo_id and not row.made_from)
    return next((row for row in published if row.repo_id.lower() == repo_id.lower()), None)


def _known(kind: str, value: object, names: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in names}
    if str(value).lower() not in by_lower:
        raise unknown_name(kind, value, by_lower.values())
    return by_lower[str(value).lower()]


def _no_such_row(size: str, format: str, role: str, formats: list[str]) -> NotPublishedError:
    """Build the error for a combination that the catalog has no row for."""
    wrong = f"There is no {role} checkpoint of {size} in {format}."
    if not formats:
        return NotPublishedError(
            wrong, "Gemma 4 sizes have drafters; the built-in model has none.", f"Take {SIZES[0]}."
        )
    take = next((format for format in ("q4_0", BUILT_IN_FORMAT) if format in formats), formats[-1])
    call = f'load("{size}", "{take}")' if role == "chat" else f'find_checkpoint("{size}", "{take}", role="drafter")'
    return NotPublishedError(wrong, f"Formats there: {', '.join(formats)}.", f"Take {take}: {call}.")
