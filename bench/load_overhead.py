"""What `load` adds to the library call it wraps, at full size: E2B mobile, 2.5 GB of random weights, on the CPU.

    python bench/load_overhead.py [folder]

Both load the text model and the tokenizer from a warm disk cache, in turns, each in a fresh process. Target: 1.05.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import write_random_checkpoint

ROUNDS = 7
PLAIN = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained(folder)
config.vision_config = config.audio_config = None
model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
OURS = """
import gemma_qat_kit as gqk
model = gqk.load(folder, engine="transformers")
"""
# Imports are paid once a session and by both; they are left out of the time.
TIMER = """
import sys, time
import torch, transformers, gemma_qat_kit.load, gemma_qat_kit.engines.transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.gemma4 import modeling_gemma4
from transformers.quantizers import auto
transformers.logging.set_verbosity_error()
folder, started = sys.argv[1], time.perf_counter()
{body}
print("seconds", time.perf_counter() - started)
"""


def seconds(body: str, folder: Path) -> float:
    """Return the seconds that a fresh process spends in `body`."""
    code = TIMER.format(body=body)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the ratio of the medians."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else write_random_checkpoint(Path(temporary), "E2B", "mobile")
        seconds(PLAIN, folder)  # fills the disk cache
        pairs = [(seconds(PLAIN, folder), seconds(OURS, folder)) for _ in range(ROUNDS)]
    plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = ", ".join(f"{b / a:.2f}" for a, b in pairs)
    print(f"E2B mobile: transformers {plain:.2f} s, load {ours:.2f} s, ratio {ours / plain:.3f} (rounds: {spread})")


if __name__ == "__main__":
    main()
