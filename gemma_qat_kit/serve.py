"""`serve`: one model for a class, through llama.cpp's own server, which answers several chats at once."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.engines.request import Request
from gemma_qat_kit.engines.server_queue import Queue
from gemma_qat_kit.engines.serving import Serving, draw_key
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.load import load_request
from gemma_qat_kit.machine import read_place
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Report

_FOR_ONE = 'Only this machine reaches it. host="0.0.0.0" lets its whole network in.'
_FOR_MANY = "Every machine that reaches this address can use it with the key. Nothing is encrypted on its way."


@dataclass(frozen=True, repr=False)
class Served:
    """A model that others can talk to as long as this object is kept; as text, what to tell them.

    Use it in a `with` block or call `close` when done; it also ends with this process.

    Attributes:
        model: The same model, to talk to from here.
        serving: Whom it answers.
    """

    model: Model
    serving: Serving

    @property
    def address(self) -> str:
        """What others load, "http://host:port/v1"."""
        return self.serving.url_for_others(self.model.runner.address)

    @property
    def key(self) -> str:
        """What they pass as token."""
        return self.serving.key

    def queue(self) -> Queue | None:
        """Return how many answers are computed and how many wait, None of a server that has ended."""
        return None if self.model.is_closed else self.model.queue()

    def close(self) -> None:
        """End the server and free its memory; whoever waits for an answer is told that the connection was lost."""
        self.model.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        start, call, *notes = self._lines()
        return "\n".join([start, *([f"    {call}"] if call else []), *notes])

    def _repr_html_(self) -> str:
        start, call, *notes = map(html.escape, self._lines())
        line = f"<pre><code>{call}</code></pre>" if call else ""
        quiet = "".join(f'<div class="gqk-dim">{note}</div>' for note in notes)
        return f'{PANEL_STYLE}<div class="gqk-panel"><div>{start}</div>{line}{quiet}</div>'

    def _lines(self) -> list[str]:
        """Return what it is, the call for others ("" once it has ended), and what to mind."""
        name, runner = self.model.name, self.model.runner
        if runner.is_closed:
            return [f"{name} is served no more.", ""]
        if not runner.is_running:
            return [f"{name} is served no more: llama.cpp has stopped. Call serve again.", ""]
        length = self.model.context_length
        start = f"{name} answers {self.serving.num_chats} at once, {length} tokens each; more wait. To load it:"
        call = f"gqk.load({json.dumps(self.address)}, token={json.dumps(self.key)})"
        return [start, call, *self._notes()]

    def _notes(self) -> list[str]:
        notes = [_FOR_ONE if self.serving.is_loopback else _FOR_MANY]
        if read_place() == "colab":
            notes.append("A free Colab runtime may not serve others through a tunnel: its terms forbid it.")
        return notes


def serve(
    source: str | Path,
    format: str | None = None,
    *,
    num_chats: int = 8,
    context_length: int = 4096,
    kv_format: str = "bf16",
    adapter: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    report: Report | None = None,
) -> Served:
    """Load a model for a class: everybody who has the key talks to it with `gqk.load("http://…/v1", token="…")`.

    llama.cpp answers `num_chats` at once, token by token in turns, and the next ones in the order in which they came.

    Args:
        source: A size of the catalog ("E2B"), a .gguf file or a repo id, as in `load`.
        format: A format that runs in llama.cpp. None takes q4_0 of a size.
        num_chats: Answers at once, 256 at most. Each has its own key/value cache, so they are what takes memory, and
            32 MiB for conversations whose place another one took, so that they go on without being read again.
        context_length: Tokens of prompt and answer together, of each chat.
        kv_format: Of the key/value cache: "bf16" or "q8_0", which takes half of it.
        adapter: A .gguf file that `export_adapter` wrote.
        host: The address of this machine to listen at: "127.0.0.1" for itself, "0.0.0.0" for its network.
        port: 0 takes a free one.
        key: What every request must carry, 8 characters or more; None draws one.
        revision: Commit, tag or branch of the repository.
        token: Hub token. Never printed.
        report: Called with the progress; None draws a bar.

    Returns:
        The served model; its text is the line to give to the class.

    Raises:
        BadSettingError: A port that is taken, a host of another machine, a key that is no good, a format or setting
            that llama.cpp does not have, or an address as source.
        NotEnoughMemoryError: So many chats do not fit; the message says how many do.
        KitError: What else `load` raises.
    """
    if str(source).startswith(("http://", "https://")):
        raise BadSettingError(
            f"{source!r:.200} is a server already.",
            "serve starts one from a checkpoint.",
            "Give its address and key to the others, who pass them to gqk.load.",
        )
    serving = Serving(num_chats, host, port, draw_key() if key is None else key)
    serving.check_address()
    request = Request(
        str(source), format and format.lower(), text_only=True, context_length=context_length, drafter=False,
        device="auto", per_layer_table="disk", kv_format=kv_format, engine=None,
        adapter=adapter and Path(adapter).expanduser(), revision=revision, token=token, report=report, serving=serving,
    )  # fmt: skip
    return Served(load_request(request), serving)
