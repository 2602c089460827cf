"""What a model must have, and what it may leave out: one module of torch, nothing inherited from this package, trains, resumes and tracks."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dwiml_nb.batch.inputs import InputsAt
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ASKED, ModelSpec, spec_of
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from check_contract import contract_problems, probes, written_list  # noqa: E402


class Plain(nn.Module):
    "Says everything that may be said, with the value that counts when it is not said."
    step_size, nb_points, compress_lines, neighborhood_vectors = None, None, None, None
    streamline_space, legacy_half_voxel, uses_last_point, accepts_ragged, nb_previous_dirs, input_specs = "voxmm", False, True, False, 0, None

    def __init__(self, nb_features):
        super().__init__()
        self.nb_features, self.layer = nb_features, nn.Linear(nb_features, 3)

    @property
    def device(self): return self.layer.weight.device

    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]

    def compute_loss(self, outputs, target_streamlines):
        steps = torch.cat([t[1:] - t[:-1] for t in target_streamlines])
        return (1 - torch.cosine_similarity(torch.cat([o[:-1] for o in outputs]), steps)).mean(), len(steps)

    def tracking_step(self, inputs, previous_dirs, state=None): return self.layer(inputs), state
    def get_tracking_directions(self, outputs, algo="det", eos_threshold=None, previous_dirs=None, draws=None): return outputs
    def warm_up(self, inputs, lines): return None
    def select_state(self, state, keep): return state
    def set_context(self, phase): pass

    @property
    def params_for_checkpoint(self): return {"nb_features": self.nb_features}

    def save_params_and_state(self, folder):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "parameters.json").write_text(json.dumps(self.params_for_checkpoint))
        Path(folder, "model_type.txt").write_text("Plain")
        torch.save(self.state_dict(), Path(folder, "model_state.pkl"))


def without(name):
    "The same class, never having heard of one attribute."
    return type("Plain", (nn.Module,), {k: v for k, v in vars(Plain).items() if k != name and k not in ("__dict__", "__weakref__", "__init__")} | {"__init__": init})


def init(self, nb_features):
    nn.Module.__init__(self)
    self.nb_features, self.layer = nb_features, nn.Linear(nb_features, 3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study")))
    return dataset.load_data() or dataset


def run(cls, toy, folder, name):
    "Losses of two epochs, the second one after a resume; and a tractogram."
    def parts():
        torch.manual_seed(0)
        model = cls(toy.nb_features["input"])
        return model, folder, name, DWIMLBatchIDSampler(toy, "bundles"), DWIMLBatchLoaderOneInput(toy, model, "input", "bundles", noise_mm_forward=0.1)
    DWIMLTrainerOneInput(*parts(), max_epochs=1, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, device="cpu").train_and_validate()
    trainer = DWIMLTrainerOneInput.init_from_checkpoint(*parts(), new_max_epochs=2, device="cpu")
    trainer.train_and_validate()
    tracker = Tracker(trainer.model, toy, toy.validation.subjects[0], "input", step_mm=1.0, tracking_mask_group="wm_mask")
    lines = tracker.track(seeds_from_mask(toy.validation.get_volume(0, "wm_mask"), tracker.grid.affine, nt=20), quiet=True).lines
    return read_logs(folder / name)["train_loss"], lines.data


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory): return run(Plain, toy, tmp_path_factory.mktemp("runs"), "whole")


@pytest.mark.parametrize("name", [*ASKED, "input_specs", "set_context"])
def test_what_is_not_said_keeps_its_default(name, toy, whole, tmp_path):
    assert not hasattr(without(name), name) or name in vars(nn.Module)
    losses, points = run(without(name), toy, tmp_path, "less")
    assert losses == whole[0] and losses[1] < losses[0] and torch.equal(points, whole[1])


def test_a_model_without_a_loss_or_a_step_is_told_so(toy, tmp_path):
    make = lambda cls: (model := cls(toy.nb_features["input"]), tmp_path, "x", DWIMLBatchIDSampler(toy, "bundles"), DWIMLBatchLoaderOneInput(toy, model, "input", "bundles"))
    with pytest.raises(TypeError, match="Plain has no compute_loss"): DWIMLTrainerOneInput(*make(without("compute_loss")), device="cpu")
    with pytest.raises(TypeError, match="Plain has no tracking_step"): Tracker(without("tracking_step")(15), toy, toy.validation.subjects[0], "input", step_mm=1.0)


# ---- the code itself

def test_only_the_spec_reads_models(): assert contract_problems() == []


@pytest.mark.parametrize("source", [
    "getattr(model, 'step_size', None)", "hasattr(self.model, 'set_context')", "type(walk.model).__name__", "inspect.signature(model.compute_loss)",
    "m = self.model\nclass A:\n    def f(self):\n        m = self.model\n        return m.nb_features", "def f(model): return model.step_size",
    "def f(self):\n    for m in (self.model, 3): m.nb_previous_dirs", "self.direction_getter.key"])
def test_a_probe_is_found(source): assert probes(source, written_list())


def test_a_call_of_the_list_is_none(): assert not probes("def f(model, x):\n    model.train()\n    return model.compute_loss(x, getattr(x, 'y'))", written_list())


def test_the_spec_is_plain_data(toy):
    "It crosses to a worker without the model: no bound method, no module."
    import pickle
    spec = spec_of(Plain(15))
    assert pickle.loads(pickle.dumps(spec)) == spec and not any(isinstance(v, nn.Module) or callable(v) for v in vars(spec).values())


def test_loader_and_tracker_ask_one_place(toy):
    "The features at a point are the same numbers for a batch and for a step."
    spec, group = ModelSpec(step_size=1.0, neighborhood_vectors=[[0, 0, 0], [1, 0, 0]]), "input"
    loader = DWIMLBatchLoaderOneInput(toy, spec, group, "bundles")
    batch = loader.finish(loader.load_batch_streamlines([(0, [0, 3])]))
    vox = batch.lines.data / torch.tensor(toy.training.grid(0, "bundles").voxel_sizes).float()
    assert torch.equal(InputsAt(toy.training, 0, {"": [group]}, spec, toy.training.grid(0, group))(vox)[0], batch.inputs[0].data)
