"""What an MTP drafter costs and gives in llama.cpp: tokens/s with it over tokens/s without, in turns, in one run.

    python bench/drafter_cost.py [E2B] [--folder /tmp/big] [--tiny]

Full-size random weights (E2B: 3.4 GB), so the drafter's own tokens are never accepted: that is the cost of a draft. The
gain is measured with llama.cpp's own synthetic acceptance, which takes drafted tokens at given rates whatever they say
(the text is then nonsense, its speed is not): 80, 54 and 43 % by depth, as measured with the real 12B on an RTX 5060
(llama.cpp's discussion 25357), and all of them. The last row is what `load` compares with: the speed without drafts
that it measures on the server with the drafter; 1.00 is right.
"""

import argparse
import json
import os
import statistics
import tempfile
import urllib.request
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the kit has it on a few cores, before llama.cpp is loaded

import xllamacpp
from random_checkpoint import write_random_checkpoint, write_random_drafter

from gemma_qat_kit.testing import write_tiny_checkpoint, write_tiny_drafter

NUM_TOKENS, ROUNDS = 32, 3
ACCEPTED = {"never accepted": None, "80, 54, 43 % accepted": [0.8, 0.54, 0.43], "all accepted": [1.0, 1.0, 1.0]}


def server(model: Path, drafter: Path | None = None, rates: list[float] | None = None) -> xllamacpp.Server:
    """Return llama.cpp's server in this process, set up as the kit sets it up."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(model), 1024, 1, 1
    params.hostnames, params.port, params.fit_params, params.ui = ["127.0.0.1"], 0, False, False
    params.cache_ram_mib, params.n_ctx_checkpoints = 0, 2
    if drafter:
        params.speculative.draft.mparams.path = str(drafter)
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.synth_rates = rates or []
    return xllamacpp.Server(params)


def timings(running: xllamacpp.Server, num_tokens: int) -> dict:
    """Return what llama.cpp measured of one answer."""
    body = {"prompt": "Tell me of the sea.", "max_tokens": num_tokens, "temperature": 0, "top_k": 1, "ignore_eos": True}
    request = urllib.request.Request(f"{running.listening_address}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request) as response:
        return json.load(response)["timings"]


def speed(running: xllamacpp.Server) -> tuple[float, float]:
    """Return tokens/s and the share of drafted tokens that were accepted."""
    found = timings(running, NUM_TOKENS)
    rate = found.get("draft_n_accepted", 0) / max(1, found.get("draft_n", 0))
    return (found["predicted_n"] - 1) / found["predicted_ms"] * 1000, rate


def main() -> None:
    """Print the speed without a drafter, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", default="E2B")
    parser.add_argument("--folder", type=Path, help="where the weights fit; a temporary folder by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        model, drafter = written(Path(temporary), arguments.size, arguments.tiny)
        measure(arguments.size, server(model), {name: server(model, drafter, r) for name, r in ACCEPTED.items()})


def written(folder: Path, size: str, is_tiny: bool) -> tuple[Path, Path]:
    """Write a model and its drafter, and return both GGUF files."""
    if is_tiny:
        from gemma_qat_kit.drafter import matching_drafter

        model = write_tiny_checkpoint(folder, size, "q4_0")
        write_tiny_drafter(folder / "drafter", size)
        return model, matching_drafter(model, None, "llama_cpp")
    model = write_random_checkpoint(folder, size, "q4_0")
    return model, write_random_drafter(folder / "drafter.gguf", size, model)


def measure(size: str, plain: xllamacpp.Server, drafted: dict[str, xllamacpp.Server]) -> None:
    """Ask all of them in turns."""
    for running in (plain, *drafted.values()):
        speed(running)  # reads the weights
    rows, probes = {name: [] for name in drafted}, []
    for _ in range(ROUNDS):
        alone, _ = speed(plain)
        for name, running in drafted.items():
            fast, rate = speed(running)
            rows[name].append((fast / alone, rate, alone))
        steps = [timings(drafted["never accepted"], 2)["predicted_ms"] for _ in range(5)]
        probes.append(1000 / statistics.median(steps) / alone)
    alone = statistics.median(row[2] for row in rows["never accepted"])
    print(f"{size}, {ROUNDS} rounds of {NUM_TOKENS} tokens: {alone:.2f} tokens/s without a drafter")
    for name, found in rows.items():
        ratios = [row[0] for row in found]
        rate = statistics.mean(row[1] for row in found)
        print(f"  {name}: {statistics.median(ratios):.2f} of it ({min(ratios):.2f} to {max(ratios):.2f}), {rate:.0%}")
    print(f"  without drafts, on the server with the drafter: {statistics.median(probes):.2f} of it")


if __name__ == "__main__":
    main()
