"""Predict and measure the memory of full-size checkpoints with random weights, each in a fresh process.

    python bench/memory_measured.py /tmp/full gemma_qat_kit/memory/measured.jsonl

Writes each checkpoint into the folder (29 GB in all; one that is there is used) and keeps a receipt for each load, each
answer at 2,048 and 8,192 tokens of context, and each training run: the same receipts that `load`, `chat` and training
write for everybody. The prompt fills the context in transformers; in llama.cpp, which allocates the whole context on
loading, it has 1,500 tokens at most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import write_random_checkpoint
from watched import fill_the_cache

from gemma_qat_kit.memory.receipts import receipts

CHECKPOINTS = (("E2B", "mobile"), ("E2B", "q4_0"), ("E4B", "q4_0"), ("E2B", "bf16"), ("E2B", "w4a16"))
CONTEXTS = (2048, 8192)
TRAINING = (
    {"task": "finetune", "sequence_length": 1024},
    {"task": "finetune", "sequence_length": 512, "gradient_checkpointing": False},
    {"task": "qat", "teacher": "none", "sequence_length": 512},
    {"task": "qat", "teacher": "none", "sequence_length": 256, "gradient_checkpointing": False},
    {"task": "qat", "teacher": "none", "sequence_length": 256, "gradient_accumulation": 2, "optimizer": "sgd"},
)
_CHAT = """
import sys
import gemma_qat_kit as gqk
from gemma_qat_kit.testing import tiny_tokenizer
path, length = sys.argv[1], int(sys.argv[2])
with gqk.load(path, context_length=length, device="cpu", report=lambda progress: None) as model:
    num_tokens = length - 16 if model.engine == "transformers" else min(length - 16, 1500)
    text = "the cat sat on the mat and "
    text *= num_tokens // len(tiny_tokenizer().encode(text * 8).ids) * 8
    print(model.generate(text, max_new_tokens=8, temperature=0))
"""
_TRAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from training_loop import measure_training
measure_training(json.loads(sys.argv[2]))
"""


def main() -> None:
    """Run what the command line asks for and print the receipts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="'training', or size and format as in 'E2B mobile'")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "receipts.jsonl"
        for size, format in CHECKPOINTS:
            if arguments.only in (None, f"{size} {format}"):
                path = _checkpoint(arguments.folder / f"{size}-{format}", size, format)
                for length in CONTEXTS:
                    _run(written, _CHAT, path, length)
        if arguments.only in (None, "training"):
            for settings in TRAINING:
                _run(written, _TRAIN, Path(__file__).parent, json.dumps(settings))
        lines = written.read_text()
    if arguments.only:
        lines = (arguments.output.read_text() if arguments.output.exists() else "") + lines
    arguments.output.write_text(lines)
    print(receipts(arguments.output))


def _checkpoint(folder: Path, size: str, format: str) -> Path:
    """Return a full-size checkpoint's path, with the file in the system's cache as far as it fits."""
    file = folder / (f"{size}-q4_0.gguf" if format == "q4_0" else "model.safetensors")
    if not file.exists():
        write_random_checkpoint(folder, size, format)
    fill_the_cache(file)
    return file if format == "q4_0" else folder


def _run(receipts_file: Path, code: str, *arguments: object) -> None:
    print("measuring:", *arguments, file=sys.stderr, flush=True)
    environment = os.environ | {"GQK_RECEIPTS": str(receipts_file)}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, check=True, stdout=2)


if __name__ == "__main__":
    main()
