"""What a trainer says when something is wrong, and what it leaves behind: expected, found, what to do; nothing half-written."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainer, DWIMLTrainerOneInput


class Bare(MainModelAbstract):
    "Learns one constant step; becomes NaN when told to."
    def __init__(self, start=0.0, step_size=2.0):
        super().__init__(step_size=step_size)
        self.step, self.poison, self.seen = torch.nn.Parameter(torch.full((3,), start)), None, 0

    def forward(self, *args):
        self.seen += self.training
        return [self.step.expand(len(line), 3) * (torch.nan if self.seen == self.poison else 1) for line in args[-1]]

    def compute_loss(self, outputs, target_streamlines):
        return torch.cat([o[:-1] - s.diff(dim=0) for o, s in zip(outputs, target_streamlines)]).square().mean()


class Speechless(MainModelAbstract):
    def __init__(self):
        super().__init__(step_size=2.0)
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, streamlines): return inputs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study")))
    dataset.load_data()
    return dataset


def make(dataset, folder, model=None, cls=DWIMLTrainer, name="run", seed=1234, from_checkpoint=False, **kwargs):
    model = model or Bare()
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30, seed=seed)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles") if cls is DWIMLTrainerOneInput else DWIMLBatchLoader(dataset, model, "bundles")
    build = cls.init_from_checkpoint if from_checkpoint else cls
    options = {} if from_checkpoint else dict(max_epochs=2, max_batches_per_epoch_training=2)
    return build(model, folder, name, sampler, loader, **{**options, "device": "cpu", **kwargs})


def test_model_without_compute_loss(dataset, tmp_path):
    with pytest.raises(TypeError, match=r"Speechless has no compute_loss. Expected a method compute_loss\(outputs, target_streamlines\)"):
        make(dataset, tmp_path, Speechless())
    assert not list(tmp_path.iterdir())


def test_loss_nan_names_the_batch_and_keeps_the_last_checkpoint(dataset, tmp_path):
    model = Bare()
    model.poison = 4  # second training batch of the second epoch
    trainer = make(dataset, tmp_path, model)
    with pytest.raises(DataProblem) as e: trainer.train_and_validate()
    text = str(e.value)
    assert "the loss is nan at training batch 2 of epoch 2" in text and dataset.training.subjects[0] in text and "streamlines" in text and "To do:" in text
    assert trainer.control.state == "failed"
    state = read_checkpoint(tmp_path / "run").state
    assert (state["epoch"], state["batch"]) == (1, 0)
    resumed = make(dataset, tmp_path, from_checkpoint=True)
    resumed.train_and_validate()
    assert torch.isfinite(resumed.model.step).all() and read_logs(tmp_path / "run", "batches")["epoch"].count(1) == 2 + resumed.nb_batches("validation")


def test_nan_in_a_volume_is_found(dataset, tmp_path):
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], step_size=2.0)
    trainer = make(dataset, tmp_path, model, DWIMLTrainerOneInput)
    volume = dataset.training.get_volume(0, "input")
    kept = volume.clone()
    volume[...] = torch.nan
    try:
        with pytest.raises(DataProblem, match=f"not finite: the inputs of {dataset.training.subjects[0]}"): trainer.train_and_validate()
    finally: volume[...] = kept


def test_gradient_not_finite(dataset, tmp_path):
    class Steep(Bare):
        def compute_loss(self, outputs, target_streamlines): return torch.sqrt((torch.cat(list(outputs)) * 0).sum())  # 0, with an infinite slope
    with pytest.raises(DataProblem, match="the gradient's norm is nan at training batch 1 of epoch 1"): make(dataset, tmp_path, Steep()).train_and_validate()


def test_experiment_exists(dataset, tmp_path):
    make(dataset, tmp_path).train_and_validate()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(DataProblem, match="the experiment exists already.*init_from_checkpoint"): make(dataset, tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_resuming_an_ended_run(dataset, tmp_path):
    make(dataset, tmp_path, name="epochs").train_and_validate()
    with pytest.raises(DataProblem, match=r"all its 2 epochs were trained.*give new_max_epochs \(more than 2\)"): make(dataset, tmp_path, name="epochs", from_checkpoint=True)
    impatient = make(dataset, tmp_path, name="patience", patience=1, patience_delta=1e9, max_epochs=9)
    impatient.train_and_validate()
    assert impatient.epoch == 2  # the first epoch is the best, the second is not better by a billion
    with pytest.raises(DataProblem, match=r"1 epochs in a row were not better than epoch 1.*give new_patience \(more than 1\)"): make(dataset, tmp_path, name="patience", from_checkpoint=True)
    more = make(dataset, tmp_path, name="patience", from_checkpoint=True, new_patience=3)
    more.train_and_validate()
    assert more.epoch == 4


def test_checkpoint_of_another_run(dataset, tmp_path):
    make(dataset, tmp_path, max_epochs=1).train_and_validate()
    again = lambda **kwargs: make(dataset, tmp_path, from_checkpoint=True, new_max_epochs=2, **kwargs)
    with pytest.raises(DataProblem, match="another model. Expected: class='Bare'.*Found: class='Learn2TrackModel'"):
        again(model=Learn2TrackModel(dataset.nb_features["input"], rnn_layer_sizes=[4], step_size=2.0))
    with pytest.raises(DataProblem, match="another model. Expected: start=0.0. Found: start=1.0"): again(model=Bare(1.0))
    with pytest.raises(DataProblem, match="another sampler. Expected: seed=1234. Found: seed=7"): again(seed=7)
    with pytest.raises(DataProblem, match="another trainer"): again(cls=DWIMLTrainerOneInput)
    file = tmp_path / "run" / "checkpoint" / "params.json"
    params = json.loads(file.read_text())
    params["study"]["training"]["sub-99"] = 5
    file.write_text(json.dumps(params))
    with pytest.raises(DataProblem, match="another study.*sub-99=5"): again()


@pytest.mark.parametrize("missing", ["state.pt", "params.json", "model/model_state.pkl"])
def test_checkpoint_with_missing_or_damaged_files(dataset, tmp_path, missing):
    make(dataset, tmp_path, max_epochs=1).train_and_validate()
    file = tmp_path / "run" / "checkpoint" / missing
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataProblem, match=f"missing files.*no {missing}.*To do"): make(dataset, tmp_path, from_checkpoint=True, new_max_epochs=2)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read|not valid JSON"): make(dataset, tmp_path, from_checkpoint=True, new_max_epochs=2)


def test_no_such_experiment(dataset, tmp_path):
    with pytest.raises(DataProblem, match="there is no such experiment"): make(dataset, tmp_path, name="nowhere", from_checkpoint=True)
    with pytest.raises(DataProblem, match="there is no such experiment"): trainer_from_folder(tmp_path, "nowhere")


def test_folder_alone_cannot_resume_a_class_of_a_script(dataset, tmp_path):
    make(dataset, tmp_path, max_epochs=1).train_and_validate()
    file = tmp_path / "run" / "checkpoint" / "params.json"
    file.write_text(file.read_text().replace(f"{__name__}.Bare", "somewhere.else.Gone"))
    with pytest.raises(DataProblem, match=r"somewhere.else.Gone .*nor allowed.*call DWIMLTrainer.init_from_checkpoint"): trainer_from_folder(tmp_path, "run", new_max_epochs=2)


def test_disk_full_keeps_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    trainer = make(dataset, tmp_path)
    saved, real = [], torch.save

    def save(obj, path):
        saved.append(path)
        if Path(path).name == "state.pt" and sum(Path(p).name == "state.pt" for p in saved) == 3:  # first, after epoch 1, after epoch 2
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(obj, path)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device"): trainer.train_and_validate()
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "run").state["epoch"] == 1 and not [p for p in (tmp_path / "run").rglob("*") if ".partial" in p.name]
    make(dataset, tmp_path, from_checkpoint=True).train_and_validate()
    shutil.rmtree(tmp_path / "run")
