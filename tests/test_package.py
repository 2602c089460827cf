"""The door of the package: `import dwiml_nb` is quick and brings in nothing heavy."""
import ast
import json
import subprocess
import sys
from pathlib import Path

import dwiml_nb

HEAVY = ["torch", "fury", "pygfx", "dipy", "numba", "plotly", "matplotlib", "IPython"]


def test_import_is_quick_and_light():
    "Under 0.3 s of the processor (the best of three, the interpreter's own start taken off), and none of the big libraries."
    code = f"import sys, json, time; t = time.process_time(); import dwiml_nb; t = time.process_time() - t; print(json.dumps([t, [m for m in {HEAVY} if m in sys.modules]]))"
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < .3
    assert runs[0][1] == []


def test_drawing_libraries_are_imported_where_something_is_drawn():
    "No module imports FURY or what it stands on at its top: machines without graphics import everything. (dipy.data does so by itself.)"
    drawing = {"fury", "pygfx", "wgpu", "rendercanvas"}
    for file in Path(dwiml_nb.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & drawing, file


def test_warnings_are_left_on():
    "FURY switches off every warning of the process when it is imported, and dipy.data imports it."
    code = ("import warnings, dwiml_nb.all\nfrom dwiml_nb.core.sphere import sphere_vertices\nfrom dwiml_nb.viz.stage import import_fury\n"
            "sphere_vertices(); import_fury()\nassert ('ignore', None, Warning, None, 0) not in warnings.filters, warnings.filters")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_lies_beside_the_package_is_in_step():
    "The version to cite is the version; type checkers are told that the package has types."
    root, here = Path(__file__).parent.parent, Path(dwiml_nb.__file__).parent
    assert f"\nversion: {dwiml_nb.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert (here / "py.typed").exists() and "py.typed" in (root / "setup.py").read_text(encoding="utf-8")
