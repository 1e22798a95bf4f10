"""A run of a second: the network of small_network.py on 2 bits, where training shows at once."""

from dataclasses import replace

import torch
from small_network import TEXT, make_pair, quiet
from torch.nn import functional

from gemma_qat_kit.qat.batches import read_windows
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.qat.prepare import prepare_qat
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.qat.state import trained
from gemma_qat_kit.qat.train import train_qat
from gemma_qat_kit.quality.post_training import scorer_of_module

SETTINGS = TrainSettings(num_steps=6, batch_size=2, sequence_length=32, learning_rate=0.05, num_evaluations=3,
                         hidden_weight=0.0, dtype="float32")  # fmt: skip
WORDS = TEXT[:3000]


def ready(format="int2_g32", seed=0, **options):
    """Return a prepared pair."""
    pair = make_pair(seed)
    prepare_qat(pair, format, **{"calibration": {}, "report": quiet} | options)
    return pair


def train(pair, text=WORDS, *, teacher="memory", folder=None, watch=None, report=quiet, **changes):
    """Train with `SETTINGS`, some of them changed, on one core: two would only wait for each other."""
    settings, num_threads = replace(SETTINGS, **changes), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_qat(pair, text, teacher=teacher, settings=settings, folder=folder, watch=watch, report=report)
    finally:
        torch.set_num_threads(num_threads)


def surprise(pair, text=WORDS):
    """Return the mean surprise at the held-out text, computed with torch alone."""
    ids = read_windows(scorer_of_module(pair), text, SETTINGS).held_out
    with torch.no_grad():
        logits = pair[0](ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()


def values(pair):
    """Return a copy of everything that is trained, by name."""
    return {name: parameter.detach().clone() for name, parameter in trained(pair[0]).items()}


def weights(pair):
    """Return what the model computes with, by name: the trained weights on their grids."""
    return {
        name: pair[0].get_submodule(name.removesuffix(".weight")).weight.detach().clone() for name in masters(pair[0])
    }
