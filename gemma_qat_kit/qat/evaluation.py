"""How good the model is on text that it is not trained on: its surprise, and its distance from itself as a float."""

import torch
from torch import nn

from gemma_qat_kit.qat.fake_quantizer import FLOAT, PLAIN, computing
from gemma_qat_kit.qat.losses import cross_entropy, distillation_from_top
from gemma_qat_kit.qat.run import Evaluation, Lines
from gemma_qat_kit.quality.scoring import evaluating

_TOP = 256  # likeliest words of the model before quantization, kept of each held-out token


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
