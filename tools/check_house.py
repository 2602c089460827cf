"""Cheap checks of the house: modules and README in step with the pages, no module without a page,
imports only from pages before and in cells of their own, no name used before its cell, models asked only what the contract lists, a small front door,
no class with more methods than can be kept in mind.

The last lines tell how the pages are written (docs/contributing.md says what is aimed at); they are figures, not conditions.
"""
import ast
import hashlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from build_docs import readme
from check_contract import contract_problems
from nbdev.process import NBProcessor
from run_pages import EXPORTS, ROOT, bound_names

WIDTH = 110  # characters of a line in a code cell
DOOR = 187  # names that `from dwiml_nb.all import *` may bring
MOST_METHODS = 28  # of a class


def contents(root):
    "Digest of every page and module."
    files = [*root.glob("nbs/**/*.ipynb"), *root.glob("dwiml_nb/**/*.py")]
    return {str(f.relative_to(root)): hashlib.sha1(f.read_bytes()).hexdigest() for f in files if ".ipynb_checkpoints" not in f.parts}


def out_of_step():
    "Export and clean a copy; name the files that differ there, and bring them here. The others are not touched: loops compiled from them stay valid."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        for name in ("nbs", "dwiml_nb"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, copy)
        for command in ("nbdev_export", "nbdev_clean"): subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
        before, after = contents(ROOT), contents(copy)
        changed = sorted(name for name in after if after[name] != before.get(name))
        for name in changed: shutil.copy(copy / name, ROOT / name)
    return [f"{name} was not in step with its page: look at it and commit it" for name in changed]


def read_pages():
    "{module: (path of its page, cells)} in reading order."
    pages = {}
    for path in sorted(ROOT.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        cells = NBProcessor(path, rm_directives=False).nb.cells
        module = next((cell.directives_["default_exp"][0] for cell in cells if "default_exp" in cell.directives_), None)
        pages[f"dwiml_nb.{module}" if module else str(path)] = path, cells
    return pages


def orphans(pages):
    "Modules that no page exports."
    files = [f for f in ROOT.glob("dwiml_nb/**/*.py") if f.name not in ("__init__.py", "_modidx.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return [f"{f.relative_to(ROOT)} has no page: remove it, or name it in a page's default_exp" for name, f in names.items() if name not in pages]


def backward_imports(pages):
    "Exported cells that import from a page at or after their own (the order of the file names is the order of imports)."
    order, problems = {module: i for i, module in enumerate(pages)}, []
    order["dwiml_nb.all"] = len(order)
    for module, (path, cells) in pages.items():
        sources = [cell.source for cell in cells if cell.directives_.keys() & EXPORTS]
        for node in (node for source in sources for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.M)))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            problems += [f"{path.relative_to(ROOT)} imports {name}, a page at or after it" for name in names
                         if name in order and order[name] >= order[module]]
    return problems


def mixed_cells(pages):
    "Lesson cells that import and do something else: the site would execute them without the cells before."
    problems = []
    for path, cells in pages.values():
        for i, cell in enumerate(cells, 1):
            if cell.cell_type != "code" or cell.directives_.keys() & EXPORTS: continue
            nodes = [node for top in cell.parsed_() or [] for node in ast.walk(top)]
            if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes) and any(isinstance(node, (ast.Expr, ast.Assign)) for node in nodes):
                problems.append(f"{path.relative_to(ROOT)}, cell {i}: give the import a cell of its own ({cell.source.splitlines()[0]} …)")
    return problems


def early_names(pages):
    "Lesson cells that use a name before the cell that exports it (what they use by way of others shows when the pages run)."
    problems = []
    for path, cells in pages.values():
        cells = [(number, cell) for number, cell in enumerate(cells, 1) if cell.cell_type == "code"]
        exported, bound = {}, set()
        for number, cell in reversed(cells):
            if cell.directives_.keys() & EXPORTS: exported |= {name: number for name in bound_names(cell.source) or []}
        for number, cell in cells:
            if cell.directives_.keys() & EXPORTS: continue
            nodes = [node for top in cell.parsed_() or [] for node in ast.walk(top)]
            bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            used = {node.id for node in nodes if isinstance(node, ast.Name)} - bound
            problems += [f"{path.relative_to(ROOT)}, cell {number} uses {name}, which cell {exported[name]} exports: move one of them"
                         for name in sorted(used & exported.keys()) if exported[name] > number]
    return problems


def methods_of_classes():
    "Class -> names of its methods and properties, those that it inherits from classes of this package counted."
    own, bases = {}, {}
    trees = [ast.parse(f.read_text(encoding="utf-8")) for f in ROOT.glob("dwiml_nb/**/*.py")]
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        own.setdefault(node.name, set()).update(o.name for o in node.body if isinstance(o, ast.FunctionDef))
        bases.setdefault(node.name, set()).update(ast.unparse(base) for base in node.bases)
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)):
        patched = any(re.match(r"patch\b", ast.unparse(o)) for o in node.decorator_list) and node.args.args and node.args.args[0].annotation
        for name in ast.walk(patched) if patched else ():
            if isinstance(name, ast.Name) and name.id in own: own[name.id].add(node.name)
    inherited = lambda name: own.get(name, set()).union(*(inherited(base) for base in bases.get(name, ())))
    return {name: inherited(name) for name in own}


def large_classes():
    "Say which class has most methods; name those with too many."
    methods = methods_of_classes()
    largest = max(methods, key=lambda name: len(methods[name]))
    print(f"largest class: {largest}, {len(methods[largest])} methods (at most {MOST_METHODS})")
    return [f"class {name} has {len(o)} methods, inherited ones counted, at most {MOST_METHODS}: make some of it a part of its own"
            for name, o in methods.items() if len(o) > MOST_METHODS]


def writing(pages):
    "How the pages are written: length of exported cells, how many definitions an example follows, how many tests hide."
    lengths, followed, hidden, shown = [], [], 0, 0
    for path, cells in pages.values():
        cells = [cell for cell in cells if cell.cell_type == "code"]
        for i, cell in enumerate(cells):
            if "hide" in cell.directives_: hidden += "test_" in cell.source or "assert" in cell.source
            elif not cell.directives_.keys() & EXPORTS: shown += 1
            if not cell.directives_.keys() & EXPORTS: continue
            nodes = [node for node in ast.parse(cell.source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            if not nodes: continue
            lines = len(cell.source.splitlines())
            lengths.append((lines, f"{path.relative_to(ROOT / 'nbs')} {nodes[0].name}"))
            examples = [c.source for c in cells[i + 1:i + 3] if not c.directives_.keys() & (EXPORTS | {"hide"})]
            followed.append(any(re.search(rf"\b{node.name}\b", source) for node in nodes for source in examples))
    if not lengths: return
    longest = max(lengths)
    print(f"{len(pages)} pages, {len(lengths)} exported cells: median {statistics.median(n for n, _ in lengths):.0f} lines, "
          f"longest {longest[0]} ({longest[1]}); {100 * statistics.mean(followed):.0f} % followed within two cells by an example that uses the name; "
          f"{hidden} hidden test cells beside {shown} shown")


def long_lines(pages):
    "Code cells whose lines the site and JupyterLab would cut."
    problems = []
    for path, cells in pages.values():
        for i, cell in enumerate(cells, 1):
            longest = max(map(len, cell.source.splitlines()), default=0) if cell.cell_type == "code" else 0
            if longest > WIDTH: problems.append(f"{path.relative_to(ROOT)}, cell {i}: a line of {longest} characters, at most {WIDTH}")
    return problems


def door():
    "The names that `from dwiml_nb.all import *` brings: how many, and which of them hide another library's."
    script = ("import builtins, dwiml_nb.all as door, matplotlib.pyplot as pyplot, numpy, torch\n"
              "print(len(door.__all__), *[f'{name}:{o.__name__}' for name in door.__all__ for o in (builtins, numpy, torch, pyplot) if hasattr(o, name)])")
    count, *clashes = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    print(f"{count} names at the door (dwiml_nb.all), at most {DOOR}")
    problems = [f"nbs/all.ipynb: {name} hides a name of {other}: leave it out" for name, other in (clash.split(":") for clash in clashes)]
    return problems + [f"nbs/all.ipynb: {count} names are more than {DOOR}: leave helpers in their modules"] * (int(count) > DOOR)


def main():
    problems, pages = out_of_step(), read_pages()
    problems += orphans(pages) + backward_imports(pages) + mixed_cells(pages) + early_names(pages) + contract_problems() + long_lines(pages) + door() + large_classes()
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme(): problems.append("README.md is not what nbs/index.ipynb says: run `make readme`")
    print(*problems, sep="\n", file=sys.stderr)
    writing(pages)
    if problems: sys.exit(1)


if __name__ == "__main__":
    main()
