"""What is measured of a GPU, on a stand-in for torch's allocator and, where there is one, on a GPU."""

import sys
from types import SimpleNamespace

import pytest

from gemma_qat_kit.memory import measure_process
from gemma_qat_kit.memory.measure import measure_memory

MIB = 2**20


class StandInCuda:
    """torch.cuda with one GPU, whose bytes a test sets; its allocator counts the peak as torch's does."""

    def __init__(self):
        self.current = self.peak = 0

    def hold(self, nbytes):
        self.current, self.peak = nbytes, max(self.peak, nbytes)

    def is_initialized(self):
        return True

    def device_count(self):
        return 2  # the second one was never used

    def memory_stats_as_nested_dict(self, device):
        if device:
            return {}
        stats = {"current": self.current, "peak": self.peak}
        return {"allocated_bytes": {"all": stats}, "reserved_bytes": {"all": {"current": 2 * self.current}}}

    def reset_peak_memory_stats(self, device):
        self.peak = self.current


@pytest.fixture
def cuda(monkeypatch):
    cuda = StandInCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def test_a_measurement_inside_another_leaves_it_its_gpu_peak(cuda):
    cuda.hold(100)
    with measure_memory() as outer:
        cuda.hold(900)
        cuda.hold(10)
        with measure_memory() as inner:
            cuda.hold(300)
            cuda.hold(20)
        cuda.hold(30)
    assert (outer.peak.gpu, inner.peak.gpu) == (900, 300)
    assert (inner.before.gpu, outer.after.gpu, outer.after.gpu_reserved) == (10, 30, 60)


def test_a_gpu_that_fails_or_was_never_used_counts_nothing(cuda, monkeypatch):
    cuda.hold(5)
    monkeypatch.setattr(cuda, "is_initialized", lambda: False)
    assert measure_process.gpu_memory() == (0, 0, 0)
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "memory_stats_as_nested_dict", fail)
    assert measure_process.gpu_memory() == (0, 0, 0)
    with measure_memory() as use:
        pass
    assert use.peak.gpu == 0


def fail(device):
    raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_seen_and_its_peak_is_exact():
    import torch

    torch.zeros(1, device="cuda")
    with measure_memory() as outer:
        kept = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        with measure_memory() as inner:
            torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")  # freed at once: no sample need see it
        torch.zeros(32 * MIB, dtype=torch.uint8, device="cuda")
    before = outer.before.gpu
    assert outer.after.gpu - before == kept.nbytes
    assert outer.peak.gpu - before == inner.peak.gpu - before == kept.nbytes + 256 * MIB
    assert outer.after.gpu_reserved >= outer.after.gpu
