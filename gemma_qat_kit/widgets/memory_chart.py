"""MemoryChart: memory over time, drawn while a model loads, answers or trains."""

import threading
from contextlib import suppress

import ipywidgets as widgets

from gemma_qat_kit.memory.measure import MemoryOverTime, measure_memory
from gemma_qat_kit.memory.measure_picture import draw
from gemma_qat_kit.widgets.look import STYLE

INTERVAL_SECONDS = 0.25
_STYLE = """<style>
.gqk-memory-chart .widget-html-content { min-width: 0; width: 100%; }
@media (max-width: 640px) {
  .gqk-memory-chart .gqk-panel .gqk-table { font-size: 11.5px; }
  .gqk-memory-chart .gqk-panel .gqk-table td:first-child { white-space: normal; }
}
</style>"""


class MemoryChart(widgets.VBox):
    """Watch memory while something runs: `with widgets.MemoryChart() as chart: model = gqk.load("E2B")`.

    The chart shows at once. The cell's code keeps the kernel busy, so it is redrawn from a thread, four times a second;
    where a front end shows nothing that comes from there (Colab), the whole chart is there when the block ends.

    Args:
        use: A measurement to show, running or over; None makes one that runs as long as the with block.
    """

    def __init__(self, use: MemoryOverTime | None = None):
        self.use = use or measure_memory()
        self._is_own = use is None
        self._stopped, self._watcher, self._is_shown = threading.Event(), None, False
        self._picture = widgets.HTML(layout=widgets.Layout(width="auto", min_height="300px"))
        super().__init__([widgets.HTML(STYLE + _STYLE), self._picture])
        self.layout.max_width = "600px"
        for name in ("gqk-panel-box", "gqk-memory-chart"):
            self.add_class(name)
        self._draw()
        if self.use.is_running:
            self._watch()

    def mark(self, name: str) -> None:
        """Give this moment a name in the chart."""
        self.use.mark(name)

    def __enter__(self) -> "MemoryChart":
        if self._is_own:
            self.use.start()
        _display(self)
        self._draw()
        self._watch()
        return self

    def __exit__(self, *_) -> None:
        self._end_watch()
        if self._is_own:
            self.use.stop()
        self._draw()

    def _end_watch(self) -> None:
        self._stopped.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def _watch(self) -> None:
        if self._watcher is None:
            self._stopped.clear()
            self._watcher = threading.Thread(target=self._keep_drawing, name="MemoryChart", daemon=True)
            self._watcher.start()

    def _keep_drawing(self) -> None:
        # Some kernels refuse widgets' messages from a thread; the last picture comes from the cell all the same.
        with suppress(Exception):
            while self.use.is_running and not self._stopped.wait(INTERVAL_SECONDS):
                self._draw()
            if not self._stopped.is_set():
                self._draw()  # it ended elsewhere

    def _draw(self) -> None:
        self._picture.value = draw(self.use)


def _display(widget: widgets.Widget) -> None:
    """Show a widget under the cell that runs."""
    from IPython.display import display

    display(widget)
