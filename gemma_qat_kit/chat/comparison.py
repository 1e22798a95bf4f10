"""One prompt, several models: what each said, token by token, how fast, and where it left the reference."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher
from pathlib import Path

from gemma_qat_kit.chat.conversation_file import read_json, write_text
from gemma_qat_kit.chat.models import held_bytes, named_models
from gemma_qat_kit.errors import BadSettingError, KitError
from gemma_qat_kit.machine import where_and_when
from gemma_qat_kit.messages import Message

MOST_MODELS = 4
_MOST_SECONDS = 1_000_000  # that an answer takes: a replay waits as long
_KIND, _VERSION = "gemma_qat_kit comparison", 1


@dataclass(frozen=True)
class Pane:
    """The answer of one model, as far as it has come.

    Attributes:
        name: Of the model.
        format: As in the catalog; its colour.
        pieces: The answer in the pieces in which it came, a token each in most engines; thoughts are among them.
        times: Seconds from the question to each piece.
        tokens_per_second: Measured, after the first token; 0 while it is not known.
        memory_bytes: What the model holds, measured; None where nobody here can tell.
        ended: "stop", "length", "cancelled", "unfinished" while it comes, or what went wrong.
    """

    name: str
    format: str = ""
    pieces: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    tokens_per_second: float = 0.0
    memory_bytes: int | None = None
    ended: str = "unfinished"

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)

    def until(self, seconds: float) -> "Pane":
        """Return what had come so many seconds after the question, for a replay."""
        count = sum(moment <= seconds for moment in self.times)
        if count == len(self.pieces):
            return self
        return replace(self, pieces=self.pieces[:count], times=self.times[:count], ended="unfinished")


@dataclass(frozen=True)
class Agreement:
    """How far an answer goes with the reference's.

    Attributes:
        differs: For each piece whether the reference does not have it in this place.
        num_same: Pieces that both have, in the same order.
        num_alike: Pieces at the beginning that are the same.
    """

    differs: tuple[bool, ...]
    num_same: int
    num_alike: int

    @property
    def share(self) -> float:
        """Share of the answer's pieces that the reference has, too; 0 of an empty answer."""
        return self.num_same / len(self.differs) if self.differs else 0.0


@dataclass(frozen=True)
class Comparison:
    """One prompt and the answers of several models, the first of which is the reference.

    Attributes:
        prompt: The question.
        system: Instructions before it.
        settings: Those of `Model.stream`.
        panes: The answers.
        made: On which machine, and when.
    """

    prompt: str
    system: str = ""
    settings: dict = field(default_factory=dict)
    panes: tuple[Pane, ...] = ()
    made: str = ""

    def agreement(self, index: int) -> Agreement:
        """Return how far an answer goes with the first one; while that still comes, with what there is of it."""
        ours, reference = self.panes[index].pieces, self.panes[0].pieces
        blocks = SequenceMatcher(None, reference, ours, autojunk=False).get_matching_blocks()
        same = {block.b + i for block in blocks for i in range(block.size)}
        alike = next((i for i, pair in enumerate(zip(reference, ours, strict=False)) if pair[0] != pair[1]),
                     min(len(reference), len(ours)))  # fmt: skip
        return Agreement(tuple(i not in same for i in range(len(ours))), len(same), alike)

    def __str__(self) -> str:
        lines = [f"> {self.prompt}"]
        for index, pane in enumerate(self.panes):
            share = f", {100 * self.agreement(index).share:.0f} % as in {self.panes[0].name}" if index else ""
            lines.append(f"\n{pane.name} ({pane.tokens_per_second:.3g} tokens/s{share})\n{pane.text}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write it to a file, so that it can be shown where the models are not, and return its path.

        Raises:
            BadSettingError: It cannot be written there.
        """
        about = {"kind": _KIND, "version": _VERSION}
        return write_text(Path(path), json.dumps(about | asdict(self), ensure_ascii=False))

    @staticmethod
    def load(path: str | Path) -> "Comparison":
        """Read one that `save` wrote.

        Raises:
            BadSettingError: There is no file, or one of another kind or version, or it was damaged.
        """
        kept = read_json(Path(path), _KIND, _VERSION)
        try:
            panes = tuple(_pane(pane) for pane in kept["panes"])
            texts = [kept["prompt"], kept["system"], kept.get("made", "")]
            if not (all(isinstance(text, str) for text in texts) and isinstance(kept["settings"], dict) and panes):
                raise TypeError("texts, settings or panes are of another type")
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise BadSettingError(
                f"{path} is no comparison that can be read: {err}.",
                "Comparison.save writes such files.",
                "Record it again.",
            ) from err
        prompt, system, made = texts
        return Comparison(prompt, system, kept["settings"], panes[:MOST_MODELS], made)


def _pane(kept: dict) -> Pane:
    """Build a pane of what a file holds."""
    pane = Pane(**{name.name: kept[name.name] for name in fields(Pane)})
    pane = replace(pane, pieces=tuple(map(str, pane.pieces)), times=tuple(map(float, pane.times)))
    if len(pane.pieces) != len(pane.times) or not all(isinstance(t, str) for t in (pane.name, pane.format, pane.ended)):
        raise ValueError("a pane has not as many times as pieces")
    if not all(0 <= moment < _MOST_SECONDS for moment in pane.times):
        raise ValueError(f"a time is not from 0 to {_MOST_SECONDS:,} seconds")
    memory = None if pane.memory_bytes is None else int(pane.memory_bytes)
    return replace(pane, tokens_per_second=float(pane.tokens_per_second), memory_bytes=memory)


def check_number_of_models(named: dict[str, object]) -> dict[str, object]:
    """Return models by name as they are.

    Raises:
        BadSettingError: Fewer than two or more than four.
    """
    if not 2 <= len(named) <= MOST_MODELS:
        raise BadSettingError(
            f"{len(named)} models cannot be compared.", f"Two to {MOST_MODELS} stand side by side.", "Pass so many."
        )
    return named


def compare_answers(
    models,
    prompt: str,
    *,
    system: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    watch: Callable[[Comparison, object], None] | None = None,
) -> Comparison:
    """Ask several models the same, one after the other, so that each has the machine to itself.

    Args:
        models: A list of `Model`, or a dict of them by name; the first is the reference.
        prompt: The question.
        system: Instructions before it.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the likeliest token, so that a difference is the model's.
        seed: Of the sampling where the temperature is not 0.
        watch: Called with the comparison so far and the answer's `Stream` (for its `cancel`) at every piece, and with
            None for it after the last.

    Raises:
        BadSettingError: Too few models, an empty prompt or a wrong setting.
    """
    named = check_number_of_models(named_models(models))
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    panes = tuple(Pane(name, model.format) for name, model in named.items())
    found = Comparison(prompt, system, settings, panes, where_and_when())
    messages = [{"role": "system", "content": system}] if system.strip() else []
    messages.append({"role": "user", "content": prompt})
    for index, model in enumerate(named.values()):
        found = _answered(found, index, model, messages, watch)
    return found


def _answered(found: Comparison, index: int, model, messages: list[Message], watch) -> Comparison:
    """Return the comparison with the answer of one more model; an error of that model is its answer."""
    pieces, times, started = [], [], time.perf_counter()

    def so_far(**more) -> Comparison:
        pane = replace(found.panes[index], pieces=tuple(pieces), times=tuple(times), **more)
        return replace(found, panes=(*found.panes[:index], pane, *found.panes[index + 1 :]))

    try:
        stream = model.stream(messages, **found.settings)
        if watch:
            watch(so_far(), stream)
        for piece in stream:
            pieces.append(str(piece))
            times.append(round(time.perf_counter() - started, 4))
            if watch:
                watch(so_far(), stream)
    except KitError as err:
        found = so_far(ended=err.wrong)
        if watch:
            watch(found, None)
        return found
    reply = stream.reply
    found = so_far(tokens_per_second=reply.tokens_per_second, memory_bytes=held_bytes(model), ended=reply.finish_reason)
    if watch:
        watch(found, None)
    return found
