"""What the tests share: markers that ask for something special, a browser, a JupyterLab to open pages in.

A test marked `browser`, `fury`, `cuda` or `slow` is skipped, with the reason in pytest's summary, where its requirement is missing.
With CI=true a skipped browser or FURY test is a failure: there the requirement is the job of tools/system_packages.sh.
"""
import asyncio
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # started by `… &`: tests press Ctrl-C
MUST_RUN_IN_CI = ("browser", "fury")


def chromium_path():
    "The installed browser, or None."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def has_adapter():
    "Is there a graphics adapter that FURY can draw with? (asked, never tried: a failed try breaks the process)"
    from dwiml_nb.viz.stage import has_gpu_adapter
    return has_gpu_adapter()


def has_cuda():
    import torch
    return torch.cuda.is_available()


# Processes that a test kills come from one server that forks, for all files of a worker: it has the slow imports ready
multiprocessing.set_forkserver_preload(["pytest", "torch._dynamo", "tools.warm_numba", "optuna", "sqlalchemy.dialects.sqlite", "dwiml_nb.runs.sweeps",
                                        "dwiml_nb.models.learn2track", "dwiml_nb.study.grow"])


REQUIREMENTS = {
    "slow": (lambda: os.environ.get("DWIML_SLOW"), "takes minutes: set DWIML_SLOW=1 to run it"),
    "cuda": (has_cuda, "no CUDA device"),
    "fury": (has_adapter, "no graphics adapter: sudo apt install libvulkan1 mesa-vulkan-drivers"),
    "browser": (chromium_path, "no browser: sudo apt install chromium"),
}


def pytest_runtest_setup(item):
    for mark, (is_there, reason) in REQUIREMENTS.items():
        if item.get_closest_marker(mark) and not is_there(): pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_loop_of_the_browser(request):
    "The browser's driver leaves an event loop that looks as if it ran; tests without a browser are scripts, which have none."
    loop = asyncio._get_running_loop()
    if loop is None or request.node.get_closest_marker("browser"): yield; return
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)


@pytest.fixture(autouse=True)
def threads_as_before():
    "A run that goes on computes with the threads it had, and leaves them to the process; the next test gets its own back."
    import torch
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before: torch.set_num_threads(before)


LONGEST = ("browser", "test_commands", "test_sweeps", "test_fuzz", "test_checks", "test_kill_resume", "test_study_faults", "test_export")


def pytest_collection_modifyitems(items):
    "What takes longest comes first: where files run two at a time, as in `make tests`, both ends are busy to the last."
    place = lambda item: "browser" if item.path.parent.name == "browser" else item.path.stem
    items.sort(key=lambda item: LONGEST.index(place(item)) if place(item) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Where files run two at a time, those of the browser run one after the other: one browser, one JupyterLab, one kernel."
    from xdist.scheduler import LoadFileScheduling

    class OneBrowser(LoadFileScheduling):
        def _split_scope(self, nodeid): return "browser" if "/browser/" in nodeid else super()._split_scope(nodeid)
    return OneBrowser(config, log)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and os.environ.get("CI") == "true" and not item.get_closest_marker("slow") and any(map(item.get_closest_marker, MUST_RUN_IN_CI)):
        report.outcome, report.longrepr = "failed", f"skipped in CI, where it must run: {report.longrepr[-1]}"


@pytest.fixture(scope="module")
def here(request, tmp_path_factory):
    "A folder with the toy study, the file of the run that a test's module calls RUN, and that run."
    from dwiml_nb.runs.run_files import train
    from dwiml_nb.study.toy import toy_study
    folder = tmp_path_factory.mktemp(request.module.__name__)
    toy_study(folder)
    (folder / "run.toml").write_text(request.module.RUN)
    train(folder / "run.toml")
    return folder


CHROMIUM = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
            "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]  # WebGL 2, drawn by the processor


@pytest.fixture(scope="session")
def browser():
    "Windows of a headless Chromium (playwright); what one of them loaded, the next need not."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM)
        yield chromium.new_context()
        chromium.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "URL of a JupyterLab that serves a copy of nbs/ (so that nothing is written here); `lab.folder` is that copy."
    folder = tmp_path_factory.mktemp("lab") / "nbs"
    shutil.copytree(ROOT / "nbs", folder, ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state = {key: str(tmp_path_factory.mktemp(key.lower())) for key in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")}
    for name, value in {"notebook-extension/tracker": '{"windowingMode": "none"}',  # keep the cells that are scrolled away
                        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}.items():
        settings = Path(state["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / f"{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(value)
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.ip=127.0.0.1",
         f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
         "--LabApp.expose_app_in_browser=True"],
        env=os.environ | state, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    for _ in range(480):
        try: urllib.request.urlopen(f"{url}/api/status"); break
        except OSError: time.sleep(.25)
    else: pytest.fail("JupyterLab did not start within 120 s")
    yield Lab(url, folder)
    server.terminate()
    try: server.wait(30)
    except subprocess.TimeoutExpired: server.kill()


TOLD = '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'
TRACEBACK = r"Traceback \(most recent call last\)|^\s*Cell In\["


def errors(where):
    "The errors that a page or a part of it shows; JupyterLab 4.6 shows them as it shows what is written to stderr."
    return [text for text in where.locator(TOLD).all_text_contents() if re.search(TRACEBACK, text)]


class Lab:
    "A running JupyterLab."
    def __init__(self, url, folder): self.url, self.folder, self.kernel, self.left = url, folder, None, []

    def ask(self, path, /, method="POST", **content):
        "The server's answer to a request."
        data = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.url}/api/{path}", data, {"Content-Type": "application/json"}, method=method)
        return json.loads(urllib.request.urlopen(request).read() or "null")

    def open(self, browser, notebook, width=1400, height=1000, own_kernel=True):
        "A browser page with `notebook` (relative to nbs/) open and its kernel idle: its own, or the one that such notebooks share."
        if not own_kernel:
            self.kernel = self.kernel or self.ask("kernels", name="python3")
            self.ask("sessions", path=notebook, name=notebook, type="notebook", kernel={"id": self.kernel["id"]})
        page = self.left.pop() if self.left else browser.new_page()
        page.set_viewport_size({"width": width, "height": height})
        if page.url.startswith(self.url): return self.open_instead(page, notebook)
        workspace = f"test-{time.monotonic_ns()}"  # a new one, or JupyterLab would open the last test's notebooks too
        page.goto(f"{self.url}/lab/workspaces/{workspace}/tree/{notebook}", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.wait_idle(page)  # before that, running asks for a kernel
        return page

    def open_instead(self, page, notebook):
        "The page of another test with a notebook of this one: JupyterLab need not be loaded again."
        page.evaluate("""async path => {
            for (const open of [...jupyterapp.shell.widgets('main')]) { if (open.context) open.context.model.dirty = false; open.close() }
            await jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook'}) }""", notebook)
        page.wait_for_function("path => jupyterapp.shell.currentWidget?.context?.path === path", arg=notebook)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.wait_idle(page)
        return page

    def leave(self, page):
        "The test is over; the next one may have the page."
        if page.is_closed(): return
        page.emulate_media(color_scheme=None)
        self.left.append(page)

    def wait_idle(self, page): page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/", timeout=60_000)

    def run_all(self, page, timeout=120):
        "Run all cells from the menu and wait until each has run, or one has failed, and what they print is there."
        page.click('text="Run"')
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        page.wait_for_function("""([told, traceback]) => [...document.querySelectorAll(told)].some(shown => RegExp(traceback).test(shown.textContent)) ||
            [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].every(prompt => /\\[\\d+\\]/.test(prompt.textContent))""",
            arg=[TOLD, TRACEBACK], timeout=1000 * timeout)
        self.wait_idle(page)
