"""A class as text, as a table, and as two pictures; every name in it may be anybody's."""

import html

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.classroom.pool import ClassResults, Student
from gemma_qat_kit.classroom.training import Training
from gemma_qat_kit.memory.receipts_picture import draw_errors

_LEGEND = "✓ 2: right at the second try; ✗ 3: three answers, none right yet; –: not tried."
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 600, 190, 100, 42, 22
_LOW, _HIGH = -0.1, 1.1  # of the axis; what lies beyond is drawn at its end, and its number says it
_MOST_RUNS, _MOST_NAME = 40, 22
_COLOUR, _GREY = "#0072B2", "#888888"
_TITLES = {
    "qat": ("Lost log-perplexity won back by QAT", "plain rule", "before quantization"),
    "finetune": ("Surprise at held-out answers gone after fine-tuning", "before", "none left"),
}


def describe(results: ClassResults) -> str:
    """Return a class as text."""
    heads = ("Student", *results.exercises, "Solved")
    rows = [heads, *((s.name, *_cells(s, results), _share(s, results)) for s in results.students), _sums(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    runs = [f"{name}: {_in_words(run)}" for name, run in _runs(results)]
    return "\n".join([*lines, _LEGEND, *runs, *results.notes])


def draw(results: ClassResults) -> str:
    """Return a class as HTML: notes first, then the table, memory, and training."""
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in results.notes)
    memory = results.receipts
    parts = [f'<div role="status">{len(results.students)} students.{notes}</div>', _table(results)]
    if memory.rows:
        count = len({str(sorted(row.machine.items(), key=str)) for row in memory.rows})
        kinds = f"{count} kind{'' if count == 1 else 's'} of machine"
        parts += [f"<h4>Memory, planned and measured: {len(memory):,} runs on {kinds}</h4>", draw_errors(memory)]
    for kind in _TITLES:
        runs = [(name, run) for name, run in _runs(results) if run.kind == kind]
        parts.append(_svg(kind, runs[:_MOST_RUNS]) if runs else "")
    return f'{PANEL_STYLE}<div class="gqk-panel gqk-receipts gqk-class">{"".join(parts)}</div>'


def _runs(results: ClassResults) -> list[tuple[str, Training]]:
    """Return the runs that won or lost something, each with its student, the best first."""
    runs = [(student.name, run) for student in results.students for run in student.trainings if run.end is not None]
    return sorted(runs, key=lambda row: -row[1].end)


def _cells(student: Student, results: ClassResults) -> list[str]:
    return [
        f"✓ {student.solved[n]}" if n in student.solved else f"✗ {student.open[n]}" if n in student.open else "–"
        for n in results.exercises
    ]


def _share(student: Student, results: ClassResults) -> str:
    return f"{len(student.solved)} of {len(results.exercises)}"


def _sums(results: ClassResults) -> tuple[str, ...]:
    count = len(results.students)
    return ("Solved by", *(f"{sum(n in s.solved for s in results.students)} of {count}" for n in results.exercises), "")


def _table(results: ClassResults) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Student", *results.exercises, "Solved"))
    body = "".join(_row(s.name, [*_cells(s, results), _share(s, results)]) for s in results.students)
    name, *sums = _sums(results)
    return (
        f'<table class="gqk-table"><thead><tr>{head}</tr></thead><tbody>{body}{_row(name, sums)}</tbody></table>'
        f'<div class="gqk-dim">{_LEGEND}</div>'
    )


def _row(name: str, cells: list[str]) -> str:
    return f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _in_words(run: Training) -> str:
    steps = f"{run.num_steps:,} step{'' if run.num_steps == 1 else 's'}"
    if run.kind == "qat":
        return f"{run.name}, {steps}: {run.start:.0%} by scales alone, {run.end:.0%} with training"
    return f"{run.name}, {steps}: {run.end:.0%} of the surprise gone"


def _svg(kind: str, runs: list[tuple[str, Training]]) -> str:
    """Draw each run as a line from where it began to the point that was kept."""
    title, zero, one = _TITLES[kind]
    height = _TOP + _ROW * len(runs) + 24
    marks = "".join(
        f'<line x1="{_x(at):.1f}" y1="{_TOP - 8}" x2="{_x(at):.1f}" y2="{height - 20}" stroke="currentColor" '
        f'stroke-dasharray="4 3" opacity=".6"/><text x="{_x(at):.1f}" y="{_TOP - 14}" '
        f'text-anchor="middle">{words}</text>'
        f'<text x="{_x(at):.1f}" y="{height - 6}" text-anchor="middle">{at:.0%}</text>'
        for at, words in ((0, zero), (1, one))
    )
    rows = "".join(_run(name, run, _TOP + _ROW * (i + 0.5)) for i, (name, run) in enumerate(runs))
    label = html.escape(f"{title}. " + "; ".join(f"{name}: {_in_words(run)}" for name, run in runs))
    return (
        f'<h4>{title}</h4><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}" fill="currentColor" '
        f'font-size="12" font-family="var(--jp-ui-font-family, system-ui, sans-serif)" '
        f'style="width:100%;max-width:{_WIDTH}px;display:block">{marks}{rows}</svg>'
        f'<div class="gqk-dim">Open circle: where training began; filled: the point that was kept.</div>'
    )


def _run(name: str, run: Training, y: float) -> str:
    start, end = _x(run.start), _x(run.end)
    steps = f", {run.num_steps:,} steps"
    words = html.escape(f"{name[:_MOST_NAME]}{'…' if len(name) > _MOST_NAME else ''}{steps}")
    return (
        f'<text x="{_LEFT - 40}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        f'<line x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="{_COLOUR}" stroke-width="3"/>'
        f'<circle cx="{start:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{_GREY}" stroke-width="2"/>'
        f'<circle cx="{end:.1f}" cy="{y:.1f}" r="5" fill="{_COLOUR}"/>'
        f'<text x="{_WIDTH}" y="{y + 4:.1f}" text-anchor="end">{run.start:.0%} → {run.end:.0%}</text>'
    )


def _x(share: float) -> float:
    at = (min(max(share, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)
    return _LEFT + at * (_WIDTH - _LEFT - _RIGHT)
