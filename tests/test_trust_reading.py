"""What is read is data: a study stays in its folder, arrays are numbers, sizes are judged before memory is taken, and what is shown is not obeyed."""
import bz2
import json
import os
import pickle
import shutil
import time
import warnings
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoader
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.errors import DataProblem, did_you_mean, html_text, printable
from dwiml_nb.core.files import parse_json, read_json
from dwiml_nb.core.lines import resample_nb_points, resample_step
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.sizes import device_named, far_points, read_array
from dwiml_nb.core.space import Grid, grid_of, open_image
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.core.volume import neighborhood_vectors
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.extract import extract_data
from dwiml_nb.evaluation.bundles import Scores, score_tractogram, scores_table
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.study.check import check_study
from dwiml_nb.study.check_apart import check_apart
from dwiml_nb.study.config import read_config
from dwiml_nb.study.create import create_study
from dwiml_nb.study.describe import describe_study
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.schema import open_study, study_config
from dwiml_nb.study.sources import tractogram_header
from dwiml_nb.study.volumes_in import load_labels
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask

TAG, ESCAPE = "<img src=x onerror=alert(1)>", "\x1b]0;owned\x07\u202e"


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("toy"), n_subjects=3)


@pytest.fixture
def study(toy, tmp_path):
    (tmp_path / "in").mkdir()
    return Path(shutil.copy(toy, tmp_path / "in" / "study.hdf5"))


# ---- a study stays in its folder

def secret_of(study):
    "A study elsewhere, whose seed mask is 7 everywhere."
    secret = study.parent.parent / "secret.hdf5"
    with h5py.File(study) as f, h5py.File(secret, "w") as g:
        f.copy("sub-01", g)
        g["sub-01/seed_mask/data"][()] = 7
    return secret


def external_storage(f, secret):
    group = f["sub-01/seed_mask"]
    shape, dtype = group["data"].shape, group["data"].dtype
    del group["data"]
    group.create_dataset("data", shape, dtype, external=[(str(secret), 0, int(np.prod(shape)) * dtype.itemsize)])

def virtual(f, secret, name="data"):
    group = f["sub-01/seed_mask"]
    shape, dtype = group["data"].shape, group["data"].dtype
    del group["data"]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(str(secret), "sub-01/seed_mask/data", shape)
    group.create_virtual_dataset("data", layout)

def linked_data(f, secret):
    del f["sub-01/seed_mask/data"]
    f["sub-01/seed_mask/data"] = h5py.ExternalLink(str(secret), "/sub-01/seed_mask/data")

def linked_group(f, secret):
    del f["sub-01/seed_mask"]
    f["sub-01/seed_mask"] = h5py.ExternalLink(str(secret), "/sub-01/seed_mask")

def linked_subject(f, secret):
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink(str(secret), "/sub-01")

def upwards(f, secret):
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("../secret.hdf5", "/sub-01")

def upwards_from_its_folder(f, secret):
    Path(f.filename).with_name("study.subjects").mkdir()
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("study.subjects/../../secret.hdf5", "/sub-01")

def beside(f, secret):
    shutil.copy(secret, Path(f.filename).with_name("other.hdf5"))
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("other.hdf5", "/sub-01")

def by_symbolic_link(f, secret):
    Path(f.filename).with_name("study.subjects").mkdir()
    Path(f.filename).with_name("study.subjects").joinpath("sub-01.hdf5").symlink_to(secret)
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("study.subjects/sub-01.hdf5", "/sub-01")

def softly(f, secret):
    del f["sub-01/seed_mask"]
    f["sub-01/seed_mask"] = h5py.SoftLink("/elsewhere/seed_mask")
    f["elsewhere"] = h5py.ExternalLink(str(secret), "/sub-01")

def through_its_own_file(f, secret):
    own = Path(f.filename).with_name("study.subjects")
    own.mkdir()
    with h5py.File(own / "sub-01.hdf5", "w") as part: part["sub-01"] = h5py.ExternalLink(str(secret), "/sub-01")
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("study.subjects/sub-01.hdf5", "/sub-01")

def deep_in_its_own_file(f, secret):
    own = Path(f.filename).with_name("study.subjects")
    own.mkdir()
    with h5py.File(own / "sub-01.hdf5", "w") as part:
        f.copy("sub-01", part)
        linked_data(part, secret)
    del f["sub-01"]
    f["sub-01"] = h5py.ExternalLink("study.subjects/sub-01.hdf5", "/sub-01")

def round_in_a_circle(f, secret):
    del f["sub-01/seed_mask"]
    f["sub-01/seed_mask"], f["sub-01/other"] = h5py.SoftLink("/sub-01/other"), h5py.SoftLink("/sub-01/seed_mask")


NEVER, ONLY_ALLOWED = [external_storage, virtual], [linked_data, linked_group, linked_subject, upwards, upwards_from_its_folder, beside, by_symbolic_link, softly, through_its_own_file, deep_in_its_own_file]

def mask(dataset): return set(dataset.load_data().training.get_volume(0, "seed_mask").unique().tolist())

def extracted(study, **options):
    return set(np.unique(nib.load(extract_data(study, "sub-01", "seed_mask", study.parent / "out.nii.gz", overwrite=True, **options)).dataobj).tolist())

WAYS = {"eager": lambda study, **o: mask(MultiSubjectDataset(study, **o)),
        "mapped": lambda study, **o: mask(MultiSubjectDataset(study, lazy=True, **o)),
        "pread": lambda study, **o: mask(MultiSubjectDataset(study, lazy=True, read_mode="pread", **o)),
        "sent to a worker": lambda study, **o: mask(pickle.loads(pickle.dumps(MultiSubjectDataset(study, lazy=True, **o)))),
        "extract": extracted,
        "repack": lambda study, **o: mask(MultiSubjectDataset(repack_study(study, study.parent / "one.hdf5", True, **o))),
        "describe": lambda study, **o: describe_study(study, **o) and {7.0},
        "add": lambda study, **o: add_subjects(study, study.parent / "none", training=["sub-09"], **o)}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("change", NEVER, ids=lambda f: f.__name__)
def test_what_else_a_study_holds_can_be_loaded(study, change, lazy):
    secret = secret_of(study)
    with h5py.File(study, "r+") as f: change(f, secret)
    dataset = MultiSubjectDataset(study, lazy=lazy)
    with pytest.raises(DataProblem, match="lie in other files") as told: dataset.load_data()
    assert str(told.value).count("lie in other files") == 1
    others = [g for g in dataset.all_groups[0] if g != "seed_mask"]
    assert dataset.load_data(volume_groups=others).training.subjects and list(dataset.nb_features) == others


@pytest.mark.parametrize("change", NEVER + ONLY_ALLOWED + [round_in_a_circle], ids=lambda f: f.__name__)
def test_a_study_stays_in_its_folder(study, change):
    secret = secret_of(study)
    with h5py.File(study, "r+") as f:
        change(f, secret)
        for key in INDEX_KEYS: del f.attrs[key]
    says = "lie in other files" if change in NEVER else "round in a circle" if change is round_in_a_circle else "leads out of the study|does not hold"
    for name, read in WAYS.items():
        with pytest.raises(DataProblem, match=says): print(name, read(study))
    assert not (study.parent / "one.hdf5").exists() and not (study.parent / "out.nii.gz").exists()
    report = check_study(study)
    assert not report.ok and any(p.subject == "sub-01" for p in report.problems), report
    if change in ONLY_ALLOWED:
        for name, read in WAYS.items():
            if name != "add": assert read(study, allow_links=True) == {7.0}, name
        with pytest.raises(DataProblem, match="no such folder of subjects"): WAYS["add"](study, allow_links=True)
        assert check_study(study, allow_links=True).ok
    elif change in NEVER:
        for name, read in WAYS.items():
            with pytest.raises(DataProblem, match=says): read(study, allow_links=True)


def test_a_study_checked_apart_follows_links_when_asked(study):
    secret = secret_of(study)
    with h5py.File(study, "r+") as f: linked_subject(f, secret)
    assert check_apart(study, allow_links=True).ok


def test_links_that_stay_are_followed(study):
    "Soft links within the file, and a copy of a grown study under another name."
    with h5py.File(study, "r+") as f:
        f.move("sub-01/seed_mask", "kept")
        f["sub-01/seed_mask"] = h5py.SoftLink("/also")
        f["also"] = h5py.SoftLink("kept")
        f["kept/data"][()] = 7
    for name in ("eager", "mapped", "extract", "describe"): assert WAYS[name](study) == {7.0}
    own = study.with_name("study.subjects")
    own.mkdir()
    study.rename(own / "study.hdf5")
    with h5py.File(own / "study.hdf5") as old, h5py.File(study.with_name("renamed.hdf5"), "w") as f:
        for key, value in old.attrs.items(): f.attrs[key] = value
        for s in ("sub-01", "sub-02", "sub-03"): f[s] = h5py.ExternalLink("study.subjects/study.hdf5", f"/{s}")
    assert WAYS["mapped"](study.with_name("renamed.hdf5")) == {7.0} and check_study(study.with_name("renamed.hdf5")).ok


def test_the_working_folder_is_not_searched(study, tmp_path, monkeypatch):
    "HDF5 looks for a linked file in the working folder, too, where it is not beside the study."
    shutil.copy(secret_of(study), tmp_path / "secret-copy.hdf5")
    (tmp_path / "study.subjects").mkdir()
    shutil.move(tmp_path / "secret-copy.hdf5", tmp_path / "study.subjects" / "sub-01.hdf5")
    with h5py.File(study, "r+") as f:
        del f["sub-01"]
        f["sub-01"] = h5py.ExternalLink("study.subjects/sub-01.hdf5", "/sub-01")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataProblem, match="the file that holds this subject is missing"): WAYS["mapped"](study)


def test_ids_that_are_paths(study):
    with h5py.File(study, "r+") as f: f.attrs["training_subjs"] = ["sub-01/seed_mask"]
    with pytest.raises(DataProblem, match="subjects are listed that the study does not hold"): open_study(study)


def test_claims_are_judged_before_a_copy(study):
    with h5py.File(study, "r+") as f: f.create_dataset("sub-01/extra", (1, 10**12), chunks=(1, 1 << 20), dtype="f8")
    with pytest.raises(DataProblem, match="claims more than the file holds|no room"): repack_study(study, study.with_name("one.hdf5"))


def test_groups_of_many_names_and_deep_groups(study):
    "Forty groups, each of which holds the next one under two names: 2^40 ways through them."
    with h5py.File(study, "r+") as f:
        groups = [f.create_group(f"many/g{i}") for i in range(30)]
        for a, b in zip(groups, groups[1:]): a["x"], a["y"] = b, h5py.SoftLink(b.name)
        f["sub-01/many"] = groups[0]
        del f["many"]
        for i, g in enumerate(groups[:-1]): del g["y"]; g["y"] = g["x"]
    start = time.process_time()
    describe_study(study), check_study(study)
    with h5py.File(repack_study(study, study.with_name("one.hdf5"))) as f: assert f["sub-01/many/x/y"] == f["sub-01/many/y/x"]
    with h5py.File(study, "r+") as f: f.create_group("sub-01/" + "/".join("d" * 2000))
    for way in ("describe", "repack"):
        with pytest.raises(DataProblem, match="too deep|already"): WAYS[way](study)
    assert not check_study(study).ok and time.process_time() - start < 10


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 5000, "-" * 3_000_000, "(" * 9000 + ")" * 9000, "[1, 2]", "'a'"])
def test_a_config_that_exhausts_its_reader(text):
    for key in ("groups_config", "groups_config_json"): assert study_config({key: text}) is None


# ---- what is mapped or loaded is numbers

def trx_with(path, name, content, also=None):
    grid = Grid(np.eye(4), (6, 6, 6))
    save_tractogram(Tractogram(Ragged.from_list([torch.rand(5, 3), torch.rand(4, 3)]), grid), path.with_name("whole.trx"))
    with zipfile.ZipFile(path.with_name("whole.trx")) as z: members = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for n, v in {**members, name: content, **(also or {})}.items(): z.writestr(n, v)
    return path


@pytest.mark.parametrize("kind", ["object", "O", "str", "U2", "S8", "V8", "M8", "datetime64", "complex64", "c16", "void", "bytes"])
@pytest.mark.parametrize("place", ["dps/x.", "dps/x.1.", "dpv/x.", "groups/g.", "dpg/g/x.2.", "positions.3.", "offsets."])
def test_trx_arrays_are_numbers(tmp_path, place, kind):
    with pytest.raises(DataProblem, match="no type of plain numbers|is there twice|cannot be read"): load_tractogram(trx_with(tmp_path / "a.trx", place + kind, bytes(range(16))))


def test_trx_sizes_and_headers(tmp_path):
    for name, content in (("header.json", "[" * 100_000), ("header.json", '{"NB_STREAMLINES": 1e400}'), ("header.json", "[1]"), ("dps/x.-1.float32", bytes(8)),
                          ("dps/x.0.float32", b""), ("dps/x.999999999999.float32", bytes(8))):
        with pytest.raises(DataProblem, match="cannot be read"): load_tractogram(trx_with(tmp_path / "a.trx", name, content))
    with zipfile.ZipFile(tmp_path / "bomb.trx", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("header.json", b" " * (80 << 20))
    with pytest.raises(DataProblem): tractogram_header(tmp_path / "bomb.trx")


@pytest.mark.parametrize("name, values", [("offsets.float32", [0, 4.6, 9]), ("offsets.2.uint32", [0, 5, 9, 9]), ("groups/g.float32", [.7, 1.2]), ("groups/g.bit", [0, 1]), ("groups/g.2.uint32", [0, 1]), ("dps/x/w.float32", [8, 9])])
def test_trx_numbers_of_lines_are_whole_and_said_once(tmp_path, name, values):
    kind = "bool" if name.endswith("bit") else name.split(".")[-1]
    save_tractogram(Tractogram(Ragged.from_list([torch.rand(5, 3), torch.rand(4, 3)]), Grid(np.eye(4), (6, 6, 6)), {"w": np.array([1.0, 2.0])}), tmp_path / "w.trx")
    with zipfile.ZipFile(tmp_path / "w.trx", "a" if "/" in name else "r") as z:
        members = {n: z.read(n) for n in z.namelist() if "/" in name or not n.startswith("offsets")}
    with zipfile.ZipFile(tmp_path / "a.trx", "w") as z:
        for n, v in {**members, name: np.array(values, kind).tobytes()}.items(): z.writestr(n, v)
    with pytest.raises(DataProblem, match="no type of whole numbers|has 2 columns|is there twice"): load_tractogram(tmp_path / "a.trx")


@pytest.mark.parametrize("change", [{"NB_STREAMLINES": 2.9}, {"NB_VERTICES": -9}, {"NB_STREAMLINES": float("nan")}, {"DIMENSIONS": [6.5, 6, 6]}, {"DIMENSIONS": [-6, 6, 6]}])
def test_trx_counts_are_whole(tmp_path, change):
    path = trx_with(tmp_path / "a.trx", "note.txt", b"")
    with zipfile.ZipFile(path) as z: h = json.loads(z.read("header.json"))
    for read in (load_tractogram, tractogram_header):
        with pytest.raises(DataProblem, match="cannot be read"): read(trx_with(path, "header.json", json.dumps({**h, **change})))


@pytest.mark.parametrize("array", [np.array([{}], object), np.array(["a"]), np.zeros(3, [("x", "f4")]), np.zeros(2, complex), np.zeros(2, "M8[s]")], ids=lambda a: str(a.dtype))
def test_npy_arrays_are_numbers(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataProblem, match="the array cannot be read"): read_array(tmp_path / "a.npy")


def test_npy_that_claims_more_than_it_has(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(b"(3, 3), }     ", b"(3, 300000), }"))
    with pytest.raises(DataProblem, match="cannot be read"): read_array(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", x=1)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(DataProblem, match="an archive"): read_array(tmp_path / "b.npy")


# ---- JSON

def test_json_that_exhausts_its_reader(tmp_path):
    file = tmp_path / "a.json"
    start = time.process_time()
    for text, says in (("[" * 100_000, "deep"), ('{"a":' * 5000, "deep"), ("[" * 200 + "]" * 200, "deep"), (" " * (70 << 20), "bytes"), ("[0" + ",0" * (9 << 20) + "]", "characters"),
                       ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"), ("9" * 5000, "valid JSON"), ("\udcff", None)):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=says or "not valid JSON"): read_json(file)
    file.write_text(json.dumps({str(i): i for i in range(100_000)}))
    assert len(read_json(file)) == 100_000 and time.process_time() - start < 20
    for content, kind in (([1], dict), ("a", dict), (None, dict), ({}, list)):
        file.write_text(json.dumps(content))
        with pytest.raises(DataProblem, match="holds something else"): read_json(file, kind)
        with pytest.raises(DataProblem): read_config(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataProblem, match="this is not a file"): read_json(tmp_path / "pipe")


def test_json_that_keeps_its_reader_busy():
    "A doubled key among many, and escaped quotes in a string that never ends: both were work that grows with the square."
    start, strings = time.process_time(), "[]" * 101 + '"' + '\\"' * 300_000
    for text, says in (("{" + ",".join(f'"{i}": 1' for i in range(100_000)) + ', "99999": 2}', "'99999' is there twice"), (strings, "Extra data"), (strings + "\\", "Extra data"), ('{"a": [' + strings, "delimiter")):
        with pytest.raises(ValueError, match=says): parse_json(text)
    assert parse_json('["a]\\"", ' + "[], " * 200 + r'"\\\\", "}"]')[-2:] == ["\\\\", "}"] and time.process_time() - start < 5


def test_subjects_that_are_listed_again_and_again(study):
    with h5py.File(study, "r+") as f: f.attrs["training_subjs"] = ["sub-01"] * 3
    for way in ("lazy", "describe", "repack"):
        with pytest.raises(DataProblem, match="listed more than once.*sub-01"): WAYS.get(way, WAYS["mapped"])(study)
    report = check_study(study)
    assert any("listed more than once" in p.problem for p in report.problems)


def test_names_too_long_for_a_file_system(subjects, tmp_path):
    config = lambda **names: {"input": {"type": "volume", "standardization": "all", "files": "input.nii.gz", **names}}
    for long in ("x" * 5000, "../" * 2000 + "a.nii", "../" * 2000 + "*"):
        for names in ({"files": long}, {"std_mask": long}):
            with pytest.raises(DataProblem, match="no such file|nothing matches"): create_study(subjects, tmp_path / "n.hdf5", config(**names), ["sub-01"])
        with pytest.raises(DataProblem, match="must be the name of a folder"): create_study(subjects, tmp_path / "n.hdf5", config(), [long])
        for read in (load_tractogram, read_array, open_study):
            with pytest.raises(DataProblem, match="no such"): read(f"{long}.trk")
    for folder in (".", "/"):
        with pytest.raises(DataProblem, match="this is a folder"): create_study(subjects, folder, config(), ["sub-01"])
    many = [f"s{i}" for i in range(500)]
    with pytest.raises(DataProblem, match="and 400 more") as told: create_study(subjects, tmp_path / "n.hdf5", config(), many)
    assert len(told.value.problems) == 500 and str(told.value).count("no folder") == 100


def test_many_and_long_words_are_no_work():
    start = time.process_time()
    assert did_you_mean("x" * 1_000_000, ["y" * 1_000_000] * 50) == "" and did_you_mean("wordd", map(str, range(10_000_000))) == ""
    assert len(str(DataProblem("no such subject", expected="s" * 10**6, found="t" * 10**6, subject="u" * 10**6))) < 6000
    assert time.process_time() - start < 2


# ---- far points

def far_line(study, folder, value=1e9):
    "A tractogram of the study's subject with one flipped bit."
    trk = sorted((folder / "bundles").glob("*.trk"))[0]
    t = load_tractogram(trk)
    t.lines.data[int(t.lines.offsets[2]) + 4, 0] = value
    return trk, t


@pytest.fixture(scope="module")
def subjects(toy): return toy.parent / "subjects"


@pytest.mark.parametrize("value", [1e9, -1e7, 3e38])
def test_a_far_point_is_named_where_it_is_read(study, subjects, tmp_path, value):
    own = Path(shutil.copytree(subjects, tmp_path / "subjects"))
    trk, t = far_line(study, own / "sub-03", value)
    with pytest.raises(DataProblem, match=r"goes far outside of its volume.*line 2, point 4 at \["): score_tractogram(t, own / "sub-03")
    save_tractogram(t, trk)
    with pytest.raises(DataProblem, match=rf"subject sub-03, group bundles, file .*{trk.name}: a streamline goes far.*line 2, point 4"):
        create_study(own, tmp_path / "n.hdf5", own / "config.json", ["sub-03"], step_size=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "about" in repr(create_study(own, tmp_path / "n.hdf5", own / "config.json", ["sub-03"], step_size=1.0, dry_run=True))
        left = create_study(own, tmp_path / "n.hdf5", own / "config.json", ["sub-03"], step_size=1.0, remove_invalid=True)
    assert left.reports[0].lines["bundles"].removed_outside == 1 and left.reports[0].lines["bundles"].outside == 1
    with h5py.File(study, "r+") as f: f["sub-01/bundles/data"][5, 0] = value
    dataset = MultiSubjectDataset(study, lazy=True).load_data()
    loader = DWIMLBatchLoader(dataset, ModelSpec(step_size=1.0), "bundles")
    with pytest.raises(DataProblem, match=r"subject sub-01, group bundles: a streamline goes far.*line 0, point 5"): loader.load_batch_streamlines([(0, np.array([3, 0]))])
    assert len(loader.load_batch_streamlines([(0, np.array([3, 4]))])) == 2


def test_lines_that_only_leave_the_volume_are_fine():
    grid = Grid(np.diag([2.0, 2, 2, 1]), (10, 12, 4))
    assert len(far_points(torch.tensor([[-1000.0, 0, 0], [1000, 0, 0]]), grid)) == 0 and far_points(torch.tensor([[0.0, 0, 0], [2100, 0, 0]]), grid).tolist() == [1]


# ---- what asks for terabytes

def test_sizes_that_no_machine_has():
    lines = Ragged.from_list([torch.tensor([[0.0, 0, 0], [100, 0, 0]])] * 100)
    for ask in (lambda: resample_step(lines, 1e-9), lambda: resample_nb_points(lines, 10**9), lambda: seeds_from_mask(np.ones((9, 9, 9)), np.eye(4), npv=10**12), lambda: seeds_from_mask(np.ones((9, 9, 9)), np.eye(4), nt=10**15),
                lambda: Learn2TrackModel(4, rnn_layer_sizes=[10**7])):
        with pytest.raises(DataProblem, match="there is no memory for"): ask()
    for kind, radius, resolution in (("grid", 1000, 1.0), ("axes", 10**9, 1.0), ("grid", float("inf"), 1.0), ("axes", float("nan"), 1.0), ("axes", 1, float("inf")), ("axes", 1, float("nan"))):
        with pytest.raises(ValueError, match="a neighbourhood"): neighborhood_vectors(kind, radius, resolution)
    for n in (0, -1, 10**13):
        with pytest.raises(ValueError, match="nb_points"): resample_nb_points(lines, n)


def test_axes_of_more_voxels_than_the_formats_say(tmp_path):
    grid = Grid(np.eye(4), (40000, 2, 2))
    with pytest.raises(DataProblem, match="at most 32767 voxels along an axis"): save_tractogram(Tractogram(Ragged.from_list([torch.zeros(2, 3)]), grid), tmp_path / "a.trk")
    (tmp_path / "sub-01").mkdir()
    nib.save(nib.Nifti2Image(np.zeros((40000, 2, 2), np.float32), np.eye(4)), tmp_path / "sub-01" / "a.nii")
    with pytest.raises(DataProblem, match="too many voxels along an axis.*at most 32767"):
        create_study(tmp_path, tmp_path / "s.hdf5", {"a": {"type": "volume", "files": "a.nii", "standardization": "none"}}, ["sub-01"])


def test_masks_that_claim_more_than_their_file(subjects, tmp_path):
    own = Path(shutil.copytree(subjects / "sub-03", tmp_path / "sub-03"))
    image = next((own / "truth").glob("*_whole.nii.gz"))
    plain = tmp_path / "a.nii"
    nib.save(nib.load(image), plain)
    raw = bytearray(plain.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    nib.save(nib.load(plain), image)
    import gzip
    image.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(DataProblem, match="claims more voxels than its file can hold"): score_tractogram([], own)


def test_images_in_two_files_and_in_other_packings_that_claim_more(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    nib.save(nib.Nifti1Pair.from_image(image), tmp_path / "a.img")
    claim = lambda raw: raw[:42] + np.array([30000] * 3, "<i2").tobytes() + raw[48:]
    (tmp_path / "a.hdr").write_bytes(claim((tmp_path / "a.hdr").read_bytes()))
    (tmp_path / "b.nii.bz2").write_bytes(bz2.compress(claim(image.to_bytes())))
    for name in ("a.hdr", "a.img", "b.nii.bz2"):
        with pytest.raises(DataProblem, match="claims more voxels than its file can hold"): open_image(tmp_path / name)
    (tmp_path / "c.nii.bz2").write_bytes(bz2.compress(nib.Nifti1Image(np.zeros((99, 99, 99)), np.eye(4)).to_bytes()))
    assert grid_of(tmp_path / "c.nii.bz2").dimensions == (99, 99, 99)


def test_a_wrong_checksum_is_no_image(subjects, tmp_path):
    "nibabel stops before it: a flipped bit would be a wrong number."
    own = Path(shutil.copytree(subjects / "sub-03", tmp_path / "sub-03"))
    nib.save(nib.Nifti1Image(np.random.default_rng(0).integers(0, 9, (9, 9, 9)).astype(np.float32), np.eye(4)), own / "a.nii.gz")
    raw = bytearray((own / "a.nii.gz").read_bytes())
    (own / "b.nii.gz").write_bytes(bytes(raw) + bytes(512))                     # padded with zeros, as tapes do
    raw[-8] ^= 1
    mask = next((own / "truth").glob("*_whole.nii.gz"))
    for path in (own / "a.nii.gz", mask): path.write_bytes(bytes(raw))
    config = lambda name: {"a": {"type": "volume", "files": name, "standardization": "none"}}
    with pytest.raises(DataProblem, match="a.nii.gz: the image cannot be read to its end.*CRC"): create_study(tmp_path, tmp_path / "s.hdf5", config("a.nii.gz"), ["sub-03"])
    with pytest.raises(DataProblem, match="_whole.nii.gz: the mask cannot be read.*CRC"): score_tractogram([], own)
    with pytest.raises(DataProblem, match="a.nii.gz.*CRC"): load_labels(own / "a.nii.gz")
    create_study(tmp_path, tmp_path / "s.hdf5", config("b.nii.gz"), ["sub-03"])


def test_devices():
    for name in ("foo", "cuda:99", "meta", ""):
        with pytest.raises(DataProblem, match="no such device"): device_named(name)


# ---- what is shown

def test_what_html_shows(study):
    scores = Scores(0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1, 1, {TAG: dict(n_valid=0, share=0.0, OL=0.0, OR=0.0, F1=0.0)}, np.array([7]), np.array([-1]))
    with h5py.File(study, "r+") as f:
        f.attrs["data_and_time"] = TAG + ESCAPE
        f.move("sub-01/seed_mask", f"sub-01/{TAG}")
        for s in ("sub-02", "sub-03"): f.move(f"{s}/seed_mask", f"{s}/{TAG}")
        f.attrs["groups_config_json"] = json.dumps({TAG: {"type": TAG}})
    dataset = MultiSubjectDataset(study, lazy=True)
    for page in (scores._repr_html_(), scores_table({TAG: scores}), describe_study(study)._repr_html_(), check_study(study)._repr_html_(), dataset._repr_html_(), dataset.load_data()._repr_html_()):
        assert TAG not in page and "<img" not in page
    assert html_text(TAG + ESCAPE) == "&lt;img src=x onerror=alert(1)&gt;" + r"\x1b]0;owned\x07\u202e"


def test_what_a_terminal_shows(study):
    with h5py.File(study, "r+") as f:
        f.attrs["data_and_time"] = ESCAPE
        for s in ("sub-01", "sub-02", "sub-03"): f.move(f"{s}/seed_mask", f"{s}/mask{ESCAPE}")
        f.move("sub-03", f"sub-03{ESCAPE}")
        for subset in SUBSETS: f.attrs[f"{subset}_subjs"] = [str(s).replace("sub-03", f"sub-03{ESCAPE}") for s in f.attrs[f"{subset}_subjs"]]
        f.attrs["groups_config_json"] = json.dumps({ESCAPE: {"type": ESCAPE}})
        f[f"sub-01/{ESCAPE}"] = 1
    dataset = MultiSubjectDataset(study, lazy=True)
    said = [repr(describe_study(study)), repr(check_study(study)), repr(dataset), repr(dataset.load_data()), repr(dataset.testing), repr(dataset.testing.data[0])]
    for act in (lambda: dataset.training.get_volume(0, ESCAPE), lambda: extract_data(study, ESCAPE, "x", study.with_name("a.nii")), lambda: extract_data(study, "sub-01", ESCAPE, study.with_name("a.nii")),
                lambda: open_study(study.with_name(ESCAPE)), lambda: load_tractogram(study.with_name(f"{ESCAPE}.trk"))):
        with pytest.raises(DataProblem) as caught: act()
        said.append(str(caught.value))
    for text in said: assert r"\x1b" in text and printable(text) == text, text


def test_what_is_printable():
    for c in ["\x00", "\x07", "\x08", "\r", "\x1b", "\x7f", "\x85", "\x9b", "\u061c", "\u200b", "\u200e", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069", "\ufeff", "\udcff", "\U000e0001"]:
        assert printable(f"a{c}b") == "a" + c.encode("unicode_escape").decode() + "b"
    assert printable("µ é 日本 🧠 a\u00a0b\tc\nd") == "µ é 日本 🧠 a\u00a0b\tc\nd"
    printable("\udcff").encode()
