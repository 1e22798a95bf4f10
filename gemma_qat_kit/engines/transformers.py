"""Run a checkpoint with transformers: the reference for every layout, and what trains."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from gemma_qat_kit.attachments import kinds_in
from gemma_qat_kit.engines import transformers_traps as traps
from gemma_qat_kit.engines.allocator import give_freed_memory_back
from gemma_qat_kit.engines.drafting import Drafting
from gemma_qat_kit.engines.half import keep_sums_in_float32
from gemma_qat_kit.engines.transformers_config import load_config
from gemma_qat_kit.engines.transformers_gguf import load_gguf
from gemma_qat_kit.engines.transformers_media import MediaEncoder
from gemma_qat_kit.engines.transformers_report import quiet, reporting
from gemma_qat_kit.engines.transformers_stream import GenerateStream, plain_speed
from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, MissingLibraryError, ModelClosedError
from gemma_qat_kit.generation import STOP_IDS, Settings
from gemma_qat_kit.gguf.header import longest_context
from gemma_qat_kit.memory.parts import Part
from gemma_qat_kit.memory.settings import check_context_length
from gemma_qat_kit.messages import Message
from gemma_qat_kit.progress import Report
from gemma_qat_kit.quality.scoring import ModuleScorer

_LIBRARIES = {"w4a16": ("compressed_tensors", "compressed-tensors"), "nf4": ("bitsandbytes",) * 2,
              "int8": ("bitsandbytes",) * 2}  # fmt: skip


class TransformersEngine:
    """A Gemma 4 checkpoint, or the built-in model, loaded by transformers.

    Args:
        folder: config.json, safetensors and tokenizer; for "float32" a .gguf file, for "q4_0" either.
        format: As in the catalog; "nf4" and "int8" quantize a 16-bit checkpoint with bitsandbytes while it is read, and
            "q4_0" leaves the weights of a GGUF in their blocks, or packs those of a 16-bit checkpoint.
        context_length: Tokens of prompt and answer together.
        text_only: Leave the vision and audio towers unread.
        drafter: Folder of the MTP drafter to generate with, or None.
        device: "auto", "cpu", "cuda" or "cuda:1".
        per_layer_table: Where the per-layer embeddings of E2B and E4B lie; see `load`.
        report: Told how much of the weights is loaded.
        weight_bytes: Bytes of the weights to load, to scale the report with.

    Raises:
        MissingLibraryError: A library that the format needs is missing or too old.
        BrokenCheckpointError: Tensors are missing or have other shapes than config.json says.
    """

    name = "transformers"

    def __init__(
        self,
        folder: Path,
        format: str,
        *,
        context_length: int,
        text_only: bool = True,
        drafter: Path | None = None,
        device: str = "auto",
        per_layer_table: str = "disk",
        report: Report | None = None,
        weight_bytes: int | None = None,
    ):
        _require_libraries(format, drafter)
        import torch
        from transformers import AutoTokenizer

        self.path = folder
        self.device = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
        if self.device.type == "cpu":
            give_freed_memory_back()
        self.dtype = torch.float32 if format == "float32" else best_dtype(self.device)
        self.context_length, self.stop_ids, self.drafter, self.drafting = context_length, STOP_IDS, None, None
        with traps.repaired(), quiet(), reporting(report, weight_bytes):
            if format == "float32":
                check_context_length(context_length, longest_context(folder) or context_length)
                self.model, self.tokenizer, end = load_gguf(folder, self.device, report)
                self.stop_ids = [end]
            elif format == "q4_0":
                self._load_packed(per_layer_table, report)
            else:
                config = load_config(folder, text_only)
                check_context_length(context_length, config.get_text_config().max_position_embeddings)
                with _table_in(per_layer_table, folder):
                    self.model = _load_model(folder, config, self.dtype, self.device, _quantization(format, self.dtype))
                if format == "mobile":
                    from gemma_qat_kit.engines.transformers_mobile import unpack_in_chunks

                    unpack_in_chunks(self.model)
                self.tokenizer = AutoTokenizer.from_pretrained(folder)
            if drafter:
                self.drafter = _load_drafter(drafter, self.dtype, self.device)
        if self.dtype == torch.float16:
            keep_sums_in_float32(self.model)
        self._media = None if text_only else MediaEncoder(folder, self.model.config)
        self._lock = threading.Lock()  # two cells may use one model: one after the other
        if drafter:
            self.drafting = Drafting(plain_speed(self.model))

    def _load_packed(self, per_layer_table: str, report: Report | None) -> None:
        from gemma_qat_kit.engines.transformers_packed import load_packed

        self.model, self.tokenizer = load_packed(
            self.path, dtype=self.dtype, device=self.device, per_layer_table=per_layer_table, report=report
        )
        check_context_length(self.context_length, self.model.config.get_text_config().max_position_embeddings)

    @property
    def hf(self) -> tuple:
        """The plain (model, processor) of transformers; the processor of a text-only load is its tokenizer."""
        return self.model, self.processor

    @cached_property
    def processor(self):
        """transformers' processor: the tokenizer, or with towers the one of all, which needs torchvision."""
        return self.tokenizer if self._media is None else _load_processor(self.path)

    @property
    def takes(self) -> tuple[str, ...]:
        """What the loaded towers take: "image", "audio"."""
        return self._media.takes if self._media else ()

    def stream(
        self, conversation: str | list[Message], settings: Settings, tools: list[dict] | None = None
    ) -> "GenerateStream":
        """Start answering a conversation (or, given a string, continuing a text) and return the stream."""
        self._check_open()
        inputs = self._encode(conversation, settings, tools).to(self.device)
        room = self.context_length - inputs["input_ids"].shape[1]
        if room < 1:
            raise BadSettingError(
                f"The prompt has {inputs['input_ids'].shape[1]:,} tokens.",
                f"With its answer it must fit in context_length={self.context_length:,}.",
                "Shorten it, or load the model with a larger context_length.",
            )
        return GenerateStream(self, inputs, settings, min(settings.max_new_tokens, room))

    def num_tokens(self, messages: list[Message], *, thinking: bool = False) -> int:
        """Return the tokens of a prompt, template included."""
        self._check_open()
        settings = Settings(thinking, 1, 0.0, 1.0, 0, None)
        return self._encode(messages, settings)["input_ids"].shape[1]

    def _check_open(self) -> None:
        if self.model is None:
            raise ModelClosedError("This model is closed.", "A closed model answers no more.", "Load it again.")

    def _encode(self, conversation: str | list[Message], settings: Settings, tools: list[dict] | None = None):
        if isinstance(conversation, str):
            return self.tokenizer(conversation, return_tensors="pt")
        inputs = self.tokenizer.apply_chat_template(
            conversation,
            tools=tools or None,
            add_generation_prompt=True,
            enable_thinking=settings.thinking,
            return_tensors="pt",
            return_dict=True,
        )
        if self._media is not None and kinds_in(conversation):
            inputs.data = self._media.inputs(inputs["input_ids"][0].tolist(), conversation)
        return inputs

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, with the first token that the model wants."""
        self._check_open()
        return ModuleScorer(self.model, self.tokenizer).tokenize(text)

    def logits(self, ids: list[int]):
        """Return what the model says after each token: float32 (tokens, words), on its device."""
        self._check_open()
        with self._lock:
            return ModuleScorer(self.model, self.tokenizer).logits(ids)

    def memory(self) -> tuple[Part, ...]:
        """Return what this process and the GPU hold, part by part; see `transformers_memory`."""
        from gemma_qat_kit.engines.transformers_memory import measured_parts

        return () if self.model is None else measured_parts(self.model, self.drafter, self.device)

    @property
    def is_closed(self) -> bool:
        """Whether the model was freed."""
        return self.model is None

    def close(self) -> None:
        """Free the model's memory."""
        self.model = self.drafter = None
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def best_dtype(device):
    """Return the type to compute in: bfloat16, or float16 on a GPU that only emulates it (a T4, torch says yes)."""
    import torch

    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float16


def _require_libraries(format: str, drafter: Path | None) -> None:
    import importlib.util

    for module, package in (("torch",) * 2, ("transformers",) * 2, _LIBRARIES.get(format, ("torch",) * 2)):
        if importlib.util.find_spec(module) is None:
            raise MissingLibraryError(
                f"{package} is not installed.", f"Loading {format} needs it.", f"Run: pip install {package}"
            )
    traps.check_release(drafter=drafter is not None)


def _quantization(format: str, dtype):
    if format not in ("nf4", "int8"):
        return None
    from transformers import BitsAndBytesConfig

    kept = {"llm_int8_skip_modules": ["lm_head", "router.proj"]}  # a router is tiny, and a wrong expert costs much
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **kept)


def _load_model(folder: Path, config, dtype, device, quantization):
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": quantization} if quantization else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except RuntimeError as err:
        if "mismatch" not in str(err):
            raise
        raise _wrong_tensors(folder, "some have other shapes than config.json says") from err
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _wrong_tensors(folder, f"{len(missing)} are missing, the first is {missing[0]}")
    return model.eval()


@contextmanager
def _table_in(place: str, folder: Path) -> Iterator[None]:
    """Keep the per-layer embeddings of a model that is loaded meanwhile on "disk" or in RAM ("cpu"), outside it."""
    if place == "memory":
        yield
        return
    from gemma_qat_kit.engines.transformers_table import left_out, stored_table

    with left_out() as tables:
        yield
    for table in tables:
        if not table.fill(stored_table(folder, is_copied=place != "disk")):
            raise _wrong_tensors(folder, "the per-layer embeddings are missing, or have other shapes")


def _wrong_tensors(folder: Path, what: str) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"The tensors in {folder} are not those of its config.json: {what}.",
        "Every tensor of the architecture must be there, in its shape.",
        "Download it again.",
    )


def _load_drafter(folder: Path, dtype, device):
    from transformers import AutoModelForCausalLM

    drafter = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, use_safetensors=True)
    if drafter.generation_config.num_assistant_tokens is None:
        drafter.generation_config.num_assistant_tokens = 4  # generate() reads it from here and fails on None
    return drafter.eval()


def _load_processor(folder: Path):
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (ImportError, OSError, ValueError) as err:
        raise MissingLibraryError(
            f"The image and audio processor cannot be loaded: {err}.",
            "It needs pillow, a torchvision that matches torch, and the checkpoint's processor files.",
            "Install them, or load with text_only=True.",
        ) from err
