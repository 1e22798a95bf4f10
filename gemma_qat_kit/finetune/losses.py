"""Cross-entropy over a large vocabulary, a few tokens at a time: logits are never all there at once.

Gemma's head has 262,144 words: the logits of 4 x 1,024 tokens, with their gradient, would be 8.6 GB in float32. The
head is frozen, so all that has to be kept of a chunk is its gradient for the hidden states, computed with its logits.
"""

import torch
from torch import nn

from gemma_qat_kit.engines.packed import as_computed

CHUNK = 256  # tokens whose logits are there at once


def chunked_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, softcap: float | None = None, chunk: int = CHUNK
) -> torch.Tensor:
    """Return the sum of the surprise at targets, in nats, with the gradient for the hidden states alone.

    Args:
        hidden: Float (tokens, width).
        head: Frozen weight of the head, (words, width).
        targets: int64 (tokens,).
        softcap: Logits become `softcap * tanh(logits / softcap)`, as Gemma has them.
        chunk: Tokens whose logits are computed at once.
    """
    return _ChunkedCrossEntropy.apply(hidden, head, targets, softcap, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, softcap, chunk) -> torch.Tensor:
        of_hidden, total = torch.empty_like(hidden), torch.zeros((), dtype=torch.float64, device=hidden.device)
        computed = as_computed(hidden)
        head = head.to(computed.dtype)
        for rows in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            loss, of_hidden[rows] = _chunk(computed[rows], head, targets[rows], softcap)
            total += loss
        ctx.save_for_backward(of_hidden)
        return total.float()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None, None


def _chunk(hidden, head, targets, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    logits = nn.functional.linear(hidden, head).float()
    bent = None
    if softcap:
        bent = torch.tanh_(logits / softcap)
        logits = bent * softcap
    logs = logits.log_softmax(-1)
    picked = targets[:, None]
    loss = -logs.gather(-1, picked).sum(dtype=torch.float64)
    gradient = logs.exp_()
    gradient.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
    if bent is not None:
        gradient *= 1 - bent.square_()
    return loss, gradient.to(hidden.dtype) @ head
