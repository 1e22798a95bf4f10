"""Exercises about training through a grid, and about adapters; two of them take a run as the answer."""

import math
from collections.abc import Callable

from gemma_qat_kit.classroom.problem import Draw, Problem, Verdict, article, number_problem
from gemma_qat_kit.classroom.training import Training, training_of

_BEYOND_SCALES, _SURPRISE_LEFT = 0.10, 0.10


def gradient_of_a_scale(draw: Draw) -> Problem:
    """What one weight adds to the gradient of its scale."""
    scale = draw.pick(0.1, (0.05, 0.04, 0.08, 0.2, 0.25))
    steps = draw.pick(2.3, (1.3, 1.7, 2.2, 2.8, 3.3, 3.7, 4.2, 4.8, 5.3, -1.3, -2.2, -3.7, -4.2))
    weight = round(scale * steps, 6)
    ratio = weight / scale
    gradient = round(ratio) - ratio
    return number_problem(
        f"A weight of {weight} lies on a grid of scale {scale} with codes from -8 to 7. The gradient that arrives at "
        "its "
        "rounded value is 1. What does this weight add to the gradient of the scale, by the rule of the learned step?",
        (
            "Is the weight inside the range of the codes? Then the upper line of the formula counts.",
            "q is the code, so the nearest integer to weight / scale.",
            f"It is q - w / s, with w = {weight} and s = {scale}; mind the sign.",
        ),
        gradient,
        mistakes={
            "The sign is turned: q comes first.": -gradient,
            "That is the code. How far was the weight rounded?": float(round(ratio)),
            "That is in weights; the formula is in steps, so divide by the scale.": gradient * scale,
            "That is the gradient of the weight.": 1.0,
        },
    )


def share_recovered(draw: Draw) -> Problem:
    """Which share of the loss is won back."""
    before = draw.pick(17.2, (12.5, 14.8, 16.1, 18.4, 19.7, 21.3))
    plain = round(before * draw.pick(1.5, (1.25, 1.4, 1.75, 2.0, 2.5)), 1)
    trained = round(before * draw.pick(1.1, (1.05, 1.08, 1.15, 1.2)), 1)
    lost, left = math.log(plain / before), math.log(trained / before)
    share = 100 * (1 - left / lost)
    return number_problem(
        f"On held-out text a model has a perplexity of {before}, by the plain rule one of {plain}, and trained through "
        "the "
        f"grid one of {trained}. How many per cent of the lost log-perplexity did training win back?",
        (
            "Of log-perplexity: take the logarithm of all three first.",
            "What was lost lies between the model before and the plain rule; what was won, between the plain rule and "
            "the trained one.",
            f"100 × (ln {plain} - ln {trained}) / (ln {plain} - ln {before}).",
        ),
        share,
        mistakes={
            "That is the share of the perplexity. Take logarithms first.": 100 * (plain - trained) / (plain - before),
            "That is what is still missing.": 100 - share,
            "Per cent are wanted: a hundred times as much.": share / 100,
        },
    )


def training_beyond_scales(draw: Draw) -> Problem:
    """A run in which training does what scales alone do not."""

    def judge(run: Training) -> Verdict:
        if run.kind != "qat" or run.end is None:
            return Verdict(False, "A run of train_qat is wanted, on a text where the plain rule loses something.")
        won = run.end - run.start
        return Verdict(
            won >= _BEYOND_SCALES,
            f"Scales alone won back {run.start:.0%}, with training it is {run.end:.0%}: {100 * won:+.0f} points.",
        )

    return Problem(
        f"Train so that training itself wins back at least {100 * _BEYOND_SCALES:.0f} points more than careful scales "
        "alone; the answer is the run.",
        (
            "Where careful scales save nearly everything there is little left to win. Which format leaves more?",
            'With fewer levels, as in FORMAT = "int2_g32", scales alone save less.',
            "A handful of steps moves few weights to another code: set STEPS and LENGTH to more, and mind the time.",
        ),
        _of_a_run(judge),
        "run",
    )


def values_of_an_adapter(draw: Draw) -> Problem:
    """How many values an adapter trains."""
    wide, tall = draw.pick((1536, 6144), [(a, b) for a in range(1024, 3073, 256) for b in range(4096, 12289, 1024)])
    rank = draw.pick(16, (4, 8, 12, 24, 32))
    return number_problem(
        f"A linear layer takes {wide:,} values and gives {tall:,}. How many values does an adapter of rank {rank} "
        "train "
        "beside it?",
        (
            "The matrix W stays as it is. Two thin ones are trained.",
            f"B A has the shape of W, and the inner axis of the two has the length {rank}.",
            f"A has {rank} × {wide:,} values. And B?",
        ),
        rank * (wide + tall),
        mistakes={
            "That is all of W.": wide * tall,
            "The two are thin matrices: their sizes are added, not multiplied.": rank * wide * tall,
            "That is one of the two.": rank * wide,
            "That is one of the two matrices.": rank * tall,
        },
        tolerance=0,
    )


def codes_that_move(draw: Draw) -> Problem:
    """How many codes change with dither."""
    num_weights = draw.pick(3200, range(1600, 9601, 320))
    percent = draw.pick(10, (5, 15, 20, 25, 30, 35, 40))
    return number_problem(
        f"{num_weights:,} weights lie exactly on their levels, and training pushes each of them up by {percent} % of a "
        "step. "
        "With dither spread evenly over a step, how many of them take the next code, on average?",
        (
            "Without dither it would be none: less than half a step rounds back.",
            "With dither each weight is moved by a random share of a step, from minus a half to plus a half, and then "
            "rounded. Which share of them ends beyond the half?",
            "On average the whole push has to arrive: so many weights times one step each.",
        ),
        num_weights * percent / 100,
        mistakes={
            "That is so without dither.": 0.0,
            "They would all move by a whole step, ten times and more what was pushed.": float(num_weights),
            "A push has one direction: do not halve it.": num_weights * percent / 200,
        },
        tolerance=0.02,
    )


def a_habit_learnt(draw: Draw) -> Problem:
    """A run after which the model knows the form of a ticket."""

    def judge(run: Training) -> Verdict:
        if run.kind != "finetune" or run.end is None:
            return Verdict(False, "A run of finetune is wanted.")
        left = run.nats[run.kept] / run.nats[0]
        return Verdict(
            left <= _SURPRISE_LEFT, f"The surprise at held-out answers fell to {left:.0%} of what it was before."
        )

    return Problem(
        f"Fine-tune until the surprise at held-out answers is at most {_SURPRISE_LEFT:.0%} of what it was before; the "
        "answer "
        "is the run.",
        (
            "The table of a run has the surprise of each look at held-out conversations, the first before training.",
            "More steps, or a larger LEARNING_RATE; twice as much is a usual next try.",
            "Look at the curve: if it turns up again, there are too few conversations, not too few steps.",
        ),
        _of_a_run(judge),
        "run",
    )


def _of_a_run(judge: Callable[[Training], Verdict]) -> Callable[[object], Verdict]:
    def judge_run(answer: object) -> Verdict:
        run = training_of(answer)
        if run is None:
            return Verdict(False, f"A run is wanted, as panel.run() returns it, and this is {article(answer)}.")
        return judge(run)

    return judge_run
