"""Picker: choose a size and a format, see what they cost on this machine, load the model."""

import threading
import time
from dataclasses import dataclass

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE, SIZES, Checkpoint, catalog, find_checkpoint
from gemma_qat_kit.environment import environment
from gemma_qat_kit.errors import CancelledError
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import STYLE, amount_done, error_html, escape, status_html
from gemma_qat_kit.widgets.picker_facts import facts_html


@dataclass
class _Kept:
    """What a kernel remembers between two runs of the same cell."""

    asked: tuple | None = None
    choice: tuple[str, str] | None = None
    model: Model | None = None
    model_choice: tuple[str, str] | None = None
    owner: "Picker | None" = None


_kept = _Kept()
_lock = threading.RLock()  # callbacks run in the kernel's main thread or beside it, depending on its version
_one_at_a_time = threading.Lock()  # held while loading: a cell that runs again has a second Picker beside the first


class Picker(widgets.VBox):
    """Choose a size and a format, see what they cost here, and load the model.

    A kernel holds one picked model: loading another choice closes it, and running the cell again finds it still there.

    Args:
        size: Size to start with, one of `catalog.SIZES`.
        format: Format to start with; None for the one that `load` takes by itself.

    Attributes:
        model: The loaded `Model`, None before.

    Raises:
        UnknownNameError: The size or the format is not known.
        NotPublishedError: The catalog has no row for the two together.
    """

    def __init__(self, size: str = BUILT_IN_SIZE, format: str | None = None):
        first = _first_row(size, format)
        self._machine = environment()
        self._progress, self._error, self._message = None, None, ""
        self._is_running, self._done, self._cancelled = False, None, threading.Event()
        self._make_controls()
        with _lock:
            is_rerun = _kept.asked == (size, format)
            start = _kept.choice if is_rerun else (first.size, first.format)
            _kept.asked, _kept.owner = (size, format), self if is_rerun else None
        self._size.value = start[0]
        self._fill_formats(start[1])
        self._size.observe(lambda change: self._fill_formats(self._format.value), names="value")
        self._format.observe(lambda change: self._choose(), names="value")
        buttons = widgets.HBox(
            [self._load_button, self._cancel_button, self._bar, self._bar_label],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center", margin="8px 0 0"),
        )
        names = widgets.HBox([self._size, self._format], layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 24px"))
        super().__init__([widgets.HTML(STYLE), names, self._facts, buttons, self._status])
        self.layout.max_width = "720px"
        self.add_class("gqk-panel-box")
        self.add_class("gqk-picker")

    @property
    def choice(self) -> tuple[str, str]:
        """Size and format chosen now."""
        return self._size.value, self._format.value

    @property
    def model(self) -> Model | None:
        """The `Model` that this picker loaded, or None."""
        return _kept.model if _kept.owner is self else None

    def load(self) -> Model:
        """Load the current choice now, showing progress, and return its `Model`.

        A choice that is loaded already is returned at once; the model of another choice is closed first.

        Raises:
            KitError: Whatever `load` raises; it also shows in the widget.
        """
        pump.wait(self._start(), self._show, self.cancel)
        if self._error is not None:
            raise self._error
        return self.model

    def cancel(self) -> None:
        """Stop the load that is running, at its next report; nothing half-done stays."""
        self._cancelled.set()

    def _make_controls(self) -> None:
        wide = widgets.Layout(width="300px", max_width="100%")
        named = {"description_width": "80px"}
        self._size = widgets.Dropdown(options=SIZES, description="Size", layout=wide, style=named)
        self._format = widgets.Dropdown(description="Format", layout=wide, style=named)
        self._facts = widgets.HTML(layout=widgets.Layout(min_height="112px"))
        self._load_button = widgets.Button(description="Load", button_style="primary")
        self._cancel_button = widgets.Button(description="Cancel", disabled=True)
        hidden = widgets.Layout(width="140px", visibility="hidden")
        self._bar = widgets.FloatProgress(min=0, max=1, layout=hidden)
        self._bar_label = widgets.HTML()
        self._status = widgets.HTML(layout=widgets.Layout(min_height="40px"))
        self._load_button.on_click(lambda button: self._start())
        self._cancel_button.on_click(lambda button: self.cancel())
        controls = {"size": self._size, "format": self._format, "facts": self._facts, "load": self._load_button}
        controls |= {"cancel": self._cancel_button, "bar": self._bar, "status": self._status}
        for name, control in controls.items():
            control.add_class(f"gqk-picker-{name}")

    def _fill_formats(self, wanted: str) -> None:
        """List the formats of the chosen size, and keep the wanted one where the size has it."""
        rows = catalog(size=self._size.value, role="chat")
        formats = [row.format for row in rows]
        value = wanted if wanted in formats else find_checkpoint(self._size.value).format
        labels = [(row.format if row.is_available else f"{row.format} (not published)", row.format) for row in rows]
        self._is_filling = True  # new options alone would first choose the first of them
        self._format.options, self._format.value = labels, value
        self._is_filling = False
        self._choose()

    def _choose(self) -> None:
        """Show what the choice costs, and remember it."""
        if self._is_filling:
            return
        self._row = _first_row(*self.choice)
        with _lock:
            _kept.choice = self.choice
        self._facts.value = facts_html(self._row, self._machine)
        self._error = None
        self._message = f"{self.model.name} is loaded." if self.model is not None else "Nothing is loaded yet."
        self._show()

    def _start(self) -> threading.Event:
        """Start loading unless that is under way or done; return the event that says it is over."""
        with _lock:
            if self._is_running:
                return self._done
            self._error, self._progress = None, None
            self._cancelled.clear()
            if self._is_chosen_loaded():
                _kept.owner = self
                self._done = threading.Event()
                self._done.set()
            else:
                self._is_running = True
                self._done = pump.start(self._work, self._show)
            return self._done

    def _is_chosen_loaded(self) -> bool:
        model = _kept.model
        return model is not None and _kept.model_choice == self.choice and not getattr(model, "is_closed", False)

    def _work(self) -> None:
        """Load in this thread; what came of it is left in plain attributes for `_show`."""
        from gemma_qat_kit.load import load

        choice, started = self.choice, time.monotonic()
        try:
            find_checkpoint(*choice)
            with _one_at_a_time:
                if not self._is_chosen_loaded():
                    close_picked_model()
                    _kept.model, _kept.model_choice = load(*choice, report=self._report), choice
                _kept.owner = self
            self._message = f"{self.model.name} is loaded, in {time.monotonic() - started:.3g} s."
        except Exception as err:
            self._error, self._message = err, "Cancelled; nothing is loaded."
        finally:
            self._is_running = False

    def _report(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise CancelledError("The load was cancelled.", "Nothing is loaded.", "Press Load to start again.")
        self._progress = progress

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop, a waiting cell or a callback."""
        running = self._is_running
        self._size.disabled = self._format.disabled = running
        self._load_button.disabled = running or not self._row.is_available or self._is_chosen_loaded()
        self._cancel_button.disabled = not running
        self._bar.layout.visibility = "visible" if running else "hidden"
        progress = self._progress if running else None
        self._bar.value = (progress and progress.fraction) or 0.0
        self._bar_label.value = f'<span class="gqk-text">{escape(amount_done(progress))}</span>' if running else ""
        if running:
            stage = progress.stage if progress else "starting"
            self._status.value = status_html(f"{stage.capitalize()} {self._row.key}.")
        elif self._error is None or isinstance(self._error, CancelledError):
            self._status.value = status_html(self._message)
        else:
            self._status.value = error_html(self._error)


def close_picked_model() -> None:
    """Close the model that a Picker of this kernel loaded, if there is one."""
    with _lock:
        model, _kept.model, _kept.model_choice, _kept.owner = _kept.model, None, None, None
    if model is not None:
        model.close()


def _first_row(size: str, format: str | None) -> Checkpoint:
    """Return the row to start with, also one that is not published: the widget says why."""
    rows = catalog(size=size, format=format, role="chat") if format else ()
    return rows[0] if rows else find_checkpoint(size, format)
