"""Fine-tune and export a Gemma of real size with random weights, and say what it took beside the plan.

    python bench/finetune_e2b.py /tmp/full/E2B-q4_0/E2B-q4_0.gguf [--length 256] [--batch 1] [--steps 2] [--device auto]
        [--accumulation 4] [--cap 14.56]

`bench/random_checkpoint.py E2B q4_0 FOLDER` writes the file; E4B and 12B are tuned alike. Planned and measured are one
number each: on a GPU what torch reserved, at most `--cap` GiB; else private memory and pages of the file, where a step
gives back what it frees (with room to spare it keeps that for the next one, which is faster). Times are those of this
machine. Exported is the merged model in Q4_0, straight from the packed blocks and the adapters.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.finetune import train
from gemma_qat_kit.finetune.fitting import memory_settings
from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.memory.plan import plan_for


def quiet(progress) -> None:
    """Show nothing."""


def in_places(use) -> dict[str, float]:
    """Return the most GiB in each place."""
    return {place: round(use.peak.in_place(place) / 2**30, 3) for place in ("gpu", "ram", "mapped")}


def planned_and_measured(plan, use) -> dict[str, float]:
    """Return the plan beside what was measured, in GiB, and their ratio."""
    if plan.settings.device == "cuda":
        planned, measured = plan.needed["gpu"], torch.cuda.max_memory_reserved()
    else:  # pages of the file that were read and are no longer needed stay where there is room
        planned = sum(p.nbytes for p in plan.placed if p.place == "mapped" or (p.place == "ram" and not p.is_spare))
        measured = use.peak.in_place("ram") + use.peak.in_place("mapped")
    figures = {"planned": planned / 2**30, "measured": measured / 2**30, "ratio": measured / planned}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    """Tune, merge and export, each measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--cap", type=float, help="GiB of GPU memory that torch may take")
    options = parser.parse_args()
    if torch.cuda.is_available() and options.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 2**30 / total))
    train.has_room = lambda module, planned: False
    settings = gqk.FinetuneSettings(options.steps, options.batch, options.length, options.accumulation,
                                    num_evaluations=1)  # fmt: skip
    rows = [{"question": "the sky is", "answer": "blue and " * options.length}] * 5
    with gqk.load(options.path, "q4_0", engine="transformers", device=options.device, report=quiet) as model:
        plan = plan_for(memory_settings(model, settings, "q4_0"))
        with measure_memory() as use:
            run = gqk.finetune(model, rows, settings=settings, report=quiet)
        facts = planned_and_measured(plan, use) | {"tuning": in_places(use)}
        facts["step_seconds"] = [round(step.seconds, 2) for step in run.steps]
        facts |= {"dtype": run.dtype, "num_adapted": run.num_adapted, "cpu_threads": torch.get_num_threads()}
        print(json.dumps(facts), flush=True)
        with tempfile.TemporaryDirectory() as folder, measure_memory() as use:
            gqk.merge_adapters(model)
            export = gqk.export_gguf(model, f"{folder}/tuned.gguf", report=quiet)
    print(json.dumps({"export": in_places(use), "export_seconds": round(export.seconds, 1)}))


if __name__ == "__main__":
    main()
