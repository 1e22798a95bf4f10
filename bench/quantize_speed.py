"""How fast Q4_0 is made, read and faked, beside gguf's numpy and llama.cpp's own C code, in turns, in one run.

    python bench/quantize_speed.py [rows] [columns]

A float32 tensor of 4096 × 14336 (0.235 GB) unless told otherwise. llama.cpp's `ggml_quantize_chunk` and
`dequantize_row_q4_0` share the same rows among the same number of threads; they write into memory that has been used
before, and so does the kit where the line says "reused". Run it on a quiet machine.

Targets: quantize at least 10 times gguf and twice llama.cpp's C code; dequantize level with the C code; fake-quantize
at least 3 GB/s into fresh memory; grid recovery at most 6 times the plain rule's time.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import torch

from gemma_qat_kit.formats import ggml, native, q4_0, q4_0_grid, q4_0_importance
from gemma_qat_kit.machine import read_cpu_count

ROUNDS, PARTS = 9, 64
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def main() -> None:
    """Print GB of float32 a second, median of the rounds, and the ratios that the targets are about."""
    rows, columns = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4096, 14336)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    steps = torch.rand(rows, columns // 32, 1).bfloat16()
    on_grid = (torch.randint(-5, 6, (rows, columns // 32, 32)) * steps).flatten(-2).float()  # as QAT weights are stored
    jobs = make_jobs(weight, on_grid)
    seconds = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    print(f"{rows} x {columns} float32, {read_cpu_count()} threads, kernels {'C' if native.library() else 'torch'}")
    speed = {name: weight.nbytes / 1e9 / statistics.median(times) for name, times in seconds.items()}
    for name, value in speed.items():
        print(f"{name:<44}{value:>8.2f} GB/s")
    for name, ratio in ratios(speed).items():
        print(f"{name:<44}{ratio:>8.2f}")


def make_jobs(weight: torch.Tensor, on_grid: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the calls to time; what each reads is ready."""
    blocks, values, importance = q4_0.quantize(weight), torch.empty_like(weight), torch.rand(weight.shape[-1])
    assert torch.equal(blocks, torch.from_numpy(gguf.quants.quantize(weight.numpy(), Q4_0))), "not gguf's bytes"
    c_blocks, c_values, wide = np.zeros_like(blocks.numpy()), np.zeros_like(weight.numpy()), weight.bfloat16()
    return {
        "quantize, gguf (numpy)": lambda: gguf.quants.quantize(weight.numpy(), Q4_0),
        "quantize, llama.cpp (C), reused": lambda: c_quantize(weight, c_blocks),
        "quantize, kit, fresh": lambda: q4_0.quantize(weight),
        "quantize, kit, reused": lambda: reuse("q4_0_quantize", weight, 0, blocks, 32),
        "dequantize, gguf (numpy)": lambda: gguf.quants.dequantize(c_blocks, Q4_0),
        "dequantize, llama.cpp (C), reused": lambda: c_dequantize(c_blocks, c_values),
        "dequantize, kit, fresh": lambda: q4_0.dequantize(blocks),
        "dequantize, kit, reused": lambda: reuse("q4_0_dequantize", blocks, 0, values, 18),
        "fake-quantize, kit, fresh": lambda: q4_0.fake_quantize(weight),
        "fake-quantize bf16, kit, fresh": lambda: q4_0.fake_quantize(wide),
        "grid recovery, kit, no grid, fresh": lambda: q4_0_grid.quantize(weight),
        "grid recovery, kit, on a grid, fresh": lambda: q4_0_grid.quantize(on_grid),
        "importance, kit, 1/16 of the rows": lambda: q4_0_importance.quantize(weight[: len(weight) // 16], importance),
    }


def reuse(kernel: str, source: torch.Tensor, dtype: int, target: torch.Tensor, group_size: int) -> None:
    """Run a kernel of the kit into memory that has been used before."""
    if native.library():
        native.run(kernel, source, dtype, target=target, group_size=group_size)


def c_quantize(weight: torch.Tensor, out: np.ndarray) -> None:
    """Share llama.cpp's quantizer among the threads."""
    call, rows = ggml._quantize_chunk(), weight.shape[0]
    step = -(-rows // PARTS)

    def part(first: int) -> None:
        count = min(step, rows - first)
        call(Q4_0.value, weight.data_ptr(), out.ctypes.data, first * weight.shape[1], count, weight.shape[1], None)

    with ThreadPoolExecutor(read_cpu_count()) as pool:
        list(pool.map(part, range(0, rows, step)))


def c_dequantize(blocks: np.ndarray, out: np.ndarray) -> None:
    """Share llama.cpp's `dequantize_row_q4_0` among the threads."""
    call = ctypes.CDLL(str(ggml.extension())).dequantize_row_q4_0
    step = -(-len(blocks) // PARTS)

    def part(first: int) -> None:
        count = ctypes.c_int64(min(step, len(blocks) - first) * out.shape[1])
        call(ctypes.c_void_p(blocks[first:].ctypes.data), ctypes.c_void_p(out[first:].ctypes.data), count)

    with ThreadPoolExecutor(read_cpu_count()) as pool:
        list(pool.map(part, range(0, len(blocks), step)))


def ratios(speed: dict[str, float]) -> dict[str, float]:
    """Return what the targets are about."""
    plain = speed["quantize, kit, fresh"]
    slowest = min(speed["grid recovery, kit, no grid, fresh"], speed["grid recovery, kit, on a grid, fresh"])
    return {
        "quantize: kit / gguf": plain / speed["quantize, gguf (numpy)"],
        "quantize: kit / llama.cpp, both reused": speed["quantize, kit, reused"]
        / speed["quantize, llama.cpp (C), reused"],
        "quantize: kit fresh / llama.cpp reused": plain / speed["quantize, llama.cpp (C), reused"],
        "dequantize: kit / llama.cpp, both reused": speed["dequantize, kit, reused"]
        / speed["dequantize, llama.cpp (C), reused"],
        "grid recovery: time / plain rule's": plain / slowest,
    }


if __name__ == "__main__":
    main()
