"""The tracking player: what the model is asked again is what tracking did, what was tracked is kept, and other axes, names and models."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dwiml_nb.core.gradients import image_axes
from dwiml_nb.core.phantom import FieldReader, circling_subject
from dwiml_nb.core.space import Grid, convert
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcOnlyModel
from dwiml_nb.tracking.answers import data_of_reasons, seed_points
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.stops import StopRule
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.widgets import tracking_player
from dwiml_nb.widgets.tracking_player import Place, TrackingPlayer, making_of, pins_of, reasons_html


@pytest.fixture(scope="module")
def ring():
    "A dataset with a subject whose field turns, seeds in half of a ring."
    dataset, grid, volumes = circling_subject()
    volumes["peaks"] = -volumes["field"]
    dataset.volume_groups.append("peaks")
    dataset.nb_features = {k: v.shape[3] for k, v in volumes.items()}
    return dataset, grid, seeds_from_mask(volumes["half"], grid.affine, nt=60)


def tracker_of(ring, model=None, mask="half", **options):
    return Tracker(model or FieldReader(), ring[0], "sub-01", "field", mask, **{**dict(max_length_mm=50., min_length_mm=0.), **options})


class High(StopRule):
    name = "<b>high"

    def __call__(self, walk, positions, codes, state):
        return torch.where((codes == 0) & (positions[:, 1] > 40.), walk.code(self.name), codes), state


MODELS = {
    "learn2track": lambda: Learn2TrackModel(3, step_size=1., rnn_key="lstm", rnn_layer_sizes=[8, 8], nb_previous_dirs=2, dg_key="cosine-regression", dg_args=dict(add_eos=True)),
    "classes": lambda: Learn2TrackModel(3, step_size=1., rnn_key="gru", rnn_layer_sizes=[8], dg_key="sphere-classification", dg_args=dict(sphere="repulsion100", axis_head=True)),
    "transformer": lambda: TransformerSrcOnlyModel(3, step_size=1., max_len=60, nheads=2, n_layers_e=1, input_embedded_size=8, ffnn_hidden_size=8, dg_key="gaussian", dg_args=dict(add_eos=True)),
    "field": FieldReader,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, dict(forward_only=True), dict(first_direction="peaks:peaks")], ids=["halves", "forward", "peaks"])
def test_what_is_asked_again_is_what_tracking_did(ring, name, options):
    torch.manual_seed(3)
    model = MODELS[name]()
    tracker = tracker_of(ring, model, "ring", theta_deg=180, **options)
    tractogram = tracker.track(ring[2][:12], quiet=True)
    starts = seed_points(tractogram.lines, tractogram.info["seeds"])
    if name != "field":
        model.train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
    state, asked = torch.get_rng_state(), 0
    for i, line in enumerate(tractogram.lines.unbind()[:6]):
        said = tracker.answers(line, starts[i])
        assert len(said.steps) == len(line) + (not options.get("forward_only")), "each half is asked at the seed"
        assert np.nan_to_num(said.angles).max() < .2, "degrees"
        asked += np.isfinite(said.angles).sum()
        assert (said.p_end is None) == (name in ("classes", "field"))
    assert asked > 20 and torch.equal(state, torch.get_rng_state())
    if name != "field":
        assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_in_batches_the_lines_are_those_of_the_tracker(ring, monkeypatch):
    monkeypatch.setattr(tracking_player, "FIRST_SEEDS", 7)
    tracker = tracker_of(ring)
    player, whole = TrackingPlayer(tracker, ring[2]), tracker.track(ring[2], quiet=True)
    assert player.state == "tracked" and torch.allclose(player.tractogram.lines.data, whole.lines.data, atol=1e-4)
    assert torch.equal(player.tractogram.info["stop_reasons"], whole.info["stop_reasons"])
    assert player.viewer.colour == "end" and player.viewer.scene.nb_steps > 10
    player.close()


def test_an_interrupt_leaves_what_was_tracked(ring, monkeypatch):
    monkeypatch.setattr(tracking_player, "FIRST_SEEDS", 10)
    tracker = tracker_of(ring)
    track = tracker.track

    def third_time(*args, first_number=0, **options):
        if first_number >= 30: raise KeyboardInterrupt
        return track(*args, first_number=first_number, **options)

    tracker.track = third_time
    player = TrackingPlayer(tracker, ring[2])
    assert player.state == "stopped" and len(player.tractogram) > 20 and "stopped after" in player.told.value and "30 seeds of 60" in player.told.value
    player.line = 3
    assert "0.0° from the step taken" in player.answers.words.value or player.answers.said is not None
    player.close()


def test_beside_a_notebook_it_can_be_stopped(ring, monkeypatch):
    monkeypatch.setattr(tracking_player, "in_notebook", lambda: True)
    monkeypatch.setattr(tracking_player, "FIRST_SEEDS", 1)
    monkeypatch.setattr(tracking_player, "MOST_SEEDS", 1)
    player = TrackingPlayer(tracker_of(ring), ring[2])
    player.stop_button.click()
    assert player.wait(20) == "stopped" and len(player.tractogram) < 60
    player.close()


def test_reasons_and_seeds_in_a_file_names_are_text(ring, tmp_path):
    tracker = tracker_of(ring, stop_rules=High, min_length_mm=5)
    tractogram = tracker.track(ring[2], quiet=True)
    kept = Tractogram(tractogram.lines, ring[1], data_of_reasons(tractogram.info["stop_reasons"], tractogram.info["stop_names"]))
    kept.dps["seeds"] = convert(tractogram.info["seeds"], ring[1], "rasmm", "vox_center").numpy()
    for kind in ("trx", "trk"):
        save_tractogram(kept, tmp_path/f"lines.{kind}")
        made, there = making_of(load_tractogram(tmp_path/f"lines.{kind}")), making_of(tractogram)
        assert (made.starts == there.starts).all() and not made.remark
        words = [[[o.names[c] for c in row] for row in o.codes] for o in (made, there)]
        assert words[0] == words[1] and "<b>high" in np.unique(words[1])
    player = TrackingPlayer(tmp_path/"lines.trk")
    assert "&lt;b&gt;high" in reasons_html(player) and "<b>high" not in player.still()
    player.reasons = ("<b>high",)
    assert 0 < player.viewer.scene.lines[0].shown.sum() < len(player.tractogram)
    player.reasons = ("angel",)
    assert "no line ended for 'angel'" in player.error
    player.close()


def test_directions_are_those_of_the_world(ring):
    "On an oblique, left-handed grid, a pin points along the line."
    dataset, grid, seeds = ring
    turned = np.linalg.qr(np.array([[-1., .3, .1], [.2, 1, -.3], [.1, .2, 1]]))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned*[2, 2, 2]*[1, -1, 1], (5, -7, 11)
    oblique = Grid(affine, grid.dimensions)
    own = SimpleNamespace(**vars(dataset.testing) | dict(grid=lambda subject, group: oblique))
    tracker = Tracker(FieldReader(), SimpleNamespace(**vars(dataset) | dict(testing=own)), "sub-01", "field", "half", max_length_mm=50.)
    player = TrackingPlayer(tracker, convert(convert(seeds, grid, "rasmm", "vox"), oblique, "vox", "rasmm"))
    assert len(player.tractogram) > 20
    for point in (5, 12):
        player.look_at(2, point)
        said, row = player.answers.said, player.answers.row
        line = player.tractogram.lines[2].numpy()
        ahead = line[point + 1] - line[point] if said.steps[row] >= 0 else line[point - 1] - line[point]
        pins = pins_of(said, row, Place(image_axes(affine)))
        assert pins["step taken"] @ ahead/np.linalg.norm(ahead) > .999 and pins["model"] @ pins["step taken"] > .999
    player.close()


def test_what_it_needs_is_said(ring):
    with pytest.raises(TypeError, match="needs seeds"): TrackingPlayer(tracker_of(ring))
    with pytest.raises(ValueError, match="no tracking mask"): TrackingPlayer(tracker_of(ring, mask=None), 30)
    with pytest.raises(ValueError, match="has no directions to show"): TrackingPlayer(tracker_of(ring), 3, signal="ring")


def test_a_registered_model_is_asked_too(tmp_path):
    from dwiml_nb.data.dataset import MultiSubjectDataset
    from dwiml_nb.models.registered import dwiml_model, registered_model
    from dwiml_nb.study.toy import toy_study

    class Upwards(torch.nn.Module):
        def __init__(self, config, data_sample):
            super().__init__()
            self.layer = torch.nn.Linear(data_sample.shape[1], 1)
        @staticmethod
        def to_tensor(data_dict): return np.stack([np.asarray(v).mean(0) for v in data_dict["data"]["input"]])
        def forward(self, batch): return self.layer(batch)
        def train_step(self, batch): return self(batch).mean()
        def infer_step(self, batch): return torch.tensor([[.1, 0., 1.]]) + 0*self(batch)

    dataset = MultiSubjectDataset(toy_study(tmp_path, n_subjects=2)).load_data()
    model = registered_model(dwiml_model(Upwards), {}, dataset, streamline_group_name="bundles", input_group_name="input")
    tracker = Tracker(model, dataset, dataset.training.subjects[0], "input", "wm_mask", step_mm=1., min_length_mm=2, max_length_mm=20)
    player = TrackingPlayer(tracker, 40, truth=tmp_path/"subjects"/dataset.training.subjects[0])
    player.line = 0
    assert np.nanmax(player.answers.said.angles) < .1 and player.answers.said.head is None
    assert "mm from the nearest true line" in player.answers.told.value and "valid" in player.answers.told.value
    player.close()


def test_a_click_lights_the_line_and_marks_its_point(ring):
    player = TrackingPlayer(tracker_of(ring), ring[2][:20])
    pixel = player.viewer.face.frame().project(player.tractogram.lines[5][9:10].numpy())[0]
    line = player.viewer.click(pixel)  # as the rungs do that draw in the kernel
    assert line >= 0 and player.line == line and player.viewer.selection == (line,)
    (mark,) = player.viewer.marks
    assert np.abs(player.tractogram.lines[line].numpy() - mark).sum(1).min() < 1e-4
    at = player.viewer.face.frame().project(np.array([mark]))[0].astype(int)
    assert (player.viewer.face.marked(np.zeros((450, 600, 3), np.uint8), player.viewer.face.frame())[at[1], at[0]] == 255).all()
    player.line = -1
    assert player.viewer.marks == ()
    player.close()
