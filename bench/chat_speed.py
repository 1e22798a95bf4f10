"""Chat at full size: E2B mobile and q4_0 beside xllamacpp, the memory's limit, the plan, and stock transformers.

    python bench/chat_speed.py [--folder /tmp/big] [--mobile FOLDER] [--tiny] [--tokens 24] [--rounds 3]

The weights are random codes of the published sizes and layout; what they say is nonsense, what they cost is not. The
answers are taken in turns, one right after the other in one process, so that the ratios hold on a machine that others
use; the times do not. xllamacpp computes with the threads that the kit has chosen. Stock transformers unpacks every
weight at every token: two tokens are measured, after one that is not.
Targets: 0.97 of xllamacpp, 60 % of the limit, 200 times stock transformers.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from random_checkpoint import write_random_checkpoint
from stream_overhead import QUESTION, direct_server
from watched import fill_the_cache, watch

import gemma_qat_kit as gqk
from gemma_qat_kit.memory.measure_process import process_memory
from gemma_qat_kit.testing import write_tiny_checkpoint

STOCK = """
import json, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging
logging.set_verbosity_error()
config = AutoConfig.from_pretrained(sys.argv[1])
config.vision_config = config.audio_config = None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
ids, seconds = torch.tensor([[2, 105, 93, 107]]), []
cache = None
with torch.inference_mode():
    for _ in range(3):
        started = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - started)
print(json.dumps({"seconds_per_token": min(seconds[1:])}))
"""


def time_direct(server, num_tokens: int) -> float:
    """Return tokens/s of one answer by xllamacpp, by its own count."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": num_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    pieces, started = [], time.perf_counter()
    server.handle_chat_completions(body, pieces.append)
    seconds = time.perf_counter() - started
    return next(piece["usage"]["completion_tokens"] for piece in reversed(pieces) if piece.get("usage")) / seconds


def time_ours(model: gqk.Model, num_tokens: int) -> float:
    """Return tokens/s of one answer by `Model.stream`."""
    stream = model.stream(QUESTION, max_new_tokens=num_tokens, temperature=0)
    list(stream)
    return stream.reply.new_tokens / stream.reply.seconds


def measure(source: Path, name: str, num_tokens: int, rounds: int) -> float:
    """Print one checkpoint's figures and return its tokens/s."""
    started = time.perf_counter()
    with gqk.load(source, context_length=2048, report=lambda progress: None) as model:
        print(f"{name}: {model!r}, loaded in {time.perf_counter() - started:.1f} s", flush=True)
        path, num_threads = model.runner.path, model.runner.num_threads
        server = direct_server(path, num_threads)
        time_direct(server, num_tokens), time_ours(model, num_tokens)  # both have read the prompt once
        pairs = [(time_direct(server, num_tokens), time_ours(model, num_tokens)) for _ in range(rounds)]
        ratios = [ours / direct for direct, ours in pairs]
        direct, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"  xllamacpp {direct:.2f} tokens/s, Model.stream {ours:.2f}: {statistics.median(ratios):.3f} ({spread})",
            flush=True,
        )
        del server
        if model.size:
            report_limit(model, max(rate for _, rate in pairs))
        return ours


def report_limit(model: gqk.Model, tokens_per_second: float) -> None:
    """Print the share of the memory's limit, and the memory that is held beside the plan."""
    limit = gqk.speed_limit(model)
    print(f"  {limit}; best answer {100 * tokens_per_second / limit.tokens_per_second:.0f} % of it")
    held = process_memory(model.runner._child.pid, children=False)
    plan = gqk.plan_memory(model.size, model.format, context_length=2048)
    print(
        f"  held {held.ram / 2**30:.2f} GiB private and {held.mapped / 2**30:.2f} of the file; planned "
        f"{plan.in_place('ram') / 2**30:.2f} and up to {plan.in_place('mapped') / 2**30:.2f}"
    )


def main() -> None:
    """Print the figures of both checkpoints, then how many times stock transformers the first one is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where 8 GB fit; a temporary folder by default")
    parser.add_argument("--mobile", type=Path, help="a folder that random_checkpoint.py has written")
    parser.add_argument("--tiny", action="store_true", help="a tiny E2B, to try the script itself")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    write = write_tiny_checkpoint if chosen.tiny else write_random_checkpoint
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        mobile = chosen.mobile or write(Path(temporary) / "mobile", "E2B", "mobile")
        pace = measure(mobile, "E2B mobile", chosen.tokens, chosen.rounds)
        fill_the_cache(mobile / "model.safetensors")
        stock = watch(STOCK, mobile)
        seconds = stock.answer["seconds_per_token"]
        print(
            f"stock transformers on the same bits: {seconds:.2f} s a token, peak {stock.peak_rss_bytes / 2**30:.2f} "
            f"GiB; Model.stream is {pace * seconds:.0f} times as fast",
            flush=True,
        )
        measure(write(Path(temporary) / "q4_0", "E2B", "q4_0"), "E2B q4_0", chosen.tokens, chosen.rounds)


if __name__ == "__main__":
    main()
