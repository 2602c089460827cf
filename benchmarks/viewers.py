"""How fast viewers are, in a JupyterLab with a real browser and a real mouse: `python benchmarks/viewers.py`.

For each rung and number of lines (of 100 points, over a volume): frames a second while dragging, with a free kernel and with a busy one, and
seconds from the beginning of `replace` to the first frame of the new scene. Then, for 1,000 lines, how memory grows over 100 replacements: of the kernel,
and of all processes of the browser. A frame counts if something new was drawn between two calls of `requestAnimationFrame`.
Nothing is asserted: the figures depend on the machine and on who else uses it, so the load is printed beside them. Drawing is done by the processor, in the browser too
(--gpu: as the browser likes).
"""
import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402

COUNT = """(() => {
  const seen = window.__seen = {raf: 0, drawn: 0, dirty: false, arrived: 0, first: 0}
  const tick = () => {
    seen.raf++
    if (seen.dirty) { seen.drawn++; seen.dirty = false; if (seen.arrived && !seen.first) seen.first = Date.now() }
    requestAnimationFrame(tick) }
  requestAnimationFrame(tick)
  const of = WebGL2RenderingContext.prototype
  for (const name of ["drawArrays", "drawElements", "drawArraysInstanced"]) {
    const draw = of[name]
    of[name] = function(...a) { seen.dirty = true; return draw.apply(this, a) } }
  const fill = of.bufferData
  of.bufferData = function(kind, data, ...a) { if (data.constructor === Uint16Array) seen.arrived ||= Date.now(); return fill.call(this, kind, data, ...a) }
  document.addEventListener("load", e => { if (e.target.tagName === "IMG" && e.target.offsetParent) { seen.dirty = true; seen.arrived ||= Date.now() } }, true)
})()"""

SETUP = """
import os, time, numpy as np, psutil
from pathlib import Path
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.viewers import show
import torch
def scene(n, seed):
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, 100)[None, :, None]
    a, b, c = rng.normal(size=(3, n, 1, 3)) * [30, 40, 30]
    points = ((1 - t)**2*a + 2*t*(1 - t)*c + t**2*b).reshape(-1, 3)
    lines = Ragged.from_lengths(torch.tensor(points, dtype=torch.float32), torch.full((n,), 100))
    volume = np.random.default_rng(0).random((60, 70, 60), dtype=np.float32)
    return Scene(f'{n} lines').add_lines(lines).add_slices(volume, np.diag([-3, 3, 3, 1]) + np.eye(4, k=3)*90, planes='z')
def rss(): return psutil.Process().memory_info().rss/1e6
"""
CELLS = ["scenes = [scene({n}, seed) for seed in (0, 1)]; viewer = show(scenes[0], rung='{rung}'); viewer", "from pathlib import Path",
         "while not Path('go on').exists(): sum(range(1000))",
         "begun = time.time(); viewer.replace(scenes[1]); print('at', begun); scenes = scenes[::-1]",
         "before = rss()\nfor k in range({many}): viewer.replace(scenes[k % 2])\nprint('at', time.time(), before, rss())"]


@contextmanager
def fixtures(gpu):
    "The JupyterLab of the tests and windows of a browser; the browser's process."
    from playwright.sync_api import sync_playwright
    class Folders:
        def mktemp(self, name): return Path(tempfile.mkdtemp(prefix=name, dir=self.root))
    folders = Folders()
    flags = [flag for flag in conftest.CHROMIUM if not gpu or "gl" not in flag]
    with tempfile.TemporaryDirectory() as folders.root, sync_playwright() as playwright:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        chromium = playwright.chromium.launch(executable_path=conftest.chromium_path(), args=flags)
        started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        lab = conftest.lab.__wrapped__(folders)
        try: yield next(lab), chromium.new_context(), started[0]
        finally:
            chromium.close()
            next(lab, None)


def opened(lab, browser, name, cells):
    "A page with these cells, run."
    (lab.folder / "go on").touch()
    kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell.strip()} for i, cell in enumerate(cells)]
    (lab.folder / name).write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, name)
    lab.run_all(page, timeout=300)
    return page


def run_cell(page, i, wait=True, timeout=300):
    "Run a cell again; what it prints."
    cell = page.locator(".jp-Notebook .jp-Cell").nth(i)
    number = cell.locator(".jp-InputPrompt").inner_text()
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    end = time.time() + timeout
    while wait and ("*" in (now := cell.locator(".jp-InputPrompt").inner_text()) or now == number):
        if time.time() > end: raise TimeoutError(f"cell {i}")
        page.wait_for_timeout(50)
    return cell.locator(".jp-Cell-outputArea").inner_text()


def face(page):
    "What is drawn on."
    return page.locator(".jp-Notebook .jp-Cell").nth(1).locator("canvas.dwiml-picture, .dwiml-canvas").first


def drag(page, seconds):
    "Frames a second during a drag."
    canvas = face(page)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"]/2, box["y"] + box["height"]/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 5, y)
    page.evaluate("() => { __seen.drawn = 0; __seen.begun = performance.now() }")
    end, k = time.time() + seconds, 0
    while time.time() < end:
        k += 1
        page.mouse.move(x + 120*math.sin(k/15), y + 50*math.sin(k/25))
    frames = page.evaluate("() => __seen.drawn/(performance.now() - __seen.begun)*1000")
    page.mouse.up()
    page.wait_for_timeout(1000)
    return frames


def to_pixels(page):
    "Seconds from the beginning of `replace` to the first frame after its data came."
    page.evaluate("() => { __seen.arrived = __seen.first = 0 }")
    begun = float(run_cell(page, 4).split()[-1])
    page.wait_for_function("() => __seen.first", timeout=60_000)
    return page.evaluate("() => __seen.first")/1000 - begun


def resident(process):
    "MB of a process and all that it started."
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])/1e6


def row(lab, browser, process, rung, n, args):
    "Print the figures of one rung and number of lines."
    page = opened(lab, browser, f"{rung}{n}.ipynb", [SETUP, *(cell.format(n=n, rung=rung, many=0) for cell in CELLS)])
    face(page).wait_for(timeout=60_000)
    page.wait_for_timeout(3000)
    free = [drag(page, args.seconds) for _ in range(2)]
    (lab.folder / "go on").unlink()
    busy = []
    if rung == "browser":
        run_cell(page, 3, wait=False)
        busy = [drag(page, args.seconds)]
    (lab.folder / "go on").touch()
    page.wait_for_timeout(1500)
    seconds = sorted(to_pixels(page) for _ in range(3))[1]
    told = lambda rates: f"{max(rates):6.1f}" if rates else "     –"
    print(f"| {rung:9} | {n:6,} | {told(free)} | {told(busy)} | {seconds:6.2f} | {os.getloadavg()[0]:5.1f} |", flush=True)
    page.close()


def memory(lab, browser, process, rung, args):
    "Print how memory grows."
    page = opened(lab, browser, f"{rung}_memory.ipynb", [SETUP, *(cell.format(n=1000, rung=rung, many=args.many) for cell in CELLS)])
    page.wait_for_timeout(5000)
    before = resident(process)
    kernel = run_cell(page, 5).split()
    page.wait_for_timeout(5000)
    print(f"| {rung:9} | {float(kernel[-2]):5.0f} → {float(kernel[-1]):5.0f} | {before:5.0f} → {resident(process):5.0f} |", flush=True)
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rungs", nargs="+", default=["browser", "live", "painter"])
    parser.add_argument("--lines", nargs="*", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--seconds", type=float, default=3, help="of each drag")
    parser.add_argument("--many", type=int, default=100, help="replacements, for memory; 0: not measured")
    parser.add_argument("--gpu", action="store_true", help="let the browser draw as it likes")
    args = parser.parse_args()
    with fixtures(args.gpu) as (lab, browser, process):
        browser.add_init_script(COUNT)
        print("| rung      |  lines | frames/s dragging | kernel busy | replace to pixels, s | load |\n|---|---|---|---|---|---|")
        for n in args.lines:
            for rung in args.rungs: row(lab, browser, process, rung, n, args)
        if args.many:
            print(f"\n| rung, 1,000 lines | kernel, MB over {args.many} replacements | browser, MB |\n|---|---|---|")
            for rung in args.rungs: memory(lab, browser, process, rung, args)


if __name__ == "__main__": main()
