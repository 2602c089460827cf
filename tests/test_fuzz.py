"""Damaged files: a thousand seeded mutations of each format are read in processes of their own. Each is read, or refused in a clear sentence.

By default a fixed stride of the thousand HDF5 and TRX seeds runs, and all of TRK and TCK; DWIML_SLOW=1 runs all seeds of all. What crashes or hangs within
the HDF5 library is counted and its seeds are printed; nothing of ours is on top of the stack there. `pytest -s` shows the counts.
"""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import pytest

SCRIPT = Path(__file__).with_name("fuzz_script.py")
SEEDS = range(1000)
STRIDE = {"hdf5": 23, "trx": 11}  # of the default run
LIMIT_S = 1800


def python(*args, timeout=LIMIT_S):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=timeout, env=environment)


def end_of(run):
    "Why a process ended before it was done, and in whose code: the innermost line of Python's stack."
    what = "hang" if "Timeout (" in run.stderr else "crash"
    _, *stacks = re.split(r"^(?:Current t|T)hread 0x.*\n", run.stderr, flags=re.M)  # the thread that was reading is the current one, or the last
    innermost = re.match(r'\s*File "([^"]+)"', stacks[-1]) if stacks else None
    return what, innermost.group(1) if innermost else f"rc {run.returncode}: {run.stderr[-1500:]}"


def fuzz(kind, folder, seeds):
    "{seed: (outcome, words)}; a process that dies is replaced, and its seed noted."
    todo, found = list(seeds), {}
    while todo:
        run = python("read", kind, folder, *todo)
        begun = None
        for seed, outcome, words in map(json.loads, run.stdout.splitlines()):
            begun = seed if outcome == "begun" else None
            if outcome != "begun": found[seed] = outcome, words
        if run.returncode == 0: break
        assert begun is not None, f"the reading process could not begin: {run.stderr[-2000:]}"
        found[begun] = end_of(run)
        todo = [s for s in todo if s not in found]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    run = python("make", path)
    assert run.returncode == 0, run.stderr
    return path


@pytest.mark.parametrize("kind", ["hdf5", "trk", "tck", "trx"])
def test_damaged_files(kind, folder):
    seeds = SEEDS if os.environ.get("DWIML_SLOW") else SEEDS[::STRIDE.get(kind, 1)]
    found = fuzz(kind, folder, seeds)
    assert sorted(found) == list(seeds), "a seed was left out"
    library = {s: f for s, f in found.items() if f[0] in ("crash", "hang") and "h5py" in f[1]}
    counts = Counter("in libhdf5" if s in library else outcome for s, (outcome, _) in found.items())
    told = f"; within libhdf5 {h5py.version.hdf5_version}: {', '.join(f'seed {s} {w[0]}' for s, w in sorted(library.items()))}" if library else ""
    print(f"\n{kind}: {len(found)} seeds: {counts['ok']} read, {counts['refused']} refused in a clear sentence, {counts['in libhdf5']} ended within libhdf5{told}")
    bad = {s: f for s, f in found.items() if f[0] not in ("ok", "refused") and s not in library}
    assert not bad, f"{len(bad)} seeds, the first: {next(iter(bad.items()))}"
    assert counts["ok"] and counts["refused"], "the mutations do too much or too little"


def test_claims_of_terabytes(folder):
    "Small files that claim to be huge are refused before anything is allocated: 256 MiB are enough."
    run = python("bombs", folder)
    told = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and len(told) == 13, run.stderr
    assert [(name, outcome) for name, outcome, _ in told] == [(name, "refused") for name, _, _ in told]
    for name, _, words in told: assert name in words, words


@pytest.mark.parametrize("script, says", [("import os; os.kill(os.getpid(), 11)", "crashed the HDF5 library"), ("while True: pass", "does not end"),
                                          ("raise MemoryError", "ended early")])
def test_check_tells_of_a_process_that_ended(folder, monkeypatch, script, says):
    "What ends the HDF5 library is a line of the report, not the end of the command."
    from dwiml_nb.study import check_apart
    monkeypatch.setattr(check_apart, "CHECK_APART", script)
    report = check_apart.check_apart(folder / "whole.hdf5", timeout=2)
    assert not report.ok and says in report.problems[0].problem
