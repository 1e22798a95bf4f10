"""Fine-tune and export a Gemma of real size with random weights, and say what it took beside the plan.

    python bench/finetune_e2b.py /tmp/full/E2B-q4_0/E2B-q4_0.gguf [--length 256] [--batch 1] [--steps 2] [--device auto]

`bench/random_checkpoint.py E2B q4_0 FOLDER` writes the file. Times are those of this machine; on a GPU the peak is
torch's own. Exported is the merged model in Q4_0, straight from the packed blocks and the adapters.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.finetune.fitting import memory_settings
from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.memory.plan import plan_for


def quiet(progress) -> None:
    """Show nothing."""


def in_places(use) -> dict[str, float]:
    """Return the most GiB in each place."""
    return {place: round(use.peak.in_place(place) / 2**30, 3) for place in ("gpu", "ram", "mapped")}


def main() -> None:
    """Tune, merge and export, each measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    settings = gqk.FinetuneSettings(options.steps, options.batch, options.length, 4, num_evaluations=1)
    rows = [{"question": "the sky is", "answer": "blue and " * options.length}] * 8
    with gqk.load(options.path, "q4_0", engine="transformers", device=options.device, report=quiet) as model:
        plan = plan_for(memory_settings(model, settings, "q4_0"))
        with measure_memory() as use:
            run = gqk.finetune(model, rows, settings=settings, report=quiet)
        facts = {"planned": {name: round(n / 2**30, 3) for name, n in plan.needed.items()}, "tuning": in_places(use)}
        if torch.cuda.is_available():
            facts["max_memory_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        facts["step_seconds"] = [round(step.seconds, 2) for step in run.steps]
        with tempfile.TemporaryDirectory() as folder, measure_memory() as use:
            gqk.merge_adapters(model)
            export = gqk.export_gguf(model, f"{folder}/tuned.gguf", report=quiet)
        facts |= {"export": in_places(use), "export_seconds": round(export.seconds, 1), "dtype": run.dtype,
                  "num_adapted": run.num_adapted, "cpu_threads": torch.get_num_threads()}  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
