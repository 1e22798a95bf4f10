"""Two processes train as one does at the same global batch: they share each update's windows, and one of them writes.

`accelerate launch --multi_gpu` starts them, told by ACCELERATE_USE_CPU that they meet on the CPU (gloo); with `--cpu`
it starts one, however many it is asked for.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from small_training import SETTINGS, ready, train, values

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.qat import training
from gemma_qat_kit.qat.run import Step

RUN = {"num_steps": 4, "num_evaluations": 2, "checkpoint_every": 2, "batch_size": 1, "gradient_accumulation": 4,
       "learning_rate": 0.01}  # fmt: skip
SCRIPT = f"""
import json, sys
import torch
from accelerate import PartialState
from gemma_qat_kit.errors import BadSettingError
from small_training import ready, train, values
pair, seen = ready(), []
try:
    train(pair, batch_size=3)
except BadSettingError as err:
    refusal = str(err)
run = train(pair, folder=sys.argv[1], watch=lambda event: seen.append(values(pair)), **{RUN!r})
if PartialState().is_main_process:
    torch.save({{"moved": seen[-2], "kept": values(pair)}}, sys.argv[1] + "/values.pt")
    print(json.dumps([refusal, PartialState().num_processes, [s.loss for s in run.steps]]), flush=True)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes print, and their folder."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--main_process_port", str(free_port()), str(folder / "script.py"), str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_two_processes_train_as_one(two):
    (_, num_processes, losses), folder = two
    assert num_processes == 2
    pair, seen = ready(), []
    run = train(pair, watch=lambda event: seen.append((event, values(pair))), **RUN)
    assert losses == pytest.approx([step.loss for step in run.steps], rel=1e-5)
    found, start = torch.load(folder / "values.pt")["moved"], seen[0][1]
    expected = next(moved for event, moved in reversed(seen) if isinstance(event, Step))
    for name, value in expected.items():
        far = (found[name] - value).abs() > 0.1 * (value - start[name]).abs().max()
        assert far.float().mean() < 5e-3, name  # sums in another order decide the sign of a gradient of nearly zero


def test_one_process_wrote_the_checkpoint_and_goes_on_with_it_alone(two):
    (_, _, losses), folder = two
    pair, seen = ready(), []
    run = train(pair, folder=folder, watch=seen.append, **RUN)
    assert [event for event in seen if isinstance(event, Step)] == list(run.steps), "told again, not made again"
    assert [step.loss for step in run.steps] == losses
    kept = torch.load(folder / "values.pt")["kept"]
    assert all(torch.equal(value, kept[name]) for name, value in values(pair).items())


def test_rows_that_two_processes_cannot_share_are_refused(two):
    (refusal, _, _), _ = two
    assert refusal.startswith("An update of 3 windows cannot be shared by 2 processes. ")
    assert refusal.endswith("Try batch_size=2.")
    with pytest.raises(BadSettingError, match="Try batch_size=8"):
        training._check_rows(SETTINGS, 8)


@pytest.mark.parametrize(("rank", "draws"), [(None, True), ("0", True), ("1", False)])
def test_only_the_first_process_draws_a_bar(monkeypatch, rank, draws):
    drawn = []
    monkeypatch.setattr(training, "progress_bar", lambda: nullcontext(drawn.append))
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with ExitStack() as stack:
        training.shown_report(None, stack)(Progress("training", 1, 2, "steps"))
        assert training.shown_report(print, stack) is print
    assert len(drawn) == draws
