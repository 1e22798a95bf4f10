"""How much of what quantization costs does QAT win back, beside what wins it back without training?

    python bench/qat_recovery.py NOVEL OTHER [--runs q4_0 mobile_int4 …] [--seeds 0 1 2] [--steps 60] [--to FILE]

The built-in SmolLM2-135M learns from half of Python's manual and from the first four fifths of a novel; it is measured
on the other half, on the rest of the novel, and on two sources that it never learnt from: the text OTHER, and code.
The figures are shares of the log-perplexity that the plain rule loses. Controls: the plain rule after as many steps of
ordinary fine-tuning, and the importance search without training. Two texts that do, of github.com/amueller/word_cloud:
examples/alice.txt (a novel, public domain) and examples/constitution.txt (which models know by heart: the hardest).
The model's file is stored in Q4_1, so its weights lie on a grid; its figures are its own.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

import gemma_qat_kit as gqk
from gemma_qat_kit.qat.batches import read_windows
from gemma_qat_kit.qat.fake_quantizer import FLOAT, computing, masters
from gemma_qat_kit.qat.loop import make_optimizer, train_steps
from gemma_qat_kit.qat.teachers import TheText
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.post_training import linears, quantized_weights, scorer_of_module

MIX = {r"layers\.(1[5-9]|2\d)\.mlp\.": "mobile_int2", r"embed_tokens|lm_head": "mobile_int4"}
RUNS = {
    "q4_0": ("q4_0", {}),
    "mobile_int4": ("mobile_int4", {}),
    "int3_g32": ("int3_g32", {}),
    "int2_g32": ("int2_g32", {}),
    "mobile_int2": ("mobile_int2", {}),
    "mobile mix": ("mobile", {"overrides": MIX, "embeddings": True}),
    "mobile mix, weights only": ("mobile_weight_only", {"overrides": MIX, "embeddings": True}),
}
TOKENS = 2048  # of each text that is measured


def quiet(progress) -> None:
    """Show nothing."""


class Bench:
    """Texts, the model, and what was found."""

    def __init__(self, novel: Path, other: Path, target: Path | None):
        story = novel.read_text(encoding="utf-8-sig")
        cut = len(story) * 4 // 5
        self.learnt = ("calibration", story[1000:cut])
        self.measured = {"manual": texts.read().content, "novel": story[cut:], "other": other.read_text(), "code":
                         texts.read("python-code").content}  # fmt: skip
        self.target, self.before = target, None

    def nats(self, model) -> dict[str, float]:
        """Return the mean surprise on each text."""
        found = (gqk.perplexity(model, text, max_tokens=TOKENS, report=quiet) for text in self.measured.values())
        return {name: each.nats for name, each in zip(self.measured, found, strict=True)}

    def say(self, **facts) -> None:
        """Print a result and keep it."""
        line = json.dumps(facts)
        print(line, flush=True)
        if self.target:
            with self.target.open("a") as file:
                file.write(line + "\n")

    def trained(self, run: str, settings: gqk.TrainSettings) -> None:
        """Prepare, train and measure; the plain rule and the start are measured on the way."""
        format, options = RUNS[run]
        with gqk.load("smollm2-135m", "float32", report=quiet) as model:
            before = self.before = self.before or self.nats(model)
            started = time.perf_counter()
            gqk.prepare_qat(model, format, report=quiet, **options)
            prepared = time.perf_counter() - started
            with computing(model.hf[0], "plain"):
                plain = self.nats(model)
            start = self.nats(model)
            result = gqk.train_qat(model, self.learnt, settings=settings, report=quiet)
            after = self.nats(model)
        self.say(run=run, seed=settings.seed, steps=settings.num_steps, rows=settings.rows, prepare_seconds=prepared,
                 seconds=result.seconds, lost={k: plain[k] - before[k] for k in plain},
                 start=shares(before, plain, start), recovered=shares(before, plain, after))  # fmt: skip

    def fine_tuned(self, settings: gqk.TrainSettings) -> None:
        """Control: as many steps of ordinary fine-tuning, then Q4_0 by the plain rule and by importance."""
        with gqk.load("smollm2-135m", "float32", report=quiet) as model:
            before = self.before = self.before or self.nats(model)
            module = model.hf[0]
            with quantized_weights(model, "q4_0"):
                plain = self.nats(model)
            gqk.prepare_qat(model, "q4_0", calibration={}, learn_scales=False, report=quiet)
            windows = read_windows(scorer_of_module(model), self.learnt, settings)
            optimizer = make_optimizer(masters(module).values(), [], settings)
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            with computing(module, FLOAT):
                for _ in train_steps(module, optimizer, scaler, TheText(), windows, settings, Accelerator(cpu=True),
                                     nullcontext):  # fmt: skip
                    pass
            tuned = {name: master.detach() for name, (master, _) in masters(module).items()}
        with gqk.load("smollm2-135m", "float32", report=quiet) as model:
            for name, weight in linears(model.hf[0]).items():
                weight.data = tuned[name]
            importance = gqk.collect_importance(model, report=quiet)
            for method in ("q4_0", "q4_0+importance"):
                with quantized_weights(model, method, importance=importance):
                    self.say(run=f"fine-tuned, then {method}", seed=settings.seed, steps=settings.num_steps,
                             recovered=shares(before, plain, self.nats(model)))  # fmt: skip


def shares(before: dict, plain: dict, now: dict) -> dict[str, float]:
    """Return which share of the lost log-perplexity is won back on each text."""
    return {name: round((plain[name] - now[name]) / (plain[name] - before[name]), 4) for name in before}


def summary(path: Path) -> None:
    """Print the mean and the spread over the seeds."""
    found: dict[tuple, list[dict]] = {}
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        found.setdefault((facts["run"], facts["steps"]), []).append(facts)
    for (run, steps), several in found.items():
        for kind in ("start", "recovered"):
            if kind in several[0]:
                cells = [_cell([each[kind][name] for each in several]) for name in several[0][kind]]
                print(f"{run:<28}{steps:>5} {kind:<10}" + "".join(f"{cell:>16}" for cell in cells))


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.1%}-{max(values):.1%})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novel", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--runs", nargs="*", default=["q4_0"], choices=[*RUNS, "fine-tuned"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=gqk.TrainSettings().num_steps)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    bench = Bench(options.novel, options.other, options.to)
    for run in options.runs:
        for seed in options.seeds:
            settings = gqk.TrainSettings(seed=seed, num_steps=options.steps)
            bench.fine_tuned(settings) if run == "fine-tuned" else bench.trained(run, settings)
    if options.to:
        summary(options.to)


if __name__ == "__main__":
    main()
