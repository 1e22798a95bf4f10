"""The page's side of a ChatPanel, through anywidget: the conversation and the field to write in."""

from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from gemma_qat_kit.widgets.look import STYLE

_FOLDER = Path(__file__).parent


class ChatView(anywidget.AnyWidget):
    """Draws what `draw` gives it and hands on what a person does.

    Args:
        act: Called with what was done: {"do": "ask", "text", "files", "instead_of"}, {"do": "stop"}, {"do": "again"} or
            {"do": "show", "number"}.
    """

    _esm = (_FOLDER / "chat_view.js").read_text(encoding="utf-8")
    _css = STYLE.removeprefix("<style>").removesuffix("</style>") + (_FOLDER / "chat_view.css").read_text()

    items = traitlets.List(traitlets.Dict()).tag(sync=True)
    live = traitlets.Dict().tag(sync=True)
    is_answering = traitlets.Bool(False).tag(sync=True)
    can_attach = traitlets.Bool(False).tag(sync=True)
    draft = traitlets.Dict().tag(sync=True)  # a text to put back into the field, and a number that grows
    seen = traitlets.Int(0).tag(sync=True)  # number of the last message that arrived

    def __init__(self, act: Callable[[dict], None]):
        super().__init__()
        self._act = act
        self.on_msg(lambda widget, content, buffers: self._take(content))

    def _take(self, content: dict) -> None:
        number = content.get("seq")
        if isinstance(number, int):
            self.seen = number
        self._act(content)

    def draw(self, items: list[dict], live: dict, *, is_answering: bool, can_attach: bool) -> None:
        """Show the turns, the answer that is coming ({} for none) and what can be done."""
        with self.hold_sync():
            self.is_answering, self.can_attach = is_answering, can_attach
            self.items, self.live = items, live

    def put_back(self, text: str) -> None:
        """Put a question that got no answer back into the field, unless something else stands there."""
        self.draft = {"text": text, "number": self.draft.get("number", 0) + 1}
