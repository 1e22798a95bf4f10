"""Put the linears of a loaded model into Q4_0 blocks."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from gemma_qat_kit.engines.packed import PackedLinear, blocks_of
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.formats import q4_0
from gemma_qat_kit.progress import Progress, Report
from gemma_qat_kit.quality.post_training import linears


def pack(module: nn.Module, importance: Mapping[str, torch.Tensor], report: Report) -> None:
    """Put a language model's linears into Q4_0 blocks in place, one after the other; all else stays.

    Weights that lie on a Q4_0 grid keep it, value for value; others are rounded where that costs least of each layer's
    outputs. Experts of a mixture and what Google keeps in more bits stay as they are.

    Args:
        module: A transformers model.
        importance: Mean squared inputs, float32 (in,), by weight; weights without are rounded by the plain rule.
        report: Called with the progress.

    Raises:
        BadSettingError: There is no linear to pack.
        BadTensorError: NaN or an infinity in a weight.
    """
    found = dict(_packable(module))
    if not found:
        raise BadSettingError(
            "This model has no linear that Q4_0 can hold.",
            "Rows must divide into groups of 32.",
            "Fine-tune it without packing: qat=None.",
        )
    total, done = sum(part.weight.nbytes for part in found.values()), 0
    for name, part in found.items():
        report(Progress("packing", done, total))
        nbytes, blocks = part.weight.nbytes, blocks_of(part.weight, importance.get(f"{name}.weight"), name)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, PackedLinear(blocks, part.weight.dtype))
        done += nbytes
    report(Progress("packing", total, total))


def _packable(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for full_name in linears(module):
        name = full_name.removesuffix(".weight")
        part = module.get_submodule(name) if full_name.endswith(".weight") else None
        is_free = isinstance(part, nn.Linear) and not isinstance(part, PackedLinear) and part.bias is None
        if is_free and part.in_features % q4_0.GROUP_SIZE == 0:
            yield name, part
