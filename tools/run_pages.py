"""Execute the pages, each once: `run_pages.py` stores their outputs under build/nbs for the site, and prints the coverage.

Each page gets a process of its own, forked from a server that has the slow imports ready, two at a time.
Lesson cells run as `nbdev_test` would run them. An exported cell is not executed again: it takes its names from the
installed module, at its place in the page. So what the lessons show, and what coverage counts, is what users import, and a
name that is used before its cell is unknown there. Inside the module all is known from the start, the methods of `@patch`
cells too; what a lesson ran of a later cell is seen in the coverage, and fails the page as it would fail a reader.
"""
import argparse
import ast
import multiprocessing
import os
import sys
import time
import warnings
from fnmatch import fnmatch
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, BUILD = ROOT / "nbs", ROOT / "build"
EXPORTS = {"export", "exports", "exporti"}
SLOW_IMPORTS = ["torch", "torch._dynamo", "scipy.ndimage", "matplotlib.pyplot", "plotly.graph_objects", "plotly.basewidget",
                "plotly.io", "nbformat", "anywidget", "ipywidgets", "itables.widget", "nibabel", "h5py", "dipy.data",
                "dipy.reconst.csdeconv", "nbdev.process", "execnb.shell", "tools.warm_numba"]
LIMIT = 900  # seconds a page may take
COVERED = 95  # percent of the modules' lines that the pages must run


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


def patches(node):
    "Is this definition a method of a `@patch` cell? (its class keeps it; the name itself is not bound)"
    return isinstance(node, ast.FunctionDef) and any(
        getattr(decorator.func if isinstance(decorator, ast.Call) else decorator, "id", "") == "patch"
        for decorator in node.decorator_list)


def bound_names(source):
    "Names that a cell binds at its top level: definitions, imports, assignments; None for a star import."
    names, todo = {}, list(ast.parse(source).body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names |= {} if patches(node) else {node.name: True}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): names[node.id] = True
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            if any(alias.name == "*" for alias in node.names): return None
            names |= {(alias.asname or alias.name).split(".")[0]: True for alias in node.names}
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            todo += ast.iter_child_nodes(node)
    return [*names]


def from_module(module, source):
    "What stands in the place of an exported cell: its names, from the installed module."
    names = bound_names(source)
    if names is None: return source
    return f"from {module} import {', '.join(names)}" if names else f"import {module} as _module"


def coverage_of_pages(**options):
    "The coverage that all pages add to."
    import coverage
    return coverage.Coverage(data_file=str(BUILD / "coverage" / "pages"), config_file=str(ROOT / "pyproject.toml"), **options)


def early_uses(figures, module, cells):
    "(lesson cell, later cell) where the lesson ran code that the later cell exports: a reader's notebook would not have it yet."
    file, place, found = sys.modules[module].__file__, 0, set()
    numbers, lessons = {cell.id: number for number, cell in enumerate(cells, 1)}, figures.get_data().contexts_by_lineno(file)
    for line, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("# %% "): place = numbers.get(text.rpartition("#")[2], 0)
        found |= {(int(lesson), place) for lesson in lessons.get(line, ()) if lesson and int(lesson) < place}
    return sorted(found)


def execute(page):
    "Run one page in this process; exit with 1, naming page and cell, if a cell fails."
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    multiprocessing.set_start_method(None, force=True)  # the page's own workers start as they would in a notebook
    warnings.filterwarnings("default", category=UserWarning)  # importing fury (dipy does) turns all warnings off
    notebook = NBProcessor(NBS / page, rm_directives=False).nb
    module, skip = module_of(notebook), set(get_config().tst_flags.split())
    figures = coverage_of_pages(data_suffix=True) if module else None
    if figures: figures.start()
    os.chdir((NBS / page).parent)
    shell, start = CaptureShell(), time.time()
    for number, cell in enumerate(notebook.cells, 1):
        flags = cell.directives_.keys()
        if cell.cell_type != "code" or flags & skip or cell.directives_.get("eval:", [""])[0].lower() == "false": continue
        exported, shell._cell_idx = flags & EXPORTS, number
        if figures: figures.switch_context("" if exported else str(number))
        cell.outputs = shell.run(from_module(module, cell.source) if exported else cell.source)
        if shell.exc:
            print(f"\nFAILED nbs/{page}, cell {number}:\n{cell.source}\n", shell.prettytb(fname=page), file=sys.stderr, flush=True)
            sys.exit(1)
    if figures:
        figures.stop()
        early = early_uses(figures, module, notebook.cells)
        for lesson, later in early: print(f"\nFAILED nbs/{page}, cell {lesson}: it runs what cell {later} exports; move one of them", file=sys.stderr, flush=True)
        if early: sys.exit(1)
        figures.save()
    (BUILD / "nbs" / page).parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, BUILD / "nbs" / page)
    print(f"  {time.time() - start:6.1f} s  {page}", flush=True)


def run_all(pages, workers):
    "Run pages, each in a fresh process, `workers` at a time; return those that failed."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    waiting, running, failed = list(pages), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            page = waiting.pop(0)
            process = context.Process(target=execute, args=(page,))
            process.start()
            running[process.sentinel] = process, page, time.time()
        for process, page, start in running.values():
            if time.time() - start > LIMIT: process.kill()
        for sentinel in wait(running, timeout=10):
            process, page, start = running.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(str(page))
            if process.exitcode not in (0, 1):
                print(f"\nFAILED nbs/{page}: its process died after {time.time() - start:.0f} s (exit code {process.exitcode})", file=sys.stderr)
    return failed


def report_coverage():
    "Put the pages' figures together, print them and return the total (in percent)."
    figures = coverage_of_pages()
    figures.combine([str(BUILD / "coverage")])
    figures.save()
    return figures.report()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="parts of page names; all pages, with the coverage, if none is given")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(IN_TEST="1", OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", MPLBACKEND="agg",
                      PLOTLY_RENDERER="plotly_mimetype", PYTHONHASHSEED="0")
    os.chdir(ROOT)
    pages, start, files_before, whole = find_pages(args.patterns), time.time(), files_beside(), not args.patterns
    (BUILD / "coverage").mkdir(parents=True, exist_ok=True)
    for old in (BUILD / "coverage").glob("*"): old.unlink()

    failed = run_all(pages, args.workers)
    left = sorted(files_beside() - files_before)
    covered = report_coverage() if whole and not failed else 100.
    print(f"{len(pages) - len(failed)} of {len(pages)} pages ran in {time.time() - start:.0f} s"
          + (f"; failed: {', '.join(failed)}" if failed else ""))
    if left: print("left behind by a page:", *left)
    if covered < COVERED: print(f"the pages run {covered:.1f} % of the modules, less than {COVERED} %: show what they miss, or remove it")
    if failed or left or not pages or covered < COVERED: sys.exit(1)
    if whole: (BUILD / "pages.done").touch()


if __name__ == "__main__":
    main()
