"""What stands between a master and the model: modes, and why a master is float32."""

import functools

import pytest
import torch
from small_network import TEXT, WIDTH, logits, make_pair, quiet

from gemma_qat_kit.formats.grids import GRIDS, learned_fake_quantize
from gemma_qat_kit.formats.quantized import quantize
from gemma_qat_kit.qat.fake_quantizer import FLOAT, PLAIN, computing
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.quality.post_training import linears

SHORT = TEXT[:80]
NONE = {}  # no importance: the plain search for scales
prepare = functools.partial(prepare_qat, report=quiet)


def test_the_plain_mode_is_the_plain_rule_of_the_format():
    pair, plain = make_pair(), make_pair()
    prepare(pair, "q4_0", calibration=SHORT)
    with torch.no_grad():
        for weight in linears(plain[0]).values():
            weight.copy_(quantize(weight, "q4_0").dequantize())
        plain[0].lm_head.weight.copy_(quantize(plain[0].lm_head.weight, "q8_0").dequantize())
    with computing(pair[0], PLAIN):
        assert torch.equal(logits(pair[0]), logits(plain[0]))


def test_computing_as_a_float_ends_with_the_block_however_it_ends():
    module, _ = pair = make_pair()
    prepare(pair, "q4_0", calibration=NONE)
    before = logits(module)
    with pytest.raises(ZeroDivisionError), computing(module, FLOAT):
        raise ZeroDivisionError
    assert torch.equal(logits(module), before)


def test_modes_of_other_layers_are_left_alone():
    module, _ = pair = make_pair()
    module.upsample = torch.nn.Upsample(mode="nearest")
    prepare(pair, "q4_0", calibration=NONE)
    with computing(module, FLOAT):
        assert module.upsample.mode == "nearest"
    assert module.upsample.mode == "nearest"


def moved(master):
    """Return how many codes changed under a hundred updates of a thousandth of each weight."""
    grid, scale = GRIDS["q4_0"], torch.full((4, WIDTH // 32), 0.11)
    before = learned_fake_quantize(master, scale, grid).detach()
    optimizer = torch.optim.SGD([master], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (learned_fake_quantize(master, scale, grid) * (1e-3 * master.detach().float())).sum().backward()
        optimizer.step()
    return int((learned_fake_quantize(master, scale, grid) != before).sum())


def test_a_float32_master_takes_updates_that_a_bfloat16_one_swallows():
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).clamp(-0.8, 0.7)
    assert moved(torch.nn.Parameter(weight.clone())) == 0
    assert moved(torch.nn.Parameter(weight.float())) > 10
