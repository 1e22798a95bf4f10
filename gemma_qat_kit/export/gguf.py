"""`export_gguf`: from a checkpoint folder, a loaded model or a state dict to a GGUF that llama.cpp runs."""

import html
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_qat_kit.errors import unknown_name
from gemma_qat_kit.export.plan import GgufPlan
from gemma_qat_kit.formats.q4_0_grid import GridFit
from gemma_qat_kit.gguf.writer import check_target, write_gguf
from gemma_qat_kit.layouts import GGUF_FORMATS
from gemma_qat_kit.memory.settings import DEVICES
from gemma_qat_kit.progress import Report, progress_bar
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.weights import find_weights


@dataclass(frozen=True)
class Export:
    """A GGUF file that was written and verified.

    Attributes:
        path: The file.
        nbytes: Its size.
        num_tensors: Tensors in it, by ggml type.
        seconds: From the call to the file's final name.
        fit: How much of a Q4_0 grid the weights had and kept, None where nothing was rounded to Q4_0.
        notes: Sentences on what the file does not hold, or holds otherwise than its source.
    """

    path: Path
    nbytes: int
    num_tensors: dict[str, int]
    seconds: float
    fit: GridFit | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: {self._summary()}", *self._sentences()])

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._sentences())
        return f"<div><strong>{html.escape(str(self.path))}</strong>: {html.escape(self._summary())}</div>{lines}"

    def _summary(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.num_tensors.items())
        return f"{readable_bytes(self.nbytes)}, written and verified in {self.seconds:.1f} s. Tensors: {kinds}."

    def _sentences(self) -> list[str]:
        return [*([str(self.fit)] if self.fit else []), *self.notes]


def export_gguf(
    source: object,
    path: str | Path,
    format: str = "q4_0",
    *,
    like: str | Path | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
    device: str = "cuda",
    overwrite: bool = False,
    report: Report | None = None,
) -> Export:
    """Write a model as a GGUF that llama.cpp runs, whole or not at all, and verify it.

    Weights that lie on a Q4_0 grid keep it. The codes of a mobile checkpoint are kept as they are ("q4_0" puts them
    into the groups that hold them exactly). The text model is written, with tokenizer and chat template.

    Args:
        source: A folder with a bf16, q4_0-unquantized or mobile checkpoint, a model of `gqk.load`, a torch module, or
            a state dict with the names of one of these.
        path: The .gguf file to write.
        format: "q4_0" with Google's own choice of types, "q8_0", "bf16" or "float32".
        like: A folder or GGUF with the config and tokenizer, where the source has none (a state dict, a module).
        importance: Mean squared inputs of weights, float32 (in,), by weight or module name: those weights are rounded
            to Q4_0 as llama.cpp does with an importance matrix.
        device: Codes of 2 bits become Q2_K, which runs anywhere. For "cpu" they become TQ2_0, a fifth smaller and
            faster there; llama.cpp has no CUDA kernels for it.
        overwrite: Replace a file that is there.
        report: Called with the progress; raise CancelledError in it to stop, and nothing is left. None draws a bar.

    Raises:
        BadSettingError: An unknown option, or a source that cannot be exported.
        BadTensorError: NaN or an infinity, or rows that do not divide into groups.
        BrokenCheckpointError: Tensors are missing or have other shapes than the config says.
        ExportError: A file is there already, or cannot be written, or does not come back as written.
        NotEnoughDiskError: It does not fit on the disk.
    """
    started = time.perf_counter()
    if format not in GGUF_FORMATS:
        raise unknown_name("format", format, GGUF_FORMATS)
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    path = Path(path).expanduser()
    check_target(path, overwrite)
    like = Path(like).expanduser() if like is not None else None
    plan = GgufPlan(find_weights(source), format, like=like, importance=importance, device=device)
    with nullcontext(report) if report else progress_bar() as shown:
        nbytes = write_gguf(path, plan.metadata, plan.tensors(), overwrite=overwrite, report=shown)
    return Export(path, nbytes, plan.num_tensors(), time.perf_counter() - started, plan.fit(), tuple(plan.notes()))
