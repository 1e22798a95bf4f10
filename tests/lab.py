"""JupyterLab and Chromium for the browser tests: the server that `make lab` starts, on a copy of the notebooks."""

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# Chromium's own wishes that a page has no part in; a script that fails is still an error.
HARMLESS = ("favicon", "ResizeObserver loop")

RUN_ALL = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  while (!app.shell.currentWidget?.context) await new Promise(resolve => setTimeout(resolve, 50));
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  await app.commands.execute("notebook:run-all-cells");
}"""


def lab_command(*arguments):
    """The last command of `make lab`, run by this Python and with more arguments."""
    lines = subprocess.run(
        ["make", "-n", "--no-print-directory", "lab"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    command = shlex.split(lines.strip().splitlines()[-1])
    assert command[:3] == [".venv/bin/python", "-m", "jupyterlab"]
    return [sys.executable, *command[1:], *arguments]


@contextmanager
def jupyter_lab(folder):
    """Serve a copy of the notebooks on loopback, with folders of its own; yield the address to open."""
    for name in ("notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    token, port = secrets.token_hex(16), _free_port()
    command = lab_command(
        "--no-browser",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    )
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR"]
    own = {name: str(folder / name.lower()) for name in names}
    environment = os.environ | own | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, folder / "server.log")
        yield f"http://127.0.0.1:{port}/?token={token}"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def chromium_page(**options):
    """Yield a page, and the console errors and requests to other machines that it makes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(**options)
        page.set_default_timeout(60_000)
        errors, outside = [], []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and not _is_harmless(m.text) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: outside.append(r.url) if _leaves(r.url) else None)
        yield page, errors, outside
        browser.close()


def _is_harmless(text):
    return any(word in text for word in HARMLESS)


def _leaves(url):
    return not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:"))


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url, server, log, seconds=60):
    for _ in range(seconds * 5):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer within {seconds} s: {log.read_text()}")
