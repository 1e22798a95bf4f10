"""Write a full-size E2B as a Q4_0 GGUF: 10 GB of random bf16 weights, beside llama.cpp's own quantizer.

    python bench/export_e2b.py [--llama-python /path/to/python] [--folder /tmp/big] [--tiny]

The other Python has llama-cpp-python, whose `llama_model_quantize` reads a BF16 GGUF of the same weights and is told to
use the same types (Q6_K tables) and as many threads. Both read from a warm disk cache as far as memory reaches. Ours
also looks for the grid of QAT weights, syncs the file to the disk, and reads it back; theirs does not.
Targets: faster than llama.cpp, under 2 GB of memory at the peak, under 1 GB of it private.
"""

import argparse
import math
import tempfile
import zlib
from pathlib import Path

from random_checkpoint import write_random_checkpoint
from watched import Watched, fill_the_cache, watch

from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.machine import read_cpu_count
from gemma_qat_kit.testing import write_tiny_checkpoint

OURS = """
import json, sys
from gemma_qat_kit.export.gguf import export_gguf
made = export_gguf(sys.argv[1], sys.argv[2], sys.argv[3], report=lambda progress: None)
print(json.dumps({"seconds": made.seconds}))
"""
THEIRS = """
import ctypes, json, sys, time
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = int(sys.argv[3]), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
params.token_embedding_type = params.output_tensor_type = 14  # GGML_TYPE_Q6_K
started = time.perf_counter()
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params))
assert code == 0, code
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    """Print seconds, throughput and peak memory of both, and whether their files are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--folder", type=Path, help="where 20 GB fit; a temporary folder by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny E2B, to try the script itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        measure(Path(temporary), arguments.llama_python, write_tiny_checkpoint if arguments.tiny else None)


def measure(folder: Path, llama_python: str | None, write=None) -> None:
    """Write the weights, then the file, by one and by the other."""
    source = (write or write_random_checkpoint)(folder / "source", "E2B", "bf16")
    fill_the_cache(source / "model.safetensors")
    ours = watch(OURS, source, folder / "ours.gguf", "q4_0")
    num_values = sum(math.prod(tensor.shape) for tensor in read_gguf_header(folder / "ours.gguf").tensors)
    show("gemma_qat_kit", ours, 2 * num_values, folder / "ours.gguf")
    if llama_python is None:
        return
    watch(OURS, source, folder / "bf16.gguf", "bf16")
    (source / "model.safetensors").unlink()
    fill_the_cache(folder / "bf16.gguf")
    theirs = watch(THEIRS, folder / "bf16.gguf", folder / "theirs.gguf", read_cpu_count(), python=llama_python)
    show("llama.cpp", theirs, 2 * num_values, folder / "theirs.gguf")
    print(f"seconds, ours / theirs: {ours.answer['seconds'] / theirs.answer['seconds']:.2f}")
    compare(folder / "ours.gguf", folder / "theirs.gguf")


def show(who: str, watched: Watched, input_bytes: int, path: Path) -> None:
    """Print one row."""
    seconds = watched.answer["seconds"]
    print(
        f"{who}: {seconds:.1f} s, {input_bytes / 1e9 / seconds:.3f} GB/s of bf16 input, peak memory "
        f"{watched.peak_rss_bytes / 1e9:.2f} GB, private {watched.peak_private_bytes / 1e9:.2f} GB, "
        f"file {path.stat().st_size:,} bytes"
    )


def compare(ours: Path, theirs: Path) -> None:
    """Print how many tensors have the same type, and how many the same bytes."""
    mine, other = ({t.name: t for t in read_gguf_header(path).tensors} for path in (ours, theirs))
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    types = [name for name in mine if mine[name].ggml_type != other[name].ggml_type]
    same = sum(checksum(ours, mine[name]) == checksum(theirs, other[name]) for name in mine)
    print(f"{len(mine)} tensors: {len(types)} of another type {types[:3]}, {same} with the same bytes")


def checksum(path: Path, tensor) -> int:
    """Return the checksum of one tensor's bytes."""
    value, left = 0, tensor.nbytes
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        while left and (piece := file.read(min(left, 2**24))):
            value, left = zlib.crc32(piece, value), left - len(piece)
    return value


if __name__ == "__main__":
    main()
