"""Exercises about one matrix and one group: how many bytes, which scale, which code."""

import math

from gemma_qat_kit.classroom.problem import Draw, Problem, number_problem
from gemma_qat_kit.layouts import GROUP_BYTES


def bytes_of_a_matrix(draw: Draw) -> Problem:
    """How many bytes a matrix takes in Q4_0."""
    rows = draw.pick(1536, range(1024, 4097, 64))
    columns = draw.pick(6144, range(2048, 16385, 256))
    nbytes, group_size = GROUP_BYTES["Q4_0"]
    return number_problem(
        f"A matrix has {rows:,} rows of {columns:,} weights. How many bytes does it take in Q4_0?",
        (
            "A group of 32 weights has 32 codes of four bits, and something that they share.",
            "The scale of a group is a float16. Add it to the codes, then count the groups.",
            f"Groups: {rows:,} × {columns:,} / 32. Each takes the bytes that the panel BitExplorer() shows at its "
            "bottom.",
        ),
        rows * columns // group_size * nbytes,
        mistakes={
            "That is the codes alone. Each group also stores its scale.": rows * columns / 2,
            "That is 16 bits a weight: the matrix before it is quantized.": rows * columns * 2,
            "These are bits. A byte has eight.": rows * columns // group_size * nbytes * 8,
            "A scale is a float16 of 2 bytes here, not a float32.": rows * columns // group_size * (nbytes + 2),
        },
        tolerance=0,
    )


def scale_of_a_group(draw: Draw) -> Problem:
    """Which scale the plain rule gives a group."""
    peak = draw.pick(0.36, (0.2, 0.24, 0.28, 0.32, 0.44, 0.48, 0.52, 0.56, 0.6, 0.72))
    other = -round(peak * draw.pick(0.75, (0.25, 0.5, 0.625, 0.875)), 4)
    scale = _scale(peak)
    return number_problem(
        f"In a group of 32 weights the largest is {peak}, the smallest {other}. Which scale does Q4_0's plain rule "
        "give it?",
        (
            "The codes go from -8 to 7, and the weight that is largest in magnitude shall keep its value.",
            "Of the two ends only -8 is a power of two and has the larger magnitude, so the rule gives that code to "
            "it.",
            "w ≈ scale × code, with the code -8 for the weight of largest magnitude, its sign included.",
        ),
        scale,
        mistakes={
            "Its size is right. Look at the sign: which code does the largest weight get?": -scale,
            "That puts the largest weight at 7. The rule puts it at the other end.": peak / 7,
            "That spreads the range over 15 steps. The rule looks at one weight only.": (peak - other) / 15,
            "That spreads the range over 16 steps. The rule looks at one weight only.": (peak - other) / 16,
        },
    )


def code_of_a_weight(draw: Draw) -> Problem:
    """Which code a weight of that group gets."""
    peak = draw.pick(0.36, (0.2, 0.24, 0.28, 0.32, 0.44, 0.48, 0.52, 0.56, 0.6, 0.72))
    steps = draw.pick(-4.3, (-6.3, -5.7, -5.2, -4.8, -3.7, -3.2, 2.8, 3.3, 4.2, 4.7, 5.3, 5.8))
    scale = _scale(peak)
    weight = round(steps * scale, 5)
    code = math.trunc(weight / scale + 8.5) - 8
    return number_problem(
        f"The largest weight of a group is {peak}, and no other is as large in magnitude. Which code does Q4_0's plain "
        f"rule give the weight {weight}?",
        (
            "First the scale, as in the exercise before; then see how many of it the weight is.",
            "The code is the nearest integer to weight / scale, from -8 to 7.",
            "Mind the sign of the scale: it turns the sign of the code.",
        ),
        code,
        mistakes={
            "The sign is turned: the scale of this group is negative.": -code,
            "That is the half byte as it is stored; the code is 8 less.": code + 8,
            "Nearly: round to the nearest integer, not down.": code + (1 if weight / scale < code else -1),
        },
        tolerance=0,
    )


def _scale(peak: float) -> float:
    """Return the scale of the plain rule, before it is stored as a float16."""
    return peak / -8
