"""What a Binder page takes in memory: JupyterLab's server and one kernel in a control group of 2 GB, stage by stage.

mybinder.org guarantees 450 MB and ends a session at 2 GB. Needs root and control groups of version 1 (`memory`). Prints
what all processes in the group hold after each stage: their own, and the pages of the files that they map, each once.

    python bench/binder_memory.py
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP = Path("/sys/fs/cgroup/memory/gqk_binder")
LIMIT_BYTES = 2 * 10**9
PORT = 18765
TOKEN = secrets.token_hex(16)
FIRST_PAGE = ("00_start_here", r"import os|SIZE = |gqk\.environment|gqk\.catalog|picker = ")
ANSWER = ("00_start_here", r"model = picker|for text in|widgets\.ChatPanel")
STAGES = {
    "first page: environment, catalog, picker": FIRST_PAGE,
    "+ planner: MemoryPanel": "widgets.MemoryPanel('E2B', 'q4_0')",
    "+ BitExplorer (imports torch)": "widgets.BitExplorer()",
    "+ the built-in model answers": ANSWER,
}


def main() -> None:
    """Start the server in the group, run each stage in its kernel, and print the memory after it."""
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    with tempfile.TemporaryDirectory() as folder, start_server(folder) as server:
        try:
            wait_for_server()
            say("JupyterLab's server")
            client = connect(folder, ask("api/kernels", "POST")["id"])
            say("+ a kernel")
            for name, stage in STAGES.items():
                for source in sources(stage):
                    run(client, source)
                say(name)
            client.stop_channels()
        finally:
            server.terminate()
    time.sleep(2)  # until the kernel has followed its server
    GROUP.rmdir()


def start_server(folder: str) -> subprocess.Popen:
    """Start JupyterLab in the group, with folders of its own."""
    own = {
        name: f"{folder}/{name.lower()}" for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    own |= {"GQK_RECEIPTS": "off", "HF_HUB_OFFLINE": "1", "BINDER_SERVICE_HOST": "here"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={PORT}",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={ROOT}"]  # fmt: skip
    join = lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
    return subprocess.Popen(command, env=os.environ | own, preexec_fn=join, stderr=subprocess.DEVNULL)


def wait_for_server() -> None:
    for _ in range(300):
        try:
            return ask("api")
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("JupyterLab did not answer within a minute")


def ask(path: str, method: str = "GET") -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/{path}", method=method)
    request.add_header("Authorization", f"token {TOKEN}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def connect(folder: str, kernel: str):
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=f"{folder}/jupyter_runtime_dir/kernel-{kernel}.json")
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(60)
    return client


def sources(stage) -> list[str]:
    """The code of a stage: a line, or the cells of a notebook that start as given."""
    if isinstance(stage, str):
        return [stage]
    name, starts = stage
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return [code for cell in cells if cell["cell_type"] == "code" and re.match(starts, code := "".join(cell["source"]))]


def run(client, source: str) -> None:
    """Run a cell as a notebook does."""
    reply = client.execute_interactive(source, output_hook=lambda message: None, timeout=300)["content"]
    if reply["status"] != "ok":
        raise RuntimeError("\n".join(reply["traceback"]))


def say(stage: str) -> None:
    own, files = (part / 1e6 for part in memory())
    print(f"{stage:42} {own:4.0f} MB own + {files:3.0f} MB of files = {own + files:4.0f} MB", flush=True)


def memory() -> tuple[int, int]:
    """Sum up private pages over the group's processes, and the mapped pages of each file once."""
    own, files = 0, Counter()
    for pid in (GROUP / "cgroup.procs").read_text().split():
        name, kib = "", Counter()
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-", line):
                name = [*line.split(maxsplit=5), ""][5]
            elif line.startswith("Anonymous:"):
                own += int(line.split()[1]) * 1024
                kib[name] -= int(line.split()[1])
            elif line.startswith("Rss:"):
                kib[name] += int(line.split()[1])
        for name, pages in kib.items():
            files[name] = max(files[name], pages * 1024)
    return own, sum(files.values())


if __name__ == "__main__":
    main()
