"""The script that must run unchanged, with a bare child of MainModelAbstract and with a child of ModelWithOneInput, on a study made here and on one by dwi_ml."""
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.parts import ModelWithOneInput
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

SCRIPT = """
dataset = MultiSubjectDataset(hdf5_file)
dataset.load_data()
model = MyModel(args)
batch_sampler = DWIMLBatchIDSampler(dataset=dataset, streamline_group_name=streamline_group_name)
batch_loader = DWIMLBatchLoaderOneInput(dataset=dataset, model=model, input_group_name=input_group_name,
                                        streamline_group_name=streamline_group_name)
trainer = DWIMLTrainerOneInput(model=model, experiments_path=experiments_path, experiment_name=experiment_name,
                               batch_sampler=batch_sampler, batch_loader=batch_loader)
trainer.train_and_validate()
"""


class Bare(MainModelAbstract):
    def __init__(self, args):
        super().__init__()
        self.layer = torch.nn.Linear(args.nb_features, 3)

    def forward(self, inputs, streamlines):
        assert isinstance(inputs, list) and isinstance(streamlines, list) and all(len(x) == len(s) for x, s in zip(inputs, streamlines))
        return [self.layer(x) for x in inputs]

    def compute_loss(self, outputs, target_streamlines):
        assert isinstance(outputs, list) and isinstance(target_streamlines, list)
        errors = torch.cat([o[:-1] - (s[1:] - s[:-1]) for o, s in zip(outputs, target_streamlines)])
        return (errors**2).mean(), len(errors)


class OneInput(ModelWithOneInput):
    def __init__(self, args):
        super().__init__(args.experiment_name, step_size=args.step_size, nb_features=args.nb_features, neighborhood_type="axes", neighborhood_radius=1,
                         input_embedding_key="nn_embedding", input_embedded_size=8)
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, inputs, streamlines): return [self.layer(self.input_embedding_layer(x)) for x in inputs]

    def compute_loss(self, outputs, target_streamlines, average_results=True):  # a bare loss, and the optional argument
        errors = [((o[:-1] - (s[1:] - s[:-1])) ** 2).mean(1) for o, s in zip(outputs, target_streamlines)]
        return torch.cat(errors).mean() if average_results else errors


class TwoEpochs(DWIMLTrainerOneInput):
    "The trainer, but it has had enough after two epochs."
    def __init__(self, *args, max_epochs=2, **kwargs): super().__init__(*args, max_epochs=max_epochs, **kwargs)


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study")), "input", "bundles"


@pytest.mark.parametrize("model", [Bare, OneInput])
@pytest.mark.parametrize("which", ["toy", "dwi_ml"])
def test_seed_script(model, which, toy, tmp_path):
    study, input_group, streamline_group = toy if which == "toy" else (Path(__file__).parent / "data" / "dwi_ml_study" / "study_v1.hdf5", "input", "streamlines")
    nb_features = MultiSubjectDataset(study).nb_features[input_group]
    names = dict(MultiSubjectDataset=MultiSubjectDataset, DWIMLBatchIDSampler=DWIMLBatchIDSampler, DWIMLBatchLoaderOneInput=DWIMLBatchLoaderOneInput,
                 DWIMLTrainerOneInput=TwoEpochs, MyModel=model, args=Namespace(nb_features=nb_features, step_size=2.0, experiment_name="seed"), hdf5_file=str(study),
                 streamline_group_name=streamline_group, input_group_name=input_group, experiments_path=str(tmp_path / "experiments"), experiment_name="seed")
    exec(SCRIPT, names)
    log = read_logs(tmp_path / "experiments" / "seed")
    assert log["epoch"] == [0, 1] and log["train_loss"][1] < log["train_loss"][0] and None not in log["valid_loss"]
    assert (tmp_path / "experiments" / "seed" / "best_model" / "model_state.pkl").exists()
    again = model.load_model_from_params_and_state(tmp_path / "experiments" / "seed" / "best_model")
    assert type(again) is model
