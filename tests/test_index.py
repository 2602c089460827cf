"""The index of headers at a study's root: what is wrong in it is told or passed over, and never believed."""
import json
import shutil
import warnings

import h5py
import numpy as np
import pytest

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.schema import INDEX, TABLE
from dwiml_nb.study.toy import toy_study


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("toy"), n_subjects=3)


@pytest.fixture
def study(toy, tmp_path): return shutil.copy(toy, tmp_path/"study.hdf5")


def lazy(study):
    "A dataset that has taken its headers from the index, and what it warned of."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return MultiSubjectDataset(study, lazy=True).load_data(), [str(w.message) for w in said]


def put(study, key, value):
    with h5py.File(study, "r+") as f:
        value = value(f.attrs[key]) if callable(value) else value
        del f.attrs[key]
        if value is not None: f.attrs[key] = value


def number(row, column, value):
    "In the index, another number of a group."
    def change(table):
        table[row, column] = value
        return table
    return lambda study: put(study, TABLE, change)


def line_counts(dataset): return {s.subj_id: s.streamlines["bundles"].nb_streamlines for subset in dataset.subsets.values() for s in subset.data}


@pytest.mark.parametrize("key, value", [(TABLE, None), (TABLE, h5py.Empty("f8")), (INDEX, h5py.Empty("S1")), (INDEX, 3), (INDEX, "["), (TABLE, 4.5),
                                        (TABLE, lambda t: t.astype(int)), (TABLE, lambda t: t[:, :-1]), (TABLE, lambda t: t - 1), (TABLE, lambda t: t*np.nan)])
def test_a_damaged_index_is_passed_over_and_written_again_when_the_study_grows(toy, study, key, value):
    put(study, key, value)
    dataset, said = lazy(study)
    assert len(said) == 1 and "its index of headers is not used" in said[0] and set(line_counts(dataset).values()) == {120}
    dataset.close()
    assert [p.problem for p in check_study(study).remarks] == ["the index of headers cannot be used"]
    root = shutil.copytree(toy.parent/"subjects", study.parent/"subjects")
    (root/"sub-01").rename(root/"new")
    add_subjects(study, root, training=["new"])
    dataset, said = lazy(study)
    assert not said and line_counts(dataset)["new"] == 120


def test_a_group_that_the_index_calls_empty_is_looked_at_itself(study):
    number(4, 6, 0)(study)
    assert set(line_counts(lazy(study)[0]).values()) == {120}                  # nobody would ever have read it


def test_subjects_that_differ_by_the_index_alone_are_told_as_its_fault(study):
    number(5, 6, 14)(study)
    with pytest.raises(DataProblem, match="the study's index says something else than the group itself. Expected: n 14. Found: n 15") as told: lazy(study)
    assert (told.value.subject, told.value.group) == ("sub-02", "input") and "dwiml_hdf5_repack" in told.value.do
    repack_study(study)
    assert not lazy(study)[1]


def test_values_that_lie_otherwise_are_the_same_values(study):
    with h5py.File(study, "r+") as f:
        group = f["sub-02/input"]
        values = group["data"][()]
        del group["data"]
        group.create_dataset("data", data=values, compression="gzip")
        table = f.attrs[TABLE]
        table[5, 9] = -0.
        f.attrs[TABLE] = table
    assert np.array_equal(lazy(study)[0].validation.get_volume("sub-02", "input").numpy(), values)


def test_the_check_tells_what_the_index_says_otherwise(study):
    assert check_study(study).ok
    number(4, 6, 5)(study)
    found = [(p.subject, p.group, p.expected, p.found) for p in check_study(study).problems]
    assert found == [("sub-02", "bundles", "n 5", "n 120")]


def test_numbers_that_an_index_cannot_hold_are_left_out_of_it(study):
    for dimensions in (np.array([16, 16, -5]), np.array([16, 16, 2**64 - 1], np.uint64)):
        with h5py.File(study, "r+") as f: f["sub-02/bundles"].attrs["dimensions"] = dimensions
        repack_study(study)
        with h5py.File(study) as f: assert len(f.attrs[TABLE]) == 11
        assert not lazy(study)[1]


def test_what_else_lies_in_a_study_keeps_nobody_from_adding_subjects(toy, study):
    with h5py.File(study, "r+") as f:
        f["notes"], f["kind"] = "a text", np.dtype("f4")
        f.create_group("other")["gone"] = h5py.SoftLink("/nowhere")
    root = shutil.copytree(toy.parent/"subjects", study.parent/"subjects")
    (root/"sub-01").rename(root/"new")
    add_subjects(study, root, training=["new"])
    dataset, said = lazy(study)
    assert not said and len(line_counts(dataset)) == 4
    with pytest.raises(DataProblem, match="subject other.*the study is damaged.*there is no 'nowhere'"): repack_study(study)


def test_an_index_of_no_subject(toy, tmp_path):
    config = json.loads((toy.parent/"subjects"/"config.json").read_text())
    study = create_study(toy.parent/"subjects", tmp_path/"study.hdf5", config, ["sub-01"]).path
    with h5py.File(study, "r+") as f:
        del f["sub-01"]
        f.attrs["training_subjs"] = np.zeros(0)
    repack_study(study)
    dataset, said = lazy(study)
    assert not said and not line_counts(dataset)


@pytest.mark.parametrize("key", ["testing_subjs", "step_size", "compress", "groups_config"])
@pytest.mark.parametrize("kind", ["S1", "f8"])
def test_an_attribute_without_a_value_says_nothing(study, key, kind):
    with h5py.File(study, "r+") as f:
        f.attrs[key] = h5py.Empty(kind)
        f["sub-01/input"].attrs["frame"] = f["sub-01/bundles"].attrs["space"] = h5py.Empty(kind)
    for way in (True, False):
        dataset = MultiSubjectDataset(study, lazy=way).load_data()
        assert dataset.training.subjects == ["sub-01"] and dataset.step_size is None
        assert dataset.testing.subjects == ([] if key == "testing_subjs" else ["sub-03"])
        first = dataset.training.subject(0)
        if not way: assert first.volumes["input"].frame is None and np.isfinite(first.streamlines["bundles"].get_lines().data.numpy()).all()
        dataset.close()
    repack_study(study)
    assert not lazy(study)[1]
