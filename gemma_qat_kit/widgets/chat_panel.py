"""ChatPanel: talk to a loaded model; its words appear as they are made, and Stop stops them."""

from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.chat.conversation import Conversation, Turn, as_attachments
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.widgets import pump
from gemma_qat_kit.widgets.chat_figures import end_note, meter_html, speed_words
from gemma_qat_kit.widgets.chat_plain import PlainChatView
from gemma_qat_kit.widgets.chat_session import Choice, session_for
from gemma_qat_kit.widgets.chat_settings import ChatSettings
from gemma_qat_kit.widgets.chat_view import ChatView
from gemma_qat_kit.widgets.look import STYLE, error_html, escape, status_html
from gemma_qat_kit.widgets.markdown import StreamedMarkdown, markdown_html


class ChatPanel(widgets.VBox):
    """Talk to a loaded model: type, press Enter, watch the answer come, stop it when it has said enough.

    Every answer can be given again and every question edited; what was there before stays in a branch of its own. What
    the model writes is shown as Markdown in which nothing acts, whatever is in it.

    Args:
        model: A `Model` from `load` or from a `Picker`, a list of them to choose from, or a dict of them by name.
        conversation: A `Conversation` to go on with, or the path of a file, which is read if it exists and written
            after every answer. Without one, a cell that is run again goes on with what its panel had.
        max_new_tokens: Longest answer, in tokens.
        seed: Makes the answers the same every time; None for new ones.
        plain: Use core ipywidgets only: one line to write in, no images; for pages that show nothing else.

    Raises:
        BadSettingError: There is no model, or the file holds no conversation.
    """

    def __init__(
        self,
        model,
        conversation: Conversation | str | Path | None = None,
        *,
        max_new_tokens: int = 512,
        seed: int | None = None,
        plain: bool = False,
    ):
        self._session = session_for(model, conversation, Choice(max_new_tokens=max_new_tokens, seed=seed))
        self._items: dict[int, dict] = {}
        self._streamed = StreamedMarkdown()
        self._view = (PlainChatView if plain else ChatView)(self._act)
        self._settings = ChatSettings(self._session, self._show, self._say)
        self._meter, self._status = widgets.HTML(), widgets.HTML(layout=widgets.Layout(min_height="24px"))
        super().__init__(
            [widgets.HTML(STYLE), self._settings.top, self._view, self._meter, self._settings, self._status]
        )
        self.layout.max_width = "760px"
        for control, name in ((self, "chat"), (self._status, "chat-status"), (self._meter, "chat-meter")):
            control.add_class(f"gqk-{name}")
        self.add_class("gqk-panel-box")
        self._show()
        if self._session.is_answering:  # the cell was run again meanwhile
            pump.start(self._session.wait, self._show)

    @property
    def conversation(self) -> Conversation:
        """Every question and answer so far, with its branches, settings and timings."""
        return self._session.conversation

    @property
    def messages(self) -> list[dict]:
        """The branch that is shown, as `Model.chat` takes it."""
        return self.conversation.messages

    def ask(self, question: str, *, attachments: tuple = (), instead_of: int | None = None) -> None:
        """Send one message and return at once; nothing happens while an answer is still coming.

        Args:
            question: What to ask.
            attachments: Images and sounds to ask about, as parts of a message.
            instead_of: Number of an earlier question to ask it in place of, in a branch of its own.

        Raises:
            BadSettingError: There is no such turn.
        """
        if question.strip() and self._session.begin(question, attachments=attachments, instead_of=instead_of):
            self._start()

    def answer_again(self) -> None:
        """Answer the last question once more, beside the answer that is there, and return at once."""
        if self.messages and self._session.begin():
            self._start()

    def stop(self) -> None:
        """Stop the answer that is coming; what has been said stays."""
        self._session.stop()

    def show(self, number: int) -> None:
        """Show the branch of a turn.

        Raises:
            BadSettingError: There is no such turn.
        """
        if not self._session.is_answering:
            self.conversation.show(number)
            self._show()

    def _act(self, content: dict) -> None:
        """Do what the page asks for; nothing in it is taken for granted."""
        what = content.get("do")
        try:
            if what == "ask":
                place = content.get("instead_of")
                is_known = place in [turn.number for turn in self.conversation.path]
                self.ask(str(content.get("text", "")), attachments=tuple(_attached(content)),
                         instead_of=place if is_known else None)  # fmt: skip
            elif what == "stop":
                self.stop()
            elif what == "again":
                self.answer_again()
            elif what == "show":
                self.show(content.get("number"))
        except KitError as err:
            self._view.put_back(str(content.get("text", "")))
            self._say(err)

    def _say(self, words: object) -> None:
        """Put words or an error into the status line."""
        if words:
            self._status.value = error_html(words) if isinstance(words, KitError) else status_html(str(words))

    def _start(self) -> None:
        self._streamed = StreamedMarkdown()
        self._show()
        pump.start(self._work, self._show)

    def _work(self) -> None:
        """Wait for the answer in this thread; Markdown of a whole answer is drawn here, too, and not in the loop."""
        try:
            self._session.run()
            for turn in self.conversation.path:
                self._item(turn)
        finally:
            self._session.end()

    def _show(self) -> None:
        """Bring every control in line with the state; called from the kernel's loop or a callback."""
        session = self._session
        is_answering = session.is_answering
        items = [self._placed(turn) for turn in (session.standing if is_answering else self.conversation.path)]
        self._view.draw(items, self._live() if is_answering else {}, is_answering=is_answering,
                        can_attach=session.takes_attachments)  # fmt: skip
        self._settings.draw(is_answering)
        self._meter.value = meter_html(session.num_used, session.model.context_length)
        if is_answering:
            self._status.value = status_html(self._waiting_words())
        elif session.error is not None:
            self._status.value = error_html(session.error)
        elif session.answer is not None:
            self._status.value = status_html(speed_words(session.answer.reply, session))
        else:
            self._status.value = status_html(f"Talking to {session.model.name}.")
        if session.lost_question and not is_answering:
            self._view.put_back(session.lost_question)
            session.lost_question = ""

    def _waiting_words(self) -> str:
        answer = self._session.answer
        num_tokens = answer.reply.new_tokens if answer else 0
        if num_tokens:
            return f"Answering: {num_tokens} tokens."
        queue = self._session.queue
        if queue is not None and queue.waiting:
            return f"Waiting for a place: {queue}."
        return "Reading the question."

    def _live(self) -> dict:
        """Draw the answer that is coming."""
        answer = self._session.answer
        text, thoughts = (answer.reply.text, answer.reply.thoughts) if answer else ("", "")
        html = self._streamed.html(text) if text else "<p>…</p>"
        return {"who": self._session.model.name, "html": html, "thoughts": _folded(thoughts)}

    def _placed(self, turn: Turn) -> dict:
        """Return a turn as the page shows it, with the versions that stand in its place."""
        if turn.number < 0:
            return self._drawn(turn) | {"place": [-1], "is_last": False}
        place = self.conversation.beside(turn.number)
        return self._item(turn) | {"place": place, "is_last": turn.number == self.conversation.tip}

    def _item(self, turn: Turn) -> dict:
        """Draw a turn once: what was said does not change."""
        found = self._items.get(turn.number)
        if found is None or found["turn"] is not turn:
            found = self._items[turn.number] = {"turn": turn, "item": self._drawn(turn)}
        return found["item"]

    def _drawn(self, turn: Turn) -> dict:
        is_user = turn.role == "user"
        who = "You" if is_user else turn.model or "Model"
        pictures = "".join(map(_picture, turn.attachments))
        said = f'<p class="gqk-plain">{escape(turn.content)}</p>' if is_user else markdown_html(turn.content)
        return {"number": turn.number, "role": turn.role, "who": who, "html": pictures + said, "text": turn.content,
                "thoughts": _folded(turn.thoughts), "note": end_note(turn)}  # fmt: skip


def _attached(content: dict) -> list[dict]:
    """Return the files that a page sent, as parts of a message.

    Raises:
        BadSettingError: One is no picture or recording, or too large.
    """
    files = [file for file in content.get("files") or () if isinstance(file, dict)]
    kinds = ("audio" if str(file.get("type")).startswith("audio/") else "image" for file in files)
    urls = (f"data:;base64,{file.get('data')}" for file in files)
    return list(as_attachments(tuple({"type": kind, kind: url} for kind, url in zip(kinds, urls, strict=True))))


def _picture(part: dict) -> str:
    """Draw what a question came with; its bytes were looked at, and are no more than a picture."""
    if part.get("type") != "image":
        return f"<p>[{escape(part.get('type'))} attached]</p>"
    return f'<img alt="attached image" src="data:{escape(part["media_type"])};base64,{escape(part["data"])}">'


def _folded(thoughts: str) -> str:
    return f'<div class="gqk-plain">{escape(thoughts)}</div>' if thoughts else ""
