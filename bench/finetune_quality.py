"""How much of a fine-tuning is lost on the way into a Q4_0 file: QAT-LoRA beside LoRA that is merged, then rounded.

    python bench/finetune_quality.py [--seeds 0 1 2] [--steps 60] [--ways …] [--to FILE]

The built-in SmolLM2-135M learns to write tickets for coffee orders (`finetune.orders`). Measured on orders with names
that it never saw: the surprise at a token of the ticket, and the share of tickets that are right to the letter; before,
as trained, and as shipped in Q4_0. The ways:
    qat      adapters through the grid of the packed weights; merging changes nothing
    packed   plain LoRA on the same packed weights; the merged sum is rounded by the plain rule
    float    plain LoRA on the float weights, merged, and rounded by the plain rule: what usual kits do
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.finetune.adapted import Kind, adapt, merge_adapters
from gemma_qat_kit.finetune.examples import make_batch, make_examples
from gemma_qat_kit.finetune.lora import find_linears
from gemma_qat_kit.finetune.orders import orders
from gemma_qat_kit.finetune.train import WithLoss
from gemma_qat_kit.quality.post_training import quantized_weights

WAYS = ("qat", "packed", "float")
HELD_OUT = orders(20, held_out=True)


def quiet(progress) -> None:
    """Show nothing."""


def measured(model, asks: bool) -> dict[str, float]:
    """Return the surprise at held-out tickets in nats a token, and the share that is right where it is asked for."""
    module, tokenizer = model.hf
    examples = make_examples(HELD_OUT, tokenizer, 512)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in (*examples.train, *examples.held_out):
            batch = make_batch([example], 0, module.device)
            total, count = total + WithLoss(module)(batch).item() * batch.num_learnt, count + batch.num_learnt
    if not asks:
        return {"nats": total / count}
    said = [model.chat(question["content"], temperature=0, max_new_tokens=30).text.strip() for question, _ in HELD_OUT]
    right = sum(text == ticket["content"] for text, (_, ticket) in zip(said, HELD_OUT, strict=True))
    return {"nats": total / count, "right": right / len(HELD_OUT)}


def run(way: str, seed: int, steps: int, asks: bool) -> dict:
    """Tune, merge and round; return what was found on the way."""
    with gqk.load("smollm2-135m", "float32", report=quiet) as model:
        if way == "packed":  # as "qat" has them, so that only the training differs
            names = tuple(find_linears(model.hf[0], gqk.FinetuneSettings().targets))
            adapt(model, Kind(names, 1, 1, "q4_0"), 0, quiet)
            merge_adapters(model)
        before = measured(model, asks)
        settings = gqk.FinetuneSettings(num_steps=steps, seed=seed, batch_size=4, gradient_accumulation=1,
                                        gradient_checkpointing=False)  # fmt: skip
        result = gqk.finetune(model, orders(160, seed=seed), qat="q4_0" if way == "qat" else None, settings=settings,
                              report=quiet)  # fmt: skip
        trained, started = measured(model, asks), time.perf_counter()
        gqk.merge_adapters(model)
        if way == "float":
            with quantized_weights(model, "q4_0"):
                shipped = measured(model, asks)
        else:
            shipped = measured(model, asks)
        return {"way": way, "seed": seed, "steps": steps, "seconds": result.seconds, "dtype": result.dtype,
                "before": before, "trained": trained, "shipped": shipped,
                "merge_seconds": time.perf_counter() - started}  # fmt: skip


def main() -> None:
    """Run what was asked for and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=gqk.FinetuneSettings().num_steps)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--losses-only", action="store_true", help="without asking for tickets, which takes most time")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    for way in options.ways:
        found = []
        for seed in options.seeds:
            found.append(run(way, seed, options.steps, not options.losses_only))
            print(json.dumps(found[-1]), flush=True)
            if options.to:
                with options.to.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
        for when in ("before", "trained", "shipped"):
            nats, right = ([each[when].get(name) for each in found] for name in ("nats", "right"))
            words = "" if None in right else f"{statistics.mean(right):8.1%} right ({min(right):.1%}-{max(right):.1%})"
            print(f"{way:<8}{when:<9}{statistics.mean(nats):8.4f} nats ({min(nats):.4f}-{max(nats):.4f}){words}")


if __name__ == "__main__":
    main()
