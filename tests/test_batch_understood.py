"""The batch, understood: every stage that its lines went through, what a model sees along a line and answers there, and the widget that shows it."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dwiml_nb.batch.augment import Draws
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import InputSpec, ModelSpec
from dwiml_nb.batch.stages import InputAlong, batch_in_stages, counts, inputs_along, places_around, same_lines
from dwiml_nb.core.lines import previous_directions, unit
from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.answers import answers_on_line
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.batch_losses import ready
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcAndTgtModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.viz.batch_pictures import around_picture, lengths_picture, line_picture
from dwiml_nb.viz.scene import batch_in_world
from dwiml_nb.widgets.batch_preview import BatchPreview


@pytest.fixture(scope="module")
def study(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


@pytest.fixture(scope="module")
def ids(study): return next(iter(DWIMLBatchIDSampler(study, "bundles", 40, 40).batches("training", epoch=1, start=1)))


ALL = dict(split_ratio=.4, reverse_ratio=.5, segment_mm=20., widen_mm=1., off_track_mm=1., noise_mm_forward=.1, noise_mm_loss=.2)
AROUND = torch.tensor([[0., 0, 0], [1, 0, 0], [0, 0, -1]])
LOADERS = {  # what the model asks for, options of the loader, the stages
    "all": (dict(step_size=1., uses_last_point=False), ALL, "as stored resampled split segment reversed widened off track noise"),
    "voxels": (dict(step_size=1., streamline_space="vox", legacy_half_voxel=True), dict(split_ratio=.4, widen_mm=1., noise_mm_forward=.1), "as stored resampled split widened noise"),
    "beyond": (dict(step_size=1., loss_takes=("left",)), dict(segment_mm=30., ends_ratio=.5, beyond_mm=3.), "as stored resampled segment beyond"),
    "points": (dict(nb_points=16), dict(split_ratio=1., reverse_ratio=1.), "as stored split resampled reversed"),
    "compressed": (dict(compress_lines=.05), dict(split_ratio=.3, noise_mm_loss=.1), "as stored split resampled noise"),
    "as they are": ({}, dict(widen_mm=2.), "as stored widened"),
    "nothing": ({}, {}, "as stored"),
}


def loader_of(study, kind, with_inputs=True):
    asked, options, _ = LOADERS[kind]
    if not with_inputs: return DWIMLBatchLoader(study, ModelSpec(**asked), "bundles", **options)
    return DWIMLBatchLoaderOneInput(study, ModelSpec(neighborhood_vectors=AROUND, **asked), "input", "bundles", **options)


# ---- stages

@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_last_stage_is_bit_for_bit_the_batch_that_trains(study, ids, kind, with_inputs):
    loader = loader_of(study, kind, with_inputs)
    alone = loader_of(study, kind, with_inputs)
    trained = alone.finish(alone.load_batch_streamlines(ids))
    batch, stages = batch_in_stages(loader, ids)
    assert " ".join(s.name for s in stages) == LOADERS[kind][2]
    assert loader.at_hand is None and "listen" not in vars(loader)
    noisy = stages[-1].name == "noise"
    assert torch.equal(batch.lines.data, trained.lines.data) and batch.draws == trained.draws
    assert torch.equal(stages[-2 if noisy else -1].batch.lines.data, trained.lines.data)
    assert torch.equal(stages[-1].batch.lines.data, (trained.seen if noisy else trained.lines).data)
    assert torch.equal(stages[-1].batch.targets.data, trained.targets.data)

    kept = [study.training.get_lines(s, "bundles", i) for s, i in ids]
    stored = stages[0].batch
    sizes = [float(study.training.grid(s, "bundles").voxel_sizes[0]) for s, _ in ids]
    scale = [1. if kind == "voxels" else size for size in sizes]
    assert torch.allclose(stored.lines.data, torch.cat([o.data*k for o, k in zip(kept, scale)]), atol=1e-4)
    assert [len(s) for s in stages][-1] == len(batch) and dict(stored.ids_per_subj).keys() == dict(batch.ids_per_subj).keys()
    for stage in stages: assert sum(o.stop - o.start for o in stage.batch.ids_per_subj.values()) == len(stage) == len(stage.words)
    for a, b in zip(trained.inputs or (), inputs_along(loader, batch, 5)): assert torch.equal(a[5], b.values.flatten(1))


def test_words_and_numbers_are_those_of_the_draws(study, ids):
    batch, stages = batch_in_stages(loader_of(study, "all"), ids)
    draws, last = batch.draws, stages[-1]
    assert np.array_equal(last.numbers["reversed"] == 1, draws.turned.numpy())
    assert np.allclose(last.numbers["moved (mm)"], draws.shift_mm.norm(dim=1)) and len(last) == 40 + int((draws.split > 0).sum())
    found = {what: n for what, n, _ in counts(last)}
    assert found["first part"] == found["second part"] == int((draws.split > 0).sum()) and found["off track, SD (mm)"] == int((draws.sigma_mm > 0).sum())
    for i in range(len(last)):
        said = ", ".join(last.words[i])
        assert ("reversed" in said) == bool(draws.turned[i]) and ("second part" in said) == (last.part[i] == 2)
        assert f"moved {draws.shift_mm[i].norm():.2g} mm" in said and "noise 0.1 mm on what is seen, noise 0.2 mm on the targets" in said
    split, resampled = stages[2].batch.lines, stages[1].batch.lines
    for i in range(len(last)):  # where each piece comes from
        whole, first = resampled[int(stages[2].origin[i])], last.part[i] < 2
        n = len(split[i])
        assert torch.equal(split[i], whole[:n] if first else whole[-n:])


def test_a_line_is_found_again_at_every_stage(study, ids):
    _, stages = batch_in_stages(loader_of(study, "all"), ids)
    _, plain = batch_in_stages(loader_of(study, "all"), ids, Draws())
    first = int(np.flatnonzero(stages[-1].part == 1)[0])
    assert same_lines(stages[-1], stages[-2], [first]) == [first]
    whole = same_lines(stages[-1], stages[0], [first])
    assert same_lines(stages[0], stages[-1], whole) == [first, first + 1] and same_lines(stages[-1], plain[-1], [first]) == whole
    assert same_lines(stages[0], stages[-1], []) == []


def test_own_classes_and_empty_batches(study, ids):
    class Mine(DWIMLBatchLoader):
        def load_batch_streamlines(self, batch_ids, draws=None):
            batch = super().load_batch_streamlines(batch_ids, draws)
            moved = batch.lines.with_data(batch.lines.data + 1)
            return replace(batch, lines=moved, targets=moved)
    loader = Mine(study, ModelSpec(step_size=1.), "bundles", reverse_ratio=.5)
    batch, stages = batch_in_stages(loader, ids)
    assert [s.name for s in stages] == ["as stored", "resampled", "reversed", "your loader"] and torch.equal(stages[-1].batch.lines.data, batch.lines.data)

    class Other(DWIMLBatchLoader):
        def load_batch_streamlines(self, batch_ids, draws=None): return super().load_batch_streamlines([(s, i[:2]) for s, i in batch_ids], draws)
    assert [s.name for s in batch_in_stages(Other(study, ModelSpec(), "bundles"), ids)[1]] == ["as stored"]
    for kind in ("all", "points", "nothing"):
        batch, stages = batch_in_stages(loader_of(study, kind), [(0, [])])
        assert len(batch) == 0 and all(len(s) == 0 for s in stages)
        assert all(n == 0 for _, n, _ in counts(stages[-1]))


def test_several_inputs_and_places_of_the_neighbourhood(study, ids):
    both = DWIMLBatchLoaderOneInput(study, ModelSpec(step_size=2., inputs={"a": InputSpec(None, AROUND), "b": InputSpec()}),
                                    {"a": "input", "b": "input"}, "bundles")
    batch = both.load_batch_streamlines(ids)
    a, b = inputs_along(both, batch, 3)
    assert a.name == "a: input" and a.values.shape[1] == 3 and b.values.shape[1] == 1 and torch.equal(a.values[:, :1, :b.values.shape[2]], b.values)
    places = places_around(both, batch, 3, 0, AROUND)
    affine = study.training.grid(ids[0][0], "bundles").affine
    assert torch.allclose(places[1] - places[0], torch.tensor(affine[:3, 0], dtype=places.dtype), atol=1e-3)


# ---- what a model answers

@pytest.mark.parametrize("kind", ["learn2track", "axis", "transformer", "own", "auto-encoder"])
def test_answers_are_those_of_a_tracker_and_touch_nothing(study, ids, kind):
    torch.manual_seed(0)
    n = study.nb_features["input"]
    model = {"learn2track": lambda: Learn2TrackModel(n, step_size=2., rnn_layer_sizes=[4], nb_previous_dirs=1, dropout=.5, dg_key="gaussian"),
             "axis": lambda: Learn2TrackModel(n, step_size=2., rnn_layer_sizes=[4], dg_args=dict(axis_head=True, add_eos=True)),
             "transformer": lambda: TransformerSrcAndTgtModel(n, step_size=2., max_len=100, input_embedded_size=6, target_embedded_size=2, nheads=2, n_layers_e=1, ffnn_hidden_size=8),
             "own": lambda: Own(step_size=2.), "auto-encoder": ModelAE}[kind]()
    loader = DWIMLBatchLoader(study, model, "bundles") if kind == "auto-encoder" else DWIMLBatchLoaderOneInput(study, model, "input", "bundles", reverse_ratio=.5)
    batch = ready(loader, loader.load_batch_streamlines(ids))
    bits, chance = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = answers_on_line(model, batch, 3)
    assert torch.equal(torch.get_rng_state(), chance) and model.training
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    if kind in ("own", "auto-encoder"): assert found is None; return
    quiet, one = copy.deepcopy(model).eval(), batch.lines[3:4]
    with torch.no_grad():
        rows = as_ragged(quiet(batch.inputs[0][3:4], batch.seen[3:4])).data
        dirs = quiet.get_tracking_directions(rows, "det", float("inf"), previous_dirs=previous_directions(batch.seen[3:4], 1).data)
    assert torch.allclose(found.dirs, unit(dirs), atol=1e-6)
    steps = unit(one.data.diff(dim=0))
    angle = torch.rad2deg(torch.acos((found.dirs[:len(steps)]*steps).sum(1).clamp(-1, 1)))
    assert torch.allclose(found.degrees[:len(steps)], angle, atol=.1)
    assert (found.p_end is not None) == (kind == "axis") and (found.densities is not None) == (kind == "learn2track")


class Own(MainModelAbstract):
    "A model that cannot track."
    def forward(self, inputs, streamlines): return [x[:, :3] for x in inputs]
    def compute_loss(self, outputs, targets): return sum(o.square().mean() for o in outputs)


# ---- the widget

@pytest.fixture
def preview_of(study):
    made = []
    def make(kind="all", with_inputs=True, loader=None, **options):
        loader = loader or loader_of(study, kind, with_inputs)
        made.append(BatchPreview(loader, DWIMLBatchIDSampler(loader.dataset, "bundles", 40, 40, **options)))
        return made[-1]
    yield make
    for preview in made: preview.close()


def look(preview): return preview.viewer.face.frame()


def test_the_slider_keeps_camera_and_selection(preview_of):
    preview = preview_of("all")
    preview.viewer.azimuth = 77.
    seen, last = look(preview), preview.stages[-1]
    assert preview.stage == "noise" and preview.slider.options == preview.stage_options == tuple(s.name for s in preview.stages)
    second = int(np.flatnonzero(last.part == 2)[2])
    preview.viewer.selection = (second,)
    whole = int(last.origin[second])
    for stage in reversed(preview.stages):
        preview.slider.value = stage.name  # as a reader moves it
        assert preview.error == "" and (preview.stage, preview.kept, preview.side.line) == (stage.name, [second], second)
        assert preview.viewer.selection == ((second,) if len(stage) == len(last) else (whole,))
        assert torch.equal(preview.viewer.scene.lines[0].lines.data, batch_in_world(stage.batch).data)
        assert np.allclose(look(preview).centre, seen.centre) and look(preview).scale == seen.scale
    preview.augmented = False
    assert preview.viewer.selection == (whole,) and preview.stage_options == ("as stored", "resampled")
    preview.augmented = True
    assert preview.viewer.selection == (second - 1, second)  # the whole line was selected last, now both of its parts are
    assert np.allclose(look(preview).centre, seen.centre) and look(preview).scale == seen.scale
    preview.subject = preview.subject_options[1]
    visible = preview.shown.tolist()
    assert preview.kept == [second - 1, second] and preview.viewer.selection == tuple(visible.index(i) for i in preview.kept if i in visible)
    preview.next_batch()
    assert preview.kept == [] and preview.viewer.selection == () and preview.side.line == -1 and preview.side.face == "batch"


def test_lines_are_named_and_coloured_by_what_happened_to_them(preview_of):
    preview = preview_of("all")
    scene, draws = preview.viewer.scene, preview.batch.draws
    assert {"part", "reversed", "moved (mm)", "off track, SD (mm)", "points kept"} <= set(scene.colourings)
    i = int(np.flatnonzero(draws.turned.numpy() & (preview.stages[-1].part == 2))[0])
    assert all(word in scene.info_of(i) for word in ("reversed", "second part", "noise, SD (mm) 0.2", f"moved (mm) {float(draws.shift_mm[i].norm()):.4g}"))
    preview.viewer.colour = "reversed"
    assert [name for name, _ in preview.viewer.legend] == ["not reversed", "reversed"]
    preview.stage = "as stored"
    assert preview.viewer.colour == "direction" and "reversed" not in preview.viewer.scene.colourings
    preview.stage = "noise"
    assert preview.viewer.colour == "reversed"
    said = preview.side.told.value
    assert f"{int(draws.turned.sum())} of {len(preview.batch)}" in said and "second part" in said and said.count("<img") == 1


def test_any_batch_by_number_and_from_validation(preview_of, study):
    preview = preview_of("all")
    fields = {o.description: o for o in preview.children[0].children if hasattr(o, "description")}
    fields["batch"].value, fields["epoch"].value = 2, 3
    assert (preview.epoch, preview.index) == (2, 1) and "training batch 2 of" in preview.info and "epoch 3" in preview.info
    preview.context = "validation"
    assert preview.stage_options == ("as stored", "resampled") and preview.stage == "resampled" and preview.error == ""
    assert "Nothing was done" in preview.side.told.value
    preview.show_batch("training", 1, 1)
    assert preview.stage == "noise" and (fields["epoch"].value, fields["batch"].value) == (2, 2)


def test_a_click_tells_of_a_point_with_a_model_and_without(preview_of, study):
    torch.manual_seed(0)
    model = Learn2TrackModel(study.nb_features["input"], step_size=1., rnn_layer_sizes=[4], dg_key="sphere-classification",
                             dg_args=dict(add_eos=True), neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=1.)
    loader = DWIMLBatchLoaderOneInput(study, model, "input", "bundles", reverse_ratio=.5, noise_mm_forward=.1)
    preview, asked = preview_of(loader=loader), []
    preview.at_rest = lambda function: (asked.append(function), function())[1]  # as a dashboard's: no batch is in the works
    preview.show_batch("training", 0, 0, model=model)
    assert preview.viewer.colour == "loss" and len(asked) == 1 and preview.facts.model is not model
    line, point = 5, 7
    preview.viewer.clicked, preview.viewer.selection = (line, point), (line,)  # as the kernel's faces do
    assert (preview.side.line, preview.side.point, preview.side.face) == (line, point, "line") and preview.error == ""
    assert [s.name for s in preview.viewer.scene.lines] == ["lines", "targets", "predicted", "true"] and preview.viewer.selection == (line,)
    assert len(asked) == 2 and preview.side.told.value.count("<img") == 1 and "noise 0.1 mm" in preview.side.told.value
    preview.side.face = "point"
    assert f"point {point + 1} of {len(preview.batch.lines[line])}" in preview.side.told.value and "P(end)" in preview.side.told.value
    preview.viewer.selection = (line, 9)
    preview.viewer.clicked = (9, 2)  # as the browser's page does: selection first
    assert (preview.side.line, preview.side.point) == (9, 2) and "around the point" in preview.still()
    first = 2*len(preview.batch)
    preview.viewer.selection = (9, line, first)  # an arrow
    assert preview.kept == [line, 9]
    preview.viewer.selection = ()
    assert preview.side.line == -1 and preview.error == "" and [s.name for s in preview.viewer.scene.lines] == ["lines", "targets"]

    ae = preview_of(loader=DWIMLBatchLoader(study, ModelAE(), "bundles"))
    ae.show_batch("validation", 0, 0, model=ModelAE())
    ae.viewer.selection = (1,)
    ae.side.face = "point"
    assert ae.error == "" and "gives no volume" in ae.side.told.value and ae.losses is not None


@pytest.mark.parametrize("kind", ["points", "compressed", "as they are"])
def test_other_lines_and_volumes_that_are_no_numbers(preview_of, study, kind, monkeypatch):
    loader = loader_of(study, kind)
    sampled = loader.load_batch_inputs
    def with_nan(lines, who):
        rows = sampled(lines, who)
        rows.data[::2] = float("nan")
        return rows
    monkeypatch.setattr(loader, "load_batch_inputs", with_nan)
    preview = preview_of(loader=loader, line_filter="length_mm > 20")
    preview.viewer.selection = (0,)
    for preview.side.face in ("line", "point"): assert preview.error == "" and "<img" in preview.side.told.value
    for preview.side.glyphs in ("peaks", "values"): assert preview.error == "" and "<img" in preview.side.told.value
    subset = preview.lengths["training"]
    assert len(subset) == sum(map(len, preview.batch_sampler.kept_lines("training"))) and subset.min() > 20


def test_pictures_of_a_line_of_one_point_and_of_none():
    one = InputAlong("x", torch.full((1, 1, 4), float("nan")), torch.zeros(1, 3), list("abcd"))
    figure = line_picture([3.], [one], {"loss": [float("nan")]}, 0, dark=True)
    assert figure.axes[1].get_ylabel() == "x: features" and figure.axes[1].get_title("right") == "pink: not a number"
    assert lengths_picture([], []).axes and line_picture([]).axes == []
    for kind in ("SH", "peaks", "values"):
        assert around_picture(one._replace(values=torch.full((1, 1, 6), float("nan")), features=list("abcdef")), 0, kind).axes
