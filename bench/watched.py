"""Run some Python in a fresh process and watch the memory that it and its children take."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_SECONDS = 0.05


@dataclass(frozen=True)
class Watched:
    """What a process answered and took.

    Attributes:
        answer: The object in the last line that it printed, JSON.
        peak_rss_bytes: Most memory at once, pages of mapped files included.
        peak_private_bytes: Most that was its own and lies in no file.
    """

    answer: dict
    peak_rss_bytes: int
    peak_private_bytes: int


def watch(code: str, *arguments: object, python: str = sys.executable) -> Watched:
    """Run code with `sys.argv[1:]` set to the arguments."""
    command = [python, "-c", code, *map(str, arguments)]
    peak_rss = peak_private = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            rss, private = _memory(child.pid)
            peak_rss, peak_private = max(peak_rss, rss), max(peak_private, private)
            time.sleep(EVERY_SECONDS)
        lines = child.stdout.read().splitlines()
    if child.returncode:
        raise SystemExit(f"the process ended with code {child.returncode}")
    return Watched(json.loads(lines[-1]), peak_rss, peak_private)


def _memory(pid: int) -> tuple[int, int]:
    """Return the resident and the private bytes of a process and its children."""
    try:
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
        rows = [_rollup(pid) for pid in pids]
    except (psutil.Error, OSError):
        return 0, 0
    return sum(rss for rss, _ in rows), sum(private for _, private in rows)


def _rollup(pid: int) -> tuple[int, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kib["Rss"], 1024 * (kib["Anonymous"])


def fill_the_cache(path: Path) -> None:
    """Read a file once, so that every measurement finds it in memory as far as it fits there."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass
