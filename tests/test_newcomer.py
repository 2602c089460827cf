"""What stopped a newcomer with a model of his own, from a cell to a package to a sweep: each now goes on, or says how."""
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bands import Bands

import dwiml_nb.runs.sweeps as sweeps

from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.runs import dwiml_config, dwiml_runs, dwiml_train
from dwiml_nb.cli.sweeps import dwiml_sweep
from dwiml_nb.cli.training import dwiml_visualize_logs
from dwiml_nb.core import registry
from dwiml_nb.core.config import read_toml
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.files import is_alive
from dwiml_nb.core.registry import class_named
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.items import ITEM_DATASETS, RegisteredBatchLoader
from dwiml_nb.models.registered import dwiml_model, registered_class, registered_model
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, train, write_run_file
from dwiml_nb.runs.table import state_of
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.registered import RegisteredTrainer
from dwiml_nb.training.sinks import read_rows

RUN = """seed = 3
data = {hdf5_file = "study.hdf5", input_group_name = "input", streamline_group_name = "bundles"}
model = {name = "Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0}
training = {experiment_name = "one", max_epochs = 1, max_batches_per_epoch_training = 1, max_batches_per_epoch_validation = 1, device = "cpu"}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    toy_study(folder)
    (folder / "run.toml").write_text(RUN)
    run_command(dwiml_train, [str(folder / "run.toml")])
    return folder


OWN = RUN.replace('{name = "Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0}', '{name = "Ones"}')
MODEL = (Path(__file__).parent / "bands.py").read_text()
DEFAULTS = """[model.Ones]
classes = 4  # How many bands
[model.Twos]
classes = 2
sharp = true
[optimizer]
lr = 0.05
"""


@pytest.fixture
def package(here, tmp_path, monkeypatch):
    "A package with two registered models and one default_config.toml."
    monkeypatch.setattr(registry, "brought_in", dict(registry.brought_in))
    monkeypatch.syspath_prepend(here)
    folder = here / "pair"
    folder.mkdir(exist_ok=True)
    twos = MODEL.replace("Bands", "Twos").replace("import hyrax_model", "import hyrax_model as hyrax_model_").replace("@hyrax_model", "@hyrax_model_")
    (folder / "__init__.py").write_text(MODEL.replace("Bands", "Ones").replace("(torch.nn.Module):", "(torch.nn.Module):\n    step_size = 3.0", 1) + "\n" + twos.split('"""', 2)[2])
    (folder / "default_config.toml").write_text(DEFAULTS)
    (here / "own.toml").write_text(OWN)
    return folder


def said(capsys, command, *words):
    "What a command prints, or the sentence it ends with."
    capsys.readouterr()
    try: run_command(command, [str(w) for w in words])
    except SystemExit as e:
        if isinstance(e.code, str): return e.code
    told = capsys.readouterr()
    return told.out + told.err


# Words and options

def test_options_may_stand_before_values(here, tmp_path, capsys):
    name, mine = "training.experiment_name=between", tmp_path / "between.py"
    mine.write_text("")
    assert "ended" in said(capsys, dwiml_train, here / "run.toml", "--trust", mine, name, "training.max_epochs=1")
    assert "max_epochs = 7" in said(capsys, dwiml_config, "new", "--out", tmp_path / "new.toml", "training.max_epochs=7") + (tmp_path / "new.toml").read_text()
    assert "unrecognized arguments: --lr" in said(capsys, dwiml_train, here / "run.toml", "--lr", "training.max_epochs=1")
    assert "experiments/one" in said(capsys, dwiml_visualize_logs, here / "experiments/one", "--save_figures", tmp_path / "f", here / "experiments/between") or (tmp_path / "f_1.png").exists()


# What is said

def test_a_shell_is_told_the_command_that_goes_on(here, capsys):
    assert f"dwiml_resume_training_from_checkpoint {here / 'experiments'} one;" in said(capsys, dwiml_train, here / "run.toml")


def test_a_file_is_checked_after_its_run(here, capsys):
    told = said(capsys, dwiml_config, "check", here / "run.toml")
    assert "makes a run" in told and f"the experiment {here / 'experiments/one'} exists already" in told
    assert "exists" not in said(capsys, dwiml_config, "check", here / "run.toml", "training.experiment_name=no")
    assert "name of an experiment" in said(capsys, dwiml_config, "check", here / "run.toml", "training.experiment_name=.no")


@pytest.mark.parametrize("look", [lambda: class_named("Nobody", MainModelAbstract), lambda: class_named("__main__.Nobody", MainModelAbstract, "run the cell."),
                                  lambda: class_named("nobody.Nobody", MainModelAbstract), lambda: registered_class("__main__.Nobody"), lambda: registered_class("nobody.Nobody")])
def test_what_to_do_about_a_class_is_whole_sentences(look):
    with pytest.raises(DataProblem) as e: look()
    assert not e.value.do.startswith("Or") and "--trust" in e.value.do and "trust=" in e.value.do and e.value.do.endswith(".") and "  " not in e.value.do


# A model of one's own

@pytest.mark.filterwarnings("ignore")
def test_two_models_of_a_package_have_one_file(here, package):
    for name in ("Ones", "Twos"):
        assert train(here / "own.toml", f"model.name={name}", f"training.experiment_name={name}", trust="pair").model.net.layer.out_features == {"Ones": 4, "Twos": 2}[name]
    (package / "default_config.toml").write_text(DEFAULTS.replace("lr =", "ler ="))
    with pytest.raises(DataProblem, match="pair/default_config.toml: unknown key optimizer.ler"): run_config(here / "own.toml", trust="pair")
    (package / "default_config.toml").write_text(DEFAULTS.replace("[model.Twos]", "[model.Thres]"))
    with pytest.raises(DataProblem, match="pair/default_config.toml: unknown key model.Thres"): run_config(here / "own.toml", trust="pair")


def test_values_of_the_wrong_kind_for_ones_own_model(here, package, capsys):
    for value in ("abc", "[3]", "true"):
        assert "model.Ones.classes cannot be" in said(capsys, dwiml_config, "check", here / "own.toml", "--trust", "pair", f"model.Ones.classes={value}")
    assert "true or false" in said(capsys, dwiml_config, "check", here / "own.toml", "--trust", "pair", "model.name=Twos", "model.Twos.sharp=1")
    assert run_config(here / "own.toml", "model.Ones.classes=none", "model.name=Ones", trust="pair")["model"]["Ones"]["classes"] == "none"
    told = said(capsys, dwiml_config, "check", here / "own.toml", "--trust", "pair", "model.Ones.classes=2.5")
    assert "Ones.__init__ fails, TypeError: " in told and "[model.Ones]" in told


@pytest.mark.filterwarnings("ignore")
def test_a_file_says_what_a_class_and_its_package_say(here, package, capsys):
    shown = said(capsys, dwiml_config, "show", here / "own.toml", "--trust", "pair", "optimizer.lr=0.1")
    assert re.search(r"classes = 4 # How many bands \[package pair\]", shown) and re.search(r"step_size = 3.0 # .*\[class Ones\]", shown)
    trainer = train(here / "own.toml", "training.experiment_name=says", trust="pair")
    kept = (here / "experiments/says/run.toml").read_text()
    assert "step_size = 3.0" in kept and trainer.model.step_size == 3. and "size_average" not in kept
    assert trainer_from_folder(here / "experiments", "says", new_max_epochs=2).model.step_size == 3.
    assert run_config(here / "own.toml", "model.step_size=2", trust="pair").origin("model.step_size") == "command line"
    new = said(capsys, dwiml_config, "new", "model.name=Ones", "--trust", "pair")
    assert "[model.Ones]" in new and "# How many bands" in new
    (package / "default_config.toml").write_text("")
    new = said(capsys, dwiml_config, "new", "model.name=Ones", "--trust", "pair")
    assert "[model.Ones]" in new and "size_average" not in new and "# Ones =" not in new

@pytest.mark.filterwarnings("ignore")
def test_a_wrong_option_or_field_is_answered_with_the_right_one(here):
    dataset = MultiSubjectDataset(here / "study.hdf5").load_data()
    groups = dict(streamline_group_name="bundles", input_group_name="input")
    model = registered_model(Bands, {"model": {"Bands": {"classes": 3}}}, dataset, **groups)
    parts = model, here / "experiments", "never", DWIMLBatchIDSampler(dataset, "bundles"), RegisteredBatchLoader(dataset, model, **groups)
    with pytest.raises(TypeError, match="^RegisteredTrainer takes no 'learning_rate'. Did you mean 'learning_rates'"): RegisteredTrainer(*parts, learning_rate=.1)
    @dwiml_model
    class Singular(Bands):
        @staticmethod
        def to_tensor(data_dict): return np.stack([line.mean(0) for line in data_dict["data"]["bundle"]])
    with pytest.raises(DataProblem, match="Singular.to_tensor fails.*there is no field 'bundle'.*Did you mean 'bundles'"): registered_model(Singular, {"model": {"Bands": {"classes": 3}}}, dataset, **groups)
    assert not (here / "experiments/never").exists()


class Ages:
    def __init__(self, years=30): self.years = years
    def __getitem__(self, object_id): return {"age": np.array([float(self.years)])}


class WithAges(Bands):
    @staticmethod
    def to_tensor(data_dict): return np.concatenate([Bands.to_tensor(data_dict), np.stack(data_dict["people"]["age"])], 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("people, age", [('"ages_of_test"', 30.), ('{key = "ages_of_test", years = 41}', 41.), ('"ages_of_tests"', None)])
def test_a_run_file_has_further_datasets(here, tmp_path, monkeypatch, people, age):
    "A table [loader.datasets]: a registered name, with options; in the run, its record and the file that it writes."
    monkeypatch.setattr(ITEM_DATASETS, "entries", {**ITEM_DATASETS.entries, "ages_of_test": Ages})
    dwiml_model(WithAges)
    file = here / "people.toml"
    file.write_text(OWN.replace('{name = "Ones"}', '{name = "WithAges", Bands = {classes = 3}}') + f"[loader.datasets]\npeople = {people}\n")
    if age is None:
        with pytest.raises(DataProblem, match="Did you mean 'ages_of_test'"): train(file)
        return
    trainer = train(file, f"training.experiment_name=people{age:g}")
    batch = trainer.batch_loader.load_batch_streamlines(next(trainer.batch_sampler.batches()))
    assert trainer.model.net.layer.in_features == 16 and set(batch.given[:, -1].tolist()) == {age}
    made = read_toml(write_run_file(trainer, tmp_path / "made.toml"))["loader"]["datasets"]["people"]
    assert made == read_toml(file)["loader"]["datasets"]["people"]
    again = trainer_from_folder(here / "experiments", f"people{age:g}", new_max_epochs=2)
    assert again.batch_loader.params["datasets"] == {"people": made}


# Sweeps

def test_what_no_trial_can_do_is_said_before_the_first(here, tmp_path, capsys):
    text = RUN + '[sweep]\ntrials = 2\n[sweep.space]\n"optimizer.lr" = [0.1, 0.01]\n'
    (here / "sweep.toml").write_text(text)
    told = said(capsys, dwiml_sweep, here / "sweep.toml", "training.experiment_name=both", "training.learning_rates=[0.1]")
    assert "optimizer.lr and training.learning_rates are both given" in told and not (here / "experiments/both").exists()


def test_a_sweep_without_a_finished_trial_fails(here, capsys):
    text = RUN.replace("step_size = 2.0", "step_size = 2.0, dropout = 3.0")
    (here / "never.toml").write_text(text + '[sweep]\ntrials = 2\n[sweep.space]\n"optimizer.lr" = [0.1, 0.01]\n')
    with pytest.raises(SystemExit) as e: run_command(dwiml_sweep, [str(here / "never.toml"), "training.experiment_name=never"])
    assert "no trial came to its end" in e.value.code and "dropout" in e.value.code


def test_the_file_of_a_run_can_be_swept(here, tmp_path):
    trainer = train(here / "run.toml", "training.experiment_name=rate", "training.learning_rates=[0.02]")
    file = write_run_file(trainer, tmp_path / "made.toml")
    assert read_toml(file)["optimizer"]["lr"] == .02 and "learning_rates" not in read_toml(file)["training"]
    again = train(file, "training.experiment_name=again")
    assert all((a == b).all() for a, b in zip(trainer.model.state_dict().values(), again.model.state_dict().values()))
    assert "lr" not in read_toml(write_run_file(train(here / "run.toml", "training.experiment_name=usual"), tmp_path / "usual.toml"))["optimizer"]


def test_the_keys_of_a_sweep_are_said_everywhere(here, capsys):
    new = said(capsys, dwiml_config, "new")
    page = (Path(__file__).parent.parent / "nbs/08_runs/05_sweeps.ipynb").read_text()
    for name, o in sweeps.SWEEP.items():
        assert o.about.split(";")[0][:40] in new.replace("\n# ", " ") and f"| `{name}` |" in page, name
    commented = new[new.index("# [sweep]"):]
    (here / "begun.toml").write_text(RUN + re.sub(r"^# (?=[\[\"]|\w+ = )", "", commented, flags=re.M))
    assert sweeps.sweep_table(run_config(here / "begun.toml")) == {**sweeps.TABLE, "trials": 20, "space": sweeps.checked_space({"optimizer.lr": dict(low=1e-4, high=.1, log=True), "sampler.batch_size_training": [50, 100, 200]})}


@pytest.mark.parametrize("pruner, says", [('{key = "median", n_warmup_steps = 3}', None), ('{key = "median", n_warmup_step = 3}', "n_warmup_steps"), ('{key = "halving", reduction_factor = 0}', "cannot be made"), ('{key = "mean"}', "median")])
def test_a_pruner_takes_options(here, pruner, says):
    (here / "pruned.toml").write_text(RUN + f'[sweep]\npruner = {pruner}\n[sweep.space]\n"optimizer.lr" = [0.1, 0.01]\n')
    if says is None: assert sweeps.make_pruner(sweeps.sweep_table(run_config(here / "pruned.toml")))._n_warmup_steps == 3
    else:
        with pytest.raises(ValueError, match=says): sweeps.sweep_table(run_config(here / "pruned.toml"))


def test_a_sweep_tells_each_trial_and_its_table_each_option_once(here, monkeypatch, capsys, caplog):
    (here / "told.toml").write_text(RUN.replace('"one"', '"told"').replace("max_epochs = 1", "max_epochs = 2") + '[sweep]\nsampler = "grid"\n[sweep.space]\n"optimizer.lr" = [0.123456789, 0.01]\n')
    monkeypatch.setattr(sweeps.PruneEpochs, "epoch", lambda self, row: (self.report(row), setattr(self, "pruned", self.trial.number == 1), self.pruned and self.trainer.control.request_stop()))
    with caplog.at_level("INFO", "dwiml_nb"): said(capsys, dwiml_sweep, here / "told.toml")
    assert re.search(r"trial_0000 complete, valid_loss \S+ \(1 of 2\)\n.*trial_0001 pruned, valid_loss \S+ \(2 of 2\)", caplog.text.replace("INFO", ""), re.S)
    table = said(capsys, dwiml_runs, here / "experiments/told")
    assert " pruned " in table and "stopped" not in table and "experiment_name" not in table
    assert "[0.123457]" in table and "0.123456789" not in table
    assert table.count("learning_rates") + table.count("optimizer.lr") <= 1


def test_a_killed_run_is_not_called_stopped(here, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(here / "experiments/one", folder)
    rows = [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]
    (folder / "sessions.jsonl").write_text(json.dumps({**rows[0], "process": 2**22 + 1}) + "\n")
    state = lambda: state_of(folder, {"max_epochs": 5}, [], read_rows(folder / "logs/batches.jsonl"))[0]
    assert state() == "died"
    (folder / "sessions.jsonl").unlink()
    assert state() == "stopped"                                                # of before sessions: its checkpoint is all that is known


# Other processes

SCRIPT = """import sys, time, multiprocessing
from dwiml_nb.runs.sweeps import end_with_parent, sweep
if sys.argv[1] == 'guarded':
    def child(): end_with_parent(); print('here', flush=True); time.sleep(60)
    if __name__ == '__main__':
        p = multiprocessing.get_context('fork').Process(target=child); p.start(); print(p.pid, flush=True); p.join()
else: sweep(sys.argv[1], workers=2)
"""


def test_workers_of_a_script_without_a_guard_and_of_a_dead_parent(here, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (here / "guard.toml").write_text(RUN + '[sweep]\n[sweep.space]\n"optimizer.lr" = [0.1, 0.01]\n')
    with subprocess.Popen([sys.executable, script, "guarded"], stdout=subprocess.PIPE, text=True) as parent:
        child = {parent.stdout.readline().strip(), parent.stdout.readline().strip()} - {"here"}
        parent.kill()
    end = time.monotonic() + 20
    while is_alive(int(*child)) and time.monotonic() < end: time.sleep(.05)
    assert not is_alive(int(*child))
    done = subprocess.run([sys.executable, script, here / "guard.toml", "training.experiment_name=guard"], capture_output=True, text=True)
    assert "if __name__ == '__main__':" in done.stderr and done.stderr.count("Traceback") == 1 and "SpawnProcess" not in done.stderr
