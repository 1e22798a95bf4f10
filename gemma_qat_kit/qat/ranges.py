"""Static int8 ranges of a layer's inputs and outputs, as in Gemma's mobile format: calibrated, then learnt or fixed.

A value x becomes `clamp(round(x / s), -128, 127) * s` with one s for all inputs of a linear and one for its outputs; a
scale of 0 means that the layer was not calibrated and nothing is rounded.
Source: transformers' `integrations/gemma_quant.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gemma_qat_kit.formats import mobile

_SHARES = torch.linspace(0.02, 1.0, 50)  # of the range that the largest value asks for
_KEPT_VALUES = 2**12  # of each batch and side, to search the scale on


class StaticRange(nn.Module):
    """Round values to a static int8 range.

    Args:
        scale: Of the range, float32 (); 0 rounds nothing.
        learns: Whether it is trained.
    """

    def __init__(self, scale: torch.Tensor, learns: bool):
        super().__init__()
        self.mode = "grid"
        self.scale = nn.Parameter(scale, requires_grad=learns)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the rounded values in their own dtype; gradients go through inside the range and to the scale."""
        return values if self.mode == "float" else _Rounded.apply(values, self.scale)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        return mobile.round_activation(values, scale)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = ctx.saved_tensors
        step = torch.where(scale == 0, 1, scale).to(values.dtype)
        ratio = values / step
        codes = ratio.round()
        inside = (codes >= -128) & (codes <= 127) | (scale == 0)
        # In float32: a sum in 16 bits would be lost in its own rounding.
        moved = torch.where(inside, codes.float() - values.float() / step.float(), codes.clamp(-128, 127).float())
        return gradient * inside, torch.where(scale == 0, 0, (gradient.float() * moved).sum())


def add_ranges(linear: nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor, learns: bool) -> None:
    """Round a linear's inputs and outputs from now on, in place."""
    if not hasattr(linear, "input_range"):  # else it was prepared and converted before
        linear.register_forward_pre_hook(_round_input)
        linear.register_forward_hook(_round_output)
    linear.input_range, linear.output_range = StaticRange(inputs, learns), StaticRange(outputs, learns)


def _round_input(linear: nn.Linear, args: tuple) -> tuple:
    return linear.input_range(args[0]), *args[1:]


def _round_output(linear: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return linear.output_range(output)


@contextmanager
def watched(linears: dict[str, nn.Linear]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Yield by a linear's name the samples of its inputs and of its outputs, filled while the model runs."""
    kept: dict[str, list[torch.Tensor]] = {name: [torch.zeros(0), torch.zeros(0)] for name in linears}

    def keep(name: str):
        def hook(linear, args, output):
            for side, values in enumerate((args[0], output)):
                kept[name][side] = torch.cat([kept[name][side], _sample(values)])

        return hook

    hooks = [linear.register_forward_hook(keep(name)) for name, linear in linears.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Return evenly spread values and the largest, which decides how far the range may have to reach."""
    flat = values.detach().flatten().float().cpu()
    spread = flat[:: max(1, flat.numel() // _KEPT_VALUES)]
    return torch.cat([spread, flat[flat.abs().argmax()][None]])


def best_scale(values: torch.Tensor) -> torch.Tensor:
    """Return the scale () that rounds some values, float32 (n,), with the least squared error; 0 for none."""
    largest = values.abs().max() if values.numel() else torch.tensor(0.0)
    if largest == 0:
        return torch.tensor(0.0)
    scales = _SHARES * largest / 127
    lost = [(values - (values / s).round().clamp(-128, 127) * s).square().sum() for s in scales]
    return scales[int(torch.stack(lost).argmin())].clone()
