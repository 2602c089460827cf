"""Subjects in parallel: the same bytes from one process, several, dask's workers and shares; a killed worker costs one subject, which is done again."""
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.parallel import LostWorkers, in_parallel
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects

CONFIG = {"input": {"type": "volume", "files": "dwi/sh.nii.gz", "standardization": "killed_once"},
          "bundles": {"type": "streamlines", "files": ["bundles/*.trk"]}}
LISTS = ["sub-01", "sub-02"], ["sub-03"], ["sub-04"]
# a standardisation that ends its process the first time that the folder says so
MODULE = """import os, signal
from pathlib import Path
from dwiml_nb.study.standardize import STANDARDIZATIONS

def killed_once(data, mask):
    told = Path(__file__).with_name('kill')
    if told.exists() and not Path(__file__).with_name('parent').read_text() == str(os.getpid()):
        try: told.rename(told.with_name('killed'))
        except FileNotFoundError: return data
        os.kill(os.getpid(), signal.SIGKILL)
    return data*2

STANDARDIZATIONS.register('killed_once', killed_once)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Subjects, a trusted module, and the study that one process made of them."
    from dwiml_nb.core.registry import brought_in
    from dwiml_nb.study.standardize import STANDARDIZATIONS
    folder = tmp_path_factory.mktemp("executors")
    write_phantom(folder / "in", n_subjects=5)
    (folder / "own_for_executors.py").write_text(MODULE)
    (folder / "parent").write_text(str(os.getpid()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dwiml_nb.study.create.time.strftime", lambda *_: "now")
        make(folder, "one")
        yield folder
    STANDARDIZATIONS.entries.pop("killed_once")
    brought_in.pop(str(folder / "own_for_executors.py"))


def make(folder, name, **how):
    "The study of that name."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_study(folder / "in", folder / name, CONFIG, *LISTS, trust=folder / "own_for_executors.py", step_size=1., **how)


def same(folder, name):
    "Is it, byte for byte, what one process made?  Nothing else of it is there."
    assert {p.name for p in folder.iterdir() if name in p.name} == {f"{name}.hdf5", f"{name}.json"}
    return (folder / f"{name}.hdf5").read_bytes() == (folder / "one.hdf5").read_bytes()


def test_a_killed_process_costs_one_subject(here):
    (here / "kill").touch()
    summary = make(here, "two", n_procs=2)
    assert (here / "killed").exists() and len(summary.reports) == 4 and same(here, "two")


def test_dask_loses_a_worker(here):
    distributed = pytest.importorskip("distributed")
    (here / "killed").unlink(missing_ok=True)
    (here / "kill").touch()
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50, local_directory=here / "workers") as cluster, distributed.Client(cluster) as client:
        make(here, "dask", executor=client.get_executor())
    assert (here / "killed").exists() and same(here, "dask")
