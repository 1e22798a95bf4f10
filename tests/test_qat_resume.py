"""Checkpoints: a killed run goes on exactly where it was, a full disk costs nothing, and another run is told apart."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_network import TEXT, logits, make_pair
from small_training import ready, surprise, train, values, weights

from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, NotEnoughDiskError
from gemma_qat_kit.qat import state
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.run import Step

NAME = "qat_checkpoint.safetensors"
RUN = {"num_steps": 8, "num_evaluations": 4, "checkpoint_every": 2}
KILLED = """
import sys, time
from small_training import ready, train
def watch(event):
    if getattr(event, "loss", None) is not None:
        print(event.step, flush=True)
        if event.step == 5:
            time.sleep(600)
train(ready(), folder=sys.argv[1], num_steps=8, num_evaluations=4, checkpoint_every=2, watch=watch)
"""


class KilledError(Exception):
    """Ends a run as no user does."""


def at(step, error=KilledError):
    def watch(event):
        if isinstance(event, Step) and event.step == step:
            raise error

    return watch


def assert_same(run, other):
    """Compare everything but times."""
    assert [(s.step, s.loss) for s in run.steps] == [(s.step, s.loss) for s in other.steps]
    assert run.evaluations == other.evaluations
    assert run.best == other.best
    assert run.lines == other.lines


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as child:
        assert [next(child.stdout).strip() for _ in range(5)] == list("12345")
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    whole, resumed = ready(), ready()
    expected, seen = train(whole, **RUN), []
    run = train(resumed, folder=tmp_path, watch=seen.append, **RUN)
    made, told = [event for event in seen if isinstance(event, Step)], seen[1:]
    assert made == list(run.steps), "the four that the killed run made, and four more"
    assert told.index(run.evaluations[1]) == told.index(run.steps[1]) + 1, "told in the order of their happening"
    assert_same(run, expected)
    assert all(torch.equal(value, values(whole)[name]) for name, value in values(resumed).items())
    assert torch.equal(logits(resumed[0]), logits(whole[0]))


KINDS = {
    "mobile": ({"format": "mobile", "calibration": TEXT[:400]}, {}),
    "embeddings": ({"embeddings": True}, {}),
    "fixed scales": ({"learn_scales": False}, {}),
    "a cache": ({}, {"teacher": "cache"}),
    "the text": ({}, {"teacher": None}),
    "hidden states": ({}, {"hidden_weight": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_bit_for_bit(tmp_path, kind):
    prepared, trained = KINDS[kind]
    whole, killed, resumed = (ready(**prepared) for _ in range(3))
    expected = train(whole, **RUN, **trained)
    with pytest.raises(KilledError):
        train(killed, folder=tmp_path, watch=at(5), **RUN, **trained)
    assert_same(train(resumed, folder=tmp_path, **RUN, **trained), expected)
    assert all(torch.equal(value, values(whole)[name]) for name, value in values(resumed).items())


def test_a_scaler_of_float16_losses_goes_on_where_it_was(tmp_path, monkeypatch):
    # One that grows at once soon overflows, and skips updates that one at its beginning would make.
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=1, growth_factor=256.0))
    whole, killed, resumed = ready(), ready(), ready()
    expected = train(whole, dtype="float16", **RUN)
    with pytest.raises(KilledError):
        train(killed, folder=tmp_path, dtype="float16", watch=at(5), **RUN)
    assert_same(train(resumed, folder=tmp_path, dtype="float16", **RUN), expected)


@pytest.mark.parametrize("learn_scales", [True, False])
def test_a_run_that_began_from_the_plain_rule_goes_on_from_there(tmp_path, learn_scales):
    def worse():
        pair = ready("q4_0", learn_scales=learn_scales)
        with torch.no_grad():
            for _, quantizer in masters(pair[0]).values():
                quantizer.scale.mul_(3)
        return pair

    whole, killed, resumed = worse(), worse(), worse()
    expected = train(whole, **RUN)
    with pytest.raises(KilledError):
        train(killed, folder=tmp_path, watch=at(5), **RUN)
    assert_same(train(resumed, folder=tmp_path, **RUN), expected)
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(resumed).items())


def test_a_run_that_somebody_stopped_goes_on_too(tmp_path):
    stopped = train(ready(), folder=str(tmp_path), watch=at(3, KeyboardInterrupt), **RUN)
    assert len(stopped.steps) == 3
    run = train(ready(), folder=str(tmp_path), **RUN)
    assert [step.step for step in run.steps] == list(range(1, 9))
    assert run.seconds > sum(step.seconds for step in stopped.steps[:2])


def test_a_finished_run_is_only_read_again(tmp_path):
    first, second = ready(), ready()
    expected = train(first, folder=tmp_path / "new" / "folder", **RUN)
    seen = []
    assert_same(train(second, folder=tmp_path / "new" / "folder", watch=seen.append, **RUN), expected)
    assert [event.seconds for event in seen if isinstance(event, Step)] == [step.seconds for step in expected.steps]
    assert torch.equal(logits(second[0]), logits(first[0]))


def test_a_folder_holds_one_file_and_what_a_killed_save_left_is_written_over(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"half")
    train(ready(), folder=tmp_path, **RUN)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_how_often_checkpoints_are_made_may_change(tmp_path):
    with pytest.raises(KilledError):
        train(ready(), folder=tmp_path, watch=at(5), **RUN)
    assert len(train(ready(), folder=tmp_path, **RUN | {"checkpoint_every": 3}).steps) == 8


def full(times):
    """Return a `save_file` that works so many times and then finds a full disk."""
    calls = []

    def save(tensors, path, metadata):
        calls.append(path)
        if len(calls) > times:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    return save


@contextlib.contextmanager
def file_size_limit(nbytes):
    """Let no file of this process grow beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_costs_neither_the_earlier_checkpoint_nor_the_best_point(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "save_file", full(times=1))
    pair = ready()
    with pytest.raises(
        NotEnoughDiskError, match=r"the disk is full\. .*14 bytes a weight, twice\. .*still whole"
    ) as caught:
        train(pair, folder=tmp_path, **RUN)
    assert isinstance(caught.value, OSError)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    monkeypatch.undo()
    whole, resumed = ready(), ready()
    expected = train(whole, **RUN)
    best = min(expected.evaluations[:3], key=lambda evaluation: evaluation.kl_divergence)
    assert surprise(pair) == pytest.approx(best.nats, rel=1e-5)
    assert_same(train(resumed, folder=tmp_path, **RUN), expected)


def test_a_file_that_the_system_does_not_take_leaves_nothing_behind(tmp_path):
    with file_size_limit(100_000), pytest.raises(NotEnoughDiskError, match="A checkpoint cannot be written to"):
        train(ready(), folder=tmp_path, **RUN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_one", [False, True])
def test_too_little_room_is_refused_before_anything_is_trained(tmp_path, monkeypatch, has_one):
    if has_one:
        train(ready(), folder=tmp_path, **RUN)
    pair = ready()
    num_values = sum(value.numel() for value in values(pair).values())
    for free, is_enough in ((14 * num_values * (2 - has_one), True), (14 * num_values * (2 - has_one) - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        before, seen = logits(pair[0]), []
        if is_enough:
            train(ready(), folder=tmp_path, **RUN)
        else:
            with pytest.raises(NotEnoughDiskError, match=r"free, .* needed"):
                train(pair, folder=tmp_path, watch=seen.append, **RUN)
            assert not seen
            assert torch.equal(logits(pair[0]), before)
        if not has_one:
            (tmp_path / NAME).unlink(missing_ok=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotEnoughDiskError, match="cannot be written"):
        train(ready(), folder=tmp_path / "file" / "folder", **RUN)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The checkpoint of a run that was killed."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.raises(KilledError):
        train(ready(), folder=folder, watch=at(5), **RUN)
    return folder / NAME


@pytest.fixture
def copied(left, tmp_path):
    """A copy of it, and its folder."""
    return Path(shutil.copy(left, tmp_path)), tmp_path


OTHERS = {"weights": {"seed": 1}, "grid": {"format": "int3_g32"}, "scales": {"learn_scales": False},
          "embeddings": {"embeddings": True}, "exception": {"overrides": {"up_proj": None}}}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(copied, other):
    pair = ready(**OTHERS[other])
    before = logits(pair[0])
    with pytest.raises(
        BadSettingError, match=r"another model, or of one that was prepared otherwise\. .*another folder"
    ):
        train(pair, folder=copied[1], **RUN)
    assert torch.equal(logits(pair[0]), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_steps": 9}, "num_steps=8"), ({"learning_rate": 0.01, "seed": 3}, r"seed=0, learning_rate=0\.05"),
     ({"text": TEXT[:4000]}, "another text"), ({"teacher": "cache"}, "teacher='memory'"),
     ({"teacher": "another model"}, "teacher='memory'")],
    ids=["steps", "rate and seed", "text", "teacher", "model"],
)  # fmt: skip
def test_a_checkpoint_with_other_settings_is_refused_and_says_which(copied, changes, said):
    if changes.get("teacher") == "another model":
        changes = {"teacher": make_pair()}
    with pytest.raises(BadSettingError, match=rf"made with other settings: {said}\. .*name another folder"):
        train(ready(), folder=copied[1], **RUN | changes)


def rewritten(path, change, metadata):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_text("hello " * 100),
    "no facts": lambda path: rewritten(path, lambda tensors: None, None),
    "wrong facts": lambda path: rewritten(path, lambda tensors: None, {"qat": "{}"}),
    "no JSON": lambda path: rewritten(path, lambda tensors: None, {"qat": "{"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_model_as_before(copied, damage):
    DAMAGES[damage](copied[0])
    pair = ready()
    before = logits(pair[0])
    with pytest.raises(
        BrokenCheckpointError, match=r"qat_checkpoint\.safetensors cannot be read: .*Delete it to begin anew"
    ):
        train(pair, folder=copied[1], **RUN)
    assert torch.equal(logits(pair[0]), before)
