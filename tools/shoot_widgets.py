"""See every widget in every place where people meet it: `python tools/shoot_widgets.py --out FOLDER [NAME …]`.

A notebook of the widgets, over the toy study, is run in JupyterLab and in Notebook 7; each widget is used with real clicks and drags, and photographed: alive, light and dark (the theme changes while
it is open), 820 and 1,600 pixels wide; then saved, its kernel ended, and opened again without one; then as nbconvert's HTML; pages that its cell wrote (NAME.html) too. Pictures go to FOLDER (`NAME.app.form.theme.width.png`, what a click
led to as `NAME.app.live.did-….png`), contact sheets to FOLDER/sheets. Beside them findings.txt: errors on the browser's console, requests that leave the machine, what stands past the edge of its cell,
scroll bars inside a cell, words that nobody should read, cells that failed. A new widget is a row of shoot_rows.py.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
import conftest  # noqa: E402
from playwright.sync_api import TimeoutError, sync_playwright  # noqa: E402
from shoot_forms import FORMS  # noqa: E402
from shoot_rows import WIDGETS  # noqa: E402

WIDGETS |= FORMS

THEMES, WIDTHS = ("light", "dark"), (820, 1600)
QUIET = re.compile(r"GPU stall|cdnjs|GL Driver Message|swiftshader|WebGL: CONTEXT_LOST|favicon|/api/(sessions|kernels)|kernelspecs/.*logo|Failed to start the kernel|jupyterlab-manager|[Ss]chema not found|layout restorer|reading .schema.")
NBCONVERT = r"cdnjs.cloudflare.com/.*/(mathjax|require\.js)/"  # what its pages load, whatever they show
BAD_WORDS = ("model not found", "Loading widget", " object at 0x", "<dwiml", "Traceback", "[object Object]", "undefined", "NaN")
LOOK = """area => {                                      // what is past its cell's edge, scrolls inside it, or is cut off
  const found = []
  const name = o => `${o.tagName.toLowerCase()}.${[...o.classList].slice(-2).join(".")} “${(o.textContent || o.title || "").trim().slice(0, 30)}”`
  const edge = area.getBoundingClientRect().right
  for (const o of area.querySelectorAll("*")) {
    const box = o.getBoundingClientRect(), style = getComputedStyle(o)
    if (!o.checkVisibility({visibilityProperty: true, opacityProperty: true}) || !box.width || !box.height) continue
    let clip = false
    for (let up = o.parentElement; up && up !== area; up = up.parentElement) clip ||= getComputedStyle(up).overflowX !== "visible" && up.getBoundingClientRect().right <= edge + 1
    if (box.right > edge + 1 && !clip) found.push(`past the edge by ${Math.round(box.right - edge)}: ${name(o)}`)
    const scrolls = (over, full, seen) => /auto|scroll/.test(over) && full > seen + 1
    if (o.tagName !== "SELECT" && (scrolls(style.overflowY, o.scrollHeight, o.clientHeight) || scrolls(style.overflowX, o.scrollWidth, o.clientWidth))) found.push(`scrolls: ${name(o)}`)
    if (/BUTTON|SELECT/.test(o.tagName) && o.scrollWidth > o.clientWidth + 1) found.push(`words cut off: ${name(o)}`)
  }
  return [...new Set(found)] }"""


class Server:
    "A JupyterLab or a Notebook 7 that serves an empty folder."
    def __init__(self, app, folder, site):
        self.app, self.folder, self.port = app, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        state = {key: tempfile.mkdtemp(dir=folder.parent) for key in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")}
        for name, value in {"notebook-extension/tracker": '{"windowingMode": "none"}', "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}.items():
            settings = Path(state["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / f"{name}.jupyterlab-settings"
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(value)
        module, trait = ("jupyterlab", "LabApp") if app == "lab" else ("notebook", "JupyterNotebookApp")
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), site])), "JUPYTER_PATH": f"{site}/share/jupyter"} if site else {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-m", module, "--no-browser", "--allow-root", f"--port={self.port}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}",
            "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True", f"--{trait}.expose_app_in_browser=True"],
            env=os.environ | state | paths, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        for _ in range(480):
            try: self.ask("status", "GET"); return
            except OSError: time.sleep(.25)
        raise TimeoutError(f"{module} did not start")

    def ask(self, path, method):
        return json.loads(urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/{path}", method=method)).read() or "null")

    def address(self, file): return f"{self.url}/lab/workspaces/w{time.monotonic_ns()}/tree/{file}?reset" if self.app == "lab" else f"{self.url}/notebooks/{file}"

    def end_kernels(self):
        for session in self.ask("sessions", "GET"): self.ask(f"sessions/{session['id']}", "DELETE")

    def close(self):
        self.end_kernels()
        self.process.terminate()
        self.process.wait(30)


def free_port():
    import socket
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); return free.getsockname()[1]


class Camera:
    "Opens pages, photographs their widgets, and writes down what is wrong with them."
    def __init__(self, browser, out, height): self.browser, self.out, self.height, self.found = browser, out, height, {}

    def note(self, what, where): self.found.setdefault(what[:300], []).append(where)

    @contextmanager
    def page(self, where, with_kernel=True):
        page = self.browser.new_page()
        page.on("console", lambda m: m.type == "error" and not QUIET.search(m.text + m.location.get("url", "")) and self.note(f"console: {m.text}", where))
        page.on("pageerror", lambda e: QUIET.search(e.stack or "") or self.note(f"console: {e.stack or e}", where))
        page.on("request", lambda r: r.url.startswith(("http", "ws")) and not re.search("//127.0.0.1|" + NBCONVERT, r.url) and self.note(f"leaves the machine: {r.url}", where))
        if not with_kernel:
            for what in ("sessions", "kernels"): page.route(f"**/api/{what}*", lambda r: r.abort() if r.request.method == "POST" else r.continue_())
        page.set_viewport_size({"width": 1600, "height": self.height})
        try: yield page
        finally: page.close()

    def shoot(self, page, name, widget):
        "A cell's output, as it is now."
        widget.scroll_into_view_if_needed()
        page.wait_for_timeout(400)
        widget.screenshot(path=self.out / f"{name}.png")
        for what in widget.evaluate(LOOK): self.note(what, name)
        words = widget.inner_text()
        for bad in BAD_WORDS:
            if bad in words: self.note(f"words: {bad} in “{words[max(0, words.index(bad) - 60):words.index(bad) + 60]}”", name)

    def everywhere(self, page, shown, where, set_theme, themes=THEMES):
        for theme in themes:
            set_theme(theme)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": self.height})
                page.wait_for_timeout(1500)
                for name, i in shown.items(): self.shoot(page, f"{name}.{where}.{theme}.{width}", output(page, i))


def command(page, name, **args): page.evaluate("([name, args]) => { void jupyterapp.commands.execute(name, args) }", [name, args])


def themed(page):
    return lambda theme: (command(page, "apputils:change-theme", theme=f"JupyterLab {theme.title()}"), page.wait_for_timeout(1500))


def opened(server, page, file):
    page.goto(server.address(file), wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
    page.wait_for_function("() => window.jupyterapp", timeout=60_000)
    if server.app == "lab" and page.locator("#jp-left-stack").is_visible(): command(page, "application:toggle-left-area")


def run_all(page, seconds):
    "Run all cells, once the kernel answers; again if it did not hear."
    prompts = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(o => o.textContent)"
    for _ in range(5):
        page.wait_for_function("""() => { const {kernel} = jupyterapp.shell.currentWidget?.sessionContext?.session ?? {}
            return kernel?.connectionStatus === "connected" && kernel.status === "idle" }""", timeout=120_000)
        command(page, "notebook:run-all-cells")
        try: page.wait_for_function(f"() => {prompts}.some(o => /\\d|\\*/.test(o))", timeout=20_000); break
        except TimeoutError: continue
    page.wait_for_function(f"() => {prompts}.every(o => /\\d/.test(o))", timeout=1000*seconds)
    page.wait_for_timeout(3000)


def output(page, i): return page.locator(".jp-Cell").nth(i).locator(".jp-Cell-outputArea, .jp-Cell-outputWrapper").first


def cells_of(names):
    "The cells of one notebook for several widgets; the number of each one's cell."
    cells, shown, before = [], {}, []
    for row in map(WIDGETS.get, names):
        if row.cells[0] not in before: before = []
        cells += [cell for cell in row.cells[:-1] if cell not in before] + [row.cells[-1]]
        before += row.cells[:-1]
        shown[next(name for name in names if WIDGETS[name] is row)] = len(cells) - 1
    return [{"cell_type": "code", "id": f"cell-{i}", "metadata": {"tags": ["raises-exception"]}, "execution_count": None, "outputs": [], "source": cell.strip()} for i, cell in enumerate(cells)], shown


def see(camera, server, names, forms):
    "Widgets in one app: alive, opened again, converted."
    file, app = server.folder / "widgets.ipynb", server.app
    cells, shown = cells_of(names)
    file.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}))
    with camera.page(f"{app}.live") as page:
        opened(server, page, file.name)
        run_all(page, sum(WIDGETS[name].seconds for name in names))
        for error in conftest.errors(page): camera.note(f"cell: {error[-200:]}", app)
        for name, i in shown.items():
            if not (act := WIDGETS[name].act): continue
            shoot = lambda word: camera.shoot(page, f"{name}.{app}.live.did-{word}", output(page, i))  # noqa: B023
            try: act(page, output(page, i), shoot)
            except Exception as e: camera.note(f"act: {type(e).__name__}: {str(e)[:250]}", f"{name}.{app}"); shoot("fail")
        if "live" in forms: camera.everywhere(page, shown, f"{app}.live", themed(page))
        page.wait_for_timeout(2500)  # the still follows
        command(page, "docmanager:save")
        page.wait_for_timeout(3000)
    server.end_kernels()
    if "reopened" in forms:
        with camera.page(f"{app}.reopened", with_kernel=False) as page:
            opened(server, page, file.name)
            for _ in range(12):  # longer than it looks for a widget; meanwhile it may ask for a kernel
                if (buttons := page.locator(".jp-Dialog button")).count(): (no if (no := buttons.filter(has_text="No Kernel")).count() else buttons).last.click()
                page.wait_for_timeout(500)
            camera.everywhere(page, shown, f"{app}.reopened", themed(page))
    if "html" in forms and app == "lab":
        for theme in THEMES:
            made = camera.out / f"{names[0]}.{theme}.html"
            subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--theme", theme, "--output", str(made), str(file)], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            with camera.page("html") as page:
                page.goto(made.as_uri(), wait_until="domcontentloaded")
                page.wait_for_timeout(1500)
                camera.everywhere(page, shown, "html", lambda _: None, [theme])
    if "page" in forms:
        for made in sorted(server.folder.glob("*.html")):
            shutil.copy(made, camera.out)
            for theme in THEMES:
                with camera.page("page") as page:
                    page.emulate_media(color_scheme=theme)
                    page.goto(made.as_uri())
                    for width in WIDTHS:
                        page.set_viewport_size({"width": width, "height": camera.height})
                        page.wait_for_timeout(2000)
                        name = f"{made.stem}.page.{theme}.{width}"
                        camera.shoot(page, name, page.locator("body"))


def sheet(out, name):
    "All pictures of a widget on a few sheets, each with its name."
    from PIL import Image, ImageDraw
    (out / "sheets").mkdir(exist_ok=True)
    for part in ("live", "reopened", "html", "page"):
        pictures = [(p.stem[len(name) + 1:], Image.open(p).convert("RGB")) for p in sorted(out.glob(f"{name}.*{part}.*.png"))]
        small = [(words, o.resize((800, max(1, round(o.height*800/o.width))))) for words, o in pictures]
        for k in range(0, len(small), 4):
            rows, four = [], small[k:k + 4]
            for i in range(0, len(four), 2): rows.append(max(o.height for _, o in four[i:i + 2]) + 20)
            page = Image.new("RGB", (1610, sum(rows)), "#888")
            for i, (words, o) in enumerate(four):
                x, y = 810*(i % 2), sum(rows[:i//2])
                page.paste(o, (x, y + 16))
                ImageDraw.Draw(page).text((x + 4, y + 2), words, "white")
            page.save(out / "sheets" / f"{name}.{part}.{k//4}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WIDGETS)}; none: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build/shots")
    parser.add_argument("--apps", nargs="+", default=["lab", "nb7"], choices=["lab", "nb7"])
    parser.add_argument("--forms", nargs="*", default=["live", "reopened", "html", "page"])
    parser.add_argument("--height", type=int, default=1800, help="of the window; what is taller is not seen whole")
    parser.add_argument("--notebook7", default="", help="a folder that holds Notebook 7, where it is not installed")
    args = parser.parse_args()
    if unknown := set(args.names) - set(WIDGETS): parser.error(f"no widget {unknown}; there are {', '.join(WIDGETS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    work = Path(tempfile.mkdtemp(prefix="shoot"))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=conftest.chromium_path(), args=conftest.CHROMIUM)
        camera = Camera(chromium.new_context(), args.out, args.height)
        for app in args.apps:
            (folder := work / app).mkdir()
            server = Server(app, folder, args.notebook7)
            try:
                begun = time.time()
                see(camera, server, args.names or list(WIDGETS), args.forms)
                print(f"{app}: {time.time() - begun:.0f} s", flush=True)
            finally: server.close()
        chromium.close()
    shutil.rmtree(work, ignore_errors=True)
    for name in args.names or WIDGETS: sheet(args.out, name)
    lines = [f"{what}\n    in {', '.join(dict.fromkeys(where))}" for what, where in sorted(camera.found.items())]
    (args.out / "findings.txt").open("a").write("\n".join([f"== {' '.join(args.names) or 'all'}", *lines]) + "\n")
    print("\n".join(lines) or "nothing found")


if __name__ == "__main__": main()
