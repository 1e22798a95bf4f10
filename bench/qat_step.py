"""What fake quantization costs a training step: beside the step without it, and beside torchao's.

    python bench/qat_step.py [steps]            # torchao: pip install --no-deps torchao

The same network (SmolLM2-135M in float32, 2 x 256 tokens, cross-entropy, AdamW over all linears) is trained in three
ways that take turns, so that a busy machine slows all alike: as it is, prepared by `prepare_qat` for q4_0 with learnt
scales, and by torchao with int4 in groups of 32, its nearest scheme. Medians of a step and their ratios.
"""

import statistics
import sys
import time

import torch
from torch import nn

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.allocator import keeping_freed_memory
from gemma_qat_kit.qat.losses import cross_entropy
from gemma_qat_kit.quality.post_training import linears


def plain(module: nn.Module) -> None:
    """Train the linears as they are."""
    module.requires_grad_(False)
    for weight in linears(module).values():
        weight.requires_grad_(True)


def ours(module: nn.Module) -> None:
    """Prepare with q4_0."""
    gqk.prepare_qat(module, "q4_0", calibration={}, report=lambda progress: None)


def torchao(module: nn.Module) -> None:
    """Prepare the same linears with torchao."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    names = {name.removesuffix(".weight") for name in linears(module)}
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
    module.requires_grad_(False)
    quantize_(module, config, filter_fn=lambda part, name: name in names)
    for name in names:
        module.get_submodule(name).weight.requires_grad_(True)


class Trainer:
    """One of the three, with its own copy of the network."""

    def __init__(self, prepare):
        self.model = gqk.load("smollm2-135m", "float32", device="cpu", report=lambda progress: None)
        self.module = self.model.hf[0]
        prepare(self.module)
        self.module.train()
        weights = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
        self.seconds = []

    def step(self, ids: torch.Tensor) -> None:
        """Take one step and keep its time."""
        started = time.perf_counter()
        cross_entropy(self.module(ids, use_cache=False).logits, ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    """Print the table."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    generator = torch.Generator().manual_seed(0)
    trainers = {prepare.__name__: Trainer(prepare) for prepare in (plain, ours, torchao)}
    with keeping_freed_memory():
        for _ in range(num_steps + 2):
            ids = torch.randint(5, 40_000, (2, 256), generator=generator)
            for trainer in trainers.values():
                trainer.step(ids)
    medians = {name: statistics.median(trainer.seconds[2:]) for name, trainer in trainers.items()}
    for name, seconds in medians.items():
        print(f"{name:<10}{seconds:>8.3f} s a step, {seconds / medians['plain']:.3f} of the step without it")
    print(f"torchao's step takes {medians['torchao'] / medians['ours']:.3f} times ours")


if __name__ == "__main__":
    main()
