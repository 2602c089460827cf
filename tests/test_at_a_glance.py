"""What a first hour asks of the widgets: who is odd, which line is told of, where a clicked batch went, a figure that a page lost."""
import inspect

import h5py
import pytest
import torch
from plotly.callbacks import Points

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.viz.tables import Column, column_options
from dwiml_nb.widgets.study_browser import StudyBrowser
from dwiml_nb.widgets.training_dashboard import TrainingDashboard


@pytest.fixture(scope="module")
def odd_study(tmp_path_factory):
    "Ten subjects: the lines of one are left for right, those of another in centimetres."
    path = toy_study(tmp_path_factory.mktemp("odd"), n_subjects=10)
    with h5py.File(path, "r+") as file:
        file["sub-04/bundles/data"][:, 0] = 16 - file["sub-04/bundles/data"][:, 0]
        for name in ("data", "euclidean_lengths"): file[f"sub-07/bundles/{name}"][:] /= 10
    return path


def test_who_is_unlike_the_others_is_told_and_comes_first(odd_study):
    browser = StudyBrowser(odd_study)
    try:
        browser.check_button.click()
        assert browser.facts.wait()
        said = browser.facts.progress()
        assert "10 of 10 subjects measured, 10 checked, none of them with problems; sub-" in said and said.endswith(" unlike the others")
        assert "mean length 2.75 mm, usual 27" in said and "% of points outside wm_mask, usual 0." in said
        place = browser.facts.table.place("problems")
        words = {row[1]: row[place] for row in browser.facts.table.rows}
        assert {s for s, w in words.items() if w} == {"sub-04", "sub-07"} and words["sub-04"].startswith("unlike the others: ")
        assert set(words.values()) >= {""}
        assert "unlike the others: " in browser.facts.about(browser.row_of["sub-04"]) and "unlike" not in browser.facts.about(browser.row_of["sub-01"])
        assert column_options(Column("problems", "warning"))["orderSequence"][0] == "desc"
    finally: browser.close()


@pytest.fixture
def board(odd_study, tmp_path):
    "A dashboard of a training that was trained for an epoch."
    torch.manual_seed(0)
    study = MultiSubjectDataset(odd_study).load_data()
    model = Learn2TrackModel(study.nb_features["input"], step_size=2., rnn_layer_sizes=[4])
    trainer = DWIMLTrainerOneInput(model, tmp_path / "runs", "one", DWIMLBatchIDSampler(study, "bundles", 60, 60),
                                   DWIMLBatchLoaderOneInput(study, model, "input", "bundles"), device="cpu", max_epochs=1)
    trainer.train_and_validate()
    made = TrainingDashboard(trainer)
    yield made
    made.close()
    study.close()


def test_a_page_that_lost_the_figure_gets_it_anew(board):
    curves, before = board.curves, board.figure
    assert curves.fit.due == len(before.data) > 3 and len(before._widget_data) == len(before.data)  # a page begins with all of it
    curves.fit._handle_custom_msg("lost", [])
    after = board.figure
    assert after is not before and curves.frame.children == (after,) and before.comm is None and curves.error == ""
    assert [len(t.x) for t in after.data] == [len(t.x) for t in before.data] and len(after._widget_data) == curves.fit.due
    assert [o.text for o in after.layout.annotations] == [o.text for o in before.layout.annotations]
    told, points = [], Points(point_inds=[1])
    curves.on_pick[:] = [lambda *place: told.append(place)]
    next(t for key, t in curves.traces.items() if key[1:] == ("loss", "training", "batch"))._dispatch_on_click(points, None)
    assert told == [("training", 0, 1)]


def test_a_clicked_batch_says_where_it_opens_and_is_brought_there(board, monkeypatch):
    sent = []
    monkeypatch.setattr("dwiml_nb.viz.panel.Foot.send", lambda self, content, buffers=None: sent.append((self, content)))
    for told in board.curves.on_pick: told("training", 0, 2)
    foot = board.preview.message
    assert "training batch 3 of epoch 1 is open under the curves" in board.message.value and sent == []
    foot.page = "a load"                                   # now it is drawn
    assert sent == [(foot, {"bring": True})]
    for told in board.curves.on_pick: told("training", 0, 1)
    assert sent[1:] == [(foot, {"bring": True})]

    words, line = board.preview.worst.options[0]
    board.preview.worst.value = line
    whose = words.split(": ", 1)[1].split(", ")[0]
    assert whose in board.preview.side.told.value and "id in the study" in board.preview.side.told.value and " mm: " in board.preview.side.told.value


def test_nothing_logged_has_no_axes(odd_study):
    from dwiml_nb.viz.curves import Curves
    empty = Curves({})
    assert empty.figure.layout.xaxis.visible is False and empty.figure.layout.annotations[0].text == "nothing is logged yet"
    empty.close()


def test_help_on_a_widget_leads_to_its_parameters():
    for widget in (StudyBrowser, TrainingDashboard):
        assert inspect.getdoc(widget.__init__) == "`??` instead of `?` shows what each parameter means."
