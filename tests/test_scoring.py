"""Token by token: windows, and the figures of single tokens against formulas and torch's own functions."""

import math
from itertools import chain

import pytest
import torch
from built_in_network import TableModel, TableScorer

from gemma_qat_kit.errors import BadOutputError, BadSettingError, ModelClosedError
from gemma_qat_kit.quality.scoring import ModuleScorer, check_finite, cut_windows, score, scorer_of
from gemma_qat_kit.quality.texts import Text

TABLE = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
TEXT = Text("a text", "".join(chr(97 + i % 26) for i in range(100)))


def test_windows_are_consecutive_and_hold_every_token_once():
    windows = cut_windows(TableScorer(TABLE), TEXT, window=16, max_tokens=70)
    assert [len(window) for window in windows] == [16, 16, 16, 16, 6]
    assert [*chain(*windows)] == [ord(character) % 50 for character in TEXT.content[:70]]


def test_each_window_begins_with_the_token_that_the_model_wants():
    windows = cut_windows(TableScorer(TABLE, start=[7]), TEXT, window=16, max_tokens=70)
    assert all(window[0] == 7 and len(window) <= 16 for window in windows)
    assert [*chain(*(window[1:] for window in windows))] == [ord(character) % 50 for character in TEXT.content[:70]]


def test_a_last_window_of_one_token_has_nothing_to_score():
    assert [len(w) for w in cut_windows(TableScorer(TABLE), TEXT, window=16, max_tokens=33)] == [16, 16]


@pytest.mark.parametrize("window", [0, 15, 513, 256.0, "256", True, None])
def test_a_window_that_cannot_be_is_refused(window):
    with pytest.raises(BadSettingError) as caught:
        cut_windows(TableScorer(TABLE), TEXT, window=window, max_tokens=70)
    assert caught.value.wrong == f"window={window!r} cannot be used."
    assert caught.value.allowed == "It is 16 to 512 tokens of this model."
    assert caught.value.next_step == "Try window=256."


@pytest.mark.parametrize("max_tokens", [0, -1, 15, 100.0, None])
def test_a_number_of_tokens_that_cannot_be_is_refused(max_tokens):
    with pytest.raises(BadSettingError, match=r"max_tokens=.* cannot be used\. It is an integer from 16"):
        cut_windows(TableScorer(TABLE), TEXT, window=256, max_tokens=max_tokens)


def test_a_text_that_is_too_short_says_how_to_pass_a_file():
    with pytest.raises(BadSettingError) as caught:
        cut_windows(TableScorer(TABLE), Text("your text", "notes.txt"), window=256, max_tokens=100)
    assert caught.value.wrong == "your text has 9 tokens."
    assert 'Path("my_text.txt")' in caught.value.next_step


def test_figures_are_those_of_torchs_own_losses():
    ids = torch.randint(50, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (3 * torch.randn(200, 50, generator=generator) for _ in range(2))
    found = score(ids, ours, theirs)
    targets = torch.tensor(ids[1:])
    torch.testing.assert_close(found.nats, torch.nn.functional.cross_entropy(ours[:-1], targets, reduction="none"))
    torch.testing.assert_close(
        found.reference_nats, torch.nn.functional.cross_entropy(theirs[:-1], targets, reduction="none")
    )
    expected = torch.nn.functional.kl_div(
        ours[:-1].double().log_softmax(-1), theirs[:-1].double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(found.divergence.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.agrees.bool(), ours[:-1].argmax(-1) == theirs[:-1].argmax(-1))
    assert torch.equal(score(ids, ours).nats, found.nats)


def test_equal_logits_diverge_by_exactly_nothing():
    found = score(list(range(50)), TABLE, TABLE.clone())
    assert found.divergence.abs().max() == 0
    assert found.agrees.all()


def test_a_word_that_both_rule_out_adds_nothing_and_one_that_only_the_model_rules_out_adds_infinity():
    theirs = torch.tensor([[0.0, 0.0, -math.inf]] * 2)
    assert score([0, 1], theirs.clone(), theirs).divergence.tolist() == [0.0]
    ours = torch.tensor([[0.0, -math.inf, 0.0]] * 2)
    assert score([0, 0], ours, theirs).divergence.tolist() == [math.inf]


def test_two_vocabularies_are_refused():
    with pytest.raises(BadSettingError, match="knows 50 words, the other 49"):
        score(list(range(50)), TABLE, TABLE[:, :49])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_answers_no_number_is_named(value):
    logits = TABLE.clone()
    logits[3, 5] = value
    with pytest.raises(BadOutputError, match=r"that model answers nan for token 3 of 49\. .*float16 overflow"):
        check_finite("that model", score([1] * 50, logits).nats)


@pytest.mark.parametrize("thing", [7, "E2B", (1, 2), None])
def test_what_cannot_be_measured_is_refused(thing):
    with pytest.raises(BadSettingError, match=r"cannot be measured\. A model of gqk\.load can"):
        scorer_of(thing)


def test_a_closed_model_says_so():
    model = TableModel(TABLE)
    model.is_closed = True
    with pytest.raises(ModelClosedError, match="closed"):
        scorer_of(model)


class Tokenizer:
    bos_token_id = 2

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [5] * len(text)})


class Module(torch.nn.Module):
    """A module that answers as transformers' models do, and notes how it was called."""

    def __init__(self, kind):
        super().__init__()
        self.config = type("Config", (), {"model_type": kind, "get_text_config": lambda self: self})()
        self.device = torch.device("cpu")

    def forward(self, ids):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return type("Output", (), {"logits": torch.zeros(*ids.shape, 9, dtype=torch.bfloat16)})


@pytest.mark.parametrize(("kind", "ids"), [("gemma4", [2, 5, 5]), ("llama", [5, 5])])
def test_gemma_always_reads_its_first_token(kind, ids):
    # Without <bos> its perplexity is a thousand times too high; not every tokenizer.json adds it.
    assert ModuleScorer(Module(kind), Tokenizer()).tokenize("ab") == ids


def test_a_pair_is_measured_as_in_use_and_left_as_it_was():
    module = Module("llama").train()
    name, scorer = scorer_of((module, Tokenizer()))
    assert name == "Module"
    logits = scorer.logits([1, 2, 3])
    assert (logits.shape, logits.dtype) == ((3, 9), torch.float32)
    assert module.training
