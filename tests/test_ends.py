"""Where a line ends: which rows have the label, in training and in tracking; how a model learns it."""
import pytest
import torch
import torch.nn.functional as F

from dwiml_nb.batch.augment import Augmentation, augment, draw, points_left
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.order import keyed_rng
from dwiml_nb.batch.sampler import BatchIds
from dwiml_nb.batch.spec import spec_of
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import reverse
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import convert
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcAndTgtModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.propagate import propagate
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


def learn2track(nb_features, eos=True, points=dict(step_size=1.0), **more):
    return Learn2TrackModel(nb_features, rnn_key="gru", rnn_layer_sizes=[4], nb_previous_dirs=1, dg_args=dict(add_eos=eos), **points, **more)


def labels_of(spec, model, batch):
    "What the loss of a finished batch wants of each row's end: the sign of the gradient where the model is undecided."
    rows = torch.zeros(len(batch.seen.data), 4).index_fill(1, torch.tensor(0), 1.).requires_grad_()
    spec.loss(model, batch.seen.with_data(rows), spec.form(batch.targets), batch.ends, batch.left)[0].backward()
    assert (rows.grad[:, 3] != 0).all()
    return rows.grad[:, 3] < 0


CUTS = {"whole": {}, "turned": dict(reverse_ratio=.5), "segments": dict(segment_mm=9.), "split": dict(split_ratio=.5),
        "all": dict(split_ratio=.5, segment_mm=9., reverse_ratio=.5, widen_mm=2., off_track_mm=.8),
        "off track": dict(off_track_mm=.8, reverse_ratio=.5), "noise": dict(noise_mm_forward=.3, noise_mm_loss=.1)}
POINTS = {"step": dict(step_size=1.), "points": dict(nb_points=12), "compressed": dict(compress_lines=.02, dg_key="l2-regression"), "as stored": dict(), "voxels": dict(step_size=1., streamline_space="vox")}
EQUIDISTANT = {"segments", "all", "off track"}


@pytest.mark.parametrize("cuts,points", [(c, p) for c in CUTS for p in POINTS if "step_size" in POINTS[p] or c not in EQUIDISTANT])
def test_only_the_last_point_of_a_streamline_has_the_label(dataset, cuts, points):
    "Cuts of segments and splits go on: the row of a last point has the label where it is an end of a stored line, whichever way it is walked."
    model = learn2track(dataset.nb_features["input"], points=POINTS[points])
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", **CUTS[cuts])
    chosen = BatchIds([(0, list(range(0, 120, 3))), (1, [5, 7])], "training", 0, 0)
    batch = loader.finish(loader.load_batch_streamlines(chosen))
    plain = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles").load_batch_streamlines(chosen)  # whole, as stored
    batch.draws.sigma_mm = batch.draws.shift_mm = None  # the same cuts, where they were
    walked = loader.load_batch_streamlines(chosen, batch.draws).lines
    firsts, lasts = walked.data[walked.offsets[:-1]], walked.data[walked.offsets[1:] - 1]
    tips = torch.cat([plain.lines.data[plain.lines.offsets[:-1]], plain.lines.data[plain.lines.offsets[1:] - 1]])
    found = torch.stack([((p[:, None] - tips).norm(dim=2) < 1e-4).any(1) for p in (firsts, lasts)], 1)
    assert torch.equal(batch.ends, found) and found.any() and (cuts in ("whole", "turned", "off track", "noise")) == bool(found.all())
    label = labels_of(spec_of(model), model, batch)
    wanted = torch.zeros(len(walked.data), dtype=torch.bool).index_fill(0, (walked.offsets[1:] - 1)[batch.ends[:, 1]], True)
    assert torch.equal(label, wanted)
    if "step_size" in POINTS[points]:  # what was cut off, counted in points
        at, whole = (walked.data[:, None] - plain.lines.data).norm(dim=2).argmin(1), plain.lines
        before = whole.point_index[at]
        after = whole.lengths.repeat_interleave(whole.lengths)[at] - 1 - before
        first, last = walked.offsets[:-1], walked.offsets[1:] - 1
        onward = before[first] < before[last]
        assert torch.equal(batch.left, torch.stack([torch.where(onward, before[first], after[first]), torch.where(onward, after[last], before[last])], 1))


def test_lines_that_are_not_training_are_whole(dataset):
    model = learn2track(dataset.nb_features["input"])
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", split_ratio=1., segment_mm=5.)
    batch = loader.finish(loader.load_batch_streamlines(BatchIds([(0, [0, 1, 2])], "validation", 0, 0)))
    assert batch.ends.all() and int(labels_of(spec_of(model), model, batch).sum()) == 3


# ---- what helps to learn ends: segments that reach them, points that count as ends, what lies beyond

def test_segments_reach_ends_of_their_lines(dataset):
    "A share of the segments holds an end at any place of the segment; without the option nothing is drawn, and the record has no word of it."
    model, chosen = learn2track(dataset.nb_features["input"]), BatchIds([(0, list(range(100)))], "training", 0, 0)
    make = lambda **more: DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", segment_mm=9., reverse_ratio=.5, **more)
    load = lambda loader: loader.load_batch_streamlines(chosen)
    plain, same, many = load(make()), load(make(ends_ratio=0., beyond_mm=0.)), load(make(ends_ratio=.8))
    assert torch.equal(plain.lines.data, same.lines.data) and plain.draws == same.draws and plain.history["made_by"] == same.history["made_by"]
    assert not {"ends_ratio", "beyond_mm"} & set(make().params) and make(ends_ratio=.8, beyond_mm=2.).params["beyond_mm"] == 2.
    assert (plain.ends.any(1).float().mean() < .35) and (.7 < many.ends.any(1).float().mean() < .95)
    lengths = many.lines.lengths[many.ends[:, 1]]
    assert lengths.min() >= 2 and lengths.max() <= 10 and lengths.unique().numel() > 5
    with pytest.raises(ValueError, match="give segment_mm too"): DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", ends_ratio=.5)
    for wrong in (dict(ends_ratio=1.5), dict(beyond_mm=-1.), dict(beyond_mm=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(wrong))): make(**wrong)


@pytest.mark.parametrize("space", ["voxmm", "vox"])
def test_lines_go_on_beyond_real_ends(dataset, space):
    "Only where the last point is a real end; what lies beyond counts as ended, has no direction to learn, and the rest of the batch is what it was."
    model, chosen = learn2track(dataset.nb_features["input"], points=dict(step_size=1., streamline_space=space)), BatchIds([(0, list(range(50)))], "training", 0, 0)
    make = lambda **more: DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", segment_mm=9., reverse_ratio=.5, ends_ratio=.5, **more)
    plain, loader = make().load_batch_streamlines(chosen), make(beyond_mm=3.)
    longer = loader.load_batch_streamlines(chosen)
    assert torch.equal(longer.ends, plain.ends) and torch.equal(longer.left, plain.left - 3*F.pad(plain.ends[:, 1:], (1, 0)))
    for was, now, real in zip(plain.lines.unbind(), longer.lines.unbind(), plain.ends[:, 1]):
        assert torch.allclose(now[:len(was)], was, atol=1e-4) and len(now) == len(was) + 3*real
        assert torch.allclose(now.diff(dim=0)[len(was) - 2:], (was[-1] - was[-2]).expand(1 + 3*real, 3), atol=1e-4)
    batch = loader.finish(longer)
    label = labels_of(spec_of(model), model, batch)
    wanted = (longer.lines.point_index >= (plain.lines.lengths - 1).repeat_interleave(longer.lines.lengths)) & longer.ends[:, 1].repeat_interleave(longer.lines.lengths)
    assert torch.equal(label, wanted) and label.any()
    rows = torch.randn(len(label), 4).requires_grad_()
    spec_of(model).loss(model, batch.seen.with_data(rows), batch.targets, batch.ends, batch.left)[0].backward()
    cut = torch.zeros_like(label).index_fill(0, (longer.lines.offsets[1:] - 1)[~longer.ends[:, 1]], True)
    assert torch.equal(rows.grad[:, :3].any(1), ~label & ~cut)
    assert torch.equal(loader.replay(longer.history).lines.data, longer.lines.data)
    with pytest.raises(DataProblem, match="beyond_mm"): make().replay(longer.history)
    valid = loader.load_batch_streamlines(BatchIds([(0, [0, 1])], "validation", 0, 0))
    assert not valid.left.any()
    with pytest.raises(ValueError, match="learn where lines end"): DWIMLBatchLoaderOneInput(dataset, learn2track(dataset.nb_features["input"], eos=False), "input", "bundles", beyond_mm=3.)


@pytest.mark.parametrize("key", ["cosine-regression", "sphere-classification"])
@pytest.mark.parametrize("left,labels", [(0, "00001"), (3, "00000"), (-2, "00111"), (-9, "11111")])
def test_rows_where_lines_have_ended(key, left, labels):
    "Each of them has one answer, the end, which may weigh more; with the default weight, and no points beyond, nothing changes."
    torch.manual_seed(0)
    getter, heavy = (direction_getter(key, 6, add_eos=True, **more) for more in ({}, dict(eos_pos_weight=3.)))
    lines, left = Ragged.from_list([torch.randn(5, 3).cumsum(0), torch.randn(4, 3).cumsum(0)]), torch.tensor([[0, left], [0, 20]])
    rows = torch.randn(9, getter.nb_columns + 1, requires_grad=True)
    getter.compute_loss(rows, lines, left=left)[0].backward()
    wanted = torch.tensor([o == "1" for o in labels + "0000"])
    end = getter.nb_columns
    if key == "cosine-regression":
        assert torch.equal(rows.grad[:, end] < 0, wanted)
        assert torch.equal(rows.grad[:, :end].any(1), ~wanted & torch.tensor([True]*4 + [False] + [True]*3 + [False]))
    else:  # the last row of a cut has no answer
        cut = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([8] + [4]*int(left[0, 1] > 0)), True)
        assert torch.equal(rows.grad[:, end] < 0, wanted) and torch.equal(rows.grad.any(1), ~cut)
    per_row = getter.compute_loss(rows, lines, average_results=False, left=left)[0].data
    assert bool((per_row[wanted] > 0).all())
    if left[0, 1] >= 0: assert torch.equal(per_row, getter.compute_loss(rows, lines, average_results=False, ends=left == 0)[0].data)
    more = heavy.compute_loss(rows, lines, average_results=False, left=left)[0].data
    assert torch.equal(more[~wanted], per_row[~wanted]) and torch.allclose(more[wanted], 3*per_row[wanted])
    for wrong in (0, float("nan"), -1.):
        with pytest.raises(ValueError, match="eos_pos_weight"): direction_getter(key, 6, add_eos=True, eos_pos_weight=wrong)


def learned_ends(key, beyond=0, **options):
    "P(end) at ends and at the 95th percentile far from them, along unseen lines whose ends two noisy features show, after a second of training."
    torch.manual_seed(1)
    getter = {k: options.pop(k) for k in ("eos_pos_weight", "sphere") if k in options}
    head, options = direction_getter(key, 24, add_eos=True, **getter), Augmentation(segment_mm=20., reverse_ratio=.5, **options)
    optimizer = torch.optim.Adam(head.parameters(), .02)
    def straight(n):
        size = torch.randint(100, 140, (n,)).tolist()
        return Ragged.from_list([F.pad(torch.arange(k)[:, None] - (k - 1)/2, (0, 2)) for k in size]), torch.tensor(size)
    def rows_of(lines, size):
        x, half = lines.data[:, 0], size.repeat_interleave(lines.lengths)/2
        onward = (lines.data[lines.offsets[1:] - 1, 0] - lines.data[lines.offsets[:-1], 0]).sign().repeat_interleave(lines.lengths)
        return head(torch.stack([*(torch.sigmoid(side*x - half) + .1*torch.randn(len(x)) for side in (-1, 1)), onward], 1).repeat(1, 8))
    whole, size = straight(50)
    for batch in range(120):
        draws = draw(whole.lengths, options, 1., keyed_rng(5, batch))
        left = points_left(whole.lengths, draws)
        more = beyond*(left[:, 1] == 0)
        lines, _ = augment(whole, draws, options, 1., beyond=more)
        loss, _ = head.compute_loss(rows_of(lines, size), lines, left=left - F.pad(more[:, None], (1, 0)))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    lines, size = straight(40)
    both = Ragged.cat([lines, reverse(lines)])
    left = (both.lengths - 1).repeat_interleave(both.lengths) - both.point_index
    p = head.eos_probs(rows_of(both, size.repeat(2))).detach()
    return float(p[left == 0].median()), float(p[left > 10].quantile(.95))


@pytest.mark.parametrize("key", ["cosine-regression", "sphere-classification"])
def test_a_visible_end_is_learnt(key):
    "P(end) is above .5 at ends and under .1 elsewhere, the other end of the line among it; segments as they come teach only the second."
    more = dict(sphere="repulsion100") if key.startswith("sphere") else {}
    at_ends, far = learned_ends(key, beyond=6, ends_ratio=.5, eos_pos_weight=3., **more)
    assert at_ends > .5 and far < .1
    at_ends, far = learned_ends(key, **more)
    assert at_ends < .3 and far < .1


# ---- tracking

SMALL = dict(nb_features=15, step_size=1., dg_args=dict(add_eos=True))
TRACKS = {"cosine": lambda: Learn2TrackModel(rnn_key="gru", rnn_layer_sizes=[8], nb_previous_dirs=1, **SMALL),
          "sphere": lambda: Learn2TrackModel(rnn_key="gru", rnn_layer_sizes=[8], nb_previous_dirs=1, **{**SMALL, "dg_key": "sphere-classification", "dg_args": dict(add_eos=True, sphere="repulsion100")}),
          "transformer": lambda: TransformerSrcAndTgtModel(input_embedded_size=8, target_embedded_size=8, nheads=2, n_layers_e=1, **SMALL)}


@pytest.mark.parametrize("name", TRACKS)
def test_tracking_ends_at_the_point_whose_row_says_so(dataset, name):
    "The point where EOS fires is the line's last one, as in training: `forward` along a tracked line is above the threshold there, and nowhere before."
    torch.manual_seed(3)
    model = TRACKS[name]().eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3.)  # answers that vary along a line
    tracker = Tracker(model, dataset, "sub-04", "input", "wm_mask", min_length_mm=0, max_length_mm=40)
    seeds = seeds_from_mask(dataset.testing.get_volume(0, "wm_mask"), dataset.testing.grid(0, "wm_mask").affine, nt=200, seed=1)
    def probs(lines):
        with torch.inference_mode(): return model.direction_getter.eos_probs(model(tracker.walk.inputs_along(lines), lines).data)
    starts = convert(seeds, tracker.grid, "rasmm", "voxmm")
    threshold = tracker.walk.eos_threshold = float(probs(Ragged.from_list(list(starts[:, None]))).quantile(.7))
    nothing = torch.zeros(len(starts), 1, 3)
    forward, codes, _ = propagate(tracker.walk, starts, nothing, torch.full((len(starts),), 41))
    whole = tracker.track(seeds, quiet=True)
    lines, begin = convert(whole.lines, tracker.grid, "rasmm", "voxmm"), whole.info["stop_reasons"][:, 1]
    back, at = reverse(lines), convert(whole.info["seeds"], tracker.grid, "rasmm", "voxmm")
    from_seed = (back.data - at.repeat_interleave(back.lengths, dim=0)).norm(dim=1) < 1e-3
    seed_index = back.point_index[from_seed]
    assert int(from_seed.sum()) == len(back)
    two_halves = seed_index > 0  # else the first half was the seed alone, and the second one set out anew
    for some, code, first in ((forward, codes, torch.zeros(len(forward), dtype=torch.long)), (back[two_halves], begin[two_halves], seed_index[two_halves])):
        sure, fires = probs(some) > threshold*(1 + 1e-3), probs(some) > threshold*(1 - 1e-3)  # step by step, sums round otherwise
        last = some.point_index == some.lengths.repeat_interleave(some.lengths) - 1
        of_half = some.point_index >= first.repeat_interleave(some.lengths)
        eos = code == tracker.walk.code("eos")
        assert 2 < int(eos.sum()) < len(some) - 2
        assert fires[last][eos].all() and not sure[of_half & ~last].any()
        gone = code == tracker.walk.code("mask")
        assert gone.any() and not sure[last][gone].any()  # the row of the last point inside said: go on
