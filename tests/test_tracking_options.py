"""Each option of the tracker: what it promises, with the default options as they were, and refused in a sentence where it makes no sense."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dwiml_nb.batch.inputs import InputsAt
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import spec_of
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.core import sizes
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import directions, lengths_of
from dwiml_nb.core.space import Grid, convert
from dwiml_nb.core.tractograms import load_tractogram
from dwiml_nb.core.volume import neighborhood_vectors, sample_trilinear
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.directions.base import DIRECTION_GETTERS, DirectionGetter
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.propagate import Walk, line_draws
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.stops import StopRule
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

SHAPE = (30, 24, 20)


def dataset_of(sizes=(2.0, 2, 2), **volumes):
    "One subject in memory, with a smooth field to follow."
    grid = Grid(np.diag([*sizes, 1.0]), SHAPE)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    field = torch.tensor(np.stack([1 + 0*x, .8*np.sin(4*x + y), .5*np.cos(3*x - z)], -1)).float()
    volumes = {"input": field, "mask": torch.tensor(x**2 + y**2 + z**2 < .8).float()[..., None], **volumes}
    subset = SimpleNamespace(name="testing", subjects=["sub-01"], grid=lambda s, g: grid, get_volume=lambda s, g, device="cpu": volumes[g])
    features = {name: volume.shape[3] for name, volume in volumes.items()}
    return SimpleNamespace(volume_groups=list(volumes), nb_features=features, testing=subset, training=None, validation=None), grid


class Follows:
    "Follows the field, by its own length where asked for."
    step_size, neighborhood_vectors, nb_previous_dirs, training, has_step_length = 1.0, None, 1, False, True
    device = torch.device("cpu")
    def __init__(self, space="voxmm", length=1.0): self.streamline_space, self.length, self.told = space, length, []
    def train(self, mode=True): return self
    def tracking_step(self, inputs, previous_dirs, state=None):
        self.told.append(previous_dirs)
        dirs = self.length*inputs/inputs.norm(dim=1, keepdim=True)
        return torch.where((dirs*previous_dirs).sum(1, keepdim=True) < 0, -dirs, dirs), state
    def select_state(self, state, keep): return state
    def warm_up(self, inputs, lines): return None
    def get_tracking_directions(self, outputs, algo="det", eos_threshold=None, previous_dirs=None, draws=None): return outputs


def seeds(grid, n=60): return convert((torch.rand(n, 3, generator=torch.Generator().manual_seed(5))*.7 + .15)*torch.tensor(SHAPE), grid, "vox", "rasmm")


def tracked(model=None, n=60, mask="mask", sizes=(2.0, 2, 2), volumes={}, **options):
    dataset, grid = dataset_of(sizes, **volumes)
    return Tracker(model or Follows(), dataset, "sub-01", "input", mask, **{"min_length_mm": 0, **options}).track(seeds(grid, n), quiet=True)


# ---- forward only

@pytest.mark.parametrize("space", ["voxmm", "vox"])
def test_forward_only_is_the_first_half(space):
    whole, half = tracked(Follows(space), max_length_mm=500), tracked(Follows(space), max_length_mm=500, forward_only=True)
    of = {tuple(s.tolist()): line for s, line in zip(whole.info["seeds"], whole.lines)}
    assert len(half) > 20 and half.info["stop_names"][-1] == "seed" and set(half.info["stop_reasons"][:, 1].tolist()) == {len(half.info["stop_names"]) - 1}
    for seed, line in zip(half.info["seeds"], half.lines):
        assert torch.equal(of[tuple(seed.tolist())][-len(line):], line)
        torch.testing.assert_close(line[0], seed, atol=1e-4, rtol=0)
    assert half.info["reasons"]["end"] == whole.info["reasons"]["end"] and half.info["reasons"]["start"] == {"seed": 60}


def test_forward_only_with_a_rule_and_its_progress():
    "A rule's code stays what it is; each line is completed once; steps are told."
    class Rule(StopRule):
        name = "here"
        def __call__(self, walk, positions, codes, state): return torch.where((codes == 0) & (positions[:, 0] > 40), walk.code("here"), codes), state
    told = []
    dataset, grid = dataset_of()
    tracker = Tracker(Follows(), dataset, "sub-01", "input", "mask", stop_rules=Rule, forward_only=True, min_length_mm=0)
    ends = []
    lines, codes = tracker.track_batch(convert(seeds(grid), grid, "rasmm", "voxmm"), torch.arange(60), lambda *o: told.append(len(o[0])), ends.append)
    assert sum(ends) == 60 == told[0] and len(lines) == 60 and (codes[:, 0] == 6).any() and (codes[:, 1] == 7).all()


# ---- the mask

def test_a_trilinear_mask_is_scipys():
    "Inside where the interpolated value is at least 1/2, voxel centres at i + 1/2."
    from scipy.ndimage import map_coordinates
    dataset, grid = dataset_of()
    mask = dataset.testing.get_volume(0, "mask")
    walk = Walk(None, InputsAt(dataset.testing, 0, {"": ["input"]}, spec_of(Follows()), grid), grid, mask, mask_interp="trilinear")
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1))*torch.tensor(SHAPE)*2
    value = map_coordinates(mask[..., 0].numpy(), (points/2 - .5).T.numpy(), order=1, mode="nearest")
    inside = (walk.leaving(points) == 0).numpy()
    sure = np.abs(value - .5) > 1e-5
    assert np.array_equal(inside[sure], value[sure] > .5) and 500 < inside.sum() < 3500
    nearest = walk.leaving(points), Walk(None, walk.inputs_at, grid, mask).leaving(points)
    assert .003 < (nearest[0] != nearest[1]).float().mean() < .2


def test_lines_stay_in_a_trilinear_mask():
    dataset, grid = dataset_of()
    for keep in (False, True):
        lines = tracked(mask_interp="trilinear", keep_last_point=keep).lines
        value = sample_trilinear(dataset.testing.get_volume(0, "mask"), convert(lines, grid, "rasmm", "vox").data)[:, 0]
        assert bool((value > .499).all()) is not keep and len(lines) > 20


@pytest.mark.parametrize("half_voxel", [False, True])
def test_a_mask_is_in_its_place_for_a_model_of_dwi_ml(half_voxel):
    model = Follows()
    model.legacy_half_voxel = half_voxel
    dataset, grid = dataset_of()
    walk = Tracker(model, dataset, "sub-01", "input", "mask", mask_interp="trilinear").walk
    mask = dataset.testing.get_volume(0, "mask")
    centres = (torch.tensor(np.argwhere(mask[..., 0].numpy() >= 0)) + .5).float()*2
    assert torch.equal(walk.leaving(centres) == 0, mask.flatten() >= .5) and walk.inputs_at.spec.legacy_half_voxel is half_voxel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_masks_of_any_type_and_holes(dtype):
    mask = torch.ones(*SHAPE, 1)
    mask[20:] = math.nan
    lines = tracked(volumes=dict(mask=mask.to(dtype)), mask_interp="trilinear").lines
    assert len(lines) > 20 and lines.data[:, 0].max() < 40 - 2 + 1e-3       # NaN in a corner of the eight is outside


# ---- compression

def from_polyline(points, corners):
    "The largest distance of points from a polyline."
    a, b = corners[:-1, None].double(), corners[1:, None].double()
    t = (((points.double() - a)*(b - a)).sum(2)/((b - a)**2).sum(2)).clamp(0, 1)
    return (a + t[..., None]*(b - a) - points.double()).norm(dim=2).min(0).values.max()


@pytest.mark.parametrize("tolerance", [.01, .1, 1.])
@pytest.mark.parametrize("sizes", [(2., 2, 2), (1., 2, 3)])
def test_a_compressed_line_is_within_its_tolerance(tolerance, sizes):
    "Of the line without compression: its points lie no further off, its own are among them, the ends are the same."
    whole, few = tracked(sizes=sizes), tracked(sizes=sizes, compress=tolerance)
    assert torch.equal(whole.info["seeds"], few.info["seeds"]) and torch.equal(whole.info["stop_reasons"], few.info["stop_reasons"]) and len(whole) > 20
    for a, b in zip(whole.lines, few.lines):
        assert from_polyline(a, b) <= tolerance + 1e-4 and torch.cdist(b, a, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-4
        torch.testing.assert_close(b[[0, -1]], a[[0, -1]], atol=1e-4, rtol=0)
    assert len(few.lines.data) < len(whole.lines.data)*(.95 if tolerance < .1 else .5)


def test_compression_depends_on_no_other_line():
    all_, small = tracked(compress=.1), tracked(compress=.1, batch_size=7)
    assert torch.equal(all_.lines.data, small.lines.data) and torch.equal(all_.lines.offsets, small.lines.offsets)


def test_lengths_are_those_of_the_lines_as_they_are_saved(tmp_path):
    lines = tracked(compress=2., min_length_mm=20, max_length_mm=40)
    assert lengths_of(lines.lines).min() >= 20 - 2e-3 and lengths_of(lines.lines).max() <= 40.01
    kept = lengths_of(tracked(min_length_mm=20, max_length_mm=40).lines) >= 20
    assert 0 < len(lines) <= int(kept.sum()) and len(lines) + sum(lines.info["dropped"].values()) == 60


def test_only_what_is_saved_is_held():
    "Batches that are done are held as they will be saved: compressed, without the short ones."
    held = []
    dataset, grid = dataset_of()
    tracker = Tracker(Follows(), dataset, "sub-01", "input", "mask", compress=.2, min_length_mm=30, batch_size=10)
    finished = tracker.finished
    tracker.finished = lambda lines, codes: held.append((len(lines.data), *finished(lines, codes))) or held[-1][1:]
    lines = tracker.track(seeds(grid), quiet=True)
    assert len(held) == 6 and sum(len(o[1].data) for o in held) == len(lines.lines.data) < sum(o[0] for o in held)/4


# ---- steps of the model's own length

@pytest.mark.parametrize("space,length,mm", [("voxmm", .7, .7), ("vox", .7, 1.4)])
def test_raw_steps_are_in_mm_whatever_the_space(space, length, mm):
    model = Follows(space, length)
    lines = tracked(model, step_mm=0, max_length_mm=25).lines
    torch.testing.assert_close(directions(lines).data.norm(dim=1), torch.full((len(lines.data) - len(lines),), mm), atol=1e-4, rtol=0)
    assert 25 - mm < lengths_of(lines).max() <= 25.001
    told = torch.cat([o[o.any(1)] for o in model.told]).norm(dim=1)
    torch.testing.assert_close(told, torch.full_like(told, length), atol=1e-4, rtol=0)         # in the model's own unit
    torch.testing.assert_close(lines.data, tracked(Follows(space, length), step_mm=mm, max_length_mm=25).lines.data, atol=2e-3, rtol=0)


@pytest.mark.parametrize("length", [0., 1e-6, 400.])
def test_steps_of_nothing_and_of_everything_end(length):
    lines = tracked(Follows(length=length), step_mm=0, max_length_mm=2., n=9)
    assert len(lines.lines.data) <= 9*202 and (not len(lines) or lengths_of(lines.lines).max() <= 2.01)
    assert set(lines.info["reasons"]["end"]) <= {"angle", "length", "mask", "volume"}


def test_a_lone_seed_sets_out_as_far_the_other_way():
    "Where the first step is too sharp for a rule, the second half begins with the opposite of it, as long as it was."
    mask = torch.ones(*SHAPE, 1)
    class Once(StopRule):
        def begin(self, positions): return torch.zeros(len(positions))
        def __call__(self, walk, positions, codes, state): return torch.where(positions[:, 0] > 31, walk.code("mask"), codes), state
    dataset, grid = dataset_of(mask=mask)
    tracker = Tracker(Follows(length=1.7), dataset, "sub-01", "input", step_mm=0, stop_rules=Once, min_length_mm=0, max_length_mm=1.8)
    line, = tracker.track(convert(torch.tensor([[15.4, 12, 10]]), grid, "vox", "rasmm"), quiet=True).lines
    assert len(line) == 2 and (line[1] - line[0]).norm() == pytest.approx(1.7, abs=1e-4)


class LengthDG(DirectionGetter):
    "Learns the whole step."
    has_step_length, nb_draws = True, 7
    def direction_terms(self, rows, dirs): return (rows - dirs.data).norm(dim=1)
    def det_directions(self, rows): return rows
    def prob_directions(self, rows, draws):
        LengthDG.drawn = draws
        return rows + draws[:, 4:7].to(rows) - .5


@pytest.fixture
def length_getter(monkeypatch): monkeypatch.setitem(DIRECTION_GETTERS.entries, "length", LengthDG)


def test_heads_that_learn_no_length_are_refused(length_getter):
    dataset, _ = dataset_of()
    make = lambda step_mm=0, more={}, **options: Tracker(Learn2TrackModel(3, rnn_layer_sizes=[3], step_size=1., **options), dataset, "sub-01", "input", step_mm=step_mm, **more)
    for options in ({}, dict(dg_key="sphere-classification"), dict(dg_key="length", dg_args=dict(axis_head=True))):
        with pytest.raises(ValueError, match="Learn2TrackModel have no length in mm. Expected.*Give step_mm"): make(**options)
        make(1., **options)
    make(dg_key="length")
    for key in ("l2-regression", "cosine-plus-l2-regression", "gaussian", "gaussian-mixture"):
        make(dg_key=key)
        with pytest.raises(ValueError, match="have no length in mm"): make(dg_key=key, dg_args=dict(normalize_targets=1.))
    for key in ("fisher-von-mises", "smooth-sphere-classification"):
        with pytest.raises(ValueError, match="have no length in mm"): make(dg_key=key)
    with pytest.raises(ValueError, match="peaks:input says nothing of a length"): make(dg_key="length", more=dict(first_direction="peaks:input"))
    assert spec_of(SimpleNamespace()).has_step_length is False


def test_as_many_draws_as_a_getter_takes(length_getter):
    dataset, grid = dataset_of()
    torch.manual_seed(0)
    model = Learn2TrackModel(3, rnn_layer_sizes=[3], step_size=1., dg_key="length").eval()
    assert spec_of(model).nb_draws == 7 and spec_of(Learn2TrackModel(3, step_size=1.)).nb_draws == 4
    options = dict(algo="prob", min_length_mm=0, max_length_mm=5, theta_deg=180)
    a, b = (Tracker(model, dataset, "sub-01", "input", batch_size=n, **options).track(seeds(grid, 12), quiet=True) for n in (None, 5))
    torch.testing.assert_close(a.lines.data, b.lines.data, atol=1e-3, rtol=0)
    assert LengthDG.drawn.shape[1] == 7
    lines = torch.arange(9)
    assert torch.equal(line_draws(3, lines, 2, 7)[:, :4], line_draws(3, lines, 2))          # what was drawn before stays


# ---- seeds

def test_skipped_seeds_are_those_of_another_run():
    mask = np.random.default_rng(0).random((7, 6, 5)) > .5
    whole = seeds_from_mask(mask, np.eye(4), nt=500, seed=2**63 + 7)
    for n in (1, 17, 499): assert torch.equal(torch.cat([seeds_from_mask(mask, np.eye(4), nt=n, seed=2**63 + 7), seeds_from_mask(mask, np.eye(4), nt=500 - n, seed=2**63 + 7, skip=n)]), whole)
    per_voxel = seeds_from_mask(mask, np.eye(4), npv=3)
    assert torch.equal(seeds_from_mask(mask, np.eye(4), npv=3, skip=20), per_voxel[20:])
    for skip in (len(per_voxel), -1, .5, None, "1"):
        with pytest.raises(ValueError, match="skip"): seeds_from_mask(mask, np.eye(4), npv=3, skip=skip)


@pytest.mark.parametrize("algo", ["det", "prob"])
def test_two_runs_make_up_one(algo):
    dataset, grid = dataset_of()
    torch.manual_seed(0)
    model = Learn2TrackModel(3, "gru", [4], nb_previous_dirs=1, dg_key="sphere-classification", dg_args=dict(sphere="repulsion100"), step_size=1.).eval()
    track = lambda seeds, first: Tracker(model, dataset, "sub-01", "input", "mask", algo=algo, theta_deg=180, min_length_mm=0, max_length_mm=20,
                                         batch_size=15).track(seeds, quiet=True, first_number=first)
    at = seeds(grid)
    whole, parts = track(at, 0), [track(at[:30], 0), track(at[30:], 30)]
    assert torch.equal(torch.cat([o.lines.data for o in parts]), whole.lines.data) and len(whole) > 20
    assert torch.equal(torch.cat([o.info["stop_reasons"] for o in parts]), whole.info["stop_reasons"])
    if algo == "prob": assert not torch.equal(track(at[30:], 0).lines.data, parts[1].lines.data)


# ---- memory

def test_points_that_do_not_fit_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda device="cpu": 2 << 30)
    model = Follows()
    for options in (dict(max_length_mm=1e8), dict(step_mm=1e-6), dict(max_length_mm=1e8, forward_only=True)):
        with pytest.raises(DataProblem, match=r"no memory for 60 lines of up to \d+ points at a time.*which are free.*smaller batch_size"): tracked(model, **options)
    assert not model.told
    assert len(tracked(model, step_mm=0, max_length_mm=1e8, n=20))           # here memory is asked for as it is needed


class Wide(Follows):
    neighborhood_vectors = neighborhood_vectors("grid")
    def tracking_step(self, inputs, *args): return super().tracking_step(inputs[:, :3], *args)


def test_inputs_along_first_halves_that_do_not_fit_are_refused(monkeypatch):
    "The largest of all buffers: the model reads the first halves of a batch backwards, at once."
    monkeypatch.setattr(sizes, "UNASKED", 0)
    monkeypatch.setattr(sizes, "free_memory", lambda device="cpu": 100_000)
    with pytest.raises(DataProblem, match=r"no memory for 81 features along \d+ points.*which are free.*smaller batch_size"): tracked(Wide(), max_length_mm=60)
    assert len(tracked(Wide(), max_length_mm=60, batch_size=4)) > 20 and len(tracked(Wide(), max_length_mm=60, forward_only=True)) > 20


def test_raw_steps_ask_for_memory_on_the_way(monkeypatch):
    asked = []
    monkeypatch.setattr("dwiml_nb.tracking.propagate.need_memory", lambda nbytes, *words: asked.append(nbytes))
    tracked(Follows(length=.05), step_mm=0, n=20)
    assert len(asked) > 6 and max(asked) <= 12*256*20


# ---- what makes no sense

@pytest.mark.parametrize("options,words", [
    (dict(compress=0), "compress is a number > 0 in mm"), (dict(compress=math.nan), "compress is"), (dict(compress=True), "compress is"), (dict(step_mm=-1), "step_mm is a number >= 0 in mm"),
    (dict(mask_interp="linear"), "mask_interp is 'nearest' or 'trilinear', found 'linear'")])
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words): tracked(**options)


def test_a_first_number_is_whole():
    dataset, grid = dataset_of()
    for number in (-1, 1.5, "a"):
        with pytest.raises(ValueError, match="first_number"): Tracker(Follows(), dataset, "sub-01", "input").track(seeds(grid), first_number=number)


def test_lines_of_no_seed():
    for options in ({}, dict(forward_only=True), dict(compress=.1), dict(step_mm=0)): assert len(tracked(n=0, **options)) == 0


# ---- from an experiment

@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    dataset = MultiSubjectDataset(toy_study(folder)).load_data()
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], "gru", [8], step_size=1., nb_previous_dirs=1, dg_args=dict(axis_head=True))
    sampler, loader = DWIMLBatchIDSampler(dataset, "bundles", 40), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    trainer = DWIMLTrainerOneInput(model, folder/"experiments", "e", sampler, loader, max_epochs=1, learning_rates=[1e-2], device="cpu")
    trainer.train_and_validate()
    return trainer.experiment_folder


def by_command(experiment, out, *words):
    run_command(dwiml_track_from_model, [str(experiment), "sub-04", str(out), "seed_mask", "--tracking_mask_group", "wm_mask", "--nt", "60", "--min_length", "2", "--theta", "180",
                                         "--device", "cpu", *words])
    return load_tractogram(out)


def test_the_options_of_the_command(experiment, tmp_path):
    whole = by_command(experiment, tmp_path/"a.trk")
    for number, (words, check) in enumerate({
            "--compress": lambda o: len(o.lines.data) < len(whole.lines.data) and len(o) == len(whole), "--compress 3": lambda o: len(o.lines.data) < .5*len(whole.lines.data),
            "--track_forward_only": lambda o: len(o.lines.data) < len(whole.lines.data), "--mask_interp trilinear": lambda o: len(o.lines.data) != len(whole.lines.data),
            "--mask_interp nearest --step_size 1": lambda o: np.array_equal(o.lines.data, whole.lines.data), "--skip 30": lambda o: len(o)}.items()):
        assert check(by_command(experiment, tmp_path/f"{number}.trk", *words.split())), words
    with pytest.raises(SystemExit, match="have no length in mm"): by_command(experiment, tmp_path/"b.trk", "--step_size", "0")
    np.save(tmp_path/"seeds.npy", seeds := whole.lines.data[::9].numpy())
    with pytest.raises(SystemExit, match=f"skip is a whole number from 0 to {len(seeds) - 1}|skip"): by_command(experiment, tmp_path/"b.trk", "--in_custom_seeds", str(tmp_path/"seeds.npy"), "--skip", "100000")


@pytest.mark.parametrize("kind", ["trk", "trx"])
def test_seeds_are_saved_with_their_lines(experiment, tmp_path, kind):
    "In voxels, centre origin, as dwi_ml does; in compressed and in forward lines too."
    for words in ((), ("--compress", "--track_forward_only")):
        lines = by_command(experiment, tmp_path/f"{len(words)}.{kind}", "--save_seeds", *words)
        at = convert(torch.tensor(lines.dps["seeds"]).float(), lines.grid, "vox_center", "rasmm")
        assert at.shape == (len(lines), 3) and len(lines) > 10
        for seed, line in zip(at, lines.lines): assert (from_polyline(seed[None], line) if len(words) == 0 else (line[0] - seed).norm()) < 1e-3
    with pytest.raises(SystemExit, match="a .tck file cannot keep seeds"): by_command(experiment, tmp_path/"a.tck", "--save_seeds")


@pytest.fixture
def one_thread():
    "Each of several processes has one thread; with more, the last bits of products may differ."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_processes_track_what_one_process_does(experiment, tmp_path, one_thread):
    options = dict(nt=60, tracking_mask_group="wm_mask", theta_deg=180, min_length_mm=2, device="cpu", batch_size=25, compress=.1)
    one, two = (track_from_model(experiment, "sub-04", tmp_path/f"{n}.trx", "seed_mask", processes=n, **options) for n in (1, 2))
    assert torch.equal(one.lines.data, two.lines.data) and torch.equal(one.info["stop_reasons"], two.info["stop_reasons"]) and one.info["dropped"] == two.info["dropped"]
    with pytest.raises(DataProblem, match="no subject 'sub-99'"): track_from_model(experiment, "sub-99", tmp_path/"c.trx", "seed_mask", processes=2, device="cpu")


def test_what_other_processes_cannot_have_is_tracked_here(experiment, tmp_path):
    class Rule(StopRule):
        def __call__(self, walk, positions, codes, state): return codes, state
    with pytest.warns(UserWarning, match="Rule: other processes cannot have what is defined in a notebook's cell or in a function, so one process tracks"):
        track_from_model(experiment, "sub-04", tmp_path/"a.trx", "seed_mask", nt=5, processes=2, device="cpu", stop_rules=Rule)
