"""The built-in model as a torch network, loaded once for every test file that asks for it."""

import functools

import gemma_qat_kit as gqk

FEWER_TOKENS = """
from gemma_qat_kit.quality.post_training import collect_importance
collect_importance.__kwdefaults__["max_tokens"] = 1024
"""
"""What a process runs first that needs importance, though not its last digit: the default takes half a minute."""


@functools.cache
def loaded():
    """Return the model; a test that changes its weights puts them back."""
    return gqk.load("smollm2-135m", "float32", report=lambda progress: None)


class TableScorer:
    """A model of two or more words whose logits are a table: row i is what it expects after token i, whatever came
    before. It reads a text as one token per character, its code modulo the number of words."""

    context_length, device = 512, "cpu"

    def __init__(self, table, start=()):
        self.table, self.start, self.asked = table, list(start), []

    def tokenize(self, text):
        return self.start + [ord(character) % len(self.table) for character in text]

    def logits(self, ids):
        self.asked.append(list(ids))
        return self.table[ids].clone()


class TableModel:
    """A gqk Model as far as measuring goes."""

    is_closed = False

    def __init__(self, table, *, size=None, format="bf16", start=()):
        self.runner, self.size, self.format = TableScorer(table, start), size, format
        self.name = f"{size or 'table'} {format}"
