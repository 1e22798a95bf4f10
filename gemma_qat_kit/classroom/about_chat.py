"""Exercises about the pace of answers: what bounds it, and what thinking costs."""

from gemma_qat_kit.classroom.problem import Draw, Problem, number_problem
from gemma_qat_kit.memory.parts import EMBEDDINGS, TEXT_LAYERS
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import GIB


def fastest_pace(draw: Draw) -> Problem:
    """How many tokens a second memory allows."""
    size = draw.pick("12B", ("E2B", "E4B", "12B", "31B"))
    bandwidth = draw.pick(50, range(20, 130, 5))
    parts = plan_memory(size, "q4_0", device="cuda").parts
    gib = round((parts[TEXT_LAYERS] + parts[EMBEDDINGS]) / GIB, 2)
    pace = bandwidth * 1e9 / (gib * GIB)
    return number_problem(
        f"For each new token {size} in `q4_0` reads {gib} GiB of weights, all of them once. Memory delivers "
        f"{bandwidth} GB/s, "
        "10⁹ bytes each. How many tokens a second can one conversation have at most?",
        (
            "Arithmetic is faster than memory here: count how often a second the weights can be read.",
            "Bytes a second, divided by bytes a token.",
            f"A GiB has 2**30 bytes: {bandwidth} × 10**9 / ({gib} × 2**30).",
        ),
        pace,
        mistakes={
            "Nearly: a GiB has 2**30 bytes, a GB 10**9.": bandwidth / gib,
            "That is seconds a token. Turn it around.": 1 / pace,
        },
    )


def waiting_for_thoughts(draw: Draw) -> Problem:
    """How long a reader waits while a model thinks."""
    thoughts = draw.pick(600, range(250, 1500, 50))
    pace = draw.pick(12, (5, 6, 8, 10, 15, 16, 20, 25))
    answer = draw.pick(150, range(80, 320, 20))
    return number_problem(
        f"A model writes {pace} tokens a second. It thinks for {thoughts:,} tokens and then answers with {answer}. How "
        "many "
        "seconds pass before the first word of the answer? Leave out the time that the question takes to be read.",
        (
            "Thoughts are tokens like all others, made one after the other.",
            "What comes after the first word of the answer does not count.",
            "Tokens divided by tokens a second.",
        ),
        thoughts / pace,
        mistakes={
            "That is until the last word of the answer.": (thoughts + answer) / pace,
            "That is the answer alone: the thoughts come first.": answer / pace,
        },
        tolerance=0.02,
    )
