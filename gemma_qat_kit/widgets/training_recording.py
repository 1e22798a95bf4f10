"""A training run as a file: what it did, and how 32 weights walked, to be shown where neither torch nor a model is."""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_qat_kit.chat.conversation_file import read_json, write_text
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.qat.run import Evaluation, Lines, Step, best_of
from gemma_qat_kit.widgets.training_picture import TEXT_LOSS
from gemma_qat_kit.widgets.training_walk import NUM_WEIGHTS, Group, Place

MOST_BYTES = 2**24  # of a file: the walk of 15,000 steps
MOST_STEPS = 1_000_000  # that a panel can be asked for
_KIND, _VERSION = "gemma_qat_kit recording", 1
_DIGITS = 9  # after the point: seven digits of a weight of 0.01
_LONGEST = 300  # characters of a text
_MOST_NATS = 700.0  # beyond it the perplexity is no float
_LARGEST = 1e6  # loss, divergence, weight, and levels between a weight and zero


@dataclass(frozen=True)
class Recording:
    """A finished or stopped run, for `TrainingReplay`.

    Attributes:
        name: The model.
        format: That it was trained for.
        loss: What the loss is, in words.
        num_steps: Steps that were asked for.
        lines: The model before quantization, and by the plain rule.
        steps: Every update.
        evaluations: Of the held-out text.
        held_out: The text whose end was held out.
        seconds: In all.
        memory_bytes: The most that the process held, measured; None where the machine did not say.
        group: The weights that were watched.
        places: Where they stood after each step.
        made: On which machine, and when.
    """

    name: str
    format: str
    loss: str
    num_steps: int
    lines: Lines
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    held_out: str
    seconds: float
    memory_bytes: int | None
    group: Group
    places: tuple[Place, ...]
    made: str

    def best(self, step: int = MOST_STEPS) -> Evaluation | None:
        """Return the evaluation whose model was kept, of those up to a step."""
        return best_of([each for each in self.evaluations if each.step <= step], is_text=self.loss == TEXT_LOSS)

    def share_recovered(self, step: int = MOST_STEPS) -> float | None:
        """Return the share of the lost log-perplexity that was won back up to a step."""
        best = self.best(step)
        return best and self.lines.share_recovered(best.nats)

    def save(self, path: str | Path) -> Path:
        """Write it to a file, numbers rounded to nine digits after the point, and return its path.

        Raises:
            BadSettingError: It cannot be written there.
        """
        rounded = json.loads(json.dumps(asdict(self)), parse_float=lambda text: round(float(text), _DIGITS))
        about = {"kind": _KIND, "version": _VERSION}
        return write_text(Path(path), json.dumps(about | rounded, ensure_ascii=False, separators=(",", ":")))

    @staticmethod
    def load(path: str | Path) -> "Recording":
        """Read one that `save` wrote.

        Raises:
            BadSettingError: There is no file, or one of another kind or version, or a value in it cannot be drawn.
        """
        kept = read_json(Path(path), _KIND, _VERSION, MOST_BYTES)
        try:
            return _recording(kept)
        except ValueError as err:
            raise BadSettingError(
                f"{path} is no recording that can be read: {err}.",
                "TrainingPanel.record writes such files.",
                "Mend that place, or record it again.",
            ) from err


def _recording(kept: dict) -> Recording:
    """Build the recording, checking whatever a hand may have changed."""
    num_steps = _whole(kept, "num_steps", 1, MOST_STEPS)
    held, lines = kept.get("memory_bytes"), _part(kept, "lines")
    group = _group(_part(kept, "group"))
    steps, evaluations, places = (_rising(kept, name, num_steps) for name in ("steps", "evaluations", "places"))
    return Recording(
        **{name: _text(kept, name) for name in ("name", "format", "loss", "held_out", "made")},
        num_steps=num_steps,
        lines=Lines(_number(lines, "float_nats", 0, _MOST_NATS), _evaluation(_part(lines, "plain"))),
        steps=tuple(Step(_whole(each, "step", 1, num_steps), _number(each, "loss", 0, _LARGEST),
                         _number(each, "seconds", 0, 1e9)) for each in steps),
        evaluations=tuple(map(_evaluation, evaluations)),
        seconds=_number(kept, "seconds", 0, 1e9),
        memory_bytes=None if held is None else _whole(kept, "memory_bytes", 0, 2**60),
        group=group,
        places=tuple(_place(each, group) for each in places),
    )  # fmt: skip


def _evaluation(kept: dict) -> Evaluation:
    step, nats = _whole(kept, "step", 0, MOST_STEPS), _number(kept, "nats", 0, _MOST_NATS)
    return Evaluation(step, nats, _number(kept, "kl_divergence", -1, _LARGEST))  # rounding may leave it below zero


def _group(kept: dict) -> Group:
    low, high = _whole(kept, "low", -128, -1), _whole(kept, "high", 0, 127)
    if not isinstance(kept.get("is_half"), bool):
        raise ValueError("is_half must be true or false")
    row, column = (_whole(kept, name, 0, 2**40) for name in ("row", "column"))
    return Group(_text(kept, "name"), low, high, kept["is_half"], row, column)


def _place(kept: dict, group: Group) -> Place:
    values, codes = kept.get("values"), kept.get("codes")
    if not (isinstance(values, list) and isinstance(codes, list) and len(values) == len(codes) == NUM_WEIGHTS):
        raise ValueError(f"a place must have {NUM_WEIGHTS} values and as many codes")
    place = Place(
        _whole(kept, "step", 0, MOST_STEPS),
        tuple(_number({"value": value}, "value", -_LARGEST, _LARGEST) for value in values),
        _number(kept, "scale", -_LARGEST, _LARGEST),
        tuple(_whole({"code": code}, "code", group.low, group.high) for code in codes),
    )
    if max(map(abs, place.heights)) > _LARGEST:
        raise ValueError(f"a weight lies {_LARGEST:,.0f} levels away and more")
    return place


def _rising(kept: dict, name: str, num_steps: int) -> list[dict]:
    """Return a list of parts whose steps rise."""
    parts = kept.get(name)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{name} must be a list of groups of values, with one at least")
    steps = [_whole(part, "step", 0, num_steps) for part in parts]
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"the steps of {name} do not rise")
    return parts


def _part(kept: dict, name: str) -> dict:
    if not isinstance(kept.get(name), dict):
        raise ValueError(f"{name} must be a group of values")
    return kept[name]


def _number(kept: dict, name: str, low: float, high: float) -> float:
    value = kept.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # a NaN neither
        raise ValueError(f"{name} is {value!r:.20}, not a number from {low:g} to {high:g}")
    return round(float(value), _DIGITS)


def _whole(kept: dict, name: str, low: int, high: int) -> int:
    if not isinstance(kept.get(name), int):
        raise ValueError(f"{name} is {kept.get(name)!r:.20}, not an integer")
    _number(kept, name, low, high)
    return kept[name]


def _text(kept: dict, name: str) -> str:
    value = kept.get(name)
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise ValueError(f"{name} must be a text of {_LONGEST} characters at most")
    return value
