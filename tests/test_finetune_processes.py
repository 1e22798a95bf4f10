"""Two processes fine-tune as one does at the same global batch; one of them writes the checkpoint and goes on alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_network import quiet
from test_finetune import ROWS, tune
from test_qat_processes import free_port

import gemma_qat_kit as gqk

RUN = {"num_steps": 4, "num_evaluations": 2, "checkpoint_every": 2, "batch_size": 2, "gradient_accumulation": 2,
       "dtype": "float32", "learning_rate": 1e-3}  # fmt: skip
SCRIPT = f"""
import json, sys
from accelerate import PartialState
import gemma_qat_kit as gqk
from small_network import quiet
from test_finetune import ROWS, tune
with gqk.load(sys.argv[1], device="cpu", report=quiet) as model:
    run = tune(model, ROWS, folder=sys.argv[2], **{RUN!r})
if PartialState().is_main_process:
    print(json.dumps([PartialState().num_processes, [s.loss for s in run.steps]]), flush=True)
"""


@pytest.mark.slow
def test_two_processes_tune_as_one(tiny, tmp_path):
    here, path = Path(__file__).parent, str(tiny("12B", "bf16"))
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--main_process_port", str(free_port()), str(tmp_path / "script.py"), path, str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    num_processes, losses = json.loads(done.stdout.splitlines()[-1])
    assert num_processes == 2
    for folder, expected in ((None, pytest.approx(losses, rel=1e-4)), (tmp_path, losses)):
        with gqk.load(path, device="cpu", report=quiet) as model:
            assert [step.loss for step in tune(model, ROWS, folder=folder, **RUN).steps] == expected
