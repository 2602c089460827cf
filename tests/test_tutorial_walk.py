"""What stopped a reader of the tutorials who changed a value or took one thing for another: each now says what to give instead."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.core.tractograms import save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.track import experiment_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.widgets.viz import viz


@pytest.fixture(scope="module")
def dataset(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("walk"))).load_data()


def test_the_folder_of_a_model_and_that_of_its_experiment(tmp_path):
    experiment = tmp_path / "small"
    experiment.mkdir()
    Learn2TrackModel(3, rnn_layer_sizes=[4]).save_params_and_state(experiment / "best_model")
    with pytest.raises(DataProblem, match=r"folder of an experiment, not of a model. To do: give .*small/best_model, or take experiment_model"): load_model(experiment)
    with pytest.raises(DataProblem, match=r"folder of a model, not of an experiment. To do: give the folder that best_model/ is in"): experiment_model(experiment / "best_model")
    assert type(load_model(experiment / "best_model")) is type(experiment_model(experiment, device="cpu")) is Learn2TrackModel


def test_a_subject_by_its_number(dataset):
    assert dataset.testing.subject(0) is dataset.testing.subject(-1) is dataset.testing.subject(np.int64(0))
    for number in (1, -2):
        with pytest.raises(DataProblem, match=f"no subject number {number} in the testing subset. Expected: a number below 1, or an id"): dataset.testing.subject(number)


def test_lines_that_are_something_else(dataset, tmp_path):
    with pytest.raises(TypeError, match=r"found a SFTData. Those of a study's group are its as_tractogram\(\).lines"): as_ragged(dataset.testing.subject(0).streamlines["bundles"])
    with pytest.raises(TypeError, match=r"a Tractogram is saved, found a list. Tractogram\(lines, grid\)"): save_tractogram([np.zeros((3, 3))], tmp_path / "a.trk")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="a type. Make an object of it first"): viz(dict)


def test_readers_get_threads_that_sleep():
    "Torch's idle threads do when dwiml_nb is imported first, so what people copy from says it in that order."
    pages = Path(__file__).parent.parent/"nbs"
    for page in [*sorted((pages/"tutorials").glob("*.ipynb")), pages/"gallery.ipynb"]:
        code = "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code")
        first = re.search(r"^(import|from) (torch|lightning_fabric|dwiml_nb)", code, re.M)
        assert first and first[2] == "dwiml_nb", page.name
