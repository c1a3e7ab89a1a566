"""JupyterLab in Chromium: notebooks are opened, run and used as a reader would, off the network.

The server and the browser start once for all tests. Where one of them is missing, the tests are skipped;
`LLAMA4LAB_BROWSER=required` makes that a failure.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import llama4lab as lab

TOKEN = "t0k"
SERVER = {
    "--ServerApp.ip": "127.0.0.1",
    "--ServerApp.port_retries": "0",
    "--IdentityProvider.token": TOKEN,
    "--LabApp.expose_app_in_browser": "True",
    "--LabApp.extension_manager": "readonly",
    "--LanguageServerManager.autodetect": "False",
}
FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
FOLDERS = (*FOLDERS, "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
# The news toast would cover the page.
PAGE = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM = [*CHROMIUM, "--disable-background-networking", "--disable-component-update"]
SLOW = 90_000  # milliseconds: a kernel that imports torch on a busy machine
DONE = "ALL-CELLS-RAN"

SESSION = "window.jupyterapp?.shell?.currentWidget?.sessionContext"
CONNECTED = f"""() => {{
  const [session, kernel] = [{SESSION}, {SESSION}?.session?.kernel];
  return !!session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle'; }}"""
# A JupyterLab promise that is given back to Playwright has no time limit, hence `void` and the race.
COMMAND = "(name) => { void window.jupyterapp.commands.execute(name); }"
EVALUATE = f"""async (code) => {{
  const content = {{ code: '', silent: true, user_expressions: {{ it: code }} }};
  const future = {SESSION}.session.kernel.requestExecute(content);
  const late = new Promise((_, no) => setTimeout(() => no(new Error('the kernel does not answer')), 60000));
  const it = (await Promise.race([future.done, late])).content.user_expressions.it;
  return it.status === 'ok' ? it.data['text/plain'] : `${{it.ename}}: ${{it.evalue}}`; }}"""


class Notebook:
    """A notebook in the browser."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.path = page, path
        self.errors: list[str] = []
        self.external: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.external.append(url)

    def run_all(self) -> None:
        """Runs every cell, once the kernel is there: without one, a dialog would open and nothing would run."""
        self.page.wait_for_function(CONNECTED)
        self.page.evaluate(COMMAND, "notebook:run-all-cells")
        self.page.wait_for_selector(f'.jp-OutputArea-output:has-text("{DONE}")')

    def save(self) -> dict:
        """Saves the notebook and gives what is in the file."""
        before = self.path.stat().st_mtime_ns
        self.page.evaluate(COMMAND, "docmanager:save")
        _wait_until(lambda: self.path.stat().st_mtime_ns > before, "the notebook is saved")
        return json.loads(self.path.read_text("utf-8"))

    def locator(self, css: str) -> Any:
        """What is shown at a place, scrolled into view: JupyterLab draws what is in view only."""
        found = self.page.locator(css).first
        # At once, not when the element has come to rest: a view that is drawn anew takes its elements away meanwhile.
        found.evaluate("(element) => element.scrollIntoViewIfNeeded()")
        return found

    def python(self, expression: str) -> str:
        """The repr of an expression in the kernel."""
        return self.page.evaluate(EVALUATE, expression)

    def wait_for_python(self, expression: str, expected: str) -> None:
        """Waits until an expression in the kernel has a repr."""
        _wait_until(lambda: self.python(expression) == expected, f"{expression} is {expected}")

    def wait_for_text(self, css: str, text: str) -> None:
        """Waits until a place has a text in it: Python knows of a click before the page shows what it did."""
        shown = "([css, text]) => document.querySelector(css)?.innerText.includes(text)"
        self.page.wait_for_function(shown, arg=[css, text])

    def wait_for_count(self, css: str, count: int) -> None:
        """Waits until there are so many elements."""
        there = "([css, count]) => document.querySelectorAll(css).length === count"
        self.page.wait_for_function(there, arg=[css, count])

    def select(self, css: str, label: str) -> None:
        """Chooses in a Dropdown."""
        self.locator(f"{css} select").select_option(label=label)

    def drawn(self, css: str) -> str:
        """The picture on a canvas, as a data URL."""
        self.locator(f"{css} canvas[data-v]")
        return self.page.evaluate("(css) => document.querySelector(css).toDataURL()", f"{css} canvas")

    def wait_for_change(self, css: str, before: str) -> str:
        """Waits until the picture on a canvas is another one, and gives it."""
        changed = "([css, before]) => ![undefined, before].includes(document.querySelector(css)?.toDataURL())"
        self.page.wait_for_function(changed, arg=[f"{css} canvas", before])
        return self.drawn(css)

    def cell_place(self, css: str, row: int, column: int) -> dict[str, float]:
        """Where the middle of a cell of a `Grid` is on its canvas."""
        layout = json.loads(self.locator(f"{css} canvas[data-v]").get_attribute("data-layout"))
        line = layout["rows"] - 1 - row if layout["up"] else row
        x = layout["left"] + (column + 0.5) * layout["w"] - layout["x"]
        return {"x": x, "y": layout["top"] + (line + 0.5) * layout["h"] - layout["y"]}

    def click_cell(self, css: str, row: int, column: int) -> None:
        """Clicks a cell of a `Grid`."""
        self.locator(f"{css} canvas[data-v]").click(position=self.cell_place(css, row, column))

    def tooltip(self, css: str, row: int, column: int) -> str:
        """The tooltip of a cell of a `Grid`."""
        self.locator(f"{css} canvas[data-v]").hover(position=self.cell_place(css, row, column))
        return self.page.locator(f"{css} .l4-tip").first.inner_text()


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def new_sweep() -> Callable[..., lab.Sweep]:
    """A sweep of two pairs on the tiny checkpoint, over the axes that are given."""
    model = lab.load()
    clean = [
        "When Mary and John went to the store, John gave a drink to",
        "When Paul and Lily went to the park, Lily gave a ball to",
    ]
    corrupted = [clean[0].replace(", John", ", Mary"), clean[1].replace(", Lily", ", Paul")]
    metric = lab.metrics.logit_diff([" Mary", " Paul"], [" John", " Lily"])

    def make(at: str | list[str], over: Any, **options: Any) -> lab.Sweep:
        return lab.sweep(model, clean, corrupted, at=at, over=over, metric=metric, progress=False, **options)

    return make


@pytest.fixture(scope="session")
def by_position(new_sweep) -> lab.Sweep:
    return new_sweep("layers.*.resid_pre", ["layer", "position"])


@pytest.fixture(scope="session")
def by_head(new_sweep) -> lab.Sweep:
    return new_sweep("layers.*.self_attn.z", ["layer", "head", "position"])


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium; skips the test where something is missing."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    missing = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
    if path is None:
        missing.append("chromium")
    if missing:
        reason = f"missing: {', '.join(missing)} (pip install 'llama4lab[browser]'; apt-get install chromium)"
        if os.environ.get("LLAMA4LAB_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    assert path is not None
    return path


@pytest.fixture(scope="session")
def jupyterlab(chromium, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A running JupyterLab: its address and its folder."""
    home = tmp_path_factory.mktemp("jupyter")
    environment = os.environ | {name: str(home / name.lower()) for name in FOLDERS} | {"HF_HUB_OFFLINE": "1"}
    settings = home / "jupyter_config_dir" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(PAGE))
    work = home / "work"
    work.mkdir()
    port = _free_port()
    options = [f"{name}={value}" for name, value in SERVER.items()]
    options += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={work}", "--no-browser", "--allow-root"]
    with (home / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until(lambda: _answers(address, server), "JupyterLab answers")
            yield address, work
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


@pytest.fixture(scope="session")
def browser(chromium) -> Iterator[Any]:
    """A running Chromium."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def notebook(jupyterlab, browser) -> Iterator[Callable[..., Notebook]]:
    """Opens a notebook made from the source of its cells and runs it.

    At the end of the test there may be no error in the browser's console and no request to another machine.
    """
    address, work = jupyterlab
    opened: list[Notebook] = []

    def open_notebook(
        cells: Sequence[str] = (), *, name: str = "test", saved: dict | None = None, **options
    ) -> Notebook:
        path = work / f"{name}.ipynb"
        path.write_text(json.dumps(saved or _notebook([*cells, f"print('{DONE}')"])), "utf-8")
        page = browser.new_page(viewport={"width": 1200, "height": 1400}, **options)
        page.set_default_timeout(SLOW)
        opened.append(Notebook(page, path))
        page.goto(f"{address}/doc/tree/{path.name}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook")
        if saved is None:
            opened[-1].run_all()
        return opened[-1]

    yield open_notebook
    for each in opened:
        each.page.close()
    _end_kernels(address)
    assert [error for each in opened for error in each.errors] == []
    assert [url for each in opened for url in each.external] == []


def _notebook(cells: Sequence[str]) -> dict:
    code = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    sources = [code | {"id": f"cell{place}", "source": source} for place, source in enumerate(cells)]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": sources}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"Waited {seconds} seconds until {what}.")
        time.sleep(0.1)


def _ask(address: str, path: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(f"{address}{path}", method=method, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def _answers(address: str, server: subprocess.Popen) -> bool:
    if server.poll() is not None:
        raise RuntimeError(f"JupyterLab ended with status {server.returncode}.")
    with contextlib.suppress(OSError):
        _ask(address, "/api/status")
        return True
    return False


def _end_kernels(address: str) -> None:
    for session in json.loads(_ask(address, "/api/sessions")):
        _ask(address, f"/api/sessions/{session['id']}", "DELETE")
