"""What `Model.stream` costs beside xllamacpp called directly: tokens/s of the same answer, in turns, in one run.

    python bench/stream_overhead.py [path.gguf]

Without a path it takes the built-in model, whose tokens come fastest and so weigh any overhead most. A larger model
gets fewer and shorter rounds. Run it on a quiet machine: two cores that others want too slow the direct calls more,
since OpenMP's threads wait for each other in a busy loop there and the kit shortens that loop. Target: 0.97.
"""

import statistics
import sys
import time
from pathlib import Path

import xllamacpp

import gemma_qat_kit as gqk
from gemma_qat_kit.load import built_in_checkpoint

QUESTION = "Tell me a long story about the sea."


def direct_server(path: Path, num_threads: int) -> xllamacpp.Server:
    """Return llama.cpp's server in this process, set up as the kit sets it up."""
    params = xllamacpp.CommonParams()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 2048, 1, 1
    params.ui = False
    return xllamacpp.Server(params)


def time_direct(server: xllamacpp.Server, num_tokens: int) -> tuple[float, str]:
    """Return tokens/s and the text of one answer by xllamacpp."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
    }
    pieces, started = [], time.perf_counter()
    server.handle_chat_completions(body, pieces.append)
    seconds = time.perf_counter() - started
    deltas = [choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"]]
    return sum(map(bool, deltas)) / seconds, "".join(deltas)


def time_ours(model: gqk.Model, num_tokens: int) -> tuple[float, str]:
    """Return tokens/s and the text of one answer by `Model.stream`."""
    started = time.perf_counter()
    pieces = list(model.stream(QUESTION, max_new_tokens=num_tokens, temperature=0))
    return len(pieces) / (time.perf_counter() - started), "".join(pieces)


def main() -> None:
    """Print the median of the ratios, each of two answers one right after the other."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else built_in_checkpoint()
    rounds, num_tokens = (11, 200) if path.stat().st_size < 2**30 else (5, 40)
    with gqk.load(path, context_length=2048) as model:
        server = direct_server(path, model.runner.num_threads)
        time_direct(server, num_tokens), time_ours(model, num_tokens)  # both have read the prompt once
        pairs = [(time_direct(server, num_tokens), time_ours(model, num_tokens)) for _ in range(rounds)]
        name = model.name
    num_same = sum(direct == ours for (_, direct), (_, ours) in pairs)
    ratios = [ours / direct for (direct, _), (ours, _) in pairs]
    direct, ours = (statistics.median(rate for rate, _ in column) for column in zip(*pairs, strict=True))
    spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{name}: xllamacpp {direct:.1f} tokens/s, Model.stream {ours:.1f}")
    print(f"median ratio of {rounds} rounds {statistics.median(ratios):.3f} ({spread}), same answer in {num_same}")


if __name__ == "__main__":
    main()
