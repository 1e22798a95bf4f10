"""Settings of a training run: what is refused, how the rate goes, and when the held-out text is measured."""

import math
from fractions import Fraction

import pytest

from gemma_qat_kit.errors import BadSettingError, UnknownNameError
from gemma_qat_kit.qat.settings import TrainSettings

COUNTS = ("num_steps", "batch_size", "gradient_accumulation", "num_evaluations", "patience", "checkpoint_every")
SHARES = ("learning_rate", "scale_learning_rate", "warmup")


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_an_integer_from_one(name, value):
    with pytest.raises(
        BadSettingError, match=rf"{name}={value!r} cannot be used\. It is an integer from 1\. Try {name}="
    ):
        TrainSettings(**{name: value})


@pytest.mark.parametrize("value", [15, 16.0, -1])
def test_a_window_has_16_tokens_or_more(value):
    with pytest.raises(BadSettingError, match=r"sequence_length=.* integer from 16\. Try sequence_length=256"):
        TrainSettings(sequence_length=value)


def test_a_seed_is_no_negative_number():
    assert TrainSettings(seed=0).seed == 0
    with pytest.raises(BadSettingError, match=r"seed=-1 .* from 0"):
        TrainSettings(seed=-1)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.1", None])
@pytest.mark.parametrize("name", SHARES)
def test_a_rate_is_a_number_from_0_to_1(name, value):
    with pytest.raises(BadSettingError, match=rf"{name}=.* number from 0 to 1\. Try {name}="):
        TrainSettings(**{name: value})
    assert getattr(TrainSettings(**{name: 1}), name) == 1


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_hidden_states_have_a_finite_weight(value):
    with pytest.raises(BadSettingError, match="hidden_weight="):
        TrainSettings(hidden_weight=value)


def test_an_unknown_dtype_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"Unknown dtype 'bf16'\. .* Did you mean 'bfloat16'"):
        TrainSettings(dtype="bf16")


def test_rows_of_an_update_are_batches_times_accumulation():
    assert TrainSettings(batch_size=3, gradient_accumulation=5).rows == 15


@pytest.mark.parametrize("num_steps", [20, 72, 1000])
@pytest.mark.parametrize("warmup", [0.1, 0.5])
def test_the_rate_warms_up_evenly_and_falls_as_half_a_cosine(num_steps, warmup):
    settings = TrainSettings(num_steps=num_steps, warmup=warmup)
    rates, num_warm = [settings.rate(step) for step in range(num_steps)], round(warmup * num_steps)
    assert rates[:num_warm] == pytest.approx([(step + 1) / num_warm for step in range(num_warm)])
    assert all(before > after for before, after in zip(rates[num_warm - 1 :], rates[num_warm:], strict=False))
    assert 0 < rates[-1] < 0.03
    assert rates[num_warm + (num_steps - num_warm) // 2] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_every_update_has_a_rate_above_0_and_none_above_the_whole(warmup, num_steps):
    settings = TrainSettings(num_steps=num_steps, warmup=warmup)
    rates = [settings.rate(step) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


@pytest.mark.parametrize(("num_steps", "num_evaluations"), [(72, 4), (10, 3), (5, 5), (3, 7), (1, 1)])
def test_the_held_out_text_is_measured_evenly_and_after_the_last_update(num_steps, num_evaluations):
    settings = TrainSettings(num_steps=num_steps, num_evaluations=num_evaluations)
    marks = [step for step in range(1, num_steps + 1) if settings.evaluates_after(step)]
    assert marks[-1] == num_steps
    assert len(marks) == min(num_steps, num_evaluations)
    gaps = [after - before for before, after in zip([0, *marks], marks, strict=False)]
    assert all(abs(gap - Fraction(num_steps, len(marks))) < 1 for gap in gaps)
