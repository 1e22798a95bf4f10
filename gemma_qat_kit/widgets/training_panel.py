"""TrainingPanel: train a model with quantization in the loop, and watch what four bits took from it come back."""

import gc
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE, SIZES
from gemma_qat_kit.errors import CancelledError, KitError, unknown_name
from gemma_qat_kit.model import Model
from gemma_qat_kit.qat.batches import DEFAULT_TEXTS
from gemma_qat_kit.qat.run import QatRun
from gemma_qat_kit.qat.schedule import QAT_FORMATS
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.post_training import module_of
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import STYLE, amount_done, error_html, escape, status_html
from gemma_qat_kit.widgets.training_figures import TRAINING_STYLE, figures_html
from gemma_qat_kit.widgets.training_session import Choice, TrainingSession, check_can_train, prepared_format
from gemma_qat_kit.widgets.training_walk import walk_html

_FORMATS = (*(name for name in QAT_FORMATS if "_g32" in name or name == "q4_0"),
            *(name for name in QAT_FORMATS if "mobile" in name))  # fmt: skip
_TEACHERS = (
    ("itself, kept in memory", "memory"),
    ("itself, likeliest words only", "cache"),
    ("none: the text", "text"),
)
_FRAMES = 100  # of a whole replay, at most about so many


@dataclass
class _Kept:
    """What a kernel remembers of a cell; models that were passed in only as weak references, in its key."""

    choice: Choice
    session: TrainingSession | None = None
    result: QatRun | None = None  # of an earlier session


_kept: dict[tuple, _Kept] = {}
_loaded: dict[str, Model] = {}  # by a panel, for the name of a size; one at a time
_lock = threading.RLock()  # callbacks run in the kernel's main thread or beside it, depending on its version


class TrainingPanel(widgets.VBox):
    """Press Start, and watch the loss fall and the held-out text come back to where it was before quantization.

    Pause waits after a step, Stop keeps the best point. Afterwards the replay shows how 32 weights walked over the
    levels of their grid. A second Start trains the same model on.

    Args:
        model: A loaded `Model` that runs in transformers, or a size, whose floats are loaded when needed.
        format: What to prepare it for, of `schedule.QAT_FORMATS`.
        text: What to train on, as in `train_qat`.
        settings: To begin with; None for the defaults.
        folder: For checkpoints, as in `train_qat`.

    Raises:
        UnknownNameError: The size or the format is not known.
        BadSettingError: A text that cannot be used.
    """

    def __init__(
        self,
        model: Model | str = BUILT_IN_SIZE,
        *,
        format: str = "q4_0",
        text: str | Path | Iterable | None = None,
        settings: TrainSettings | None = None,
        folder: str | Path | None = None,
    ):
        self._given = model if isinstance(model, Model) else None
        self._size = None if self._given else _known(model, SIZES, "size")
        self._text = text if text is None or isinstance(text, str | Path) else tuple(text)
        for one in self._text if isinstance(self._text, tuple) else (self._text,):
            texts.read(one)  # refuses one that cannot be used before anything is loaded
        self._folder, self._error, self._drawn = folder, None, None
        first = Choice(_known(format, _FORMATS, "QAT format"), "memory", settings or TrainSettings())
        asked = (weakref.ref(model) if self._given else model, first, self._text, folder)
        with _lock:
            for key in [key for key in _kept if isinstance(key[0], weakref.ref) and key[0]() is None]:
                del _kept[key]
            self._mine = _kept.setdefault(asked, _Kept(first))
        self._settings = first.settings
        self._make_controls(self._mine.choice)
        super().__init__(self._layout())
        self.layout.max_width = "760px"
        for name in ("gqk-panel-box", "gqk-train"):
            self.add_class(name)
        self._show()
        if (session := self._mine.session) is not None and session.is_running:
            pump.start(session.done.wait, self._show)  # the cell was run again while its training goes on

    @property
    def model(self) -> Model | None:
        """The model that is trained in place; of a size None until Start."""
        return self._given or _loaded.get(self._size)

    @property
    def result(self) -> QatRun | None:
        """What the last run did that ended or was stopped; None before there is one."""
        session = self._mine.session
        return (session and session.result) or self._mine.result

    def run(self) -> QatRun:
        """Train now, showing progress, and return what happened.

        Raises:
            KitError: Whatever `load`, `prepare_qat` or `train_qat` raises; it also shows in the widget.
        """
        done = self._start()
        if done is not None:
            pump.wait(done, self._show, self.stop)
        error = self._error or self._mine.session.error
        if error is not None:
            raise error
        return self.result

    def record(self, path: str | Path) -> Path:
        """Save what the last run did, for `TrainingReplay` on a machine without the model, and return the file's path.

        Raises:
            BadSettingError: There is no run that has ended, or the file cannot be written.
        """
        asked = DEFAULT_TEXTS if self._text is None else self._text if isinstance(self._text, tuple) else (self._text,)
        session = self._mine.session or TrainingSession(self._choice())
        return session.recording(", ".join(texts.read(each).name for each in asked)).save(path)

    def pause(self) -> None:
        """Wait after the step under way; go on where it waits already."""
        session = self._mine.session
        if session is not None and session.is_running:
            (session.resume if session.is_paused else session.pause)()
            self._show()

    def stop(self) -> None:
        """End after the step under way; the model is at its best point so far."""
        if self._mine.session is not None:
            self._mine.session.stop()
            self._show()

    def _make_controls(self, start: Choice) -> None:
        named = {"description_width": "90px"}
        wide, narrow = {"width": "330px", "max_width": "100%"}, {"width": "210px"}
        make = widgets.Dropdown
        self._format = make(options=_FORMATS, value=start.format, description="Format", layout=wide, style=named)
        self._teacher = make(options=_TEACHERS, value=start.teacher, description="Teacher", layout=wide, style=named)
        self._steps = widgets.BoundedIntText(value=start.settings.num_steps, min=1, max=1_000_000, description="Steps",
                                             layout=narrow, style=named)  # fmt: skip
        self._rate = widgets.BoundedFloatText(value=start.settings.learning_rate, min=0, max=1, step=0.001,
                                              description="Learning rate", layout=narrow, style=named)  # fmt: skip
        self._choices = (self._format, self._teacher, self._steps, self._rate)
        self._start_button = widgets.Button(button_style="primary", layout={"width": "90px"})
        self._pause_button, self._stop_button = (
            widgets.Button(description=name, layout={"width": "90px"}) for name in ("Pause", "Stop")
        )
        self._bar = widgets.FloatProgress(min=0, max=1, layout={"width": "140px", "visibility": "hidden"})
        self._bar_label = widgets.HTML(layout=widgets.Layout(flex="1 1 200px", min_height="32px"))
        self._figures, self._replay = (widgets.HTML(layout={"width": "auto"}) for _ in range(2))
        self._play = widgets.Play(min=0, max=0, interval=120, disabled=True)
        self._place = widgets.IntSlider(min=0, max=0, description="Replay", readout=False, disabled=True,
                                        layout={"width": "420px", "max_width": "100%"})  # fmt: skip
        self._status = widgets.HTML(layout=widgets.Layout(min_height="62px"))
        widgets.link((self._play, "value"), (self._place, "value"))
        self._place.observe(lambda change: self._show_place(), names="value")
        self._start_button.on_click(lambda button: self._start())
        self._pause_button.on_click(lambda button: self.pause())
        self._stop_button.on_click(lambda button: self.stop())
        for control in self._choices:
            control.observe(lambda change: self._choose(), names="value")

    def _layout(self) -> list:
        wrap = {"flex_flow": "row wrap"}
        choices = widgets.HBox(list(self._choices), layout=widgets.Layout(grid_gap="0 24px", **wrap))
        buttons = [self._start_button, self._pause_button, self._stop_button, self._bar, self._bar_label]
        row = widgets.HBox(buttons, layout=widgets.Layout(align_items="center", margin="8px 0", **wrap))
        player = widgets.HBox([self._play, self._place], layout=widgets.Layout(align_items="center", **wrap))
        shown = {"format": self._format, "teacher": self._teacher, "steps": self._steps, "rate": self._rate}
        shown |= {"start": self._start_button, "pause": self._pause_button, "stop": self._stop_button}
        shown |= {"bar": self._bar, "figures": self._figures, "play": self._play, "place": self._place}
        for name, control in (shown | {"replay": self._replay, "status": self._status}).items():
            control.add_class(f"gqk-train-{name}")
        style = widgets.HTML(STYLE + TRAINING_STYLE)
        return [style, choices, row, self._figures, player, self._replay, self._status]

    def _choice(self) -> Choice:
        settings = replace(self._settings, num_steps=self._steps.value, learning_rate=self._rate.value)
        return Choice(self._format.value, self._teacher.value, settings)

    def _choose(self) -> None:
        """Remember the choice; an error was about another one."""
        self._mine.choice, self._error = self._choice(), None
        self._show()

    def _start(self) -> threading.Event | None:
        """Start training unless that is under way; return the event that says it is over, None where it cannot be."""
        with _lock:
            if (running := self._mine.session) is not None and running.is_running:
                return running.done
            try:
                self._error = None
                if self._given is not None:
                    check_can_train(self._given, self._choice())  # before the earlier run's figures go
            except KitError as err:
                self._error = err
                self._show()
                return None
            self._mine.result = self.result
            self._mine.session = session = TrainingSession(self._choice())
            pump.start(lambda: session.work(self._find_model, self._text, self._folder), self._show)
        self._show()
        return session.done

    def _find_model(self, report) -> Model:
        """Return the model that was passed, or the one of a size; loaded again where it cannot be trained on."""
        if self._given is not None:
            return self._given
        from gemma_qat_kit.load import load

        try:
            check_can_train(_loaded[self._size], self._mine.session.choice)
        except (KeyError, KitError):
            _loaded.clear()
            gc.collect()  # modules refer to themselves; what the notebook still holds stays
            _loaded[self._size] = load(self._size, _format_of(self._size), report=report)
        return _loaded[self._size]

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop, a waiting cell or a callback."""
        session = self._mine.session
        running = session is not None and session.is_running
        for control in (*self._choices, self._start_button):
            control.disabled = running
        self._start_button.description = "Train on" if not running and self._is_trained() else "Start"
        self._pause_button.disabled = self._stop_button.disabled = not running or session.is_stopping
        self._pause_button.description = "Resume" if running and session.is_paused else "Pause"
        progress = session.progress if running else None
        self._bar.layout.visibility = "visible" if running else "hidden"
        self._bar.value = (progress and progress.fraction) or 0.0
        amount = f"{progress.stage}: {amount_done(progress)}".rstrip(": ") if progress else ""
        self._bar_label.value = f'<span class="gqk-text">{escape(amount)}</span>'
        self._figures.value = figures_html(session, self._choice())
        self._follow(session)
        error = self._error or (session.error if session is not None and not running else None)
        words = session.words if session else "Nothing is trained yet."
        is_news = error is None or isinstance(error, CancelledError)
        self._status.value = status_html(words) if is_news else error_html(error)

    def _is_trained(self) -> bool:
        """Whether Start would go on with what the last run left."""
        model = self.model
        if self.result is None or model is None or model.is_closed or model.engine != "transformers":
            return False
        return prepared_format(module_of(model)) == self._format.value

    def _follow(self, session: TrainingSession | None) -> None:
        """Give the replay as many places as there are, and go with the newest while the slider is at its end."""
        last = max(0, len(session.places) - 1) if session else 0
        is_at_end = self._place.value >= self._place.max
        for control in (self._play, self._place):
            control.max, control.disabled = last, last == 0
        self._play.step = 1 + last // _FRAMES
        if is_at_end:
            self._place.value = last
        self._show_place()

    def _show_place(self) -> None:
        session = self._mine.session
        group, places = session.walk if session else (None, [])
        index = min(self._place.value, len(places) - 1)
        drawn = (id(session), len(places), index)
        if drawn != self._drawn:
            self._drawn = drawn
            self._replay.value = walk_html(group, places, index)


def _known(name: str, names: tuple[str, ...], kind: str) -> str:
    if name not in names:
        raise unknown_name(kind, name, names)
    return name


def _format_of(size: str) -> str:
    """The weights to start from: floats that were not trained for a grid."""
    return "float32" if size == BUILT_IN_SIZE else "bf16"
