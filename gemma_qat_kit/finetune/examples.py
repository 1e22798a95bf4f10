"""Conversations as the model sees them: tokens in its own template, of which the assistant's turns are learnt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.finetune.conversations import Conversation

IGNORED = -100  # the label of a token that is not learnt, in torch and transformers alike


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        ids: Tokens.
        is_learnt: Of each token, whether the loss asks for it.
        is_cut: Whether it was longer than there is room.
    """

    ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]
    is_cut: bool = False

    @property
    def num_learnt(self) -> int:
        """Tokens that the loss asks for; the first one of a text is never asked for."""
        return sum(self.is_learnt[1:])


@dataclass(frozen=True)
class Examples:
    """A dataset that is ready for training.

    Attributes:
        train: What is learnt from.
        held_out: The last rows, never learnt from.
        num_cut: Conversations that were longer than there is room; their end is missing.
        num_empty: Of these, those of which nothing was left to learn; they are left out.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    num_cut: int = 0
    num_empty: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(len(example.ids) for example in (*self.train, *self.held_out))

    @property
    def digest(self) -> str:
        """What tells these examples from all others."""
        found = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            found.update(repr((example.ids, example.is_learnt)).encode())
        return found.hexdigest()[:16]

    def __str__(self) -> str:
        cut = f"; {self.num_cut:,} were cut" if self.num_cut else ""
        empty = f", {self.num_empty:,} of these left out, since nothing was left to learn" if self.num_empty else ""
        learnt = sum(example.num_learnt for example in self.train)
        held_out = f"{len(self.held_out):,} held out"
        return f"{len(self.train):,} conversations with {learnt:,} tokens to learn, {held_out}{cut}{empty}."


@dataclass(frozen=True)
class Batch:
    """Examples side by side, filled up on the right.

    Attributes:
        ids: int64 (rows, tokens).
        labels: int64 (rows, tokens): the same ids where they are learnt, else `IGNORED`.
        mask: int64 (rows, tokens): 1 where there is a token.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor

    @property
    def num_learnt(self) -> int:
        """Tokens that the loss asks for."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def make_batch(examples: Sequence[Example], pad: int, device) -> Batch:
    """Put examples side by side."""
    length = max(len(example.ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        room = length - len(example.ids)
        ids.append([*example.ids, *[pad] * room])
        learnt = zip(example.ids, example.is_learnt, strict=True)
        labels.append([*(number if wanted else IGNORED for number, wanted in learnt), *[IGNORED] * room])
        mask.append([1] * len(example.ids) + [0] * room)
    return Batch(*(torch.tensor(rows, device=device) for rows in (ids, labels, mask)))


def make_examples(conversations: Sequence[Conversation], tokenizer, length: int) -> Examples:
    """Write conversations in a tokenizer's template, cut them to a length and hold some out.

    Args:
        conversations: As `read_conversations` returns them.
        tokenizer: A fast one of transformers, with a chat template.
        length: Tokens of an example, at most.

    Raises:
        BadSettingError: The template does not show where an answer begins, or nothing is left to learn.
    """
    found = [_example(conversation, tokenizer, length) for conversation in conversations]
    kept = [example for example in found if example.num_learnt]
    if not kept:
        raise BadSettingError(
            f"Nothing is left to learn: the first {length:,} tokens of every conversation are questions.",
            "An answer must begin in them.",
            f"Try sequence_length={4 * length}.",
        )
    num_held_out = min(32, len(kept) // 5)
    cut = len(kept) - num_held_out
    return Examples(tuple(kept[:cut]), tuple(kept[cut:]), sum(e.is_cut for e in found), len(found) - len(kept))


def _example(conversation: Conversation, tokenizer, length: int) -> Example:
    text, spans = written(conversation, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_learnt = [any(start <= first < end for start, end in spans) for first, _ in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return Example(tuple(ids[:length]), tuple(is_learnt[:length]), len(ids) > length)


def written(conversation: Conversation, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation in the template, and where in it the assistant's turns begin and end, end marks included.

    The template itself tells: a turn begins where the text that asks for it ends, and ends where the next one begins.

    Raises:
        BadSettingError: The template cannot write it, or does not show where an answer begins.
    """
    text, spans = _in_template(conversation, tokenizer), []
    for number, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = _in_template(conversation[:number], tokenizer, add_generation_prompt=True) if number else ""
        start = _num_common(asked, text)
        end = _num_common(_in_template(conversation[: number + 1], tokenizer), text)
        if message["content"].strip() not in text[start:end]:
            raise BadSettingError(
                "The chat template does not show where an answer begins.",
                "What it writes to ask for an answer must be what it writes before one.",
                "Take the tokenizer of an instruction-tuned checkpoint.",
            )
        spans.append((start, end))
    return text, spans


def _num_common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _in_template(messages: Conversation, tokenizer, **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as err:  # templates raise what they like
        raise BadSettingError(
            f"The chat template cannot write a conversation: {err}.",
            "Most want user and assistant in turn, after at most one system message.",
            "Mend the conversation, or take a tokenizer with another template.",
        ) from err
