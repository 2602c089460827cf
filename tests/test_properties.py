"""Properties that must hold for any lines and any settings, tried on examples that hypothesis makes up."""
import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_sequence

from dwiml_nb.batch.augment import Augmentation, augment, draw
from dwiml_nb.batch.order import keyed_rng
from dwiml_nb.core.lines import all_but_last, cut, directions, lengths_of, previous_directions, resample_nb_points, resample_step, reverse
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import SPACES, Grid, convert
from dwiml_nb.core.volume import sample_nearest, sample_trilinear

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
lengths = st.lists(st.integers(0, 7), max_size=8)
numbers = st.integers(0, 2**32 - 1)


def lines_of(lengths, seed, columns=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    data = torch.randn(sum(lengths), columns, generator=g, dtype=dtype)
    repeated = torch.nonzero(torch.rand(len(data), generator=g) < 0.2).flatten()
    repeated = repeated[repeated > 0]
    data[repeated] = data[repeated - 1]  # some points repeat the one before
    return Ragged.from_lengths(data, lengths)


def equal(a, b): return torch.equal(a.data, b.data) and torch.equal(a.offsets, b.offsets)


# ---- Ragged

@quick
@given(lengths, numbers, st.integers(1, 4))
def test_round_trips(lengths, seed, columns):
    r = lines_of(lengths, seed, columns)
    assert equal(r, Ragged.from_padded(*r.to_padded(fill=9.0))) and equal(r, Ragged.from_padded(r.to_padded()[0], r.lengths))
    assert equal(r, Ragged.from_array_sequence(r.to_array_sequence())) or not len(r.data)
    assert equal(r, Ragged.cat([r[:2], r[2:]])) and equal(r, r[::-1][::-1]) and equal(r, Ragged(*map(torch.from_numpy, r.numpy())))
    if lengths: assert equal(r, Ragged.from_list(r.unbind())) and equal(r, Ragged.from_list([o.numpy() for o in r]))
    if 0 not in lengths:
        assert equal(r, Ragged.from_packed(r.to_packed()))
        if lengths: assert equal(r, Ragged.from_packed(pack_sequence(r.unbind(), enforce_sorted=False)))


@quick
@given(lengths, numbers, st.data())
def test_choosing_is_choosing_from_the_list(lengths, seed, data):
    r = lines_of(lengths, seed)
    n = len(lengths)
    ids = data.draw(st.lists(st.integers(-n, n - 1), max_size=9)) if n else []
    for which, expected in ((ids, [r.unbind()[i] for i in ids]), (torch.tensor(ids, dtype=torch.long), [r.unbind()[i] for i in ids]),
                            ([i in ids for i in range(n)], [o for i, o in enumerate(r) if i in ids]), (some := data.draw(st.slices(n)), r.unbind()[some])):
        got = r[which]
        assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))
        assert got.offsets[0] == 0 and got.offsets[-1] == len(got.data)


@quick
@given(lengths, numbers)
def test_indices_name_every_point(lengths, seed):
    r = lines_of(lengths, seed)
    assert [(i, j) for i, n in enumerate(lengths) for j in range(n)] == list(zip(r.line_index.tolist(), r.point_index.tolist()))


# ---- lines, against float64 numpy, one by one

def arc_length_interpolation(line, nb_points):
    "Equidistant points along a polyline, by numpy in float64."
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    keep = np.concatenate([[True], steps > 0])
    return np.stack([np.interp(np.linspace(0, along[-1], nb_points), along[keep], line[keep, c]) for c in range(3)], 1)


@quick
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), numbers, st.integers(2, 12), st.floats(0.05, 3.0))
def test_resampling_is_arc_length_interpolation(lengths, seed, nb_points, step):
    r = lines_of(lengths, seed)
    for new, wanted in ((resample_nb_points(r, nb_points), None), (resample_step(r, step), step)):
        for old, line in zip(r.to(torch.float64), new):
            length = np.linalg.norm(np.diff(old.numpy(), axis=0), axis=1).sum()
            if wanted is None: assert len(line) == nb_points
            else: assert abs(len(line) - max(2, np.ceil(length / step))) <= (abs(length / step - round(length / step)) < 1e-5)
            np.testing.assert_allclose(line.numpy(), arc_length_interpolation(old.numpy(), len(line)), atol=2e-5)
            assert torch.equal(line[0], old[0].float()) and torch.allclose(line[-1], old[-1].float(), atol=1e-5)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), numbers, st.floats(0.1, 2.0))
def test_company_changes_no_line(lengths, seed, step):
    r = lines_of(lengths, seed)
    whole = resample_step(r, step)
    for i in range(len(r)): torch.testing.assert_close(whole[i], resample_step(r[[i]], step).data, atol=1e-5, rtol=0)


@quick
@given(lengths, numbers, st.integers(1, 3))
def test_directions_line_by_line(lengths, seed, n):
    r = lines_of(lengths, seed)
    assert all(torch.equal(d, o.diff(dim=0)) if len(o) else len(d) == 0 for d, o in zip(directions(r), r))
    assert all(torch.equal(a, o[:-1]) for a, o in zip(all_but_last(r), r))
    assert equal(reverse(reverse(r)), r) and all(torch.equal(a, o.flip(0)) for a, o in zip(reverse(r), r))
    torch.testing.assert_close(lengths_of(reverse(r)), lengths_of(r))
    for prev, o in zip(previous_directions(r, n), r):
        for i in range(len(o)):
            expected = [o[i - k] - o[i - k - 1] if i - k >= 1 else torch.zeros(3) for k in range(n)]
            assert torch.equal(prev[i], torch.cat(expected))


# ---- space and volumes

@quick
@given(numbers, st.sampled_from(SPACES), st.sampled_from(SPACES))
def test_spaces_and_back(seed, a, b):
    rng = np.random.default_rng(seed)
    grid = Grid(np.block([[rng.normal(size=(3, 3)) + 3 * np.eye(3), rng.normal(size=(3, 1)) * 50], [np.zeros((1, 3)), np.ones((1, 1))]]), (9, 8, 7))
    points = torch.tensor(rng.normal(size=(5, 3)) * 20)
    torch.testing.assert_close(convert(convert(points, grid, a, b), grid, b, a), points, atol=1e-8, rtol=0)
    step = lambda grid, space: convert(points, grid, "rasmm", space).diff(dim=0)
    torch.testing.assert_close(step(grid, "voxmm").norm(dim=1), step(grid, "rasmm").norm(dim=1))
    affine = grid.affine.copy()
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * rng.uniform(0.5, 3, 3)  # axes at right angles
    square = Grid(affine, (9, 8, 7))
    torch.testing.assert_close(step(square, "voxmm") / torch.tensor(square.voxel_sizes), step(square, "vox"))


@quick
@given(numbers, st.tuples(*[st.integers(1, 5)] * 3))
def test_sampling_at_centres_and_ramps(seed, size):
    g = torch.Generator().manual_seed(seed)
    volume = torch.randn(*size, 2, generator=g)
    centres = torch.tensor(list(np.ndindex(*size))) + 0.5
    assert torch.equal(sample_trilinear(volume, centres), volume.reshape(-1, 2)) and torch.equal(sample_nearest(volume, centres), volume.reshape(-1, 2))
    inside = torch.rand(20, 3, generator=g) * (torch.tensor(size) - 1) + 0.5
    ramp = torch.stack(torch.meshgrid(*[torch.arange(n) + 0.5 for n in size], indexing="ij"), -1)
    torch.testing.assert_close(sample_trilinear(ramp, inside), inside, atol=1e-5, rtol=0)
    anywhere = sample_trilinear(volume, torch.randn(20, 3, generator=g) * 9)
    assert (anywhere <= volume.amax((0, 1, 2)) + 1e-5).all() and (anywhere >= volume.amin((0, 1, 2)) - 1e-5).all()


# ---- augmentation (the sampler and the loader: test_batch_properties.py)

@quick
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), numbers, st.floats(0, 1), st.floats(2, 60) | st.none(), st.floats(0, 3), st.floats(0, 3))
def test_augmentation_keeps_every_line(lengths, seed, reverse_ratio, segment_mm, widen_mm, off_track_mm):
    step = torch.nn.functional.normalize(torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed)), dim=1)
    lines = Ragged.from_lengths(step.cumsum(0), lengths)
    options = Augmentation(reverse_ratio, segment_mm, widen_mm, off_track_mm)
    draws = draw(lines.lengths, options, 1.0, keyed_rng(seed))
    walked, targets = augment(lines, draws, options, 1.0)
    kept = lines.lengths if segment_mm is None else lines.lengths.clamp(max=max(2, round(segment_mm) + 1))
    assert torch.equal(walked.lengths, kept) and torch.equal(targets.lengths, kept) and walked.data.isfinite().all()
    if off_track_mm: torch.testing.assert_close(directions(targets).data.norm(dim=1), torch.ones(int((kept - 1).sum())), atol=1e-4, rtol=0)
    else: assert targets is walked
    if not (widen_mm or off_track_mm):  # every line is a run of its own points, one way or the other
        start = torch.zeros_like(kept) if draws.start is None else draws.start
        turned = torch.zeros(len(kept), dtype=torch.bool) if draws.turned is None else draws.turned
        assert equal(walked, reverse(cut(lines, start, kept), turned))
    again, _ = augment(lines, draws, options, 1.0)
    assert torch.equal(again.data, walked.data)
