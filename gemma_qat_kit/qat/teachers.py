"""Who says what the model should say: itself before quantization, in memory or as its likeliest words; or another."""

from collections.abc import Callable

import torch
from torch import nn

from gemma_qat_kit.errors import BadSettingError, unknown_name
from gemma_qat_kit.qat.batches import Windows
from gemma_qat_kit.qat.fake_quantizer import FLOAT, computing, masters
from gemma_qat_kit.qat.losses import cross_entropy, distillation, distillation_from_top, hidden_distance
from gemma_qat_kit.quality.post_training import module_of
from gemma_qat_kit.quality.scoring import evaluating

TEACHERS = ("memory", "cache")
_TOP = 64  # words kept of each token: 99 % of the probability or more on ordinary text, 640 bytes


class Itself:
    """The model before quantization: its weights are kept beside the masters, in the model's own dtype."""

    is_text = False

    def __init__(self, module: nn.Module, hidden_weight: float):
        self._module, self._hidden_weight, self._wants_hidden = module, hidden_weight, hidden_weight > 0
        for master, quantizer in masters(module).values():
            if quantizer.reference is None:
                quantizer.reference = master.detach().to(quantizer.dtype, copy=True)

    def loss(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Return the distance from the model before quantization on the same windows: of its words, and of the hidden
        states on the way to them."""
        answer = model(ids, use_cache=False, output_hidden_states=self._wants_hidden)
        with torch.no_grad(), evaluating(self._module), computing(self._module, FLOAT):
            theirs = self._module(ids, use_cache=False, output_hidden_states=self._wants_hidden)
        loss = distillation(answer.logits.flatten(0, 1), theirs.logits.flatten(0, 1))
        if self._wants_hidden:
            distance = hidden_distance(answer.hidden_states[1:], theirs.hidden_states[1:])
            loss = loss + self._hidden_weight * distance.to(loss.device)
        return loss


class Another:
    """Another model with the same vocabulary."""

    is_text = False

    def __init__(self, teacher, module: nn.Module):
        self._teacher = module_of(teacher)
        ours, theirs = (each.config.get_text_config().vocab_size for each in (module, self._teacher))
        if ours != theirs:
            raise BadSettingError(
                f"The teacher knows {theirs:,} words, the model {ours:,}.",
                "Both say a probability for each word of one vocabulary.",
                'Take a model of the same family, or teacher="memory" for the model itself before quantization.',
            )

    def loss(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Return the distance from the other model on the same windows."""
        answer = model(ids, use_cache=False)
        with torch.no_grad():
            theirs = self._teacher(ids.to(self._teacher.device), use_cache=False).logits.to(answer.logits.device)
        return distillation(answer.logits.flatten(0, 1), theirs.flatten(0, 1))


class Cached:
    """The model before quantization, asked once for all windows of the run; only its likeliest words are kept."""

    is_text = False

    def __init__(self, module: nn.Module, windows: Windows, report: Callable[[int, int], None]):
        self._kept: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        used = {_key(w): w for step in range(windows.settings.num_steps) for w in windows.batch(step)}
        with torch.no_grad(), evaluating(module), computing(module, FLOAT):
            for done, (key, window) in enumerate(used.items()):
                report(done, len(used))
                shares = module(window[None].to(module.device), use_cache=False).logits[0].float().log_softmax(-1)
                top = shares.topk(min(_TOP, shares.shape[-1]))
                self._kept[key] = top.values.cpu(), top.indices.to(torch.int32).cpu()
        report(len(used), len(used))

    def loss(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Return the distance from what was kept of the same windows."""
        logits = model(ids, use_cache=False).logits.flatten(0, 1)
        shares, words = zip(*(self._kept[_key(window)] for window in ids), strict=True)
        shares, words = torch.cat(shares).to(logits.device), torch.cat(words).to(logits.device, torch.int64)
        return distillation_from_top(logits, words, shares)


class TheText:
    """No teacher: the text itself, as in plain fine-tuning."""

    is_text = True

    def loss(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean surprise at the next tokens."""
        return cross_entropy(model(ids, use_cache=False).logits, ids)


def find_teacher(teacher, module: nn.Module, windows: Windows, report: Callable[[int, int], None]):
    """Return the teacher that a caller means: "memory", "cache", a model, or None for the text itself.

    Raises:
        UnknownNameError: Another word.
        BadSettingError: A model with another vocabulary.
    """
    if teacher is None:
        return TheText()
    if teacher == "memory":
        return Itself(module, windows.settings.hidden_weight)
    if teacher == "cache":
        return Cached(module, windows, report)
    if isinstance(teacher, str):
        raise unknown_name("teacher", teacher, TEACHERS)
    return Another(teacher, module)


def _key(window: torch.Tensor) -> bytes:
    return window.cpu().numpy().tobytes()
