"""Training: it helps, it keeps the best point, it tells what happens, and it can be stopped at any moment."""

import time

import pytest
import torch
from small_network import TEXT, logits, make_pair
from small_training import SETTINGS, WORDS, ready, surprise, train, values, weights

from gemma_qat_kit.errors import BadOutputError, BadSettingError, CancelledError
from gemma_qat_kit.formats.quantized import quantize
from gemma_qat_kit.qat.batches import read_windows
from gemma_qat_kit.qat.fake_quantizer import FLOAT, computing, masters
from gemma_qat_kit.qat.prepare import count_trained
from gemma_qat_kit.qat.run import Evaluation, Lines, Step
from gemma_qat_kit.quality.post_training import linears, scorer_of_module

HARMFUL = {"learning_rate": 1.0, "scale_learning_rate": 1.0, "warmup": 0.0}
STOPS = pytest.mark.parametrize("error", [CancelledError("Stopped.", "", ""), KeyboardInterrupt()])


def at(event, step):
    """Return a watch that calls `event` after so many updates."""

    def watch(seen):
        if isinstance(seen, Step) and seen.step == step:
            event()

    return watch


def raising(error):
    def event():
        raise error

    return event


def test_training_brings_the_model_nearer_to_what_it_was():
    run = train(ready(), num_steps=12)
    losses = [step.loss for step in run.steps]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert run.best.kl_divergence < 0.8 * run.evaluations[0].kl_divergence
    assert [step.step for step in run.steps] == list(range(1, 13))
    assert run.ended == "Ran to its end."


def test_the_first_loss_is_the_divergence_of_the_first_batch():
    pair, twin = ready(), make_pair()
    ids = read_windows(scorer_of_module(pair), WORDS, SETTINGS).batch(0)
    with torch.no_grad():
        ours, theirs = (model[0](ids, use_cache=False).logits.double().log_softmax(-1) for model in (pair, twin))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert train(pair, num_steps=1).steps[0].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rates", [{}, HARMFUL], ids=["helpful", "harmful"])
@pytest.mark.parametrize("format", ["int2_g32", "q4_0", "mobile_int4"])
def test_the_model_is_left_at_its_best_point(format, rates):
    pair = ready(format)
    run = train(pair, **rates)
    assert run.best is min(run.evaluations, key=lambda evaluation: evaluation.kl_divergence)
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5)
    assert run.best.kl_divergence <= run.lines.plain.kl_divergence * 1.05  # another rule for halves


def test_a_run_that_only_harms_ends_where_it_began():
    pair = ready()
    before = logits(pair[0])
    run = train(pair, **HARMFUL)
    assert run.best is run.evaluations[0]
    assert all(evaluation.kl_divergence > run.best.kl_divergence for evaluation in run.evaluations[1:])
    assert torch.equal(logits(pair[0]), before)


def test_a_search_that_did_worse_than_the_plain_rule_is_given_up():
    pair = ready("q4_0")
    with torch.no_grad():
        for _, quantizer in masters(pair[0]).values():
            quantizer.scale.mul_(3)
    run = train(pair, **HARMFUL)
    assert run.evaluations[0].step == 0
    assert run.evaluations[0].kl_divergence == pytest.approx(run.lines.plain.kl_divergence, rel=0.05)
    assert len([evaluation for evaluation in run.evaluations if evaluation.step == 0]) == 1


def test_the_lines_are_the_model_before_and_by_the_plain_rule():
    run, twin = train(ready("q4_0"), num_steps=1), make_pair()
    assert run.lines.float_nats == pytest.approx(surprise(twin), rel=1e-5)
    with torch.no_grad():
        for weight in linears(twin[0]).values():
            weight.copy_(quantize(weight, "q4_0").dequantize())
        twin[0].lm_head.weight.copy_(quantize(twin[0].lm_head.weight, "q8_0").dequantize())
    assert run.lines.plain.nats == pytest.approx(surprise(twin), rel=1e-5)


def test_the_watch_sees_everything_in_the_order_of_its_happening():
    seen = []
    run = train(ready(), watch=seen.append)
    assert [type(event) for event in seen[:3]] == [Lines, Evaluation, Step]
    assert seen[0] == run.lines
    assert tuple(event for event in seen if isinstance(event, Step)) == run.steps
    assert tuple(event for event in seen if isinstance(event, Evaluation)) == run.evaluations
    assert [event.step for event in seen[1:]] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_step_takes_its_own_time_alone():
    def watch(event):
        time.sleep(0.05)  # as a pause does

    started = time.perf_counter()
    run = train(ready(), watch=watch)
    assert sum(step.seconds for step in run.steps) < time.perf_counter() - started - 0.05 * len(run.steps)


def test_the_report_goes_from_the_first_update_to_the_last():
    seen = []
    train(ready(), report=seen.append)
    assert [progress.done_bytes for progress in seen if progress.stage == "training"] == list(range(7))
    assert {(progress.total_bytes, progress.unit) for progress in seen} == {(6, "steps")}


@STOPS
def test_stopping_keeps_the_best_point_and_leaves_nothing_half_done(error):
    pair = ready()
    run = train(pair, watch=at(raising(error), 5))
    assert len(run.steps) == 5
    assert run.ended == "Stopped by you."
    assert run.best.step in (2, 4)
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5)
    assert not pair[0].training
    assert all(parameter.grad is None for parameter in pair[0].parameters())
    assert all(quantizer.mode == "grid" for _, quantizer in masters(pair[0]).values())


@STOPS
def test_stopping_before_anything_was_measured_leaves_the_model_as_it_was(error):
    pair = ready()
    before = values(pair)

    def stop(event):
        raise error

    with pytest.raises(type(error)):
        train(pair, watch=stop)
    assert all(torch.equal(before[name], now) for name, now in values(pair).items())


@STOPS
def test_stopping_before_the_first_update_moves_nothing_so_that_any_run_may_follow(error):
    pair = ready()
    before = values(pair)
    run = train(pair, teacher=None, watch=lambda event: raising(error)() if isinstance(event, Evaluation) else None)
    assert not run.steps
    assert all(torch.equal(before[name], now) for name, now in values(pair).items())
    assert len(train(pair, teacher=None, num_steps=1).steps) == 1


def test_the_report_may_stop_a_run_too():
    def stop(progress):
        if progress.stage == "training" and progress.done_bytes == 3:
            raise CancelledError("Stopped.", "", "")

    assert len(train(ready(), report=stop).steps) == 3


def test_training_ends_when_evaluations_get_no_better():
    run = train(ready(), num_evaluations=6, patience=2, **HARMFUL)
    assert len(run.steps) == 2
    assert run.ended == "Stopped after 2 steps: the last 2 evaluations were no better."


def test_a_nan_names_its_step_and_leaves_the_best_point():
    pair = ready()

    def poison():
        with torch.no_grad():
            next(iter(masters(pair[0]).values()))[0][0, 0] = torch.nan

    evaluations = []

    def watch(event):
        if isinstance(event, Evaluation):
            evaluations.append(event)
        at(poison, 3)(event)

    with pytest.raises(BadOutputError, match=r'The loss is nan at step 4\. .*dtype="float32".* best point') as caught:
        train(pair, watch=watch)
    assert isinstance(caught.value, ArithmeticError)
    assert all(parameter.grad is None for parameter in pair[0].parameters())
    assert surprise(pair) == pytest.approx(min(evaluations, key=lambda e: e.kl_divergence).nats, rel=1e-5)


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(BadSettingError, match=r'not prepared\. .*prepare_qat\(model, "q4_0"\) first'):
        train(make_pair())


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(BadSettingError, match="longer text"):
        train(ready(), TEXT[:100])


@pytest.mark.parametrize("text", [None, (WORDS, TEXT[5000:8000])])
def test_a_built_in_text_or_several_will_do(text):
    assert len(train(ready(), text, num_steps=1).steps) == 1


def test_accumulated_batches_make_the_update_of_one_large_batch():
    seen = {}
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        pair, kept = ready(), []
        run = train(pair, batch_size=batch_size, gradient_accumulation=accumulation, num_steps=3,
                    watch=lambda event, pair=pair, kept=kept: kept.append(values(pair)))  # fmt: skip
        seen[batch_size] = [step.loss for step in run.steps], kept[2]  # after lines, evaluation and one update
    start = values(ready())
    for losses, moved in (seen[2], seen[1]):
        assert losses == pytest.approx(seen[4][0], rel=1e-3)
        for name, expected in seen[4][1].items():
            # Adam's first update is the sign of a gradient, so one in a thousand may be of rounding alone.
            far = (moved[name] - expected).abs() > 0.1 * (expected - start[name]).abs().max()
            assert far.float().mean() < 2e-3, name


def test_an_update_moves_weights_by_the_rate_in_steps_of_their_grid():
    pair, after = ready(), []
    before = values(pair)
    steps = {name: quantizer.scale.abs().median().item() for name, (_, quantizer) in masters(pair[0]).items()}
    train(pair, num_steps=1, warmup=0.0, learning_rate=0.02, scale_learning_rate=0.004,
          watch=lambda event: after.append(values(pair)))  # fmt: skip
    for name, step in steps.items():
        prefix = name.removesuffix("weight") + "parametrizations.weight."
        for last, rate in (("original", 0.02), ("0.scale", 0.004)):
            moved = (after[2][prefix + last] - before[prefix + last]).abs()
            assert moved.max().item() == pytest.approx(rate * step, rel=1e-3)
            assert moved.median().item() == pytest.approx(rate * step, rel=1e-2)


def test_scales_that_are_not_learnt_stay():
    pair = ready(learn_scales=False)
    before = {name: quantizer.scale.clone() for name, (_, quantizer) in masters(pair[0]).items()}
    train(pair)
    assert all(torch.equal(before[name], quantizer.scale) for name, (_, quantizer) in masters(pair[0]).items())


def test_the_ranges_of_mobile_are_trained_too():
    pair = ready("mobile", calibration=TEXT[:400])
    before = values(pair)
    run = train(pair)
    now = values(pair)
    assert run.best.step > 0
    assert run.num_trained == count_trained(pair) == sum(value.numel() for value in before.values())
    moved = [name for name in now if not torch.equal(now[name], before[name])]
    assert {"original", "0.scale", "input_range.scale", "output_range.scale"} <= {
        last for name in moved for last in (name.rsplit(".", 2)[-1], ".".join(name.rsplit(".", 2)[-2:]))
    }
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5)


def test_embeddings_are_trained_where_they_were_prepared_for_it():
    pair = ready(embeddings=True)
    before = weights(pair)["model.embed_tokens.weight"]
    run = train(pair)
    assert run.best.step > 0
    assert not torch.equal(weights(pair)["model.embed_tokens.weight"], before)
    assert torch.equal(pair[0].lm_head.weight, pair[0].model.embed_tokens.weight)
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5)


def test_a_run_is_the_same_each_time():
    first, second = (train(pair := ready()) and values(pair) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_nothing_but_memory():
    pair = ready()
    losses = [[step.loss for step in train(ready(), gradient_checkpointing=on).steps] for on in (False, True)]
    assert losses[0] == losses[1]
    train(pair, num_steps=1, gradient_checkpointing=True)
    assert not pair[0].is_gradient_checkpointing


def test_a_second_run_still_knows_the_model_before_quantization():
    pair, twin = ready(), make_pair()
    runs = [train(pair) for _ in range(2)]
    assert runs[1].lines.float_nats == runs[0].lines.float_nats
    assert runs[1].evaluations[0].kl_divergence == pytest.approx(runs[0].best.kl_divergence, rel=1e-5)
    with computing(pair[0], FLOAT):
        assert surprise(pair) == pytest.approx(surprise(twin), rel=1e-6)


@pytest.mark.parametrize("teacher", [None, "cache"])
def test_a_second_run_without_the_weights_of_before_is_refused(teacher):
    pair = ready()
    train(pair, teacher=teacher)
    with pytest.raises(BadSettingError, match=r"trained already.*teacher=\"memory\" keeps.*Load and prepare"):
        train(pair, teacher=teacher)
