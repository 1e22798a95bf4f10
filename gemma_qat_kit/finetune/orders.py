"""A small task for a first fine-tuning: a spoken coffee order becomes one line of a ticket, whatever its words.

A base model answers with small talk; a few minutes of training make it write tickets, and whether one is right can be
counted. Names of the held-out rows never occur in training.
"""

import random

from gemma_qat_kit.finetune.conversations import Conversation

_TRAINED_NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kim", "Liam",
                  "Maya", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Victor")  # fmt: skip
_HELD_OUT_NAMES = ("Alma", "Boris", "Clara", "Dante", "Elif", "Felix", "Gita", "Henry", "Ivan", "Julia")
_DRINKS = ("latte", "espresso", "cappuccino", "flat white", "hot chocolate", "green tea", "iced coffee", "mocha")
_SIZES = ("small", "medium", "large")
_COUNTS = (("a", 1), ("two", 2), ("three", 3), ("four", 4))
_PLACES = (("to go", "TO GO"), ("to drink here", "HERE"))
_PHRASES = (
    "Hi, this is {name}. Could I get {count} {size} {drink}{s} {place}, please?",
    "{count} {size} {drink}{s} for {name}, {place}.",
    "My name is {name} and I would like {count} {size} {drink}{s} {place}.",
    "Good morning! {name} here. I'll take {count} {size} {drink}{s}, {place}, thank you.",
    "Please make {count} {size} {drink}{s} {place} for {name}.",
    "Can you put {count} {size} {drink}{s} {place} on the bill of {name}?",
)


def orders(num_rows: int = 160, *, held_out: bool = False, seed: int = 0) -> list[Conversation]:
    """Return conversations of one order and its ticket, such as "Ana | 2 x latte | large | TO GO".

    Args:
        num_rows: How many.
        held_out: With names that no other row has.
        seed: Of the words that are drawn.
    """
    draw = random.Random(f"{held_out} {seed}")
    return [_order(draw, _HELD_OUT_NAMES if held_out else _TRAINED_NAMES) for _ in range(num_rows)]


def _order(draw: random.Random, names: tuple[str, ...]) -> Conversation:
    name, drink, size = draw.choice(names), draw.choice(_DRINKS), draw.choice(_SIZES)
    (word, count), (place, mark) = draw.choice(_COUNTS), draw.choice(_PLACES)
    words = {"name": name, "drink": drink, "size": size, "place": place, "s": "s" if count > 1 else "", "count": word}
    spoken = draw.choice(_PHRASES).format(**words)
    ticket = f"{name} | {count} x {drink} | {size} | {mark}"
    return [{"role": "user", "content": spoken[0].upper() + spoken[1:]}, {"role": "assistant", "content": ticket}]
