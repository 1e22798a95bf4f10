"""QuantizePanel: round a model's linear layers to several formats, measure each, and see size against quality."""

import threading
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE, SIZES
from gemma_qat_kit.errors import BadSettingError, CancelledError, unknown_name
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.format_table import FormatTable, compare_formats
from gemma_qat_kit.quality.post_training import METHODS
from gemma_qat_kit.quality.scoring import MIN_TOKENS
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import STYLE, amount_done, error_html, escape, status_html
from gemma_qat_kit.widgets.quantize_picture import picture_html, table_html

_TOKENS = (128, 256, 512, 1024, 2048, 4096)
_METHODS = ("q8_0", "q4_0", "q4_0+importance", "nf4", "mobile_int4", "mobile_int2")
_QAT = "q4_0-unquantized"


@dataclass
class _Kept:
    """What a kernel remembers between two runs of the same cell; models that were passed in only as weak references."""

    asked: tuple | None = None
    choice: tuple | None = None
    tables: dict[tuple, FormatTable] = field(default_factory=dict)
    loaded: Model | None = None  # by a panel, for the name of a size
    loaded_size: str | None = None


_kept = _Kept()
_lock = threading.RLock()  # callbacks run in the kernel's main thread or beside it, depending on its version
_one_at_a_time = threading.Lock()  # held while measuring: the weights are replaced in place meanwhile


class QuantizePanel(widgets.VBox):
    """Choose a model and formats, press Run, and watch the table fill: size, perplexity, agreement, KL divergence.

    A format that was measured is not measured again, also when the cell runs once more. The model is as before
    afterwards.

    Args:
        model: A loaded `Model` that runs in transformers, or a size, whose 16-bit weights are loaded when needed.
        methods: Formats to tick at first, of `post_training.METHODS`; None ticks six that differ most.
        text: What to measure on, as in `perplexity`.
        max_tokens: Tokens of it.

    Raises:
        UnknownNameError: The size or a method is not known.
        BadSettingError: Too few tokens, or a text that cannot be used.
    """

    def __init__(
        self,
        model: Model | str = BUILT_IN_SIZE,
        *,
        methods: tuple[str, ...] | None = None,
        text: str | Path | None = None,
        max_tokens: int = 512,
    ):
        self._text = text
        self._given = model if isinstance(model, Model) else None
        source = model.name if self._given else _known(model, SIZES, "size")
        methods = _usual_methods(model) if methods is None else tuple(_known(m, METHODS, "method") for m in methods)
        texts.read(text)  # refuses one that cannot be used before anything is loaded
        if not isinstance(max_tokens, int) or max_tokens < MIN_TOKENS:
            raise BadSettingError(
                f"max_tokens={max_tokens!r} cannot be used.",
                f"It is an integer from {MIN_TOKENS}: fewer tokens say nothing about a model.",
                "Pass max_tokens=256 or more.",
            )
        self._progress, self._error, self._message = None, None, _summary(0)
        self._is_running, self._done, self._cancelled = False, None, threading.Event()
        self._queue, self._current = (), None
        asked = (weakref.ref(model) if self._given else source, methods, text, max_tokens)
        with _lock:
            start = _kept.choice if _kept.asked == asked else (source, methods, max_tokens)
            _kept.asked = asked
        self._make_controls(start)
        super().__init__(self._layout())
        self.layout.max_width = "760px"
        for name in ("gqk-panel-box", "gqk-quantize"):
            self.add_class(name)
        self._choose()

    @property
    def table(self) -> FormatTable | None:
        """What was measured with the model, text and number of tokens that are chosen now; None for nothing yet."""
        return _kept.tables.get(self._key())

    def run(self) -> FormatTable:
        """Measure the ticked formats now, showing progress, and return the table.

        Raises:
            KitError: Whatever `compare_formats` or `load` raises; it also shows in the widget.
        """
        pump.wait(self._start(), self._show, self.cancel)
        if self._error is not None:
            raise self._error
        return self.table

    def cancel(self) -> None:
        """Stop at the next report; formats that are finished stay in the table."""
        self._cancelled.set()

    def _make_controls(self, start: tuple) -> None:
        source, methods, max_tokens = start
        wide, named = widgets.Layout(width="340px", max_width="100%"), {"description_width": "80px"}
        sizes = [(f"{size} {_format_of(size)}", size) for size in SIZES]
        options = ([(f"{source} (loaded)", source)] if self._given else []) + sizes
        tokens = sorted({*_TOKENS, max_tokens})
        self._source = widgets.Dropdown(options=options, value=source, description="Model", layout=wide, style=named)
        self._tokens = widgets.Dropdown(
            options=[(f"{count:,}", count) for count in tokens],
            value=max_tokens,
            description="Tokens",
            layout=widgets.Layout(width="180px"),
            style=named,
        )
        self._methods = {name: _checkbox(name, name in methods) for name in METHODS}
        self._run_button = widgets.Button(description="Run", button_style="primary", layout={"width": "90px"})
        self._cancel_button = widgets.Button(description="Cancel", disabled=True, layout={"width": "90px"})
        self._bar = widgets.FloatProgress(min=0, max=1, layout={"width": "140px", "visibility": "hidden"})
        self._bar_label = widgets.HTML(layout=widgets.Layout(flex="1 1 200px", min_height="32px"))
        self._table, self._picture = widgets.HTML(layout={"width": "auto"}), widgets.HTML(layout={"width": "auto"})
        self._status = widgets.HTML(layout=widgets.Layout(min_height="40px"))
        self._run_button.on_click(lambda button: self._start())
        self._cancel_button.on_click(lambda button: self.cancel())
        for control in (self._source, self._tokens, *self._methods.values()):
            control.observe(lambda change: self._choose(), names="value")

    def _layout(self) -> list:
        wrap = {"flex_flow": "row wrap"}
        names = widgets.HBox([self._source, self._tokens], layout=widgets.Layout(grid_gap="0 24px", **wrap))
        methods = widgets.HBox(list(self._methods.values()), layout=widgets.Layout(margin="4px 0", **wrap))
        methods.add_class("gqk-quantize-methods")
        buttons = [self._run_button, self._cancel_button, self._bar, self._bar_label]
        row = widgets.HBox(buttons, layout=widgets.Layout(align_items="center", margin="8px 0", **wrap))
        controls = {"model": self._source, "tokens": self._tokens, "run": self._run_button, "bar": self._bar}
        controls |= {"cancel": self._cancel_button, "table": self._table, "picture": self._picture}
        for name, control in (controls | {"status": self._status}).items():
            control.add_class(f"gqk-quantize-{name}")
        return [widgets.HTML(STYLE), names, methods, row, self._table, self._picture, self._status]

    def _chosen(self) -> tuple[str, ...]:
        return tuple(name for name, box in self._methods.items() if box.value)

    def _measured(self, key: tuple | None = None) -> tuple[str, ...]:
        """Methods that have a row, for what is chosen now or for the key of an earlier choice."""
        table = _kept.tables.get(key or self._key())
        return tuple(row.method for row in table.rows) if table else ()

    def _key(self) -> tuple:
        """What a result belongs to."""
        source = self._source.value
        is_given = self._given is not None and source == self._given.name
        return weakref.ref(self._given) if is_given else source, self._text, self._tokens.value

    def _choose(self) -> None:
        """Remember the choice, and show what is known of it."""
        with _lock:
            _kept.choice = (self._source.value, self._chosen(), self._tokens.value)
        self._error = None
        self._message = _summary(len(self._measured()))
        self._show()

    def _start(self) -> threading.Event:
        """Start measuring unless that is under way or done; return the event that says it is over."""
        with _lock:
            if self._is_running:
                return self._done
            self._queue = tuple(name for name in self._chosen() if name not in self._measured())
            self._error, self._progress, self._current = None, None, None
            self._cancelled.clear()
            if self._queue:
                self._is_running = True
                self._done = pump.start(self._work, self._show)
                return self._done
            if not self._chosen():
                self._error = BadSettingError(
                    "No format is ticked.", f"Known: {', '.join(METHODS)}.", "Tick one or more, then press Run."
                )
            self._message = "Every ticked format is measured."
            self._done = threading.Event()
            self._done.set()
            self._show()
            return self._done

    def _work(self) -> None:
        """Measure in this thread; what came of it is left in plain attributes for `_show`."""
        key = self._key()
        try:
            with _one_at_a_time:
                model = self._loaded_model(key[0])
                for method in self._queue:
                    if method in self._measured(key):  # by another panel, while this one waited for the lock
                        continue
                    self._current, self._progress = method, None
                    found = compare_formats(model, [method], self._text, max_tokens=key[2], report=self._report)
                    _add(key, found)
            self._message = _summary(len(self._measured(key)))
        except Exception as err:
            self._error, self._message = err, "Cancelled; finished formats stay."
        finally:
            self._is_running, self._current = False, None

    def _loaded_model(self, source) -> Model:
        """Return the model that was passed, or the one of a size, which takes the place of the one loaded before."""
        if isinstance(source, weakref.ref):
            return self._given
        from gemma_qat_kit.load import load

        if _kept.loaded_size != source or _kept.loaded.is_closed:
            close_measured_model()
            _kept.loaded = load(source, _format_of(source), report=self._report)
            _kept.loaded_size = source
        return _kept.loaded

    def _report(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise CancelledError("Measuring was cancelled.", "Finished formats stay.", "Press Run to go on.")
        self._progress = progress

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop, a waiting cell or a callback."""
        running, table = self._is_running, self.table
        for control in (self._source, self._tokens, *self._methods.values(), self._run_button):
            control.disabled = running
        self._cancel_button.disabled = not running
        self._bar.layout.visibility = "visible" if running else "hidden"
        progress, current = self._progress, self._current
        place = self._queue.index(current) if current in self._queue else 0
        done = (progress and progress.fraction) or 0.0
        self._bar.value = (place + done * (current is not None)) / max(1, len(self._queue)) if running else 0.0
        amount = f"{progress.stage}: {amount_done(progress)}" if running and progress else ""
        self._bar_label.value = f'<span class="gqk-text">{escape(amount)}</span>'
        listed = [name for name in METHODS if name in {*self._chosen(), *self._measured()}]
        self._table.value, self._picture.value = table_html(table, listed, current), picture_html(table)
        if running:
            what = f"Measuring {current}, {place + 1} of {len(self._queue)}." if current else "Getting the model ready."
            self._status.value = status_html(what)
        elif self._error is None or isinstance(self._error, CancelledError):
            self._status.value = status_html(self._message)
        else:
            self._status.value = error_html(self._error)


def close_measured_model() -> None:
    """Close the model that a QuantizePanel of this kernel loaded by the name of its size, if there is one."""
    with _lock:
        model, _kept.loaded, _kept.loaded_size = _kept.loaded, None, None
    if model is not None:
        model.close()


def _add(key: tuple, found: FormatTable) -> None:
    """Put the rows of a table beside those that are kept, in the order of `METHODS`."""
    with _lock:
        before = _kept.tables.get(key)
        rows = {row.method: row for table in (before, found) if table for row in table.rows}
        _kept.tables[key] = replace(found, rows=tuple(rows[name] for name in METHODS if name in rows))


def _known(name: str, names: tuple[str, ...], kind: str) -> str:
    if name not in names:
        raise unknown_name(kind, name, names)
    return name


def _format_of(size: str) -> str:
    """The weights to start from: floats, of Gemma those that were trained for Q4_0."""
    return "float32" if size == BUILT_IN_SIZE else _QAT


def _usual_methods(model: Model | str) -> tuple[str, ...]:
    """QAT weights need no importance matrix; they have a grid to keep."""
    format = model.format if isinstance(model, Model) else _format_of(model)
    return tuple("q4_0+grid" if (m, format) == ("q4_0+importance", _QAT) else m for m in _METHODS)


def _checkbox(name: str, is_ticked: bool) -> widgets.Checkbox:
    box = widgets.Checkbox(value=is_ticked, description=name, indent=False, layout={"width": "150px"})
    box.add_class(f"gqk-quantize-{name.replace('+', '-')}")
    return box


def _summary(count: int) -> str:
    return {0: "Nothing is measured yet.", 1: "1 format is measured."}.get(count, f"{count} formats are measured.")
