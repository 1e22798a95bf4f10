"""A plain training loop with the parts that the planner counts: adapters or float32 weights through fake quantization,
gradient checkpointing, a loss in chunks of tokens. It measures memory; `finetune` and `train_qat` train."""

import os
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemma_qat_kit.formats.quantized import fake_quantize
from gemma_qat_kit.load import load
from gemma_qat_kit.memory.measure import measure_memory
from gemma_qat_kit.memory.parts import ACTIVATIONS, ADAPTERS, GRADIENTS, LOGITS, OPTIMIZER, Part, Parts, merged
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.memory.receipts import record
from gemma_qat_kit.memory.settings import MemorySettings


class Adapted(nn.Module):
    """A frozen linear with a low-rank adapter in float32."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(0.01 * torch.randn(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        """Return the linear's result and the adapter's."""
        return self.linear(x) + ((x.to(self.down.dtype) @ self.down.T) @ self.up.T).to(x.dtype)


class Snapped(nn.Module):
    """A linear that multiplies with its weight on the Q4_0 grid; the gradient passes straight through."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())

    def forward(self, x):
        """Return the product with the weight on the grid."""
        return nn.functional.linear(x, fake_quantize(self.weight, "q4_0"))


def prepare(model: nn.Module, settings: MemorySettings) -> list[nn.Parameter]:
    """Put adapters or fake quantization into the text layers and return what is trained."""
    model.requires_grad_(False)
    names = settings.lora_targets if settings.task == "finetune" else ("_proj",)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith(names) and "per_layer" not in name:
                new = Adapted(child, settings.lora_rank) if settings.task == "finetune" else Snapped(child)
                setattr(module, name, new)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return [weight for weight in model.parameters() if weight.requires_grad]


def train(model: nn.Module, settings: MemorySettings, num_steps: int = 3) -> tuple[int, int]:
    """Take a few steps on random tokens; return the bytes of what is trained and of the optimizer's state."""
    weights = prepare(model, settings)
    optimizer = torch.optim.AdamW(weights, lr=1e-5) if settings.optimizer == "adamw" else torch.optim.SGD(weights)
    # The codes of the best point so far, which `train_qat` keeps.
    kept = [torch.ones_like(weight, dtype=torch.int8) for weight in weights if settings.task == "qat"]
    shape = settings.batch_size, settings.sequence_length
    vocab = model.config.get_text_config().vocab_size
    for _ in range(num_steps):
        for _ in range(settings.gradient_accumulation):
            ids = torch.randint(5, vocab, shape)
            _loss(model, ids, settings.logits_chunk_length or ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state = (t for of in optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor))
    del kept
    return sum(weight.nbytes for weight in weights), sum(tensor.nbytes for tensor in state)


def _loss(model: nn.Module, ids: torch.Tensor, chunk_length: int) -> torch.Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    chunks = zip(hidden.split(chunk_length), ids.flatten().split(chunk_length), strict=True)
    return sum(checkpoint(_chunk_loss, model.lm_head, *chunk, use_reentrant=False) for chunk in chunks) / ids.numel()


def _chunk_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")


def measure_training(changes: dict) -> None:
    """Train the built-in model for a few steps and keep the receipt: the plan, and the most memory at once."""
    plan = plan_memory("smollm2-135m", "float32", **changes)
    written = os.environ.pop("GQK_RECEIPTS")
    os.environ["GQK_RECEIPTS"] = "off"  # of the load itself
    with load("smollm2-135m", "float32", device="cpu", report=lambda progress: None) as model:
        held = model.memory()
        with measure_memory() as use:
            trained, state = train(model.hf[0], plan.settings)
    known = [*held.placed, Part(OPTIMIZER, state, "ram")]
    known += [Part(ADAPTERS, trained, "ram")] if plan.settings.task == "finetune" else []
    rest = use.peak.in_place("ram") - Parts(tuple(known)).in_place("ram")
    os.environ["GQK_RECEIPTS"] = written
    record("train", plan.settings, _as_one(plan), Parts(merged([*known, Part(ACTIVATIONS, rest, "ram")])))


def _as_one(plan: Parts) -> Parts:
    """Count gradients and logits as activations: they are freed one after the other, so only their sum is measured."""
    parts = (replace(p, name=ACTIVATIONS) if p.name in (GRADIENTS, LOGITS) else p for p in plan.placed)
    return Parts(merged(parts))
