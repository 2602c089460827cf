"""The benchmarks can be started: each imports what it needs and says what it measures."""
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_measures(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before, is_command = set(sys.modules), "__main__" in script.read_text()
    try:
        if not is_command: assert runpy.run_path(str(script)); return
        with pytest.raises(SystemExit) as ended: runpy.run_path(str(script), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(script.parent)): del sys.modules[name]
    told = capsys.readouterr().out
    assert not ended.value.code and re.match(r"usage: \w+\.py", told) and len(told) > 200
