"""The door of the package: `import dwiml_nb` is quick and brings in nothing heavy."""
import json
import subprocess
import sys
import time

HEAVY = ["torch", "fury", "pygfx", "dipy", "numba", "plotly", "matplotlib", "IPython"]


def test_import_is_quick_and_light():
    "Under 0.3 s (the best of three, the interpreter's own start taken off), and none of the big libraries."
    code = f"import sys, json, time; t = time.perf_counter(); import dwiml_nb; t = time.perf_counter() - t; print(json.dumps([t, [m for m in {HEAVY} if m in sys.modules]]))"
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < .3
    assert runs[0][1] == []


def test_importing_everything_opens_no_window_and_needs_no_gpu():
    "`from dwiml_nb.all import *` leaves FURY and its graphics stack alone."
    start = time.perf_counter()
    code = "import sys\nfrom dwiml_nb.all import *\nprint([m for m in ('fury', 'pygfx', 'wgpu') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
    assert time.perf_counter() - start < 30
