"""TrainingReplay: a training run that was recorded, step by step, where neither torch nor a model is."""

from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.widgets.look import STYLE, escape, status_html
from gemma_qat_kit.widgets.shipped import find_recording
from gemma_qat_kit.widgets.training_figures import TRAINING_STYLE, recording_html
from gemma_qat_kit.widgets.training_recording import Recording
from gemma_qat_kit.widgets.training_walk import walk_html

_FRAMES = 100  # of a whole replay, at most about so many


class TrainingReplay(widgets.VBox):
    """Press Play, and watch what a run of TrainingPanel did: loss, held-out text, and 32 weights on their grid.

    Args:
        recording: The name of one that came with the kit, the path of one that `TrainingPanel.record` wrote, or a
            `Recording`.

    Attributes:
        recording: The `Recording`.

    Raises:
        UnknownNameError: No recording of that name came with the kit.
        BadSettingError: A file that cannot be read.
    """

    def __init__(self, recording: Recording | str | Path = BUILT_IN_SIZE):
        if not isinstance(recording, Recording):
            recording = Recording.load(find_recording(recording, "training.json"))
        self.recording, last = recording, len(recording.places) - 1
        self._figures, self._walk = (widgets.HTML(layout={"width": "auto"}) for _ in range(2))
        self._play = widgets.Play(max=last, value=last, interval=120, step=1 + last // _FRAMES)
        self._place = widgets.IntSlider(max=last, value=last, description="Step", readout=False,
                                        layout={"width": "420px", "max_width": "100%"})  # fmt: skip
        widgets.link((self._play, "value"), (self._place, "value"))
        self._place.observe(lambda change: self._show(), names="value")
        super().__init__(self._layout())
        self.layout.max_width = "760px"
        for name in ("gqk-panel-box", "gqk-train", "gqk-replay"):
            self.add_class(name)
        self._show()

    def _layout(self) -> list:
        player = widgets.HBox([self._play, self._place], layout={"align_items": "center", "flex_flow": "row wrap"})
        title, status = widgets.HTML(self._title()), widgets.HTML(status_html(self._status()))
        shown = {"figures": self._figures, "play": self._play, "place": self._place, "replay": self._walk,
                 "status": status}  # fmt: skip
        for name, control in shown.items():
            control.add_class(f"gqk-train-{name}")
        return [widgets.HTML(STYLE + TRAINING_STYLE), title, self._figures, player, self._walk, status]

    def _title(self) -> str:
        run = self.recording
        made = f"{len(run.steps):,} of " if len(run.steps) < run.num_steps else ""
        words = f"trained for {run.format}: {made}{run.num_steps:,} steps."
        return f'<div class="gqk-text"><b>{escape(run.name)}</b>, {escape(words)}</div>'

    def _status(self) -> str:
        run = self.recording
        return f"A recording: nothing is computed here. Held out: the end of “{run.held_out}”. Made on {run.made}."

    def _show(self) -> None:
        """Draw the run as it was at the slider's place."""
        run, index = self.recording, self._place.value
        self._figures.value = recording_html(run, run.places[index].step)
        self._walk.value = walk_html(run.group, run.places, index)
