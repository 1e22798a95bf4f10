"""The settings that a memory plan depends on, checked, with the nearest right value in every error."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.errors import BadSettingError, unknown_name

TASKS = ("chat", "finetune", "qat")
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}
"""Optimizer -> bytes of its state per trained value: two float32 moments, two int8 ones, none."""
KV_FORMATS = {"bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Format of the key/value cache -> bytes per value; bf16 stands for either 16-bit float. q4_0 ruins QAT weights."""
TABLE_PLACES = ("disk", "cpu", "memory")
DEVICES = ("cpu", "cuda")
ENGINES = ("llama_cpp", "transformers")
TEACHERS = ("memory", "cache", "none")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SMALL_WEIGHTS = 2**28
"""Weights in Q4_0 blocks whose values may all be in memory at once: those of the built-in model, not of a Gemma."""


@dataclass(frozen=True)
class MemorySettings:
    """What a plan is made for.

    Attributes:
        size: A size of the catalog.
        format: A format of the catalog.
        engine: "llama_cpp" or "transformers".
        device: "cuda" or "cpu".
        task: "chat"; "finetune": adapters (LoRA) on frozen weights; "qat": attention and MLP matrices of the text
            layers trained in float32 through fake quantization, experts left as they are.
        context_length: Tokens of prompt and answer together, in chat.
        batch_size: Conversations or training sequences at once.
        sequence_length: Tokens of a training sequence.
        lora_rank: Of the adapters, for "finetune".
        lora_targets: Names of the linears that get one.
        optimizer: One of `OPTIMIZERS`.
        gradient_accumulation: Batches whose gradients are added up before a step; from 2 on they stay all the time.
        gradient_checkpointing: Keep one hidden state per layer and compute the rest again.
        logits_chunk_length: Tokens whose logits are computed at once in training; None takes all of the batch.
        teacher: Of QAT: the model before quantization in "memory", its likeliest words in a "cache", or "none".
        kv_format: One of `KV_FORMATS`.
        text_only: Without the vision and audio towers.
        per_layer_table: Where the per-layer embeddings of E2B and E4B lie: left on "disk" and looked up row by row,
            copied to the RAM of the "cpu", or in the "memory" of the device with everything else.
        drafter: With the MTP drafter.
        config: config.json's content of a Gemma 4 checkpoint that is not in the catalog; `size` is then only its name.
    """

    size: str
    format: str
    engine: str
    device: str
    task: str = "chat"
    context_length: int = 4096
    batch_size: int = 1
    sequence_length: int = 1024
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = LORA_TARGETS
    optimizer: str = "adamw"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = True
    logits_chunk_length: int | None = 256
    teacher: str = "memory"
    kv_format: str = "bf16"
    text_only: bool = True
    per_layer_table: str = "disk"
    drafter: bool = False
    config: dict | None = field(default=None, repr=False, hash=False)

    @property
    def place(self) -> str:
        """Where what an engine makes itself lies: "gpu" or "ram"."""
        return "gpu" if self.device == "cuda" else "ram"

    @property
    def is_packed(self) -> bool:
        """Whether transformers holds the layers' matrices in Q4_0 blocks: `finetune` packs the built-in model, too."""
        is_built_in = self.size == BUILT_IN_SIZE and self.task == "finetune"
        return self.engine == "transformers" and (self.format == "q4_0" or is_built_in)

    def __post_init__(self):
        names = {"task": TASKS, "optimizer": OPTIMIZERS, "kv_format": KV_FORMATS, "per_layer_table": TABLE_PLACES,
                 "device": DEVICES, "engine": ENGINES, "teacher": TEACHERS}  # fmt: skip
        for name, known in names.items():
            check_name(name, getattr(self, name), known)
        for name, largest in (("batch_size", 4096), ("lora_rank", 4096), ("gradient_accumulation", 2**20)):
            check_count(name, getattr(self, name), largest)
        if self.logits_chunk_length is not None:
            check_count("logits_chunk_length", self.logits_chunk_length, 2**20)
        for target in self.lora_targets:
            check_name("LoRA target", target, LORA_TARGETS)


def check_name(kind: str, value: object, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        UnknownNameError: Not in `known`.
    """
    if value not in known:
        raise unknown_name(kind, value, known)


def check_count(name: str, value: object, largest: int) -> None:
    """Refuse what is no whole number from 1 to `largest`.

    Raises:
        BadSettingError: No integer, below 1 or above `largest`.
    """
    if not _is_count(value, largest):
        near = min(largest, max(1, value)) if isinstance(value, Integral) else 1
        raise BadSettingError(
            f"{name}={value!r} cannot be used.", f"It is a whole number from 1 to {largest:,}.", f"Try {name}={near:d}."
        )


def check_tokens(name: str, value: object, longest: int) -> None:
    """Refuse what is no number of tokens that a model takes.

    Raises:
        BadSettingError: Not an integer from 1 to `longest`.
    """
    if not _is_count(value, longest):
        raise BadSettingError(
            f"{name}={value!r} cannot be used.",
            f"This model takes 1 to {longest:,} tokens.",
            f"Try {name}={min(longest, 4096)}.",
        )


def check_context_length(context_length: int, longest: int) -> None:
    """Refuse a context that a model does not take; see `check_tokens`."""
    check_tokens("context_length", context_length, longest)


def _is_count(value: object, largest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value <= largest
