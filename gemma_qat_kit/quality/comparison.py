"""What a number format costs in quality, measured: perplexity, and how far one model's predictions are from another's.

The right reference of a quantized model is the model that it was made from; `compare` warns of another.
"""

import html
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gemma_qat_kit.catalog import PANEL_STYLE
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.progress import Progress, Report, progress_bar
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.references import WrongReferenceWarning, check_reference
from gemma_qat_kit.quality.scoring import TokenFigures, check_finite, cut_windows, score, scorer_of

__all__ = ["Comparison", "Perplexity", "WrongReferenceWarning", "compare", "perplexity", "sqnr_db"]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        name: The model.
        text: The text.
        nats: Mean surprise per token, -log p.
        num_tokens: Tokens scored.
        window: Tokens of a window; a longer context predicts better.
    """

    name: str
    text: str
    nats: float
    num_tokens: int
    window: int

    @property
    def perplexity(self) -> float:
        """exp(nats): among so many words, all equally likely, the model seems to choose. Lower is better."""
        return _exp(self.nats)

    def _rows(self) -> list[tuple[str, str]]:
        return [("perplexity", f"{self.perplexity:.4g}"), ("nats per token", f"{self.nats:.4f}")]

    def __str__(self) -> str:
        return _as_text(self.name, self._rows(), _measured_on(self))

    def _repr_html_(self) -> str:
        return _as_html(self.name, self._rows(), _measured_on(self))


@dataclass(frozen=True)
class Comparison:
    """How far a model's predictions are from a reference's, over the same tokens.

    Attributes:
        name: The model.
        reference_name: What it is compared with.
        text: The text.
        top1_agreement: Share of tokens after which both expect the same word most.
        kl_divergence: Mean of KL(reference || model) in nats per token; 0 is equal.
        kl_divergence_p99: What 99 of 100 tokens stay below: rare, large errors show here first.
        nats: Mean surprise of the model per token.
        reference_nats: The reference's.
        num_tokens: Tokens scored.
        window: Tokens of a window.
    """

    name: str
    reference_name: str
    text: str
    top1_agreement: float
    kl_divergence: float
    kl_divergence_p99: float
    nats: float
    reference_nats: float
    num_tokens: int
    window: int

    @property
    def perplexity(self) -> float:
        """The model's perplexity."""
        return _exp(self.nats)

    @property
    def reference_perplexity(self) -> float:
        """The reference's perplexity."""
        return _exp(self.reference_nats)

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity over the reference's; 1 is equal, 1.05 five percent worse."""
        return _exp(self.nats - self.reference_nats)

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("top-1 agreement", f"{self.top1_agreement:.2%}"),
            ("KL divergence, mean", f"{self.kl_divergence:.3g} nats"),
            ("KL divergence, 99 %", f"{self.kl_divergence_p99:.3g} nats"),
            ("perplexity", f"{self.perplexity:.4g}"),
            ("perplexity, reference", f"{self.reference_perplexity:.4g}"),
            ("perplexity ratio", f"{self.perplexity_ratio:.4f}"),
        ]

    def __str__(self) -> str:
        return _as_text(f"{self.name} against {self.reference_name}", self._rows(), _measured_on(self))

    def _repr_html_(self) -> str:
        return _as_html(f"{self.name} against {self.reference_name}", self._rows(), _measured_on(self))


def perplexity(
    model,
    text: str | Path | None = None,
    *,
    window: int = 256,
    max_tokens: int = 4096,
    report: Report | None = None,
) -> Perplexity:
    """Measure how well a model predicts a text: exp of its mean surprise per token.

    Args:
        model: A model of `gqk.load`, whatever runs it, or a pair (transformers module, tokenizer).
        text: None for a built-in text, a name of `texts.built_in_names()`, a text, or the Path of a text file.
        window: Tokens of a window. Each begins with <bos> where the model wants one; its first token is context only.
        max_tokens: Tokens of the text to take.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar.

    Raises:
        BadSettingError: Nothing that can be measured, an unreadable or too short text, a number out of range.
        BadOutputError: The model answers NaN.

    Source: llama.cpp's `llama-perplexity` and Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech
        recognition tasks".
    """
    name, scorer = scorer_of(model)
    text = texts.read(text)
    windows = cut_windows(scorer, text, window=window, max_tokens=max_tokens)
    figures = over_windows(windows, lambda ids: score(ids, scorer.logits(ids)), report)
    check_finite(name, figures.nats)
    return Perplexity(name, text.name, mean(figures.nats), len(figures.nats), window)


def compare(
    model,
    reference,
    text: str | Path | None = None,
    *,
    window: int = 256,
    max_tokens: int = 4096,
    report: Report | None = None,
) -> Comparison:
    """Measure how far a model's predictions are from a reference's; both read the same windows in turn.

    Args:
        model: As in `perplexity`.
        reference: What the model was made from, with its weights as they were before.
        text, window, max_tokens, report: As in `perplexity`.

    Warns:
        WrongReferenceWarning: A QAT model against weights that it was not made from.

    Raises:
        BadSettingError: As `perplexity`; also two sizes, two vocabularies, or a reference that reads other tokens.
        BadOutputError: One of them answers NaN.
    """
    (name, ours), (reference_name, theirs) = scorer_of(model), scorer_of(reference)
    check_reference(model, reference)
    text = texts.read(text)
    windows = cut_windows(ours, text, window=window, max_tokens=max_tokens)
    if cut_windows(theirs, text, window=window, max_tokens=max_tokens) != windows:
        raise BadSettingError(
            f"{name} and {reference_name} read {text.name} as different tokens.",
            "Two models are compared token by token, with one tokenizer.",
            "Compare a model with another format of the same model.",
        )
    figures = over_windows(windows, lambda ids: score(ids, ours.logits(ids), theirs.logits(ids)), report)
    return summarize(figures, name, reference_name, text.name, window)


def over_windows(
    windows: Sequence[list[int]], score_window: Callable[[list[int]], TokenFigures], report: Report | None = None
) -> TokenFigures:
    """Return the figures of all windows, one after the other, with a progress in tokens."""
    total, done, parts = sum(map(len, windows)), 0, []
    with nullcontext(report) if report else progress_bar() as shown:
        shown(Progress("measuring", 0, total, "tokens"))
        for ids in windows:
            parts.append(score_window(ids))
            done += len(ids)
            shown(Progress("measuring", done, total, "tokens"))
    return TokenFigures.join(parts)


def summarize(figures: TokenFigures, name: str, reference_name: str, text: str, window: int) -> Comparison:
    """Return the comparison that the figures of single tokens add up to.

    Raises:
        BadOutputError: One of the models answered NaN.
    """
    check_finite(name, figures.nats)
    check_finite(reference_name, figures.reference_nats)
    return Comparison(
        name,
        reference_name,
        text,
        top1_agreement=mean(figures.agrees),
        kl_divergence=mean(figures.divergence),
        kl_divergence_p99=figures.divergence.double().quantile(0.99).item(),
        nats=mean(figures.nats),
        reference_nats=mean(figures.reference_nats),
        num_tokens=len(figures.nats),
        window=window,
    )


def mean(values) -> float:
    """Return the mean of a tensor, summed in float64."""
    return values.double().mean().item()


def sqnr_db(weight, approximation) -> float:
    """Return the signal-to-quantization-noise ratio of a tensor in decibels: 10 log10(sum w² / sum (w - w')²).

    Args:
        weight: Float tensor, any shape.
        approximation: What a format keeps of it, of the same shape.

    Returns:
        Higher is better: 6 dB more are an error of half the size. Infinity where the two are equal.

    Raises:
        BadSettingError: Two shapes.
    """
    if weight.shape != approximation.shape:
        raise BadSettingError(
            f"A weight of shape {tuple(weight.shape)} has no approximation of shape {tuple(approximation.shape)}.",
            "Both have one shape.",
            "Pass the dequantized weight, as in quantize(weight, format).dequantize().",
        )
    weight = weight.detach().float()
    noise = (weight - approximation.detach().float()).double().square().sum().item()
    signal = weight.double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _measured_on(result) -> str:
    return f"Measured on {result.num_tokens:,} tokens of {result.text}, in windows of {result.window}."


def _as_text(title: str, rows: list[tuple[str, str]], note: str) -> str:
    width = max(len(value) for _, value in rows)
    return "\n".join([title, *(f"  {label:<24}{value:>{width}}" for label, value in rows), note])


def _as_html(title: str, rows: list[tuple[str, str]], note: str) -> str:
    title, note = html.escape(title), html.escape(note)
    body = "".join(f'<tr><td>{label}</td><td class="gqk-bytes">{html.escape(value)}</td></tr>' for label, value in rows)
    return (
        f'{PANEL_STYLE}<div class="gqk-panel"><div><strong>{title}</strong></div><table class="gqk-table"><tbody>'
        f'{body}</tbody></table><div class="gqk-dim">{note}</div></div>'
    )
