"""How to fine-tune: settings whose defaults fit a free GPU."""

from dataclasses import dataclass

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.memory.settings import LORA_TARGETS, check_name
from gemma_qat_kit.qat.settings import LoopSettings


@dataclass(frozen=True)
class FinetuneSettings(LoopSettings):
    """Settings of `finetune`: those of the loop (`LoopSettings`), and these.

    Attributes:
        learning_rate: Of AdamW for adapters of a network 1,024 wide; wider ones take less, by the root of the width.
        rank: Of the adapters.
        alpha: What is learnt is scaled by alpha / rank.
        targets: Names of the linears that get an adapter.
    """

    num_steps: int = 60
    batch_size: int = 1
    sequence_length: int = 1024
    gradient_accumulation: int = 4
    num_evaluations: int = 3
    gradient_checkpointing: bool = True
    learning_rate: float = 8e-4
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = LORA_TARGETS

    _least = LoopSettings._least | {"rank": 1, "alpha": 1}
    _largest = LoopSettings._largest | {"learning_rate": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.targets, str) or not self.targets or not all(isinstance(t, str) for t in self.targets):
            raise BadSettingError(
                f"targets={self.targets!r} cannot be used.",
                "It is a tuple of names of linears.",
                'Try ("q_proj", "v_proj").',
            )
        for target in self.targets:
            check_name("target", target, LORA_TARGETS)
