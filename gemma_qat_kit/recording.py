"""Receipts of loads and answers: what they take is measured while they run, and kept beside the plan.

Nothing here may disturb a run: whatever fails is one warning. With `GQK_RECEIPTS=off` nothing is measured either.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from gemma_qat_kit.catalog import SIZES, find_checkpoint
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.memory.measure import MemoryOverTime, measure_memory
from gemma_qat_kit.memory.measure_samples import PLACES_IN_MEMORY
from gemma_qat_kit.memory.parts import (
    ACTIVATIONS,
    GRADIENTS,
    KEY_VALUES,
    LOGITS,
    OPTIMIZER,
    TEACHER,
    Part,
    Parts,
    merged,
)
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for
from gemma_qat_kit.memory.receipts import record
from gemma_qat_kit.memory.receipts_file import receipts_path, warn_once
from gemma_qat_kit.memory.settings import MemorySettings

# What a model was loaded with, of that which it does not say itself.
_ASKED = ("text_only", "drafter", "per_layer_table", "kv_format", "batch_size")
_asked: "weakref.WeakKeyDictionary[object, dict]" = weakref.WeakKeyDictionary()


@contextmanager
def load_receipt(request: object = None) -> Iterator[Callable[[object], object]]:
    """Measure a load, and keep its receipt once the block has called what it gets with the model, which comes back.

    Args:
        request: Has the arguments of `load` as attributes; None where nothing special was asked for.
    """
    models = []

    def loaded(model):
        models.append(model)
        _asked[model] = {name: getattr(request, name) for name in _ASKED if hasattr(request, name)}
        return model

    with _measured() as use:
        yield loaded
    if use is not None and models:
        with _quietly():
            _record_load(models[0], use)


@contextmanager
def chat_receipt(model, stream) -> Iterator[None]:
    """Measure while an answer is generated, and keep its receipt when it has ended by itself or was cancelled.

    Args:
        model: The `Model` that answers.
        stream: The answer's `Stream`; its `reply` is read at the end.
    """
    with _measured(model.engine != "endpoint") as use:
        yield
    if use is not None:
        with _quietly():
            _record_chat(model, stream.reply, use)


@contextmanager
def train_receipt(model, settings: MemorySettings | None, optimizer_bytes: Callable[[], int]) -> Iterator[None]:
    """Measure a training run, and keep its receipt when it has ended, also when it was stopped.

    Args:
        model: The `Model` that is trained.
        settings: Of the run; None keeps no receipt.
        optimizer_bytes: Returns the bytes of the optimizer's state, called at the end of the block.
    """
    with _measured(settings is not None) as use:
        yield
        state_bytes = optimizer_bytes()
    if use is not None:
        with _quietly():
            held, place = model.memory(), settings.place
            known = [*held.placed, Part(OPTIMIZER, state_bytes, place)]
            rest = max(0, use.peak.in_place(place) - Parts(tuple(known)).in_place(place))
            measured = Parts(merged([*known, Part(ACTIVATIONS, rest, place)]))
            record("train", settings, _as_training(_plan(settings)), measured, seconds=round(use.after.seconds, 3))


def _as_training(plan: Parts) -> Parts:
    """Count what comes and goes, and what a teacher keeps, as activations: only their sum is measured."""
    freed = (GRADIENTS, LOGITS, TEACHER)
    return Parts(merged(replace(part, name=ACTIVATIONS) if part.name in freed else part for part in plan.placed))


@contextmanager
def _measured(is_here: bool = True) -> Iterator[MemoryOverTime | None]:
    """Measure a block, unless receipts are off or it runs on another machine."""
    use = None
    with _quietly():
        if is_here and receipts_path() is not None:
            use = measure_memory()
            use.start()
    try:
        yield use
    finally:
        if use is not None:
            with _quietly():
                use.stop()


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except Exception as err:
        with suppress(Warning):  # where warnings are errors
            warn_once(f"This run's memory receipt could not be kept: {err}.")


def _record_load(model, use: MemoryOverTime) -> None:
    """Compare what a loaded model holds with what its plan says of that moment."""
    if model.engine == "endpoint":
        return
    settings, held = settings_of(model), model.memory()
    plan = _plan(settings) if settings else None
    peak = {"measured_peak_bytes": _at_peak(held, use).total_bytes}
    if plan is not None:
        peak["predicted_peak_bytes"] = plan.load_peak_bytes
    record("load", settings or _known(model), plan and plan.loaded, held, seconds=round(use.after.seconds, 3), **peak)


def _record_chat(model, reply, use: MemoryOverTime) -> None:
    """Compare the most that was held while a model answered with the plan; transformers' cache grows with the text."""
    num_tokens = (reply.prompt_tokens or 0) + reply.new_tokens
    length = num_tokens if model.engine == "transformers" and reply.prompt_tokens else model.context_length
    settings = settings_of(model, length)
    predicted, measured = settings and _plan(settings), _at_peak(model.memory(), use)
    if predicted and model.engine == "transformers":
        predicted = _with_work_in_one(predicted)
    record("chat", settings or _known(model, length), predicted, measured,
           seconds=round(reply.seconds, 3), tokens=num_tokens)  # fmt: skip


def _with_work_in_one(plan: Parts) -> Parts:
    """Count cache and logits as activations: transformers frees all three together, so only their sum is measured."""
    freed = (KEY_VALUES, LOGITS)
    return Parts(merged(replace(part, name=ACTIVATIONS) if part.name in freed else part for part in plan.placed))


def _at_peak(held: Parts, use: MemoryOverTime) -> Parts:
    """Add to what is held now how much more there was at the peak: it was freed since, so it was work, not weights."""
    more = {place: use.peak.in_place(place) - use.after.in_place(place) for place in PLACES_IN_MEMORY}
    more["gpu"] = use.peak.gpu - held.in_place("gpu")  # torch's allocator still holds what its tensors freed
    work = (Part(ACTIVATIONS, nbytes, place) for place, nbytes in more.items() if nbytes > 0)
    return Parts(merged((*held.placed, *work)))


def settings_of(model, context_length: int | None = None) -> MemorySettings | None:
    """Return what the plan of a loaded `Model` is made for, None of one that is not in the catalog.

    Args:
        model: A model of `gqk.load`.
        context_length: Tokens to plan for; None takes the model's.
    """
    if model.size not in SIZES:
        return None
    try:
        find_checkpoint(model.size, model.format)
        return MemorySettings(**_known(model, context_length))
    except KitError:  # a format that somebody made, such as the built-in model in q4_0
        return None


def _known(model, context_length: int | None = None) -> dict[str, object]:
    device = getattr(getattr(model.runner, "device", None), "type", "cpu")
    return {"size": model.size, "format": model.format, "engine": model.engine, "device": device,
            "context_length": context_length or model.context_length, **_asked.get(model, {})}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _plan(settings: MemorySettings) -> MemoryPlan:
    """Return a plan; a conversation asks for the same one again and again."""
    return plan_for(settings)
