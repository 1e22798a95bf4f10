"""OutOfMemoryPanel: memory ran out; settings that take less, each a button that loads with them in place."""

import inspect
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields

import ipywidgets as widgets

from gemma_qat_kit.errors import KitError
from gemma_qat_kit.loading_note import EndedKernel, last_failure
from gemma_qat_kit.memory.plan import MemoryPlan
from gemma_qat_kit.memory.settings import MemorySettings
from gemma_qat_kit.out_of_memory import MOST_OFFERS, OutOfMemoryError
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import STYLE, amount_done, error_html, escape, status_html


class OutOfMemoryPanel(widgets.VBox):
    """Say why memory ran out, and load with less at the press of a button.

    Args:
        failure: The error, or what `loading_note.last_failure` found; None looks for a kernel that ended last time.
        into: Name of the notebook's variable that the loaded model is bound to; None binds none.
        run: What a button calls with its settings and `report`; None calls `load`.

    Attributes:
        model: What was loaded, None before.
    """

    def __init__(
        self,
        failure: OutOfMemoryError | EndedKernel | None = None,
        into: str | None = None,
        run: Callable[..., object] | None = None,
    ):
        failure = failure or last_failure()
        self.model, self._error, self._message, self._progress = None, None, "", None
        self._is_running, self._done, self._lock = False, None, threading.Lock()
        self._into, self._run = into, run or load_with
        self._asked = getattr(failure, "settings", None)
        offers = getattr(failure, "cheaper", ())[:MOST_OFFERS]
        self._buttons = [self._button(words, plan) for words, plan in offers if run or self._can_load(plan.settings)]
        self._status = widgets.HTML(layout=widgets.Layout(min_height="40px"))
        if self._buttons:
            self._buttons[0].button_style = "primary"  # the least is lost with it
        column = widgets.VBox(self._buttons, layout=widgets.Layout(align_items="flex-start", margin="8px 0"))
        column.add_class("gqk-oom-buttons")
        super().__init__([widgets.HTML(STYLE), widgets.HTML(_said(failure)), column, self._status])
        self.layout.max_width = "720px"
        for name in ("gqk-panel-box", "gqk-oom"):
            self.add_class(name)
        self._status.add_class("gqk-oom-status")

    def wait(self) -> object:
        """Wait for the load that a button started, and return what it loaded.

        Raises:
            KitError: What the load raised; it also shows in the panel.
        """
        if self._done is not None:
            pump.refresh_until(self._done, self._show)
        if self._error is not None:
            raise self._error
        return self.model

    def _button(self, words: str, plan: MemoryPlan) -> widgets.Button:
        text = f"Load: {words} ({readable_bytes(plan.needed_bytes)})"
        button = widgets.Button(description=text, tooltip=text, layout={"width": "auto", "max_width": "100%"})
        button.on_click(lambda _: self._start(plan.settings))
        return button

    def _can_load(self, settings: MemorySettings) -> bool:
        """Whether `load` has an argument for everything that the offer changes."""
        if settings.task != "chat" or settings.config is not None:
            return False
        changed = {f.name for f in fields(settings) if getattr(settings, f.name) != getattr(self._asked, f.name)}
        return changed <= {"size", "format", "engine", *_load_arguments()}

    def _start(self, settings: MemorySettings) -> None:
        with self._lock:
            if self._is_running:
                return
            self._is_running, self._error, self._progress = True, None, None
        self._done = pump.start(lambda: self._work(settings), self._show)
        self._show()

    def _work(self, settings: MemorySettings) -> None:
        """Load in this thread; what came of it is left in plain attributes for `_show`."""
        started = time.monotonic()
        try:
            self._close()
            self.model = self._run(settings, report=self._report)
            _bind(self._into, self.model)
            name = f" as `{self._into}`" if self._into else ""
            self._message = f"Loaded{name} in {time.monotonic() - started:.3g} s. Go on with the next cell."
        except Exception as err:
            self._error = err.with_traceback(None)
        finally:
            self._is_running = False

    def _close(self) -> None:
        """Make room: what an earlier button loaded goes first."""
        model, self.model = self.model, None
        if model is not None and hasattr(model, "close"):
            model.close()

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    def _show(self) -> None:
        for button in self._buttons:
            button.disabled = self._is_running
        if self._is_running:
            progress = self._progress
            stage = progress.stage.capitalize() if progress else "Starting"
            self._status.value = status_html(f"{stage} {amount_done(progress)}".strip() + ".")
        elif self._error is not None:
            self._status.value = error_html(self._error)
        else:
            self._status.value = status_html(self._message)


def load_with(settings: MemorySettings, *, report: Callable[[Progress], None]) -> object:
    """Load what settings describe, with those of them that `load` knows."""
    from gemma_qat_kit.load import load

    chosen = {name: getattr(settings, name) for name in _load_arguments()}
    return load(settings.size, settings.format, report=report, **chosen)


def _load_arguments() -> set[str]:
    """Return the settings that are arguments of `load`, too."""
    from gemma_qat_kit.load import load

    return {f.name for f in fields(MemorySettings)} & inspect.signature(load).parameters.keys() - {"size", "format"}


def _bind(name: str | None, model: object) -> None:
    """Give the model its name in the notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if name and shell is not None:
        shell.user_ns[name] = model


def _said(failure: object) -> str:
    if isinstance(failure, KitError):
        return error_html(failure)
    words = str(failure) if failure else "Nothing ran out of memory."
    return f'<div class="gqk-text">{escape(words)}</div>'
