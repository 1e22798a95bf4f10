"""The training loop: everything that QAT does at each step, short enough to be read."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from gemma_qat_kit.errors import BadOutputError
from gemma_qat_kit.qat.settings import LoopSettings, TrainSettings


def train_steps(
    model, optimizer, scaler, objective, batches, settings: LoopSettings, accelerator: Accelerator, autocast,
    first_step: int = 0,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Train, and yield after each update how many there were and the loss."""
    for step in range(first_step, settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * settings.rate(step)
        total, parts = 0.0, batches.parts(step, accelerator)
        for part, share in parts:
            with nullcontext() if part is parts[-1][0] else accelerator.no_sync(model):
                with autocast():  # every weight goes through its grid here, and its gradient straight through below
                    loss = objective.loss(model, part) * share
                accelerator.backward(scaler.scale(loss))
            total += loss.detach()
        loss = accelerator.reduce(total, "mean").item()
        if not math.isfinite(loss):
            raise not_finite(loss, step + 1)
        scaler.step(optimizer)  # the float32 masters move; their codes change when they cross half a step
        scaler.update()
        optimizer.zero_grad()
        yield step + 1, loss


def make_optimizer(masters, ranges, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW whose rates are in steps of each weight's grid, and in shares of each scale."""
    groups = []
    for master, quantizer in masters:
        step_size = quantizer.scale.detach().abs().median().item()
        groups.append({"params": [master], "full_rate": settings.learning_rate * step_size})
        if quantizer.scale.requires_grad:
            groups.append({"params": [quantizer.scale], "full_rate": settings.scale_learning_rate * step_size})
    for scale in ranges:
        groups.append({"params": [scale], "full_rate": settings.scale_learning_rate * scale.item()})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True)


def not_finite(loss: float, step: int) -> BadOutputError:
    """Build the error for a loss that is NaN or infinite."""
    return BadOutputError(
        f"The loss is {loss} at step {step}.",
        "It is a finite number as long as every layer's numbers fit the dtype; float16 ends at 65,504.",
        'Take TrainSettings(dtype="float32"), or a tenth of the learning rate. The model keeps the best point so far.',
    )
