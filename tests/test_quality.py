"""Perplexity and comparisons: against transformers' own loss, against formulas, and against the wrong references."""

import math
import warnings
from html.parser import HTMLParser

import pytest
import torch
from built_in_network import TableModel, loaded

from gemma_qat_kit.errors import BadOutputError, BadSettingError, CancelledError
from gemma_qat_kit.quality.comparison import Comparison, Perplexity, WrongReferenceWarning, compare, perplexity, sqnr_db

TABLE = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
OTHER = TABLE + 0.3 * torch.randn(50, 50, generator=torch.Generator().manual_seed(1))
TEXT = "The sky is blue, and it was blue. " * 20


def quiet(progress):
    pass


def test_perplexity_is_exp_of_transformers_own_loss():
    network = loaded()
    module, tokenizer = network.hf
    found = perplexity(network, window=128, max_tokens=256, report=quiet)
    ids = torch.tensor(network.runner.tokenize(_manual())[:256]).reshape(2, 128)
    with torch.inference_mode():
        losses = [module(row[None], labels=row[None]).loss.item() for row in ids]
    assert found.nats == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert (found.name, found.num_tokens, found.window) == ("smollm2-135m float32", 254, 128)
    assert found.text.startswith("python-manual of Python 3.")
    pair = perplexity((module, tokenizer), window=128, max_tokens=256, report=quiet)
    assert (pair.name, pair.nats) == ("LlamaForCausalLM", found.nats)


def _manual():
    from gemma_qat_kit.quality.texts import read

    return read().content


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    assert perplexity(TableModel(torch.zeros(50, 50)), TEXT, report=quiet).perplexity == pytest.approx(50)


def test_comparison_is_the_mean_of_the_formulas_over_all_tokens():
    found = compare(TableModel(OTHER), TableModel(TABLE), TEXT, window=32, max_tokens=300, report=quiet)
    ids = [ord(character) % 50 for character in TEXT[:300]]
    scored = [i for i in range(1, 300) if i % 32]  # without the first token of each window
    before = torch.tensor([ids[i - 1] for i in scored])
    after = torch.tensor([ids[i] for i in scored])
    ours, theirs = (table.double().log_softmax(-1)[before] for table in (OTHER, TABLE))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found.num_tokens == len(scored)
    assert found.kl_divergence == pytest.approx(divergence.mean().item(), rel=1e-5)
    assert found.kl_divergence_p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-5)
    assert found.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    assert found.nats == pytest.approx(-ours.gather(-1, after[:, None]).mean().item(), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)


def test_a_model_differs_from_itself_by_nothing():
    found = compare(TableModel(TABLE), TableModel(TABLE.clone()), TEXT, report=quiet)
    assert (found.top1_agreement, found.kl_divergence, found.kl_divergence_p99, found.perplexity_ratio) == (1, 0, 0, 1)


def test_both_read_window_by_window_in_turn():
    turns = []
    ours, theirs = TableModel(TABLE), TableModel(OTHER)
    for name, model in (("ours", ours), ("theirs", theirs)):
        ask = model.runner.logits
        model.runner.logits = lambda ids, name=name, ask=ask: turns.append(name) or ask(ids)
    compare(ours, theirs, TEXT, window=64, max_tokens=192, report=quiet)
    assert turns == ["ours", "theirs"] * 3
    assert ours.runner.asked == theirs.runner.asked


def test_different_tokens_are_refused():
    with pytest.raises(BadSettingError, match=r"read your text as different tokens\. .* with one tokenizer"):
        compare(TableModel(TABLE), TableModel(TABLE[:49, :49]), TEXT, report=quiet)
    with pytest.raises(BadSettingError, match="as different tokens"):
        compare(TableModel(TABLE), TableModel(TABLE, start=[3]), TEXT, report=quiet)


@pytest.mark.parametrize("broken", ["the model", "the reference"])
def test_nan_is_an_error_that_names_the_model(broken):
    bad = TableModel(TABLE.masked_fill(torch.arange(50) == 9, math.nan), format="broken")
    pair = (bad, TableModel(TABLE)) if broken == "the model" else (TableModel(TABLE), bad)
    with pytest.raises(BadOutputError, match="table broken answers nan"):
        compare(*pair, TEXT, report=quiet)
    with pytest.raises(BadOutputError, match="table broken answers nan"):
        perplexity(bad, TEXT, report=quiet)


def test_progress_counts_tokens_and_can_stop_it():
    seen = []
    model = TableModel(TABLE)
    perplexity(model, TEXT, window=64, max_tokens=192, report=seen.append)
    assert [(p.stage, p.done_bytes, p.total_bytes, p.unit) for p in seen] == [
        ("measuring", done, 192, "tokens") for done in (0, 64, 128, 192)
    ]

    def stop(progress):
        if progress.done_bytes:
            raise CancelledError("Stopped.", "", "")

    model.runner.asked.clear()
    with pytest.raises(CancelledError):
        compare(model, TableModel(OTHER), TEXT, window=64, report=stop)
    assert len(model.runner.asked) == 1


def of(size, format):
    return TableModel(TABLE, size=size, format=format)


@pytest.mark.parametrize("reference", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("format", ["q4_0", "w4a16"])
def test_a_qat_model_against_weights_that_were_not_trained_for_it_is_warned_of(format, reference):
    with pytest.warns(WrongReferenceWarning) as caught:
        compare(of("E2B", format), of("E2B", reference), TEXT, report=quiet)
    assert f"E2B {format} was not made from E2B {reference}" in str(caught[0].message)
    assert 'gqk.load("E2B", "q4_0-unquantized")' in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_model_made_from_the_plain_weights_is_sent_to_them():
    with pytest.warns(WrongReferenceWarning, match=r'gqk\.load\("E4B", "bf16"\)'):
        compare(of("E4B", "nf4"), of("E4B", "q4_0-unquantized"), TEXT, report=quiet)


@pytest.mark.parametrize("reference", ["bf16", "q4_0-unquantized", "q4_0"])
def test_of_mobile_there_is_no_right_reference_and_that_is_said(reference):
    with pytest.warns(WrongReferenceWarning, match="No unquantized weights of a mobile checkpoint are published"):
        compare(of("E2B", "mobile"), of("E2B", reference), TEXT, report=quiet)


@pytest.mark.parametrize(
    ("format", "reference"),
    [("q4_0", "q4_0-unquantized"), ("w4a16", "q4_0-unquantized"), ("nf4", "bf16"), ("q4_0-unquantized", "bf16"),
     ("mobile", "mobile"), ("q4_0", "endpoint")],
)  # fmt: skip
def test_the_right_reference_is_taken_in_silence(format, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(of("E2B", format), of("E2B", reference), TEXT, report=quiet)
        compare(of("smollm2-135m", "q4_1"), of("smollm2-135m", "float32"), TEXT, report=quiet)
        compare(of(None, "q4_0"), of("E2B", "bf16"), TEXT, report=quiet)


def test_two_sizes_are_refused():
    with pytest.raises(BadSettingError, match=r'are different models\. .*gqk\.load\("E2B", …\) as the reference'):
        compare(of("E2B", "q4_0"), of("E4B", "bf16"), TEXT, report=quiet)


def test_sqnr_is_the_formula():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    noise = 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    expected = 10 * torch.log10((weight.double() ** 2).sum() / (noise.double() ** 2).sum()).item()
    assert sqnr_db(weight, weight + noise) == pytest.approx(expected, abs=0.01)
    assert sqnr_db(weight, weight + noise / 2) == pytest.approx(expected + 20 * math.log10(2), abs=0.01)
    assert sqnr_db(weight, weight) == math.inf
    assert sqnr_db(0 * weight, weight) == -math.inf
    assert sqnr_db(torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 0.9)) == pytest.approx(20, abs=0.01)


def test_sqnr_of_two_shapes_is_refused():
    with pytest.raises(BadSettingError, match=r"shape \(2, 3\) has no approximation of shape \(3, 2\)"):
        sqnr_db(torch.zeros(2, 3), torch.zeros(3, 2))


def test_results_draw_themselves_with_units_and_escape_what_others_named():
    found = Comparison("<b>m</b>", "r", "t", 0.985, 0.00325, 0.0133, 2.9, 2.89, 2040, 256)
    assert str(found).splitlines()[1:4] == [
        "  top-1 agreement               98.50%",
        "  KL divergence, mean     0.00325 nats",
        "  KL divergence, 99 %      0.0133 nats",
    ]
    assert "Measured on 2,040 tokens of t, in windows of 256." in str(found)
    alone = Perplexity("m", "<script>", 2.9, 10, 256)
    assert "18.17" in str(alone)
    for result in (found, alone):
        tags = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs, tags=tags: tags.append(tag)
        parser.feed(result._repr_html_())
        assert set(tags) == {"style", "div", "strong", "table", "tbody", "tr", "td"}


def test_hopeless_models_have_an_infinite_perplexity():
    assert Perplexity("m", "t", 1e4, 10, 256).perplexity == math.inf
