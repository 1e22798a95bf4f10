"""Formats side by side: the figures of one comparison at a time, the order that theory asks for, and the drawing."""

import functools
import math
from html.parser import HTMLParser

import pytest
import torch
from built_in_network import loaded

import gemma_qat_kit as gqk
from gemma_qat_kit.errors import BadSettingError, CancelledError, UnknownNameError
from gemma_qat_kit.quality import format_table, post_training
from gemma_qat_kit.quality.comparison import Comparison, compare, perplexity, sqnr_db
from gemma_qat_kit.quality.format_table import DEFAULT_METHODS, METHOD_COLOURS, FormatRow, FormatTable, compare_formats
from gemma_qat_kit.quality.post_training import METHODS, QuantizedSize, linears, quantized_weights


def quiet(progress):
    pass


@pytest.fixture(scope="module")
def table():
    return compare_formats(loaded(), ("q8_0", "q4_0", "mobile_int8", "mobile_int4", "mobile_int2"), max_tokens=300,
                           report=quiet)  # fmt: skip


def row_of(table, method):
    return next(row for row in table.rows if row.method == method)


def test_more_bits_and_finer_scales_cost_less(table):
    by_method = {row.method: row.quality.kl_divergence for row in table.rows}
    order = ["q8_0", "mobile_int8", "q4_0", "mobile_int4", "mobile_int2"]
    assert sorted(by_method, key=by_method.__getitem__) == order
    assert [row.size.bits_per_weight for row in table.rows] == pytest.approx([8.5, 4.5, 8.05, 4.05, 2.05], abs=0.01)
    noise = [row_of(table, method).median_sqnr_db for method in order]
    assert noise == sorted(noise, reverse=True)


def test_a_row_is_what_compare_measures_of_the_rounded_model(table):
    model, found = loaded(), row_of(table, "q4_0").quality
    originals = {name: weight.data for name, weight in linears(model.hf[0]).items()}
    reference = [model.runner.logits(ids) for ids in _windows()]
    with quantized_weights(model, "q4_0"):
        alone = perplexity(model, max_tokens=300, report=quiet)
        again = compare(model, _Recorded(model, reference), max_tokens=300, report=quiet)
        noise = {name: sqnr_db(was, model.hf[0].get_parameter(name).data) for name, was in originals.items()}
    assert found.nats == pytest.approx(alone.nats, rel=1e-6)
    for name in ("top1_agreement", "kl_divergence", "kl_divergence_p99", "reference_nats", "num_tokens"):
        assert getattr(found, name) == pytest.approx(getattr(again, name), rel=1e-5), name
    assert row_of(table, "q4_0").sqnr_db == noise
    assert row_of(table, "q4_0").worst_layer == min(noise, key=noise.get)


def _windows():
    from gemma_qat_kit.quality.scoring import cut_windows
    from gemma_qat_kit.quality.texts import read

    return cut_windows(loaded().runner, read(), window=256, max_tokens=300)


class _Recorded:
    """A model whose logits were computed before."""

    name, size, format, is_closed = "recorded", None, "float32", False

    def __init__(self, model, logits):
        self._logits, self.runner = iter(logits), self
        self.tokenize, self.context_length = model.runner.tokenize, model.context_length

    def logits(self, ids):
        return next(self._logits)


def test_windows_that_do_not_fit_at_once_come_in_blocks_and_change_nothing(table, monkeypatch):
    monkeypatch.setattr(format_table, "_REFERENCE_BYTES", 1)
    found = compare_formats(loaded(), ["q4_0"], max_tokens=300, report=quiet)
    assert found.rows[0] == row_of(table, "q4_0")


def test_a_method_that_changes_nothing_costs_nothing_and_float_stays_exact():
    # Weights on a Q4_0 grid whose steps are bfloat16 numbers: recovering the grid gives them back.
    model, before = loaded(), {}
    for name, weight in linears(model.hf[0]).items():
        before[name] = weight.data
        groups = weight.data.unflatten(-1, (-1, 32))
        step = (groups.abs().amax(-1, keepdim=True) / 5).to(torch.bfloat16).float()
        weight.data = (torch.round(groups / step).clamp(-7, 7) * step).flatten(-2)
    try:
        found = compare_formats(model, ["q4_0", "q4_0+grid"], max_tokens=64, report=quiet)
    finally:
        for name, weight in linears(model.hf[0]).items():
            weight.data = before[name]
    naive, kept = found.rows
    assert kept.quality.kl_divergence == 0
    assert set(kept.sqnr_db.values()) == {math.inf}
    assert naive.quality.kl_divergence > 0.01
    assert "q4_0+grid (exact)" in [text for trace in found.figure().data for text in trace.text]


def test_importance_helps_and_is_collected_by_itself(monkeypatch):
    stages, collect = [], post_training.collect_importance
    monkeypatch.setattr(post_training, "collect_importance", functools.partial(collect, max_tokens=1024))
    found = compare_formats(loaded(), ["q4_0", "q4_0+importance"], max_tokens=512,
                            report=lambda progress: stages.append(progress.stage))  # fmt: skip
    naive, careful = found.rows
    assert careful.quality.nats < naive.quality.nats
    assert careful.size == naive.size
    assert list(dict.fromkeys(stages)) == ["collecting importance", "measuring"]


def test_progress_rises_to_its_total():
    seen = []
    compare_formats(loaded(), ["q4_0", "q8_0"], max_tokens=64, report=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert (done[-1], seen[-1].total_bytes, seen[-1].unit) == (192, 192, "tokens")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CancelledError("Stopped.", "", "")])
def test_a_run_that_is_stopped_leaves_the_model_as_it_was(error):
    model = loaded()
    before = {name: weight.data_ptr() for name, weight in model.hf[0].named_parameters()}

    def stop(progress):
        if progress.done_bytes == 128:  # the reference and one method are measured
            raise error

    with pytest.raises(type(error)):
        compare_formats(model, ["q4_0", "q8_0"], max_tokens=64, report=stop)
    assert {name: weight.data_ptr() for name, weight in model.hf[0].named_parameters()} == before


def test_a_tiny_gemma_of_experts_is_measured_too(tiny):
    with gqk.load(tiny("26B-A4B", "bf16")) as model:
        methods = ("q8_0", "q4_0+importance", "mobile_int8")
        found = compare_formats(model, methods, "the sky is blue and the " * 9, max_tokens=40, report=quiet)
    assert found.float_bits == 16
    assert all(math.isfinite(row.quality.nats) for row in found.rows)


def test_no_method_and_unknown_ones_are_refused():
    with pytest.raises(BadSettingError, match="no method to compare"):
        compare_formats(loaded(), [])
    with pytest.raises(UnknownNameError, match="Unknown method 'q4_1'"):
        compare_formats(loaded(), ["q8_0", "q4_1"])


def test_another_engine_is_refused(tiny):
    with gqk.load(tiny("12B", "q4_0")) as model, pytest.raises(BadSettingError, match="runs in llama_cpp"):
        compare_formats(model, ["q8_0"])


def test_every_method_has_a_colour_and_the_plain_rule_is_not_qats():
    assert set(METHOD_COLOURS) == set(METHODS)
    assert METHOD_COLOURS["q4_0"] != METHOD_COLOURS["q4_0+grid"] == format_table.FORMAT_COLOURS["q4_0"]
    assert "q4_0+grid" not in DEFAULT_METHODS


def made_up():
    quality = Comparison("m", "<model>", "t", 0.985, 0.0123, 0.3, 2.95, 2.9, 2040, 256)
    size = QuantizedSize(59_719_680, 106_168_320)
    return FormatTable("<model>", "t", 424_673_280, 32, (FormatRow("q4_0", size, quality, {"a": 21.0, "b": 19.5}),))


def test_the_text_table_is_aligned_and_says_what_it_shows():
    lines = str(made_up()).splitlines()
    headings = (
        "Method",
        "Size",
        "Bits/weight",
        "Perplexity",
        "Ratio",
        "Top-1 %",
        "KL mean",
        "KL 99 %",
        "SQNR dB",
        "Worst",
    )
    assert " ".join(lines[0].split()) == " ".join(headings)
    assert " ".join(lines[2].split()) == "q4_0 57.0 MiB 4.5 19.11 1.051 98.5 0.0123 0.3 20.2 19.5"
    assert len({len(line) for line in lines[:3]}) == 1
    assert "2,040 tokens of t in windows of 256" in " ".join(lines[3:])


def test_the_html_table_is_escaped_and_marks_its_headings():
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    page = made_up()._repr_html_()
    parser.feed(page)
    assert "<model>" not in page
    names = [tag for tag, _ in tags]
    assert names.count("tr") == 3
    assert [attrs["scope"] for tag, attrs in tags if tag == "th"] == ["col"] * 10


def test_the_figure_answers_its_title_with_units_and_direct_labels(table):
    figure = table.figure()
    assert [trace.name for trace in figure.data] == [row.method for row in table.rows]
    assert all(trace.text[0] == trace.name for trace in figure.data)
    assert [trace.y[0] for trace in figure.data] == [row.quality.kl_divergence for row in table.rows]
    assert figure.layout.yaxis.type == "log"
    assert "nats" in figure.layout.yaxis.title.text
    assert "Bits per weight" in figure.layout.xaxis.title.text
    assert figure.layout.showlegend is False
    assert "sendChartToCloud" in figure.layout.modebar.remove
    assert [shape.y0 for shape in figure.layout.shapes] == [row_of(table, "q4_0").quality.kl_divergence]
    colours = [trace.marker.color for trace in figure.data]
    assert colours == [METHOD_COLOURS[row.method] for row in table.rows]
