"""The dtype of a run: the fastest that the device really has, as long as the model's numbers fit it."""

import contextlib
from dataclasses import replace

import pytest
import torch
from small_network import TEXT, make_pair, quiet
from small_training import SETTINGS, ready, surprise, train, values
from test_qat_resume import RUN, KilledError, at

import gemma_qat_kit as gqk
from gemma_qat_kit.qat import precision
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.settings import DTYPES
from gemma_qat_kit.qat.train import train_qat


@pytest.fixture
def timed(monkeypatch):
    """Return a function that decides how long a product takes in 16 bits, against a second in float32."""

    def use(seconds, narrow=torch.bfloat16):
        monkeypatch.setattr(precision, "_available", lambda device: [torch.float32, narrow])
        monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype, device: seconds if dtype == narrow else 1.0)

    return use


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, "bfloat16"), (0.9, "float32"), (30.0, "float32")])
def test_a_narrow_dtype_is_taken_where_it_is_clearly_faster(timed, seconds, expected):
    timed(seconds)
    pair = ready()
    run = train(pair, dtype="auto")
    assert run.dtype == expected
    assert all(value.dtype == torch.float32 for value in values(pair).values())  # masters, whatever comes of it
    assert surprise(pair) == pytest.approx(run.best.nats, rel=1e-5 if expected == "float32" else 1e-2)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dtype_whose_numbers_overflow_is_passed_over(timed, seed):
    timed(0.1, torch.float16)
    assert train(ready(seed=seed), dtype="auto", num_steps=1).dtype == "float16"
    pair = make_pair(seed)
    with torch.no_grad():
        pair[0].model.layers[0].mlp.down_proj.weight.mul_(1e6)
    prepare_qat(pair, "mobile_int8", calibration={}, report=quiet)  # whose scales know no float16
    run = train(pair, dtype="auto", num_steps=1)
    assert run.dtype == "float32"
    assert torch.isfinite(torch.tensor(run.steps[0].loss))


def test_a_model_in_16_bits_keeps_its_own(monkeypatch):
    monkeypatch.setattr(precision, "_matmul_seconds", lambda *a: pytest.fail("measured"))
    pair = make_pair(dtype=torch.bfloat16)
    prepare_qat(pair, "int2_g32", calibration={}, report=quiet)
    assert train(pair, dtype="auto", num_steps=1).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_dtype_may_be_asked_for(monkeypatch, dtype):
    monkeypatch.setattr(precision, "_matmul_seconds", lambda *a: pytest.fail("measured"))
    run = train(ready(), dtype=dtype, num_steps=4)
    assert run.dtype == dtype
    assert run.best.kl_divergence < run.evaluations[0].kl_divergence


def test_a_product_is_really_timed_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    seconds = {
        dtype: precision._matmul_seconds(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    }
    assert all(value > 0 for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert precision.choose_dtype(ready()[0], "auto", torch.arange(110, 140)) in seconds


def test_devices_are_asked_for_what_they_have(monkeypatch):
    assert precision._available(torch.device("cpu")) == [torch.float32, torch.bfloat16]
    for capability, narrow in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert precision._available(torch.device("cuda")) == [torch.float32, narrow]


def test_a_loaded_gemma_is_trained_in_its_own_dtype(tiny):
    with gqk.load(str(tiny("12B", "bf16")), device="cpu", report=quiet) as model:
        prepare_qat(model, "int2_g32", calibration={}, report=quiet)
        settings = replace(SETTINGS, num_steps=2, num_evaluations=1, sequence_length=16)
        run = train_qat(model, TEXT[:400], settings=settings, report=quiet)
    assert run.dtype == "bfloat16"
    assert run.name == model.name
    assert len(run.steps) == 2


def test_a_run_goes_on_in_the_dtype_that_it_chose(tmp_path, monkeypatch):
    asked = []

    def choose(module, dtype, window):
        asked.append(dtype)
        return torch.bfloat16

    monkeypatch.setattr("gemma_qat_kit.qat.training.choose_dtype", choose)
    for error in (KilledError, None):
        with pytest.raises(KilledError) if error else contextlib.nullcontext():
            train(ready(), folder=tmp_path, dtype="auto", watch=at(5) if error else None, **RUN)
    assert asked == ["auto", "bfloat16"]
