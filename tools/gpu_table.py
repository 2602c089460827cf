"""Run the tests marked `cuda` and the GPU rows of benchmarks/data.py, then print one table of both (see gpu_check.sh)."""
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


class Told:
    "A plugin of pytest that keeps each test's outcome, and how far its results were apart."
    def __init__(self): self.rows = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed: return
        apart = dict(report.user_properties).get("difference", "")
        self.rows.append((report.nodeid.rpartition("::")[2], "", "", "", f"{report.outcome}, apart by {apart}" if apart else report.outcome))


def main():
    start, told = time.time(), Told()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT / "benchmarks"))
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    failed = pytest.main([*options, str(ROOT / "tests" / "test_cuda.py")], [told])
    from data_rows.gpu import rows
    from side_by_side import threads
    n = min(8, len(os.sched_getaffinity(0)))
    with threads(n): timed = list(rows(n, quick=False))
    table = [("", "GPU", f"CPU, {n} threads", "ratio", ""), *told.rows]
    table += [(r.name, *(f"{1e3*r.seconds[k]:.2f} ms" for k in ("ours", r.peer)), f"{r.to_peer:.1f}", r.agrees) for r in timed]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    for row in table: print(*(cell.ljust(width) for cell, width in zip(row, widths)), row[4], sep="  ")
    print(f"{len(told.rows)} tests and {len(timed)} rows in {time.time() - start:.0f} s")
    sys.exit(bool(failed) or not timed)


if __name__ == "__main__":
    main()
