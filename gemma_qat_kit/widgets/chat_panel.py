"""ChatPanel: talk to a loaded model; its words appear as they are made, and Stop stops them."""

import threading

import ipywidgets as widgets

from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.look import STYLE, error_html, escape, status_html

CHAT_STYLE = """<style>
.gqk-chat-transcript { overflow-y: auto; }
.gqk-chat-transcript .gqk-turn { margin: 0 0 10px; white-space: pre-wrap; }
.gqk-turn .gqk-who { display: block; font-weight: 600; font-size: .9em; }
.gqk-turn-user { padding-left: 10px; border-left: 3px solid var(--jp-border-color1, rgba(127, 127, 127, .6)); }
.gqk-turn-model { padding-left: 10px; border-left: 3px solid var(--jp-brand-color1, #0072B2); }
.gqk-turn details { opacity: .75; }
</style>"""


class ChatPanel(widgets.VBox):
    """Talk to a loaded model: type, press Enter, watch the answer come, stop it when it has said enough.

    What the model writes is shown as plain text, whatever is in it.

    Args:
        model: A `Model` from `load` or from a `Picker`.
        max_new_tokens: Longest answer, in tokens.
        seed: Makes the answers the same every time; None for new ones.

    Attributes:
        messages: The conversation so far, as a list of `{"role": …, "content": …}`.
    """

    def __init__(self, model, *, max_new_tokens: int = 512, seed: int | None = None):
        self._model, self._options = model, {"max_new_tokens": max_new_tokens, "seed": seed}
        self.messages: list[dict[str, str]] = []
        self._lock = threading.RLock()
        self._stream, self._reply, self._error = None, None, None
        self._is_answering, self._is_stopping = False, False
        self._thoughts, self._answer = "", ""
        self._make_controls()
        row = widgets.HBox(
            [self._input, self._send_button, self._stop_button], layout=widgets.Layout(flex_flow="row wrap")
        )
        super().__init__([widgets.HTML(STYLE + CHAT_STYLE), self._transcript, row, self._status])
        self.layout.max_width = "720px"
        self.add_class("gqk-panel-box")
        self.add_class("gqk-chat")
        self._status.value = status_html(f"Talking to {model.name}.")

    def ask(self, question: str) -> None:
        """Send one message and return at once; nothing happens while an answer is still coming."""
        with self._lock:
            if self._is_answering or not question.strip():
                return
            self._is_answering, self._is_stopping = True, False
        self.messages.append({"role": "user", "content": question.strip()})
        self._thoughts, self._answer, self._reply, self._error = "", "", None, None
        self._input.value = ""
        self._turns.children += (_turn("user"), _turn("model"))
        self._turns.children[-2].value = _turn_html("You", question.strip(), "")
        self._show()
        pump.start(self._work, self._show)

    def stop(self) -> None:
        """Stop the answer that is coming; what has been said stays."""
        with self._lock:
            self._is_stopping = True
            if self._stream is not None:
                self._stream.cancel()

    def _make_controls(self) -> None:
        # Growing from the bottom, the transcript stays at its newest line by itself, and where a reader scrolled to.
        self._turns = widgets.VBox(layout=widgets.Layout(flex="0 0 auto"))
        frame = widgets.Layout(height="320px", display="flex", flex_flow="column-reverse", margin="0 0 8px")
        self._transcript = widgets.Box([self._turns], layout=frame)
        width = widgets.Layout(flex="1 1 240px", width="auto")
        named = {"description_width": "80px"}
        hint = "Type, then press Enter"
        self._input = widgets.Text(description="Message", placeholder=hint, layout=width, style=named)
        self._send_button = widgets.Button(description="Send", button_style="primary", layout={"width": "90px"})
        self._stop_button = widgets.Button(description="Stop", disabled=True, layout={"width": "90px"})
        self._status = widgets.HTML(layout=widgets.Layout(min_height="24px"))
        # Enter arrives as this message in ipywidgets 7 and 8; `on_submit` is deprecated in 8, 7 has no other.
        self._input.on_msg(lambda text, content, buffers: self._on_key(content))
        self._send_button.on_click(lambda button: self.ask(self._input.value))
        self._stop_button.on_click(lambda button: self.stop())
        controls = {"transcript": self._transcript, "input": self._input, "send": self._send_button}
        for name, control in (controls | {"stop": self._stop_button, "status": self._status}).items():
            control.add_class(f"gqk-chat-{name}")

    def _on_key(self, content: dict) -> None:
        if content.get("event") == "submit":
            self.ask(self._input.value)

    def _work(self) -> None:
        """Collect the answer in this thread; what came of it is left in plain attributes for `_show`."""
        try:
            self._collect(self._model.stream(list(self.messages), **self._options))
        except Exception as err:
            self._error = err
        finally:
            # A question without an answer leaves the conversation, so that the next one starts from a whole one.
            if self._answer:
                self.messages.append({"role": "assistant", "content": self._answer})
            else:
                self.messages.pop()
            self._stream, self._is_answering = None, False

    def _collect(self, stream) -> None:
        with self._lock:
            self._stream = stream
            if self._is_stopping:
                stream.cancel()
        for delta in stream:
            if delta.is_thought:
                self._thoughts += delta
            else:
                self._answer += delta
        self._reply = stream.reply

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop or a callback."""
        answering = self._is_answering
        self._send_button.disabled, self._stop_button.disabled = answering, not answering
        self._turns.children[-1].value = _turn_html(
            self._model.name, self._answer or ("…" if answering else ""), self._thoughts
        )
        if answering:
            self._status.value = status_html("Answering.")
        elif self._error is not None:
            self._status.value = error_html(self._error)
        elif self._reply is not None:
            self._status.value = status_html(_speed(self._reply))


def _turn(who: str) -> widgets.HTML:
    turn = widgets.HTML()
    turn.add_class(f"gqk-turn-{who}")
    return turn


def _turn_html(who: str, text: str, thoughts: str) -> str:
    """Draw one message as text that cannot do anything, the thoughts folded away."""
    folded = f"<details><summary>Thoughts</summary>{escape(thoughts)}</details>" if thoughts else ""
    return f'<div class="gqk-text gqk-turn"><span class="gqk-who">{escape(who)}</span>{folded}{escape(text)}</div>'


def _speed(reply) -> str:
    """Say how long the answer was, how fast it came, as measured, and why it ended where it did."""
    ends = {"cancelled": " Stopped.", "length": " Cut off: it reached max_new_tokens or the end of the context."}
    return (
        f"{reply.new_tokens} tokens at {reply.tokens_per_second:.3g} tokens/s, "
        f"the first after {reply.first_token_seconds:.2g} s.{ends.get(reply.finish_reason, '')}"
    )
