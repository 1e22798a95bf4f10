"""What memory each notebook takes as it stands, the figure in the facts box at its top, and how long it computes.

Runs the notebooks one after the other as they are committed, offline, and writes the memory to
bench/notebook_facts.json, which a test holds the boxes against: the most that the kernel and its children held at once,
pages of files included. The seconds are printed alone; they are worth something on a machine that does nothing else.

    python bench/notebook_facts.py [00_start_here ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "notebook_facts.json"
EVERY_SECONDS = 0.1
RUN = """
import re, sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    cell.source = re.sub('FOLDER = "(?=[a-z])', f'FOLDER = "{sys.argv[2]}/', cell.source)
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
"""


def main(names: list[str]) -> None:
    """Measure the notebooks named, or all, print each and keep what was found."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not names or path.stem in names:
            seconds, record[path.stem] = measure(path)
            print(f"{path.stem}: {seconds} s, {record[path.stem] / 2**30:.2f} GiB", flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")


def measure(path: Path) -> tuple[int, int]:
    """Run one notebook; return its seconds and the bytes of its kernel at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"HF_HUB_OFFLINE": "1", "GQK_RECEIPTS": f"{folder}/receipts.jsonl", "TMPDIR": folder}
        own["PYTHONPATH"] = str(ROOT)
        started, peak = time.monotonic(), 0
        with subprocess.Popen([sys.executable, "-c", RUN, str(path), folder], env=os.environ | own) as runner:
            while runner.poll() is None:
                peak = max(peak, held_bytes(runner.pid))
                time.sleep(EVERY_SECONDS)
        if runner.returncode:
            raise SystemExit(f"{path.name} ended with code {runner.returncode}")
    return round(time.monotonic() - started), peak


def held_bytes(pid: int) -> int:
    """Sum up what the children of a process hold, by the kernel's own count (RSS)."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    except (psutil.Error, OSError):
        return 0
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
