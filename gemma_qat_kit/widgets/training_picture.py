"""What is drawn of a training run: the loss, and held-out text between two lines, as inline SVG."""

import math
from collections.abc import Sequence

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.finetune.run import TuneEvaluation
from gemma_qat_kit.qat.run import Evaluation, Lines, Step
from gemma_qat_kit.widgets.look import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 240, 46, 30, 40
_RIGHT, _RIGHT_OF_LABELS = 14, 84
_LABEL_GAP = 15
TEXT_LOSS = "Loss: surprise at the text, nats per token"
_MOST_DRAWN = 300  # steps of a longer run are drawn as means


def charts_html(
    steps: Sequence[Step],
    lines: Lines | None,
    evaluations: Sequence[Evaluation | TuneEvaluation],
    best: Evaluation | TuneEvaluation | None,
    num_steps: int,
    loss: str,
    colour: str = FORMAT_COLOURS["q4_0"],
    *,
    until: float = math.inf,
) -> str:
    """Draw the loss of each step, and beside it the held-out text; the axes are there before the first point is.

    Args:
        steps: Those that were made.
        lines: What training moves between; None while nobody knows, and where there is nothing.
        evaluations: Looks at the held-out text.
        best: The one that is kept.
        num_steps: Steps that are to be made.
        loss: What it is, `TEXT_LOSS` or another.
        colour: Of what is trained.
        until: Points after this step are left out; the axes are those of all, so that nothing jumps while it grows.
    """
    parts = (_loss_svg(steps, num_steps, loss, colour, until),
             _held_out_svg(lines, evaluations, best, num_steps, colour, until))  # fmt: skip
    return f'<div class="gqk-train-charts">{"".join(parts)}</div>'


def readable_perplexity(nats: float) -> str:
    """Write the perplexity that some nats per token are, in four digits; that of a broken model in two."""
    value = math.exp(min(nats, 700))
    if value < 1000:
        return f"{value:#.4g}"
    return f"{value:,.0f}" if value < 1e5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _loss_svg(steps: Sequence[Step], num_steps: int, title: str, colour: str, until: float) -> str:
    points = _thinned([(step.step, step.loss) for step in steps])
    losses = [loss for _, loss in points]
    low = min(losses) * 0.9 if title == TEXT_LOSS and losses else 0.0  # a distance has a zero to reach
    axes = _Axes(num_steps, low, max(losses, default=1.0) * 1.05 or 1.0, WIDTH - _RIGHT)
    drawn = axes.drawn(_round_ticks(axes.low, axes.high))
    drawn += [f'<circle cx="{axes.x(step):.1f}" cy="{axes.y(loss):.1f}" r="2.5" fill="{colour}" opacity=".45"/>'
              for step, loss in points if step <= until]  # fmt: skip
    if line := [(axes.x(step), axes.y(loss)) for step, loss in _smoothed(points) if step <= until]:
        drawn.append(_path(line, colour))
    last = next((step for step in reversed(steps) if step.step <= until), None)
    words = f"{title}: step {last.step}, {last.loss:.3g}" if last else f"{title}: no step yet"
    return _svg(title, words, drawn)


def _held_out_svg(lines, evaluations, best, num_steps: int, colour: str, until: float) -> str:
    title = "Perplexity of held-out text"
    if lines is None and not evaluations:
        axes = _Axes(num_steps, 0, 1, WIDTH - _RIGHT_OF_LABELS)
        return _svg(title, f"{title}: nothing is measured yet", axes.drawn([]))
    known = []
    if lines is not None:
        known += [("float", lines.float_nats, "currentColor"), ("PTQ", lines.plain.nats, FORMAT_COLOURS["q4_0-naive"])]
    nats = [value for _, value, _ in known] + [each.nats for each in evaluations]
    margin = 0.12 * (max(nats) - min(nats)) or 0.05
    axes = _Axes(num_steps, min(nats) - margin, max(nats) + margin, WIDTH - _RIGHT_OF_LABELS)
    drawn = axes.drawn(_perplexity_ticks(axes.low, axes.high))
    for _, value, line_colour in known:
        drawn.append(f'<line x1="{LEFT}" x2="{axes.right}" y1="{axes.y(value):.1f}" y2="{axes.y(value):.1f}" '
                     f'stroke="{line_colour}" stroke-width="2" stroke-dasharray="6 4"/>')  # fmt: skip
    shown = [each for each in evaluations if each.step <= until]
    points = [(axes.x(each.step), axes.y(each.nats)) for each in shown]
    if points:
        drawn.append(_path(points, colour))
    for each, (x, y) in zip(shown, points, strict=True):
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if each is best else 3.5}" fill="{colour}"/>')
    if best is not None:
        known.append(("best", best.nats, colour))
    drawn += _labels(axes, known)
    words = ", ".join(f"{name} {readable_perplexity(value)}" for name, value, _ in known)
    return _svg(title, f"{title}: {words}", drawn)


def _labels(axes: "_Axes", known: list[tuple[str, float, str]]) -> list[str]:
    """Write the name of each line beside it, apart from each other where they are close."""
    known, drawn = sorted(known, key=lambda each: -each[1]), []
    heights = [axes.y(value) for _, value, _ in known]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LABEL_GAP)
    beyond = max(0, heights[-1] - (HEIGHT - BOTTOM))
    heights = [height - beyond for height in heights]
    for (name, value, colour), height in zip(known, heights, strict=True):
        drawn.append(f'<line x1="{axes.right}" y1="{axes.y(value):.1f}" x2="{axes.right + 8}" y2="{height:.1f}" '
                     f'stroke="{colour}" stroke-width="1.5"/>')  # fmt: skip
        weight = ' font-weight="600"' if name == "best" else ""
        drawn.append(
            f'<text x="{axes.right + 11}" y="{height + 4:.1f}"{weight}>{name} {readable_perplexity(value)}</text>'
        )
    return drawn


class _Axes:
    """Where a step and a value lie, and the lines and numbers that say so."""

    def __init__(self, num_steps: int, low: float, high: float, right: float):
        self.num_steps, self.low, self.high, self.right = num_steps, low, high, right

    def x(self, step: float) -> float:
        return LEFT + step / self.num_steps * (self.right - LEFT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, ticks: list[tuple[float, str]]) -> list[str]:
        parts = [_text((LEFT + self.right) / 2, HEIGHT - 4, "Step", "middle")]
        for step in sorted({0, self.num_steps // 2, self.num_steps}):
            anchor = "end" if step == self.num_steps else "middle"  # the picture's edge would cut "2,000"
            parts.append(_text(self.x(step), HEIGHT - BOTTOM + 16, f"{step:,}", anchor))
        for value, name in ticks:
            y = f"{self.y(value):.1f}"
            parts.append(f'<line x1="{LEFT}" x2="{self.right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".18"/>')
            parts.append(_text(LEFT - 6, self.y(value) + 4, name, "end"))
        bottom = HEIGHT - BOTTOM
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{self.right}" fill="none" stroke="currentColor" opacity=".5"/>')
        return parts


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return three to six round numbers between two others, with as many digits as tell them apart."""
    power = math.floor(math.log10((high - low) / 2))
    step = next(factor * 10.0**power for factor in (10, 5, 2, 1, 0.5) if (high - low) / factor / 10.0**power >= 2.5)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:,.{min(digits, 4)}f}") for i in range(first, last + 1)]


def _perplexity_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return round perplexities between two numbers of nats; powers of ten where it is far from one to the other."""
    if high - low < 2:
        return [(math.log(value), name) for value, name in _round_ticks(math.exp(low), math.exp(high)) if value > 0]
    first, last = math.ceil(low / math.log(10)), math.floor(high / math.log(10))
    every = max(1, math.ceil((last - first + 1) / 6))
    factors = (1,) if last - first >= 3 else (1, 2, 5)
    values = [(factor, power) for power in range(first - 1, last + 1, every) for factor in factors]
    nats = [(math.log(factor) + power * math.log(10), factor, power) for factor, power in values]
    return [(value, f"{factor * 10**power:,}" if 0 <= power < 5 else f"{factor}e{power}")
            for value, factor, power in nats if low <= value <= high]  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return as many points as can be told apart; of more, means of neighbours."""
    size = math.ceil(len(points) / _MOST_DRAWN) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return running means over an eighth of the points."""
    size, found = max(1, len(points) // 8), []
    for i, (step, _) in enumerate(points):
        window = [loss for _, loss in points[max(0, i - size) : i + size + 1]]
        found.append((step, sum(window) / len(window)))
    return found


def _path(points: list[tuple[float, float]], colour: str) -> str:
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'


def _svg(title: str, words: str, drawn: list[str]) -> str:
    return (
        f'<svg class="gqk-train-svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}" '
        f'fill="currentColor" font-size="12">{_text(0, 14, title)}{"".join(drawn)}</svg>'
    )


def _text(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
