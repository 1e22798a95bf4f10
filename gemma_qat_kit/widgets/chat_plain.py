"""A ChatPanel's conversation in core ipywidgets, for places that show no front ends of others."""

from collections.abc import Callable

import ipywidgets as widgets

from gemma_qat_kit.widgets.chat_view import ChatView
from gemma_qat_kit.widgets.look import escape

_CSS = f"<style>{ChatView._css}</style>"


class PlainChatView(widgets.VBox):
    """Like `ChatView`, without images, and with one line to write in.

    Args:
        act: As in `ChatView`.
    """

    def __init__(self, act: Callable[[dict], None]):
        self._act, self._items, self._instead_of = act, [], None
        # Growing from the bottom, the transcript stays at its newest line by itself, and where a reader scrolled to.
        self._turns = widgets.HTML(layout=widgets.Layout(flex="0 0 auto"))
        frame = widgets.Layout(height="320px", display="flex", flex_flow="column-reverse", overflow="auto")
        self._input = widgets.Text(description="Message", placeholder="Type, then press Enter",
                                   layout=widgets.Layout(flex="1 1 240px", width="auto"),
                                   style={"description_width": "80px"})  # fmt: skip
        # Enter arrives as this message in ipywidgets 7 and 8; `on_submit` is deprecated in 8, 7 has no other.
        self._input.on_msg(lambda text, content, buffers: content.get("event") == "submit" and self._ask())
        self._send_button, self._stop_button = (
            self._button("Send", self._ask, "primary"),
            self._button("Stop", self._tell("stop")),
        )
        self._again, self._edit = self._button("Again", self._tell("again")), self._button("Edit", self._edit_last)
        self._other = self._button("Other version", self._show_other)
        row = [self._input, self._send_button, self._stop_button, self._again, self._edit, self._other]
        super().__init__([widgets.HTML(_CSS), widgets.Box([self._turns], layout=frame),
                          widgets.HBox(row, layout=widgets.Layout(flex_flow="row wrap"))])  # fmt: skip
        self.add_class("gqk-chat-view")
        self.add_class("gqk-chat-plain")

    def _button(self, text: str, act: Callable[[], None], style: str = "") -> widgets.Button:
        made = widgets.Button(description=text, button_style=style, layout=widgets.Layout(width="auto"))
        made.on_click(lambda button: act())
        made.add_class(f"gqk-chat-{text.split()[0].lower()}")
        return made

    def _tell(self, what: str) -> Callable[[], None]:
        return lambda: self._act({"do": what})

    def _ask(self) -> None:
        if not self._send_button.disabled and self._input.value.strip():
            text, self._input.value = self._input.value, ""
            instead_of, self._instead_of = self._instead_of, None
            self._act({"do": "ask", "text": text, "files": [], "instead_of": instead_of})

    def _edit_last(self) -> None:
        """Put the last question into the field; sent again it stands in a branch of its own."""
        asked = [item for item in self._items if item["role"] == "user"]
        if asked:
            self._input.value, self._instead_of = asked[-1]["text"], asked[-1]["number"]

    def _show_other(self) -> None:
        """Show the next version of the newest turn that has more than one."""
        for item in reversed(self._items):
            if len(item["place"]) > 1:
                place = item["place"]
                return self._act({"do": "show", "number": place[(place.index(item["number"]) + 1) % len(place)]})
        return None

    def draw(self, items: list[dict], live: dict, *, is_answering: bool, can_attach: bool) -> None:
        """See `ChatView.draw`."""
        self._items = items
        self._turns.value = "".join(map(_turn_html, [*items, live] if live else items))
        self._send_button.disabled, self._stop_button.disabled = is_answering, not is_answering
        self._again.disabled = is_answering or not any(item["role"] == "assistant" for item in items)
        self._edit.disabled = is_answering or not items
        self._other.disabled = is_answering or not any(len(item["place"]) > 1 for item in items)

    def put_back(self, text: str) -> None:
        """See `ChatView.put_back`."""
        self._input.value = self._input.value or text


def _turn_html(item: dict) -> str:
    """Draw one turn, the thoughts folded away."""
    place = item.get("place", [])
    version = f" ({place.index(item['number']) + 1} of {len(place)})" if len(place) > 1 else ""
    inner = f"<summary>Thoughts</summary>{item['thoughts']}"
    folded = f'<details aria-label="Thoughts">{inner}</details>' if item["thoughts"] else ""
    note = f"<footer>{escape(item['note'])}</footer>" if item.get("note") else ""
    return (
        f'<article class="gqk-turn gqk-turn-{item.get("role", "assistant")}"><span class="gqk-who">'
        f'{escape(item["who"])}{version}</span>{folded}<div class="gqk-said">{item["html"]}</div>{note}</article>'
    )
