"""How good the model is on text that it is not trained on: its surprise, and its distance from itself as a float."""

from dataclasses import dataclass

import torch
from torch import nn

from gemma_qat_kit.qat.fake_quantizer import FLOAT, PLAIN, computing
from gemma_qat_kit.qat.losses import cross_entropy, distillation_from_top
from gemma_qat_kit.quality.scoring import evaluating

_TOP = 256  # likeliest words of the model before quantization, kept of each held-out token


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out text.

    Attributes:
        step: Updates made before it.
        nats: Mean surprise per token.
        kl_divergence: From the model before quantization, in nats per token, over its 256 likeliest words.
    """

    step: int
    nats: float
    kl_divergence: float


@dataclass(frozen=True)
class Lines:
    """What training moves between: the model before quantization, and after it without any training.

    Attributes:
        float_nats: Mean surprise of the model before quantization.
        plain: The same weights rounded by the plain rule of the format.
    """

    float_nats: float
    plain: Evaluation

    def share_recovered(self, nats: float) -> float | None:
        """Return which share of the lost log-perplexity is won back: 0 as the plain rule, 1 as before.

        None where the plain rule lost nothing on this text: there is nothing to win back.
        """
        lost = self.plain.nats - self.float_nats
        return (self.plain.nats - nats) / lost if lost > 0 else None


class Evaluator:
    """Measures a prepared model on held-out windows, always the same.

    Args:
        module: A prepared model, before training; what it says now without quantization is the reference.
        windows: int64 (windows, tokens).
        autocast: A context to compute in, made anew for each use.
    """

    def __init__(self, module: nn.Module, windows: torch.Tensor, autocast):
        self._module, self._windows, self._autocast = module, windows.to(module.device), autocast
        self._top, nats = [], []
        with computing(module, FLOAT):
            for window in self._windows:  # the logits of one at a time: 268 MB with Gemma's vocabulary
                logits = self._logits(window)
                nats.append(cross_entropy(logits, window[None]))
                top = logits[0].log_softmax(-1).topk(min(_TOP, logits.shape[-1]))
                self._top.append((top.indices, top.values))
        with computing(module, PLAIN):
            self.lines = Lines(_mean(nats), self.measure(0))

    def measure(self, step: int) -> Evaluation:
        """Measure the model as it is now."""
        nats, divergence = [], []
        for window, (words, shares) in zip(self._windows, self._top, strict=True):
            logits = self._logits(window)
            nats.append(cross_entropy(logits, window[None]))
            divergence.append(distillation_from_top(logits[0], words, shares))
        return Evaluation(step, _mean(nats), _mean(divergence))

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), evaluating(self._module), self._autocast():
            return self._module(window[None], use_cache=False).logits.float()


def _mean(values) -> float:
    return torch.stack(list(values)).double().mean().item()
