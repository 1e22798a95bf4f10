"""The settings of a ChatPanel: which model answers, how it samples, what it is told first, and what is kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets

from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.widgets.chat_session import ChatSession

_NUMBERS = {
    "max_new_tokens": ("Longest answer", int, "tokens"),
    "temperature": ("Temperature", float, "0 always takes the likeliest"),
    "top_p": ("top_p", float, "share of probability"),
    "top_k": ("top_k", int, "0 keeps all"),
    "seed": ("Seed", int, "a new one each time"),
}


class ChatSettings(widgets.VBox):
    """Folded away behind a button until somebody wants them; what is changed holds from the next answer on.

    Args:
        session: What they change.
        changed: Called after a change.
        say: Called with words for the status line, or an error.

    Attributes:
        top: The controls above the conversation: which model, and a new conversation.
    """

    def __init__(self, session: ChatSession, changed: Callable[[], None], say: Callable[[object], None]):
        self._session, self._changed, self._say = session, changed, say
        named = {"description_width": "110px"}
        self._models = widgets.Dropdown(description="Model", options=list(session.models), value=session.model_name,
                                       style={"description_width": "50px"})  # fmt: skip
        self._new = widgets.Button(description="New conversation", layout=widgets.Layout(width="auto"))
        self._save = widgets.Button(description="Save", layout=widgets.Layout(width="auto"),
                                    tooltip="As JSON, Markdown and JSONL in the folder chats")  # fmt: skip
        self._system = widgets.Textarea(description="System prompt", value=session.conversation.system, style=named,
                                        placeholder="Instructions that every question comes with",
                                        layout=widgets.Layout(width="auto"))  # fmt: skip
        self._thinking = widgets.Checkbox(description="Think first", value=session.choice.thinking, style=named)
        self._fields = {name: self._field(name, named) for name in _NUMBERS}
        self._connect()
        controls = [self._system, self._thinking, *self._fields.values()]
        # Not an Accordion: no key opens one, and a screen reader does not know that it opens.
        self._unfold = widgets.ToggleButton(description="Settings", icon="sliders", layout=widgets.Layout(width="auto"))
        self._folded = widgets.VBox(controls, layout=widgets.Layout(display="none"))
        self._unfold.observe(self._on_unfold, "value")
        super().__init__([self._unfold, self._folded])
        shown = [self._models, self._new, self._save] if len(session.models) > 1 else [self._new, self._save]
        self.top = widgets.HBox(shown, layout=widgets.Layout(flex_flow="row wrap"))
        named = {"model": self._models, "new": self._new, "save": self._save, "system": self._system,
                 "settings": self._unfold}  # fmt: skip
        for name, control in (named | {"thinking": self._thinking} | self._fields).items():
            control.add_class(f"gqk-chat-{name}")

    def _on_unfold(self, change: dict) -> None:
        self._folded.layout.display = "" if change["new"] else "none"

    def _field(self, name: str, style: dict) -> widgets.Text:
        title, _, hint = _NUMBERS[name]
        value, card = getattr(self._session.choice, name), getattr(self._session.model.sampling, name, None)
        hint = f"{card} (model card); {hint}" if card is not None else hint
        return widgets.Text(description=title, value="" if value is None else f"{value}", placeholder=hint, style=style,
                            continuous_update=False)  # fmt: skip

    def _connect(self) -> None:
        self._models.observe(lambda change: self._do(self._session.choose_model, change["new"]), "value")
        self._new.on_click(lambda button: self._do(self._session.clear))
        self._save.on_click(lambda button: self._do(self._keep))
        self._system.observe(lambda change: self._do(self._tell, change["new"]), "value")
        self._thinking.observe(lambda change: self._do(self._set, "thinking", change["new"]), "value")
        for name, field in self._fields.items():
            field.observe(lambda change, name=name: self._do(self._set_number, name, change["new"]), "value")

    def _do(self, act: Callable, *arguments) -> None:
        """Do something that may be refused, and show what came of it."""
        try:
            words = act(*arguments)
            self._changed()
            self._say(words)
        except KitError as err:
            self._say(err)

    def _tell(self, system: str) -> None:
        self._session.conversation.system = system

    def _set(self, name: str, value: object) -> None:
        self._session.choice = replace(self._session.choice, **{name: value})

    def _set_number(self, name: str, text: str) -> None:
        title, kind, _ = _NUMBERS[name]
        try:
            value = kind(text.replace(",", "")) if text.strip() else None
        except ValueError as err:
            raise BadSettingError(
                f"{title} cannot be {text!r:.50}.", f"It is {'a whole' if kind is int else 'a'} number, or empty.",
                "Write one, or leave it empty for the model card's value.",
            ) from err  # fmt: skip
        self._set(name, 512 if value is None and name == "max_new_tokens" else value)

    def _keep(self) -> str:
        """Write the conversation as three files and say where."""
        conversation, folder = self._session.conversation, Path("chats")
        if not conversation.turns:
            raise BadSettingError("There is nothing to save yet.", "A conversation has an answer.", "Ask something.")
        path = conversation.save(_free(folder))
        write = {".md": conversation.to_markdown(), ".jsonl": conversation.to_jsonl()}
        for ending, text in write.items():
            path.with_suffix(ending).write_text(text, encoding="utf-8", errors="surrogatepass")
        return f"Saved as {path}, and beside it as Markdown and JSONL."

    def draw(self, is_answering: bool) -> None:
        """Switch off what would disturb an answer."""
        self._models.disabled = self._new.disabled = is_answering
        cannot_think = self._session.cannot_think
        self._thinking.disabled = cannot_think
        self._thinking.description = "Think first (this model cannot)" if cannot_think else "Think first"


def _free(folder: Path) -> Path:
    """Return a name in a folder that no conversation has."""
    number = 1 + sum(1 for _ in folder.glob("chat-*.json"))
    while (folder / f"chat-{number}.json").exists():
        number += 1
    return folder / f"chat-{number}.json"
