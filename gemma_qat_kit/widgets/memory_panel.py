"""MemoryPanel: what a model takes in memory, part by part, against the machines that people have."""

import threading
import weakref
from dataclasses import dataclass, replace

import ipywidgets as widgets

from gemma_qat_kit.catalog import BUILT_IN_SIZE, SIZES, catalog, find_checkpoint
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.loading_note import last_failure
from gemma_qat_kit.memory.budgets import KNOWN, Budget, Room, cached_plan, room, this_machine
from gemma_qat_kit.memory.network import find_network
from gemma_qat_kit.memory.parts import Parts
from gemma_qat_kit.memory.plan import MemoryPlan, usual_engine
from gemma_qat_kit.memory.settings import KV_FORMATS, MemorySettings
from gemma_qat_kit.model import Model
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import STYLE, error_html, status_html
from gemma_qat_kit.widgets.memory_picture import (
    KEY,
    MemoryPicture,
    bars_svg,
    figure_html,
    loaded_html,
    table_html,
)

_TASKS = (("chat", "chat"), ("fine-tune (LoRA)", "finetune"), ("QAT, every weight", "qat"))
_TABLES = (("left on disk", "disk"), ("in RAM", "cpu"), ("with the rest", "memory"))
_DEVICES = (("what is usual", ""), ("the GPU", "cuda"), ("the CPU", "cpu"))
_KV_LABELS = {"q4_0": "q4_0 (ruins QAT)"}
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_CONTEXT, _SEQUENCE = 4096, 1024
_STALE = '<div style="opacity:.35" aria-hidden="true">{}</div>'


@dataclass
class _Kept:
    """What a kernel remembers between two runs of the same cell; a model only as a weak reference."""

    asked: tuple | None = None
    choice: dict | None = None


_kept = _Kept()
_lock = threading.RLock()  # callbacks run in the kernel's main thread or beside it, depending on its version


class MemoryPanel(widgets.VBox):
    """Choose a model and what to do with it, and see where it fits; drag context and batch, and watch the parts grow.

    Nothing is downloaded. With a loaded model, what was predicted and what is measured stand side by side.

    Args:
        size: Size to start with, one of `catalog.SIZES`.
        format: Format to start with.
        model: A loaded `Model` to measure.

    Attributes:
        error: What is wrong with the settings, None where nothing is.

    Raises:
        UnknownNameError: The size or the format is not known.
        NotPublishedError: The catalog has no row for the two together.
    """

    def __init__(self, size: str = "E2B", format: str = "q4_0", model: Model | None = None):
        rows = {(row.size, row.format): row for row in catalog(role="chat")}
        if model is not None and (model.size, model.format) in rows:
            size, format = model.size, model.format
        first = rows.get((size, format)) or find_checkpoint(size, format)
        size, format = first.size, first.format
        self._rooms, self.error, self._figure_html, self._is_filling = (), None, "", True
        self._note = last_failure()
        asked = (size, format, model and weakref.ref(model))
        with _lock:
            start = _kept.choice if _kept.asked == asked else {}
            _kept.asked = asked
        self._make_controls()
        self._fill({"size": size, "format": format} | start)
        super().__init__(self._layout())
        self.layout.max_width = "800px"
        for name in ("gqk-panel-box", "gqk-memory"):
            self.add_class(name)
        self.model = model

    @property
    def model(self) -> Model | None:
        """The loaded model that is measured; set it to measure another."""
        return self._model

    @model.setter
    def model(self, model: Model | None) -> None:
        self._model = model
        self.measure()

    @property
    def plan(self) -> MemoryPlan:
        """The plan for what is chosen now, on the device chosen or else on the one that the format is for.

        Raises:
            KitError: These settings cannot be planned; the panel says why.
        """
        return cached_plan(settings := self._settings(), settings.device)

    @property
    def rooms(self) -> tuple[Room, ...]:
        """Whether it fits, machine by machine: this one, then those of `budgets.KNOWN`.

        Raises:
            KitError: As for `plan`.
        """
        settings, device = self._settings(), self._controls["device"].value or None
        return tuple(room(settings, budget, device) for budget in self._budgets)

    def picture(self) -> MemoryPicture:
        """Return what is shown now as a picture that stands still, for print and GitHub.

        Raises:
            KitError: As for `plan`.
        """
        rooms = self.rooms
        return MemoryPicture(bars_svg(rooms, with_legend=True), self._figure(rooms))

    def measure(self) -> None:
        """Look again at what is free here and at what the loaded model holds."""
        here, self._compared.value = this_machine(), ""
        self._again.layout.display = "none" if self._model is None else ""
        if self._model is not None:
            try:
                use = self._model.memory()
                here = _without(use, here)
                self._compared.value = loaded_html(_plan_of(self._model), use, self._model.name)
            except KitError as err:
                self._compared.value = error_html(err)
        self._budgets = (here, *KNOWN)
        self._choose()

    def _make_controls(self) -> None:
        wide, named = {"width": "240px", "max_width": "100%"}, {"description_width": "100px"}

        def dropdown(description: str, options) -> widgets.Dropdown:
            return widgets.Dropdown(description=description, options=options, layout=wide, style=named)

        def slider(description: str, options) -> widgets.SelectionSlider:
            layout = {"width": "500px", "max_width": "100%"}
            return widgets.SelectionSlider(description=description, options=options, layout=layout, style=named)

        def box(description: str, value: bool) -> widgets.Checkbox:
            return widgets.Checkbox(description=description, value=value, indent=False, layout={"width": "120px"})

        self._controls = {
            "size": dropdown("Size", SIZES),
            "format": dropdown("Format", ("q4_0",)),
            "task": dropdown("Task", _TASKS),
            "device": dropdown("Runs on", _DEVICES),
            "per_layer_table": dropdown("Per-layer table", _TABLES),
            "kv_format": dropdown("KV cache", [(_KV_LABELS.get(name, name), name) for name in KV_FORMATS]),
            "text_only": box("Text only", True),
            "drafter": box("Drafter", False),
            "context": slider("Context", _lengths(2**17)),
            "batch": slider("Batch", _BATCHES),
        }
        self._figure_box, self._compared = (widgets.HTML(layout={"width": "auto"}) for _ in range(2))
        self._status = widgets.HTML(layout=widgets.Layout(min_height="62px"))
        self._again = widgets.Button(description="Measure again", layout={"width": "130px"})
        self._again.on_click(lambda button: self.measure())
        for name, control in self._controls.items():
            control.add_class(f"gqk-memory-{name.replace('_', '-')}")
            control.observe(lambda change, name=name: self._on_change(name), names="value")

    def _layout(self) -> list:
        names = ("size", "format", "task", "device", "per_layer_table", "kv_format")
        wrap = widgets.Layout(flex_flow="row wrap", grid_gap="0 20px")
        choices = widgets.HBox([self._controls[name] for name in names], layout=wrap)
        boxes = widgets.HBox([self._controls[name] for name in ("text_only", "drafter")], layout=wrap)
        sliders = [self._controls[name] for name in ("context", "batch")]
        shown = {"figure": self._figure_box, "compared": self._compared, "status": self._status}
        for name, box in shown.items():
            box.add_class(f"gqk-memory-{name}")
        self._again.add_class("gqk-memory-again")
        controls = [widgets.HTML(STYLE), choices, boxes, *sliders, self._status]
        return [*controls, self._figure_box, self._compared, self._again]

    def _on_change(self, name: str) -> None:
        if self._is_filling:
            return
        if name in ("size", "format", "task"):
            self._fill({key: control.value for key, control in self._controls.items()} | {"changed": name})
        self._choose()

    def _fill(self, choice: dict) -> None:
        """Give every control the options that the size has, and the value wanted or the nearest one there is."""
        changed = choice.pop("changed", None)
        self._is_filling = True
        try:
            size, controls = choice["size"], self._controls
            rows = {row.format: row for row in catalog(size=size, role="chat")}
            controls["size"].value = size
            labels = [(name if row.is_available else f"{name} (not published)", name) for name, row in rows.items()]
            wanted = choice["format"]
            controls["format"].options = labels
            controls["format"].value = wanted if wanted in rows else find_checkpoint(size).format
            is_chat = choice.get("task", "chat") == "chat"
            length = (_CONTEXT if is_chat else _SEQUENCE) if changed == "task" else choice.get("context", _CONTEXT)
            options = _lengths(_longest(size))
            controls["context"].description = "Context" if is_chat else "Sequence"
            controls["context"].options = options
            controls["context"].value = max(n for _, n in options if n <= max(length, 512))
            for name in choice.keys() - {"size", "format", "context"}:
                controls[name].value = choice[name]
        finally:
            self._is_filling = False

    def _settings(self) -> MemorySettings:
        """Return what is chosen; raises what `find_checkpoint` does."""
        value = {name: control.value for name, control in self._controls.items()}
        row = find_checkpoint(value["size"], value["format"])
        is_for_cpu = row.engine == "llama_cpp" or row.size == BUILT_IN_SIZE
        device = value["device"] or ("cpu" if is_for_cpu else "cuda")
        length = "context_length" if value["task"] == "chat" else "sequence_length"
        names = ("task", "per_layer_table", "kv_format", "text_only", "drafter")
        chosen = {name: value[name] for name in names} | {length: value["context"], "batch_size": value["batch"]}
        return MemorySettings(row.size, row.format, usual_engine(row, value["task"]), device, **chosen)

    def _choose(self) -> None:
        """Show what is chosen, and remember it; where it cannot be planned say why, and let the last picture pale."""
        if self._is_filling:
            return
        with _lock:
            _kept.choice = {name: control.value for name, control in self._controls.items()}
        try:
            rooms, self.error = self.rooms, None
            self._figure_html = self._figure(rooms)
            self._figure_box.value = self._figure_html
            self._status.value = status_html(self._summary(rooms))
        except KitError as err:
            self.error = err
            self._figure_box.value = _STALE.format(self._figure_html)
            self._status.value = error_html(err)

    def _summary(self, rooms: tuple[Room, ...]) -> str:
        here, plan = rooms[0], rooms[0].plan
        return (
            f"{f'{self._note} ' if self._note else ''}"
            f"{plan.settings.size} {plan.settings.format} on this machine: {here.words}. "
            f"Of {readable_bytes(plan.total_bytes)} in memory {readable_bytes(plan.needed_bytes)} are needed; "
            f"{readable_bytes(plan.load_peak_bytes)} at the peak of the load. "
            f"The download is {readable_bytes(plan.download_bytes)}"
            f"{f', {readable_bytes(plan.written_bytes)} are written beside it' if plan.written_bytes else ''}."
        )

    def _figure(self, rooms: tuple[Room, ...]) -> str:
        plans = {found.device: found.plan for found in rooms}
        notes = " ".join(dict.fromkeys(f"{found.budget.name}: {found.note}" for found in rooms if found.note))
        return figure_html(bars_svg(rooms), table_html(plans), note=f"{notes} {KEY}".strip())


def _lengths(longest: int) -> list[tuple[str, int]]:
    """Return the lengths to choose from, each half as long again as the one before or a third longer."""
    powers = [2**k for k in range(9, longest.bit_length())]
    lengths = sorted({n for power in powers for n in (power, power * 3 // 2) if n <= longest} | {longest})
    return [(f"{n:,}", n) for n in lengths]


def _longest(size: str) -> int:
    row = next(row for row in catalog(size=size, role="chat") if row.is_available)
    return find_network(MemorySettings(row.size, row.format, row.engine, "cpu")).longest_context


def _plan_of(model: Model) -> MemoryPlan:
    """Return the plan of a loaded model, with the settings that it was loaded with."""
    device = getattr(getattr(model.runner, "device", None), "type", "cpu")
    settings = MemorySettings(model.size, model.format, model.engine, device, context_length=model.context_length)
    return cached_plan(settings, device)


def _without(use: Parts, here: Budget) -> Budget:
    """Return this machine as it would be without the loaded model; pages of files count as free already."""
    ram_bytes = here.ram_bytes and here.ram_bytes + use.in_place("ram")
    return replace(here, ram_bytes=ram_bytes, gpu_bytes=here.gpu_bytes and here.gpu_bytes + use.in_place("gpu"))
