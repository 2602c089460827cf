"""The study as a table, and what is chosen of it: subjects left out, a filter of lines, the code that says so."""
import threading

import h5py
import numpy as np
import pytest
import torch

from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import all_but_last
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import TRACTOGRAM_FORMATS, Tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.line_filter import LineFilter, conditions_of
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, write_run_file
from dwiml_nb.study.check import check_study
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.viz.tables import Column, column_options
from dwiml_nb.widgets import run_panel  # noqa: F401 - write_run of a browser
from dwiml_nb.widgets.study_browser import StudyBrowser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A toy study whose lines have a weight and a bundle."
    path = toy_study(tmp_path_factory.mktemp("study"))
    with h5py.File(path, "r+") as file:
        for attr in list(file.attrs):
            if "headers" in attr: del file.attrs[attr]  # the headers change
        for i, subject in enumerate(file):
            n, rng = 120, np.random.default_rng(i)
            dps = file[subject]["bundles"]["data_per_streamline"]
            dps["weight"], dps["peaks"] = rng.random((n, 1)), rng.normal(size=(n, 3))
            dps["weight"][5] = np.nan
    return path


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def epoch(sampler, context="training", n=0): return [[(s, ids.tolist()) for s, ids in b] for b in sampler.batches(context, n)]


# ---- which lines

def test_a_filter_is_what_numpy_says(dataset):
    lines = dataset.training.streamlines_of(0, "bundles")
    mm, dps = lines.lengths_mm, lines.get_dps()
    weight, peaks = dps["weight"][:, 0], dps["peaks"]
    for text, wanted in (("length_mm >= 26", mm >= 26), ("weight > .5, length_mm < 27", (weight > .5) & (mm < 27)), ("peaks[1] <= -0.25", peaks[:, 1] <= -.25),
                         ("nb_points != 3", lines.lengths != 3), ("weight != 2", np.isfinite(weight)), ("weight<.1 and weight>0", (weight < .1) & (weight > 0))):
        assert np.array_equal(LineFilter(text)(lines), np.flatnonzero(wanted)), text
    assert LineFilter(LineFilter("peaks[1]<=-.25,weight>5e-1").texts).texts == ["peaks[1] <= -0.25", "weight > 0.5"]
    for text, said in (("peaks > 1", "does not say which column"), ("peaks[3] > 1", "a column that is not there")):
        with pytest.raises(DataProblem, match=said) as told: LineFilter(text)(lines)
        assert (told.value.subject, told.value.group) == ("sub-01", "bundles")
    for wrong in ("length_mm = 3", "> 3", "length_mm > inf", ["length_mm", "> 3"], 7, [7]):
        with pytest.raises(ValueError, match="length_mm >= 20"): conditions_of(wrong)


@pytest.mark.parametrize("options", [{}, dict(batch_size_units="length_mm", batch_size_training=700), dict(budget_per_subject="equal"), dict(line_weights="length"), dict(nb_passes=2)])
def test_each_kept_line_comes_and_no_other(dataset, options):
    weights = dict(line_weights=lambda subset, subject, group: subset.streamlines_of(subject, group).lengths_mm) if "line_weights" in options else {}
    options = dict(batch_size_training=30) | options | weights
    sampler = DWIMLBatchIDSampler(dataset, "bundles", line_filter="weight >= .4", **options)
    for context, subset in (("training", dataset.training), ("validation", dataset.validation)):
        for s in range(len(subset)):
            kept = LineFilter("weight >= .4")(subset.streamlines_of(s, "bundles"))
            came = np.sort(np.concatenate([ids for b in sampler.batches(context) for who, ids in b if who == s]))
            if context == "training" and weights: assert len(came) == len(kept) and np.isin(came, kept).all()
            else: assert np.array_equal(came, np.repeat(kept, sampler.passes(context)))
    assert epoch(sampler) == epoch(sampler) != epoch(sampler, n=1)
    assert sampler.batch(1).nb_streamlines == len([i for _, ids in epoch(sampler)[1] for i in ids])


def test_a_filter_that_keeps_all_changes_no_batch(dataset):
    "The order is keyed by ranks among the kept lines: where all are kept, it is that of a sampler without a filter."
    plain, all_kept = (DWIMLBatchIDSampler(dataset, "bundles", 25, line_filter=f) for f in (None, "length_mm > 0"))
    assert epoch(plain) == epoch(all_kept) and "line_filter" not in plain.params and "line_filter" not in repr(plain)
    assert epoch(DWIMLBatchIDSampler(dataset, "bundles", 25, line_filter=[])) == epoch(plain)


def test_what_no_line_fulfils_and_what_no_subject_has(dataset):
    with pytest.raises(DataProblem, match="Did you mean 'weight'") as told: DWIMLBatchIDSampler(dataset, "bundles", line_filter="wieght > .5")
    assert told.value.subject == "sub-01"
    empty = DWIMLBatchIDSampler(dataset, "bundles", line_filter="length_mm > 1e6")
    assert empty.nb_batches() == 0 and epoch(empty) == []
    zero = lambda subset, subject, group: (subset.streamlines_of(subject, group).lengths_mm < 26) * 1.
    with pytest.raises(DataProblem, match="at least one weight above 0"): epoch(DWIMLBatchIDSampler(dataset, "bundles", line_weights=zero, line_filter="length_mm > 27"))


# ---- which subjects

def test_a_study_without_some_subjects(study):
    fewer, one = (MultiSubjectDataset(study, lazy=lazy, leave_out=out).load_data() for lazy, out in ((True, ["sub-01", "sub-04"]), (False, "sub-02")))
    assert [fewer.subset(s).subjects for s in ("training", "validation", "testing")] == [["sub-02"], ["sub-03"], []] and fewer.first_subject == "sub-02"
    assert one.training.subjects == ["sub-01"] and "without 1 of its subjects" in one.headline()
    with pytest.raises(DataProblem, match="no subject 'sub-1' in the study to leave out.*Did you mean 'sub-01'"): MultiSubjectDataset(study, leave_out=["sub-1"])
    with pytest.raises(DataProblem, match="no subject 'sub-01'"): fewer.load_data(subj_id="sub-01")


# ---- runs

RUN = dict(data=dict(leave_out=["sub-02"], streamline_group_name="bundles", input_group_name=["input", "wm_mask"]), sampler=dict(batch_size_training=20, line_filter=["length_mm >= 25", "weight > 0.2"]),
           model=dict(rnn_layer_sizes=[4], step_size=2.), training=dict(experiment_name="run", max_epochs=1, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, device="cpu"))


def test_a_run_file_says_it_and_resume_knows_it(study, tmp_path):
    tables = RUN | dict(data=RUN["data"] | dict(hdf5_file=str(study)), training=RUN["training"] | dict(experiments_path=str(tmp_path)))
    trainer = run_parts(run_config(tables)).trainer
    trainer.train_and_validate()
    record = read_checkpoint(tmp_path / "run").params
    assert record["dataset"]["leave_out"] == ["sub-02"] and record["sampler"]["params"]["line_filter"] == ["length_mm >= 25", "weight > 0.2"]
    assert list(record["study"]["training"]) == ["sub-01"]
    again = trainer_from_folder(tmp_path, "run", new_max_epochs=2)
    assert again.batch_sampler.dataset.training.subjects == ["sub-01"] and epoch(again.batch_sampler) == epoch(trainer.batch_sampler)
    again.train_and_validate()
    write_run_file(trainer, tmp_path / "again.toml")
    text = (tmp_path / "again.toml").read_text()
    assert 'leave_out = ["sub-02"]' in text and 'line_filter = ["length_mm >= 25", "weight > 0.2"]' in text
    assert epoch(run_parts(run_config(tmp_path / "again.toml", "training.experiment_name=other")).sampler) == epoch(trainer.batch_sampler)
    other = trainer.batch_sampler
    other.line_filter = LineFilter("length_mm >= 26")
    with pytest.raises(DataProblem, match="line_filter"): type(trainer).init_from_checkpoint(trainer.model, tmp_path, "run", other, trainer.batch_loader, new_max_epochs=3)
    with pytest.raises(DataProblem, match="a condition on lines|sampler"): run_parts(run_config(tables, "sampler.line_filter=length"))


# ---- the table, and what comes from the background

def cell(browser, row, title): return browser.table.rows[row][browser.table.place(title)]


@pytest.fixture
def browser(dataset):
    made = StudyBrowser(dataset)
    yield made
    made.close()


def test_rows_come_from_headers_and_the_rest_for_the_rows_on_the_page(dataset, browser, monkeypatch):
    group = dataset.training.streamlines_of(0, "bundles")
    nbytes = sum(v.get_data_as_tensor().nbytes for v in dataset.training.subject(0).volumes.values()) + group.nb_stored_points * 12 + 120 * 16
    assert [cell(browser, 0, t) for t in ("subset", "subject", "lines", "grid", "in memory")] == ["training", "sub-01", 120, "16×16×5, 2 mm RAS", nbytes]
    assert cell(browser, 0, "mean mm") is cell(browser, 0, "problems") is None
    sent = []
    monkeypatch.setattr(browser.table.wire, "send", sent.append)
    browser.table.wire.shown = [0, 2]
    assert browser.facts.wait()
    assert cell(browser, 0, "mean mm") == round(group.lengths_mm.mean(), 1) and sum(cell(browser, 0, "lengths")) == 120 and cell(browser, 1, "mean mm") is None
    assert cell(browser, 0, "problems") == cell(browser, 2, "problems") == ""
    assert {row for message in sent for row, _ in message["cells"]} == {0, 2}, "only the cells that changed travel"


def test_the_check_is_that_of_the_command(study, tmp_path):
    broken = tmp_path / "broken.hdf5"
    broken.write_bytes(study.read_bytes())
    with h5py.File(broken, "r+") as file:
        file["sub-02/input/data"][1, 1, 1, 0] = np.inf
        file["sub-03/bundles/lengths"][3] = 10**6
        file["sub-04/bundles"].attrs["voxel_sizes"] = [9., 9., 9.]
    data = MultiSubjectDataset(broken, lazy=True).load_data()
    made = StudyBrowser(data)
    made.check_button.click()
    made.facts.wait()
    wanted = {s: [p.problem for p in check_study(broken).problems if p.subject == s] for s in ("sub-01", "sub-02", "sub-03", "sub-04")}
    for i, (s, problems) in enumerate(wanted.items()):
        found = made.facts.overview.known["check", s]
        assert len(found) == len(problems) and all(p in f for p, f in zip(problems, found)) and bool(problems) == (s != "sub-01"), s
        assert cell(made, i, "problems") == (f"{len(found)}: {'; '.join(found)}" if found else "")
    assert "4 of 4 subjects measured, 4 checked, 3 of them with problems" in made.message.value and made.check_button.description == "Check all"
    made.subject = "sub-02"
    assert "NaN or infinite" in made.about.value
    made.close()


def test_names_of_files_are_text(tmp_path):
    "Rows travel raw and are escaped where they are drawn; what is HTML here is escaped here."
    name, path = "sub-<img src=x onerror=alert(1)>&'\"", toy_study(tmp_path)
    with h5py.File(path, "r+") as file:
        for attr in [a for a in file.attrs if "headers" in a]: del file.attrs[attr]
        file.move("sub-01", name)
        file[name].move("bundles", "<b>lines")
        for s in ("sub-02", "sub-03", "sub-04"): file[s].move("bundles", "<b>lines")
        for attr in ("training_subjs", "chosen_subjs"): file.attrs[attr] = [name if s == "sub-01" else s for s in file.attrs[attr]]
    made = StudyBrowser(path)
    made.subject = name
    made.facts.wait()
    made.code_button.click()
    html = made.still() + made.about.value + made.heading.value + made.code_box.value
    assert "<img src=x" not in html and "<b>lines" not in html and "&lt;img src=x" in html
    exec(made.code, {"model": ModelSpec(step_size=1.)}, built := {})
    assert name in built["dataset"].training.subjects and built["sampler"].streamline_group_name == "<b>lines"
    render = column_options(Column("subject"))["render"]
    assert "charCodeAt" in render and render.index("replace(/[&<>") < render.rindex("return t ==="), "escaped for whatever the table asks it for"
    made.close()


# ---- the choice

def test_rows_that_are_selected_are_left_out_and_taken_back(browser):
    browser.table.selected = [1, 3]
    browser.out_button.click()
    assert browser.leave_out == ["sub-02", "sub-04"] and [cell(browser, i, "use") for i in range(4)] == [None, "left out", None, "left out"]
    browser.table.selected = [3]
    browser.out_button.click()
    assert browser.leave_out == ["sub-02"] and browser.tables["data"]["leave_out"] == ["sub-02"] and cell(browser, 3, "use") is None
    assert browser.subject == "sub-04" and browser.shown[0] == "look", "one selected row is looked at"


def test_the_code_gives_the_same_batches_bit_for_bit(browser, tmp_path):
    browser.input_group_name, browser.line_filter, browser.leave_out = ["wm_mask", "input"], "weight>0.3 and length_mm >= 24", ["sub-02"]
    model = ModelSpec(step_size=1.)
    exec(browser.code, {"model": model}, made := {})
    dataset = browser.chosen.make_dataset()
    sampler, loader = browser.chosen.make_sampler(dataset), browser.chosen.make_loader(model, dataset)
    assert made["loader"].params == loader.params and made["sampler"].params == sampler.params and sampler.params["line_filter"] == ["weight > 0.3", "length_mm >= 24"]
    browser.write_run(tmp_path / "run.toml", "training.experiment_name=x", "model.step_size=1.0")
    parts = run_parts(run_config(tmp_path / "run.toml"))
    for context in ("training", "validation"):
        for i in range(sampler.nb_batches(context)):
            batches = [l.finish(l.load_batch_streamlines(s.batch(i, context))) for s, l in ((sampler, loader), (made["sampler"], made["loader"]), (parts.sampler, parts.loader))]
            ours, theirs, of_file = batches
            assert len(ours) > 0 and torch.equal(ours.lines.data, theirs.lines.data) and torch.equal(ours.inputs[0].data, theirs.inputs[0].data)
            seen = all_but_last(ours.lines.with_data(ours.inputs[0].data))  # the file's model does not look at last points
            assert torch.equal(ours.lines.data, of_file.lines.data) and torch.equal(seen.data, of_file.inputs[0].data)
    browser.input_group_name = ""
    assert "DWIMLBatchLoader(dataset, model, streamline_group_name='bundles')" in browser.code and "input_group_name" not in browser.choice


def test_a_filter_is_looked_at_and_told(browser):
    browser.line_filter = "weight > 0.5"
    browser.look()
    kept = len(LineFilter("weight > 0.5")(browser.dataset.training.streamlines_of(0, "bundles")))
    assert browser.viewer.caption.value.startswith(f"{kept} of 120 lines") and "bundle" not in browser.error
    text = next(w for w in browser.children[1].children[0].children if getattr(w, "description", "") == "lines with")
    text.value = "wieght > 1"
    assert "Did you mean 'weight'" in browser.error and browser.line_filter == "weight > 0.5"
    text.value = ""
    assert browser.line_filter == "" and not browser.error and browser.viewer.caption.value.startswith("120 of 120")


def test_two_numbers_are_the_range_of_lengths(browser):
    low, high = browser.length_boxes
    browser.line_filter = "weight > 0.2, length_mm > 22"
    assert (low.value, high.value) == ("22", "")
    high.value = "26.5"
    assert browser.line_filter == "length_mm >= 22, length_mm <= 26.5, weight > 0.2"
    for wrong, said in (("30", "goes up, found 30 to 26.5 mm"), ("1 cm", "such as 20, or nothing; found '1 cm'"), ("nan", "found 'nan'")):
        low.value = wrong
        assert said in browser.error and browser.line_filter == "length_mm >= 22, length_mm <= 26.5, weight > 0.2"
    low.value = ""
    assert browser.line_filter == "length_mm <= 26.5, weight > 0.2" and not browser.error
    browser.line_filter = "length_mm == 25"
    assert (low.value, high.value) == ("", "")
    low.value = "20"
    assert browser.line_filter == "length_mm >= 20, length_mm == 25"


def test_a_study_of_volumes_alone(study, tmp_path):
    path = tmp_path / "volumes.hdf5"
    with h5py.File(study) as old, h5py.File(path, "w") as new:
        for key, value in old.attrs.items(): new.attrs[key] = value
        for subject in old:
            for group in ("input", "wm_mask"): old.copy(old[subject][group], new.require_group(subject), group)
        for attr in list(new.attrs):
            if "headers" in attr: del new.attrs[attr]
    browser = StudyBrowser(path)
    assert browser.choice == {"input_group_name": "input"} and browser.lengths_button.disabled
    browser.input_group_name = ["input", "wm_mask"]
    exec(browser.code, {}, made := {})
    assert made["volume"].shape[-1] == 1 and "choose a streamlines group" in browser.code
    browser.look()
    browser.code_button.click()
    assert not browser.error and "get_volume" in browser.code_box.value
    browser.input_group_name = ""
    exec(browser.code, {}, made := {})
    assert list(made) == ["MultiSubjectDataset", "dataset"]
    for o in (browser.dataset, made["dataset"], browser): o.close()


def test_many_subjects_are_cut_where_they_are_shown(dataset):
    many = MultiSubjectDataset(dataset.path, lazy=True).load_data()
    many.subsets["training"].data = many.subsets["training"].data[:1] * 3000
    html = many._repr_html_()
    assert html.count("<tr>") == 51 and html.endswith("<p>… and 2,952 more</p>") and repr(many).endswith("… and 2,952 more")
    assert dataset._repr_html_().count("<tr>") == 5 and "more" not in repr(dataset) and len(many.table()) == 3003
    many.close()


def test_a_page_that_is_turned_forgets_the_one_before(browser):
    asked, gate, began = [], threading.Event(), threading.Event()
    browser.facts.overview.ask({"hold": lambda: (began.set(), gate.wait(20))})
    began.wait(20)
    browser.table.wire.shown = [0, 1]
    browser.table.wire.shown = [2]
    asked = [k for k in browser.facts.overview.waiting if k[0] != "pictures"]
    gate.set()
    browser.facts.found.clear()
    assert asked == [(what, "bundles", "sub-03") for what in ("lengths", "outside", "under")] + [("check", "sub-03")]
    assert browser.facts.overview.wait()


# ---- names that are no text, points that are nowhere

@pytest.mark.parametrize("where, name", [("sub-01", b"b\xffndles"), ("sub-01/bundles/data_per_streamline", b"k\xff"), ("/", b"x\xff")])
def test_a_name_that_is_not_utf8_is_a_sentence(tmp_path, where, name):
    path = toy_study(tmp_path)
    with h5py.File(path, "r+") as file:
        file[where]["x"] = np.ones((120, 1))
        file[where].id.move(b"x", name)
    before = path.read_bytes()
    for what in (lambda: repack_study(path), lambda: repack_study(path, tmp_path / "new.hdf5"), lambda: add_subjects(path, tmp_path / "subjects", training=["sub-01"])):
        with pytest.raises(DataProblem, match=f"a name in /{where.strip('/')} is not UTF-8.*To do: rename it"): what()
    assert path.read_bytes() == before and not (tmp_path / "new.hdf5").exists()


def test_no_format_takes_a_point_that_is_nowhere(tmp_path):
    lines = [np.ones((4, 3)), np.array([[1, 1, 1], [2, 2, np.inf], [3, np.nan, 3.]])]
    for kind in TRACTOGRAM_FORMATS:
        (tmp_path / f"a{kind}").write_bytes(b"was here")
        with pytest.raises(DataProblem, match=r"2 points are not finite.*\[2.0, 2.0, inf\], point 1 of line 1, counted from 0"):
            save_tractogram(Tractogram(lines, Grid(np.eye(4), (9, 9, 9))), tmp_path / f"a{kind}")
        assert (tmp_path / f"a{kind}").read_bytes() == b"was here"
