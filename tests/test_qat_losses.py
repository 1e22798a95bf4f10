"""The losses against torch's own, their gradients against autograd, and what a few likely words say of the whole."""

import pytest
import torch
from torch.nn import functional

from gemma_qat_kit.qat.losses import cross_entropy, distillation, distillation_from_top, hidden_distance

TOKENS, WORDS = 150, 40  # more than the rows that are computed at a time


def random(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(logits, teacher):
    """Return KL(teacher || model) a token as torch has it, in float64."""
    return functional.kl_div(
        logits.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="batchmean", log_target=True
    )


def with_gradient(loss, logits, *others):
    logits = logits.clone().requires_grad_()
    found = loss(logits, *others)
    (3 * found).backward()  # a factor, as accumulation has it
    return found.detach(), logits.grad


def test_distillation_is_torchs_divergence_with_autograds_gradient():
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    found, gradient = with_gradient(distillation, logits, teacher)
    expected, by_autograd = with_gradient(kl, logits, teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-8)


def test_a_model_that_says_the_same_loses_nothing():
    logits = random(TOKENS, WORDS)
    found, gradient = with_gradient(distillation, logits, logits + 5)  # a constant changes no probability
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-7


def test_a_word_that_the_teacher_rules_out_adds_nothing():
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    teacher[:, 7] = -torch.inf
    found, gradient = with_gradient(distillation, logits, teacher)
    probabilities = teacher.double().softmax(-1)
    terms = probabilities * (probabilities.log() - logits.double().log_softmax(-1))
    assert found.item() == pytest.approx(terms.nan_to_num(0).sum(-1).mean().item(), rel=1e-5)
    assert torch.isfinite(gradient).all()


def test_logits_in_16_bits_get_a_gradient_in_16_bits():
    logits, teacher = random(TOKENS, WORDS).bfloat16(), random(TOKENS, WORDS, seed=1).bfloat16()
    found, gradient = with_gradient(distillation, logits, teacher)
    assert found.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert found.item() == pytest.approx(kl(logits, teacher).item(), rel=1e-5)


def test_a_nan_is_not_hidden():
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    logits[70, 3] = torch.nan
    assert distillation(logits, teacher).isnan()


def top(teacher, k):
    shares, words = teacher.log_softmax(-1).topk(k)
    return words, shares


@pytest.mark.parametrize("k", [1, 5, WORDS - 1])
def test_the_likeliest_words_say_no_more_than_all(k):
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    found = distillation_from_top(logits, *top(teacher, k))
    assert 0 <= found <= kl(logits, teacher) + 1e-5
    fewer = distillation_from_top(logits, *top(teacher, max(1, k // 2)))
    assert fewer <= found + 1e-6


def test_with_every_word_the_likeliest_ones_are_all():
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    found, gradient = with_gradient(distillation_from_top, logits, *top(teacher, WORDS))
    expected, by_autograd = with_gradient(kl, logits, teacher)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_likeliest_words_pushes_the_others_together():
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    words, shares = top(teacher, 5)
    _, gradient = with_gradient(distillation_from_top, logits, words, shares)
    probabilities = logits.double().softmax(-1)
    is_top = torch.zeros(TOKENS, WORDS).scatter_(-1, words, 1).bool()
    # softmax - target, where the target of the others is what the teacher leaves them, shared as the model does.
    rest = (1 - shares.double().exp().sum(-1, keepdim=True)) / (probabilities * ~is_top).sum(-1, keepdim=True)
    target = torch.where(is_top, teacher.double().softmax(-1), probabilities * rest)
    torch.testing.assert_close(gradient, (3 * (probabilities - target) / TOKENS).float(), rtol=1e-3, atol=1e-6)


def test_a_teacher_that_is_sure_leaves_finite_figures():
    teacher = torch.zeros(TOKENS, WORDS)
    teacher[:, 3] = 100.0
    found, gradient = with_gradient(distillation_from_top, random(TOKENS, WORDS), *top(teacher, 5))
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


def test_cross_entropy_is_the_surprise_at_the_next_tokens():
    logits = random(3, 20, WORDS)
    ids = torch.randint(0, WORDS, (3, 20), generator=torch.Generator().manual_seed(1))
    shares = logits.double().log_softmax(-1)
    expected = [-shares[row, i, ids[row, i + 1]] for row in range(3) for i in range(19)]
    assert cross_entropy(logits, ids).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_hidden_states_count_relative_to_the_teachers_size_in_every_layer():
    theirs = [torch.full((2, 4, 8), 2.0), torch.full((2, 4, 8), 300.0)]
    ours = [1.5 * theirs[0], 0.9 * theirs[1].bfloat16()]
    assert hidden_distance(ours, theirs).item() == pytest.approx((0.5**2 + 0.1**2) / 2, rel=0.01)
    assert hidden_distance(theirs, theirs) == 0
    assert torch.isfinite(hidden_distance(ours, [torch.zeros(2, 4, 8)] * 2))
