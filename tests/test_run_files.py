"""One run, begun in every way: the same weights, logs and record. And what a run file of a stranger cannot do."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.fronts import dwiml_train_autoencoder, dwiml_train_l2t, dwiml_train_transformer
from dwiml_nb.cli.runs import dwiml_train
from dwiml_nb.core import registry
from dwiml_nb.core.config import read_toml
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import seed_all
from dwiml_nb.core.registry import trusting
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, train, write_run_file
from dwiml_nb.runs.table import runs_table
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.training.sinks import read_rows
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.widgets.training_dashboard import TrainingDashboard
from dwiml_nb.widgets.viz import viz

ROOT = Path(__file__).resolve().parent.parent

RUN = """seed = 11
[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[sampler]
batch_size_training = 40
[loader]
reverse_ratio = 0.5
noise_mm_forward = 0.1
[model]
name = "Learn2TrackModel"
rnn_layer_sizes = [6]
dropout = 0.2
step_size = 2.0
[optimizer]
name = "RAdam"
betas = [0.8, 0.9]
weight_decay = 0.001
[scheduler]
name = "cosine-warmup"
[training]
experiment_name = "file"
learning_rates = [0.01]
max_epochs = 2
max_batches_per_epoch_training = 3
max_batches_per_epoch_validation = 1
clip_grad = 1.0
device = "cpu"
"""


@pytest.fixture(autouse=True)
def trust_of_one_test(monkeypatch):
    "What a test trusts is not brought in again by the next one."
    monkeypatch.setattr(registry, "brought_in", dict(registry.brought_in))


def hand_made(here, name, **changes):
    dataset = MultiSubjectDataset(here / "study.hdf5").load_data()
    seed_all(11)
    model = Learn2TrackModel(nb_features=dataset.nb_features["input"], rnn_layer_sizes=[6], dropout=.2, step_size=2.)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40, seed=11)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", reverse_ratio=.5, noise_mm_forward=.1, seed=11)
    options = dict(learning_rates=[.01], lr_schedule="cosine-warmup", optimizer="RAdam", optimizer_args=dict(betas=[.8, .9]), weight_decay=.001, clip_grad=1.,
                   max_epochs=2, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, device="cpu", seed=11)
    return DWIMLTrainerOneInput(model, here / "experiments", name, sampler, loader, **{**options, **changes})


def in_shell(here, name):
    "Another process, in another folder."
    command = [sys.executable, "-c", "from dwiml_nb.cli.runs import dwiml_train; from dwiml_nb.cli.common import run_command; run_command(dwiml_train)"]
    done = subprocess.run([*command, here / "run.toml", f"training.experiment_name={name}"], cwd="/", capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})  # as here: the last bits depend on it
    assert done.returncode == 0 and f"experiments/{name}" in done.stdout, done.stderr


def on_dashboard(here, name):
    dashboard = TrainingDashboard(run_parts(run_config(here / "run.toml", f"training.experiment_name={name}")).trainer)
    dashboard.start()
    assert dashboard.wait(60) == "ended"


def stopped_and_resumed(here, name):
    trainer = run_parts(run_config(here / "run.toml", f"training.experiment_name={name}")).trainer
    trainer.control.on_batch_end.append(lambda row: trainer.control.request_stop())
    trainer.train_and_validate()
    assert trainer.epoch == 0
    trainer_from_folder(here / "experiments", name).train_and_validate()


def as_in_dwi_ml(here, name):
    words = f"""{here}/experiments {name} {here}/study.hdf5 input bundles --batch_size_training 40 --reverse_ratio .5 --noise_gaussian_size_forward .1 --rnn_layer_sizes 6
        --dropout .2 --step_size 2 --optimizer RAdam --weight_decay .001 --learning_rate 0.01 --max_epochs 2 --max_batches_per_epoch_training 3
        --max_batches_per_epoch_validation 1 --clip_grad 1 --rng 11"""
    run_command(dwiml_train_l2t, words.split())


def test_the_front_of_dwi_ml_trains_the_same_weights(here):
    "Its words, and a file that says the same: dwi_ml has no schedule and no arguments of optimisers."
    as_in_dwi_ml(here, "front")
    train(here / "run.toml", "training.experiment_name=plain", "scheduler.name=none", "optimizer.betas=[0.9, 0.999]")
    a, b = (load_model(here / "experiments" / name / "best_model").state_dict() for name in ("front", "plain"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (read_toml(here / "experiments" / "front" / "run.toml")["model"]["dropout"]) == .2


@pytest.mark.parametrize("command, more", [(dwiml_train_transformer, ["input", "bundles", "--model", "TTST", "--nheads", "2", "--input_embedded_size", "4", "--target_embedded_size", "4", "--n_layers_e", "1",
                                                                      "--step_size", "2", "--max_len", "200", "--add_eos"]),
                                           (dwiml_train_autoencoder, ["bundles"]),
                                           (dwiml_train_l2t, ["input", "bundles", "--step_size", "2", "--add_a_tracking_validation_phase", "--tracking_mask", "wm_mask", "--rnn_layer_sizes", "4"])])
def test_other_fronts_train(here, command, more):
    name = f"{command.__name__}{len(more)}"
    run_command(command, [str(o) for o in (here / "experiments", name, here / "study.hdf5", *more, "--max_epochs", 1, "--max_batches_per_epoch_training", 1, "--max_batches_per_epoch_validation", 1,
                                           "--batch_size_training", 10, "--batch_size_validation", 10)])
    row, = read_rows(here / "experiments" / name / "logs" / "epochs.jsonl")
    assert row["train_loss"] > 0 and ("--tracking_mask" not in more or any(k.startswith("generation") for k in row))


WAYS = {"command": lambda here, name: run_command(dwiml_train, [str(here / "run.toml"), f"training.experiment_name={name}"]), "shell": in_shell,
        "cell": lambda here, name: train(here / "run.toml", training=dict(experiment_name=name)), "dashboard": on_dashboard,
        "tables": lambda here, name: train(read_toml(here / "run.toml"), f"data.hdf5_file={here / 'study.hdf5'}", f"training.experiments_path={here / 'experiments'}",
                                           f"training.experiment_name={name}"),
        "by hand": lambda here, name: hand_made(here, name).train_and_validate(), "resumed": stopped_and_resumed,
        "resolved file": lambda here, name: train(here / "experiments" / "file", f"training.experiment_name={name}"),
        "file of objects": lambda here, name: train(write_run_file(hand_made(here, name), here / "made.toml", overwrite=True), "training.device=cpu")}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_the_same_weights(here, way):
    WAYS[way](here, way)
    one, other = (here / "experiments" / name for name in ("file", way))
    for folder in ("best_model", "checkpoint/model"):
        a, b = (load_model(e / folder).state_dict() for e in (one, other))
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
        assert (one / folder / "parameters.json").read_bytes() == (other / folder / "parameters.json").read_bytes()
    losses = [[row["loss"] for row in read_rows(e / "logs" / "batches.jsonl")] for e in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    records = [json.loads((e / "checkpoint" / "params.json").read_text()) for e in (one, other)]
    assert records[0] == records[1]


def test_the_run_tracks(here, tmp_path):
    assert len(track_from_model(here / "experiments" / "file", "sub-04", tmp_path / "a.trk", "seed_mask", nt=5, device="cpu", min_length_mm=0).lines) == 5


def test_the_file_is_there_before_the_first_batch(here, monkeypatch):
    trainer = run_parts(run_config(here / "run.toml", "training.experiment_name=early")).trainer
    def no_batch(*args): raise RuntimeError("the first batch")
    monkeypatch.setattr(trainer, "run_one_batch", no_batch)
    with pytest.raises(RuntimeError, match="first batch"): trainer.train_and_validate()
    made = read_toml(trainer.experiment_folder / "run.toml")
    assert made["seed"] == 11 and made["made_with"]["versions"]["torch"] and made["made_with"]["fingerprint"]["bundles"]
    assert len(made["made_with"]["commit"]["dwiml_nb"]) == 40


def test_none_survives(here, tmp_path):
    "A None where the default is something else is written as a word, and read again."
    for source in (write_run_file(hand_made(here, "none", max_batches_per_epoch_training=None), tmp_path / "a.toml"),
                   write_run_file(hand_made(here, "none", max_batches_per_epoch_training=None), tmp_path / "b.toml", all_values=True)):
        assert run_config(source)["training"]["max_batches_per_epoch_training"] is None


def test_what_a_file_cannot_say_is_told(here, tmp_path):
    with pytest.raises(DataProblem, match="lr_schedule"): write_run_file(hand_made(here, "f", lr_schedule=lambda i: 1.), tmp_path / "a.toml")
    assert not (tmp_path / "a.toml").exists()


LOOP = """
[scheduler]
name = "torch.optim.lr_scheduler.StepLR"
step_size = 1
gamma = 0.5
[training]
accumulate = 2
ema_decay = 0.9
monitor = "train_loss"
frozen = ["*bias*"]
on_nan = {key = "skip", in_a_row = 3}
keep_last = 2
[training.param_groups]
"rnn_model.*" = {lr = 0.002}
"""


def test_options_of_the_loop_stand_in_a_file(here, tmp_path):
    "As they are called in the trainer; a file written from the objects trains the same weights."
    (here / "loop.toml").write_text(RUN.replace('[scheduler]\nname = "cosine-warmup"\n', "").replace("[training]\n", LOOP.split("[training.param")[0].strip() + "\n")
                                    + "[training.param" + LOOP.split("[training.param")[1])
    trainers = [train(here / "loop.toml", "training.experiment_name=loop")]
    trainers.append(train(write_run_file(trainers[0], tmp_path / "again.toml"), "training.experiment_name=again", "training.device=cpu"))
    assert trainers[0].loop.accumulate == 2 and trainers[0].optimizer.param_groups[1]["lr"] < .002
    a, b = (t.model.state_dict() for t in trainers)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(DataProblem, match="Did you mean 'accumulate'"): run_config(here / "loop.toml", "training.acumulate=2")
    with pytest.raises(DataProblem, match="scheduler|lr_schedule"): run_parts(run_config(here / "loop.toml", "training.experiment_name=x", "scheduler.step_sise=2"))


# ---- the script to copy

def test_the_example_trains_resumes_and_becomes_a_file(here, tmp_path):
    "Its own process, its own module; then the file that it wrote, with the script trusted."
    script = ROOT / "examples" / "train_model.py"
    words = [str(o) for o in (here / "study.hdf5", tmp_path, "first", "--max_epochs", 1, "--write", tmp_path / "run.toml")]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run_command(dwiml_train, [str(tmp_path / "run.toml"), "training.experiment_name=second", "--trust", str(script)])
    with trusting(script):
        a, b = (load_model(tmp_path / name / "best_model").state_dict() for name in ("first", "second"))
        assert all(torch.equal(a[k], b[k]) for k in a)
        example = sys.modules["train_model"]
        assert example.main([*words[:3], "--max_epochs", "2", "--resume"]).epoch == 2


# ---- the table of runs

KILLED = """import os, signal, sys
from dwiml_nb.runs.run_files import run_config, run_parts
for name, number in (("term", signal.SIGTERM), ("kill", signal.SIGKILL)):
    if os.fork(): os.wait(); continue
    trainer = run_parts(run_config(sys.argv[1], f"training.experiment_name={name}", f"training.experiments_path={sys.argv[2]}")).trainer
    trainer.control.on_batch_end.append(lambda row: row["batch"] == 1 and os.kill(os.getpid(), number))
    trainer.train_and_validate()
"""


def test_the_table_says_what_became_of_runs(here, tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, here / "run.toml", tmp_path], check=True)
    train(here / "run.toml", f"training.experiments_path={tmp_path}", "training.experiment_name=whole", "model.dropout=0.1")
    states = []
    trainer = run_parts(run_config(here / "run.toml", f"training.experiments_path={tmp_path}", "training.experiment_name=now")).trainer
    trainer.control.on_epoch_end.append(lambda row: states.append(runs_table(tmp_path)[1]["state"]))
    trainer.train_and_validate()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "parameters_latest.json").write_text("[")
    table = runs_table(tmp_path, by="state")
    assert {r["name"]: r["state"] for r in table} == {"broken": "unreadable", "kill": "died", "now": "ended", "term": "stopped", "whole": "ended"} and states == ["running", "ended"]
    killed = next(r for r in table if r["name"] == "kill")
    assert "epoch 1, training batch 2" in killed["why"] and killed["when"].startswith("20") and table.differ["model.dropout"]["whole"] == .1
    trainer_from_folder(tmp_path, "kill").train_and_validate()
    assert next(r for r in viz(tmp_path).table if r["name"] == "kill")["state"] == "ended"


# ---- a file of a stranger

MINE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nfrom dwiml_nb.models.learn2track import Learn2TrackModel\nclass Mine(Learn2TrackModel): pass\n"


def test_nothing_of_a_file_is_imported_unless_trusted(here, tmp_path, monkeypatch):
    (tmp_path / "mine_of_run.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["model.name=mine_of_run.Mine", "training.experiment_name=mine"]
    with pytest.raises(DataProblem, match="--trust mine_of_run"): run_parts(run_config(here / "run.toml", *words))
    assert not (tmp_path / "ran").exists() and "mine_of_run" not in sys.modules
    for table, name in (("model", "os.system"), ("sampler", "subprocess.Popen"), ("loader", "torch.utils.data.DataLoader"), ("training", "antigravity.Trainer"), ("model", "dwiml_nb.runs.run_files.train")):
        with pytest.raises(DataProblem): run_config(here / "run.toml", f"{table}.name={name}")
    assert "antigravity" not in sys.modules
    trainer = train(here / "run.toml", *words, "training.max_epochs=1", trust=tmp_path / "mine_of_run.py")
    assert read_toml(trainer.experiment_folder / "run.toml")["made_with"]["trust"][-1] == str(tmp_path / "mine_of_run.py")


def test_a_file_does_not_say_where_rows_are_sent(here, monkeypatch):
    "A server gets what is trained: whoever trains names it."
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "sends.toml").write_text(RUN + '[logging]\nsinks = [{key = "mlflow", uri = "http://stranger.example"}]\n')
    with pytest.raises(DataProblem, match="sends its rows.*stranger"): run_config(here / "sends.toml")
    sinks = 'logging.sinks=[{key = "mlflow", uri = "http://mine.example"}, "csv"]'
    assert run_config(here / "run.toml", sinks).to_dict()["logging"]["sinks"][0]["uri"] == "http://mine.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://stranger.example")
    run_config(here / "sends.toml")
    trainer = train(here / "run.toml", "training.experiment_name=csv", "logging.sinks=['csv']")
    assert len((trainer.experiment_folder / "csv" / "epochs.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("values, says", [
    (["model.rnn_layer_sizes=[3000000, 3000000]"], "no memory"), (["training.max_epochs=1e400"], "finite"), (["training.learning_rates=0.1*9999999999"], "at most"),
    (["sampler.batch_size_training=-1"], "sampler"), (["data.allow_links=true"], "unknown key"), (["loader.reverse_ratio=2"], "loader"), (["model.nb_features=0"], "model"),
    (["criterion.name=torch.nn.MSELoss"], "criterion"), (["training.experiment_name=../out"], "experiment"), (["logging.sinks=['nobody']"], "nobody"),
    (["optimizer.name=os.system"], "optimizer"), (["scheduler.name=os.system"], "os.system"), (["training.nb_cpu_processes=100000"], "1024"), (["seed=-1"], "seed"),
    (["optimizer.lr=0.1"], "both given"), (["model.dg_args.add_eso=true"], "add_eos"), (["data.input_group_name=inptu"], "input"), (["loader.beyond_mm=5"], "beyond_mm"),
    (["model=Learn2TrackModel"], "model is a table"), (["data.hdf5_file=5"], "data.hdf5_file"), (['data.hdf5_file="a\\u0000"'], "zero byte"),
    (["data.input_group_name=5"], "a name, or names"), (["optimizer.betas=[0.9]"], "optimizer_args"), (['training.experiments_path="a\\u0000"'], "zero byte"),
    (["training.checkpoint=x"], "unknown key"), (["training.max_epochs=0x" + "f"*4500], "below 2**64"), (["trust.a=1"], "--trust"),
    (["model.dg_args.add_eos=yes"], "true or false"), (["model.dg_args.eos_weight=much"], "a number"), (["extra=5"], "extra is a table"), (["made_with=me"], "made_with is a table")])
def test_a_value_that_makes_no_run_is_one_sentence(here, values, says, capsys):
    with pytest.raises(SystemExit) as e: run_command(dwiml_train, [str(here / "run.toml"), "training.experiment_name=bad", *values])
    assert isinstance(e.value.code, str) and says in e.value.code and "fault of dwiml_nb" not in e.value.code, e.value.code
    assert not (here / "experiments" / "bad").exists()


def test_a_damaged_file_is_one_sentence(here, tmp_path):
    for text in ("seed = ", "[data\n", "a.b = 1\na.b.c = 2", "x = " + "[" * 5000, "\x00"):
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(DataProblem, match="run.toml"): run_config(tmp_path / "run.toml")
    with pytest.raises(DataProblem): run_config(tmp_path / "none.toml")


@pytest.mark.parametrize("row", [dict(best_loss="<b>"), dict(best_loss=[1]), dict(best_epoch=None), dict(seconds=float("inf")), dict(epoch="x")])
def test_a_row_of_a_stranger_does_not_keep_the_table_from_being_shown(here, tmp_path, row):
    "It is said to be unreadable, or shown without what it lacks; the others are there, in every order."
    for name in ("good", "odd"): shutil.copytree(here / "experiments" / "file", tmp_path / name)
    log = tmp_path / "odd" / "logs" / "epochs.jsonl"
    log.write_text(json.dumps({**read_rows(log)[-1], **row}) + "\n")
    for by in ("name", "best", "seconds", "epochs"):
        table = runs_table(tmp_path, by=by)
        assert {r["name"]: r["state"] for r in table} == {"good": "ended", "odd": "ended" if row == dict(best_epoch=None) else "unreadable"}
        assert "<b>" not in table._repr_html_() and "good" in repr(table)
