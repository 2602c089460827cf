"""Sweeps: workers that are killed at every stage of a trial lose none and double none."""
import json
import multiprocessing
import signal
import sqlite3
from pathlib import Path

import optuna
import pytest
import torch

import dwiml_nb.runs.sweeps as sweeps
import sweep_script
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.sinks import read_rows

CTX = multiprocessing.get_context("forkserver")
CTX.set_forkserver_preload(["torch._dynamo", "sweep_script", "optuna", "sqlalchemy.dialects.sqlite"])
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


def start(here, name, kill=None):
    process = CTX.Process(target=sweep_script.work, args=(str(here / "run.toml"), here / "experiments" / name, (f"training.experiment_name={name}",), kill))
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
    with pytest.raises(DataProblem, match="has another sampler"): sweeps.sweep(here / "run.toml", *own)


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


def test_said_before_anything_is_made(here):
    "What is wrong with the table is one sentence, and no folder is there."
    for words, said in {("sweep.space.model.dropot=[0.1, 0.2]",): "unknown key model.dropot", ("sweep.pruner=medan",): "mean 'median'", ("sweep.trials=0",): "sweep.trials",
                        ("sweep.value=3",): "sweep.value", ("sweep.sampler=grid",): "a grid needs a step", ("sweep.space.model.dropout={low=0, high=1, if=2}",): "cannot depend"}.items():
        with pytest.raises(ValueError, match=said): sweeps.sweep(here / "run.toml", "training.experiment_name=wrong", *words)
    assert not (here / "experiments" / "wrong").exists()


def test_a_finished_run_is_not_taken_for_a_trial_with_other_values(here):
    "The database is gone and the draw is another: the old value is not given to the new values."
    words, folder = ["training.experiment_name=gone", "training.max_epochs=1"], here / "experiments" / "gone"
    sweeps.sweep(here / "run.toml", *words, trials=1)
    (folder / "sweep.db").unlink()
    (here / "seed.toml").write_text(RUN.replace("trials = 5", "trials = 5\nseed = 8"))
    sweeps.sweep(here / "seed.toml", *words, trials=1)
    row, = sweeps.sweep_rows(sweeps.open_study(folder))
    assert row["state"] == "fail" and "trained with another" in str(row)


@pytest.mark.parametrize("damage", ["update trial_params set distribution_json='x'", "update trials set state='NOPE'", "garbage", "update study_user_attributes set value_json='\"x\"'"])
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
