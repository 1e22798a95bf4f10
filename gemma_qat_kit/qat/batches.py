"""Text as windows of tokens: what is trained on, in an order that a seed decides, and a slice that is held out."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.scoring import cut_windows

_MOST_TOKENS = 2**20  # of each text
_HELD_OUT = 8  # windows at most, of all texts together
DEFAULT_TEXTS = ("calibration",)


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, each with the first token that the model wants.

    Attributes:
        sources: Windows to train on, int64 (windows, tokens), one tensor for each text.
        held_out: Windows at the end of the texts that are never trained on, (windows, tokens).
        settings: How many make a batch, and the seed.
    """

    sources: tuple[torch.Tensor, ...]
    held_out: torch.Tensor
    settings: TrainSettings

    @property
    def digest(self) -> str:
        """What tells these windows from all others."""
        found = hashlib.sha256()
        for tokens in (*self.sources, self.held_out):
            found.update(tokens.numpy().tobytes())
        return found.hexdigest()[:16]

    def batch(self, step: int) -> torch.Tensor:
        """Return the windows of an update (rows, tokens), counted from 0: each text in turn, in a shuffled order that
        begins anew when a text is used up. It depends on the seed and the step alone, so a resumed run goes on with it.
        """
        rows = self.settings.rows
        return torch.stack([self._window(step * rows + i) for i in range(rows)])

    def parts(self, step: int, accelerator) -> list[tuple[torch.Tensor, float]]:
        """Return this process's windows of an update, `batch_size` at a time, each with its share of the loss."""
        own = self.batch(step)[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        return [(part, len(part) / len(own)) for part in own.split(self.settings.batch_size)]

    def _window(self, index: int) -> torch.Tensor:
        turn, number = divmod(index, len(self.sources))
        source = self.sources[number]
        epoch, place = divmod(turn, len(source))
        generator = torch.Generator().manual_seed(hash((self.settings.seed, epoch, number)) % 2**63)
        return source[torch.randperm(len(source), generator=generator)[place]]


def read_windows(scorer, text: str | Path | Iterable | None, settings: TrainSettings) -> Windows:
    """Cut texts into windows of tokens.

    Args:
        scorer: Whose tokens and chat template; see `quality.scoring`.
        text: As in `perplexity`, or several of those; one may be conversations, a list of lists of messages (dicts with
            "role" and "content"). None takes `DEFAULT_TEXTS`.
        settings: Length of a window, rows of a batch, seed.

    Raises:
        BadSettingError: A text that cannot be read, or too few tokens to train on and hold some out.
    """
    is_one = isinstance(text, str | Path) or _are_conversations(text)
    several = DEFAULT_TEXTS if text is None else (text,) if is_one else tuple(text)
    if not several:
        raise BadSettingError("There is no text to train on.", "A text, a file or several of them.", "Pass text=None.")
    length = settings.sequence_length
    cut = [_full(cut_windows(scorer, _read(one, scorer), window=length, max_tokens=_MOST_TOKENS), length)
           for one in several]  # fmt: skip
    kept = [max(1, min(_HELD_OUT // len(cut), len(windows) // 5)) for windows in cut]
    sources = tuple(windows[:-count] for windows, count in zip(cut, kept, strict=True))
    if any(len(source) == 0 for source in sources) or sum(map(len, sources)) < settings.rows:
        raise BadSettingError(
            f"The text has {sum(map(len, cut)):,} windows of {length} tokens.",
            f"An update takes {settings.rows}, and each text gives at least one that is held out.",
            "Pass a longer text, or TrainSettings(sequence_length=…) with a smaller number.",
        )
    return Windows(sources, torch.cat([w[-count:] for w, count in zip(cut, kept, strict=True)]), settings)


def _are_conversations(text: object) -> bool:
    first = text[0] if isinstance(text, list) and text else None
    return isinstance(first, list) and all(isinstance(message, dict) for message in first)


def _read(text: object, scorer) -> texts.Text:
    """Return a text, or conversations as this model sees them: in its template, one after the other."""
    if isinstance(text, str | Path) or text is None:
        return texts.read(text)
    tokenizer = getattr(scorer, "tokenizer", None)
    try:
        seen = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in text]
    except Exception as err:  # templates raise what they like
        raise BadSettingError(
            f"Conversations cannot be written as this model sees them: {err or type(err).__name__}.",
            'Each is a list of messages, {"role": "user" or "assistant", "content": text}, for the template it has.',
            "Mend the conversations, or pass their text as one string.",
        ) from err
    first = tokenizer.bos_token or ""
    return texts.Text("the conversations", "".join(one.removeprefix(first) for one in seen))


def _full(windows: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([ids for ids in windows if len(ids) == length], dtype=torch.int64).view(-1, length)
