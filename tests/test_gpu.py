"""Number formats on a CUDA GPU: the same bytes as on a CPU, where C computes them."""

import pytest
import torch

from gemma_qat_kit.errors import BadTensorError
from gemma_qat_kit.formats.quantized import FORMATS, fake_quantize, quantize

pytestmark = pytest.mark.gpu
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(3, 40, 512, generator=GENERATOR) * torch.logspace(-4, 2, 40)[:, None]


def on_a_grid():
    """bfloat16 weights whose groups of 32 have a step of their own and peaks of 1 to 8."""
    step = (torch.rand(40, 16, 1, generator=GENERATOR) * 0.1).bfloat16().float()
    codes = torch.randint(-4, 5, (40, 16, 32), generator=GENERATOR)
    return (codes * step).flatten(1).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_stores_the_same_bytes_on_a_gpu(format, dtype):
    weight = WEIGHT.to(dtype)
    ours, theirs = quantize(weight.cuda(), format), quantize(weight, format)
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].is_cuda
        assert torch.equal(ours.tensors[name].cpu(), tensor), name
    assert torch.equal(ours.dequantize().cpu(), theirs.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_fake_quantization_on_a_gpu_gives_what_is_stored_and_passes_the_gradient(format):
    weight = WEIGHT.clone().cuda().requires_grad_()
    shown = fake_quantize(weight, format)
    shown.sum().backward()
    assert torch.equal(shown.detach().cpu(), quantize(WEIGHT, format).dequantize())
    assert bool((weight.grad == 1).all())


def test_a_grid_is_recovered_on_a_gpu_as_on_a_cpu():
    weight = on_a_grid()
    ours, theirs = (quantize(w, "q4_0", recover_grid=True) for w in (weight.cuda(), weight))
    assert torch.equal(ours.tensors["blocks"].cpu(), theirs.tensors["blocks"])
    assert ours.fit == theirs.fit


def test_rounding_by_importance_on_a_gpu_is_that_of_a_cpu():
    importance = torch.rand(512, generator=GENERATOR)
    ours = quantize(WEIGHT.cuda(), "q4_0", importance=importance.cuda())
    assert torch.equal(ours.tensors["blocks"].cpu(), quantize(WEIGHT, "q4_0", importance=importance).tensors["blocks"])


def test_a_value_that_is_no_number_is_found_on_a_gpu():
    weight = WEIGHT.clone()
    weight[1, 2, 3] = torch.nan
    with pytest.raises(BadTensorError, match=r"1, 2, 3\] is nan"):
        quantize(weight.cuda(), "q4_0")
