"""Fine-tuning: it learns, it keeps the best point, it goes on where it was, and what it learnt is what ships."""

import gc
import weakref

import pytest
import torch
from small_network import quiet
from test_load import IDS, gguf_values

import gemma_qat_kit as gqk
from gemma_qat_kit.engines.packed import PackedLinear
from gemma_qat_kit.errors import BadSettingError, CancelledError, UnknownNameError
from gemma_qat_kit.finetune.lora import adapters
from gemma_qat_kit.layouts import gguf_name
from gemma_qat_kit.qat.run import Step
from gemma_qat_kit.qat.state import trained
from gemma_qat_kit.testing import write_tiny_checkpoint

ROWS = [{"question": f"the sky is {a}", "answer": f"blue and {b}"} for a in ("blue", "the", "user")
        for b in ("sky", "was", "model")]  # fmt: skip
SETTINGS = {"num_steps": 6, "num_evaluations": 3, "batch_size": 2, "gradient_accumulation": 1, "sequence_length": 64,
            "learning_rate": 5e-3, "rank": 4, "gradient_checkpointing": False, "checkpoint_every": 2}  # fmt: skip


@pytest.fixture
def model(tiny):
    """A tiny Gemma that nothing has adapted."""
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
        yield model


def tune(model, rows=ROWS, *, watch=None, folder=None, qat="q4_0", samples=(), report=quiet, **changes):
    settings, num_threads = gqk.FinetuneSettings(**SETTINGS | changes), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return gqk.finetune(model, rows, qat=qat, settings=settings, folder=folder, samples=samples, watch=watch,
                            report=report)  # fmt: skip
    finally:
        torch.set_num_threads(num_threads)


def says(model):
    with torch.no_grad():
        return model.hf[0](torch.tensor([IDS])).logits


def values(model):
    return {name: p.detach().clone() for name, p in trained(model.hf[0]).items()}


@pytest.mark.parametrize("qat", ["q4_0", None])
def test_it_learns_the_answers(model, qat):
    run = tune(model, qat=qat)
    assert run.best.nats < 0.8 * run.evaluations[0].nats
    assert run.best is min(run.evaluations, key=lambda each: each.nats)
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]
    packed = [part for part in model.hf[0].modules() if isinstance(part, PackedLinear)]
    assert bool(packed) == (qat is not None)
    assert run.num_adapted == len(adapters(model.hf[0]))
    assert run.num_trained == sum(value.numel() for value in values(model).values())


def test_samples_are_asked_before_during_and_after(model):
    seen = []
    run = tune(model, samples=["the sky"], watch=seen.append)
    assert [sample.step for sample in run.samples] == [0, 2, 4, 6]
    assert all(sample in seen for sample in run.samples)
    assert run.samples[0].answer != run.samples[-1].answer
    html = run._repr_html_()
    assert "the sky" in html
    assert "before:" in str(run)


def test_what_a_model_says_is_escaped():
    from gemma_qat_kit.finetune.run import FinetuneRun, Sample, TuneEvaluation

    first = TuneEvaluation(0, 1.0)
    run = FinetuneRun("m", gqk.FinetuneSettings(), None, "float32", "d", 1, 1, (), (first,), first,
                      (Sample(0, "<b>q</b>", "<script>"),), "ended", 1.0)  # fmt: skip
    assert "<script>" not in run._repr_html_()
    assert "<b>q" not in run._repr_html_()


def test_every_learnt_token_counts_the_same_however_they_are_split(tiny):
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
            rows = [*ROWS, {"question": "the", "answer": "sky " * 20}]
            run = tune(model, rows, batch_size=batch_size, gradient_accumulation=accumulation, num_steps=1)
            losses.append(run.steps[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # bfloat16


class KilledError(Exception):
    """Ends a run as no user does."""


def test_a_run_that_was_killed_goes_on_bit_for_bit(tiny, tmp_path):
    def kill(event):
        if isinstance(event, Step) and event.step == 5:
            raise KilledError

    found = []
    for folder, watch in ((None, None), (tmp_path, kill), (tmp_path, None)):
        with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
            try:
                run = tune(model, folder=folder, watch=watch)
            except KilledError:
                continue
            found.append(([(s.step, s.loss) for s in run.steps], run.evaluations, values(model)))
    (steps, evaluations, expected), (resumed_steps, resumed_evaluations, resumed) = found
    assert resumed_steps == steps
    assert resumed_evaluations == evaluations
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    with (
        gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model,
        pytest.raises(BadSettingError, match="other settings: learning_rate"),
    ):
        tune(model, folder=tmp_path, learning_rate=1e-3)


def test_a_checkpoint_of_another_base_is_refused(tiny, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", "12B", "bf16", seed=1)
    for path, error in ((tiny("12B", "bf16"), None), (other, "another model")):
        with gqk.load(str(path), device="cpu", report=quiet) as model:
            if error is None:
                tune(model, folder=tmp_path)
            else:
                with pytest.raises(BadSettingError, match=error):
                    tune(model, folder=tmp_path)


@pytest.mark.parametrize("error", [CancelledError("Stopped.", "", ""), KeyboardInterrupt()])
def test_stopping_keeps_the_best_point(model, error):
    def stop(event):
        if isinstance(event, Step) and event.step == 3:
            raise error

    run = tune(model, watch=stop)
    assert run.ended == "Stopped by you."
    assert len(run.steps) == 3
    assert run.best.step in (0, 2)


def test_what_was_trained_is_what_ships(model, tmp_path):
    tune(model)
    before = says(model)
    with pytest.raises(BadSettingError, match=r"adapters beside its weights.*merge_adapters"):
        gqk.export_gguf(model, tmp_path / "a.gguf")
    gqk.adapted_model(model).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    gqk.merge_adapters(model)
    assert torch.equal(says(model), before)
    assert not adapters(model.hf[0])
    path = gqk.export_gguf(model, tmp_path / "tuned.gguf", report=quiet).path
    written = gguf_values(path)
    for name, part in model.hf[0].named_modules():
        if isinstance(part, PackedLinear):
            value = torch.from_numpy(written[gguf_name(name)])
            assert torch.equal(value.to(part.dtype), part.weight), name
    with pytest.raises(BadSettingError, match="has no adapters"):
        gqk.merge_adapters(model)


def test_adapters_are_trained_on_as_they_are(model):
    first = tune(model)
    again = tune(model)
    assert again.evaluations[0].nats == pytest.approx(first.best.nats)
    for change, said in (({"rank": 8}, "rank=4"), ({"qat": None}, "qat='q4_0'")):
        with pytest.raises(BadSettingError, match=f"has adapters already, with {said}"):
            tune(model, **change)
    gqk.merge_adapters(model)
    assert tune(model, rank=8).evaluations[0].nats == pytest.approx(again.best.nats)


def test_a_closed_model_is_freed(tiny):
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
        tune(model, num_steps=1)
        module = weakref.ref(model.hf[0])
    del model
    gc.collect()
    assert module() is None


def test_plain_lora_merges_as_peft_does(model):
    tune(model, qat=None)
    before = says(model)
    gqk.merge_adapters(model)
    assert (says(model) - before).norm() < 0.2 * before.norm()  # the sum is rounded to bfloat16


def test_names_and_numbers_are_checked(model):
    with pytest.raises(UnknownNameError, match="Unknown qat 'q8_0'"):
        gqk.finetune(model, ROWS, qat="q8_0")
    for wrong in ({"rank": 0}, {"learning_rate": 2.0}, {"targets": ()}, {"targets": "q_proj"}, {"batch_size": 0}):
        with pytest.raises(BadSettingError, match=f"{next(iter(wrong))}="):
            gqk.FinetuneSettings(**wrong)
