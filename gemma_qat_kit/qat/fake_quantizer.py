"""What stands between a master weight and the model: the weight on its grid, as torch parametrizations.

`linear.weight` of a prepared layer is computed at each use from `linear.parametrizations.weight.original`, the float32
master that the optimizer moves. Nothing else in the model changes, so any transformers model can be prepared.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from gemma_qat_kit.formats.grids import Grid, learned_fake_quantize
from gemma_qat_kit.formats.quantized import Quantized

GRID, FLOAT, PLAIN = "grid", "float", "plain"


class FakeQuantizer(nn.Module):
    """A weight's way onto a grid, with the scales that it has there.

    Args:
        grid: Which codes there are.
        scale: float32 (..., groups).
        dtype: Of the model's computation, in which the values are handed on.
        learns_scale: Whether the scales are trained, too.
    """

    def __init__(self, grid: Grid, scale: torch.Tensor, dtype: torch.dtype, learns_scale: bool):
        super().__init__()
        self.grid, self.dtype, self.mode = grid, dtype, GRID
        self.reference: torch.Tensor | None = None  # the weight before training, where a teacher needs it
        self.has_moved = False  # whether training changed the master
        self.scale = nn.Parameter(scale, requires_grad=learns_scale)

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        """Return the values on the grid, or what `computing` asks for."""
        if self.mode == GRID:
            return learned_fake_quantize(master, self.scale, self.grid, self.dtype)
        before = master.to(self.dtype) if self.reference is None else self.reference
        return before if self.mode == FLOAT else self.grid.plain(before).dequantize(self.dtype)

    def store(self, master: torch.Tensor) -> Quantized:
        """Return what a file stores."""
        return self.grid.store(master, self.scale)

    @torch.no_grad()
    def take_plain_scale(self, master: torch.Tensor) -> None:
        """Take the scales of the plain rule, in place."""
        self.scale.copy_(self.grid.plain(master).scale.view_as(self.scale))


class FrozenTable(nn.Module):
    """An embedding or head that is not trained: rounded once to what ships.

    Args:
        stored: What a file stores.
        dtype: Of the model's computation.
    """

    def __init__(self, stored: Quantized, dtype: torch.dtype):
        super().__init__()
        self.stored, self.mode = stored, GRID
        self.register_buffer("values", _as_read(stored, dtype), persistent=False)

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Return the rounded table, or the original where floats are asked for."""
        return original if self.mode == FLOAT else self.values

    def store(self, original: torch.Tensor) -> Quantized:
        """Return what a file stores."""
        return self.stored


def _as_read(stored: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """Return a table's values as the reader of its file has them: transformers multiplies mobile codes in its dtype."""
    if not getattr(stored, "format", "").startswith("mobile"):
        return stored.dequantize(dtype)
    scale = stored.scale.to(dtype)
    return (stored.codes.to(dtype).unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def attach(places: list[tuple[nn.Module, str]], quantizer: FakeQuantizer | FrozenTable) -> None:
    """Put a quantizer between a parameter and its use, in place; a trained parameter becomes a float32 master.

    Args:
        places: Modules that share the parameter, with its name in each.
        quantizer: The way onto the grid.
    """
    is_trained = isinstance(quantizer, FakeQuantizer)
    module, name = places[0]
    original = getattr(module, name).detach()
    # A bfloat16 master has 8 significant bits: updates below 0.4 % of a weight would vanish.
    shared = nn.Parameter(original.float() if is_trained else original, requires_grad=is_trained)
    for module, name in places:
        setattr(module, name, shared)
        parametrize.register_parametrization(module, name, quantizer, unsafe=True)  # unsafe: the dtype may change
        module.parametrizations[name].original = shared


def quantizers(module: nn.Module) -> dict[str, tuple[nn.Module, str, FakeQuantizer | FrozenTable]]:
    """Return by a weight's name the module that holds it, the name of its parameter there, and its quantizer."""
    found = {}
    for prefix, part in module.named_modules():
        for name, steps in getattr(part, "parametrizations", {}).items():
            if isinstance(steps[0], FakeQuantizer | FrozenTable):
                found[f"{prefix}.{name}"] = (part, name, steps[0])
    return found


def masters(module: nn.Module) -> dict[str, tuple[nn.Parameter, FakeQuantizer]]:
    """Return by a weight's name the trained float32 master and its quantizer; a tied weight once."""
    found, seen = {}, set()
    for full_name, (part, name, quantizer) in quantizers(module).items():
        master = part.parametrizations[name].original
        if isinstance(quantizer, FakeQuantizer) and id(master) not in seen:
            seen.add(id(master))
            found[full_name] = (master, quantizer)
    return found


@contextmanager
def computing(module: nn.Module, mode: str) -> Iterator[None]:
    """Compute otherwise than in training, until the block ends.

    Args:
        module: A prepared model.
        mode: `FLOAT`, as before quantization, with the weights that a teacher keeps or else the masters; or `PLAIN`,
            those rounded by the plain rule of their format, without any training.
    """
    parts = [part for part in module.modules() if getattr(part, "mode", None) == GRID]  # not torch's own modes
    try:
        for part in parts:
            part.mode = mode
        yield
    finally:
        for part in parts:
            part.mode = GRID
