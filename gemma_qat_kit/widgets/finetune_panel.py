"""FinetunePanel: teach a model from conversations, watch it learn, and take the result home as a Q4_0 file."""

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE, SIZES
from gemma_qat_kit.errors import BadSettingError, CancelledError, KitError, unknown_name
from gemma_qat_kit.finetune.conversations import read_conversations
from gemma_qat_kit.finetune.examples import written
from gemma_qat_kit.finetune.fitting import plan_run
from gemma_qat_kit.finetune.run import FinetuneRun
from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.finetune.train import QAT_CHOICES, loaded_for_tuning
from gemma_qat_kit.model import Model
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.finetune_figures import FINETUNE_STYLE, answers_html, curves_html, data_html, memory_html
from gemma_qat_kit.widgets.finetune_session import Choice, ExportSession, FinetuneSession
from gemma_qat_kit.widgets.look import STYLE, amount_done, error_html, escape, status_html
from gemma_qat_kit.widgets.training_figures import TRAINING_STYLE

_GRIDS = (("through the grid of Q4_0, as it ships", "q4_0"), ("without a grid, rounded afterwards", None))


@dataclass
class _Kept:
    """What a kernel remembers of a cell."""

    choice: Choice
    session: FinetuneSession | None = None
    export: ExportSession | None = None


_kept: dict[tuple, _Kept] = {}
_loaded: dict[str, Model] = {}  # by a panel, for the name of a size; one at a time
_lock = threading.RLock()


class FinetunePanel(widgets.VBox):
    """See the conversations as the model will, press Start, and watch its answers change; Export writes the files.

    Pause waits after a step, Stop keeps the best point. A second Start trains the same adapters on.

    Args:
        model: A loaded `Model` that runs in transformers, or a size, which is loaded when needed.
        dataset: As in `finetune`.
        qat: As in `finetune`.
        settings: To begin with; None for the defaults.
        samples: Questions that are asked before, during and after.
        folder: For checkpoints, as in `finetune`.
        export_to: The folder that Export writes into.

    Raises:
        BadSettingError: A dataset that cannot be used.
        UnknownNameError: The size or the grid is not known.
    """

    def __init__(
        self,
        model: Model | str = BUILT_IN_SIZE,
        dataset: object = (),
        *,
        qat: str | None = "q4_0",
        settings: FinetuneSettings | None = None,
        samples: Sequence[str] = (),
        folder: str | Path | None = None,
        export_to: str | Path = "tuned",
    ):
        self._given = model if isinstance(model, Model) else None
        if self._given is None and model not in SIZES:
            raise unknown_name("size", model, SIZES)
        if qat not in QAT_CHOICES:
            raise unknown_name("qat", qat, ("q4_0",))
        self._size, self._data = None if self._given else model, read_conversations(dataset)
        self._samples, self._folder, self._export_to = tuple(samples), folder, Path(export_to).expanduser()
        self._error = self._num_longest = None
        first = Choice(qat, settings or FinetuneSettings(batch_size=4, gradient_accumulation=1))
        key = (weakref.ref(model) if self._given else model, first, self._samples, folder, repr(self._data))
        with _lock:
            for old in [old for old in _kept if isinstance(old[0], weakref.ref) and old[0]() is None]:
                del _kept[old]
            self._mine = _kept.setdefault(key, _Kept(first))
        self._settings = first.settings
        self._make_controls(self._mine.choice)
        super().__init__(self._layout())
        self.layout.max_width = "760px"
        for name in ("gqk-panel-box", "gqk-train", "gqk-tune"):
            self.add_class(name)
        self._show()
        for session in (self._mine.session, self._mine.export):
            if session is not None and session.is_running:
                pump.start(session.done.wait, self._show)  # the cell was run again while it goes on

    @property
    def model(self) -> Model | None:
        """The model that is trained in place; of a size None until Start."""
        return self._given or _loaded.get(self._size)

    @property
    def result(self) -> FinetuneRun | None:
        """What the last run did; None before there is one."""
        return self._mine.session and self._mine.session.result

    @property
    def exported(self) -> Path | None:
        """The GGUF that Export wrote, None before."""
        export = self._mine.export
        return export.result.path if export is not None and export.result is not None else None

    def run(self) -> FinetuneRun:
        """Train now, showing progress, and return what happened.

        Raises:
            KitError: Whatever `load` or `finetune` raises; it also shows in the widget.
        """
        self._wait(self._start())
        return self.result

    def export(self) -> Path:
        """Write adapter, merged GGUF and Modelfile, showing progress, and return the GGUF's path.

        Raises:
            KitError: Whatever `merge_adapters` or `export_gguf` raises.
        """
        self._wait(self._start_export())
        return self.exported

    def pause(self) -> None:
        """Wait after the step under way; go on where it waits already."""
        session = self._mine.session
        if session is not None and session.is_running:
            (session.resume if session.is_paused else session.pause)()
            self._show()

    def stop(self) -> None:
        """End after the step under way; the model is at its best point so far."""
        for session in (self._mine.session, self._mine.export):
            if session is not None:
                session.stop()
        self._show()

    def _wait(self, done: threading.Event | None) -> None:
        if done is not None:
            pump.wait(done, self._show, self.stop)
        if (error := self._error or self._failed()) is not None:
            raise error

    def _make_controls(self, start: Choice) -> None:
        named, narrow = {"description_width": "110px"}, {"width": "210px"}
        self._qat = widgets.Dropdown(options=_GRIDS, value=start.qat, description="Adapters", style=named,
                                     layout={"width": "420px", "max_width": "100%"})  # fmt: skip
        numbers = (("num_steps", "Steps", 10**6), ("batch_size", "Batch size", 4096), ("rank", "Rank", 4096))
        self._numbers = {name: widgets.BoundedIntText(value=getattr(start.settings, name), min=1, max=most,
                                                      description=words, layout=narrow, style=named)
                         for name, words, most in numbers}  # fmt: skip
        self._rate = widgets.BoundedFloatText(value=start.settings.learning_rate, min=0, max=1, step=1e-4,
                                              description="Learning rate", layout=narrow, style=named)  # fmt: skip
        self._choices = (self._qat, *self._numbers.values(), self._rate)
        self._start_button = widgets.Button(button_style="primary", layout={"width": "90px"})
        self._pause_button, self._stop_button, self._export_button = (
            widgets.Button(description=name, layout={"width": "90px"}) for name in ("Pause", "Stop", "Export")
        )
        self._bar = widgets.FloatProgress(min=0, max=1, layout={"width": "140px", "visibility": "hidden"})
        self._bar_label = widgets.HTML(layout=widgets.Layout(flex="1 1 160px", min_height="32px"))
        self._shown_data, self._memory, self._figures, self._said = (widgets.HTML(layout={"width": "auto"})
                                                                     for _ in range(4))  # fmt: skip
        self._status = widgets.HTML(layout=widgets.Layout(min_height="62px"))
        self._start_button.on_click(lambda button: self._start())
        self._pause_button.on_click(lambda button: self.pause())
        self._stop_button.on_click(lambda button: self.stop())
        self._export_button.on_click(lambda button: self._start_export())
        for control in self._choices:
            control.observe(lambda change: self._choose(), names="value")

    def _layout(self) -> list:
        wrap = {"flex_flow": "row wrap"}
        choices = widgets.HBox(list(self._choices), layout=widgets.Layout(grid_gap="0 24px", **wrap))
        buttons = [self._start_button, self._pause_button, self._stop_button, self._export_button, self._bar,
                   self._bar_label]  # fmt: skip
        row = widgets.HBox(buttons, layout=widgets.Layout(align_items="center", margin="8px 0", **wrap))
        named = {"start": self._start_button, "pause": self._pause_button, "stop": self._stop_button,
                 "export": self._export_button, "steps": self._numbers["num_steps"], "rate": self._rate,
                 "data": self._shown_data, "memory": self._memory, "figures": self._figures, "said": self._said,
                 "status": self._status, "grid": self._qat, "rank": self._numbers["rank"],
                 "batch": self._numbers["batch_size"]}  # fmt: skip
        for name, control in named.items():
            control.add_class(f"gqk-tune-{name}")
        style = widgets.HTML(STYLE + TRAINING_STYLE + FINETUNE_STYLE)
        return [style, self._shown_data, choices, self._memory, row, self._figures, self._said, self._status]

    def _choice(self) -> Choice:
        numbers = {name: control.value for name, control in self._numbers.items()}
        return Choice(self._qat.value, replace(self._settings, learning_rate=self._rate.value, **numbers))

    def _choose(self) -> None:
        self._mine.choice, self._error = self._choice(), None
        self._show()

    def _start(self) -> threading.Event | None:
        """Start training unless something is under way; return the event that says it is over."""
        with _lock:
            if (running := self._running()) is not None:
                return running.done
            self._error, self._mine.export = None, None
            self._mine.session = session = FinetuneSession(self._choice())
            pump.start(lambda: session.work(self._find_model, self._data, self._samples, self._folder), self._show)
        self._show()
        return session.done

    def _start_export(self) -> threading.Event | None:
        with _lock:
            if (running := self._running()) is not None:
                return running.done
            self._error = None
            if self.result is None or self.model is None or self.exported is not None:
                self._error = BadSettingError(
                    "There is nothing to export.", "A run that has ended is exported once.", "Press Start first."
                )
                self._show()
                return None
            self._mine.export = export = ExportSession()
            pump.start(lambda: export.work(self.model, self._export_to), self._show)
        self._show()
        return export.done

    def _find_model(self, report) -> Model:
        """Return the model that was passed, or the one of a size."""
        if self._given is not None:
            return self._given
        if self._size not in _loaded or _loaded[self._size].is_closed:
            _loaded.clear()
            gc.collect()
            _loaded[self._size] = loaded_for_tuning(self._size, report)
        return _loaded[self._size]

    def _longest(self, tokenizer) -> int:
        """Return the tokens of the longest conversation; without the model's tokenizer, about so many."""
        if tokenizer is None:
            return max(sum(len(each["content"]) for each in one) // 3 + 8 * len(one) for one in self._data)
        if self._num_longest is None:
            self._num_longest = max(len(tokenizer(written(one, tokenizer)[0]).input_ids) for one in self._data)
        return self._num_longest

    def _running(self) -> FinetuneSession | ExportSession | None:
        return next((s for s in (self._mine.session, self._mine.export) if s is not None and s.is_running), None)

    def _failed(self) -> Exception | None:
        newest = self._mine.export or self._mine.session
        return newest.error if newest is not None and not newest.is_running else None

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop, a waiting cell or a callback."""
        session, running = self._mine.session, self._running()
        is_training = running is not None and running is session
        for control in (*self._choices, self._start_button):
            control.disabled = running is not None
        self._start_button.description = "Train on" if self.result is not None and not is_training else "Start"
        self._pause_button.disabled = not is_training or session.is_stopping
        self._stop_button.disabled = running is None or running.is_stopping
        self._pause_button.description = "Resume" if is_training and session.is_paused else "Pause"
        self._export_button.disabled = running is not None or self.result is None or self.exported is not None
        progress = running.progress if running else None
        self._bar.layout.visibility = "visible" if running else "hidden"
        self._bar.value = (progress and progress.fraction) or 0.0
        amount = f"{progress.stage}: {amount_done(progress)}".rstrip(": ") if progress else ""
        self._bar_label.value = f'<span class="gqk-text">{escape(amount)}</span>'
        self._show_figures(session)
        newest = self._mine.export or session
        error, words = self._error or self._failed(), newest.words if newest else "Nothing is trained yet."
        is_news = error is None or isinstance(error, CancelledError)
        self._status.value = status_html(words) if is_news else error_html(error)

    def _show_figures(self, session: FinetuneSession | None) -> None:
        choice = session.choice if session is not None and session.is_running else self._choice()
        if self._running() is None:
            self._show_plan(choice)
        self._figures.value = curves_html(session, (session.choice if session else choice).settings.num_steps)
        self._said.value = answers_html(tuple(session.samples) if session else ())

    def _show_plan(self, choice: Choice) -> None:
        """Show the dataset and the memory; both change with the choice and with the model, not with a run."""
        model = self.model
        tokenizer = model.hf[1] if model is not None and not model.is_closed else None
        try:
            self._shown_data.value = data_html(self._data, tokenizer)
            self._memory.value = memory_html(
                *plan_run(model or self._size, choice.settings, choice.qat, self._longest(tokenizer))
            )
        except KitError as err:
            self._error = err
