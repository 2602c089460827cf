"""Do two checkouts give the same numbers? The recipes of checkout_recipes.py, run in both and compared bit for bit.

    python tools/compare_checkouts.py BEFORE AFTER                   about three minutes for each checkout
    python tools/compare_checkouts.py BEFORE AFTER --keep FOLDER     BEFORE's results stay there, and are used again
    python tools/compare_checkouts.py BEFORE AFTER --only demo-60 vox resume

Compared are studies, batches (ids, draws, lines, inputs, targets), logged rows, weights, records, tractograms and scores; not what depends
on the moment: seconds, dates, versions, folders. Exit status 1, and the first quantities that differ, if anything does.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

RECIPES = Path(__file__).with_name("checkout_recipes.py")
NEARLY = {("two-groups", "tractograms"): 1e-6, ("two-groups", "scores"): 1e-6}  # (recipe, what): share of the largest value
NEW_KEYS = {}  # "trainer.params.NAME": default; options that records of BEFORE do not have
NEW_QUANTITIES = ("tractograms/*/stop_names",)  # what BEFORE does not tell


def state_of(checkout):
    "What decides the results of a checkout: its modules, the recipes (wherever they import from), the versions below them."
    recipes = [node for node in ast.parse(RECIPES.read_text()).body if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))]
    digest = hashlib.sha1("\n".join(map(ast.dump, recipes)).encode())
    for file in sorted((checkout/"dwiml_nb").rglob("*.py")):
        if file.name != "_modidx.py": digest.update(f"{file.relative_to(checkout)}\n".encode() + file.read_bytes())
    versions = subprocess.run([sys.executable, "-c", "import sys, torch, numpy; print(sys.version, torch.__version__, numpy.__version__)"],
                              capture_output=True, text=True, check=True).stdout
    return hashlib.sha1(digest.digest() + versions.encode()).hexdigest()


def run_recipes(checkout, folder, names):
    "Run recipes in a checkout, unless its results are there already."
    folder.mkdir(parents=True, exist_ok=True)
    state, marks = state_of(checkout), folder/"made_by.json"
    made_by = json.loads(marks.read_text()) if marks.exists() else {}
    todo = [name for name in names if made_by.get(name) != state or not (folder/f"{name}.json").exists()]
    print(f"{checkout}: {len(names) - len(todo)} recipes are kept, {len(todo)} to run", flush=True)
    if not todo: return
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "IN_TEST": "1", "PYTHONHASHSEED": "0"}
    start = time.time()
    with open(folder/"log.txt", "w") as log:
        code = subprocess.run([sys.executable, RECIPES, folder, *todo], env=env, stderr=log, cwd=folder).returncode
    if code: sys.exit(f"{checkout}: the recipes ended with status {code}\n{(folder/'log.txt').read_text()[-3000:]}")
    marks.write_text(json.dumps(made_by | {name: state for name in todo}))
    print(f"{checkout}: {time.time() - start:.0f} s", flush=True)


def differences(a, b, where=""):
    "(where, before, after) of each leaf of two JSON values that differs; the order of keys counts."
    if isinstance(a, dict) and isinstance(b, dict):
        for k in b.keys() - a.keys():
            if NEW_KEYS.get(f"{where}.{k}"[1:], "not there") != b[k]: yield f"{where}.{k}", "not there", b[k]
        if [k for k in a if k in b] != [k for k in b if k in a]: yield f"{where} (order of keys)", list(a), list(b)
        for k in a: yield from [(f"{where}.{k}", a[k], "not there")] if k not in b else differences(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)): yield from differences(x, y, f"{where}[{i}]")
    elif a != b or type(a) is not type(b): yield where, a, b


def difference_of_arrays(a, b, nearly):
    "(largest difference, sentence) of two arrays; no sentence where they are the same, or nearly so where that is enough."
    if a.shape != b.shape or a.dtype != b.dtype: return np.inf, f"{a.dtype} {a.shape}, now {b.dtype} {b.shape}"
    if a.tobytes() == b.tobytes() or a.size == 0: return 0., None
    x, y = (o.astype(np.float64) for o in (a, b))
    off = np.where(np.isnan(x) & np.isnan(y), 0., np.abs(x - y))
    largest, at = float(np.nan_to_num(off, nan=np.inf).max()), np.unravel_index(int(np.nan_to_num(off, nan=np.inf).argmax()), a.shape)
    if 0 < largest <= nearly*max(1., float(np.nanmax(np.abs(x)))): return largest, None
    return largest, f"{int((off != 0).sum())} of {a.size} values, most at {[int(i) for i in at]}: {a[at]!r}, now {b[at]!r}"


def difference_of_values(told, nearly):
    "(largest difference, sentence) of what `differences` told; no sentence where that is nothing, or little and enough."
    number = lambda o: isinstance(o, (int, float)) and not isinstance(o, bool)
    largest = max((abs(x - y) if number(x) and number(y) else np.inf for _, x, y in told), default=0.)
    if not told or largest <= nearly: return largest, None
    return largest, "; ".join(f"{where.lstrip('.')} was {str(x)[:90]}, now {str(y)[:90]}" for where, x, y in told[:3])


def compare(before, after, name):
    "({what: [number of quantities, largest difference, [(quantity, sentence) of each that differs]]}, all quantities in order)"
    notes = [json.loads((folder/f"{name}.json").read_text()) for folder in (before, after)]
    found = {}
    def tell(quantity, largest, sentence=None):
        row = found.setdefault(quantity.partition("/")[0], [0, 0., []])
        row[0], row[1] = row[0] + 1, max(row[1], largest)
        if sentence: row[2].append((quantity, sentence))
    with np.load(before/f"{name}.npz") as a, np.load(after/f"{name}.npz") as b:
        for quantity in notes[0]["order"]:
            nearly = NEARLY.get((name, quantity.partition("/")[0]), 0.)
            if quantity == "error": tell(quantity, np.inf, f"failed BEFORE: {notes[0]['values'][quantity]}")
            elif quantity not in notes[1]["order"]: tell(quantity, np.inf, "not there AFTER")
            elif quantity in a and quantity in b: tell(quantity, *difference_of_arrays(a[quantity], b[quantity], nearly))
            elif quantity in a or quantity in b: tell(quantity, np.inf, "an array in one, a value in the other")
            else:
                old, new = (n["values"][quantity] for n in notes)
                told = list(differences(old, new))
                tell(quantity, *difference_of_values(told, nearly))
        for quantity in notes[1]["order"]:
            if quantity == "error": tell(quantity, np.inf, f"failed AFTER: {notes[1]['values'][quantity]}")
            elif quantity not in notes[0]["order"] and not any(fnmatch(quantity, new) for new in NEW_QUANTITIES):
                tell(quantity, np.inf, "not there BEFORE")
    order = [q for n in notes for q in n["order"]]
    return found, order


def row_of(name, found):
    "A line of the table."
    counts = ", ".join(f"{n} {what}" for what, (n, _, _) in found.items())
    by = lambda largest: f" (by {largest:.3g})" if np.isfinite(largest) else ""
    differ = [f"{len(bad)} {what} differ{by(largest)}" for what, (_, largest, bad) in found.items() if bad]
    near = [f"{what} nearly{by(largest)}" for what, (_, largest, bad) in found.items() if largest and not bad]
    return f"| {name} | {counts} | {', '.join(differ or ['equal', *near])} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout: the folder in which dwiml_nb/ lies")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these recipes")
    parser.add_argument("--full", action="store_true", help="also train the demo's whole recipe")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where BEFORE's results stay, to be used again")
    parser.add_argument("--first", type=int, default=3, help="how many quantities that differ to show for each recipe")
    args = parser.parse_args()
    before, after = args.before.absolute(), args.after.absolute()
    for checkout in (before, after):
        if not (checkout/"dwiml_nb"/"__init__.py").is_file(): sys.exit(f"{checkout} is no checkout: expected a folder dwiml_nb in it")
    known = [name.replace("_", "-") for name in re.findall(r"^@recipe\ndef (\w+)", RECIPES.read_text(), re.M)]
    unknown = [name for name in args.only or [] if name not in known]
    if unknown: sys.exit(f"no recipe {', '.join(unknown)}; they are {', '.join(known)}")
    names = args.only or [name for name in known if args.full or name != "demo-full"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = (args.keep or Path(scratch)/"before").absolute(), Path(scratch)/"after"
        for checkout, folder in zip((before, after), folders): run_recipes(checkout, folder, names)
        compared = {name: compare(*folders, name) for name in names}
    different = 0
    print("\n| recipe | compared | result |\n|---|---|---|")
    for name, (found, _) in compared.items(): print(row_of(name, found))
    for name, (found, order) in compared.items():
        bad = sorted(((q, s) for _, _, some in found.values() for q, s in some), key=lambda row: order.index(row[0]))
        different += bool(bad)
        if bad: print(f"\n{name}: first of {len(bad)}", *(f"  {q}: {s}" for q, s in bad[:args.first]), sep="\n")
    print(f"\n{len(names) - different} of {len(names)} recipes are equal")
    sys.exit(bool(different))


if __name__ == "__main__": main()
