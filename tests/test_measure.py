"""What is measured: known allocations in this process, in a child, and in a file's pages."""

import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.memory import measure, measure_process, measure_samples
from gemma_qat_kit.memory.measure import Moment, ProcessMemory, measure_memory, process_memory

MIB = 2**20
SLACK = 12 * MIB  # what an interpreter takes on the way: modules, thread stacks
LOST = 2 * MIB  # kernel counts that are folded in late
NEEDS_PROC = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells places apart")
# A fresh interpreter, so that nothing else changes its memory meanwhile. It prints what the last lines computed.
START = """
import mmap, os, subprocess, sys, tempfile, time
from gemma_qat_kit.memory.measure import measure_memory, process_memory
MIB = 2**20
def wait_until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
"""


def numbers_of(code):
    """Run code in an interpreter of its own and return the whole numbers it prints."""
    result = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, check=True)
    return [int(word) for word in result.stdout.split()]


def is_about(measured, expected):
    return expected - LOST <= measured <= expected + SLACK


@NEEDS_PROC
def test_private_bytes_are_those_allocated_and_touched():
    ram, mapped = numbers_of("""
before = process_memory()
block = bytearray(b"x") * (64 * MIB)
after = process_memory()
print(after.ram - before.ram, after.mapped - before.mapped)""")
    assert is_about(ram, 64 * MIB)
    assert mapped < SLACK


@NEEDS_PROC
def test_pages_of_a_file_count_as_mapped_once_they_are_touched():
    untouched, touched, ram = numbers_of("""
with tempfile.TemporaryFile() as file:
    file.write(b"x" * (48 * MIB))
    file.flush()
    before = process_memory()
    pages = mmap.mmap(file.fileno(), 48 * MIB, prot=mmap.PROT_READ)
    between = process_memory()
    assert sum(pages[i] for i in range(0, 48 * MIB, mmap.PAGESIZE))
    after = process_memory()
    print(between.mapped - before.mapped, after.mapped - before.mapped, after.ram - before.ram)""")
    assert untouched < SLACK
    assert is_about(touched, 48 * MIB)
    assert ram < SLACK


@NEEDS_PROC
def test_children_and_theirs_are_counted_unless_they_are_left_out():
    together, alone = numbers_of("""
grandchild = "block = bytearray(b'x') * (40 * 2**20); print('ready', flush=True); input()"
child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
before = process_memory(), process_memory(children=False)
pipe = subprocess.Popen([sys.executable, "-c", child, grandchild], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
pipe.stdout.readline()
after = process_memory(), process_memory(children=False)
pipe.communicate(b"\\n")
print(after[0].ram - before[0].ram, after[1].ram - before[1].ram)""")
    assert 40 * MIB - LOST <= together <= 40 * MIB + 4 * SLACK  # two interpreters more
    assert alone < SLACK


@NEEDS_PROC
def test_a_peak_is_seen_although_it_was_freed_and_in_a_child():
    before, after, peak, child_peak, end = numbers_of("""
with measure_memory() as use:
    block = bytearray(b"x") * (80 * MIB)
    wait_until(lambda: use.peak.ram > use.before.ram + 78 * MIB)
    del block
with measure_memory() as other:
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(b'x') * (60 * 2**20); input()"], stdin=-1)
    wait_until(lambda: other.peak.ram > other.before.ram + 58 * MIB)
    child.communicate(b"\\n")
print(use.before.ram, use.after.ram, use.peak.ram, other.peak.ram - other.before.ram,
      other.after.ram - other.before.ram)""")
    assert is_about(peak - before, 80 * MIB)
    assert after - before < SLACK
    assert is_about(child_peak, 60 * MIB)
    assert end < SLACK


def test_nothing_imports_torch():
    assert numbers_of("""
with measure_memory() as use:
    use._repr_html_()
print(int("torch" in sys.modules))""") == [0]


def test_psutil_answers_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(measure_process, "PROC", "/nowhere")
    expected = process_memory(children=False)
    # Pages of its own: the allocator may have free memory left over from other tests.
    block = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(32):  # in pieces: a bytes object as large may stay with the allocator
        block.write(b"x" * MIB)
    assert is_about(process_memory(children=False).ram - expected.ram, len(block))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in measure_process.child_pids(os.getpid())
    finally:
        child.communicate(b"\n")


def test_a_system_that_does_not_tell_places_apart_counts_everything_as_ram(monkeypatch):
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=7 * MIB))
    monkeypatch.setattr(measure_process, "PROC", "/nowhere")
    monkeypatch.setattr("psutil.Process", lambda pid: memory)
    assert process_memory(1, children=False) == ProcessMemory(7 * MIB, 0)


@pytest.fixture
def unreadable(monkeypatch):
    monkeypatch.setattr(measure_process, "PROC", "/nowhere")
    monkeypatch.setitem(sys.modules, "psutil", None)


@pytest.mark.usefixtures("unreadable")
def test_what_cannot_be_read_is_none_and_says_so_when_numbers_are_asked_for():
    assert process_memory() is None
    with measure_memory() as use:
        use.mark("nothing to see")
    assert (use.samples, use.marks) == ((), ())
    for ask in (lambda: use.before, lambda: use.after, lambda: use.peak, use.now):
        with pytest.raises(MissingLibraryError, match=r"cannot be read.*pip install psutil"):
            ask()
    assert "cannot be read" in str(use)
    assert "cannot be read" in use._repr_html_()


def test_a_process_that_has_ended_is_none_and_a_child_that_has_ended_counts_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_memory(child.pid) is None
    alone, with_it = measure_process.add_up(os.getpid(), ()), measure_process.add_up(os.getpid(), [child.pid])
    assert abs(with_it.ram - alone.ram) < SLACK


def test_a_measurement_that_was_not_started_says_so():
    use = measure_memory()
    for name in ("before", "after", "peak"):
        with pytest.raises(BadSettingError, match=r"Nothing was measured yet.*call start\(\)"):
            getattr(use, name)
    assert use.now().total_bytes > 0
    assert use.samples == ()
    assert "Nothing was measured yet" in use._repr_html_()


def test_start_and_stop_work_outside_a_with_block_and_again():
    use = measure_memory()
    use.start()
    with pytest.raises(BadSettingError, match=r"runs already.*Call stop\(\)"):
        use.start()
    use.mark("first")
    use.stop()
    use.stop()
    count = len(use.samples)
    assert not use.is_running
    use.now()
    assert len(use.samples) == count  # a look behind the end belongs to nothing
    use.start()
    assert use.marks == ()
    use.stop()


def test_samples_go_forward_in_time_from_before_to_after():
    with measure_memory() as use:
        use.now()
        live = use.samples
        use.mark("half")
    times = [moment.seconds for moment in use.samples]
    assert times == sorted(set(times))
    assert len(use.samples) > len(live) >= 2
    assert (use.samples[0], use.samples[-1]) == (use.before, use.after)
    assert [(name, moment in use.samples) for name, moment in use.marks] == [("half", True)]


def test_the_sampler_ends_with_the_measurement_and_with_one_that_is_dropped():
    def samplers():
        return [thread for thread in threading.enumerate() if thread.name == "measure_memory"]

    use = measure_memory()
    use.start()
    assert samplers()
    del use
    end = time.monotonic() + 10
    while samplers():
        assert time.monotonic() < end
        time.sleep(0.02)


def moment(seconds, ram, gpu=0):
    return Moment(seconds, gpu, ram, 0)


def test_long_runs_keep_a_bounded_number_of_samples_and_every_peak():
    seen, count = measure_samples.Samples(), 40_000
    for i in range(count):
        seen.add(moment(i, 1000 if i % 9973 == 5000 else i % 7))
    kept = seen.all
    assert len(kept) <= measure_samples.MOST_SAMPLES + 2
    assert len(kept) > measure_samples.MOST_SAMPLES / 4
    assert [m.seconds for m in kept if m.ram == 1000] == [i for i in range(count) if i % 9973 == 5000]
    assert (kept[0].seconds, kept[-1].seconds) == (0, count - 1)
    gaps = [b.seconds - a.seconds for a, b in itertools.pairwise(kept)]
    assert min(gaps) > 0
    assert max(gaps) <= 64


def test_the_peak_of_a_place_and_of_the_total_are_at_their_own_moments():
    seen = measure_samples.Samples()
    for m in (moment(0, 10, gpu=1), moment(1, 1, gpu=9), moment(2, 6, gpu=6), moment(1.5, 99)):  # the last is late
        seen.add(m)
    assert [seen.peak.in_place(place) for place in ("ram", "gpu", "mapped", "disk")] == [10, 9, 0, 0]
    assert (seen.peak.total_bytes, seen.peak.moment.seconds) == (12, 2)
    seen.add_gpu_peak(40)
    assert (seen.peak.gpu, seen.peak.total_bytes) == (40, 40)


def test_text_lists_places_and_marks():
    with measure_memory() as use:
        use.mark("loaded")
    assert "RAM, private" in str(use)
    assert ", loaded: " in str(use)
    assert measure.MemoryUse(()).total_bytes == 0


def test_an_answer_that_the_garbage_collector_ends_while_another_starts_hangs_nobody(monkeypatch):
    forgotten = measure_memory()
    forgotten.start()
    monkeypatch.setattr("gemma_qat_kit.memory.measure.reset_gpu_peak", forgotten.stop)  # under the lock, as in start()
    with measure_memory() as use:
        assert not forgotten.is_running
    assert use.peak.total_bytes > 0
