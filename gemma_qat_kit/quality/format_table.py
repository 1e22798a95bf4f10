"""What each number format costs a model, side by side: size against quality, as a table and as a picture."""

import html
import statistics
import textwrap
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from gemma_qat_kit.catalog import FORMAT_COLOURS, PANEL_STYLE
from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.machine import read_memory
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.quality import post_training, texts
from gemma_qat_kit.quality.comparison import Comparison, sqnr_db, summarize
from gemma_qat_kit.quality.post_training import METHODS, QuantizedSize
from gemma_qat_kit.quality.scoring import TokenFigures, cut_windows, score, scorer_of
from gemma_qat_kit.units import readable_bytes

WINDOW = 256
DEFAULT_METHODS = tuple(method for method in METHODS if method != "q4_0+grid")  # that one is for QAT weights
_REFERENCE_BYTES = 2**29  # most that the float model's logits may take at a time
# The catalog's colours; the three mobile widths share one, and two methods that it does not have take Paul Tol's
# (https://sronpersonalpages.nl/~pault/). The name stands beside every colour.
METHOD_COLOURS = dict.fromkeys(METHODS, FORMAT_COLOURS["mobile"]) | {
    "q8_0": "#332288",
    "q4_0": FORMAT_COLOURS["q4_0-naive"],
    "q4_0+importance": "#882255",
    "q4_0+grid": FORMAT_COLOURS["q4_0"],
    "w4a16": FORMAT_COLOURS["w4a16"],
    "nf4": FORMAT_COLOURS["nf4"],
}

_HEADINGS = ("Method", "Size", "Bits/weight", "Perplexity", "Ratio", "Top-1 %", "KL mean", "KL 99 %", "SQNR dB",
             "Worst")  # fmt: skip


@dataclass(frozen=True)
class FormatRow:
    """One method: what it takes and what it costs.

    Attributes:
        method: One of `METHODS`.
        size: Bytes and bits per weight of the quantized layers.
        quality: Against the model as it was.
        sqnr_db: Signal-to-quantization-noise ratio of each weight in decibels, by name.
    """

    method: str
    size: QuantizedSize
    quality: Comparison
    sqnr_db: dict[str, float]

    @property
    def worst_layer(self) -> str:
        """The weight with the lowest ratio."""
        return min(self.sqnr_db, key=self.sqnr_db.__getitem__)

    @property
    def median_sqnr_db(self) -> float:
        """The ratio that half of the weights stay above."""
        return statistics.median(self.sqnr_db.values())


@dataclass(frozen=True)
class FormatTable:
    """What each method costs a model; draws itself as a table, and `figure()` as a picture.

    Attributes:
        name: The model.
        text: What it was measured on.
        float_nbytes: Bytes of the layers before.
        float_bits: Bits of one of their weights before.
        rows: One for each method, in the order asked for.
    """

    name: str
    text: str
    float_nbytes: int
    float_bits: int
    rows: tuple[FormatRow, ...]

    @property
    def perplexity(self) -> float:
        """The model's perplexity before."""
        return self.rows[0].quality.reference_perplexity

    def _cells(self) -> list[tuple[str, ...]]:
        cells = [("unquantized", readable_bytes(self.float_nbytes), str(self.float_bits), f"{self.perplexity:#.4g}",
                  "1", "100", "0", "0", "", "")]  # fmt: skip
        for row in self.rows:
            quality = row.quality
            cells.append((row.method, readable_bytes(row.size.nbytes), f"{row.size.bits_per_weight:.4g}",
                          f"{quality.perplexity:#.4g}", f"{quality.perplexity_ratio:#.4g}",
                          f"{100 * quality.top1_agreement:.1f}", f"{quality.kl_divergence:.3g}",
                          f"{quality.kl_divergence_p99:.3g}", f"{row.median_sqnr_db:.1f}",
                          f"{min(row.sqnr_db.values()):.1f}"))  # fmt: skip
        return cells

    def _note(self) -> str:
        quality = self.rows[0].quality
        return (
            f"{self.name}, measured on {quality.num_tokens:,} tokens of {self.text} in windows of {quality.window}. "
            "Size: the layers' matrices with their scales. KL divergence from the unquantized model, nats per token. "
            "SQNR: signal to quantization noise of a matrix, of the median and the worst one."
        )

    def __str__(self) -> str:
        cells = [_HEADINGS, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADINGS))]
        lines = [row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in
                 zip(row[1:], widths[1:], strict=True)) for row in cells]  # fmt: skip
        return "\n".join([*lines, *textwrap.wrap(self._note(), 100)])

    def _repr_html_(self) -> str:
        head = f'<th scope="col">{_HEADINGS[0]}</th>'
        head += "".join(f'<th class="gqk-bytes" scope="col">{html.escape(name)}</th>' for name in _HEADINGS[1:])
        body = "".join(_html_row(cells) for cells in self._cells())
        table = f'<table class="gqk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return (
            f'{PANEL_STYLE}<div class="gqk-panel">{table}<div class="gqk-dim">{html.escape(self._note())}</div></div>'
        )

    def figure(self):
        """Return a plotly figure: bits per weight against mean KL divergence."""
        from gemma_qat_kit.quality.format_picture import draw

        return draw(self, METHOD_COLOURS)


def _html_row(cells: tuple[str, ...]) -> str:
    colour = METHOD_COLOURS.get(cells[0], FORMAT_COLOURS["float32"])
    dot = f'<span class="gqk-dot" style="background:{colour}" aria-hidden="true"></span>'
    numbers = "".join(f'<td class="gqk-bytes">{html.escape(cell)}</td>' for cell in cells[1:])
    return f'<tr><td class="gqk-name">{dot}{html.escape(cells[0])}</td>{numbers}</tr>'


def compare_formats(
    model,
    methods: Iterable[str] = DEFAULT_METHODS,
    text: str | Path | None = None,
    *,
    max_tokens: int = 2048,
    report: Report | None = None,
) -> FormatTable:
    """Quantize a model's layers by each method in turn and measure what that costs; the model is as before afterwards.

    Args:
        model: A model of `gqk.load` that runs in transformers, or a pair (transformers module, tokenizer).
        methods: Of `METHODS`. "q4_0+importance" first collects the importance, over "calibration".
        text: As in `perplexity`.
        max_tokens: Tokens of the text to take.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar.

    Raises:
        UnknownNameError: Unknown method.
        BadSettingError: No method, another engine, a model that is quantized already, or an unusable text.
        BadOutputError: A method leaves a model that answers NaN.
    """
    methods, scorer = _checked(methods), post_training.scorer_of_module(model)
    text = texts.read(text)
    windows = cut_windows(scorer, text, window=WINDOW, max_tokens=max_tokens)
    with nullcontext(report) if report else progress_bar() as shown:
        run = _Run(model, scorer, methods, sum(map(len, windows)), shown)
        for block in _blocks(windows, 4 * scorer.module.config.get_text_config().vocab_size):
            run.measure(block)
    return run.table(scorer_of(model)[0], text.name)


def _checked(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the methods, each once and known."""
    methods = tuple(dict.fromkeys(methods))
    if not methods:
        raise BadSettingError("There is no method to compare.", f"Known: {', '.join(METHODS)}.", "Name one or more.")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    return methods


def _blocks(windows: list[list[int]], word_bytes: int) -> Iterable[list[list[int]]]:
    """Yield as many windows at a time as the float model's logits may be kept of, one at least."""
    available = read_memory()[1]
    room = _REFERENCE_BYTES if available is None else min(_REFERENCE_BYTES, available // 4)
    count = max(1, room // (WINDOW * word_bytes))
    yield from (windows[i : i + count] for i in range(0, len(windows), count))


@dataclass
class _Run:
    """A comparison under way."""

    model: object
    scorer: post_training.ModuleScorer
    methods: tuple[str, ...]
    num_tokens: int
    report: Report
    done: int = 0
    sizes: dict = field(default_factory=dict)
    sqnr_db: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        needs = "q4_0+importance" in self.methods
        self.importance = post_training.collect_importance(self.model, report=self.report) if needs else None

    def measure(self, block: list[list[int]]) -> None:
        """Measure every method on a few windows."""
        originals = {name: weight.data for name, weight in post_training.linears(self.scorer.module).items()}
        references = [self._logits(ids) for ids in block]
        for method in self.methods:
            with post_training.quantized_weights(
                self.scorer.module, method, importance=self.importance, report=lambda _: self._tell()
            ) as size:
                if method not in self.sizes:
                    self.sizes[method] = size
                    now = post_training.linears(self.scorer.module)
                    self.sqnr_db[method] = {name: sqnr_db(was, now[name].data) for name, was in originals.items()}
                parts = self.figures.setdefault(method, [])
                for ids, reference in zip(block, references, strict=True):
                    parts.append(score(ids, self._logits(ids), reference))

    def table(self, name: str, text: str) -> FormatTable:
        """Return what was measured."""
        weights = post_training.linears(self.scorer.module).values()
        nbytes, num_weights = sum(weight.nbytes for weight in weights), sum(weight.numel() for weight in weights)
        rows = []
        for method in self.methods:
            quality = summarize(TokenFigures.join(self.figures[method]), f"{name} in {method}", name, text, WINDOW)
            rows.append(FormatRow(method, self.sizes[method], quality, self.sqnr_db[method]))
        return FormatTable(name, text, nbytes, 8 * nbytes // num_weights, tuple(rows))

    def _logits(self, ids: list[int]):
        logits = self.scorer.logits(ids)[:-1]
        self.done += len(ids)
        self._tell()
        return logits

    def _tell(self) -> None:
        self.report(Progress("measuring", self.done, self.num_tokens * (1 + len(self.methods)), "tokens"))
