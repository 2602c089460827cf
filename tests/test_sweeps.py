"""Sweeps: workers that are killed at every stage of a trial lose none and double none."""
import errno
import gc
import importlib.util
import json
import multiprocessing
import shutil
import signal
import sqlite3
import sys
import traceback
from pathlib import Path

import h5py
import optuna
import pytest
import torch

import dwiml_nb.runs.sweeps as sweeps
import sweep_script
from dwiml_nb.core import registry
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.registry import trusting
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.sinks import read_rows

CTX = multiprocessing.get_context("forkserver")
RUN = """
seed = 3
data = {hdf5_file = "study.hdf5", input_group_name = "input", streamline_group_name = "bundles"}
model = {name = "Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0}
[training]
experiment_name = "through"
max_epochs = 2
max_batches_per_epoch_training = 2
max_batches_per_epoch_validation = 1
device = "cpu"
[sweep]
trials = 5
sampler = "random"
[sweep.space]
"optimizer.lr" = {low = 1e-4, high = 0.1, log = true}
"model.dropout" = [0.0, 0.2]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    toy_study(folder)
    (folder / "run.toml").write_text(RUN)
    return folder


def start(here, name, kill=None, file="run.toml", trust=()):
    process = CTX.Process(target=sweep_script.work, args=(str(here / file), here / "experiments" / name, (f"training.experiment_name={name}",), kill, trust))
    process.start()
    return process


def ended(process):
    process.join(120)
    assert process.exitcode is not None, "the worker hangs"
    return process.exitcode


def outcome(folder):
    "Of each trial: state, values drawn, value, epochs reported, epochs trained, weights."
    found = []
    for t in sweeps.open_study(folder).trials:
        place = folder / f"trial_{t.number:04}"
        weights = torch.load(place / "checkpoint" / "model" / "model_state.pkl", weights_only=True)
        rows = read_rows(place / "logs" / "epochs.jsonl")
        assert [r["epoch"] for r in rows] == [0, 1] and t.intermediate_values == {r["epoch"]: r["valid_loss"] for r in rows}
        found.append((t.state.name, t.params, t.value, {k: v.numpy().tobytes() for k, v in weights.items()}))
    return found


def test_kills(here):
    "A worker dies at each place; then two work at a time, and one of them dies. All trials are as if nothing had happened."
    sweeps.sweep(here / "run.toml")
    for kill in sweep_script.KILLS: assert ended(start(here, "killed", kill)) == -signal.SIGKILL, kill
    both = [start(here, "killed", "within an epoch"), start(here, "killed")]
    assert sorted(map(ended, both)) in ([-signal.SIGKILL, 0], [0, 0])
    through, killed = (outcome(here / "experiments" / name) for name in ("through", "killed"))
    assert [o[0] for o in killed] == ["COMPLETE"] * 5
    assert killed == through  # 5 trials, the same bits
    assert sorted(p.name for p in (here / "experiments" / "killed").glob("trial_*")) == [f"trial_{i:04}" for i in range(5)]


MINE = """import numpy as np
import torch
from dwiml_nb.models.registered import dwiml_model

@dwiml_model
class SweptBands(torch.nn.Module):
    def __init__(self, config, data_sample):
        super().__init__()
        self.own = config["model"]["SweptBands"]
        self.layers = torch.nn.Sequential(torch.nn.Linear(data_sample.shape[1], self.own["width"]), torch.nn.Dropout(self.own["drop"]), torch.nn.Linear(self.own["width"], 4))
    def forward(self, batch): return self.layers(batch)
    def train_step(self, batch):
        self.optimizer.zero_grad()
        loss = self.criterion(self(batch), batch.argmax(1) % 4)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "width": self.own["width"]}
    def validate_step(self, batch): return {"loss": self.criterion(self(batch), batch.argmax(1) % 4)}
    @staticmethod
    def to_tensor(data_dict): return np.stack([np.asarray(v).mean(0) for v in data_dict["data"]["input"]])
"""


def test_a_registered_model_of_a_trusted_file(here, monkeypatch):
    "Two processes vary the values of its own table, one of them is killed, and the sweep goes on: as if nothing had happened."
    monkeypatch.setattr(registry, "brought_in", dict(registry.brought_in))
    (here / "swept_mine.py").write_text(MINE)
    text = RUN.split("[sweep]")[0].replace('"Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0', '"SweptBands", SweptBands = {width = 3, drop = 0.1}')
    (here / "mine.toml").write_text(text + """
[sweep]
trials = 3
sampler = "random"
[sweep.space.model.SweptBands]
width = {low = 2, high = 8}
drop = [0.0, 0.2]
""")
    trust = str(here / "swept_mine.py")
    with pytest.raises(DataProblem): sweeps.sweep(here / "mine.toml", "training.experiment_name=mine")              # not trusted
    both = [start(here, "mine_killed", kill, "mine.toml", trust) for kill in ("within an epoch", None)]
    assert {ended(p) for p in both} <= {-signal.SIGKILL, 0}
    with trusting(trust):
        sweeps.sweep(here / "mine.toml", "training.experiment_name=mine_killed")                                    # goes on, if both had ended early
        sweeps.sweep(here / "mine.toml", "training.experiment_name=mine_through")
        through, killed = (outcome(here / "experiments" / name) for name in ("mine_through", "mine_killed"))
        with pytest.raises(DataProblem, match="mean 'width'"): sweeps.sweep(here / "mine.toml", "sweep.space.model.SweptBands.widht=[1, 2]")
    assert [o[0] for o in killed] == ["COMPLETE"] * 3 and {len(o[3]["net.layers.0.bias"]) // 4 for o in killed} == {o[1]["model.SweptBands.width"] for o in killed}
    assert killed == through  # the same bits


def test_workers(here):
    "Two processes share a grid: every point once; another sweep of that name is refused."
    own = "training.experiment_name=grid", "training.max_epochs=1"
    (here / "grid.toml").write_text(RUN.split("[sweep]")[0] + """
[sweep]
sampler = "grid"
space = {optimizer = {lr = [0.1, 0.01]}, model = {dropout = [0.0, 0.2]}}
""")
    study = sweeps.sweep(here / "grid.toml", *own, workers=2)
    points = [(t.params["optimizer.lr"], t.params["model.dropout"]) for t in study.trials]
    assert sorted(points) == [(.01, 0.), (.01, .2), (.1, 0.), (.1, .2)]
    assert all(t.state.name == "COMPLETE" for t in study.trials)
    with pytest.raises(DataProblem, match="has another sweep.sampler"): sweeps.sweep(here / "run.toml", *own)


def test_pruned_and_failed(here, monkeypatch):
    "A pruned trial stops after its epoch, with a checkpoint; one whose values do not go together fails and says why."
    (here / "odd.toml").write_text(RUN.split("[sweep]")[0] + """
[sweep]
trials = 4
sampler = "grid"
pruner = "median"
[sweep.space]
"model.dropout" = [0.0, 2.0]
"training.max_epochs" = [1, 2]
""")
    study = sweeps.sweep(here / "odd.toml", "training.experiment_name=odd")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert "dropout" in study.trials[2].user_attrs["error"]

    class Strict(optuna.pruners.BasePruner):
        "Prunes all but the first trial after one epoch."
        def prune(self, study, trial): return trial.number > 0
    monkeypatch.setattr(sweeps, "make_pruner", lambda table: Strict())
    study = sweeps.sweep(here / "run.toml", "training.experiment_name=pruned", trials=2)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"]
    place = here / "experiments" / "pruned" / "trial_0001"
    assert len(read_rows(place / "logs" / "epochs.jsonl")) == 1 and (place / "checkpoint").is_dir()
    assert "sinks" not in json.loads(Path(place / "parameters_latest.json").read_text())["trainer"]["params"]
    assert sweeps.sweep_rows(study)[0]["trial"] == "trial_0000"


WRONG = {("sweep.space.model.dropot=[0.1, 0.2]",): "unknown key model.dropot", ("sweep.pruner=medan",): "mean 'median'", ("sweep.trials=0",): "sweep.trials",
         ("sweep.value=3",): "sweep.value", ("sweep.sampler=grid",): "a grid needs a step", ("sweep.space.model.dropout={low=0, high=1, if=2}",): "cannot depend",
         ("sweep.trials=1e9",): "without a point", ("sweep.trials=1000000",): "100000", ("sweep.sampler=[1]",): "sweep.sampler cannot", ("sweep=3",): "sweep is a table",
         ("sweep.space.training.experiment_name=['a', 'b']",): "a name of its own", ("sweep.space.training.experiments_path=['a', 'b']",): "in the folder of the sweep",
         ("sweep.space.logging.sinks=[['csv'], []]",): "no trial's value depends", ("sweep.space.trust.x=['a', 'b']",): "--trust",
         ("sweep.space.model.nb_previous_dirs={low=0, high=2.5}",): "draws fractions", ("sweep.space.model.nb_previous_dirs=[1, 1.5]",): "a whole number",
         ("sweep.space.model.dropout=[0.1, 'some']",): "cannot be 'some'", ("sweep.space.model.rnn_layer_sizes=[[4], 'x']",): "a list", ("sweep.space.model.dropout=[0.1, nan]",): "finite",
         ("sweep.space.model.dropout={low=0, high=1e300}",): "below 2", ("sweep.space.model.dropout={low=0.0, high=1.0, step=1e-15}", "sweep.sampler=grid", "sweep.space.optimizer.lr=[1, 2]"): "too large"}


@pytest.mark.parametrize("words", WRONG, ids=range(len(WRONG)))
def test_said_before_anything_is_made(here, words):
    "What is wrong with the table is one sentence, and no folder is there."
    text = RUN.split("[sweep.space]")[0] + "[sweep.space]\noptimizer.lr = {low = 1e-4, high = 0.1, log = true}\n"
    (here / "wrong.toml").write_text(text)
    with pytest.raises(ValueError, match=WRONG[words]): sweeps.sweep(here / "wrong.toml", "training.experiment_name=wrong", *words)
    assert not (here / "experiments" / "wrong").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "x"*201])
def test_a_name_leads_nowhere_else(here, name):
    before = sorted(here.iterdir())
    with pytest.raises(DataProblem, match="names the folder"): sweeps.sweep(here / "run.toml", f"training.experiment_name='{name}'")
    assert sorted(here.iterdir()) == before


def test_a_class_of_a_notebook_is_not_for_several_workers(monkeypatch):
    "Other processes do not see it; those of a script they read."
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    own = type("Here", (), {"__module__": "__main__"})
    with pytest.raises(DataProblem, match="a class of this notebook.*workers=1"): sweeps.check_importable([int, own])
    sweeps.check_importable([int])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    sweeps.check_importable([own])


def test_another_run_is_not_gone_on_with(here):
    "What changed outside of [sweep] is named; what no value depends on may change."
    words, folder = ["training.experiment_name=same", "training.max_epochs=1"], here / "experiments" / "same"
    sweeps.sweep(here / "run.toml", *words, trials=1)
    for word, said in {"training.max_epochs=2": "training.max_epochs. Expected: 1. Found: 2", "seed=4": "another seed", "model.dg_key=sphere-classification": "model.dg_key",
                       "loader.split_ratio=0.5": "loader.split_ratio", "data.streamline_group_name=other": "other", "data.hdf5_file=none.hdf5": "no such study"}.items():
        with pytest.raises(DataProblem, match=said): sweeps.sweep(here / "run.toml", *words, word, trials=2)
    study = sweeps.sweep(here / "run.toml", *words, "training.max_hours=1.0", "logging.sinks=['model_card']", "data.lazy=true", trials=2)
    assert len(study.trials) == 2 and [(folder / f"trial_000{i}" / "best_model" / "README.md").exists() for i in (0, 1)] == [False, True]


def test_a_study_with_other_content_is_not_gone_on_with(here):
    "The file is of the same name; the sweep looks into it."
    words, study = ["training.experiment_name=content", "training.max_epochs=1", f"data.hdf5_file={here}/content.hdf5"], here / "content.hdf5"
    shutil.copy(here / "study.hdf5", study)
    sweeps.sweep(here / "run.toml", *words, trials=1)
    gc.collect()  # its trainers have the file open
    with h5py.File(study, "r+") as f: f["sub-01/input/data"][...] = f["sub-01/input/data"][...] + 1
    with pytest.raises(DataProblem, match="another data.fingerprint"): sweeps.sweep(here / "run.toml", *words, trials=2)


@pytest.mark.parametrize("fault", ["full", "study", "database"])
def test_a_disk_fails_no_trial(here, monkeypatch, fault):
    "It is full, or the study's is gone, or the database cannot be written: the sweep stops with a sentence, and goes on later."
    study, words = here / f"disk_{fault}.hdf5", [f"training.experiment_name=disk_{fault}", "training.max_epochs=1", f"data.hdf5_file={here}/disk_{fault}.hdf5"]
    shutil.copy(here / "study.hdf5", study)
    def fails(*args, **kwargs):
        if fault == "full":
            try: raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as e: raise DataProblem("the checkpoint cannot be written") from e
        if fault == "database": raise sqlite3.OperationalError("database or disk is full")
        study.unlink()
        raise DataProblem("no such study")
    with monkeypatch.context() as patch:
        patch.setattr(*((optuna.Study, "tell") if fault == "database" else (sweeps, "run_parts")), fails)
        with pytest.raises(DataProblem, match="disk is full" if fault == "database" else "trial 0 cannot be trained here"): sweeps.sweep(here / "run.toml", *words, trials=2)
    shutil.copy(here / "study.hdf5", study)
    made = sweeps.sweep(here / "run.toml", *words, trials=2)
    assert [t.state.name for t in made.trials] == ["COMPLETE"] * 2


def test_a_run_file_that_is_edited_meanwhile(here, monkeypatch):
    "All trials are those of the file as it was."
    file, right = here / "edited.toml", sweeps.train_trial
    file.write_text(RUN)
    def edit(*args):
        file.write_text("this is no TOML")
        return right(*args)
    monkeypatch.setattr(sweeps, "train_trial", edit)
    study = sweeps.sweep(file, "training.experiment_name=edited", "training.max_epochs=1", trials=2)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2


def test_choices_of_all_kinds(here, tmp_path, monkeypatch):
    "Tables, words and classes are chosen from; paths of the file are beside it, wherever one is."
    monkeypatch.chdir(tmp_path)
    shutil.copy(here / "study.hdf5", here / "again.hdf5")
    text = RUN.split("[sweep]")[0].replace("hdf5_file", "lazy = true, hdf5_file") + """
[sweep]
sampler = "grid"
[sweep.space]
data.hdf5_file = ["study.hdf5", "again.hdf5"]
model.dg_args = [{add_eos = true}, {add_eos = false}]
optimizer.name = ["Adam", "SGD"]
"""
    (here / "kinds.toml").write_text(text)
    study = sweeps.sweep(here / "kinds.toml", "training.experiment_name=kinds", "training.max_epochs=1")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 8, study.trials
    assert {t.params["data.hdf5_file"] for t in study.trials} == {str(here / "study.hdf5"), str(here / "again.hdf5")}


def test_a_finished_run_is_not_taken_for_a_trial_with_other_values(here):
    "The database is gone and the draw is another: the old value is not given to the new values."
    words, folder = ["training.experiment_name=gone", "training.max_epochs=1"], here / "experiments" / "gone"
    sweeps.sweep(here / "run.toml", *words, trials=1)
    (folder / "sweep.db").unlink()
    (here / "seed.toml").write_text(RUN.replace("trials = 5", "trials = 5\nseed = 8"))
    sweeps.sweep(here / "seed.toml", *words, trials=1)
    row, = sweeps.sweep_rows(sweeps.open_study(folder))
    assert row["state"] == "fail" and "trained with another" in str(row)


@pytest.mark.parametrize("damage", ["update trial_params set distribution_json='x'", "update trials set state='NOPE'", "garbage", "update study_user_attributes set value_json='\"x\"'",
                                    "update trial_values set value='text'", "update trial_intermediate_values set intermediate_value='some text'", "update trial_params set param_value='three'"])
def test_a_damaged_database_is_one_sentence(here, damage):
    name = f"damaged{len(damage)}"
    words, base = [f"training.experiment_name={name}", "training.max_epochs=1"], here / "experiments" / name / "sweep.db"
    sweeps.sweep(here / "run.toml", *words, trials=1)
    if damage == "garbage": base.write_bytes(b"garbage"*1000)
    else:
        with sqlite3.connect(base) as open_: open_.execute(damage)
    before = base.read_bytes()
    with pytest.raises(DataProblem, match="database"): sweeps.sweep(here / "run.toml", *words, trials=1)
    assert base.read_bytes() == before
    for look in (lambda: sweeps.sweep_rows(sweeps.open_study(base.parent)), lambda: sweeps.sweep_figures(base.parent), lambda: sweeps.write_sweep_page(base.parent, here / "page.html")):
        if "user_attr" not in damage:
            with pytest.raises(DataProblem, match="database"): look()
        else: look()


def test_a_quasi_random_sequence_goes_on(here, monkeypatch):
    "Stopped and taken up again, it gives the points that it gives at once; lists are drawn anew for each."
    monkeypatch.setattr(sweeps, "train_trial", lambda *args: ("COMPLETE", .5))
    def drawn(name, *counts):
        for n in counts: study = sweeps.sweep(here / "run.toml", f"training.experiment_name={name}", "sweep.sampler=qmc", trials=n)
        return [t.params for t in study.trials]
    once = drawn("qmc_once", 6)
    assert drawn("qmc_twice", 2, 6) == once and {p["model.dropout"] for p in once} == {0., .2} and len({p["optimizer.lr"] for p in once}) == 6


SECRET = "postgresql://me:hunter2@127.0.0.1:9/sweeps?sslpassword=hunter3"


@pytest.mark.parametrize("fault", [None, f"cannot reach {SECRET}", "password hunter2 is wrong", "hunter3 is wrong"])
def test_a_password_is_not_shown(here, monkeypatch, fault):
    "The driver is not there, or says more than it should: one sentence without what is secret."
    if fault: monkeypatch.setattr(optuna.storages, "RDBStorage", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError(fault)))
    with pytest.raises(DataProblem, match="database of the sweep cannot be used") as e: sweeps.sweep(here / "run.toml", "training.experiment_name=secret", storage=SECRET)
    told = "".join(traceback.format_exception(e.value, chain=True))
    assert "hunter" not in str(e.value) and "me:***@127.0.0.1" in str(e.value) and "hunter" not in told.replace(fault or "-", "")
    assert fault is not None or importlib.util.find_spec("psycopg") or "pip install psycopg" in str(e.value)


def test_a_database_elsewhere(here, monkeypatch):
    "Its address is handed on, to workers too, and no file keeps it; a folder elsewhere does not take its trials."
    asked, store = [], f"sqlite:///{here}/elsewhere.db"

    class Opened(optuna.storages.RDBStorage):
        def __init__(self, url, engine_kwargs):
            asked.append((url, engine_kwargs))
            super().__init__(store if url == SECRET else url)
    monkeypatch.setattr(optuna.storages, "RDBStorage", Opened)
    words = ["training.experiment_name=server", "training.max_epochs=1"]
    study = sweeps.sweep(here / "run.toml", *words, trials=1, storage=SECRET)
    assert len(study.trials) == 1 and {o[0] for o in asked} == {SECRET} and asked[0][1] == {"pool_pre_ping": True}
    monkeypatch.setattr(sweeps, "start_workers", lambda *args: asked.append(args))
    sweeps.sweep(here / "run.toml", *words, trials=2, workers=2, storage=SECRET)
    assert asked[-1][0] == 2 and asked[-1][-1] == SECRET
    folder = here / "experiments" / "server"
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 10 and not any(b"hunter" in f.read_bytes() for f in (*files, here / "elsewhere.db")) and not (folder / "sweep.db").exists()
    assert len(sweeps.sweep_rows(sweeps.open_study(folder, storage=store))) == 1                                   # SQLite's own address
    with pytest.raises(DataProblem, match="whose folder is another one"): sweeps.sweep(here / "run.toml", *words, f"training.experiments_path={here}/other", storage=store)
