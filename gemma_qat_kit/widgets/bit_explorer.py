"""BitExplorer: 32 weights over the levels of a number format; drag one and watch its code, byte and error change."""

import math
import random
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import anywidget
import traitlets

from gemma_qat_kit.errors import BadSettingError, KitError, unknown_name
from gemma_qat_kit.formats.quantized import FORMATS
from gemma_qat_kit.widgets.group_picture import group_colour, plot_limit, round_ticks
from gemma_qat_kit.widgets.layers import GROUP_SIZE, find_layers
from gemma_qat_kit.widgets.look import STYLE
from gemma_qat_kit.widgets.one_group import Group, PackedByte, describe_group

_FOLDER = Path(__file__).parent


class BitExplorer(anywidget.AnyWidget):
    """Look at 32 weights of a layer, and drag them.

    Every code, byte and error comes from `quantize`, at each move of the hand.

    Args:
        weights: A loaded model, a torch module, a dict of tensors by name, a checkpoint's folder, one tensor, or None
            for the built-in model.
        format: The number format to start with, one of `formats.quantized.FORMATS`.

    Attributes:
        layer: Name of the layer shown.
        row: Row of its matrix: an output channel.
        group: Which 32 weights of the row.
        format: Number format.
        recover_grid: Look for a grid that the weights lie on already (q4_0).

    Raises:
        BadSettingError: There are no weights in what was passed.
        MissingLibraryError: The built-in model is not installed.
        UnknownNameError: The format is not known.
    """

    _esm = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("bits_plot.js", "bit_explorer.js"))
    _css = STYLE.removeprefix("<style>").removesuffix("</style>") + (_FOLDER / "bit_explorer.css").read_text()

    layers = traitlets.List(traitlets.Unicode()).tag(sync=True)
    formats = traitlets.List(traitlets.Unicode(), list(FORMATS)).tag(sync=True)
    layer = traitlets.Unicode().tag(sync=True)
    row = traitlets.Int(0).tag(sync=True)
    group = traitlets.Int(0).tag(sync=True)
    format = traitlets.Unicode("q4_0").tag(sync=True)
    recover_grid = traitlets.Bool(False).tag(sync=True)
    edit = traitlets.Dict().tag(sync=True)  # what the hand moved last: look, index, value and a number that grows
    shown = traitlets.Dict().tag(sync=True)  # everything that the page draws

    def __init__(self, weights: object = None, format: str = "q4_0"):
        self._layers = find_layers(weights)
        self._random = random.Random(0)
        self._lock = threading.RLock()
        self._edits: dict[int, float] = {}
        self._num_looks, self._is_moving, self._num_answers, self._described, self._error = 0, True, 0, None, None
        super().__init__(layers=list(self._layers), layer=next(iter(self._layers)), format=format)
        self._is_moving = False
        self.on_msg(lambda widget, content, buffers: self._act(content))
        self._look()

    def drag(self, index: int, value: float) -> None:
        """Give one of the 32 weights another value, as the hand does.

        Raises:
            BadSettingError: There is no such weight, or the value is not finite.
        """
        if not 0 <= index < GROUP_SIZE or not math.isfinite(value):
            raise BadSettingError(
                f"w[{index}] cannot become {value}.",
                f"Weights are w[0] to w[{GROUP_SIZE - 1}], values finite.",
                "Pass another index or value.",
            )
        with self._lock:
            self._edits[index] = value
            self._show()

    def reset(self) -> None:
        """Give every weight its own value back."""
        self._look()

    def move(self, steps: int) -> None:
        """Go some groups further, or back where `steps` is negative; rows follow one another, the last the first."""
        num_rows, num_groups = self._counts()
        self._go(*divmod((self.row * num_groups + self.group + steps) % (num_rows * num_groups), num_groups))

    def pick_random(self) -> None:
        """Go to some group of the layer."""
        self._go(*map(self._random.randrange, self._counts()))

    def picture(self) -> Group:
        """Return what is shown now as a picture that stands still, for print and GitHub; its numbers are attributes.

        Raises:
            BadTensorError: These weights cannot be quantized; the widget says why.
        """
        if self._error is not None:
            raise self._error
        return self._described

    @traitlets.validate("format", "layer")
    def _check_name(self, proposal) -> str:
        kind, value = proposal["trait"].name, proposal["value"]
        known = FORMATS if kind == "format" else self._layers
        if value not in known:
            raise unknown_name(kind, value, known)
        return value

    @traitlets.validate("row", "group")
    def _check_number(self, proposal) -> int:
        kind, value = proposal["trait"].name, proposal["value"]
        count = self._counts()[kind == "group"]
        if not 0 <= value < count:
            raise BadSettingError(
                f"{self.layer} has no {kind} {value}.", f"Its {kind}s are 0 to {count - 1:,}.", "Pick one of these."
            )
        return value

    @traitlets.observe("layer", "row", "group", "format", "recover_grid")
    def _on_choice(self, change) -> None:
        if self._is_moving:
            return
        if change["name"] == "layer":
            self._go(0, 0)
        elif change["name"] in ("row", "group"):
            self._look()
        else:
            self._show()

    @traitlets.observe("edit")
    def _on_edit(self, change) -> None:
        # The page's widget manager holds an edit back while Python is busy, but not a click on Reset or Next: what
        # comes behind such a click belongs to weights that are no longer shown.
        if change["new"]["look"] == self._num_looks:
            self.drag(int(change["new"]["index"]), float(change["new"]["value"]))
        else:
            self._show()  # the page waits for an answer

    def _act(self, content: dict) -> None:
        """Do what a button of the page asks for."""
        actions = {"previous": lambda: self.move(-1), "next": lambda: self.move(1), "random": self.pick_random}
        actions.get(content.get("do"), self.reset)()

    def _counts(self) -> tuple[int, int]:
        """Rows of the layer, and groups of 32 in each."""
        layer = self._layers[self.layer]
        return layer.num_rows, layer.width // GROUP_SIZE

    def _go(self, row: int, group: int) -> None:
        """Change row and group, and look once."""
        self._is_moving = True
        try:
            self.row, self.group = row, group
        finally:
            self._is_moving = False
        self._look()

    def _look(self) -> None:
        """Read the weights of the place that was picked, and show them."""
        with self._lock:
            self._edits, self._num_looks = {}, self._num_looks + 1
            self._show()

    def _show(self) -> None:
        """Describe the group with the hand's changes, and send it to the page; an error shows there, too."""
        try:
            own = self._describe({})
            self._described, self._error = self._describe(self._edits) if self._edits else own, None
            self.shown = self._place() | _drawn(self._described, plot_limit(own))
        except KitError as err:
            self._error = err
            self.shown = self.shown | self._place() | {"problem": [err.wrong, err.allowed, err.next_step]}

    def _describe(self, edits: dict[int, float]) -> Group:
        weight = self._layers[self.layer].read(self.row, self.row + 1).clone()
        for index, value in edits.items():
            weight[0, self.group * GROUP_SIZE + index] = value
        is_recovered = self.recover_grid and self.format == "q4_0"
        found = describe_group(weight, self.format, group=self.group, recover_grid=is_recovered, name=self.layer)
        return replace(found, title=f"{self.layer}, row {self.row:,}, group {self.group:,}, {self.format}")

    def _place(self) -> dict:
        """Return what the controls need, and a number that tells this answer from the one before."""
        self._num_answers += 1
        num_rows, num_groups = self._counts()
        counts = {"num_rows": num_rows, "num_groups": num_groups}
        counts |= {"look": self._num_looks, "answer": self._num_answers}
        return counts | {"is_edited": bool(self._edits), "seq": self.edit.get("seq", 0)}


def _drawn(group: Group, limit: float) -> dict:
    """Return everything that the page draws of a group, on an axis from -limit to limit."""
    steps = [abs(b - a) for (_, a), (_, b) in pairwise(group.levels)]
    numbers = ("title", "facts", "values", "codes", "snapped", "errors", "lines", "levels")
    return {name: getattr(group, name) for name in numbers} | {
        "problem": None,
        "colour": group_colour(group),
        "limit": limit,
        "ticks": round_ticks(limit),
        "error_limit": max(*map(abs, group.errors), max(steps) / 2) or 1.0,
        "key_step": limit / 50,
        "bytes": [_byte(byte) for byte in group.packed],
        "bytes_caption": _bytes_caption(group),
    }


def _byte(byte: PackedByte) -> dict:
    """Describe one byte for the page: its digits, and which weights they belong to."""
    if not byte.weights:
        return {"parts": [{"text": byte.digits[0], "weights": []}], "owner": "scale", "title": "a byte of the scale"}
    parts = [{"text": text, "weights": [i]} for text, i in zip(byte.digits, byte.weights, strict=True)]
    owner = " ".join(map(str, byte.weights))
    return {"parts": parts, "owner": owner, "title": f"codes of weight {' and '.join(map(str, byte.weights))}"}


def _bytes_caption(group: Group) -> str:
    num_scale = sum(not byte.weights for byte in group.packed)
    each = {1: "a byte each", 2: "two in a byte", 4: "four in a byte, written as bits"}[len(group.packed[-1].weights)]
    num_codes = len(group.packed) - num_scale
    return f"Stored: {num_scale} bytes of scale, {num_codes} bytes of codes ({each}); below each byte, its weights"
