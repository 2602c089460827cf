"""Execute the pages: `run_pages.py` stores their outputs under build/nbs, `run_pages.py --shipped` runs the installed package.

Each page gets a process of its own, forked from a server that has the slow imports ready, two at a time.
The first way runs every cell as `nbdev_test` would: it is the test of the pages and the only execution the site needs.
The second way (pages that export) puts the names of the installed module in the place of the exported cells,
so what runs, and what coverage counts, is what users import.
"""
import argparse
import multiprocessing
import os
import sys
import time
from fnmatch import fnmatch
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, BUILD = ROOT / "nbs", ROOT / "build"
EXPORTS = {"export", "exports", "exporti"}
SLOW_IMPORTS = ["torch", "scipy.ndimage", "matplotlib.pyplot", "plotly.graph_objects", "ipywidgets", "nibabel", "h5py", "nbdev.process", "execnb.shell"]
LIMIT = 900  # seconds a page may take


def find_pages(patterns):
    "Pages (relative to nbs/) in reading order, but the tutorials first: they take longest."
    pages = [p.relative_to(NBS) for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts)]
    pages = [p for p in pages if not patterns or any(fnmatch(str(p), f"*{pattern}*") for pattern in patterns)]
    return sorted(pages, key=lambda p: (str(p)[0].isdigit(), str(p)))


def files_beside():
    "What lies in nbs/ besides pages: a lesson must not add to it."
    return {str(p.relative_to(ROOT)) for p in NBS.rglob("*") if p.is_file() and p.suffix != ".ipynb" and "__pycache__" not in p.parts}


def module_of(notebook):
    "Dotted module that a page exports to, or None."
    names = [cell.directives_["default_exp"] for cell in notebook.cells if "default_exp" in cell.directives_]
    return f"dwiml_nb.{names[0][0]}" if names else None


def execute(page, shipped):
    "Run one page in this process; exit with 1, naming page and cell, if a cell fails."
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    multiprocessing.set_start_method(None, force=True)  # the page's own workers start as they would in a notebook
    notebook = NBProcessor(NBS / page, rm_directives=False).nb
    module, skip = module_of(notebook), set(get_config().tst_flags.split())
    if shipped:
        if module is None: return
        import coverage
        figures = coverage.Coverage(data_file=str(BUILD / "coverage" / "pages"), data_suffix=True, config_file=str(ROOT / "pyproject.toml"))
        figures.start()
    os.chdir((NBS / page).parent)
    shell, start, taken = CaptureShell(), time.time(), False
    for number, cell in enumerate(notebook.cells, 1):
        flags, source = cell.directives_.keys(), cell.source
        if cell.cell_type != "code" or flags & skip or cell.directives_.get("eval:", [""])[0].lower() == "false": continue
        if shipped and flags & EXPORTS:
            if not taken: source = f"import {module} as _shipped; globals().update({{k: v for k, v in vars(_shipped).items() if k[:2] != '__'}})"
            else: source = ""
            taken = True
        shell._cell_idx, cell.outputs = number, shell.run(source)
        if shell.exc:
            print(f"\nFAILED nbs/{page}, cell {number}:\n{cell.source}\n", shell.prettytb(fname=page), file=sys.stderr, flush=True)
            sys.exit(1)
    if shipped:
        figures.stop()
        figures.save()
    else:
        (BUILD / "nbs" / page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(notebook, BUILD / "nbs" / page)
    print(f"  {time.time() - start:6.1f} s  {page}", flush=True)


def run_all(pages, shipped, workers):
    "Run pages, each in a fresh process, `workers` at a time; return those that failed."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    waiting, running, failed = list(pages), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            page = waiting.pop(0)
            process = context.Process(target=execute, args=(page, shipped))
            process.start()
            running[process.sentinel] = process, page, time.time()
        for process, page, start in running.values():
            if time.time() - start > LIMIT: process.kill()
        for sentinel in wait(running, timeout=10):
            process, page, start = running.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(str(page))
            if process.exitcode not in (0, 1): print(f"\nFAILED nbs/{page}: its process died after {time.time() - start:.0f} s (exit code {process.exitcode})", file=sys.stderr)
    return failed


def report_coverage():
    "Put the pages' figures together and print them; the last line is the total."
    import coverage
    figures = coverage.Coverage(data_file=str(BUILD / "coverage" / "pages"), config_file=str(ROOT / "pyproject.toml"))
    figures.combine([str(BUILD / "coverage")])
    figures.save()
    figures.report()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="parts of page names; all pages if none is given")
    parser.add_argument("--shipped", action="store_true", help="run the installed modules instead of the exported cells, with coverage")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(IN_TEST="1", OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", MPLBACKEND="agg", PLOTLY_RENDERER="plotly_mimetype", PYTHONHASHSEED="0")
    os.chdir(ROOT)
    pages, start, files_before = find_pages(args.patterns), time.time(), files_beside()
    (BUILD / "coverage").mkdir(parents=True, exist_ok=True)
    for old in (BUILD / "coverage").glob("*"): old.unlink()

    failed = run_all(pages, args.shipped, args.workers)
    left = sorted(files_beside() - files_before)
    if args.shipped and not failed: report_coverage()
    print(f"{len(pages) - len(failed)} of {len(pages)} pages ran in {time.time() - start:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if left: print("left behind by a page:", *left)
    if failed or left or not pages: sys.exit(1)
    if not args.shipped and not args.patterns: (BUILD / "pages.done").touch()


if __name__ == "__main__":
    main()
