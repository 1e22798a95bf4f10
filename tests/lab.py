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

import accessible

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STDERR = ".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']"
# Chromium's own wishes that a page has no part in; a script that fails is still an error.
HARMLESS = ("favicon", "ResizeObserver loop")

_RUN = """async ([which, start]) => {
  const app = window.jupyterapp;
  await app.restored;
  while (!app.shell.currentWidget?.context) await new Promise(resolve => setTimeout(resolve, 50));
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  app.shell.collapseLeft();
  app.shell.collapseRight();
  const cells = panel.content.widgets;
  if (start)
    panel.content.activeCellIndex = cells.findIndex(cell => cell.model.sharedModel.getSource().startsWith(start));
  await app.commands.execute(`notebook:run-${which}`);
}"""
_RUN_CODE = """async source => {
  const panel = jupyterapp.shell.currentWidget, cells = panel.content.model.sharedModel.cells;
  panel.content.model.sharedModel.addCell({ cell_type: "code", source });
  panel.content.activeCellIndex = cells.length - 1;
  await jupyterapp.commands.execute("notebook:run-cell");
}"""
_CHANGE_THEME = "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })"


def lab_command(*arguments, notebook=None):
    """The last command of `make lab`, run by this Python and with more arguments."""
    make = ["make", "-n", "--no-print-directory", "lab", *([f"NOTEBOOK={notebook}"] if notebook else [])]
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = shlex.split(lines.strip().splitlines()[-1])
    assert command[:3] == [".venv/bin/python", "-m", "jupyterlab"]
    return [sys.executable, *command[1:], *arguments]


@contextmanager
def jupyter_lab(folder, notebook=None):
    """Serve a copy of the notebooks on loopback, with folders of its own; yield the address of one of them."""
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
        notebook=notebook,
    )
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR"]
    own = {name: str(folder / name.lower()) for name in names}
    own |= {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, folder / "server.log")
        yield f"http://127.0.0.1:{port}/?token={token}"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def notebook_page(folder, notebook=None):
    """Yield a page with one of the notebooks in JupyterLab, nothing run yet; `page.errors` are its console errors and
    `page.outside` its requests to other machines."""
    with (
        jupyter_lab(folder, notebook) as url,
        chromium_page(viewport={"width": 1120, "height": 900}) as (page, errors, outside),
    ):
        page.goto(url)
        page.wait_for_function("window.jupyterapp")
        page.errors, page.outside = errors, outside
        yield page


def run_cells(page, which="all-cells", start=None):
    """Run cells and wait for them: "all-cells", or "all-above" or "all-below" the one whose source starts so; the
    sidebars go, so that the notebook has the page."""
    page.evaluate(_RUN, [which, start])


def run_code(page, source):
    """Run a new cell at the notebook's end and wait for it."""
    page.evaluate(_RUN_CODE, source)


def wait_until_still(place, seconds=60):
    """Wait until the text of a place no longer changes, however long the step under way takes on a busy machine."""
    for _ in range(seconds // 2):
        before = place.inner_text()
        place.page.wait_for_timeout(2000)
        if place.inner_text() == before:
            return
    raise AssertionError(f"It goes on after {seconds} s: {before}")


def photograph(page, names, folder):
    """Take pictures of panels in both themes and 480 px wide, as a page of 960 px is at 200 %, into a folder or
    GQK_SCREENSHOTS; check that they fit, that texts stand out, and that keys and screen readers reach all of it."""
    folder, before = Path(os.environ.get("GQK_SCREENSHOTS") or folder), page.viewport_size
    page.set_viewport_size({"width": 1120, "height": 1400})
    for theme in ("Dark", "Light"):
        page.evaluate(_CHANGE_THEME, f"JupyterLab {theme}")
        page.wait_for_timeout(500)
        for name in names:
            panel = page.locator(f".gqk-{name}").first
            panel.screenshot(path=folder / f"{name}_{theme.lower()}.png")
            accessible.check_contrast(panel)
    for name in names:
        accessible.check_names(page.locator(f".gqk-{name}").first)
        accessible.check_keyboard(page.locator(f".gqk-{name}").first)
    page.set_viewport_size({"width": 480, "height": 1400})
    for name in names:
        panel = page.locator(f".gqk-{name}").first
        panel.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        panel.screenshot(path=folder / f"{name}_480.png")
        accessible.check_width(panel)
    page.set_viewport_size(before)


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
