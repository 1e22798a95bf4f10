"""E2B mobile in Binder's 2 GB: JupyterLab's server, a kernel and the model in one memory cgroup, without torch.

    sudo python bench/binder_chat.py [folder of a mobile checkpoint]

It needs the v1 `memory` controller and the right to make a group in it (root). The checkpoint is E2B's, with random
weights, at full size; without a folder it is written first. The first load re-blocks it, which needs torch, in the same
2 GB; then everything starts anew, as a visitor finds it, and a cell chats.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from jupyter_client import BlockingKernelClient
from random_checkpoint import write_random_checkpoint

LIMIT = 2 * 2**30
GROUP = Path("/sys/fs/cgroup/memory") / f"gqk-binder-{os.getpid()}"
CELL = """
import json, sys, time
import gemma_qat_kit as gqk
started = time.perf_counter()
model = gqk.load({folder!r}, context_length=2048, report=lambda progress: None)
loaded = time.perf_counter() - started
replies = [model.chat("Why is the sky blue?", max_new_tokens={tokens}, temperature=0) for _ in range(2)]
limit = gqk.speed_limit(model).tokens_per_second if model.size else None
print(json.dumps({{"load_seconds": loaded, "torch": "torch" in sys.modules, "threads": model.runner.num_threads,
                   "tokens_per_second": replies[1].new_tokens / replies[1].seconds, "limit": limit,
                   "model": repr(model)}}))
model.close()
"""


def main() -> None:
    """Print what the first load takes, then what a visitor's chat takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a mobile checkpoint; written there where it is none")
    chosen = parser.parse_args().folder
    GROUP.mkdir()
    try:
        (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT))
        with tempfile.TemporaryDirectory() as temporary:
            folder = chosen or Path(temporary) / "mobile"
            if not folder.exists():
                write_random_checkpoint(folder, "E2B", "mobile")
            os.environ |= {"GEMMA_QAT_KIT_HOME": f"{temporary}/kit", "JUPYTER_RUNTIME_DIR": f"{temporary}/runtime",
                           "JUPYTER_CONFIG_DIR": f"{temporary}/config", "GQK_RECEIPTS": "off"}  # fmt: skip
            for what, tokens in (("first load, which re-blocks", 2), ("a visitor's chat", 24)):
                visit(what, folder, tokens, Path(temporary))
    finally:
        wait_until_empty()
        GROUP.rmdir()


def visit(what: str, folder: Path, tokens: int, temporary: Path) -> None:
    """Start JupyterLab in the group, run the cell in a kernel of it, and print what it answers and takes."""
    server = start_lab(temporary)
    try:
        address = wait_for_server(temporary)
        peak = Peak()
        before = peak.now()
        answer = json.loads(run_cell(address, temporary, CELL.format(folder=str(folder), tokens=tokens)))
        failed, most = int((GROUP / "memory.failcnt").read_text()), peak.stop()
        print(
            f"{what}: {answer['model']}, loaded in {answer['load_seconds']:.1f} s, {answer['tokens_per_second']:.2f} "
            f"tokens/s (limit {answer['limit'] or 0:.1f}), torch in the kernel: {answer['torch']}; peak "
            f"{most / 2**30:.2f} GiB private in the group ({before / 2**30:.2f} before), limit hit {failed} times",
            flush=True,
        )
    finally:
        server.terminate()
        server.wait()
        wait_until_empty()


def start_lab(temporary: Path) -> subprocess.Popen:
    """Start JupyterLab's server as a member of the group."""
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
               "--IdentityProvider.token=bench", f"--ServerApp.root_dir={temporary}"]  # fmt: skip
    join = f'echo $$ > "{GROUP}/cgroup.procs"; exec "$@"'
    log = (temporary / "lab.log").open("w")
    return subprocess.Popen(["bash", "-c", join, "bash", *command], stdout=log, stderr=log)


def wait_for_server(temporary: Path) -> str:
    """Return the address of the server once it has written it down."""
    for _ in range(600):
        for path in (temporary / "runtime").glob("jpserver-*.json"):
            return json.loads(path.read_text())["url"]
        time.sleep(0.2)
    raise SystemExit((temporary / "lab.log").read_text())


def run_cell(address: str, temporary: Path, code: str) -> str:
    """Start a kernel through the server, run the code in it, and return the last line that it printed."""
    request = urllib.request.Request(f"{address}api/kernels?token=bench", b"{}", method="POST")
    kernel = json.load(urllib.request.urlopen(request))["id"]
    client = BlockingKernelClient(connection_file=str(temporary / "runtime" / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    printed = []
    for _ in range(60):  # until it answers at all
        client.kernel_info()
        with suppress(queue.Empty):
            client.get_shell_msg(timeout=2)
            break
    reply = client.execute_interactive(
        code, timeout=800, output_hook=lambda message: printed.append(message["content"])
    )
    client.stop_channels()
    if reply["content"]["status"] != "ok":
        raise SystemExit("\n".join(reply["content"].get("traceback", ["the kernel died"])))
    return "".join(content.get("text", "") for content in printed).strip().splitlines()[-1]


class Peak:
    """The most private memory of the group, looked at ten times a second; file pages can be taken back."""

    def __init__(self):
        self._most, self._is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        """Return the private bytes of the group."""
        lines = (GROUP / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["total_rss"])

    def _watch(self) -> None:
        while not self._is_over.wait(0.1):
            self._most = max(self._most, self.now())

    def stop(self) -> int:
        """Return the most."""
        self._is_over.set()
        self._thread.join()
        return self._most


def wait_until_empty() -> None:
    """End what is left in the group and wait until the system has let go of it."""
    for _ in range(100):
        pids = (GROUP / "cgroup.procs").read_text().split()
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(int(pid), 15 if _ < 20 else 9)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


if __name__ == "__main__":
    main()
