"""What training makes smaller: the distance to the teacher's probabilities, or the surprise at the text itself.

The recipe of Google's Gemma 3 QAT: cross-entropy against the probabilities of the un-quantized model, which is the
Kullback-Leibler divergence and a constant. Logits are float32 (tokens, words) throughout.
Source: https://developers.googleblog.com/en/gemma-3-quantized-aware-trained-state-of-the-art-ai-to-consumer-gpus/
"""

from collections.abc import Sequence

import torch
from torch import nn

_ROWS = 64  # tokens at a time: their probabilities stay in a core's cache


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher || model) in nats per token, with its closed-form gradient, softmax - softmax."""
    return _Distillation.apply(logits, teacher)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(logits, dtype=torch.float32), logits.new_zeros((), dtype=torch.float64)
        for rows in (slice(i, i + _ROWS) for i in range(0, len(logits), _ROWS)):
            ours, theirs = logits[rows].float().log_softmax(-1), teacher[rows].float().log_softmax(-1)
            target = theirs.exp()
            # A word that the teacher rules out has -inf there, and adds nothing.
            total += torch.where(target > 0, target * (theirs - ours), 0).sum(dtype=torch.float64)
            torch.sub(ours.exp_(), target, out=gradient[rows])
        ctx.save_for_backward(gradient.div_(len(logits)))
        ctx.dtype = logits.dtype
        return (total / len(logits)).float()

    @staticmethod
    def backward(ctx, of_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_loss).to(ctx.dtype), None


def hidden_distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared distance of hidden states, relative to the teacher's: each layer is told where it is off.

    Args:
        ours: Hidden states after each layer, (..., tokens, hidden).
        theirs: The teacher's, likewise.

    Source: as in Sanh et al. 2019, arXiv:1910.01108, with squares in place of the angle.
    """
    layers = zip(ours, theirs, strict=True)
    return torch.stack([_relative(our.float(), their.float()) for our, their in layers]).mean()


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    size = theirs.square().mean(-1)
    return ((ours - theirs).square().mean(-1) / size.clamp_min(1e-6)).mean()


def distillation_from_top(logits: torch.Tensor, words: torch.Tensor, log_shares: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher || model) in nats over the teacher's likeliest words and one outcome for all others.

    Args:
        logits: float32 (tokens, words).
        words: int64 (tokens, k), the teacher's likeliest.
        log_shares: float32 (tokens, k), their log-probabilities.
    """
    ours = logits.float().log_softmax(-1).gather(-1, words)
    rest, our_rest = _log_rest(log_shares), _log_rest(ours)
    top = (log_shares.exp() * (log_shares - ours)).sum(-1)
    return (top + rest.exp() * (rest - our_rest)).mean()


def _log_rest(log_shares: torch.Tensor) -> torch.Tensor:
    """Return the log of what some probabilities (…, k) leave of one; above -16, which no later figure depends on."""
    return torch.log((1 - log_shares.exp().sum(-1)).clamp_min(1e-7))


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean surprise in nats at the next tokens of windows: logits (windows, tokens, words), ids the same."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
