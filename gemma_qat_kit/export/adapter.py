"""Take a fine-tuned model home beside its weights: the adapters alone as a GGUF, and a Modelfile for Ollama."""

from pathlib import Path

from gguf import GGUFValueType

from gemma_qat_kit.errors import BadSettingError, ExportError
from gemma_qat_kit.export.blueprint import published_names, read_blueprint
from gemma_qat_kit.export.plan import rotary_order
from gemma_qat_kit.finetune.adapted import kind_of
from gemma_qat_kit.finetune.lora import ADAPTER, adapters
from gemma_qat_kit.gguf.metadata import Metadata
from gemma_qat_kit.gguf.writer import check_target, write_gguf
from gemma_qat_kit.layouts import Tensor
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Report
from gemma_qat_kit.quality.post_training import module_of


def export_adapter(
    model: Model, path: str | Path, *, like: str | Path | None = None, overwrite: bool = False,
    report: Report | None = None,
) -> Path:  # fmt: skip
    """Write a model's adapters as a GGUF that llama.cpp computes beside the GGUF of the base, a few megabytes.

    llama.cpp adds them to the weights without rounding the sum, so what was trained through a grid comes out slightly
    otherwise than in the merged file, which holds exactly what was trained.

    Args:
        model: One that `finetune` adapted.
        path: The .gguf file to write.
        like: A folder or GGUF of the base; None takes what the model was loaded from.
        overwrite: Replace a file that is there.
        report: Called with the progress.

    Returns:
        The path; `load(base, adapter=path)` computes with it.

    Raises:
        BadSettingError: The model is not adapted, or nothing says what it was loaded from.
        ExportError: A file is there already, or cannot be written.
        NotEnoughDiskError: It does not fit on the disk.
    """
    kind, path = kind_of(model), Path(path).expanduser()
    check_target(path, overwrite)
    origin = like if like is not None else getattr(model.runner, "path", None)
    if origin is None:
        raise BadSettingError(
            "Nothing says what the names of these linears are in a GGUF.", "The base does.", "Pass its path: like=path."
        )
    parts = adapters(module_of(model))
    published = published_names(f"{name}.weight" for name in parts)
    blueprint = read_blueprint(Path(origin).expanduser(), published.values(), "q4_0")
    places = {source: name for name, source in blueprint.sources.items()}
    tensors = []
    for name, part in parts.items():
        place = places[published[f"{name}.weight"]]
        a, b = (side[ADAPTER].weight.detach().float().cpu() for side in (part.lora_A, part.lora_B))
        if heads := blueprint.num_heads.get(place):
            b = b[rotary_order(len(b), heads)]
        for values, side in ((a, "a"), (b, "b")):
            tensor = Tensor(f"{place}.lora_{side}", "F32", tuple(values.shape))
            tensors.append((tensor, lambda values=values: [values.contiguous().numpy()]))
    string, number = GGUFValueType.STRING, GGUFValueType.FLOAT32
    metadata = Metadata(
        blueprint.metadata.architecture,
        {
            "general.type": ("adapter", string, None),
            "adapter.type": ("lora", string, None),
            "adapter.lora.alpha": (float(kind.alpha), number, None),
        },
    )
    write_gguf(path, metadata, tensors, overwrite=overwrite, report=report)
    return path


def write_modelfile(model: Model, gguf: str | Path, *, adapter: str | Path | None = None) -> Path:
    """Write the Modelfile that Ollama makes a model of, beside a GGUF; its chat template is the one in the GGUF.

    Args:
        model: Whose sampling and context to take.
        gguf: The exported file.
        adapter: A file of `export_adapter`, in the same folder.

    Returns:
        The path of the Modelfile; run `ollama create NAME -f Modelfile` in its folder.

    Raises:
        ExportError: It cannot be written.
    """
    gguf, sampling = Path(gguf).expanduser(), model.sampling
    lines = [f"FROM ./{gguf.name}", *([f"ADAPTER ./{Path(adapter).name}"] if adapter else [])]
    lines += [f"PARAMETER {name} {getattr(sampling, name):g}" for name in ("temperature", "top_k", "top_p")]
    lines.append(f"PARAMETER num_ctx {model.context_length}")
    path = gguf.with_name("Modelfile")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as err:
        raise ExportError(
            f"{path} cannot be written: {err.strerror or err}.", "It lies beside the GGUF.", "Check the folder."
        ) from err
    return path
