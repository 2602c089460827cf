"""How fast the table of a study is, as a user meets it in a JupyterLab: `python benchmarks/table.py [--subjects 10000]`.

A study of copies of one small subject is made. Then, with a real browser: seconds from running the cell to ten rows on the screen (wall and the
kernel's processor time), from the last key of a search to its rows, from a click on a heading to sorted rows, from a page turned to its lengths and
problems, from a click on a row to its small pictures; and, while every subject is checked in the background, the longest time that the kernel's
event loop was late. Nothing is asserted: the figures depend on the machine and on who else uses it, so the load is printed beside them.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import h5py

from viewers import fixtures

OPEN = """
import asyncio, time
from dwiml_nb.all import StudyBrowser
wall, own = time.time(), time.process_time()
browser = StudyBrowser({path!r})
print(f'{{time.time() - wall:.2f}} {{time.process_time() - own:.2f}}')
browser"""
LATE = """
async def watch(seconds):
    worst, end = 0, time.time() + seconds
    while time.time() < end:
        before = time.perf_counter()
        await asyncio.sleep(.01)
        worst = max(worst, time.perf_counter() - before - .01)
    return worst
idle = await watch(4)
browser.check_button.click()
worst = await watch(8)
print(f'{worst:.3f} {idle:.3f} {browser.message.value}')"""

TAKES = """async ([what, argument]) => {
  const texts = () => [...document.querySelectorAll('table.dataTable tbody tr')].map(r => r.innerText)
  const frame = () => new Promise(requestAnimationFrame), box = document.querySelector('.dt-search input'), before = texts()[0]
  const type = word => { box.value = word; for (const e of ['input', 'keyup']) box.dispatchEvent(new Event(e, {bubbles: true})) }
  const acts = {search: [() => type(argument), () => texts().length && texts().every(t => t.includes(argument))],
    sort: [() => document.querySelectorAll('table.dataTable th')[1].click(), () => texts()[0] !== before],
    page: [() => document.querySelectorAll('.dt-paging-button')[5].click(),
           () => texts()[0] !== before && document.querySelectorAll('table.dataTable tbody svg').length === 10 && !texts().join('').includes('…')],
    look: [() => document.querySelectorAll('table.dataTable tbody tr')[3].cells[1].click(), () => document.querySelector('img[alt$="three sides"]')]}
  const begun = performance.now(), [act, done] = acts[what]
  act()
  while (!done() && performance.now() < begun + 60000) await frame()
  await frame()
  return (performance.now() - begun)/1000 }"""


def many_subjects(path, out, n):
    "A study of n subjects: the first one of another, again and again."
    from dwiml_nb.study.create import copy_attributes
    from dwiml_nb.study.headers import headers_in, write_index
    with h5py.File(path) as a, h5py.File(out, "w", libver=("v108", "latest")) as b:
        copy_attributes(a, b)
        ids = [f"sub-{i:05d}" for i in range(n)]
        for s in ids: a.copy("sub-01", b, s)
        for name, some in (("training", ids[n // 5:]), ("validation", ids[:n // 10]), ("testing", ids[n // 10:n // 5])): b.attrs[f"{name}_subjs"] = some
        b.attrs["chosen_subjs"] = ids
        write_index(b, {s: headers_in(b[s]) for s in ids})
    return str(out)


def measure(browser, lab, path, n):
    "Rows of (what, seconds)."
    cells = ["import dwiml_nb.all, itables.widget, matplotlib.figure", OPEN.format(path=path), "pass"]
    kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": c} for i, c in enumerate(cells)]
    (lab.folder / "table.ipynb").write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, "table.ipynb")
    cell = lambda i: page.locator(".jp-Notebook .jp-Cell").nth(i)
    def run(i):
        cell(i).locator(".jp-InputArea-editor").click()
        page.keyboard.press("Shift+Enter")
    run(0)
    page.wait_for_function("() => /\\[1\\]/.test(document.querySelectorAll('.jp-InputPrompt')[0].textContent)", timeout=120_000)
    begun = page.evaluate("performance.now()")
    run(1)
    page.wait_for_function("() => document.querySelectorAll('table.dataTable tbody tr').length === 10", timeout=120_000)
    yield "the cell to ten rows on the screen", (page.evaluate("performance.now()") - begun) / 1000
    wall, own = cell(1).locator(".jp-OutputArea-output").first.inner_text().split()[:2]
    yield "  of it in the kernel, wall", float(wall)
    yield "  of it in the kernel, its processor", float(own)
    page.wait_for_function("() => document.querySelectorAll('table.dataTable tbody svg').length === 10", timeout=120_000)
    for word in (f"sub-{n - 7:05d}", "sub-000", "testing", f"sub-{n // 2:05d}"): yield f"search '{word}'", page.evaluate(TAKES, ["search", word])
    page.evaluate(TAKES, ["search", "sub"])
    page.evaluate(TAKES, ["sort", ""])
    yield "sort by subject, descending", page.evaluate(TAKES, ["sort", ""])
    yield "a page turned, to its lengths and problems", page.evaluate(TAKES, ["page", ""])
    yield "a row clicked, to its small pictures", page.evaluate(TAKES, ["look", ""])
    cell(2).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(LATE)
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("() => document.querySelectorAll('.jp-Cell')[2].innerText.includes('checked')", timeout=120_000)
    said = cell(2).locator(".jp-OutputArea-output").first.inner_text()
    worst, idle, told = said.split(maxsplit=2)
    yield "the event loop late, at most, before the check of all", float(idle)
    yield f"the event loop late, at most, while {told.split('>')[1].split('<')[0]}", float(worst)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--study", help="a study that is there, of so many subjects called sub-00000 and so on")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from dwiml_nb.study.toy import toy_study
    with tempfile.TemporaryDirectory() as folder:
        path = given.study or many_subjects(toy_study(folder), Path(folder) / "many.hdf5", given.subjects)
        with fixtures(False) as (lab, browser, _):
            print(f"{given.subjects:,} subjects; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
            for what, seconds in measure(browser, lab, path, given.subjects): print(f"{seconds:8.2f} s  {what}", flush=True)
