"""Token by token: what a model says to each word of a text, and how far that is from what another says.

Logits are large (Gemma: 262,144 words of 4 bytes, 268 MB for 256 tokens), so a text is cut into windows, one window of
each model is in memory at a time, and only a few figures per token are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

from gemma_qat_kit.errors import BadOutputError, BadSettingError, ModelClosedError
from gemma_qat_kit.quality.texts import Text

MIN_TOKENS = 16  # fewer say nothing about a model
_ROWS = 64  # tokens whose probabilities are computed at a time: 67 MB a copy with Gemma's vocabulary
_CHARACTERS = 32  # at most so many of a token are tokenized: a file of megabytes need not be, for the first thousands


class Scorer(Protocol):
    """What scores a text: an engine, or a transformers module with its tokenizer."""

    context_length: int | None

    def tokenize(self, text: str) -> list[int]:
        """Return token ids, with the first token that the model wants."""

    def logits(self, ids: list[int]):
        """Return float32 (tokens, words): row i is what the model expects after token i."""


class ModuleScorer:
    """A transformers causal language model and its tokenizer.

    Args:
        module: Called with token ids (1, tokens); answers with `.logits`.
        tokenizer: Called with a text; answers with `.input_ids`.
    """

    def __init__(self, module, tokenizer):
        self.module, self.tokenizer = module, tokenizer
        self.context_length = getattr(module.config.get_text_config(), "max_position_embeddings", None)

    def tokenize(self, text: str) -> list[int]:
        """Return token ids. Gemma's always begin with <bos>: without it its perplexity is a thousand times too high."""
        ids = list(self.tokenizer(text).input_ids)
        bos = self.tokenizer.bos_token_id
        wants_bos = self.module.config.model_type.startswith("gemma") and bos is not None
        return [bos, *ids] if wants_bos and ids[:1] != [bos] else ids

    def logits(self, ids: list[int]):
        """Return float32 (tokens, words) on the module's device, computed as in use: without dropout or gradients."""
        import torch

        with torch.inference_mode(), evaluating(self.module):
            return self.module(torch.tensor([ids], device=self.module.device)).logits[0].float()


@contextmanager
def evaluating(module) -> Iterator[None]:
    """Compute as in use, without dropout, until the block ends."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def scorer_of(model) -> tuple[str, Scorer]:
    """Return the name and the scorer of a gqk Model or of a pair (transformers module, tokenizer).

    Raises:
        BadSettingError: It is neither.
        ModelClosedError: The model was closed.
    """
    if isinstance(model, tuple) and len(model) == 2 and hasattr(model[0], "config") and callable(model[1]):
        return type(model[0]).__name__, ModuleScorer(*model)
    if not hasattr(model, "runner"):
        raise BadSettingError(
            f"{model!r:.100} cannot be measured.",
            "A model of gqk.load can, and a pair (transformers module, tokenizer).",
            "Pass one of these.",
        )
    if model.is_closed:
        raise ModelClosedError("This model is closed.", "A closed model answers no more.", "Load it again.")
    return model.name, model.runner


def cut_windows(scorer: Scorer, text: Text, *, window: int, max_tokens: int) -> list[list[int]]:
    """Return the first tokens of a text in consecutive windows, each with the first token that the model wants.

    Args:
        scorer: Whose tokens, and whose longest context.
        text: The text.
        window: Tokens of a window, the first one included.
        max_tokens: Tokens of the text to take.

    Raises:
        BadSettingError: A number out of range, or a text of less than `MIN_TOKENS` tokens.
    """
    longest = scorer.context_length or window
    _check("window", window, MIN_TOKENS, f"{MIN_TOKENS} to {longest:,} tokens of this model", 256, longest)
    _check("max_tokens", max_tokens, MIN_TOKENS, f"an integer from {MIN_TOKENS}", 4096)
    start = scorer.tokenize("")
    ids = scorer.tokenize(text.content[: _CHARACTERS * max_tokens])[len(start) :][:max_tokens]
    if len(ids) < MIN_TOKENS:
        raise BadSettingError(
            f"{text.name} has {len(ids)} tokens.",
            f"To measure a model takes {MIN_TOKENS} or more; thousands give steady figures.",
            'Pass a longer text; a file is passed as Path("my_text.txt"), and None takes a built-in text.',
        )
    length = window - len(start)
    pieces = [start + ids[i : i + length] for i in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def _check(name: str, value: object, least: int, allowed: str, example: int, most: int | None = None) -> None:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        raise BadSettingError(f"{name}={value!r} cannot be used.", f"It is {allowed}.", f"Try {name}={example}.")


@dataclass(frozen=True)
class TokenFigures:
    """Figures of scored tokens, one tensor each, float32 (tokens,) on the CPU; the last three None of one model alone.

    Attributes:
        nats: Surprise at the token that came, -log p.
        reference_nats: The reference's surprise.
        divergence: KL(reference || model) of the whole distribution, in nats.
        agrees: 1 where both expect the same token most, else 0.
    """

    nats: object
    reference_nats: object = None
    divergence: object = None
    agrees: object = None

    @staticmethod
    def join(parts: list["TokenFigures"]) -> "TokenFigures":
        """Return the figures of several windows as one."""
        import torch

        names = [name for name, value in vars(parts[0]).items() if value is not None]
        return TokenFigures(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def score(ids: list[int], logits, reference=None) -> TokenFigures:
    """Score the tokens of a window after its first, which is context only.

    Args:
        ids: The window.
        logits: Float32 (tokens, words) of the model.
        reference: The same of the reference, or None.

    Raises:
        BadSettingError: The two have vocabularies of different size.
    """
    import torch

    if reference is not None and reference.shape != logits.shape:
        raise BadSettingError(
            f"One model knows {logits.shape[-1]:,} words, the other {reference.shape[-1]:,}.",
            "Two models are compared over one vocabulary.",
            "Compare a model with another format of the same model.",
        )
    targets = torch.tensor(ids[1:], device=logits.device)
    with torch.inference_mode():
        parts = [
            _score_rows(targets[rows], logits[rows], None if reference is None else reference[rows].to(logits.device))
            for rows in (slice(i, min(i + _ROWS, len(targets))) for i in range(0, len(targets), _ROWS))
        ]
    return TokenFigures.join(parts)


def _score_rows(targets, logits, reference) -> TokenFigures:
    ours = logits.log_softmax(-1)
    nats = -ours.gather(-1, targets[:, None])[:, 0].cpu()
    if reference is None:
        return TokenFigures(nats)
    agrees = (logits.argmax(-1) == reference.argmax(-1)).float().cpu()
    theirs = reference.log_softmax(-1)
    reference_nats = -theirs.gather(-1, targets[:, None])[:, 0].cpu()
    weights = theirs.exp()
    # Words that both rule out (-inf) add nothing; a word that only the model rules out makes it infinite, as it should.
    terms = (theirs - ours).mul_(weights).masked_fill_(weights == 0, 0)
    return TokenFigures(nats, reference_nats, terms.sum(-1).clamp_(min=0).cpu(), agrees)


def check_finite(name: str, nats) -> None:
    """Refuse a model that answers NaN or infinity.

    Raises:
        BadOutputError: It does; with float16 on a GPU that is an overflow.
    """
    bad = (~nats.isfinite()).nonzero()
    if len(bad):
        raise BadOutputError(
            f"{name} answers {nats[bad[0, 0]].item()} for token {bad[0, 0].item():,} of {len(nats):,}.",
            "The logits of a sound model are finite.",
            "A float16 overflow does this: load it on the CPU or in another format; else its weights are damaged.",
        )
