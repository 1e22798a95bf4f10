"""Re-block a full-size E2B mobile checkpoint for llama.cpp, and run it beside transformers on the same bits.

    python bench/reblock_e2b.py [--folder /tmp/big] [--tiny]

The weights are random codes of the published sizes and layout; what they say is nonsense, what they cost is not. Their
head differs from the embedding, so it is written as a tensor of its own, as it would be for a checkpoint that has one.
transformers unpacks the weights at every token, which takes about 22 s on two cores: two tokens are measured.
"""

import argparse
import tempfile
from pathlib import Path

from random_checkpoint import write_random_checkpoint
from watched import fill_the_cache, watch

from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.testing import write_tiny_checkpoint

NUM_TOKENS = {"llama_cpp": 64, "transformers": 2}
EXPORT = """
import json, sys
from gemma_qat_kit.export.gguf import export_gguf
made = export_gguf(sys.argv[1], sys.argv[2], report=lambda progress: None)
print(json.dumps({"seconds": made.seconds, "tensors": made.num_tensors}))
"""
RUN = """
import json, sys, time
import gemma_qat_kit as gqk
started = time.perf_counter()
model = gqk.load(sys.argv[1], engine=sys.argv[3], context_length=512, report=lambda progress: None)
loaded = time.perf_counter() - started
done, seconds = 0, 0.0
while done < int(sys.argv[2]):
    started = time.perf_counter()
    reply = model.generate("the sky", max_new_tokens=int(sys.argv[2]), temperature=0)
    seconds += time.perf_counter() - started
    done += reply.new_tokens
print(json.dumps({"load_seconds": loaded, "seconds": seconds, "tokens": done}))
"""


def main() -> None:
    """Print what the file costs to make and to run, and what the checkpoint costs in transformers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where 5 GB fit; a temporary folder by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny E2B, to try the script itself")
    arguments = parser.parse_args()
    write = write_tiny_checkpoint if arguments.tiny else write_random_checkpoint
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        measure(write(folder / "source", "E2B", "mobile"), folder / "reblocked.gguf")


def measure(source: Path, path: Path) -> None:
    """Re-block a checkpoint and run both."""
    fill_the_cache(source / "model.safetensors")
    made = watch(EXPORT, source, path)
    head = sum(tensor.nbytes for tensor in read_gguf_header(path).tensors if tensor.name == "output.weight")
    print(
        f"re-blocked in {made.answer['seconds']:.1f} s: {(source / 'model.safetensors').stat().st_size:,} bytes to "
        f"{path.stat().st_size:,} (head {head:,}), {made.answer['tensors']}, peak memory "
        f"{made.peak_rss_bytes / 1e9:.2f} GB, private {made.peak_private_bytes / 1e9:.2f} GB"
    )
    pace = {}
    for engine, place in (("llama_cpp", path), ("transformers", source)):
        ran = watch(RUN, place, NUM_TOKENS[engine], engine)
        pace[engine] = ran.answer["seconds"] / ran.answer["tokens"]
        print(
            f"{engine}: loaded in {ran.answer['load_seconds']:.1f} s, {pace[engine]:.3f} s per token "
            f"({1 / pace[engine]:.2f} tokens/s, {ran.answer['tokens']} tokens), peak memory "
            f"{ran.peak_rss_bytes / 1e9:.2f} GB, private {ran.peak_private_bytes / 1e9:.2f} GB"
        )
    print(f"seconds per token, transformers / llama.cpp: {pace['transformers'] / pace['llama_cpp']:.0f}")


if __name__ == "__main__":
    main()
