"""Properties of batches: who is in them, what is done to lines and can be replayed, and the way from a file to a batch and back."""
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset

from dwiml_nb.batch.layouts import subjects_that_fit
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput, slices_of
from dwiml_nb.batch.order import keyed_permutation
from dwiml_nb.batch.sampler import BatchIds, DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.batch.weights import LINE_WEIGHTS
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import resample_step
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid, apply_affine, convert
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.create import create_study
from dwiml_nb.study.toy import toy_study

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
numbers = st.integers(0, 2**32 - 1)


def subset_of(counts, seed=0):
    "A subset that can only count; half a percent of its lines are very long."
    rng = np.random.default_rng(seed)
    mm = [rng.uniform(1, 30, n) * np.where(rng.random(n) < 0.02, 20, 1) for n in counts]
    return SimpleNamespace(subjects=[str(i) for i in range(len(counts))], nb_streamlines=lambda group: np.array(counts, np.int16),  # a narrow type, as in files
                           streamline_lengths=lambda group: [np.ceil(m).astype(np.int16) for m in mm], streamline_lengths_mm=lambda group: mm)


def sampler_of(counts, *args, seed=0, **kwargs):
    subset = subset_of(counts, seed)
    return DWIMLBatchIDSampler(SimpleNamespace(streamline_groups=["g"], subset=lambda name: subset), "g", *args, seed=seed, **kwargs)


def plain(batches): return [(b.index, [(s, ids.tolist()) for s, ids in b]) for b in batches]


# ---- the sampler

@quick
@given(st.integers(1, 5000), numbers)
@example(1, 0)
@example(3, 0)
def test_the_shuffled_order_is_an_order(n, key):
    ids = keyed_permutation(np.arange(n), n, key)
    assert np.array_equal(np.sort(ids), np.arange(n))
    some = np.arange(0, n, 7)
    assert np.array_equal(keyed_permutation(some[::-1], n, key), ids[some[::-1]])  # whatever else is asked for


@settings(quick, max_examples=250)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 7) | st.none(), st.integers(1, 4) | st.none(), st.integers(1, 3), st.integers(0, 3),
       st.sampled_from(["nb_streamlines", "length_mm", "nb_points"]), st.sampled_from(["proportional", "equal"]), numbers)
@example([5, 4, 3, 2], 2, None, None, 1, 0, "nb_streamlines", "equal", 0)  # more subjects than places
@example([5, 4, 3, 2], 2, None, None, 1, 0, "length_mm", "equal", 0)  # no line fits its share
@example([7, 0, 7, 7], 3, 1, 3, 2, 1, "nb_streamlines", "equal", 0)
def test_each_line_once_an_epoch(counts, size, nb_subjects, cycles, passes, epoch, units, budget, seed):
    size = size if units == "nb_streamlines" else 3 * size
    make = lambda: sampler_of(counts, size, None, units, nb_subjects_per_batch=nb_subjects, cycles=cycles if nb_subjects else None, nb_passes=passes, budget_per_subject=budget, seed=seed)
    sampler = make()
    sizes = sampler.line_sizes("training") if units != "nb_streamlines" else [np.ones(n) for n in counts]
    most = min(nb_subjects or len(counts), np.count_nonzero(counts))
    if budget == "equal" and units != "nb_streamlines" and any(counts): most = subjects_that_fit([o for o in sizes if len(o)], size, most)
    for context, times in (("training", passes), ("validation", 1)):
        batches = list(sampler.batches(context, epoch))
        seen = np.array([[s, i] for b in batches for s, ids in b for i in ids], int).reshape(-1, 2)
        assert sorted(map(tuple, seen.tolist())) == [(s, i) for s, n in enumerate(counts) for i in range(n) for _ in range(times)]
        assert len(batches) == sampler.nb_batches(context, epoch) and [b.index for b in batches] == list(range(len(batches)))
        assert [[(s, len(ids)) for s, ids in b] for b in batches] == list(sampler.plan(context, epoch))
        for b in batches:
            filled = [sizes[s][ids].sum() for s, ids in b]
            assert sum(filled) <= size + 1e-9 or b.nb_streamlines == 1
            if budget == "equal": assert max(filled) <= size / most + 1e-9 or b.nb_streamlines == 1 or units == "nb_streamlines" and most > size
            assert 1 <= len(b) <= most and [s for s, _ in b] == sorted({s for s, _ in b})
            assert all(len(ids) and len(set(ids.tolist())) == len(ids) for _, ids in b)  # a line is never twice in a batch, whatever the passes
        other = make()  # random access, from any point, by a sampler that did nothing before
        for start in {len(batches) // 2, max(len(batches) - 1, 0)}:
            assert plain(other.batches(context, epoch, start)) == plain(batches[start:])


@quick
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(1, 60), st.integers(1, 8), numbers)
def test_proportional_batches_are_full_and_alike(counts, size, nb_subjects, seed):
    batches = list(sampler_of(counts, size, seed=seed).batches())
    n = sum(counts)
    assert len(batches) == -(-n // size) and {b.nb_streamlines for b in batches} <= {n // len(batches), -(-n // len(batches))}
    for b in batches:
        taken = dict((s, len(ids)) for s, ids in b)
        assert all(abs(taken.get(s, 0) - c / len(batches)) < 1 for s, c in enumerate(counts))  # of each subject its share, to a line
    few = list(sampler_of(counts, size, seed=seed, nb_subjects_per_batch=nb_subjects).batches())
    assert len(few) <= -(-n // size) + -(-len(counts) // min(nb_subjects, len(counts)))  # one that is not full for each group


@quick
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(2, 30), st.integers(1, 4), st.integers(2, 5), st.sampled_from(["proportional", "equal"]), numbers)
def test_cycles_keep_their_subjects(counts, size, nb_subjects, cycles, budget, seed):
    "Runs of `cycles` batches show no subject that the first batch of the run does not; runs cut short come last."
    who = [{s for s, _ in b} for b in sampler_of(counts, size, seed=seed, nb_subjects_per_batch=nb_subjects, cycles=cycles, budget_per_subject=budget).batches()]
    layout = sampler_of(counts, size, seed=seed, nb_subjects_per_batch=nb_subjects, cycles=cycles, budget_per_subject=budget).epoch_passes("training", 0)[0]
    for run in range(layout.nb_full): assert len(set.union(*who[run * cycles:(run + 1) * cycles])) <= nb_subjects
    assert len(who) - layout.nb_full * cycles < cycles * (len(layout.short) + 1)


@quick
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from(["nb_streamlines", "length_mm", "nb_points"]),
       st.sampled_from(["proportional", "equal"]), st.sampled_from([(None, None), (2, None), (2, 3)]), numbers)
def test_a_line_comes_as_often_as_its_weight_says(counts, units, budget, subjects, seed):
    rng = np.random.default_rng(seed)
    weights = [rng.choice([0., .1, .5, 1, 2, 7.3], n) + 1e-9*(np.arange(n) == 0) for n in counts]
    options = dict(batch_size_units=units, budget_per_subject=budget, nb_subjects_per_batch=subjects[0], cycles=subjects[1], seed=seed % 1000)
    sampler = sampler_of(counts, 40 if units == "nb_streamlines" else 400, line_weights=lambda subset, subject, group: weights[subject], **options)
    assert sampler.repeats
    for epoch in (0, 3):
        drawn = [[] for _ in counts]
        for b in sampler.batches(epoch=epoch):
            mm = sampler.line_sizes("training") if units != "nb_streamlines" else [np.ones(n) for n in counts]
            assert sum(mm[s][ids].sum() for s, ids in b) <= sampler.batch_size("training") + 1e-6 or b.nb_streamlines == 1      # of what was drawn
            for s, ids in b: drawn[s].append(ids)
        for n, w, ids in zip(counts, weights, drawn):
            times, mean = np.bincount(np.concatenate([*ids, np.zeros(0, int)]), minlength=n), w*n/w.sum() if n else w
            assert len(times) == n and times.sum() == n and (times >= np.floor(mean - 1e-9)).all() and (times <= np.ceil(mean + 1e-9)).all()
    once, equal = (sampler_of(counts, 400, line_weights=w, **options) for w in (None, lambda subset, subject, group: np.full(counts[subject], .3)))
    for context in ("training", "validation"): assert plain(once.batches(context)) == plain(equal.batches(context))      # equal weights are none


def test_weights_from_a_study():
    "A key, a registered name and a function are asked for the same; lines that repeat in a batch load as they are; only training batches are weighted."
    study = MultiSubjectDataset(Path(__file__).parent/"data"/"dwi_ml_study"/"study_v1.hdf5", lazy=True).load_data()
    group = study.streamline_groups[0]
    own = [study.training.streamlines_of(s, group).get_dps()["weight"] for s in range(len(study.training))]
    f = lambda subset, subject, group: own[subject][:, 0]
    LINE_WEIGHTS.register("of_the_test", f)
    samplers = [DWIMLBatchIDSampler(study, group, 30, line_weights=w) for w in ("weight", "of_the_test", f)]
    assert [s.params["line_weights"] for s in samplers] == ["weight", "of_the_test", "of_the_test"] and "repeat" in repr(samplers[0])
    assert plain(samplers[0].batches()) == plain(samplers[1].batches()) == plain(samplers[2].batches()) != plain(DWIMLBatchIDSampler(study, group, 30).batches())
    loader = DWIMLBatchLoader(study, ModelSpec(step_size=1.0), group, segment_mm=5.0, off_track_mm=1.0)
    for batch in (*samplers[0].batches(), BatchIds([(0, np.array([3, 1, 3, 3]))])):
        alone = [study.training.get_lines(s, group, [i]).data for s, ids in batch for i in ids]
        assert torch.equal(Ragged.cat([study.training.get_lines(s, group, ids) for s, ids in batch]).data, torch.cat(alone))
        assert len(loader.load_batch_streamlines(batch)) == batch.nb_streamlines
    with pytest.raises(DataProblem, match=f"group {group}: no data per streamline 'wieght'.*Did you mean 'weight'.*LINE_WEIGHTS"): DWIMLBatchIDSampler(study, group, line_weights="wieght")
    with pytest.raises(DataProblem, match=f"subject subj-0., group {group}: the weights of the lines, 'colour', cannot be used.*one number for each of .* lines"):
        list(DWIMLBatchIDSampler(study, group, line_weights="colour").batches())
    study.close()


def test_params_make_the_same_sampler():
    for units in ("nb_streamlines", "length_mm", "nb_points"):
        a = sampler_of([30, 50], 20, 70, units, nb_subjects_per_batch=1, cycles=2, nb_passes=3, budget_per_subject="equal", seed=5)
        b = DWIMLBatchIDSampler(a.dataset, **json.loads(json.dumps(a.params)))
        assert plain(a.batches(epoch=2)) == plain(b.batches(epoch=2))


@pytest.mark.parametrize("budget", ["proportional", "equal"])
def test_memory_does_not_know_the_number_of_lines(budget):
    peaks = []
    for n in (3_000, 3_000_000):  # times 100 subjects
        subset = SimpleNamespace(nb_streamlines=lambda group: np.full(100, n))
        tracemalloc.start()
        sampler = DWIMLBatchIDSampler(SimpleNamespace(streamline_groups=["g"], subset=lambda name: subset), "g", 1000, budget_per_subject=budget)
        assert sampler.nb_batches() == n * 100 // 1000
        for index in (0, sampler.nb_batches() - 1, 77): sampler.batch(index)
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert max(peaks) < 1_000_000 and peaks[1] < 2 * peaks[0]


# ---- the loader, on the toy study

@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "The toy study in memory, and left in its file."
    path = toy_study(tmp_path_factory.mktemp("toy"))
    return [MultiSubjectDataset(path, lazy=lazy).load_data() for lazy in (False, True)]


ids_of = st.tuples(*[st.lists(st.integers(0, 99), max_size=12, unique=True)] * 2)
chances = dict(split_ratio=st.sampled_from([0.0, 0.3, 1.0]), reverse_ratio=st.sampled_from([0.0, 0.5]), segment_mm=st.none() | st.floats(4, 30), widen_mm=st.sampled_from([0.0, 1.0]),
               off_track_mm=st.sampled_from([0.0, 0.8]), noise_mm_forward=st.sampled_from([0.0, 0.1]), noise_mm_loss=st.sampled_from([0.0, 0.1]))


def same(a, b): return torch.equal(a.data, b.data) and torch.equal(a.offsets, b.offsets)


@quick
@given(ids_of, st.fixed_dictionaries(chances), st.sampled_from(["voxmm", "vox"]), numbers)
def test_every_augmentation_replays(studies, ids, options, space, seed):
    spec = ModelSpec(step_size=1.0, streamline_space=space)
    loader, other = (DWIMLBatchLoader(studies[0], spec, "bundles", **options, seed=s) for s in (seed, seed + 1))
    ids = BatchIds([(s, np.array(i, int)) for s, i in enumerate(ids)], "training", 3, seed % 11)
    made = loader.load_batch_streamlines(ids)
    for again in (loader.load_batch_streamlines(ids), other.replay(made.history), DWIMLBatchLoader(studies[1], spec, "bundles", **options).replay(made.history)):
        assert same(again.lines, made.lines) and same(again.targets, made.targets) and dict(again.ids_per_subj) == dict(made.ids_per_subj) and again.history["draws"] == made.history["draws"]
        theirs, ours = other.finish(again), loader.finish(made)  # the noise of a batch travels with it, whoever finishes it
        assert same(theirs.seen, ours.seen) and same(theirs.targets, ours.targets)
    for name, f in (("forward", loader.add_noise_streamlines_forward), ("loss", loader.add_noise_streamlines_loss)):
        moved = (f(*made).data - made.lines.data).abs().max() if len(made.lines) else 0
        assert moved <= 2 * options[f"noise_mm_{name}"] / (2 if space == "vox" else 1) + 1e-5  # 2 mm voxels; float32 at 100 mm


@quick
@given(ids_of, st.floats(0, 1), numbers)
def test_a_split_loses_nothing(studies, ids, ratio, seed):
    ids = BatchIds([(s, np.array(i, int)) for s, i in enumerate(ids)], "training", 0, seed)
    make = lambda r: DWIMLBatchLoader(studies[1], ModelSpec(step_size=1.0), "bundles", split_ratio=r, seed=seed).load_batch_streamlines(ids)
    before, after = make(0.0), make(ratio)
    n = len(before.lines)
    at = after.history["draws"].split if ratio else torch.zeros(n, dtype=torch.long)
    assert torch.equal(after.lines.data, before.lines.data) and set(before.lines.offsets.tolist()) <= set(after.lines.offsets.tolist())
    long_enough = before.lines.lengths > 12
    assert int((at > 0).sum()) <= int(n * ratio) and (bool(long_enough.all()) is False or int((at > 0).sum()) == int(np.floor(n * ratio)))
    cuts = at > 0
    assert not (cuts & ~long_enough).any() and ((at >= 6) & (at < before.lines.lengths - 6))[cuts].all()
    for s, which in before.ids_per_subj.items(): assert torch.equal(before.lines[which].data, after.lines[after.ids_per_subj[s]].data)
    assert len(after.lines) == n + int(cuts.sum()) == sum(w.stop - w.start for w in after.ids_per_subj.values())


@pytest.mark.parametrize("spec", [ModelSpec(nb_points=12), ModelSpec(compress_lines=0.1)])
def test_parts_are_prepared_like_lines(studies, spec):
    "Lines are cut as stored, and each part gets the points that the model wants."
    ids = [(0, np.arange(30)), (1, np.arange(20))]
    make = lambda spec, seed=3: DWIMLBatchLoader(studies[1], spec, "bundles", split_ratio=1.0, seed=seed)
    made, stored, whole = make(spec).load_batch_streamlines(ids), make(ModelSpec()).load_batch_streamlines(ids), studies[1].training.get_lines(0, "bundles", np.arange(30))
    assert len(made) == len(stored) == 2 * 50 and len(whole.data) == len(stored.lines[stored.ids_per_subj[0]].data)  # all of more than 12 points: no point lost
    assert same(made.lines, make(spec).as_model_wants(stored.lines)) and (spec.nb_points is None or set(made.lines.lengths.tolist()) == {12})
    assert same(make(spec, 4).replay(made.history).lines, made.lines)


@quick
@given(ids_of, st.sampled_from([ModelSpec(), ModelSpec(step_size=0.7), ModelSpec(nb_points=9), ModelSpec(compress_lines=0.1), ModelSpec(step_size=1.5, streamline_space="vox", uses_last_point=False)]),
       st.sampled_from(["input", ["wm_mask", "input"]]))
def test_lazy_is_eager_and_workers_sample_the_same(studies, ids, spec, groups):
    ids = [(s, i) for s, i in enumerate(ids)]
    make = lambda study, **kw: DWIMLBatchLoaderOneInput(study, spec, groups, "bundles", split_ratio=0.4, **kw)
    a, b = (make(study).load_batch_streamlines(ids) for study in studies)
    assert same(a.lines, b.lines)
    c = make(studies[1], inputs_in_workers=True).load_batch_streamlines(ids)
    seen = a.lines if spec.uses_last_point else Ragged.from_list([o[:-1] for o in a.lines]) if len(a.lines) else a.lines
    expected = make(studies[0]).load_batch_inputs(seen, a.ids_per_subj)
    assert expected.data.shape[1] == (16 if isinstance(groups, list) else 15)
    torch.testing.assert_close(c.inputs[0].data, expected.data, atol=1e-6, rtol=0)
    assert torch.equal(c.inputs[0].lengths, expected.lengths)


class Ids(Dataset):
    def __getitem__(self, ids): return ids


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_one_worker_is_four(studies):
    "Every batch of an epoch, with everything switched on, made here, by one worker and by four."
    options = dict(split_ratio=0.3, reverse_ratio=0.5, segment_mm=15.0, widen_mm=1.0, off_track_mm=0.8, noise_mm_forward=0.1, inputs_in_workers=True)
    sampler = DWIMLBatchIDSampler(studies[1], "bundles", 25, nb_passes=2)
    loader = DWIMLBatchLoaderOneInput(studies[1], ModelSpec(step_size=1.0, uses_last_point=False), "input", "bundles", **options)
    here = [loader.load_batch_streamlines(ids) for ids in sampler.batches(epoch=2)]
    for workers in (1, 4):
        there = list(DataLoader(Ids(), sampler=sampler.batches(epoch=2), batch_size=None, collate_fn=loader.load_batch_streamlines, num_workers=workers))
        assert len(there) == len(here) == sampler.nb_batches(epoch=2)
        for a, b in zip(here, there):
            assert same(a.lines, b.lines) and same(a.targets, b.targets) and a.history["draws"] == b.history["draws"]
            torch.testing.assert_close(a.inputs[0].data, b.inputs[0].data, atol=1e-6, rtol=0)
            assert same(loader.add_noise_streamlines_forward(*a), loader.add_noise_streamlines_forward(*b)) and dict(a.ids_per_subj) == dict(b.ids_per_subj)


def told_by_a_worker(loader, ids):
    "What is raised here when a worker cannot load the batch."
    with pytest.raises(DataProblem) as told: next(iter(DataLoader(Ids(), sampler=[ids], batch_size=None, collate_fn=loader.load_batch_streamlines, num_workers=1)))
    return str(told.value)


def test_a_worker_names_what_is_wrong(tmp_path):
    path = toy_study(tmp_path)
    with h5py.File(path, "r+") as f:
        lengths = f["sub-01/bundles/lengths"][()]
        lengths[7] = 1
        f["sub-01/bundles/lengths"][...] = lengths
    dataset = MultiSubjectDataset(path, lazy=True).load_data()
    loader = DWIMLBatchLoader(dataset, ModelSpec(step_size=1.0), "bundles")
    said = told_by_a_worker(loader, [(0, [3, 7, 5])])
    assert "subject sub-01, group bundles: 1 lines have fewer than 2 points (ids [7])" in said and "Found: 1 points" in said
    loader.load_batch_streamlines([(0, [3, 5])])
    os.utime(path, (1, 1))  # somebody writes into the study
    assert "has changed" in (said := told_by_a_worker(loader, [(0, [3, 5])])) and str(path) in said
    dataset.close()


def test_a_point_budget_is_never_exceeded():
    "Lengths that a step divides: single precision may make one point more of them."
    rng = np.random.default_rng(0)
    for step in (1.0, 0.5, 0.25):
        mm = [rng.integers(2, 60, 400) * step + rng.normal(0, 2e-5, 400)]
        subset = SimpleNamespace(subjects=["a"], nb_streamlines=lambda group: np.array([400]), streamline_lengths_mm=lambda group: mm)
        sampler = DWIMLBatchIDSampler(SimpleNamespace(streamline_groups=["g"], subset=lambda name: subset), "g", 500, None, "nb_points", step_size=step)
        towards = rng.normal(size=(400, 3)); towards *= (mm[0] / np.linalg.norm(towards, axis=1))[:, None]
        lines = resample_step(Ragged.from_list([torch.from_numpy(100 + np.linspace(0, 1, 30)[:, None] * v).float() for v in towards]), step)
        come = lines.lengths.numpy()
        assert (come <= sampler.line_sizes("training")[0]).all() and (come > np.ceil(mm[0] / step)).any()
        for b in sampler.batches(): assert sum(come[ids].sum() for _, ids in b) <= 500


# ---- several input groups, from training to tracking

@pytest.mark.filterwarnings("ignore")
def test_several_input_groups_train_resume_and_track(studies, tmp_path):
    from dwiml_nb.models.learn2track import Learn2TrackModel
    from dwiml_nb.runs.resume import trainer_from_folder
    from dwiml_nb.runs.track import track_from_model
    from dwiml_nb.training.sinks import read_logs
    from dwiml_nb.training.trainer import DWIMLTrainerOneInput
    torch.manual_seed(0)
    model = Learn2TrackModel(16, step_size=1.0, rnn_layer_sizes=[8], neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=1.0)
    sampler = DWIMLBatchIDSampler(studies[1], "bundles", 3000, 3000, "nb_points", step_size=1.0, nb_subjects_per_batch=1, cycles=2)
    loader = DWIMLBatchLoaderOneInput(studies[1], model, ["input", "wm_mask"], "bundles", split_ratio=0.5, inputs_in_workers=True)
    with pytest.raises(ValueError, match="features"): DWIMLBatchLoaderOneInput(studies[1], model, "input", "bundles")
    DWIMLTrainerOneInput(model, tmp_path, "two", sampler, loader, max_epochs=1, nb_cpu_processes=1, device="cpu").train_and_validate()
    again = trainer_from_folder(tmp_path, "two", new_max_epochs=2, device="cpu")  # from the folder alone: all arguments are in it
    assert again.batch_loader.params == loader.params and again.batch_sampler.params == sampler.params
    again.train_and_validate()
    loss = read_logs(tmp_path / "two")["train_loss"]
    assert len(loss) == 2 and loss[1] < loss[0]
    lines = track_from_model(tmp_path / "two", "sub-04", tmp_path / "out.trk", "seed_mask", nt=20, tracking_mask_group="wm_mask", min_length_mm=2, device="cpu").lines
    assert lines.data.isfinite().all()


# ---- file, study, batch, file

@st.composite
def affines(draw):
    "Oblique, flipped, of unequal voxel sizes, far from the origin."
    rng = np.random.default_rng(draw(numbers))
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn = draw(st.sampled_from(["none", "a little", "any"]))
    q = np.eye(3) if turn == "none" else np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0] if turn == "a little" else q
    flips = np.array(draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)))
    affine = np.eye(4)
    affine[:3, :3] = q * flips * rng.uniform(0.7, 3, 3)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


@settings(quick, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affines(), st.lists(st.sampled_from([2, 3, 17, 400, 5000]), min_size=1, max_size=4), st.sampled_from([np.float32, np.float64, np.int16]), st.sampled_from(["trk", "tck", "trx"]), numbers)
def test_from_file_to_batch_to_file(tmp_path_factory, affine, lengths, dtype, kind, seed):
    folder, rng = tmp_path_factory.mktemp("way"), np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(5, 12, 3))
    grid = Grid(affine, size)
    vox = Ragged.from_lengths(torch.tensor(0.6 + rng.random((sum(lengths), 3)) * (np.array(size) - 1.2)), lengths)  # between the outermost voxel centres
    rasmm = convert(vox, grid, "vox", "rasmm")
    slope = rng.integers(-9, 10, (3, 2))
    ramps = np.indices(size).transpose(1, 2, 3, 0) @ slope + 5  # whole numbers, two features
    (folder / "sub-01").mkdir()
    for i in range(2): nib.save(nib.Nifti1Image(ramps[..., i:i + 1].astype(dtype), affine), folder / "sub-01" / f"ramp{i}.nii.gz")
    save_tractogram(Tractogram(rasmm.to(torch.float32), grid), folder / "sub-01" / f"lines.{kind}")
    config = {"first": dict(type="volume", files="ramp0.nii.gz", standardization="none"), "second": dict(type="volume", files="ramp1.nii.gz", standardization="none"),
              "lines": dict(type="streamlines", files=f"lines.{kind}")}
    study = create_study(folder, folder / "study.hdf5", config, ["sub-01"])
    dataset = MultiSubjectDataset(study.path, lazy=bool(seed % 2)).load_data()
    loader = DWIMLBatchLoaderOneInput(dataset, ModelSpec(), ["first", "second"], "lines")
    order = rng.permutation(len(lengths))
    batch = loader.load_batch_streamlines([(0, order)])
    world = torch.as_tensor(apply_affine(batch.lines.data.double(), batch.history["to_rasmm"][0]))
    expected = rasmm[order.tolist()]
    torch.testing.assert_close(world, expected.data, atol=2e-4, rtol=0)
    # a linear ramp is read exactly: what remains is the position's rounding, times the slope
    values = loader.load_batch_inputs(*batch).data.double()
    exact = (vox[order.tolist()].data - 0.5) @ torch.tensor(slope, dtype=torch.float64) + 5
    torch.testing.assert_close(values, exact, atol=5e-3, rtol=0)
    at_stored = (loader.dataset.training.get_lines(0, "lines", order).data.double() - 0.5) @ torch.tensor(slope, dtype=torch.float64) + 5
    torch.testing.assert_close(values, at_stored, atol=1e-3, rtol=0)
    back = Tractogram(Ragged(world.float(), batch.lines.offsets), grid)
    for out in ("trk", "tck", "trx"):
        save_tractogram(back, folder / f"back.{out}")
        again = load_tractogram(folder / f"back.{out}", reference=grid).lines
        assert torch.equal(again.lengths, expected.lengths)
        torch.testing.assert_close(again.data.double(), expected.data, atol=3e-4, rtol=0)
    dataset.close()


def test_plain_lists_count_as_the_first_training_batch():
    assert (slices_of([(0, [1, 2])]).subset, slices_of([(0, [1, 2])]).index) == ("training", 0)
