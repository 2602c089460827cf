"""Subjects in parallel: the same bytes from one process, several, dask's workers and shares; a killed worker costs one subject, which is done again."""
import json
import multiprocessing
import os
import shutil
import warnings
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.fit_subjects import fit_sh_subjects
from dwiml_nb.core.parallel import LostWorkers, in_parallel
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.evaluation.judging import judge_files
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.run_files import track_run, track_subjects
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

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
        patch.setattr("dwiml_nb.study.create.time.strftime", lambda *_: "now")  # the one thing that differs
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


# ---- shares of an array job

def test_shares_are_joined(here):
    "Three jobs, one of them twice and one with nothing to do; then the same call without a share."
    with pytest.raises(DataProblem, match="Expected: i/n with i from 1 to n, .* Found: '0/3'"): make(here, "shares", shard="0/3")
    made = [[r.subject for r in make(here, "shares", shard=f"{i}/5").reports] for i in (2, 5, 1, 1, 3)]
    assert made == [["sub-02"], [], ["sub-01"], ["sub-01"], ["sub-03"]] and not (here / "shares.hdf5").exists()
    assert [r.taken for r in make(here, "shares").reports] == [True, True, True, False] and same(here, "shares")


def test_shares_are_added(here):
    "The study is the same folder of files, whoever made the new subject."
    def grow(name, **how):
        (here / name).mkdir()
        for file in ("one.hdf5", "one.json"): shutil.copy(here / file, here / name)
        for shard in how.pop("shards", [None]): add_subjects(here / name / "one.hdf5", here / "in", ["sub-05"], trust=here / "own_for_executors.py", shard=shard, **how)
        return {str(p.relative_to(here / name)): p.read_bytes() for p in (here / name).rglob("*") if p.is_file()}
    one = grow("plain")
    with ThreadPoolExecutor(2) as pool: assert grow("threads", executor=pool) == one
    assert grow("joined", shards=["1/2", "2/2", None]) == one and "one.subjects/sub-05.hdf5" in one


# ---- what goes wrong

def test_bad_contents_are_told_as_by_one_process(here):
    bad = here / "in/sub-02/bundles/bad.trk"
    bad.write_bytes(b"TRACK" + bytes(1000))
    told = []
    try:
        with ThreadPoolExecutor(2) as pool:
            for how in ({}, {"executor": pool}):
                with pytest.raises(DataProblem, match="subject sub-02.*bad.trk") as e: make(here, "bad", **how)
                told.append(str(e.value))
    finally: bad.unlink()
    assert told[0] == told[1]
    with pytest.raises(DataProblem, match="Expected: a concurrent.futures.Executor. Found: str. To do: of dask's Client, give client.get_executor()"): make(here, "bad", executor="dask")


def test_a_given_pool_that_breaks_is_replaced_and_the_lost_are_named():
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        with pytest.raises(LostWorkers, match="[ab]: its process ended before it was done, 3 times: .*It waits."): list(in_parallel(os._exit, [("a", (1,)), ("b", (1,))], pool, do="It waits."))


def test_processes_of_our_own_compute_with_one_thread(monkeypatch):
    "numpy's libraries too, which read the environment as they are loaded; here it stays as it was."
    for before in (None, "3"):
        if before is None: monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else: monkeypatch.setenv("OMP_NUM_THREADS", before)
        assert list(in_parallel(os.getenv, [(name, ("OMP_NUM_THREADS",)) for name in "ab"], n_procs=2)) == [("a", "1"), ("b", "1")]
        assert os.environ.get("OMP_NUM_THREADS") == before


# ---- the other entry points

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A toy study, an experiment and the tractograms that one process tracked."
    folder = tmp_path_factory.mktemp("entries")
    dataset = MultiSubjectDataset(toy_study(folder)).load_data()
    model = Learn2TrackModel(nb_features=dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], step_size=2.0)
    DWIMLTrainerOneInput(model, folder, "run", DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles"), max_epochs=1,
                         max_batches_per_epoch_training=1, max_batches_per_epoch_validation=1, device="cpu").train_and_validate()
    return folder


def check_all(folder, **how):
    "What each entry point writes, as bytes."
    name = "_".join(how) or "one"
    fit_sh_subjects(["sub-01", "sub-02"], *(f"{folder}/subjects/{{subject}}/{f}" for f in ("dwi/dwi.nii.gz", "dwi/dwi.bval", "dwi/dwi.bvec", "masks/brain.nii.gz")), f"{folder}/{name}_{{subject}}.nii.gz", order=4, **how)
    track_subjects(folder / "run", ["sub-01", "sub-04"], f"{folder}/{name}_{{subject}}.tck", seeding_mask_group="seed_mask", nt=20, min_length_mm=0, device="cpu", **how)
    track_run(folder / "run", "sub-04", folder / f"{name}_run.trk", seeding_mask_group="seed_mask", nt=20, batch_size=5, min_length_mm=0, device="cpu",
              **how)
    scores = judge_files(sorted((folder / "subjects/sub-01/bundles").glob("*.trk")), folder / "subjects/sub-01", **how)
    told = {k: v for k, v in check_study(folder / "study.hdf5", **how).as_dict().items() if k != "seconds"}
    files = {p.name.removeprefix(name): p.read_bytes() for p in folder.glob(f"{name}_*")}
    return files, json.dumps([{Path(k).name: v.as_dict() for k, v in scores.items()}, told])


def test_each_entry_point_gives_the_same(toy):
    files, told = check_all(toy)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool: assert len(files) == 7 and check_all(toy, executor=pool) == (files, told)


class Lost(Executor):
    "Loses each worker."
    def submit(self, *job):
        future = Future()
        future.set_exception(BrokenExecutor())
        return future


def test_a_subject_that_ends_each_process_is_a_line_of_the_report(toy):
    report = check_study(toy / "study.hdf5", executor=Lost())
    assert [(p.subject, p.problem) for p in report.problems[:2]] == [("sub-01", "reading it ended the process"), ("sub-02", "reading it ended the process")]
