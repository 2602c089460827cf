"""A registered model in a run file: its table, criterion and package layer; the same weights from file and by hand."""
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.runs import dwiml_train
from dwiml_nb.core import registry
from dwiml_nb.core.config import read_toml
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import seed_all
from dwiml_nb.core.registry import trusting
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.items import RegisteredBatchLoader
from dwiml_nb.models.registered import REGISTERED_MODELS, registered_model
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, train, write_run_file
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.registered import RegisteredTrainer
from dwiml_nb.widgets.training_dashboard import TrainingDashboard

PACKAGE = (Path(__file__).parent / "bands.py").read_text().replace("Bands", "TheirBands")
RUN = """seed = 5
[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[model]
name = "TheirBands"
[criterion]
name = "CrossEntropyLoss"
label_smoothing = 0.1
[optimizer]
lr = 0.05
momentum = 0.9
[training]
experiment_name = "one"
max_epochs = 2
max_batches_per_epoch_training = 3
device = "cpu"
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registered_file")
    toy_study(folder)
    (folder / "run.toml").write_text(RUN)
    package = folder / "my_bands"
    package.mkdir()
    (package / "bands.py").write_text(PACKAGE)
    (package / "__init__.py").write_text("from .bands import TheirBands\n")
    (package / "default_config.toml").write_text("[model.TheirBands]\nclasses = 4\n")
    return folder


def by_hand(here):
    "The objects, with the seeding line of the page."
    dataset, groups = MultiSubjectDataset(here / "study.hdf5").load_data(), dict(input_group_name="input", streamline_group_name="bundles")
    seed_all(5)
    model = registered_model(REGISTERED_MODELS["TheirBands"], {"model": {"TheirBands": {"classes": 3}}, "criterion": {"label_smoothing": .1}}, dataset, **groups)
    trainer = RegisteredTrainer(model, here / "experiments", "by hand", DWIMLBatchIDSampler(dataset, "bundles", seed=5), RegisteredBatchLoader(dataset, model, **groups, seed=5), seed=5,
                                optimizer="SGD", learning_rates=[.05], optimizer_args={"momentum": .9}, max_epochs=2, max_batches_per_epoch_training=3, device="cpu")
    trainer.train_and_validate()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_registered_model_of_a_package(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(registry, "brought_in", dict(registry.brought_in))                          # no other test trusts it
    with pytest.raises(DataProblem): run_config(here / "run.toml")                                  # not trusted: not imported
    with trusting("my_bands"):
        config = run_config(here / "run.toml")
        assert config["model"]["TheirBands"]["classes"] == 4 and config.origin("model.TheirBands.classes") == "package my_bands"
        assert config["optimizer"]["name"] == "SGD" and config.origin("criterion.label_smoothing") == "run.toml"
        for wrong, says in (("criterion.label_smothing=0", "label_smoothing"), ("model.TheirBands.clases=3", "model.TheirBands.clases.*Did you mean 'classes'"), ("criterion.name=CrosEntropyLoss", "CrossEntropyLoss"), ("optimizer.momentun=0", "momentum"), ("criterion.name=os.system", "not allowed")):
            with pytest.raises(DataProblem, match=says): run_config(here / "run.toml", wrong)
        one = train(here / "run.toml", "model.TheirBands.classes=3")
        assert one.model.config.origin("model.TheirBands.classes") == "command line"
        assert one.model.net.layer.out_features == 3 and one.model.net.criterion.label_smoothing == .1
        again = train(one.experiment_folder, "training.experiment_name=again", "model.name=my_bands.TheirBands")   # handed on by the package
        made = train(write_run_file(one, here / "made.toml"), "training.experiment_name=made", "training.device=cpu")
        stopped = run_parts(run_config(here / "run.toml", "model.TheirBands.classes=3", "training.experiment_name=stopped")).trainer
        stopped.control.on_batch_end.append(lambda row: stopped.control.request_stop())
        stopped.train_and_validate()
        resumed = trainer_from_folder(here / "experiments", "stopped")
        resumed.train_and_validate()
        run_command(dwiml_train, [str(here / "run.toml"), "model.TheirBands.classes=3", "training.experiment_name=command"])
        command = load_model(here / "experiments" / "command" / "checkpoint" / "model")
        dashboard = TrainingDashboard(run_parts(run_config(here / "run.toml", "model.TheirBands.classes=3", "training.experiment_name=dashboard")).trainer)
        dashboard.start()
        assert dashboard.wait(60) == "ended"
        for other in (again.model, made.model, resumed.model, command, dashboard.trainer.model, by_hand(here).model):
            a, b = one.model.state_dict(), other.state_dict()
            assert all(torch.equal(a[k], b[k]) for k in a)
        assert read_toml(one.experiment_folder / "run.toml")["model"]["TheirBands"] == {"classes": 3}
        with pytest.raises(TypeError, match="model.TheirBands.classes"): one.model.net.config["model"]["TheirBands"]["classes"] = 9


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "nbs/tutorials/05_cell_to_package.ipynb"


def commands(folder):
    "The commands of this checkout, as an installation has them."
    folder.mkdir()
    for name, module, function in re.findall(r"^    (dwiml_\w+)=([\w.]+):(\w+)$", (ROOT / "settings.ini").read_text(), re.M):
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nif __name__ == '__main__': sys.exit({function}())\n")
        (folder / name).chmod(0o755)
    return folder


def install(project, site):
    "What `pip install -e` leaves behind, for a machine without a network: the package, and what it says of itself."
    about = tomllib.loads((project / "pyproject.toml").read_text())
    info = site / f"{about['project']['name'].replace('-', '_')}-{about['project']['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['project']['name']}\nVersion: {about['project']['version']}\n")
    points = about["project"]["entry-points"]
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in o.items()) for group, o in points.items()))
    for package in about["tool"]["setuptools"]["packages"]: (site / package).symlink_to(project / package)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    "The page done as it says: its cells here, its files written, its commands in a shell. {command: what it said}"
    home, site = tmp_path_factory.mktemp("page"), tmp_path_factory.mktemp("site")
    cells = [("".join(c["source"]), c["cell_type"]) for c in json.loads(PAGE.read_text())["cells"]]
    before, said = set(REGISTERED_MODELS.entries), {}
    names, threads = {"__name__": "__main__"}, torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands: the last bits depend on it
    env = {**os.environ, "PATH": f"{commands(site / 'bin')}:{os.environ['PATH']}", "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    def run(command):
        if command.startswith("pip install -e "): return install(home / command.split()[-1], site)
        done = subprocess.run(command, shell=True, cwd=home, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        said[command] = done.stdout + done.stderr
    for source, kind in cells:
        if kind == "code" and "cleanup()" not in source: exec(source.replace("tempfile.TemporaryDirectory()", f"type('', (), dict(name={str(home)!r}))"), names)
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", source, re.M | re.S) if kind == "markdown" else ():
            if language == "sh":
                for command in text.splitlines(): run(command)
            else:
                first, _, rest = text.partition("\n")
                file = home / first.removeprefix("# ").partition(",")[0]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text((file.read_text() if first.endswith("at its end") else "") + rest)
    for name in set(REGISTERED_MODELS.entries) - before: del REGISTERED_MODELS.entries[name]
    torch.set_num_threads(threads)
    yield home, said


def test_the_page_from_a_cell_to_a_package_and_a_sweep(followed):
    home, said = followed
    assert list(said)[0] == "dwiml_train names.toml --trust models.py training.experiment_name=file" and len(said) == 4
    state = lambda name: torch.load(home / f"experiments/{name}/best_model/model_state.pkl", weights_only=True)
    cell, file, package = map(state, ("cell", "file", "package"))
    assert all(torch.equal(cell[k], file[k]) for k in cell) and package["net.layers.0.weight"].shape[0] == 16
    assert json.loads((home / "experiments/package/best_model/model_class.json").read_text())["class"] == "dwiml_nb.models.registered.RegisteredModel"
    trials = [f for f in (home / "experiments/swept").iterdir() if (f / "best_model").is_dir()]
    assert len(trials) == 2 and (home / "experiments/swept/sweep.html").is_file()


def test_without_trust_or_entry_point_it_is_refused_in_a_sentence(followed):
    home, _ = followed
    with pytest.raises(SystemExit, match="my_models.*nor allowed.*--trust my_models"): run_command(dwiml_train, [str(home / "names.toml"), "training.experiment_name=no", "model.name=my_models.names.Names"])
    assert not (home / "experiments/no").exists()
