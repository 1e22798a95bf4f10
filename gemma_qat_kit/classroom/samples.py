"""Thirty files as a class hands them in, for the teacher's notebook: real runs of the built-in model on this machine.

The names are made up, and so is who makes which slip. Every receipt and every training run is measured here, each with
settings of its own.
"""

import copy
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.classroom import hand_in, tries
from gemma_qat_kit.classroom.check import judged
from gemma_qat_kit.classroom.exercises import find_problem
from gemma_qat_kit.classroom.hand_in import HandIn
from gemma_qat_kit.load import load
from gemma_qat_kit.memory.parts import KEY_VALUES
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.receipts import receipts
from gemma_qat_kit.progress import Progress

_QAT_FORMATS = ("q4_0", "int3_g32", "int2_g32")  # of the students who train
_ONE_LAYER = {r"layers\.(?!29\.)\d+\.": None}  # the last of the model's 30: seconds, not minutes

# What a student computes from the numbers in a question, as they come: right, and with the usual slip.
_WAYS: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "01.1": (lambda rows, columns, *_: rows * columns * 18 / 32, lambda rows, columns, *_: rows * columns / 2),
    "02.3": (lambda _, __, tokens, *___: _cache(tokens), lambda _, __, tokens, *___: _cache(tokens) / 2),
    "04.1": (lambda wide, tall, rank: rank * (wide + tall), lambda wide, _, rank: rank * wide),
    "05.2": (lambda pace, thoughts, _: thoughts / pace, lambda pace, thoughts, answer: (thoughts + answer) / pace),
}


def sample_class(num_students: int = 30, num_runs: int = 2) -> Path:
    """Write the files of a class that never was into a new folder, and return it.

    Args:
        num_students: How many; each loads the built-in model with settings of its own, asks it something, and solves
            some exercises, all of which takes a second or two.
        num_runs: How many of them train a layer for a few steps, some ten seconds each on an idle machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="class_"))
    runs = _runs(num_runs)
    for i in range(num_students):
        _write(folder / f"student_{i + 1:02}.json", f"Student {i + 1:02}", random.Random(i), runs[i : i + 1])
    return folder


def _write(path: Path, name: str, draw: random.Random, runs: Sequence) -> HandIn:
    with _own_receipts():
        settings = {"context_length": draw.randrange(256, 4097, 64), "kv_format": draw.choice(("bf16", "q8_0"))}
        with load(BUILT_IN_SIZE, report=_quiet, **settings) as model:
            model.chat("What is gravity?", max_new_tokens=draw.randrange(2, 9), seed=draw.randrange(99))
        tried = [t for number in _WAYS for t in _tried(number, name, draw)]
        tried += [_try("03.3", name, run) for run in runs]
        return hand_in.write(path, name, tuple(tried), receipts())


def _tried(number: str, name: str, draw: random.Random) -> Iterator[tries.Try]:
    """Yield what a student tries: not everything, and not always right at once."""
    question = find_problem(number, name).question
    numbers = [float(digits.replace(",", "")) for digits in re.findall(r"\d[\d,]*", question)]
    right, slip = _WAYS[number]
    course = draw.choice(((right,), (slip, right), (slip,), ()))
    for way in course:
        yield _try(number, name, way(*numbers))


def _try(number: str, name: str, answer: object) -> tries.Try:
    verdict = judged(find_problem(number, name), answer)
    return tries.Try(tries.now(), number, name, tries.kept(answer), verdict.is_right)


def _cache(tokens: float) -> float:
    return plan_memory("12B", "bf16", context_length=int(tokens)).parts[KEY_VALUES] / 2**20


def _runs(num_runs: int) -> list:
    """Train a layer of the built-in model in one format after the other, a step more each time."""
    if not num_runs:
        return []
    from gemma_qat_kit.qat.prepare import prepare_qat
    from gemma_qat_kit.qat.settings import TrainSettings
    from gemma_qat_kit.qat.train import train_qat
    from gemma_qat_kit.quality import texts

    text, found = texts.read("calibration").content[:2000], []
    with load(BUILT_IN_SIZE, "float32", report=_quiet) as model:
        for i in range(num_runs):
            pair = (copy.deepcopy(model.hf[0]), model.hf[1])
            format = _QAT_FORMATS[i % len(_QAT_FORMATS)]
            prepare_qat(pair, format, overrides=_ONE_LAYER, calibration=text[:400], report=_quiet)
            settings = TrainSettings(2 + i, batch_size=1, sequence_length=16, learning_rate=0.01, num_evaluations=1)
            found.append(train_qat(pair, text, settings=settings, report=_quiet))
    return found


@contextmanager
def _own_receipts() -> Iterator[None]:
    """Keep the receipts of one student apart from this machine's own."""
    before = os.environ.get("GQK_RECEIPTS")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GQK_RECEIPTS"] = str(Path(folder) / "receipts.jsonl")
        try:
            yield
        finally:
            os.environ.pop("GQK_RECEIPTS")
            if before is not None:
                os.environ["GQK_RECEIPTS"] = before


def _quiet(progress: Progress) -> None:
    """Show nothing."""
