"""What each number format costs a real model, and what keeping a grid is worth, on the built-in SmolLM2-135M.

    python bench/quality_smollm2.py [tokens]

First every format on two texts, of which importance is collected on a third. Then the model's weights are snapped to a
grid as QAT leaves it: groups of 32, a step per group that is a bfloat16 number, peaks of 1 to 8 steps. That is a model
of its own, and packing it into Q4_0 by the plain rule is compared with keeping its grid.
The file's own weights lie on a Q4_1 grid, an artefact of this model; so Q4_1, which would lose nothing, is left out.
"""

import sys
import time

import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.formats.quantized import GridFit, quantize
from gemma_qat_kit.quality.format_table import FormatTable, compare_formats
from gemma_qat_kit.quality.post_training import linears

METHODS = ("q8_0", "q4_0", "q4_0+importance", "nf4", "w4a16", "mobile_int8", "mobile_int4", "mobile_int2")
# Share of groups by the number of steps that their largest weight is away from zero, 1 to 8. Low peaks are rare, as
# they are after training: a group that has only three levels left is a damaged one.
PEAKS = (0.005, 0.005, 0.01, 0.03, 0.1, 0.2, 0.3, 0.35)


def snapped(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a weight (out, in) on a grid as above; every value is a bfloat16 number."""
    groups = weight.unflatten(-1, (-1, 32))
    peaks = torch.multinomial(torch.tensor(PEAKS), groups[..., 0].numel(), replacement=True, generator=generator) + 1
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = (largest / -peaks.view(largest.shape)).to(torch.bfloat16).float()
    codes = torch.round(groups / torch.where(step == 0, 1, step)).clamp(-8, 7)
    return (codes * step).flatten(-2).to(torch.bfloat16).to(weight.dtype)


def show(title: str, table: FormatTable, seconds: float) -> None:
    """Print a table with the nats that each method loses, the figure that other probes give."""
    lost = ", ".join(f"{row.method} {row.quality.nats - row.quality.reference_nats:.3f}" for row in table.rows)
    print(f"\n{title}\n{table}\nLost, in nats per token: {lost}\n{seconds:.0f} s")


def compare_on(model: gqk.Model, methods: tuple[str, ...], text: str, num_tokens: int, title: str) -> None:
    """Measure and print."""
    started = time.perf_counter()
    table = compare_formats(model, methods, text, max_tokens=num_tokens)
    show(title, table, time.perf_counter() - started)


def report_fit(module: torch.nn.Module) -> None:
    """Print how much of the grid was found over all layers, in the bfloat16 that the weights were stored in."""
    weights = (weight.data.to(torch.bfloat16) for weight in linears(module).values())
    fit = GridFit.sum(quantize(weight, "q4_0", recover_grid=True).fit for weight in weights)
    for label, count, total in (
        ("groups on a grid", fit.groups_on_grid, fit.num_groups),
        ("groups exact, grid kept", fit.groups_exact, fit.num_groups),
        ("groups exact, plain rule", fit.naive_groups_exact, fit.num_groups),
        ("values exact, grid kept", fit.values_exact, fit.num_values),
        ("values exact, plain rule", fit.naive_values_exact, fit.num_values),
    ):
        print(f"  {label:<28}{count / total:>9.3%}")


def main() -> None:
    """Print all tables."""
    num_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    generator = torch.Generator().manual_seed(0)
    with gqk.load("smollm2-135m", "float32") as model:
        for text in ("python-manual", "python-code"):
            compare_on(model, METHODS, text, num_tokens, f"SmolLM2-135M, {text}")
        module = model.hf[0]
        for weight in linears(module).values():
            weight.data = snapped(weight.data, generator)
        print("\nIts weights snapped to a grid and stored in bfloat16, packed into Q4_0:")
        report_fit(module)
        compare_on(model, ("q4_0", "q4_0+grid"), "python-manual", num_tokens, "The snapped model, python-manual")


if __name__ == "__main__":
    main()
