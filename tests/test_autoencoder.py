"""The auto-encoder: dwi_ml's numbers and folders, lines of 256 points and no others, training that goes on as if it had not stopped.

tests/data/dwi_ml_autoencoder/ is a copy of what dwi_ml 1.0 computed on synthetic lines with sparse weights.
"""
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoader
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import resample_nb_points
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import dwi_ml_problems
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainer

DATA = Path(__file__).parent / "data" / "dwi_ml_autoencoder"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "The folder as dwi_ml writes it; only there its weights are not compressed."
    folder = tmp_path_factory.mktemp("dwi_ml") / "model"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("*.xz", "io.npz"))
    (folder / "model_state.pkl").write_bytes(lzma.decompress((DATA / "model_state.pkl.xz").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("toy"))


def close(ours, reference, relative=1e-5):
    reference = np.asarray(reference)
    assert np.abs(ours.detach().numpy() - reference).max() <= relative*np.abs(reference).max()


def test_numbers_of_dwi_ml(theirs):
    model, io = load_model(theirs), np.load(DATA / "io.npz")
    assert (type(model), model.nb_points, model.streamline_space, model.legacy_half_voxel) == (ModelAE, 256, "vox", True)
    lines = Ragged.from_list(torch.from_numpy(io["streamlines"]))
    outputs = model(lines)
    close(model.encode(lines), io["latent"])
    close(torch.stack(outputs.unbind()).transpose(1, 2), io["outputs"])                  # channels come first there
    loss, n = model.compute_loss(outputs, lines)
    assert n == 3*256 and io["loss_n"] == 1
    close(loss*n, io["loss"])                                                            # a sum there, a mean per point here
    per_point, one = model.compute_loss(outputs, lines, average_results=False)
    assert one == 1 and per_point.lengths.tolist() == [256]*3
    close(torch.stack([o.sum() for o in per_point]), io["loss_per_line"])
    as_lists = model(lines.unbind())
    assert isinstance(as_lists, list) and torch.equal(torch.cat(as_lists), outputs.data)
    assert [len(o) for o in model.compute_loss(as_lists, lines.unbind(), average_results=False)[0]] == [256]*3


def test_a_folder_of_ours_is_one_of_dwi_ml(theirs, tmp_path):
    "The same files, arguments, and names and shapes of weights in the same order."
    load_model(theirs).save_params_and_state(tmp_path / "again")
    assert (tmp_path / "again" / "model_type.txt").read_text() == (theirs / "model_type.txt").read_text()
    params = [json.loads((folder / "parameters.json").read_text()) for folder in (tmp_path / "again", theirs)]
    assert params[0] == params[1]
    ours, reference = (torch.load(folder / "model_state.pkl", weights_only=True) for folder in (tmp_path / "again", theirs))
    assert list(ours) == list(reference) and all(torch.equal(ours[k], reference[k]) for k in ours)
    new = ModelAE(streamline_space="vox", legacy_half_voxel=True).what_is_saved()
    assert set(new[0]) == set(params[1]) and list(new[1]) == list(reference)
    assert "streamline_space" in ModelAE().what_is_saved()[0]                            # lines in mm: dwi_ml has no word for them
    assert dwi_ml_problems(ModelAE()) == ["dwi_ml needs that streamline_space is 'vox'", "dwi_ml needs that legacy_half_voxel is True"]


@pytest.mark.parametrize("options", [dict(nb_points=100), dict(step_size=1.0), dict(compress_lines=0.1), dict(nb_points=256, step_size=0.5)], ids=str)
def test_other_lines_are_refused(options, theirs, tmp_path):
    with pytest.raises(ValueError, match="reads lines of 256 points: expected nb_points=256"): ModelAE(**options)
    shutil.copytree(theirs, tmp_path / "model")
    params = json.loads((theirs / "parameters.json").read_text()) | options
    (tmp_path / "model" / "parameters.json").write_text(json.dumps(params))
    with pytest.raises(DataProblem, match="256 points"): load_model(tmp_path / "model")


def test_lines_that_were_not_resampled():
    lines = Ragged.from_lengths(torch.zeros(512, 3), [100, 412])                         # twice 256 in all
    model = ModelAE(nb_points=None)
    with pytest.raises(ValueError, match=r"reads lines of 256 points, found lines of \[100, 412\]"): model(lines)
    assert model(resample_nb_points(lines.with_data(torch.rand(512, 3)), 256)).lengths.tolist() == [256, 256]
    assert len(model(lines[:0])) == 0


def trainer(study, folder, max_epochs):
    dataset = MultiSubjectDataset(study).load_data()
    torch.manual_seed(0)
    model = ModelAE()
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=4, batch_size_validation=4)
    loader = DWIMLBatchLoader(dataset, model, "bundles", reverse_ratio=0.5)
    return DWIMLTrainer(model, folder, "latent", sampler, loader, max_epochs=max_epochs, device="cpu",
                        max_batches_per_epoch_training=2, max_batches_per_epoch_validation=1)


def test_it_trains_and_resumes_exactly(study, tmp_path):
    trainer(study, tmp_path / "through", 2).train_and_validate()
    trainer(study, tmp_path / "half", 1).train_and_validate()
    trainer_from_folder(tmp_path / "half", "latent", new_max_epochs=2, device="cpu").train_and_validate()
    a, b = (load_model(tmp_path / name / "latent" / "checkpoint" / "model") for name in ("through", "half"))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert any(not torch.equal(v, w) for v, w in zip(a.state_dict().values(), ModelAE().state_dict().values()))
