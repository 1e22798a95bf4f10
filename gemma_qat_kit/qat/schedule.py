"""Which grid each weight trains on: one for all, or Gemma's own schedule of 2, 4 and 8 bits, and exceptions by name."""

import re
from collections.abc import Mapping

from torch import nn

from gemma_qat_kit.architectures import hf_config
from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.formats.grids import GRIDS, Grid, find_grid
from gemma_qat_kit.layouts import mobile_bits
from gemma_qat_kit.qat.tables import tables

MOBILE = ("mobile", "mobile_weight_only")
QAT_FORMATS = (*MOBILE, *GRIDS)
"""What `prepare_qat` takes: "mobile" with and without ranges of the activations, or one grid for every weight."""


class Schedule:
    """The grid of each weight.

    Args:
        format: One of `QAT_FORMATS`.
        overrides: Regular expression, searched in a module's name, to a grid or None, which leaves the weight as it
            is; the first one that matches counts.
        config: The model's, of transformers.

    Raises:
        UnknownNameError: Of the format or of an override's grid.
        BadSettingError: An expression that cannot be read.
    """

    def __init__(self, format: str, overrides: Mapping[str, str | None], config):
        if format not in QAT_FORMATS:
            raise unknown_name("QAT format", format, QAT_FORMATS)
        self._overrides = [(_compiled(pattern), grid and find_grid(grid)) for pattern, grid in overrides.items()]
        self._used: set[str] = set()
        self.format = format
        text = config.get_text_config()
        size = "E2B" if getattr(text, "use_double_wide_mlp", False) else "E4B"
        self.num_layers = text.num_hidden_layers
        self._published = hf_config(size, "mobile") if format in MOBILE else None

    def grid(self, module_name: str) -> Grid | None:
        """Return the grid of a module's weight, None where it stays as it is."""
        for pattern, grid in self._overrides:
            if pattern.search(module_name):
                self._used.add(pattern.pattern)
                return grid
        if self._published is None:
            return GRIDS[self.format]
        bits = mobile_bits(self._published, _published_name(module_name))
        return GRIDS[f"mobile_int{bits}"] if bits else None

    def check_used(self, module: nn.Module) -> None:
        """Refuse an exception that matched no weight: a typing error would otherwise train something else.

        Raises:
            BadSettingError: With the expression.
        """
        for name in tables(module):
            self.grid(name)
        for pattern, _ in self._overrides:
            if pattern.pattern not in self._used:
                example = next((name for name, part in module.named_modules() if isinstance(part, nn.Linear)), "")
                raise BadSettingError(
                    f"No weight's name matches {pattern.pattern!r}.",
                    f"An override is a regular expression searched in module names, such as {example!r}.",
                    "Mend it, or leave it out; the first override that matches a name counts.",
                )


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as err:
        raise BadSettingError(
            f"{pattern!r} is no regular expression: {err}.",
            r"An override is searched in module names, as in r'layers\.\d+\.mlp'.",
            "Mend the expression.",
        ) from err


def _published_name(name: str) -> str:
    """Return the name that a module has in Gemma's mobile checkpoints, which the schedule is written for."""
    return re.sub(r"^model\.(?!language_model\.)", "model.language_model.", name)
