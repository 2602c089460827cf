"""A registered model in a run file: its table, criterion and package layer; the same weights from file and by hand."""
from pathlib import Path

import pytest
import torch

from dwiml_nb.core import registry
from dwiml_nb.core.config import read_toml
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.registry import trusting
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, train, write_run_file
from dwiml_nb.study.toy import toy_study

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
    (package / "__init__.py").write_text(PACKAGE)
    (package / "default_config.toml").write_text("[model.TheirBands]\nclasses = 4\n")
    return folder


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
        again = train(one.experiment_folder, "training.experiment_name=again")
        made = train(write_run_file(one, here / "made.toml"), "training.experiment_name=made", "training.device=cpu")
        stopped = run_parts(run_config(here / "run.toml", "model.TheirBands.classes=3", "training.experiment_name=stopped")).trainer
        stopped.control.on_batch_end.append(lambda row: stopped.control.request_stop())
        stopped.train_and_validate()
        resumed = trainer_from_folder(here / "experiments", "stopped")
        resumed.train_and_validate()
        for other in (again, made, resumed):
            a, b = one.model.state_dict(), other.model.state_dict()
            assert all(torch.equal(a[k], b[k]) for k in a)
        assert read_toml(one.experiment_folder / "run.toml")["model"]["TheirBands"] == {"classes": 3}
        with pytest.raises(TypeError, match="model.TheirBands.classes"): one.model.net.config["model"]["TheirBands"]["classes"] = 9
