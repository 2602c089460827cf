"""The study as a table, and what is chosen of it: subjects left out, a filter of lines, the code that says so."""
import h5py
import numpy as np
import pytest

from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.line_filter import LineFilter, conditions_of
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, write_run_file
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint


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
