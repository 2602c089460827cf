"""Faults of dwi_ml that gave wrong numbers or crashed, for the parts that exist here and where no page or other test would notice.

docs/migration_from_dwi_ml.md lists every fault with the page or test that guards against it; the numbers below are its numbers.
"""
import inspect
import multiprocessing
import re
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from fastcore.docments import docments

from dwiml_nb.batch.inputs import InputsAt
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput, slices_of
from dwiml_nb.batch.sampler import BatchIds, DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import directions, lengths_of, previous_directions, resample_step, reverse
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid, convert
from dwiml_nb.core.tractograms import TRACTOGRAM_FORMATS, Tractogram, load_tractogram, save_tractogram
from dwiml_nb.core.volume import sample_nearest
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.directions.registry import DIRECTION_GETTERS, direction_getter
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.embeddings import unflatten_neighborhood
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.rnn import StackedRNN
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import checked_seeds, seeds_from_mask
from dwiml_nb.tracking.propagate import Walk, propagate
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study")))
    dataset.load_data()
    yield dataset
    dataset.close()


def random_lines(*lengths, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Ragged.from_list([torch.rand(n, 3, generator=g, dtype=dtype).cumsum(0) for n in lengths])


# ---- 12.1.0: gradients

@pytest.mark.parametrize("rnn_key", ["gru", "lstm"])
@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck_with_lines_of_different_length(rnn_key, dense, monkeypatch):
    "Both ways of running a layer: the CPU's and the packed one that a GPU takes."
    from dwiml_nb.models import rnn
    run_layer = rnn.run_layer
    monkeypatch.setattr(rnn, "run_layer", lambda layer, x, sizes, hidden=None: run_layer(layer, x, sizes, hidden, dense))
    torch.manual_seed(1)
    stack = StackedRNN(rnn_key, 2, [3, 2], use_skip_connection=True, use_layer_normalization=True).double()
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.arange(1.0, 71).reshape(10, 7).double()  # every row counts differently: rows that are exchanged show
    assert torch.autograd.gradcheck(lambda x: (stack(Ragged.from_lengths(x, [2, 4, 1, 3]))[0].data * weight).sum(), x)


def test_whole_model_gradcheck():
    torch.manual_seed(0)
    model = Learn2TrackModel(2, rnn_layer_sizes=[3], nb_previous_dirs=2, normalize_prev_dirs=True, dg_args={"add_eos": True, "axis_head": True}).double()
    lines = random_lines(3, 5, 2, dtype=torch.float64)
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.compute_loss(model(lines.with_data(x), lines), lines)[0], x)


# ---- 12.1.3, 12.2: what is not here yet is refused by name

def test_missing_options_are_refused_by_name():
    for name in ("gausian", "fisher-von-misses", "gaussian-mixtures"):
        with pytest.raises(ValueError, match="unknown direction getter.*Did you mean"): direction_getter(name, 4)


def test_augmentation_drops_no_line(toy):
    "12.1.3: lines of 12 points or fewer vanished."
    loader = DWIMLBatchLoader(toy, ModelSpec(step_size=4.0), "bundles", reverse_ratio=0.5, segment_mm=20.0, widen_mm=1.0, off_track_mm=1.0)
    plain = DWIMLBatchLoader(toy, ModelSpec(step_size=4.0), "bundles")
    for ids in DWIMLBatchIDSampler(toy, "bundles", batch_size_training=25).batches("training", 3):
        batch, before = loader.load_batch_streamlines(ids), plain.load_batch_streamlines(ids)
        assert torch.equal(batch.lines.lengths, before.lines.lengths.clamp(max=6)) and torch.equal(batch.targets.lengths, batch.lines.lengths)


# ---- 12.1.4: millimetres everywhere

class Straight:
    "Walks along +x, then stops nowhere."
    step_size, neighborhood_vectors, nb_previous_dirs, training = 1.0, None, 1, False
    device = torch.device("cpu")
    def __init__(self, space="voxmm", direction=(1.0, 0, 0)): self.streamline_space, self.direction, self.seen = space, torch.tensor(direction), []
    def train(self, mode=True): return self
    def tracking_step(self, inputs, previous_dirs, state=None):
        self.seen.append(previous_dirs.clone())
        return self.direction.expand(len(inputs), 3).clone(), state
    def select_state(self, state, keep): return state
    def warm_up(self, inputs, lines): return None
    def get_tracking_directions(self, outputs, algo="det", eos_threshold=None, previous_dirs=None, draws=None):
        return torch.where((outputs * previous_dirs).sum(1, keepdim=True) < 0, -outputs, outputs)


def one_subject(sizes=(2.0, 2, 2), dimensions=(30, 12, 10), **volumes):
    grid = Grid(np.diag([*sizes, 1.0]), dimensions)
    volumes = {"input": torch.randn(*dimensions, 4, generator=torch.Generator().manual_seed(2)), **volumes}
    subset = SimpleNamespace(subjects=["sub-01"], grid=lambda s, g: grid, get_volume=lambda s, g, device="cpu": volumes[g])
    nb_features = {name: volume.shape[3] for name, volume in volumes.items()}
    return SimpleNamespace(volume_groups=list(volumes), nb_features=nb_features, testing=subset, training=None, validation=None), grid


@pytest.mark.parametrize("sizes,space", [((2.0, 2, 2), "voxmm"), ((1.0, 2, 3), "voxmm"), ((2.0, 2, 2), "vox")])
def test_tracking_is_in_mm_whatever_the_voxels(sizes, space):
    dataset, grid = one_subject(sizes)
    model = Straight(space)
    lines = Tracker(model, dataset, "sub-01", "input", max_length_mm=12, min_length_mm=1).track(convert(torch.tensor([[15.0, 6, 5]]), grid, "vox", "rasmm"), quiet=True)
    assert lengths_of(lines.lines).item() == pytest.approx(12, abs=1e-4)
    steps = torch.cat([s[s.any(1)] for s in model.seen]).norm(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 1.0 if space == "voxmm" else 0.5))  # what the model is told is in its own space


def test_vox_models_need_cubes():
    dataset, _ = one_subject((1.0, 2, 3))
    with pytest.raises(DataProblem, match="cubic voxels"): Tracker(Straight("vox"), dataset, "sub-01", "input")


# ---- 12.1.6, 12.1.7: what EOS does to directions

def test_last_rows_have_no_direction_loss():
    lines, getter = random_lines(3, 5), direction_getter("cosine-regression", 4, add_eos=True, eos_weight=0.0)
    rows = torch.zeros(8, 4)
    rows[[0, 1, 3, 4, 5, 6], :3] = directions(lines).data
    assert getter.compute_loss(rows, lines)[0].abs() < 1e-6  # perfect directions: nothing to pay at the two ends
    rows[[2, 7], :3] = 9.0
    assert getter.compute_loss(rows, lines)[0].abs() < 1e-6


def test_eos_logit_is_not_normalised():
    getter = direction_getter("cosine-regression", 4, add_eos=True, normalize_outputs=1.0)
    with torch.no_grad(): getter.layers[1].bias[3] = 20.0
    assert getter.eos_probs(getter(torch.randn(5, 4))).min() > 0.99


# ---- 12.1.8, 12.1.9, 12.2: ends of tracked lines

@pytest.mark.parametrize("keep_last_point", [False, True])
@pytest.mark.parametrize("nb_seeds", [1, 5])
def test_a_walk_that_dies_at_its_seed(keep_last_point, nb_seeds):
    "NaN points were stored; a single seed crashed."
    class Ends(Straight):
        def get_tracking_directions(self, outputs, *args, **kwargs): return torch.full_like(outputs, torch.nan)
    dataset, grid = one_subject()
    tracker = Tracker(Ends(), dataset, "sub-01", "input", keep_last_point=keep_last_point, min_length_mm=0)
    lines = tracker.track(torch.tensor([[30.0, 12, 10]]).expand(nb_seeds, 3), quiet=True)
    assert len(lines) == 0 and lines.info["dropped"] == {"shorter than min_length_mm": nb_seeds}
    points, code, _ = propagate(tracker.walk, torch.full((nb_seeds, 3), 9.0), torch.zeros(nb_seeds, 1, 3), torch.full((nb_seeds,), 50))
    assert points.lengths.tolist() == [1] * nb_seeds and points.data.isfinite().all()


@pytest.mark.parametrize("keep_last_point", [False, True])
def test_no_line_is_longer_than_allowed(keep_last_point):
    dataset, grid = one_subject()
    seeds = convert(torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([30.0, 12, 10]), grid, "vox", "rasmm")
    lines = Tracker(Straight(), dataset, "sub-01", "input", max_length_mm=20, min_length_mm=0, keep_last_point=keep_last_point).track(seeds, quiet=True)
    assert len(lines) == 40 and lengths_of(lines.lines).max() <= 20.001 and lines.lines.data.isfinite().all()


def test_nan_in_a_mask_is_outside():
    mask = torch.ones(30, 12, 10, 1)
    mask[20:] = torch.nan
    dataset, grid = one_subject(mask=mask)
    lines = Tracker(Straight(), dataset, "sub-01", "input", "mask").track(convert(torch.tensor([[10.0, 6, 5]]), grid, "vox", "rasmm"), quiet=True)
    assert (sample_nearest(mask, convert(lines.lines.data, grid, "rasmm", "vox"), outside=0.0) > 0.5).all()


# ---- 12.1.14: repeated points, values that are not numbers

def library_getters():
    "The library's own: other tests register more."
    return [key for key, getter in DIRECTION_GETTERS.items() if getter.__module__.startswith("dwiml_nb.")]


def test_repeated_points_give_finite_losses_and_gradients():
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [2, 1, 0]])
    lines = Ragged.from_list([line, line[:1].expand(3, 3), random_lines(4).data])
    for key in library_getters():
        torch.manual_seed(0)
        model = Learn2TrackModel(2, rnn_layer_sizes=[3], nb_previous_dirs=2, normalize_prev_dirs=True, dg_key=key, dg_args={"add_eos": True})
        loss, _ = model.compute_loss(model(lines.with_data(torch.randn(11, 2)), lines), lines)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert previous_directions(lines, 2, normalize=True).data.isfinite().all() and resample_step(lines, 0.3).data.isfinite().all()


def test_bad_lines_are_refused_by_number(toy):
    "The loader's own door: studies by dwi_ml were not checked when they were made."
    loader = DWIMLBatchLoader(toy, ModelSpec(step_size=1.0), "bundles")
    def spoiled(change):
        def get_lines(subject, group, ids):
            lines = [o.clone() for o in toy.training.get_lines(subject, group, ids)]
            change(lines)
            return Ragged.from_list(lines)
        return SimpleNamespace(subjects=toy.training.subjects, grid=toy.training.grid, get_lines=get_lines)
    def nan(lines): lines[1][0, 2] = torch.inf
    def short(lines): lines[2] = lines[2][:1]
    with pytest.raises(DataProblem, match=rf"subject {toy.training.subjects[1]}, group bundles: 1 lines have NaN or infinite coordinates \(ids \[8\]\).*To do"):
        loader.load_lines_voxmm(spoiled(nan), 1, np.array([3, 8, 5]))
    with pytest.raises(DataProblem, match=r"1 lines have fewer than 2 points \(ids \[5\]\).*Found: 1 points.*create_study leaves such lines out"):
        loader.load_lines_voxmm(spoiled(short), 1, np.array([3, 8, 5]))


class OneStep(MainModelAbstract):
    "Learns one constant step; its loss is what it is told to be."
    def __init__(self):
        super().__init__(step_size=3.0)
        self.step, self.told = torch.nn.Parameter(torch.zeros(3)), None
    def forward(self, streamlines): return [self.step.expand(len(line) - 1, 3) for line in streamlines]
    def compute_loss(self, outputs, targets):
        loss = torch.cat([o - t.diff(dim=0) for o, t in zip(outputs, targets)]).square().mean()
        return loss if self.told is None or not self.training else loss * 0 + self.told


def trainer_of(toy, folder, **options):
    model = OneStep()
    return DWIMLTrainer(model, folder, "run", DWIMLBatchIDSampler(toy, "bundles", 60, 25), DWIMLBatchLoader(toy, model, "bundles"), max_epochs=1, device="cpu", **options)


@pytest.mark.parametrize("told", [torch.inf, torch.nan])
def test_an_infinite_loss_is_not_left_out_of_the_mean(toy, tmp_path, told):
    trainer = trainer_of(toy, tmp_path)
    trainer.model.told = told
    with pytest.raises(DataProblem, match=f"the loss is {told} at training batch 1 of epoch 1"): trainer.train_and_validate()


def test_all_validation_batches(toy, tmp_path):
    "12.2: None was set on another attribute."
    trainer = trainer_of(toy, tmp_path, max_batches_per_epoch_training=1, max_batches_per_epoch_validation=None)
    trainer.train_and_validate()
    n = int(toy.validation.nb_streamlines("bundles").sum())
    assert trainer.nb_batches("validation") == -(-n // 25) > 1 and read_logs(tmp_path / "run", "batches")["phase"].count("validation") == -(-n // 25)


# ---- 12.1.17, 12.2: studies whose subjects disagree; handles

def test_features_are_compared_group_by_group(toy, tmp_path):
    "As sets, {1, 15} and {15, 1} were the same."
    path = tmp_path / "study.hdf5"
    shutil.copy(toy.path, path)
    with h5py.File(path, "r+") as f:
        subject = f[toy.training.subjects[1]]
        subject.move("input", "other"); subject.move("wm_mask", "input"); subject.move("other", "wm_mask")
    lazily = MultiSubjectDataset(path, lazy=True).load_data()          # as the index of before told it; the group itself says otherwise
    with pytest.raises(DataProblem, match="the study's index says something else"): lazily.training.subject(1).volumes["input"].get_data_as_tensor()
    lazily.close()
    with h5py.File(path, "r+") as f:
        for key in INDEX_KEYS: del f.attrs[key]
    with pytest.raises(DataProblem, match="another number of features than in the first subject") as caught: MultiSubjectDataset(path, lazy=True).load_data()
    assert all(word in str(caught.value) for word in (toy.training.subjects[1], "input", "wm_mask", "Expected: 15", "Found: 1"))


@pytest.mark.parametrize("lazy", [True, False])
def test_close_again_and_again(toy, lazy):
    dataset = MultiSubjectDataset(toy.path, lazy=lazy).load_data()
    other = MultiSubjectDataset(toy.path, lazy=True).load_data()
    for _ in range(2): dataset.close()
    assert len(other.training.get_lines(0, "bundles", [0])) == len(dataset.training.get_lines(0, "bundles", [0])) == 1  # the other's handle is its own; ours opens again
    dataset.close(), other.close()


def opens_its_own(dataset, handle): return dataset.file.handle is not handle and len(dataset.training.get_lines(0, "bundles", [3]).data)


def test_a_forked_child_opens_the_file_for_itself(toy):
    dataset = MultiSubjectDataset(toy.path, lazy=True).load_data()
    handle, context = dataset.file.handle, multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(opens_its_own(dataset, handle)))
    child.start(); child.join(60)
    assert child.exitcode == 0 and answers.get() == len(dataset.training.get_lines(0, "bundles", [3]).data) and dataset.file.handle is handle
    dataset.close()


# ---- 12.1.15: validation

def test_validation_is_never_augmented_and_has_its_own_chance(toy):
    options = dict(reverse_ratio=0.9, segment_mm=12.0, widen_mm=2.0, off_track_mm=1.0, noise_mm_forward=0.5, noise_mm_loss=0.5)
    rough, plain = (DWIMLBatchLoader(toy, ModelSpec(step_size=1.0), "bundles", **o) for o in (options, {}))
    sampler = DWIMLBatchIDSampler(toy, "bundles", batch_size_training=25)
    ids = next(sampler.batches("validation"))
    a, b = rough.load_batch_streamlines(ids), plain.load_batch_streamlines(ids)
    assert torch.equal(a.lines.data, b.lines.data) and a.targets is a.lines
    assert torch.equal(rough.add_noise_streamlines_forward(*a).data, a.lines.data) and rough.add_noise_streamlines_loss(*a) is a.lines
    before = [str(b) + str(b[0][1]) for b in sampler.batches("training", 1)]
    list(sampler.batches("validation", 1)); rough.load_batch_streamlines(ids)
    assert before == [str(b) + str(b[0][1]) for b in sampler.batches("training", 1)]


def test_global_generators_change_nothing(toy):
    loader = DWIMLBatchLoader(toy, ModelSpec(step_size=1.0), "bundles", reverse_ratio=0.5, segment_mm=12.0, off_track_mm=1.0, noise_mm_loss=0.5)
    sampler, made = DWIMLBatchIDSampler(toy, "bundles", batch_size_training=25), []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed)
        batch = loader.load_batch_streamlines(next(sampler.batches("training", 4)))
        made.append(loader.add_noise_streamlines_loss(batch.targets, batch.ids_per_subj).data)
    assert torch.equal(*made)


# ---- 12.2: models

def test_nb_points_models_load(toy):
    "The loader never read nb_points."
    batch = DWIMLBatchLoader(toy, ModelSpec(nb_points=17), "bundles").load_batch_streamlines([(0, [0, 1, 2]), (1, [4])])
    assert batch.lines.lengths.tolist() == [17] * 4


def test_cnn_embedding_sees_the_neighbourhood_where_it_is(toy):
    from dwiml_nb.core.volume import neighborhood_vectors
    vectors = neighborhood_vectors("grid", 1)
    box = unflatten_neighborhood(vectors.reshape(1, -1), 1)  # each place holds its own offset
    for offset in vectors.long(): assert torch.equal(box[(0, *(offset + 1))], offset.float())
    model = Learn2TrackModel(toy.nb_features["input"], rnn_layer_sizes=[4], input_embedding_key="cnn_embedding", nb_cnn_filters=[3], kernel_size=[2],
                             neighborhood_type="grid", neighborhood_radius=1, step_size=2.0)
    loader = DWIMLBatchLoaderOneInput(toy, model, "input", "bundles")
    lines, who = loader.load_batch_streamlines([(0, [0, 3])])
    assert model(loader.load_batch_inputs(lines, who), lines).data.isfinite().all()


def test_numpy_numbers_as_arguments(tmp_path):
    "nb_features as np.int64, as the reference's own dataset gives it, crashed."
    from dwiml_nb.models.base import load_model
    model = Learn2TrackModel(np.int64(3), rnn_layer_sizes=[np.int64(4)], step_size=np.float64(1.0))
    model.save_params_and_state(tmp_path / "model")
    assert load_model(tmp_path / "model").params_for_checkpoint == model.params_for_checkpoint


def test_point_idx_0_is_the_first_point():
    "0 was taken for None."
    torch.manual_seed(0)
    model = Learn2TrackModel(2, rnn_layer_sizes=[3], nb_previous_dirs=1).eval()
    lines = random_lines(3, 5)
    x = torch.randn(8, 2)
    torch.testing.assert_close(model(x[[0, 3]], lines, point_idx=0), model(lines.with_data(x), lines).data[[0, 3]])


def test_weights_are_read_as_data_only(tmp_path, monkeypatch):
    "torch.load ran whatever a file held, and wanted the device that wrote it."
    from dwiml_nb.models.base import load_model
    Learn2TrackModel(2, rnn_layer_sizes=[3]).save_params_and_state(tmp_path / "model")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (asked.append(kwargs), load(*args, **kwargs))[1])
    load_model(tmp_path / "model")
    assert asked and all(k["weights_only"] is True and k["map_location"] == "cpu" for k in asked)


@pytest.mark.parametrize("algo", ["det", "prob"])
@pytest.mark.parametrize("stop", [None, 0.5, "max"])
def test_eos_max_with_many_lines(algo, stop):
    "Classification with 'max' crashed for more than one line, regression for any."
    for key in library_getters():
        getter = direction_getter(key, 4, add_eos=True)
        if algo == "prob" and not getter.is_probabilistic: continue
        rows = torch.zeros(6, getter.nb_columns + 1)
        rows[::2, getter.nb_columns] = 9.0
        rows[:, 0] += 1.0
        assert getter.get_tracking_directions(rows, algo, stop).isnan().all(1).tolist() == [True, False] * 3


# ---- 12.4: one default, wherever it is written

def test_command_defaults_are_the_functions():
    from dwiml_nb.cli.study import dwiml_create_hdf5_dataset
    from dwiml_nb.cli.tracking import dwiml_track_from_model
    from dwiml_nb.study.create import create_study
    from dwiml_nb.runs.options import tracking_options
    from dwiml_nb.runs.track import track_from_model
    other = dict(step_size="step_mm", theta="theta_deg", min_length="min_length_mm", max_length="max_length_mm", eos_stop="eos_threshold", rng_seed="seed",
                 input_group="input_group_name", in_custom_seeds="seeds", skip_enforce_files_presence="skip_missing")
    for command, functions in ((dwiml_track_from_model, (track_from_model, Tracker)), (dwiml_create_hdf5_dataset, (create_study,))):
        theirs = {}
        for f in functions[::-1]: theirs |= {k: p.default for k, p in inspect.signature(f).parameters.items()}
        for name, p in inspect.signature(command).parameters.items():
            name = other.get(name, name) if other.get(name) in theirs else name
            if name not in theirs or p.default is p.empty: continue
            if name in ("n_procs", "trust"): continue  # one subject at a time unless told otherwise; a list when it is given
            if command is dwiml_track_from_model and p.default is None and name in tracking_options():  # as [tracking] says, which says what the function does
                about = getattr(p.annotation, "help", None) or docments(command).get(p.name) or ""
                if said := re.search(r"(\d+)( if neither| when not given| when no)", about): assert float(said[1]) in (theirs[name], .1, 1, 1234) and (theirs[name] is None or float(said[1]) == theirs[name]), about
                assert tracking_options()[name].default == theirs[name]
                continue
            assert p.default == theirs[name], f"{command.__name__}: {name} is {p.default} here and {theirs[name]} there"


# ---- Annex 5, 6, 7: every head trains and tracks; company, batch size and direction change nothing

def learner(key="cosine-regression", rnn_key="lstm", space="voxmm", nb_previous_dirs=2, **dg_args):
    torch.manual_seed(3)
    if "sphere" in key: dg_args["sphere"] = "repulsion100"
    model = Learn2TrackModel(4, rnn_key, [8, 8], nb_previous_dirs=nb_previous_dirs, dg_key=key, dg_args=dg_args, step_size=1.0, streamline_space=space,
                             neighborhood_type="axes", neighborhood_radius=1)
    return model


HEADS = [("cosine-regression", {}), ("cosine-regression", {"add_eos": True}), ("cosine-regression", {"axis_head": True}),
         ("sphere-classification", {}), ("sphere-classification", {"add_eos": True}), ("sphere-classification", {"add_eos": True, "axis_head": True})]
MORE_HEADS = [("l2-regression", {}), ("cosine-plus-l2-regression", {"add_eos": True}), ("smooth-sphere-classification", {}), ("gaussian", {"add_eos": True}),
              ("gaussian-mixture", {"axis_head": True}), ("fisher-von-mises", {}), ("fisher-von-mises-mixture", {"add_eos": True, "axis_head": True})]


@pytest.mark.parametrize("rnn_key,key,args", [(rnn_key, *head) for rnn_key in ("gru", "lstm") for head in HEADS] + [("gru", *head) for head in MORE_HEADS])
def test_every_head_trains_a_step_and_tracks_alike_in_any_company(key, args, rnn_key):
    model = learner(key, rnn_key, **args)
    lines = random_lines(6, 3, 9)
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), torch.randn(18, 4 * 7)
    losses = []
    for _ in range(6):
        loss, _ = model.compute_loss(model(lines.with_data(x), lines) if model.uses_last_point else
                                     model(*[Ragged.from_list([o[:-1] for o in r]) for r in (lines.with_data(x), lines)]), lines)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    dataset, grid = one_subject()
    seeds = seeds_from_mask(np.ones((30, 12, 10)), grid.affine, nt=23)
    for algo in ("det", "prob") if model.direction_getter.is_probabilistic else ("det",):
        options = dict(algo=algo, theta_deg=150, min_length_mm=0, max_length_mm=12, eos_threshold=0.9 if args.get("add_eos") else None)
        whole, small = (Tracker(model, dataset, "sub-01", "input", batch_size=b, **options).track(seeds, quiet=True) for b in (None, 4))
        assert len(whole) + sum(whole.info["dropped"].values()) == 23 and len(whole) > 5
        assert torch.equal(whole.lines.lengths, small.lines.lengths) and torch.equal(whole.info["stop_reasons"], small.info["stop_reasons"])
        torch.testing.assert_close(whole.lines.data, small.lines.data, atol=1e-3, rtol=0)
        assert lengths_of(whole.lines).max() <= 12.001 and whole.lines.data.isfinite().all()


def test_another_seed_is_another_draw():
    dataset, grid = one_subject()
    seeds, model = seeds_from_mask(np.ones((30, 12, 10)), grid.affine, nt=10), learner("sphere-classification").eval()
    a, b, c = (Tracker(model, dataset, "sub-01", "input", algo="prob", theta_deg=150, min_length_mm=0, seed=s).track(seeds, quiet=True) for s in (1, 1, 2))
    assert torch.equal(a.lines.data, b.lines.data) and not torch.equal(a.lines.data[:5], c.lines.data[:5])


@pytest.mark.parametrize("space", ["voxmm", "vox"])
@pytest.mark.parametrize("rnn_key", ["gru", "lstm"])
def test_the_second_half_goes_on_as_the_reversed_first_half_would(rnn_key, space):
    "States and previous directions at the seed are those of the whole line read backwards."
    dataset, grid = one_subject()
    model = learner(rnn_key=rnn_key, space=space).eval()
    tracker = Tracker(model, dataset, "sub-01", "input", theta_deg=180)
    forward = Ragged.from_list([torch.tensor([30.0, 12, 10]) + random_lines(n, seed=n).data for n in (2, 7, 4)])
    state, memory = tracker.walk.remembered(reverse(forward), 2)
    with torch.no_grad():
        at_seed = forward.data[forward.offsets[:-1]]
        stepwise, _ = model.tracking_step(tracker.walk.inputs(at_seed), (memory * tracker.walk.scale).flatten(1), state)
        back = reverse(forward)
        whole = model(back.with_data(tracker.walk.inputs(back.data)), back.with_data(back.data * tracker.walk.scale))
    torch.testing.assert_close(stepwise, whole.data[back.offsets[1:] - 1], atol=1e-5, rtol=0)


def test_a_lone_seed_sets_out_opposite_with_an_axis():
    "Where the first half went nowhere, the head that was trained for first steps decides, not the other one."
    mask = torch.ones(30, 12, 10, 1)
    dataset, grid = one_subject(mask=mask)
    model = learner(axis_head=True).eval()
    tracker = Tracker(model, dataset, "sub-01", "input", theta_deg=180, min_length_mm=0, max_length_mm=6)
    seed = torch.tensor([[30.0, 12, 10]])
    _, _, first = propagate(tracker.walk, seed, torch.zeros(1, 2, 3), torch.tensor([9]))
    lines, _ = tracker.second_half(Ragged.from_lengths(seed, [1]), first, torch.tensor([9]), torch.arange(1))
    torch.testing.assert_close(lines.data[1] - lines.data[0], -first[0], atol=1e-5, rtol=0)


def test_legacy_half_voxel_reaches_loader_and_tracker(toy):
    a, b = (DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.0, legacy_half_voxel=o), "input", "bundles") for o in (False, True))
    lines, who = a.load_batch_streamlines([(0, [0, 3])])
    moved = lines.with_data(lines.data - 0.5 * torch.tensor(toy.training.grid(0, "input").voxel_sizes).float())
    torch.testing.assert_close(b.load_batch_inputs(moved, who).data, a.load_batch_inputs(lines, who).data, atol=1e-4, rtol=0)
    dataset, grid = one_subject()
    walks = [Walk(None, InputsAt(dataset.testing, 0, {"": ["input"]}, ModelSpec(legacy_half_voxel=o), grid), grid) for o in (False, True)]
    at = torch.tensor([[20.3, 11.1, 7.7]])
    torch.testing.assert_close(walks[1].inputs(at - 1), walks[0].inputs(at), atol=1e-4, rtol=0)


# ---- bad input, for batch and tracking

def test_batches_say_what_is_wrong(toy):
    with pytest.raises(DataProblem, match="no streamlines group 'bundels'.*Did you mean 'bundles'?"): DWIMLBatchLoader(toy, ModelSpec(), "bundels")
    with pytest.raises(DataProblem, match="no streamlines group 'bundels'.*Did you mean 'bundles'?"): DWIMLBatchIDSampler(toy, "bundels")
    model = Learn2TrackModel(3, rnn_layer_sizes=[4], step_size=1.0)
    with pytest.raises(DataProblem, match=r"group input: the model was made for another volume. Expected: 3 features. Found: 15 features. To do: choose .*nb_features"):
        DWIMLBatchLoaderOneInput(toy, model, "input", "bundles")
    with pytest.raises(ValueError, match="each subject once"): slices_of([(0, [1]), (0, [2])])
    with pytest.raises(ValueError, match="batch_size_training is a whole number >= 1, found 2.5"): DWIMLBatchIDSampler(toy, "bundles", batch_size_training=2.5)
    assert all(len(ids) == 10 for b in [next(DWIMLBatchIDSampler(toy, "bundles", batch_size_training=20.0).batches())] for _, ids in b)


def test_an_input_on_another_grid(toy):
    loader = DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.0), "input", "bundles")
    lines, who = loader.load_batch_streamlines([(1, [0])])
    grid = lambda s, group: toy.training.grid(s, group) if group == "bundles" else Grid(np.eye(4), (9, 9, 9))
    loader.dataset = SimpleNamespace(nb_features=toy.nb_features, subset=lambda name: SimpleNamespace(subjects=toy.training.subjects, grid=grid, get_volume=toy.training.get_volume))
    with pytest.raises(DataProblem, match=f"subject {toy.training.subjects[1]}, group input: the streamlines and the input volume lie on different grids.*Expected.*Found.*To do"):
        loader.load_batch_inputs(lines, who)


def test_empty_batches_and_empty_subjects(toy):
    loader = DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.0), "input", "bundles", segment_mm=9.0, reverse_ratio=0.5, off_track_mm=1.0)
    for ids in ([], [(0, [])], [(0, []), (1, [2])], BatchIds([(0, np.zeros(0, int))], "validation", 1, 2)):
        lines, who = loader.load_batch_streamlines(ids)
        assert len(loader.load_batch_inputs(lines, who)) == len(lines) == sum(len(i) for _, i in ids)


def test_trackers_say_what_is_wrong():
    dataset, grid = one_subject(mask=torch.ones(30, 12, 10, 1), peaks=torch.ones(30, 12, 10, 2))
    make = lambda model=None, **kw: Tracker(model or Straight(), dataset, "sub-01", "input", **kw)
    with pytest.raises(DataProblem, match="group input: a tracking mask cannot be this volume. Expected: 1 feature. Found: 4"): make(tracking_mask_group="input")
    with pytest.raises(DataProblem, match="peaks cannot be this volume. Expected: 3 features. Found: 2"): make(first_direction="peaks:peaks")
    with pytest.raises(DataProblem, match="the model was made for another volume. Expected: 7 features. Found: 4"): make(Learn2TrackModel(7, rnn_layer_sizes=[3], step_size=1.0))
    with pytest.raises(ValueError, match="theta_deg"): make(theta_deg=0)
    with pytest.raises(ValueError, match="batch_size"): make(batch_size=-3)
    with pytest.raises(ValueError, match="min_length_mm"): make(min_length_mm=50, max_length_mm=40)
    with pytest.raises(ValueError, match="give step_mm"): make(SimpleNamespace(step_size=None))
    outside = torch.tensor([[1.0, 1, 1], [500, 1, 1], [torch.nan, 1, 1]])
    with pytest.raises(DataProblem, match="subject sub-01: 2 of 3 seeds lie outside the volume.*Found.*500.*To do.*RAS mm"): make().track(outside)
    with pytest.raises(DataProblem, match="seeds are points"): checked_seeds(torch.zeros(3), grid)
    with pytest.raises(DataProblem, match="the seeding mask is empty"): seeds_from_mask(np.zeros((3, 3, 3)), np.eye(4))
    with pytest.raises(DataProblem, match=r"one 3-D volume. Expected: \(X, Y, Z\). Found: \(3, 3, 3, 4\)"): seeds_from_mask(np.ones((3, 3, 3, 4)), np.eye(4))
    assert len(make().track(torch.zeros(0, 3), quiet=True)) == 0


def test_masks_of_another_grid_are_refused():
    dataset, grid = one_subject(mask=torch.ones(9, 9, 9, 1))
    dataset.testing.grid = lambda s, group: Grid(np.eye(4), (9, 9, 9)) if group == "mask" else grid
    with pytest.raises(DataProblem, match="subject sub-01, group mask: the volume lies on another grid than the input.*Expected.*Found.*To do"):
        Tracker(Straight(), dataset, "sub-01", "input", "mask")


@pytest.mark.parametrize("kind", [".trk", ".tck", ".trx"])
def test_tractograms_cut_short_anywhere(tmp_path, kind):
    "A .trk that ends between two lines was read as a shorter one."
    whole = Tractogram(Ragged.from_list([torch.rand(40, 3) * 8] * 20), Grid(np.eye(4), (9, 9, 9)))
    save_tractogram(whole, tmp_path / f"a{kind}")
    content = (tmp_path / f"a{kind}").read_bytes()
    for left_out in (4 + 480, 12 + 480, 12, 100, len(content) // 3, len(content) - 5, len(content)):
        (tmp_path / f"cut{kind}").write_bytes(content[:len(content) - left_out])
        with pytest.raises(DataProblem, match=f"cut{kind}: the tractogram cannot be read.*Expected: a whole {kind} file.*To do"): load_tractogram(tmp_path / f"cut{kind}")


def test_a_tractogram_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    whole = Tractogram(Ragged.from_list([torch.rand(4, 3)]), Grid(np.eye(4), (9, 9, 9)))
    save_tractogram(whole, tmp_path / "a.trk")
    before = (tmp_path / "a.trk").read_bytes()

    def full(self, pieces, grid, path, points="float32"):
        with open(path, "wb") as f: f.write(b"half")
        raise OSError(28, "No space left on device", path)
    monkeypatch.setattr(TRACTOGRAM_FORMATS[".trk"], "save_pieces", full)
    with pytest.raises(OSError, match="No space left"): save_tractogram(whole, tmp_path / "a.trk")
    assert [p.name for p in tmp_path.iterdir()] == ["a.trk"] and (tmp_path / "a.trk").read_bytes() == before
