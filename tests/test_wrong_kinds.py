"""Lines, scenes, ids and masks of a kind that is not meant: each is refused in words, or taken as what it plainly is."""
import copy
import json
import pickle

import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoader
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.batch.stages import batch_in_stages
from dwiml_nb.core import lines as on_lines
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.evaluation.bundles import score_tractogram
from dwiml_nb.study.toy import toy_study
from dwiml_nb.viz.painter import paint, paint_side_by_side, paint_views
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.side_by_side import SideBySide
from dwiml_nb.viz.viewers import show

LINES = [np.random.default_rng(i).random((5 + i, 3)).astype(np.float32) for i in range(3)]
CALLS = {"directions": (), "previous_directions": (2,), "lengths_of": (), "arc_positions": (), "resample_nb_points": (5,), "resample_step": (.1,), "compress": (.1,), "reverse": (),
         "all_but_last": (), "white_noise": (0.,), "split": (torch.tensor([1, 2, 3]),), "cut": (torch.ones(3, dtype=torch.long), torch.full((3,), 2)), "wandering_noise": (torch.zeros(3), 1.),
         "points_along": (torch.full((3,), 4),)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("kinds")))
    yield dataset.load_data()
    dataset.close()


@pytest.mark.parametrize("name", CALLS)
def test_lines(dataset, name):
    "A list of lines is taken; what only has lines, or leads to them, is told where they are."
    call = lambda lines: getattr(on_lines, name)(lines, *CALLS[name])
    rows = lambda made: getattr(made[0] if isinstance(made, tuple) else made, "data", made)
    assert torch.equal(rows(call(LINES)), rows(call(as_ragged(LINES))))
    sft = dataset.training.subject(0).streamlines["bundles"].as_sft([0, 1, 2])
    for wrong, says in ((sft, "found a StatefulTractogram. Its lines are its .streamlines"), (Tractogram(as_ragged(LINES)), "Its lines are its .lines"), ("a.trk", r"load_tractogram\(path\).lines"),
                        (torch.rand(5, 3), r"One line is a list of one: \[points\]"), (3, "found a int"), (["a.trk"], "a line is an array of its points"), ([1, 2], "found a number")):
        with pytest.raises(TypeError, match=says): call(wrong)


def test_scenes():
    scene = Scene().add_lines(LINES)
    for call in (paint, paint_views, show):
        for wrong in ([scene], {"one": scene}, LINES):
            with pytest.raises(TypeError, match=f"a Scene is shown, found a {type(wrong).__name__}"): call(wrong)
    for call in (paint_side_by_side, SideBySide):
        with pytest.raises(TypeError, match="{title: Scene}, found a list"): call([scene])
        with pytest.raises(TypeError, match="a Scene is shown, found a list"): call({"one": LINES})
        with pytest.raises(ValueError, match="at least one scene"): call({})
    assert np.array_equal(paint_views(scene, "coronal"), paint_views(scene, ["coronal"]))
    with pytest.raises(ValueError, match="a view is one of .*Did you mean 'axial'?"): paint_views(scene, "axail")


@pytest.mark.parametrize("ids", [[0, 1], 0, None, "sub-01", [(0,)], [(0, 1)], [(0, [0], 1)], {0: [0, 1]}, [(0, "ab")], [(0, None)], [("sub-01", [0])], [(None, [0])], np.array([0, 1]), [(0, [[0, 1]])]], ids=str)
def test_ids_of_a_batch(dataset, ids):
    loader = DWIMLBatchLoader(dataset, ModelSpec(), "bundles")
    for call in (loader.load_batch_streamlines, lambda ids: batch_in_stages(loader, ids)):
        with pytest.raises(DataProblem, match="these are no ids of a batch. Expected: pairs"): call(ids)


def test_references(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    for reference, says in ((tmp_path / "none", "none: there is no such reference. Expected: a JSON file, or a folder with"), (tmp_path, "holds no scoring configuration.*Found: mine.txt. To do"), (None, "this is no reference.*Found: a NoneType")):
        with pytest.raises(DataProblem, match=says): score_tractogram(Tractogram(as_ragged(LINES), Grid(np.eye(4), (4, 4, 4))), reference)


def test_names_of_a_tractogram():
    "Its dictionaries stay dictionaries: equal, copied, sent, written as JSON; an unknown name is told."
    given = dict(dps={"weight": np.arange(3.)[:, None]}, groups={"left": [0, 2]}, dpp={"height": np.zeros((18, 1))})
    whole = Tractogram(as_ragged(LINES), **given)
    assert whole.groups == given["groups"] and json.loads(json.dumps(whole.groups)) == given["groups"]
    for made in (whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        for named, wrong, says in ((made.dps, "wieght", "no data per streamline 'wieght'. Did you mean 'weight'"), (made.dpp, "weight", "no data per point 'weight'"), (made.groups, "lefts", "no group 'lefts'. Did you mean 'left'")):
            with pytest.raises(KeyError, match=says): named[wrong]
