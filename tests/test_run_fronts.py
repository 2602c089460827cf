"""Fronts of a run: tracking as its file says, what may change on resume, values by name, Comet's options, a run file as widgets."""
import zipfile

import pytest
import torch

from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.fronts import dwiml_train_l2t
from dwiml_nb.cli.runs import dwiml_train
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
from dwiml_nb.core.config import read_toml
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.tractograms import load_tractogram
from dwiml_nb.runs.run_files import run_config, track_run, train
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.loggers import archived
from dwiml_nb.training.sinks import read_logs, read_rows
from dwiml_nb.widgets.run_panel import RunPanel
from dwiml_nb.widgets.viz import viz

RUN = """seed = 3
[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[sampler]
batch_size_training = 40
[model]
rnn_layer_sizes = [6]
step_size = 2.0
[training]
experiment_name = "first"
max_epochs = 1
max_batches_per_epoch_training = 2
max_batches_per_epoch_validation = 1
device = "cpu"
monitor = "train_loss"
[tracking]
seeding_mask_group = "seed_mask"
tracking_mask_group = "wm_mask"
nt = 12
theta_deg = 40
save_seeds = true
device = "cpu"
min_length_mm = 0
"""


def track(here, *words): run_command(dwiml_track_from_model, [str(o) for o in words])


def same(a, b):
    a, b = (load_tractogram(p) for p in (a, b))
    assert torch.equal(a.lines.data, b.lines.data) and torch.equal(a.lines.offsets, b.lines.offsets) and a.dps.keys() == b.dps.keys()
    return a


def test_the_command_tracks_as_the_file_says(here, tmp_path):
    run = here / "experiments" / "first"
    track(here, run, "sub-04", tmp_path / "command.trx")
    track_run(run, "sub-04", tmp_path / "call.trx")
    track_from_model(run, "sub-04", tmp_path / "plain.trx", "seed_mask", tracking_mask_group="wm_mask", nt=12, theta_deg=40, save_seeds=True, device="cpu", min_length_mm=0)
    one = same(tmp_path / "command.trx", tmp_path / "call.trx")
    same(tmp_path / "command.trx", tmp_path / "plain.trx")
    files = [zipfile.ZipFile(tmp_path / f"{name}.trx") for name in ("command", "call")]  # they also keep the time, which may differ
    command, call = ({name: file.read(name) for name in file.namelist()} for file in files)
    assert command == call
    assert len(one) and "seeds" in one.dps


def test_what_is_typed_counts_more(here, tmp_path):
    run = here / "experiments" / "first"
    track(here, run, "sub-04", tmp_path / "typed.trx", "seed_mask", "--npv", 1, "--theta", 80, "--no-save_seeds", "--rng_seed", 9)
    track_from_model(run, "sub-04", tmp_path / "plain.trx", "seed_mask", tracking_mask_group="wm_mask", npv=1, theta_deg=80, device="cpu", min_length_mm=0, seed=9)
    assert not same(tmp_path / "typed.trx", tmp_path / "plain.trx").dps
    (here / "other.toml").write_text("[tracking]\nseeding_mask_group = 'seed_mask'\nnpv = 1\ntheta_deg = 80\ntracking_mask_group = 'wm_mask'\nmin_length_mm = 0\ndevice = 'cpu'\nseed = 9\n")
    track(here, run, "sub-04", tmp_path / "other.trx", "--run_file", here / "other.toml")
    same(tmp_path / "other.trx", tmp_path / "plain.trx")


@pytest.mark.parametrize("table, says", [("tracking = 3", "tracking is a table"), ("[tracking]\ntheta_dge = 3", "Did you mean 'theta_deg'"), ("[tracking]\nnt = 'many'", "a whole number"), ("[tracking]\ntrust = 'os'", "unknown key"),
                                         ("[tracking]\nseeding_mask_group = 'seed_mask'\nstop_rules = ['os.system']", "os.system"), ("[tracking]\nnpv = 1", "seeding_mask_group is missing"), ("[tracking]\nhdf5_file = '/x'", "unknown key"), ("x = [", "no TOML")])
def test_a_file_that_cannot_track_is_one_sentence(here, tmp_path, table, says):
    (tmp_path / "run.toml").write_text(table)
    with pytest.raises(SystemExit) as e: track(here, here / "experiments" / "first", "sub-04", tmp_path / "a.trx", "--run_file", tmp_path / "run.toml")
    assert says in str(e.value.code) and "fault of dwiml_nb" not in str(e.value.code) and not (tmp_path / "a.trx").exists(), e.value.code


def test_the_value_that_judges_has_its_name(here, tmp_path, capsys):
    run_command(dwiml_train, [str(here / "run.toml"), f"training.experiments_path={tmp_path}"])
    said = capsys.readouterr().out
    assert "best epoch 1 with train_loss " in said and " with loss" not in said


def test_what_may_change_on_resume(here, tmp_path, capsys):
    "The rest of the run is as without a stop, whatever was given."
    train(here / "run.toml", f"training.experiments_path={tmp_path}", "training.experiment_name=through", "training.max_epochs=3")
    train(here / "run.toml", f"training.experiments_path={tmp_path}", "training.experiment_name=on")
    run_command(dwiml_resume_training_from_checkpoint, [str(tmp_path), "on", "--new_max_epochs", "3", "--max_hours", "2", "--keep_last", "2", "--sinks", "csv", "{key = 'tensorboard', wait = 100}", "--device", "cpu"])
    kept = read_checkpoint(tmp_path / "on").params["trainer"]["params"]
    assert kept["max_hours"] == 2 and kept["keep_last"] == 2 and kept["sinks"] == ["csv", {"key": "tensorboard", "wait": 100}]
    assert len(list((tmp_path / "on" / "checkpoints").iterdir())) == 2 and (tmp_path / "on" / "csv" / "epochs.csv").is_file()
    a, b = (torch.load(tmp_path / name / "checkpoint" / "model" / "model_state.pkl", weights_only=True) for name in ("through", "on"))
    assert all(torch.equal(a[k], b[k]) for k in a) and read_logs(tmp_path / "through")["valid_loss"] == read_logs(tmp_path / "on")["valid_loss"]
    for words, says in ((["--sinks", "nobody"], "nobody"), (["--sinks", "{kye = 1}"], "key"), (["--max_hours", "0"], "above 0")):
        with pytest.raises(SystemExit) as e: run_command(dwiml_resume_training_from_checkpoint, [str(tmp_path), "on", "--new_max_epochs", "4", *words])
        assert says in f"{e.value.code}{capsys.readouterr().err}" and "fault of" not in str(e.value.code)


def test_a_run_file_is_looked_at_as_widgets(here, tmp_path):
    "Its groups are chosen, its options are the trainer's; what is no run file is one sentence."
    with pytest.raises(DataProblem, match="the experiment exists already.*go on with"): viz(here / "run.toml")
    (here / "new.toml").write_text(RUN.replace('"first"', '"new"'))
    panel = viz(here / "new.toml")
    try: assert isinstance(panel, RunPanel) and panel.browser.choice["input_group_name"] == "input" and panel.dashboard.trainer.max_epochs == 1 and list(panel.tabs.titles) == ["Study", "Batches", "Training"]
    finally: panel.close()
    for text, says in (("[tool]\nx = 1", "unknown key tool"), ("[data]\nhdf5_file = 'none.hdf5'\n", "missing"), (RUN.replace("study.hdf5", "none.hdf5"), "none.hdf5"), ("x", "no TOML")):
        (tmp_path / "other.toml").write_text(text)
        with pytest.raises(DataProblem, match=says): viz(tmp_path / "other.toml")


def test_comet_options_of_the_fronts_write_an_archive(here, tmp_path):
    words = f"{tmp_path} c {here}/study.hdf5 input bundles --step_size 2 --rnn_layer_sizes 4 --max_epochs 1 --max_batches_per_epoch_training 2 --max_batches_per_epoch_validation 1 --comet_workspace lab --comet_project lines"
    run_command(dwiml_train_l2t, words.split())
    folder = tmp_path / "c"
    archive, = (folder / "comet").glob("*.zip")
    import zipfile
    about = zipfile.ZipFile(archive).read("experiment.json").decode()
    assert '"lab"' in about and '"lines"' in about
    metrics = {(o["payload"]["metric"]["metricName"], o["payload"]["metric"]["step"]): o["payload"]["metric"]["metricValue"] for o in archived(folder) if o["type"] == "metric_msg"}
    rows = read_rows(folder / "logs" / "batches.jsonl")
    assert [metrics["training/loss", i] for i in range(2)] == [r["loss"] for r in rows if r["phase"] == "training"]
    assert read_toml(folder / "run.toml")["logging"]["sinks"] == [{"key": "comet", "workspace": "lab", "project": "lines"}]


def test_values_as_people_type_them(here, tmp_path, capsys):
    "A number is a name; a time that is over before the first batch; the word 'max'; one pattern that is none."
    run_command(dwiml_train, [str(here / "run.toml"), f"training.experiments_path={tmp_path}", "training.experiment_name=7", "training.max_hours=1e-9"])
    assert (tmp_path / "7" / "run.toml").is_file() and "stopped; " in capsys.readouterr().out
    gv = ["training.name=DWIMLTrainerOneInputWithGVPhase", "training.experiment_name=1e3"]
    assert run_config(here / "run.toml", *gv, "training.tracking_phase_eos_threshold=max")["training"]["tracking_phase_eos_threshold"] == "max"
    assert run_config(here / "run.toml", *gv)["training"]["experiment_name"] == "1e3"
    with pytest.raises(SystemExit, match="a pattern, or a list of them, found 3"): run_command(dwiml_train, [str(here / "run.toml"), "training.experiment_name=new", "training.frozen=3"])
