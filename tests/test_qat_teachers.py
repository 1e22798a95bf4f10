"""Who is matched: the model itself, in memory or as its likeliest words, another model, or the text alone."""

import pytest
import torch
from small_network import WORDS as VOCABULARY
from small_network import make_pair
from small_training import SETTINGS, WORDS, ready, surprise, train, weights
from torch.nn import functional

from gemma_qat_kit.errors import BadSettingError, CancelledError, UnknownNameError
from gemma_qat_kit.qat import teachers
from gemma_qat_kit.qat.batches import read_windows
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.quality.post_training import scorer_of_module


def losses(run):
    return [step.loss for step in run.steps]


@pytest.fixture(scope="module")
def by_memory():
    """The losses and weights of a run whose teacher is the model before quantization."""
    pair = ready()
    return losses(train(pair)), weights(pair)


def test_another_model_with_the_same_weights_is_the_same_teacher(by_memory):
    pair = ready()
    assert losses(train(pair, teacher=make_pair())) == pytest.approx(by_memory[0], rel=1e-4)
    assert all(quantizer.reference is None for _, quantizer in masters(pair[0]).values())
    assert losses(train(ready(), teacher=make_pair()[0])) == pytest.approx(by_memory[0], rel=1e-4)


def test_another_teacher_teaches_something_else(by_memory):
    assert losses(train(ready(), teacher=make_pair(seed=1)))[0] > 1.5 * by_memory[0][0]


def test_a_cache_of_every_word_teaches_the_same(by_memory, monkeypatch):
    monkeypatch.setattr(teachers, "_TOP", VOCABULARY)
    assert losses(train(ready(), teacher="cache")) == pytest.approx(by_memory[0], rel=1e-3)


def test_a_cache_of_the_likeliest_words_says_less_and_helps_too(by_memory):
    run = train(ready(), teacher="cache")
    assert 0.3 * by_memory[0][0] < losses(run)[0] < by_memory[0][0]
    assert run.best.kl_divergence < run.evaluations[0].kl_divergence


def test_a_cache_asks_once_for_each_window_and_may_be_stopped():
    seen = []
    train(ready(), teacher="cache", num_steps=40, patience=1, num_evaluations=40, learning_rate=1.0, report=seen.append)
    asked = [progress for progress in seen if progress.stage == "asking the teacher"]
    pair = ready()
    distinct = len(read_windows(scorer_of_module(pair), WORDS, SETTINGS).sources[0])
    assert [progress.done_bytes for progress in asked] == list(range(distinct + 1))
    assert {progress.unit for progress in asked} == {"windows"}

    def stop(progress):
        raise CancelledError("Stopped.", "", "")

    before = weights(pair)
    with pytest.raises(CancelledError):
        train(pair, teacher="cache", report=stop)
    assert all(torch.equal(before[name], weight) for name, weight in weights(pair).items())


def test_without_a_teacher_the_text_is_learnt():
    pair = ready()
    ids = read_windows(scorer_of_module(pair), WORDS, SETTINGS).batch(0)
    with torch.no_grad():
        logits = pair[0](ids, use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    run = train(pair, teacher=None, num_steps=10)
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert run.best is min(run.evaluations, key=lambda evaluation: evaluation.nats)
    assert run.best.nats < 0.9 * run.evaluations[0].nats
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5)


def test_hidden_states_are_compared_where_they_have_a_weight(by_memory):
    pair, twin = ready(), make_pair()
    ids = read_windows(scorer_of_module(pair), WORDS, SETTINGS).batch(0)
    with torch.no_grad():
        ours, theirs = (
            model[0](ids, use_cache=False, output_hidden_states=True).hidden_states for model in (pair, twin)
        )
    distances = [((a - b).square().mean(-1) / b.square().mean(-1)).mean() for a, b in zip(ours, theirs, strict=True)]
    expected = by_memory[0][0] + 2.5 * torch.stack(distances[1:]).mean().item()
    assert losses(train(pair, hidden_weight=2.5))[0] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_with_another_vocabulary_is_refused():
    with pytest.raises(BadSettingError, match=r"The teacher knows 600 words, the model 512\. .*same family"):
        train(ready(), teacher=make_pair(vocab_size=600))


def test_an_unknown_teacher_gets_a_suggestion():
    with pytest.raises(
        UnknownNameError, match=r"Unknown teacher 'memoy'\. Known: memory, cache\. Did you mean 'memory'"
    ):
        train(ready(), teacher="memoy")


def test_a_teacher_that_is_no_model_is_refused():
    with pytest.raises(BadSettingError, match="cannot be measured"):
        train(ready(), teacher=7)
