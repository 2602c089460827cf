"""`viz(x)` for all that a person holds, and the page that it leaves: in-process, without a browser."""
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.core.space import Grid
from dwiml_nb.viz.panel import page_of, parts_of
from dwiml_nb.widgets.score_view import checked_scores
from dwiml_nb.widgets.viz import in_rasmm, viz

AFFINE = np.array([[-2.0, 0, 0, 20], [0, 2.0, 0.3, -18], [0, -0.3, 3.0, -20], [0, 0, 0, 1]])


def lines(n=6, seed=0):
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, 30)[:, None]
    return [(rng.normal(0, 5, 3) + t*rng.normal(0, 12, 3)).astype("f4") for _ in range(n)]


def tractogram(n=6):
    return Tractogram(lines(n), Grid(AFFINE, (20, 20, 16)), dps={"weight": np.arange(n, dtype="f4")[:, None]})


def caption(panel):
    return panel.viewer.caption.value if hasattr(panel, "viewer") else panel.caption.value


@pytest.fixture
def volume():
    return np.random.default_rng(0).normal(10, 3, (20, 20, 16, 3)).astype("f4")


def test_a_volume_is_the_same_however_it_comes(volume, tmp_path):
    image = nib.Nifti1Image(volume, AFFINE)
    nib.save(image, tmp_path / "v.nii.gz")
    ways = [viz(str(tmp_path / "v.nii.gz")), viz(image), viz((torch.from_numpy(volume), AFFINE)), viz([volume, AFFINE]), viz(volume, AFFINE)]
    for panel in ways:
        panel.feature = 2
        assert not panel.error and "feature 3 of 3" in caption(panel) and "2 x 2.02 x 3.01 mm" in caption(panel)
        s = panel.viewer.scene.slices[0]
        assert (s.volume == volume[..., 2]).all() and np.allclose(s.affine, AFFINE)
    assert "without an affine" in caption(viz(volume[..., 0]))


def test_only_the_feature_that_is_looked_at_is_read(volume):
    class Values:
        shape, ndim, dtype, asked = volume.shape, 4, volume.dtype, []

        def __getitem__(self, at):
            self.asked.append(at[3])
            return volume[at]

    image = nib.Nifti1Image(Values(), AFFINE)
    panel = viz(image)
    panel.feature = 1
    assert set(Values.asked) == {0, 1}


@pytest.mark.parametrize("bad, says", [((np.zeros((4, 4, 4), complex), np.eye(4)), "plain numbers"), ((np.zeros((4, 4, 4)), np.full((4, 4), np.nan)), "no affine"),
                                       ((np.zeros((4, 0, 4)), np.eye(4)), "grid of three axes")])
def test_what_is_no_volume_is_told(bad, says):
    with pytest.raises(DataProblem, match=says): viz(bad)


def test_sizes_come_before_memory(tmp_path):
    header = nib.Nifti1Image(np.zeros((2, 2, 2), "u1"), np.eye(4)).to_bytes()[:352]
    lying = bytearray(header)
    lying[40:48] = np.array([3, 30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "huge.nii").write_bytes(bytes(lying) + b"\0"*64)
    with pytest.raises(DataProblem): viz(tmp_path / "huge.nii")


def test_window_and_level_follow_the_feature(volume):
    volume[..., 1] *= 1000
    panel = viz((volume, AFFINE))
    greys = panel.viewer.controls.greys
    first = greys.value
    panel.feature = 1
    assert greys.value[1] > 500*first[1] and panel.viewer.window is None
    greys.value = greys.value[0], 5000.0
    assert panel.viewer.window == 5000 - greys.value[0]
    panel.feature = 2
    assert panel.viewer.window == 5000 - greys.value[0], "what was chosen stays"


def test_lines_are_the_same_however_they_come(tmp_path):
    from dipy.io.stateful_tractogram import Origin, Space, StatefulTractogram
    whole = tractogram()
    save_tractogram(whole, tmp_path / "t.trk")
    stored = nib.streamlines.load(tmp_path / "t.trk")
    image = nib.Nifti1Image(np.zeros((20, 20, 16), "u1"), AFFINE)
    sft = StatefulTractogram(lines(), image, Space.RASMM, origin=Origin.NIFTI, data_per_streamline={"weight": np.arange(6.0)[:, None]})
    sft.to_vox()
    sft.to_corner()
    moved = nib.streamlines.Tractogram([p + 5 for p in lines()], affine_to_rasmm=np.array([[1, 0, 0, -5], [0, 1, 0, -5], [0, 0, 1, -5], [0, 0, 0, 1.0]]))
    for x in (whole, whole.lines, lines(), tuple(lines()), [torch.from_numpy(p) for p in lines()], tmp_path / "t.trk", stored, stored.tractogram, stored.streamlines, sft, moved):
        [drawn] = viz(x).scene.lines
        assert np.allclose(drawn.lines.data, whole.lines.data, atol=1e-3), type(x)
    assert (sft.space, sft.origin) == (Space.VOX, Origin.TRACKVIS), "it stays as it was"
    assert "weight" in viz(sft).scene.colourings and "weight" in viz(tmp_path / "t.trk").scene.colourings
    assert in_rasmm(sft).lines.data.dtype == torch.float32


def test_many_lines_are_thinned_and_several_files_are_told_apart(tmp_path):
    from dwiml_nb.widgets.viz import viz_tractogram
    assert "2 of 6 lines" in caption(viz_tractogram(tractogram(), most=2))
    for name in ("a", "b"): save_tractogram(tractogram(), tmp_path / f"{name}.trk")
    both = viz([tmp_path / "a.trk", tmp_path / "b.trk"])
    assert [s.name for s in both.scene.lines] == ["a.trk", "b.trk"] and "12 lines of 2 files" in caption(both)
    assert [s.name for s in viz({"mine": tractogram(), "yours": tractogram()}).scene.lines] == ["mine", "yours"]
    assert len(viz(np.zeros((7, 3))).scene.points[0]) == 7


def test_a_folder_of_images_and_tractograms(volume, tmp_path):
    (tmp_path / "dwi").mkdir()
    nib.save(nib.Nifti1Image(volume, AFFINE), tmp_path / "dwi" / "dwi.nii.gz")
    nib.save(nib.Nifti1Image(volume[..., 0], AFFINE), tmp_path / "dwi" / "fa.nii.gz")
    for name in ("left", "right"): save_tractogram(tractogram(), tmp_path / f"{name}.trk")
    panel = viz(tmp_path)
    assert list(panel.volumes) == ["dwi/dwi.nii.gz", "dwi/fa.nii.gz"] and "12 lines over it" in caption(panel)
    assert panel.viewer.scene.lines[0].legends["bundle"] == ["left", "right"]


def test_a_model_says_its_parts_and_what_it_sees(tmp_path):
    from dwiml_nb.models.learn2track import Learn2TrackModel
    model = Learn2TrackModel(nb_features=4, rnn_layer_sizes=[8], step_size=1.0, neighborhood_type="axes", neighborhood_radius=2, neighborhood_resolution=0.5)
    model.save_params_and_state(tmp_path / "best_model")
    for panel in (viz(model), viz(tmp_path / "best_model")):
        words = panel.tables.value
        assert f"{sum(p.numel() for p in model.parameters()):,}" in words and "a point every 1 mm" in words and "4 features, at each point and 12 around it" in words
        assert sum(map(len, panel.viewers[0].scene.points)) == 13
    plain = viz(torch.nn.Linear(2, 2))
    assert "parameters that are in no part" in plain.tables.value and not plain.viewers


GOOD = dict(VS=0.5, IB=0.2, NC=0.3, OL=0.6, OR=0.1, F1=0.5, VB=1, n_bundles=1, n_lines=10, bundles={"<i>b": dict(n_valid=5, share=0.5, OL=0.6, OR=0.1, F1=0.5)}, reasons={"valid": 5, "no end": 5})


def test_scores_are_shown_and_text_in_them_is_escaped(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"ours": GOOD, "<b>x": GOOD, "seed": 3}))
    panel = viz(tmp_path / "scores.json")
    panel.bundle = "<i>b"
    assert panel.table.value.count('<tr class="dwiml-on"') == 2 and "<i>b" not in panel.table.value and "<b>x" not in panel.still()
    (tmp_path / "one.json").write_text(json.dumps(GOOD))
    assert list(viz(tmp_path / "one.json").scores) == ["one.json"]


@pytest.mark.parametrize("change", [{"OL": float("nan")}, {"VS": "<script>"}, {"bundles": {"a": 3}}, {"reasons": {"valid": None}}])
def test_scores_that_are_no_numbers_are_refused(change):
    with pytest.raises(DataProblem, match="not all numbers"): checked_scores({**GOOD, **change}, "mine")


@pytest.mark.parametrize("x, says", [(42, "know how to show a int"), ([], "It holds nothing"), ([np.zeros((3, 2))], "It holds ndarray"), ({"a": 1}, "It holds int"), (iter([]), "list_iterator")])
def test_anything_else_is_one_sentence(x, says):
    with pytest.raises(TypeError, match=says) as e: viz(x)
    assert "viz takes a study" in str(e.value) and "\n" not in str(e.value)


def test_a_wrong_path_names_the_nearest(tmp_path):
    save_tractogram(tractogram(), tmp_path / "left.trk")
    with pytest.raises(FileNotFoundError, match="Did you mean 'left.trk'"): viz(tmp_path / "lefft.trk")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataProblem, match="of scores"): viz(tmp_path / "x.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataProblem, match="Found: nothing"): viz(tmp_path / "empty")


def test_a_page_is_one_file_that_asks_for_nothing(volume, tmp_path):
    whole = viz(tractogram(), "<script>alert(1)</script>")
    page = whole.to_html(tmp_path / "t.html")
    text = page.read_text()
    assert "<script>alert" not in text and "http://" not in text and "https://" not in text and "This page is one file of" in text
    with pytest.raises(FileExistsError): whole.to_html(page)
    assert whole.to_html(page, overwrite=True) == page and [p.name for p in tmp_path.iterdir()] == ["t.html"]
    both = page_of([*parts_of(whole), *parts_of(viz((volume, AFFINE)))])
    assert both.count("class StageView") == 1 and both.count('class="dwiml-turns"') == 2


def test_a_tracker_is_watched(demo):
    from dwiml_nb.data.dataset import MultiSubjectDataset
    from dwiml_nb.models.learn2track import Learn2TrackModel
    from dwiml_nb.tracking.tracker import Tracker
    dataset = MultiSubjectDataset(demo / "study.hdf5", lazy=True).load_data()
    model = Learn2TrackModel(dataset.nb_features["input"], step_size=2.0, rnn_layer_sizes=[8]).eval()
    tracker = Tracker(model, dataset, dataset.testing.subjects[0], "input", "wm_mask", max_length_mm=30, min_length_mm=0)
    player = viz(tracker, 3)
    assert player.over.wait(60) and player.state == "tracked" and len(player.tractogram)
    assert ["dwiml-turns" in p.body for p in parts_of(player)] == [False, True, False]
    with pytest.raises(TypeError, match="needs seeds"): viz(tracker)
    player.close()
    dataset.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A folder as the demo leaves it, of the toy study: the tractogram is the truth with two bad lines, CSD's is half of the truth."
    from dwiml_nb.data.dataset import MultiSubjectDataset
    from dwiml_nb.study.toy import toy_study
    from dwiml_nb.training.sinks import ExperimentLogs
    out = tmp_path_factory.mktemp("demo")
    dataset = MultiSubjectDataset(toy_study(out), lazy=True).load_data()
    truth = dataset.testing.subject(0).streamlines["bundles"].as_tractogram()
    short = [line[:4] for line in truth.lines.unbind()[:2]]
    save_tractogram(Tractogram([*truth.lines.unbind(), *short], truth.grid), out / "tractogram.trx")
    save_tractogram(Tractogram(truth.lines[::2], truth.grid), out / "csd.trx")
    (out / "scores.json").write_text(json.dumps({"held_out": dataset.testing.subjects[0]}))
    logs = ExperimentLogs(out / "experiments" / "learn2track" / "logs")
    logs.folder.mkdir(parents=True)
    logs.epochs.write({"epoch": 0, "train_loss": 1.0, "valid_loss": 0.9})
    logs.close()
    dataset.close()
    return out


@pytest.fixture
def board(demo):
    board = viz(demo)
    yield board
    assert not board.error
    board.close()


def shown(board):
    return {name: int(scene.lines[0].shown.sum()) for name, scene in board.beside.scenes.items()}


def test_a_bundle_chosen_anywhere_shows_everywhere(board):
    first, second = board.names[:2]
    whole = shown(board)
    for choose in (lambda: setattr(board, "bundle", first), lambda: setattr(board.scores, "bundle", first), lambda: setattr(board.beside.choosers["bundle"], "value", first)):
        choose()
        assert board.bundle == board.scores.bundle == board.beside.only["bundle"] == board.beside.choosers["bundle"].value == first
        assert shown(board) == {"truth": 60, "this kit": 60, "dipy CSD": 30} and board.scores.table.value.count('<tr class="dwiml-on"') == 3
        board.bundle = second
        board.bundle = ""
        assert shown(board) == whole == {"truth": 120, "this kit": 122, "dipy CSD": 60}
    board.bundle = "none"
    assert shown(board) == {"truth": 0, "this kit": 2, "dipy CSD": 0}


def test_a_range_of_lengths_chosen_anywhere_shows_everywhere(board):
    expected = {name: int((scene.lines[0].lengths_mm >= 20).sum()) for name, scene in board.beside.scenes.items()}
    most = board.beside.lengths.max
    for choose in (lambda: setattr(board, "length_mm", (20.0, most)), lambda: setattr(board.browser, "line_filter", "length_mm >= 20"), lambda: setattr(board.beside.lengths, "value", (20, most))):
        choose()
        assert board.length_mm == board.beside.length_mm == (20.0, most) and "length_mm >= 20" in board.browser.line_filter and shown(board) == expected
        assert "2 one end" not in board.scores.table.value, "the two short lines do not count now"
        board.length_mm = None
        assert board.browser.line_filter == "" and shown(board)["this kit"] == 122


def test_a_subject_chosen_anywhere_shows_its_truth_alone(board):
    other = board.study.subjects["training"][0]
    for choose in (lambda: setattr(board, "subject", other), lambda: setattr(board.browser, "subject", other), lambda: setattr(board.beside.choosers["subject"], "value", other)):
        choose()
        assert board.subject == board.browser.subject == other and board.beside.scenes["truth"].slices[0].name == other
        assert shown(board)["this kit"] == 0 < shown(board)["truth"] and "Only" in board.message.value
        board.subject = board.tracked
        assert shown(board) == {"truth": 120, "this kit": 122, "dipy CSD": 60}


def test_the_board_is_one_page(board, tmp_path):
    text = board.to_html(tmp_path / "demo.html").read_text()
    assert text.count("class StageView") == 1 and text.count('class="dwiml-turns"') == 3 and text.count("data-subject=") == 4 and "https://" not in text


def test_an_older_demo_has_no_tractogram_of_csd(demo, tmp_path):
    for path in demo.iterdir():
        if path.name != "csd.trx": (tmp_path / path.name).symlink_to(path)
    board = viz(tmp_path)
    assert list(board.beside.viewers) == ["truth", "this kit"] and "dipy CSD" in board.message.value
    board.close()


def test_a_demo_whose_scores_name_a_stranger_is_refused(demo, tmp_path):
    for path in demo.iterdir():
        if path.name != "scores.json": (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scores.json").write_text('{"held_out": "<b>nobody"}')
    with pytest.raises(DataProblem, match="name no subject of the study"): viz(tmp_path)
