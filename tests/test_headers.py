"""The index of headers at a study's root: written by whatever writes a study, of no harm if a stranger wrote it, told when it is not that of the groups."""
import json
import os
import pickle
import shutil
import warnings

import h5py
import numpy as np
import pytest

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.describe import describe_study
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.headers import COLUMNS, headers_in, read_index, write_index
from dwiml_nb.study.schema import INDEX, INDEX_KEYS, TABLE

CONFIG = {"input": {"type": "volume", "files": "dwi/sh.nii.gz", "standardization": "none", "frame": "image"},
          "mask": {"type": "volume", "files": "masks/wm.nii.gz", "standardization": "none"},
          "bundles": {"type": "streamlines", "files": ["bundles/*.trk"]}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory): return write_phantom(tmp_path_factory.mktemp("index")/"subjects", n_subjects=4)


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_study(sources, tmp_path_factory.mktemp("made")/"study.hdf5", CONFIG, ["sub-01", "sub-02"], ["sub-03"]).path


@pytest.fixture
def study(made, tmp_path):
    shutil.copy(made.with_suffix(".json"), tmp_path)
    return shutil.copy(made, tmp_path/"study.hdf5")


def add(study, sources):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_subjects(study, sources, testing=["sub-04"])


def facts(dataset):
    "All that is known before a value is read, and the groups that were opened for it."
    told,opened = {}, 0
    for s in (s for subset in dataset.subsets.values() for s in subset.data):
        for name,g in s.groups.items():
            opened += g.parts_kept is not None
            told[s.subj_id, name] = g.header, g.grid.affine.tolist(), getattr(g, "shape", None) or (len(g), g.nb_stored_points, g.dps_keys, g.has_connectivity)
    return told, opened


def lazily(study, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return MultiSubjectDataset(study, lazy=True, **options).load_data()


def themselves(study):
    with h5py.File(study) as f: return {s: headers_in(f[s]) for s in f}


def test_whatever_writes_a_study_writes_its_index(study, sources, made):
    def right():
        with h5py.File(study) as f: assert read_index(f) == themselves(study)
        assert check_study(study).ok and not check_study(study).remarks
        return describe_study(study).headline().endswith("with an index of headers")
    assert right()
    add(study, sources); assert right() and len(themselves(study)) == 4
    with h5py.File(study) as f: assert isinstance(f.get("sub-04", getlink=True), h5py.ExternalLink)
    repack_study(study); assert right() and len(themselves(study)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_study(sources, study, CONFIG, ["sub-04"], overwrite=True)
    assert right() and list(themselves(study)) == ["sub-04"]


def test_a_study_without_an_index_opens_as_before_and_gets_one(study, sources):
    with_index, opened = facts(lazily(study))
    assert opened == 0
    with h5py.File(study, "r+") as f:
        for k in INDEX_KEYS: del f.attrs[k]
    assert facts(lazily(study))[0] == with_index and not describe_study(study).indexed and check_study(study).ok
    add(study, sources)
    assert read_index(h5py.File(study)) == themselves(study)


def test_what_is_read_is_the_same_with_and_without(study, tmp_path):
    plain = shutil.copy(study, tmp_path/"plain.hdf5")
    with h5py.File(plain, "r+") as f:
        for k in INDEX_KEYS: del f.attrs[k]
    here, there = (pickle.loads(pickle.dumps(lazily(p))) for p in (study, plain))                         # as a worker gets it
    for i in range(2):
        a, b = (d.training.get_lines(i, "bundles", [3, 1]) for d in (here, there))
        assert a.data.equal(b.data) and a.offsets.equal(b.offsets)
        assert here.training.get_volume(i, "input").equal(there.training.get_volume(i, "input"))
    for ask in ("nb_streamlines", "streamline_ids_per_subj", "total_nb_points"): np.testing.assert_equal(getattr(here.training, ask)("bundles"), getattr(there.training, ask)("bundles"))


def told(**change):
    "Change the JSON of an index."
    def f(file):
        said = json.loads(file.attrs[INDEX])
        file.attrs[INDEX] = json.dumps({**said, **{k: v(said[k]) if callable(v) else v for k, v in change.items()}})
    return f

def cell(column, value, row=4):
    "Change a number of an index: of a group of sub-02."
    def f(file):
        table = file.attrs[TABLE]
        table[row, column] = value
        file.attrs[TABLE] = table
    return f

def table(**kwargs):
    def f(file): file.attrs.create(TABLE, **kwargs)
    return f

def trait(**change): return told(traits=lambda traits: [{**t, **change} for t in traits])
def text(value):
    def f(file): file.attrs[INDEX] = value
    return f
def twice(file): file.attrs[TABLE] = np.repeat(file.attrs[TABLE], 2, axis=0)
def no_table(file): del file.attrs[TABLE]

NONSENSE = {"deep": text("["*100_000), "no JSON": text("index"), "a number": text(np.arange(9.)), "another version": told(version=2), "no dict": text("[1]"), "no names": told(subjects=None),
            "names are numbers": told(groups=[1, 2, 3]), "a name twice": told(subjects=lambda s: [s[0]]*len(s)), "few names": told(groups=lambda g: g[:1]), "no traits": told(traits=[]),
            "traits are words": told(traits=["volume"]*3), "other traits": trait(colour="red"), "kind": trait(kind="picture"), "order": trait(order=3), "direct": trait(direct="yes"), "frame": trait(frame=[1]),
            "dps": trait(dps={"a": 1}), "dps a number": trait(dps=3), "space": trait(space="Space.MOON"), "negative": cell(6, -1), "huge": cell(6, 2.**60), "more than the file": cell(6, 1e9), "points": cell(7, 1e12, 3),
            "axis": cell(3, 1e15), "nan": cell(6, np.nan), "half": cell(7, .5), "subject": cell(0, 99), "affine": cell(8, np.inf), "singular": cell(slice(8, 20), 0.), "last row": cell(23, 2.), "group twice": twice,
            "no table": no_table, "integers": table(data=np.zeros((9, COLUMNS), np.int64)), "columns": table(data=np.zeros((9, 5))), "text": table(data="x"), "objects": table(data=["a"]*9)}

@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
def test_an_index_that_cannot_be_true_is_left_alone(study, change):
    right = facts(lazily(study))[0]
    with h5py.File(study, "r+") as f: change(f)
    with pytest.warns(UserWarning, match="study.hdf5: its index of headers is not used.*dwiml_hdf5_repack study.hdf5"): dataset = MultiSubjectDataset(study, lazy=True).load_data()
    assert facts(dataset)[0] == right
    assert facts(MultiSubjectDataset(study).load_data())[0] == right                                    # in memory, nobody asks it
    report = check_study(study)
    assert any("index" in p.problem for p in report.problems + report.remarks) and "dwiml_hdf5_repack" in str(report)
    repack_study(study)
    assert facts(lazily(study))[0] == right and check_study(study).ok


LIES = {"lines": (3, 6, 121, "n 121.*n 120"), "points": (3, 7, 5, "points 5"), "features": (4, 6, 14, None), "axis": (4, 3, 17, "dimensions"), "affine": (4, 11, -14., "affine"), "another kind": (4, 2, 0, None)}

@pytest.mark.parametrize("row,column,value,says", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_told_when_the_group_is_read(study, row, column, value, says):
    with h5py.File(study, "r+") as f: cell(column, value, row)(f)
    if says is None:                                                    # the opening sees it: another number of features; the other kind is read from the group
        try: dataset = MultiSubjectDataset(study, lazy=True).load_data()
        except DataProblem as e: assert "the study's index says something else" in str(e) and e.subject == "sub-02"; return
        assert dataset.training.volume_of(1, "input").header == themselves(study)["sub-02"]["input"]
        return
    dataset = lazily(study)
    read = (lambda d: d.training.get_lines(1, "bundles", [0])) if row == 3 else (lambda d: d.training.get_volume(1, "input"))
    dataset.training.get_lines(0, "bundles", [0])
    for d in (dataset, dataset, pickle.loads(pickle.dumps(dataset))):                                   # each time, in workers too
        with pytest.raises(DataProblem, match=f"subject sub-02, group {'bundles' if row == 3 else 'input'}, file .*study.hdf5: the study's index says something else.*{says}.*dwiml_hdf5_repack"): read(d)
    assert [(p.subject, p.problem) for p in check_study(study).problems] == [("sub-02", "the study's index says something else than the group itself")]


def test_a_subject_that_was_changed_after_the_index_was_written(study):
    with h5py.File(study, "r+") as f: f["sub-02/input"].attrs["frame"] = "world"
    with pytest.raises(DataProblem, match="Expected: frame image. Found: frame world"): lazily(study).training.get_volume(1, "input")
    repack_study(study)
    assert lazily(study).training.volume_of(1, "input").frame == "world"
    with h5py.File(study, "r+") as f: f["sub-01/input"].attrs["frame"] = "world"                       # the first subject is compared when the study is opened
    with pytest.warns(UserWarning, match="its index of headers is not used"): MultiSubjectDataset(study, lazy=True).load_data()


def test_subjects_that_the_index_lacks_or_has_too_many(study):
    right = facts(lazily(study))[0]
    with h5py.File(study, "r+") as f:
        said = read_index(f)
        write_index(f, {"ghost": said["sub-01"], "sub-01": said["sub-01"], "sub-02": {"input": said["sub-02"]["input"]}})
    assert facts(lazily(study))[0] == right
    report = check_study(study)
    assert report.ok and [p.found for p in report.remarks] == ["sub-03"]
    with h5py.File(study, "r+") as f: write_index(f, {s: {"input": said[s]["bundles"], "bundles": said[s]["input"]} for s in ("sub-02", "sub-03")})
    assert facts(lazily(study))[0] == right                                                             # names exchanged: the kinds do not fit


def test_chunks_are_no_lie(study, tmp_path):
    "A study that others packed keeps its index and opens, with the warning that it is slow or that the index is too large for it."
    with h5py.File(study, "r+") as f:
        values = f["sub-02/input/data"][()]
        del f["sub-02/input/data"]
        f["sub-02/input"].create_dataset("data", data=values, chunks=(4, 4, 5, 15), compression="gzip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (MultiSubjectDataset(study, lazy=True).load_data().training.get_volume(1, "input").numpy() == values).all()
    assert check_study(study).ok


def test_a_linked_part_that_was_replaced_is_told(study, sources, tmp_path):
    add(study, sources)
    part = tmp_path/"study.subjects"/"sub-04.hdf5"
    first = lazily(study)
    shutil.copy(part, tmp_path/"copy.hdf5")
    os.replace(tmp_path/"copy.hdf5", part)                                                              # after the study was opened: the same values in another file
    with pytest.raises(DataProblem, match="group bundles.*another file has taken the place.*make the dataset again"): first.testing.get_lines(0, "bundles", [0])
    lazily(study).testing.get_lines(0, "bundles", [0])
    with h5py.File(part, "r+") as f, h5py.File(study) as other:
        del f["sub-04/bundles"]
        f.copy(other["sub-01/bundles"], f["sub-04"])
    later = lazily(study)                                                                               # before it was opened
    with pytest.raises(DataProblem, match="subject sub-04, group bundles.*the study's index says something else.*points.*dwiml_hdf5_repack"): later.testing.get_lines(0, "bundles", [0])
    later.training.get_lines(0, "bundles", [0])                                                         # the others are read
    part.unlink()
    with pytest.raises(DataProblem, match="sub-04.*the file that holds this subject is missing"): lazily(study)


def test_another_program_sees_subjects_only(study):
    "dwi_ml asks for attributes by name, and takes what lies at the root for subjects."
    with h5py.File(study) as f:
        assert set(f) == {"sub-01", "sub-02", "sub-03"} == set(f.attrs["chosen_subjs"]) and set(INDEX_KEYS) <= set(f.attrs)
        assert f.attrs[TABLE].shape == (9, COLUMNS) and json.loads(f.attrs[INDEX])["groups"] == ["bundles", "input", "mask"]


def test_an_index_of_many_subjects(study, tmp_path):
    "More than HDF5's 64 kB of an attribute of old; and the headers are not read."
    with h5py.File(study) as a, h5py.File(tmp_path/"many.hdf5", "w", libver=("v108", "latest")) as b:
        b.create_group("kept")
        a.copy("sub-01", b["kept"], "one")
        ids = [f"sub-{i:04d}" for i in range(600)]
        for s in ids: b[s] = b["kept/one"] if s == ids[0] else h5py.SoftLink("/kept/one")
        b.attrs.update({"training_subjs": ids, "validation_subjs": [], "testing_subjs": []})
        write_index(b, {s: headers_in(b[s]) for s in ids})
        assert b.attrs[TABLE].nbytes > 300_000 and len(read_index(b)) == 600
    assert lazily(tmp_path/"many.hdf5").training.total_nb_streamlines("bundles") == 600*120           # behind soft links: read one by one
