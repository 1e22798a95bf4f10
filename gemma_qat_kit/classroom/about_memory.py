"""Exercises about memory: what fits, what to change, and a cache by hand. The planner knows the answers."""

from collections.abc import Mapping

from gemma_qat_kit.classroom.problem import Draw, Problem, Verdict, article, as_number, number_problem
from gemma_qat_kit.errors import KitError
from gemma_qat_kit.memory.parts import KEY_VALUES
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import GIB

_STEP = 1024  # tokens that an answer may be below the longest context
_FREE = ("per_layer_table", "logits_chunk_length", "gradient_checkpointing", "gradient_accumulation")  # of quality


def longest_context(draw: Draw) -> Problem:
    """How long a context fits."""
    size, gib = draw.pick(("12B", 10), [("12B", n) for n in (8, 9, 11)] + [("31B", n) for n in (20, 21, 22, 24)])

    def judge(answer: object) -> Verdict:
        tokens = as_number(answer)
        if tokens is None or tokens != int(tokens) or not 1 <= tokens < 2**18:
            return Verdict(False, f"A number of tokens is wanted, a whole one up to {2**18 - 1:,}.")
        fits = [plan_memory(size, "q4_0", context_length=int(tokens) + more, device="cpu").fits(gib * GIB)
                for more in (0, _STEP)]  # fmt: skip
        return Verdict(fits == [True, False], "" if fits == [True, False] else "More fits." if fits[0] else "Too long.")

    return Problem(
        f"How long a context has {size} in `q4_0`, on a machine with {gib} GiB to spare and no GPU? Within 1,024 "
        "tokens "
        "will do.",
        (
            "The weights take the same at any length; only the cache grows. Drag Context in the first panel.",
            'plan_memory(size, "q4_0", context_length=…, device="cpu").fits(…) tells it for one length, and takes '
            "bytes.",
            "Halve the distance: try a length, and go half-way to the last one that did not fit, until they are "
            "1,024 apart.",
        ),
        judge,
    )


def adapter_on_a_card(draw: Draw) -> Problem:
    """Which settings make an adapter fit."""
    length = draw.pick(1024, (896, 960, 1088, 1152))
    gib = 7.6

    def judge(answer: object) -> Verdict:
        if not isinstance(answer, Mapping):
            return Verdict(False, f'Settings are wanted, as in {{"batch_size": 2}}, and this is {article(answer)}.')
        costly = [name for name in answer if name not in _FREE]
        if costly:
            return Verdict(False, f"{str(costly[0])[:40]} is no setting that leaves the training as it is.")
        try:
            plan = plan_memory("E4B", "nf4", device="cuda", **_adapter(length) | dict(answer))
        except (KitError, TypeError) as err:
            return Verdict(False, str(err)[:300])
        largest = plan.largest()
        return Verdict(plan.fits(round(gib * GIB)), f"Still too much: the largest part is {largest.name}.")

    return Problem(
        f"An adapter for E4B in `nf4`, two sequences of {length:,} tokens at once, its per-layer table in memory and "
        "all "
        f"logits at once, wants more than a card of 8 GB has, of which {gib} GiB can be used. Which settings make it "
        "fit, "
        "without another model, other data or another optimizer?",
        (
            "Look at the two largest parts of the plan. Neither is a linear layer.",
            "One of them is looked up, row by row, so it need not lie in memory; of the other only a piece is needed "
            "at a time.",
            "The settings are called per_layer_table and logits_chunk_length; help(gqk.plan_memory) says what they "
            "take.",
        ),
        judge,
        "settings",
    )


def _adapter(length: int) -> dict[str, object]:
    return {"task": "finetune", "batch_size": 2, "sequence_length": length, "per_layer_table": "memory",
            "logits_chunk_length": None}  # fmt: skip


def cache_by_hand(draw: Draw) -> Problem:
    """How large a cache is, by hand."""
    tokens = draw.pick(131_072, range(8192, 262_144, 1024))
    nbytes = plan_memory("12B", "bf16", context_length=tokens).parts[KEY_VALUES]
    return number_problem(
        f"By hand: the key/value cache of 12B in 16 bits after {tokens:,} tokens, in MiB. It has 8 layers that see "
        "everything, each with 1 key/value head of 512 values, and 40 with a window of 1,024 tokens and 8 heads of "
        "256. "
        "Keys and values are kept apart.",
        (
            "Two kinds of layers: in one each token costs the same for ever, in the other no more than a window is "
            "kept.",
            "A value has 2 bytes. A token in a layer: heads × values × 2 bytes, once for the key and once for the "
            "value.",
            f"8 × {tokens:,} × (1 × 512) × 2 × 2 bytes, and for the windows 40 × 1,024 × …; a MiB has 2**20 bytes.",
        ),
        nbytes / 2**20,
        mistakes={
            "Half of it: keys and values are kept apart.": nbytes / 2**21,
            "That is in bytes. A MiB has 2**20 of them.": nbytes,
            "That counts the layers that see everything. The 40 with a window keep something, too.":
                8 * tokens * 512 * 4 / 2**20,
            "A MiB has 2**20 bytes, not a million.": nbytes / 1e6,
            "The 40 layers keep no more than their window.":
                (8 * 512 + 40 * 8 * 256) * tokens * 4 / 2**20,
        },
        tolerance=0.001,
    )  # fmt: skip
