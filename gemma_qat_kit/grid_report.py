"""Is this still QAT? How much of each layer lies on a Q4_0 grid, counted from the weights themselves.

Weights that were trained for Q4_0 lie on its grid; a merge, an average or a further training step takes them off it,
and the file they are exported to then loses what the training had won.
"""

import html
import re
from contextlib import nullcontext
from dataclasses import dataclass

from gemma_qat_kit.catalog import FORMAT_COLOURS
from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats import q4_0_grid
from gemma_qat_kit.formats.groups import FLOATS
from gemma_qat_kit.formats.q4_0 import GROUP_SIZE
from gemma_qat_kit.formats.q4_0_grid import GridFit
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.weights import Weight, find_weights

# The matrices that Google's Q4_0 files hold in Q4_0, whatever stands before and behind their names.
_MATRIX = re.compile(r"layers\.(\d+)\.(?:self_attn\.|mlp\.|experts\.)?"
                     r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|gate_up_proj|per_layer_input_gate|"
                     r"per_layer_projection)(?:\.weight)?")  # fmt: skip
STILL_QAT = 0.9  # of the groups; a published checkpoint has nearly all, ordinary weights have none


@dataclass(frozen=True)
class GridReport:
    """How much of each matrix lies on a Q4_0 grid.

    Attributes:
        what: The checkpoint or model.
        fits: Name of a matrix to its `GridFit`, in the model's order.
    """

    what: str
    fits: dict[str, GridFit]

    @property
    def total(self) -> GridFit:
        """All matrices together."""
        return GridFit.sum(self.fits.values())

    @property
    def is_on_grid(self) -> bool:
        """Whether the weights are still those of a model trained for Q4_0: nine tenths of the groups lie on a grid."""
        return self.total.share_on_grid >= STILL_QAT

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        share = f"{self.total.share_on_grid:.1%} of the groups lie on a Q4_0 grid"
        if self.is_on_grid:
            return f"{self.what} is still QAT: {share}."
        left = "partly off its grid" if self.total.share_on_grid > 1 - STILL_QAT else "not on a grid"
        return f"{self.what} is {left}: {share}."

    def __str__(self) -> str:
        width = max(map(len, self.fits))
        head = f"{'matrix':<{width}}  {'groups':>10}  on grid    exact  plain rule"
        rows = [f"{name:<{width}}  {fit.num_groups:>10,}  {fit.share_on_grid:>7.2%}  {fit.share_exact:>7.2%}  "
                f"{fit.naive_share_exact:>10.2%}" for name, fit in self.fits.items()]  # fmt: skip
        return "\n".join([self.verdict, str(self.total), "", head, *rows])

    def _repr_html_(self) -> str:
        total = html.escape(str(self.total))
        return f"<p><b>{html.escape(self.verdict)}</b></p>{self.picture()}<p>{total}</p>"

    def picture(self) -> str:
        """Return an SVG with a cell for each matrix, layers from left to right, filled as far as it lies on a grid."""
        cells = {(m[2], int(m[1])): fit for name, fit in self.fits.items() if (m := _MATRIX.search(name))}
        kinds, layers = list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells})
        size, left = max(8, min(18, 560 // len(layers))), 150
        width, height = left + size * len(layers) + 8, 22 * len(kinds) + 34
        drawn = [_cell(left + size * layers.index(layer), 22 * kinds.index(kind), size, f"{kind}, layer {layer}", fit)
                 for (kind, layer), fit in cells.items()]  # fmt: skip
        drawn += [f'<text x="{left - 8}" y="{22 * row + 14}" text-anchor="end">{kind}</text>'
                  for row, kind in enumerate(kinds)]  # fmt: skip
        axis = 22 * len(kinds) + 14
        drawn += [f'<text x="{left + size * layers.index(layer)}" y="{axis}">{layer}</text>'
                  for layer in layers if layer % 5 == 0]  # fmt: skip
        drawn.append(f'<text x="{left - 8}" y="{axis}" text-anchor="end">layer</text>')
        return (
            f'<svg role="img" aria-label="{html.escape(self.verdict)}" viewBox="0 0 {width} {height}" '
            f'style="max-width:{width}px;width:100%;font:12px system-ui,sans-serif;fill:currentColor">'
            f"{''.join(drawn)}</svg>"
        )


def _cell(x: int, y: int, size: int, name: str, fit: GridFit) -> str:
    """Draw a box that is filled from below by the share on the grid: the height says what the colour says."""
    full = 18 * fit.share_on_grid
    title = f"{name}: {fit.share_on_grid:.2%} of the groups on a grid"
    return (
        f'<g><title>{title}</title><rect x="{x}" y="{y + 18 - full:.2f}" width="{size - 2}" height="{full:.2f}" '
        f'fill="{FORMAT_COLOURS["q4_0"]}"/><rect x="{x}" y="{y}" width="{size - 2}" height="18" fill="none" '
        f'stroke="currentColor" stroke-opacity=".4"/></g>'
    )


def grid_report(source: object, *, report: Report | None = None) -> GridReport:
    """Count, layer by layer, how much of a checkpoint or model lies on a Q4_0 grid: is this still QAT?

    Args:
        source: A checkpoint folder in 16 bits, a model of `load`, a torch module or a state dict.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar.

    Raises:
        BadSettingError: Something else, or weights that are stored as codes of another grid.
        BrokenCheckpointError: The folder is incomplete or damaged.
        BadTensorError: No matrix to look at, or one with NaN or an infinity in it.
    """
    weights = find_weights(source)
    matrices = [weight for weight in weights.tensors.values() if _is_matrix(weight)]
    if not matrices:
        raise BadTensorError(
            f"{weights.what} has no 16-bit matrices of layers.",
            "They are named as transformers names them, and their rows divide into groups of 32.",
            "Pass a q4_0-unquantized checkpoint, or the model made of it.",
        )
    total, done, fits = sum(w.num_rows * w.width for w in matrices), 0, {}
    with nullcontext(report) if report else progress_bar() as tell:
        for weight in sorted(matrices, key=lambda w: int(_MATRIX.search(w.name)[1])):
            parts = []
            for start, rows in weight.chunks():
                name = weight.name + (f", from row {start:,} on," if start else "")
                parts.append(q4_0_grid.quantize(rows, name)[1])
                done += rows.numel()
                tell(Progress("looking for the grid", done, total, "weights"))
            fits[weight.name] = GridFit.sum(parts)
    return GridReport(weights.what, fits)


def _is_matrix(weight: Weight) -> bool:
    is_text = not any(tower in weight.name for tower in ("vision", "audio"))
    fits = weight.dtype in FLOATS and len(weight.shape) > 1 and weight.width % GROUP_SIZE == 0
    return is_text and fits and _MATRIX.search(weight.name) is not None
