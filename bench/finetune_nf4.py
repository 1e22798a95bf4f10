"""Fine-tune one model as `finetune` does and as peft on bitsandbytes' NF4 does, in turns, and say how they compare.

    python bench/finetune_nf4.py smollm2-135m --length 64 --steps 3
    python bench/random_checkpoint.py E2B bf16 /tmp/E2B [--layers 5]; python bench/finetune_nf4.py /tmp/E2B --length 128
    python bench/finetune_nf4.py /tmp/E2B --length 2048 --cap 14.56        # a T4's memory, on any GPU

Both get the same conversations, rank, linears and dtype, four conversations an update, one at a time, and recompute
activations. Theirs takes transformers' own loss; embeddings stay in 16 bits on both sides. Each turn is a process of
its own. The peak is that of the tuning: private memory, on a GPU `max_memory_reserved`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import gemma_qat_kit as gqk
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.finetune.conversations import read_conversations
from gemma_qat_kit.finetune.examples import make_batch, make_examples
from gemma_qat_kit.finetune.lora import find_linears
from gemma_qat_kit.memory.measure import measure_memory

ACCUMULATED, RANK = 4, 16
SIDES = ("ours", "nf4")


def quiet(progress) -> None:
    """Show nothing."""


def rows(length: int) -> list[dict]:
    """Return conversations that are all longer than an example."""
    return [{"question": "the sky is", "answer": "blue and " * length}] * 8


def ours(options) -> list[float]:
    """Tune adapters through the grid and return the seconds of each step."""
    settings = gqk.FinetuneSettings(options.steps, 1, options.length, ACCUMULATED, num_evaluations=1, rank=RANK,
                                    dtype=options.dtype)  # fmt: skip
    is_built_in = options.source == BUILT_IN_SIZE
    kind = {} if is_built_in else {"engine": "transformers"}
    with gqk.load(options.source, "float32" if is_built_in else "q4_0", report=quiet, **kind) as model:
        return [step.seconds for step in gqk.finetune(model, rows(options.length), settings=settings,
                                                      report=quiet).steps]  # fmt: skip


def nf4(options) -> list[float]:
    """Tune peft's adapters beside NF4 and return the seconds of each step."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = _loaded_in_nf4(options)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=find_linears(model, gqk.FinetuneSettings().targets))
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    examples = make_examples(read_conversations(rows(options.length)), tokenizer, options.length).train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        for example in examples[:ACCUMULATED]:
            batch = make_batch([example], 0, model.device)
            out = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False)
            (out.loss / ACCUMULATED).backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def _loaded_in_nf4(options) -> tuple:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from gemma_qat_kit.engines.transformers_config import load_config

    dtype = getattr(torch, options.dtype)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                   bnb_4bit_use_double_quant=True)  # fmt: skip
    how = {"quantization_config": four_bits, "dtype": dtype,
           "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}  # fmt: skip
    if options.source != BUILT_IN_SIZE:
        config = load_config(options.source, text_only=True)
        model = AutoModelForCausalLM.from_pretrained(options.source, config=config, **how)
        return model, AutoTokenizer.from_pretrained(options.source)
    with tempfile.TemporaryDirectory() as folder:  # peft's side needs files
        with gqk.load(BUILT_IN_SIZE, "float32", device="cpu", report=quiet) as model:
            model.hf[0].save_pretrained(folder)
            tokenizer = model.hf[1]
        return AutoModelForCausalLM.from_pretrained(folder, **how), tokenizer


def one_turn(options) -> None:
    """Run one side and print its figures."""
    if torch.cuda.is_available() and options.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 2**30 / total))
    with measure_memory() as use:
        seconds = {"ours": ours, "nf4": nf4}[options.side](options)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_reserved() if on_gpu else use.peak.in_place("ram")
    print(json.dumps({"side": options.side, "gib": round(peak / 2**30, 3),
                      "step_seconds": [round(each, 3) for each in seconds]}), flush=True)  # fmt: skip


def main() -> None:
    """Run both sides in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="smollm2-135m, or a folder with a bf16 checkpoint")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="the first one is not counted")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cap", type=float, help="GiB of GPU memory that a process may take")
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
    parser.add_argument("--dtype", default="float16" if is_old else "bfloat16")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_turn(options)
        return
    found = {side: [] for side in SIDES}
    for side in SIDES * options.turns:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {side: statistics.median([s for turn in turns for s in turn["step_seconds"][1:]])
               for side, turns in found.items()}  # fmt: skip
    peaks = {side: max(turn["gib"] for turn in turns) for side, turns in found.items()}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.source}, {ACCUMULATED} x {options.length} tokens, {options.dtype}, on {where}:")
    for side in SIDES:
        print(f"  {side}: {seconds[side]:.2f} s a step, {peaks[side]:.2f} GiB")
    ratios = (kind["ours"] / kind["nf4"] for kind in (seconds, peaks))
    print("  ours / NF4: {:.2f} of the time, {:.2f} of the memory".format(*ratios))


if __name__ == "__main__":
    main()
