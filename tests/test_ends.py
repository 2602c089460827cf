"""Where a line ends: which rows have the label, in training and in tracking; how a model learns it."""
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import BatchIds
from dwiml_nb.batch.spec import spec_of
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.study.toy import toy_study


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


def learn2track(nb_features, eos=True, points=dict(step_size=1.0), **more):
    return Learn2TrackModel(nb_features, rnn_key="gru", rnn_layer_sizes=[4], nb_previous_dirs=1, dg_args=dict(add_eos=eos), **points, **more)


def labels_of(spec, model, batch):
    "What the loss of a finished batch wants of each row's end: the sign of the gradient where the model is undecided."
    rows = torch.zeros(len(batch.seen.data), 4).index_fill(1, torch.tensor(0), 1.).requires_grad_()
    spec.loss(model, batch.seen.with_data(rows), spec.form(batch.targets), batch.ends)[0].backward()
    assert (rows.grad[:, 3] != 0).all()
    return rows.grad[:, 3] < 0


CUTS = {"whole": {}, "turned": dict(reverse_ratio=.5), "segments": dict(segment_mm=9.), "split": dict(split_ratio=.5),
        "all": dict(split_ratio=.5, segment_mm=9., reverse_ratio=.5, widen_mm=2., off_track_mm=.8),
        "off track": dict(off_track_mm=.8, reverse_ratio=.5), "noise": dict(noise_mm_forward=.3, noise_mm_loss=.1)}
POINTS = {"step": dict(step_size=1.), "points": dict(nb_points=12), "compressed": dict(compress_lines=.02), "as stored": dict(), "voxels": dict(step_size=1., streamline_space="vox")}
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


def test_lines_that_are_not_training_are_whole(dataset):
    model = learn2track(dataset.nb_features["input"])
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", split_ratio=1., segment_mm=5.)
    batch = loader.finish(loader.load_batch_streamlines(BatchIds([(0, [0, 1, 2])], "validation", 0, 0)))
    assert batch.ends.all() and int(labels_of(spec_of(model), model, batch).sum()) == 3
