"""Where the weights of a walk stand: which groups of a prepared model are watched, and a copy of them at any moment."""

from collections.abc import Sequence

import torch
from torch import nn

from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.widgets.training_walk import NUM_GROUPS, NUM_WEIGHTS, Group, Place

_ROWS, _NEAR = 256, 0.05  # rows that groups are looked for in; steps of the grid from a border that count as near


def find_groups(module: nn.Module) -> list[Group]:
    """Return the groups of a prepared model that are watched: of the first rows, those with most weights near a border.

    A code changes where a weight crosses the border between two levels, and in a short training most are far from one.
    Scales near the median are asked for, since the learning rate of a weight is in steps of that.
    """
    name, (master, quantizer) = next(iter(masters(module).items()))
    grid, width = quantizer.grid, master.shape[-1]
    scale = grid.stored_scale(quantizer.scale.detach().flatten(0, -2)[:_ROWS])
    step = scale.repeat_interleave(width // scale.shape[-1], -1)
    ratio = master.detach().flatten(0, -2)[:_ROWS] / torch.where(step == 0, 1, step)
    median = quantizer.scale.detach().abs().median()
    is_usual = (step.abs() > 0.5 * median) & (step.abs() < 1.5 * median) & (ratio > grid.low) & (ratio < grid.high)
    is_near = ((ratio - ratio.floor() - 0.5).abs() < _NEAR) & is_usual
    groups = is_near[:, : width // NUM_WEIGHTS * NUM_WEIGHTS].unflatten(-1, (-1, NUM_WEIGHTS)).sum(-1)
    order = groups.flatten().argsort(descending=True, stable=True)[:NUM_GROUPS].tolist()
    kind = name, grid.low, grid.high, grid.is_half
    return [Group(*kind, i // groups.shape[-1], NUM_WEIGHTS * (i % groups.shape[-1])) for i in order]


def take_places(module: nn.Module, groups: Sequence[Group], step: int) -> list[Place]:
    """Copy groups of one weight as they are now."""
    master, quantizer = masters(module)[groups[0].name]
    masters_of, scales_of = (each.detach().flatten(0, -2) for each in (master, quantizer.scale))
    width, num_scales = masters_of.shape[-1], scales_of.shape[-1]
    values = torch.stack([masters_of[g.row, g.column : g.column + NUM_WEIGHTS] for g in groups]).cpu()
    scales = torch.stack([scales_of[g.row, g.column * num_scales // width] for g in groups]).cpu()[:, None]
    codes, stored = quantizer.grid.codes(values, scales), quantizer.grid.stored_scale(scales)
    return [Place(step, tuple(v), s, tuple(c)) for v, s, c in
            zip(values.tolist(), stored.flatten().tolist(), codes.tolist(), strict=True)]  # fmt: skip
