"""How fast viewers are, in a JupyterLab with a real browser and a real mouse: `python benchmarks/viewers.py` (`--quick`: in six minutes).

For each rung and number of lines (of 100 points, over a volume): frames a second while dragging, with a free kernel and with a busy one; seconds from the mouse on a line to its name
(answer), from running the cell to pixels (run), and from the beginning of `replace` to the new scene's first frame, with the processor time that it took; the longest time without any
picture (slab) while the cell runs, while another rung takes over and while the page is loaded again. Then the next batch of a preview: from the loader's end to the batch's first frame.
Then lines that grow in a `TrackingPlayer`: frames a second while it plays. Last, for 1,000 lines, how memory grows over many replacements. A frame counts if something new was drawn
between two calls of `requestAnimationFrame`.
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
  const seen = window.__seen = {drawn: 0, dirty: false, arrived: 0, first: 0, since: 0, slab: 0, named: 0}
  const drawing = new Map()                            // what a card was told to draw is there when its fence has been passed
  const empty = cell => cell?.querySelector(".jp-OutputArea-child")
    && ![...cell.querySelectorAll("img")].some(i => i.complete && i.naturalWidth > 50 && i.offsetParent)
    && ![...cell.querySelectorAll("canvas.dwiml-picture")].some(c => c.__drawn)
  const tick = () => {
    if (seen.dirty) { seen.drawn++; seen.dirty = false }
    for (const [gl, fence] of drawing) {
      const sync = fence ?? gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0)
      if (!sync || gl.getSyncParameter(sync, gl.SYNC_STATUS) === gl.SIGNALED) {
        gl.canvas.__drawn = true
        drawing.delete(gl)
        if (seen.arrived) seen.first ||= Date.now()
      } else drawing.set(gl, sync)
    }
    if (!empty(document.querySelectorAll(".jp-Notebook .jp-Cell")[1])) seen.since = 0
    else { seen.since ||= performance.now(); seen.slab = Math.max(seen.slab, performance.now() - seen.since) }
    const tip = [...document.querySelectorAll(".dwiml-hover, .dwiml-tip")].some(o => !o.hidden && o.textContent)
    if (tip) seen.named ||= performance.now()
    requestAnimationFrame(tick) }
  requestAnimationFrame(tick)
  const of = WebGL2RenderingContext.prototype
  for (const name of ["drawArrays", "drawElements", "drawArraysInstanced"]) {
    const draw = of[name]
    of[name] = function(...a) { seen.dirty = true; if (!drawing.has(this)) drawing.set(this, null); return draw.apply(this, a) } }
  const fill = of.bufferData
  of.bufferData = function(kind, data, ...a) { if (data.constructor === Uint16Array) seen.arrived ||= Date.now(); return fill.call(this, kind, data, ...a) }
  const picture = image => {
    if (image.tagName === "IMG" && image.complete && image.offsetParent) { seen.dirty = true; seen.arrived ||= Date.now(); seen.first ||= Date.now() } }
  document.addEventListener("load", e => picture(e.target), true)
  new MutationObserver(all => all.forEach(one => one.addedNodes.forEach(picture))).observe(document, {childList: true, subtree: true})
})()"""

SETUP = """
import json, os, tempfile, time, numpy as np, psutil, torch
from pathlib import Path
from dwiml_nb.all import *
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.tractograms import Tractogram
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.viewers import show
def lines_of(n, seed):
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, 100)[None, :, None]
    a, b, c = rng.normal(size=(3, n, 1, 3)) * [30, 40, 30]
    points = ((1 - t)**2*a + 2*t*(1 - t)*c + t**2*b).reshape(-1, 3)
    return Ragged.from_lengths(torch.tensor(points, dtype=torch.float32), torch.full((n,), 100))
def scene(n, seed):
    affine = np.diag([-3., 3, 3, 1])
    affine[:3, 3] = 90,-105,-90
    volume = np.random.default_rng(0).random((60, 70, 60), dtype=np.float32)
    return Scene(f'{n} lines').add_lines(lines_of(n, seed)).add_slices(volume, affine, planes='z')
def rss(): return psutil.Process().memory_info().rss/1e6
def row(): return json.loads(Path('row.json').read_text())
for rung in row()[1]: show(scene(10, 0), rung=rung).close()  # what is loaded once is not counted
dataset = MultiSubjectDataset(toy_study(tempfile.mkdtemp())).load_data()
model = Learn2TrackModel(dataset.nb_features['input'], step_size=1., rnn_key='gru', rnn_layer_sizes=[32])
sampler = DWIMLBatchIDSampler(dataset, 'bundles', batch_size_training=200)
loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', off_track_mm=1.)
"""
VIEWER, WATCH, BUSY, REPLACE, SWAP, PREVIEW, LOADED, PLAYER, MANY = range(1, 10)
CELLS = [SETUP, "begun = time.time(); n, rung = row(); scenes = [scene(n, seed) for seed in (0, 1)]; begun = time.time(); viewer = show(scenes[0], rung=rung); viewer", "print('at', begun)",
         "while not Path('go on').exists(): sum(range(1000))",
         "begun = time.time(); viewer.replace(scenes[1]); print('at', begun); scenes = scenes[::-1]",
         "viewer.rung = 'painter' if rung == 'browser' else 'browser'; time.sleep(1); viewer.rung = rung; print('at', time.time())",
         "preview = BatchPreview(loader, sampler); preview.viewer.rung = row()[1]\nimport types; loaded = []; load = preview.load\n"
         "def noted(self): load(); loaded.append(time.time())\npreview.load = types.MethodType(noted, preview); preview",
         "print('at', loaded[-1])",
         "n, rung = row(); player = TrackingPlayer(Tractogram(lines_of(n, 0))); player.viewer.rung = rung; player",
         "n, many = row(); before = rss()\nfor k in range(many): viewer.replace(scenes[k % 2])\nprint('at', time.time(), before, rss())"]


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


def opened(lab, browser, rungs):
    "A page with the cells, the first of which has run."
    tell(lab, 10, rungs)
    (lab.folder / "go on").touch()
    kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell.strip()} for i, cell in enumerate(CELLS)]
    (lab.folder / "bench.ipynb").write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, "bench.ipynb")
    run_cell(page, 0)
    return page


def tell(lab, *row): (lab.folder / "row.json").write_text(json.dumps(row))


def run_cell(page, i, wait=True, timeout=120):
    "Run a cell again; what it prints."
    cell = page.locator(".jp-Notebook .jp-Cell").nth(i)
    prompt = lambda: cell.locator(".jp-InputPrompt").inner_text()
    number = prompt()
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    end = time.time() + timeout
    while wait and ("*" in (now := prompt()) or now == number):
        if time.time() > end: raise TimeoutError(f"cell {i}")
        page.wait_for_timeout(20)
    page.wait_for_timeout(100*wait)
    if conftest.errors(cell): raise RuntimeError(cell.inner_text())
    if wait and "print(" in cell.locator(".cm-content").inner_text(): cell.locator(".jp-OutputArea-output").first.wait_for()
    return cell.locator(".jp-Cell-outputArea").inner_text()


def face(page, cell=VIEWER):
    "What is drawn on."
    return page.locator(".jp-Notebook .jp-Cell").nth(cell).locator("canvas.dwiml-picture, .dwiml-canvas").first


def middle(page):
    canvas = face(page)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box["x"] + box["width"]/2, box["y"] + box["height"]/2


def drag(page, seconds):
    "Frames a second during a drag."
    x, y = middle(page)
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


def answer(page):
    "Seconds from the mouse on a line to its name beside the mouse."
    x, y = middle(page)
    page.mouse.move(x - 400, y - 200)
    page.wait_for_timeout(500)
    page.evaluate("() => { __seen.named = 0; __seen.begun = performance.now() }")
    end, k = time.time() + 5, 0
    while time.time() < end and not page.evaluate("() => __seen.named"):
        page.mouse.move(x + 3*k, y)
        k += 1
        page.wait_for_timeout(30)
    return page.evaluate("() => __seen.named ? (__seen.named - __seen.begun)/1000 : NaN") or math.nan


def to_pixels(page, action):
    "Seconds from a moment that the action returns to the first frame after its data came."
    page.evaluate("() => { __seen.arrived = __seen.first = 0 }")
    begun = action()
    page.wait_for_function("() => __seen.first", timeout=60_000)
    return page.evaluate("() => __seen.first")/1000 - begun


def processor(process):
    "Seconds of processor time so far: of all kernels and servers that were started here, and of the browser."
    def of(p):
        try: return sum(p.cpu_times()[:2])
        except psutil.Error: return 0.
    theirs = [process, *process.children(recursive=True)]
    names = {p.pid for p in theirs}
    ours = [p for p in psutil.Process().children(recursive=True) if p.pid not in names and "ipykernel" in " ".join(p.cmdline())]
    return sum(map(of, ours)), sum(map(of, theirs))


def slab(page, action):
    "The longest time without a picture, seconds."
    page.evaluate("() => { __seen.slab = __seen.since = 0 }")
    action()
    page.wait_for_function("() => !__seen.since", timeout=60_000)
    return page.evaluate("() => __seen.slab")/1000


def reopened(page):
    "The page as it was saved, loaded again while the kernel lives."
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    page.reload(wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-Cell").nth(VIEWER).locator(".jp-OutputArea-child").first.wait_for(timeout=60_000)
    face(page).wait_for(timeout=60_000)
    page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/", timeout=60_000)


def row(lab, page, process, rung, n, seconds, again):
    "Print the figures of one rung and number of lines."
    tell(lab, n, rung)
    at = []
    def run():
        at.append(to_pixels(page, lambda: (run_cell(page, VIEWER), float(run_cell(page, WATCH).split()[-1]))[1]))
        page.wait_for_timeout(500)
    begun = [slab(page, run)]
    free = [drag(page, seconds) for _ in range(2)][-1]  # the first learns how much can be drawn
    named = answer(page)
    busy = []
    if rung == "browser":
        (lab.folder / "go on").unlink()
        run_cell(page, BUSY, wait=False)
        busy = [drag(page, seconds)]
        (lab.folder / "go on").touch()
    page.wait_for_timeout(1500)
    took = []
    for _ in range(3):
        before = processor(process)
        took.append((to_pixels(page, lambda: float(run_cell(page, REPLACE).split()[-1])), *(b - a for a, b in zip(before, processor(process)))))
    replaced = sorted(took)[1]
    begun.append(slab(page, lambda: (run_cell(page, SWAP), page.wait_for_timeout(500))))
    if again: begun.append(slab(page, lambda: reopened(page)))
    told = lambda rates: f"{max(rates):6.1f}" if rates else "     –"
    print(f"| {rung:8} | {n:6,} | {free:6.1f} | {told(busy)} | {named:5.2f} | {at[0]:5.2f} | {replaced[0]:5.2f} ({replaced[1]:.2f} + {replaced[2]:.2f}) | "
          f"{' / '.join(f'{s:.2f}' for s in begun):18} | {os.getloadavg()[0]:5.1f} |", flush=True)


def next_batches(lab, page, rung):
    "Print how long the next batch takes after the loader is done."
    tell(lab, 0, rung)
    run_cell(page, PREVIEW)
    face(page, PREVIEW).wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    took = []
    for _ in range(5):
        page.evaluate("() => { __seen.arrived = __seen.first = 0 }")
        page.get_by_role("button", name="Next batch").click()
        page.wait_for_function("() => __seen.first", timeout=60_000)
        first = page.evaluate("() => __seen.first")/1000
        took.append(first - float(run_cell(page, LOADED).split()[-1]))
    print(f"| {rung:8} | {sorted(took)[2]:6.2f} | {os.getloadavg()[0]:5.1f} |", flush=True)


def playing(lab, page, rung, n, seconds):
    "Print frames a second while lines grow."
    tell(lab, n, rung)
    run_cell(page, PLAYER)
    face(page, PLAYER).wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    cell = page.locator(".jp-Notebook .jp-Cell").nth(PLAYER)
    own = cell.locator(".dwiml-play button, .widget-play button").filter(visible=True).first  # the browser's, or the kernel's
    own.click()
    page.wait_for_timeout(500)
    page.evaluate("() => { __seen.drawn = 0; __seen.begun = performance.now() }")
    page.wait_for_timeout(1000*seconds)
    frames = page.evaluate("() => __seen.drawn/(performance.now() - __seen.begun)*1000")
    own.click()
    print(f"| {rung:8} | {n:6,} | {frames:6.1f} | {os.getloadavg()[0]:5.1f} |", flush=True)


def resident(process):
    "MB of memory of a process and of those that it began."
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])/1e6


def memory(lab, page, process, rung, many):
    "Print how memory grows."
    tell(lab, 1000, rung)
    run_cell(page, VIEWER)
    tell(lab, 1000, many)
    page.wait_for_timeout(5000)
    before = resident(process)
    kernel = run_cell(page, MANY, timeout=300).split()
    page.wait_for_timeout(5000)
    print(f"| {rung:8} | {float(kernel[-2]):5.0f} → {float(kernel[-1]):5.0f} | {before:5.0f} → {resident(process):5.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rungs", nargs="+", default=["browser", "live", "painter"])
    parser.add_argument("--lines", nargs="*", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--seconds", type=float, default=3, help="of each drag")
    parser.add_argument("--many", type=int, default=100, help="replacements, for memory; 0: not measured")
    parser.add_argument("--quick", action="store_true", help="short drags: six minutes on two free cores")
    parser.add_argument("--gpu", action="store_true", help="let the browser draw as it likes")
    args = parser.parse_args()
    seconds = 1.5 if args.quick else args.seconds
    begun = time.time()
    print(f"{os.cpu_count()} cores; load before: {' '.join(f'{v:.1f}' for v in os.getloadavg())} over 1, 5 and 15 minutes\n")
    with fixtures(args.gpu) as (lab, browser, process):
        browser.add_init_script(COUNT)
        page = opened(lab, browser, args.rungs)
        print("| rung | lines | frames/s dragging | kernel busy | answer, s | run, s | replace, s (processor: kernel + browser) | slab, s: run / swap / reopen | load |\n" + "|---"*9 + "|")
        for n in args.lines:
            for rung in args.rungs: row(lab, page, process, rung, n, seconds, again=n == args.lines[-1])
        print("\n| rung, 200 lines | next batch, s after the loader | load |\n|---|---|---|")
        for rung in args.rungs: next_batches(lab, page, rung)
        print("\n| rung, lines growing | lines | frames/s | load |\n|---|---|---|---|")
        for n in args.lines:
            for rung in args.rungs: playing(lab, page, rung, n, 2*seconds)
        if args.many:
            print(f"\n| rung, 1,000 lines | kernel, MB over {args.many} replacements | browser, MB |\n|---|---|---|")
            for rung in args.rungs: memory(lab, page, process, rung, args.many)
    print(f"\n{time.time() - begun:.0f} s")


if __name__ == "__main__": main()
