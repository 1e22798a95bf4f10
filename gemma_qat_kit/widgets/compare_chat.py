"""CompareChat: one question, two to four models side by side, with what each costs and where it leaves the first."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.chat.comparison import Comparison, Pane, check_number_of_models, compare_answers
from gemma_qat_kit.chat.models import named_models
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.compare_picture import comparison_html
from gemma_qat_kit.widgets.look import STYLE, error_html, status_html
from gemma_qat_kit.widgets.shipped import find_recording


class CompareChat(widgets.VBox):
    """Ask several models the same question; tokens that the first one does not say in that place are marked.

    They answer one after the other, so that each has the machine to itself and the speeds can be compared.

    Args:
        models: Two to four models of `load`, or a dict of them by name; the first is the reference. None only replays.
        recording: To begin with: a `Comparison`, the path of one that `save` wrote, or the name of one that came with
            the kit, "smollm2-135m".
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the likeliest token, so that a difference is the model's.
        seed: Of the sampling where the temperature is not 0.

    Attributes:
        comparison: What was said last; `comparison.save(path)` keeps it for places without the models.

    Raises:
        BadSettingError: Another number of models, neither models nor a recording, or a file that cannot be read.
        UnknownNameError: No recording of that name came with the kit.
    """

    def __init__(
        self,
        models=None,
        recording: Comparison | str | Path | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self._models = check_number_of_models(named_models(models)) if models is not None or recording is None else {}
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        is_kept = recording is None or isinstance(recording, Comparison)
        self._recorded = recording if is_kept else Comparison.load(find_recording(recording, "comparison.json"))
        panes = tuple(Pane(name, model.format) for name, model in self._models.items())
        self.comparison = self._recorded or Comparison("", settings=self._settings, panes=panes)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._stream, self._error, self._is_running, self._words = None, None, False, ""
        self._make_controls()
        self._show()

    def ask(self, prompt: str) -> None:
        """Ask every model and return at once; nothing happens while answers are coming."""
        if prompt.strip() and self._models and self._begin():
            pump.start(lambda: self._work(lambda: self._ask_models(prompt.strip())), self._show)

    def replay(self, speed: float = 1.0) -> None:
        """Show the recording again as it was, or `speed` times as fast, and return at once."""
        if self._recorded is not None and self._begin():
            pump.start(lambda: self._work(lambda: self._play(speed)), self._show)

    def stop(self) -> None:
        """Stop the answers that are coming; what has been said stays."""
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def _begin(self) -> bool:
        with self._lock:
            if self._is_running:
                return False
            self._is_running, self._error, self._words = True, None, ""
        self._stopped.clear()
        self._show()
        return True

    def _work(self, work) -> None:
        try:
            work()
        except Exception as err:
            self._error = err
        finally:
            self._stream, self._is_running = None, False

    def _ask_models(self, prompt: str) -> None:
        compare_answers(self._models, prompt, **self._settings, watch=self._watch)
        self._recorded = self.comparison
        self._words = "Stopped." if self._stopped.is_set() else "Every model has answered."

    def _watch(self, comparison: Comparison, stream) -> None:
        self.comparison, self._stream = comparison, stream
        if stream is not None and self._stopped.is_set():
            stream.cancel()

    def _play(self, speed: float) -> None:
        """Show what had come at each moment, one model after the other, as they answered."""
        whole, begun = self._recorded, 0.0
        self._words = (
            f"A recording, replayed {'as it was' if speed == 1 else 'faster than it was'}.{self._where_made()}"
        )
        started = time.perf_counter()
        ends = [pane.times[-1] if pane.times else 0.0 for pane in whole.panes]
        while (now := (time.perf_counter() - started) * speed) < sum(ends) and not self._stopped.is_set():
            begun, panes = 0.0, []
            for pane, length in zip(whole.panes, ends, strict=True):
                panes.append(pane.until(now - begun))
                begun += length
            self.comparison = replace(whole, panes=tuple(panes))
            self._stopped.wait(pump.INTERVAL_SECONDS)
        self.comparison = whole

    def _make_controls(self) -> None:
        self._input = widgets.Text(description="Question", placeholder="Type, then press Enter",
                                   value=self.comparison.prompt, layout=widgets.Layout(flex="1 1 260px", width="auto"),
                                   style={"description_width": "80px"})  # fmt: skip
        self._ask_button = widgets.Button(description="Ask all", button_style="primary", layout={"width": "90px"})
        self._stop_button = widgets.Button(description="Stop", layout={"width": "80px"})
        self._replay_button = widgets.Button(description="Replay", layout={"width": "80px"})
        speeds = [("as it was", 1), ("4 times", 4), ("at once", 1e9)]
        self._speed = widgets.Dropdown(description="Speed", options=speeds, layout={"width": "150px"},
                                       style={"description_width": "50px"})  # fmt: skip
        # Enter arrives as this message in ipywidgets 7 and 8; `on_submit` is deprecated in 8, 7 has no other.
        self._input.on_msg(lambda text, content, buffers: content.get("event") == "submit" and self._ask_typed())
        self._ask_button.on_click(lambda button: self._ask_typed())
        self._stop_button.on_click(lambda button: self.stop())
        self._replay_button.on_click(lambda button: self.replay(self._speed.value))
        self._picture, self._status = widgets.HTML(), widgets.HTML(layout=widgets.Layout(min_height="24px"))
        asking = [self._input, self._ask_button] if self._models else []
        row = widgets.HBox([*asking, self._stop_button, self._replay_button, self._speed],
                           layout=widgets.Layout(flex_flow="row wrap"))  # fmt: skip
        super().__init__([widgets.HTML(STYLE), row, self._picture, self._status])
        names = {"": self, "-input": self._input, "-ask": self._ask_button, "-stop": self._stop_button,
                 "-replay": self._replay_button, "-status": self._status, "-panes": self._picture}  # fmt: skip
        for name, control in names.items():
            control.add_class(f"gqk-compare{name}")
        self.add_class("gqk-panel-box")

    def _ask_typed(self) -> None:
        self.ask(self._input.value)

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop or a callback."""
        running = self._is_running
        self._ask_button.disabled, self._stop_button.disabled = running, not running
        self._replay_button.disabled = running or self._recorded is None
        self._picture.value = comparison_html(self.comparison)
        if self._error is not None and not running:
            self._status.value = error_html(self._error)
        else:
            answering = next((pane.name for pane in self.comparison.panes if pane.ended == "unfinished"), "")
            words = f"{answering} is answering." if running else self._words or self._first_words()
            self._status.value = status_html(words)

    def _first_words(self) -> str:
        if self._recorded is not None:
            return f"A recording: press Replay.{self._where_made()}"
        return f"{len(self._models)} models are ready; the first is the reference."

    def _where_made(self) -> str:
        return f" Made on {self._recorded.made}." if self._recorded.made else ""
