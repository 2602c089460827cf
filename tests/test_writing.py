"""What is created, replaced and removed: nothing that exists goes unasked, whatever it is, whenever it appeared, and two outputs are never one file."""
import errno
import os
import shutil
import socket
import stat
import threading
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.cli.study_tools import dwiml_bids_sources, dwiml_hdf5_extract_data
from dwiml_nb.cli.tracking import dwiml_score
from dwiml_nb.cli.training import dwiml_visualize_logs
from dwiml_nb.core import files
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.files import atomic_file, can_be_made_again, check_outputs, partial_name, write_json
from dwiml_nb.core.folders import MARK, claim_folder, write_folder
from dwiml_nb.core.human_bundles import write_human_study
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.gradients import write_gradients
from dwiml_nb.core.sh import fit_sh_files, write_sh
from dwiml_nb.core.space import Grid, save_volume
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.data.extract import extract_data
from dwiml_nb.demo.run import demo_study, dwiml_demo, run_demo
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.base import load_model
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study import create, grow
from dwiml_nb.study.bids import bids_phantom
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.run import Experiment
from dwiml_nb.training.sinks import export_csv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GRID = Grid(np.diag([2., 2, 2, 1]), (9, 9, 9))
LINES = Tractogram(Ragged.from_list([torch.tensor([[1., 1, 1], [7, 1, 1]])] * 3), GRID)
CONFIG = {"fa": {"type": "volume", "files": "fa.nii.gz", "standardization": "none"}, "lines": {"type": "streamlines", "files": "all.trk"}}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk():
    with can_be_made_again(): yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for s in "abcd":
        (root / s).mkdir()
        save_volume(np.random.default_rng(0).random((9, 9, 9, 2), np.float32), GRID, root / s / "fa.nii.gz")
        save_tractogram(LINES, root / s / "all.trk")
    return root


@pytest.fixture(scope="module")
def study(sources, tmp_path_factory): return create_study(sources, tmp_path_factory.mktemp("study") / "study.hdf5", CONFIG, ["a"], ["b"]).path


def logs(folder):
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "epochs.jsonl").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    return folder


def tree(folder):
    "Every name below a folder: what it is, where it leads, what it holds."
    def state(p):
        if p.is_symlink(): return "link", os.readlink(p)
        return stat.S_IFMT(p.lstat().st_mode), p.read_bytes() if p.is_file() else None
    return {str(p.relative_to(folder)): state(p) for p in sorted(Path(folder).rglob("*"))}


# ---- what lies at the name

WRITERS = {
    "a.json": lambda path, _: write_json({"a": 1}, path),
    "a.trk": lambda path, _: save_tractogram(LINES, path),
    "a.tck": lambda path, _: save_tractogram(LINES, path),
    "a.trx": lambda path, _: save_tractogram(LINES, path),
    "a.nii.gz": lambda path, _: save_volume(np.ones((2, 2, 2), np.float32), GRID, path),
    "sh.nii.gz": lambda path, _: write_sh(np.ones((2, 2, 2, 6)), np.eye(4), path),
    "a.bval": lambda path, _: write_gradients([0, 1000], np.eye(3)[:2], path, path.with_suffix(".bvec"), np.eye(4)),
    "a.csv": lambda path, _: export_csv(logs(path.parent), path=path),
    "b.trk": lambda path, study: extract_data(study, "a", "lines", path, overwrite=True),
    "b.npy": lambda path, study: extract_data(study, "a", "fa", path, overwrite=True),
    "study.hdf5": lambda path, study: repack_study(study, path, overwrite=True),
}
def pipe(path): os.mkfifo(path)
def folder(path): path.mkdir(); (path / "work").write_text("years")
def plug(path):
    here = os.getcwd()
    os.chdir(path.parent)                                            # the name of a socket is short
    try: s = socket.socket(socket.AF_UNIX); s.bind(path.name); s.close()
    finally: os.chdir(here)
def device(path): path.symlink_to("/dev/null")                       # a device of its own would need root
def circle(path): path.symlink_to(path.name)


@pytest.mark.parametrize("there", [pipe, folder, plug, device, circle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_file_is_refused(tmp_path, study, name, there):
    there(tmp_path / name)
    before, null = tree(tmp_path), os.stat("/dev/null")
    with pytest.raises(DataProblem, match="cannot be replaced by a file.*To do: choose another name|a study has the extension .hdf5.*Found: null"): WRITERS[name](tmp_path / name, study)
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("logs")} == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_rdev == null.st_rdev


@pytest.mark.parametrize("broken", [False, True], ids=["leads to a file", "leads to no file"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_followed(tmp_path, study, name, broken):
    "A link into another folder, with another name: the link stays, what it leads to is written."
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / f"real{''.join(Path(name).suffixes)}"
    if not broken: real.write_text("old")
    (tmp_path / name).symlink_to(real)
    WRITERS[name](tmp_path / name, study)
    assert os.readlink(tmp_path / name) == str(real) and real.is_file() and not real.is_symlink() and real.stat().st_size > 3
    assert not [p for p in tmp_path.rglob("*") if ".partial" in p.name]


def test_a_link_to_a_name_of_another_kind(tmp_path):
    "The kind of file is that of the name that was given."
    (tmp_path / "a.trk").symlink_to("XYZ-s12--0123abcd")
    save_tractogram(LINES, tmp_path / "a.trk")
    assert len(load_tractogram(tmp_path / "a.trk")) == 3 and (tmp_path / "a.trk").is_symlink()


def test_a_study_behind_a_link(sources, tmp_path):
    "Made, grown, made again and repacked through a link: everything lies beside the study, and one lock holds for both names."
    (tmp_path / "disk").mkdir(); (tmp_path / "here").mkdir()
    link, real = tmp_path / "here" / "link.hdf5", tmp_path / "disk" / "study.hdf5"
    link.symlink_to(real)
    make = lambda path, **options: create_study(sources, path, CONFIG, ["a"], ["b"], **options)
    make(link)
    with pytest.raises(DataProblem, match="of that name already"): make(link)
    add_subjects(link, sources, ["c"])
    repack_study(link)
    with create.parts_folder(real), pytest.raises(DataProblem, match="another process is making this study"): make(link, overwrite=True)
    make(link, overwrite=True)
    assert sorted(tree(tmp_path)) == ["disk", "disk/study.hdf5", "disk/study.json", "here", "here/link.hdf5"] and link.is_symlink()


# ---- what appears meanwhile

@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_what_appears_meanwhile_stays(tmp_path, monkeypatch, links):
    def no_links(*_): raise OSError(errno.EPERM, "not here")
    if not links: monkeypatch.setattr(os, "link", no_links)
    for late in (lambda p: p.write_text("theirs"), lambda p: p.symlink_to("nothing")):
        path = tmp_path / "a.json"
        with pytest.raises((DataProblem, FileExistsError)), atomic_file(path, overwrite=False) as tmp: tmp.write_text("ours"); late(path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"] and (path.is_symlink() or path.read_text() == "theirs")
        path.unlink()
    with atomic_file(path, overwrite=False) as tmp: tmp.write_text("ours")
    assert path.read_text() == "ours" and sorted(tree(tmp_path)) == ["a.json"]
    with pytest.raises(DataProblem, match="a folder"), atomic_file(path) as tmp: tmp.write_text("ours"); path.unlink(); path.mkdir()
    assert sorted(tree(tmp_path)) == ["a.json"] and path.is_dir()


def comes_late(monkeypatch, path):
    "Somebody's file takes a name just before ours is finished."
    flush = files.fsync_path
    def flush_and_meet(p):
        flush(p)
        if ".partial" in str(p) and Path(p).name.endswith(path.suffix) and not path.exists(): path.write_text("theirs")
    monkeypatch.setattr(files, "fsync_path", flush_and_meet)


@pytest.mark.parametrize("write", [
    lambda path, s, study: save_tractogram(LINES, path("a.trk"), overwrite=False),
    lambda path, s, study: save_volume(np.ones((2, 2, 2)), GRID, path("a.nii"), overwrite=False),
    lambda path, s, study: write_json({}, path("a.json"), overwrite=False),
    lambda path, s, study: extract_data(study, "a", "fa", path("a.npy")),
    lambda path, s, study: extract_data(study, "a", "lines", path("a.trx")),
    lambda path, s, study: repack_study(study, path("a.hdf5")),
    lambda path, s, study: create_study(s, path("a.hdf5"), CONFIG, ["a"]),
    lambda path, s, study: create_study(s, path("a.json").with_suffix(".hdf5"), CONFIG, ["a"]),
])
def test_every_writer_looks_again(tmp_path, sources, study, monkeypatch, write):
    def path(name): comes_late(monkeypatch, tmp_path / name); return tmp_path / name
    with pytest.raises(DataProblem, match="of that name already"): write(path, sources, study)
    assert "theirs" in [p.read_text() for p in tmp_path.glob("a.*") if p.suffix != ".hdf5" or p.stat().st_size < 10]


def test_two_creators_of_one_study(sources, tmp_path, monkeypatch):
    "Both looked when there was none; the first to end keeps the name, the second says so before it makes a subject."
    out, real, first_is_done, told, made = tmp_path / "study.hdf5", create.check_sources, threading.Event(), [], []
    def check(*args, **options):
        checked = real(*args, **options)
        if threading.current_thread().name == "second": first_is_done.wait(60)
        return checked
    def second():
        try: create_study(sources, out, CONFIG, ["a"], nb_points=5)
        except DataProblem as e: told.append(str(e))
    monkeypatch.setattr(create, "check_sources", check)
    monkeypatch.setattr(create, "finished_parts", lambda *args, real=create.finished_parts, **how: made.append(threading.current_thread().name) or real(*args, **how))
    thread = threading.Thread(target=second, name="second"); thread.start()
    create_study(sources, out, CONFIG, ["a"])
    first_is_done.set(); thread.join()
    assert "there is a file of that name already" in told[0] and len(made) == 1
    with h5py.File(out) as f: assert f.attrs["nb_points"] == "Not defined by user"


def test_an_addition_never_undoes_another(sources, tmp_path, monkeypatch):
    "On a file system without locks two may add at once: the second says that the study has changed."
    study = create_study(sources, tmp_path / "study.hdf5", CONFIG, ["a"], ["b"]).path
    real, once = grow.finished_parts, []
    def meanwhile(*args, **options):
        if not once:
            once.append(True)
            (tmp_path / ".study.parts").rename(tmp_path / ".set.aside")       # as if there were no lock
            add_subjects(study, sources, ["d"])
            (tmp_path / ".set.aside").rename(tmp_path / ".study.parts")
        return real(*args, **options)
    monkeypatch.setattr(grow, "finished_parts", meanwhile)
    with pytest.raises(DataProblem, match="another process has changed the study meanwhile"): add_subjects(study, sources, ["c"])
    with h5py.File(study) as f: assert sorted(f) == ["a", "b", "d"]
    add_subjects(study, sources, ["c"])
    with h5py.File(study) as f: assert sorted(f) == ["a", "b", "c", "d"]


# ---- two outputs of one name, and outputs that are inputs

def test_outputs_of_one_name(tmp_path, monkeypatch):
    (tmp_path / "in.nii").touch(); os.link(tmp_path / "in.nii", tmp_path / "hard.nii"); (tmp_path / "soft.nii").symlink_to("in.nii")
    (tmp_path / "sub").mkdir(); (tmp_path / "here").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    for same in ("in.nii", "hard.nii", "soft.nii", "sub/../in.nii", "here/in.nii", tmp_path / "in.nii"):
        with pytest.raises(DataProblem, match="the fit would replace what it is made from"): check_outputs({"the fit": same}, ["in.nii"], overwrite=True)
    for same in ("new.nii", "here/new.nii", tmp_path / "new.nii"):
        with pytest.raises(DataProblem, match="the fit and the peaks would be one file"): check_outputs({"the fit": "new.nii", "the peaks": same})
    check_outputs({"the fit": "new.nii", "the peaks": "other.nii", "nothing": None}, ["in.nii", None])


def test_fit_sh_writes_over_nothing_it_reads(tmp_path):
    for name in ("dwi.nii.gz", "mask.nii.gz"): (tmp_path / name).write_bytes(b"precious")
    for name in ("bval", "bvec", "x.json"): (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    at = lambda *names: [tmp_path / n for n in names]
    def fit(out, do="", **more):
        with pytest.raises(DataProblem, match=do): fit_sh_files(*at("dwi.nii.gz", "bval", "bvec", "mask.nii.gz"), tmp_path / out, **more)
        assert tree(tmp_path) == before
    for out in ("dwi.nii.gz", "mask.nii.gz"): fit(out, "would replace what it is made from", overwrite=True)
    fit("x.nii.gz", "x.json: there is a file of that name already")
    fit("sh.nii.gz", "the SH volume and the peaks would be one file", peaks=tmp_path / "sh.nii.gz", overwrite=True)


def test_studies_write_over_nothing_they_read(sources, study, tmp_path):
    (tmp_path / "new.json").write_text('["a"]'); (tmp_path / "ids.txt").write_text("a")
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="would replace what it is made from"): create_study(sources, tmp_path / "new", CONFIG, tmp_path / "new.json", overwrite=True)
    (tmp_path / "out.nii.gz").symlink_to(study)
    with pytest.raises(DataProblem, match="would replace what it is made from"): extract_data(study, "a", "fa", tmp_path / "out.nii.gz", overwrite=True)
    (tmp_path / "out.nii.gz").unlink()
    (tmp_path / "out.trk").symlink_to(study)
    with pytest.raises(DataProblem, match="would replace what it is made from"): track_from_model(tmp_path, "a", tmp_path / "out.trk", "fa", hdf5_file=study, overwrite=True)
    (tmp_path / "out.trk").unlink()
    assert tree(tmp_path) == before and h5py.is_hdf5(study)


def test_what_is_read_on_the_way_is_not_written_over(sources, tmp_path):
    "Sources behind the config, files behind a grown study, masks behind a scoring configuration: also by a link."
    root = tmp_path / "in"
    shutil.copytree(sources, root)
    (tmp_path / "study.json").symlink_to(root / "a" / "fa.nii.gz")
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="the copy of its config would replace what it is made from"): create_study(root, tmp_path / "study", CONFIG, ["a"], ["b"], overwrite=True)
    assert tree(tmp_path) == before
    (tmp_path / "study.json").unlink()
    study = create_study(root, tmp_path / "study", CONFIG, ["a"], ["b"]).path
    create_study(root, study, tmp_path / "study.json", ["a"], ["b"], overwrite=True)
    add_subjects(study, root, ["c"])
    part = next((tmp_path / "study.subjects").glob("c*"))
    for name in ("hard", "soft"):
        os.link(part, tmp_path / "hard.trk") if name == "hard" else (tmp_path / "soft.trk").symlink_to(part)
        before = part.read_bytes()
        with pytest.raises(DataProblem, match="would replace what it is made from"): extract_data(study, "c", "lines", tmp_path / f"{name}.trk", overwrite=True)
        assert part.read_bytes() == before


@pytest.mark.parametrize("read", ["best_model/model_state.pkl", "parameters_latest.json", "study.hdf5", "linked"])
def test_tracking_writes_over_nothing_it_reads(sources, tmp_path, read):
    study = create_study(sources, tmp_path / "study.hdf5", CONFIG, ["a"], ["b"]).path
    add_subjects(study, sources, ["c"])
    run, out = tmp_path / "run", tmp_path / "out.trk"
    (run / "best_model").mkdir(parents=True); (run / "best_model" / "model_state.pkl").write_text("weights")
    write_json({"dataset": {"hdf5_file": str(study)}, "loader": {"params": {"input_group_name": "fa"}}}, run / "parameters_latest.json")
    out.symlink_to({"study.hdf5": study, "linked": next((tmp_path / "study.subjects").glob("c*"))}.get(read, run / read))
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="the tractogram would replace what it is made from"): track_from_model(run, "a", out, "fa", overwrite=True)
    assert tree(tmp_path) == before


def test_scores_and_tables_write_over_nothing_they_read(tmp_path):
    root = write_phantom(tmp_path / "subjects", n_subjects=1)
    bundle, truth = next(root.glob("sub-01/bundles/*.trk")), root / "sub-01" / "truth"
    os.link(truth / "scoring.json", tmp_path / "hard.json")
    before = tree(tmp_path)
    for out in (truth / "scoring.json", tmp_path / "hard.json", next(truth.glob("*.nii.gz"))):
        with pytest.raises(SystemExit, match="would replace what it is made from"): dwiml_score(str(bundle), str(root / "sub-01"), str(out), overwrite=True)
    assert tree(tmp_path) == before
    with pytest.raises(DataProblem, match="the table would replace what it is made from"): export_csv(logs(tmp_path), path=tmp_path / "logs" / "epochs.jsonl")


def test_repacking_onto_itself(sources, tmp_path):
    "Under whatever name, it is repacking in place; over a file that it links to, it is refused."
    study = create_study(sources, tmp_path / "study.hdf5", CONFIG, ["a"], ["b"]).path
    add_subjects(study, sources, ["c"])
    with pytest.raises(DataProblem, match="of that name already"): repack_study(study, study)
    with pytest.raises(DataProblem, match="would replace what it is made from"): repack_study(study, tmp_path / "study.subjects" / "c.hdf5", overwrite=True)
    (tmp_path / "link.hdf5").symlink_to("study.hdf5")
    assert repack_study(study, tmp_path / "link.hdf5", overwrite=True) == study
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.hdf5", "study.hdf5", "study.json"]
    with h5py.File(study) as f: assert sorted(f) == ["a", "b", "c"]


def test_copies_of_one_name(tmp_path):
    "Group b_c of subject a and group c of subject a_b would both be a_b_c.nii.gz."
    for s in ("a", "a_b"):
        (tmp_path / "in" / s).mkdir(parents=True); save_volume(np.ones((2, 2, 2), np.float32), GRID, tmp_path / "in" / s / "v.nii")
    config = {g: {"type": "volume", "files": "v.nii", "standardization": "none"} for g in ("b_c", "c")}
    with pytest.raises(DataProblem, match="two groups would be copied into one file"):
        create_study(tmp_path / "in", tmp_path / "study.hdf5", config, ["a", "a_b"], save_intermediate=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# ---- commands ask before they replace

def refused(do, *args, **options):
    with pytest.raises(SystemExit, match="there is a file of that name already.*-f on the command line"): do(*args, **options)


def test_scores_replace_nothing_unasked(tmp_path, monkeypatch):
    root = write_phantom(tmp_path / "subjects", n_subjects=1)
    bundle, out = next(root.glob("sub-01/bundles/*.trk")), tmp_path / "scores.json"
    out.write_text("precious")
    refused(dwiml_score, str(bundle), str(root / "sub-01"), str(out))
    reference = root / "sub-01" / "truth" / "scoring.json"
    for read in (bundle, reference):
        before = read.read_bytes()
        with pytest.raises(SystemExit, match="would replace what it is made from"): dwiml_score(str(bundle), str(reference), str(read), overwrite=True)
        assert read.read_bytes() == before
    assert out.read_text() == "precious"
    dwiml_score(str(bundle), str(root / "sub-01"), str(out), overwrite=True)
    assert "VS" in out.read_text()


def test_bids_sources_replace_nothing_unasked(tmp_path):
    out = tmp_path / "project"; out.mkdir(); (out / "config.json").write_text("precious")
    tree_of_bids = bids_phantom(tmp_path / "in", n_subjects=3)
    ask = dict(volume=["input:model=csd,param=fod"], split="split")
    refused(dwiml_bids_sources, str(tree_of_bids), str(out), **ask)
    assert [p.name for p in out.iterdir()] == ["config.json"] and (out / "config.json").read_text() == "precious"
    dwiml_bids_sources(str(tree_of_bids), str(out), overwrite=True, **ask)
    assert "precious" not in (out / "config.json").read_text()


def test_figures_replace_nothing_unasked(tmp_path):
    experiment = logs(tmp_path)
    (tmp_path / "paper_1.png").write_text("precious")
    refused(dwiml_visualize_logs, [str(experiment)], save_figures=str(tmp_path / "paper"))
    assert (tmp_path / "paper_1.png").read_text() == "precious"
    dwiml_visualize_logs([str(experiment)], save_figures=str(tmp_path / "paper"), overwrite=True)
    for again in range(2): dwiml_visualize_logs([str(experiment)])   # its own folder of logs: drawn anew
    assert (tmp_path / "paper_1.png").read_bytes()[1:4] == (tmp_path / "logs" / "figure_1.png").read_bytes()[1:4] == b"PNG"


def test_extracting_replaces_nothing_unasked(study, tmp_path):
    (tmp_path / "a.nii.gz").write_text("precious")
    refused(dwiml_hdf5_extract_data, str(study), "a", "fa", str(tmp_path / "a.nii.gz"))
    assert (tmp_path / "a.nii.gz").read_text() == "precious"


# ---- folders that are somebody's

@pytest.mark.parametrize("make", [write_phantom, write_human_study, lambda p: toy_study(p.parent) if p.name == "subjects" else toy_study(p), demo_study, run_demo,
                                  lambda p: bids_phantom(p.parent.parent)], ids=["phantom", "human", "toy", "demo study", "demo", "bids"])
def test_somebodys_folder_is_left_alone(tmp_path, monkeypatch, make):
    "Also by what would write other names into it."
    for name in ("subjects", "derivatives/tracking"):
        for file in ("sub-01/dwi/dwi.nii.gz", "sub_1/dwi/dwi.nii.gz", "experiments/weeks/model", "config.json"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True); (tmp_path / name / file).write_text("precious")
    before = tree(tmp_path)
    place = tmp_path / ("derivatives/tracking" if make.__code__.co_consts and "bids_phantom" in make.__code__.co_names else "subjects")
    with pytest.raises(DataProblem, match="writes only into an empty folder, or into one that it made.*what is in this one stays"): make(place)
    assert tree(tmp_path) == before


def test_a_toy_study_of_ones_own_is_kept(tmp_path, study):
    toy = toy_study(tmp_path)
    made = toy.read_bytes()
    assert toy_study(tmp_path) == toy
    with h5py.File(toy, "r+") as f: f.attrs["mine"] = "a day of work"
    with pytest.raises(DataProblem, match="of that name already"): toy_study(tmp_path, seed=5)
    with h5py.File(toy) as f: assert f.attrs["mine"] == "a day of work"
    assert toy_study(tmp_path, overwrite=True) == toy                # asked
    toy.unlink(); (tmp_path / "study.json").write_text("precious")
    with pytest.raises(DataProblem, match="study.json: there is a file of that name already"): toy_study(tmp_path)
    (tmp_path / "study.json").unlink()
    toy.write_bytes(study.read_bytes())                              # another study, beside a toy's subjects
    with pytest.raises(DataProblem, match="of that name already"): toy_study(tmp_path)
    assert toy.read_bytes() == study.read_bytes() != made


def test_the_demo_looks_at_its_arguments_first(tmp_path, capsys):
    (tmp_path / "project" / "experiments" / "weeks").mkdir(parents=True)
    before = tree(tmp_path)
    for out in ("project", "new"):
        for wrong in (dict(held_out="sub_9"), dict(nb_batches=0), dict(nb_batches=-3), dict(seed=-1), dict(device="cupboard"), dict(quick=True) if out == "project" else dict(seed=2**40)):
            with pytest.raises((DataProblem, SystemExit)): dwiml_demo(str(tmp_path / out), **wrong)
            assert tree(tmp_path) == before


def test_the_demo_touches_its_own_experiment_only(tmp_path, monkeypatch):
    claim_folder(tmp_path / "demo", "dwiml_demo")
    for name in ("learn2track", "mine"): (tmp_path / "demo" / "experiments" / name).mkdir(parents=True)
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr("dwiml_nb.demo.run.demo_study", stop)
    with pytest.raises(KeyboardInterrupt): run_demo(tmp_path / "demo")
    assert sorted(tree(tmp_path / "demo")) == [MARK, "experiments", "experiments/mine"]


# ---- folders that are written as a whole

def test_neighbours_of_a_model_folder_stay(tmp_path):
    model = Learn2TrackModel(4, rnn_layer_sizes=[4], step_size=1.)
    for name in ("best.new", "best.previous", "best.partial", ".best.partial"): (tmp_path / name).mkdir(); (tmp_path / name / "work").write_text("years")
    before = tree(tmp_path)
    for again in range(2): model.save_params_and_state(tmp_path / "best")
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("best/") and k != "best"} == before
    (tmp_path / "link").symlink_to("best"); (tmp_path / "best" / "parameters.json").unlink()
    model.save_params_and_state(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_model(tmp_path / "best") is not None
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DataProblem, match="cannot be replaced by a folder"): model.save_params_and_state(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("there", [pipe, lambda p: (p.parent / "mine").mkdir() or (p.parent / "mine" / "w.hdf5").touch() or p.symlink_to("mine"), lambda p: p.mkdir() or os.mkfifo(p / "lock")], ids=["pipe", "link", "lock"])
def test_parts_have_a_folder_of_their_own(sources, tmp_path, there):
    there(tmp_path / ".study.parts")
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="the place of the study's parts is taken"): create_study(sources, tmp_path / "study", CONFIG, ["a"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("there", [pipe, folder], ids=["pipe", "folder"])
def test_the_mark_of_a_toy_study_is_a_file(tmp_path, there):
    there(tmp_path / ".toy_study")
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="cannot be replaced by a file"): toy_study(tmp_path)
    assert tree(tmp_path) == before


def test_a_model_replaces_a_model_only(tmp_path, monkeypatch):
    model, mine = Learn2TrackModel(4, rnn_layer_sizes=[4], step_size=1.), tmp_path / "mine"
    mine.mkdir(); (mine / "parameters.json").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(DataProblem, match="other files.*parameters.json"): model.save_params_and_state(mine)
    assert tree(tmp_path) == before
    model.save_params_and_state(tmp_path / "model")
    weights = tmp_path / "model" / "model_state.pkl"
    weights.unlink(); weights.mkdir(); (weights / "work").write_text("years")
    with pytest.raises(DataProblem, match="other files.*model_state.pkl"): model.save_params_and_state(tmp_path / "model")
    assert (weights / "work").exists()
    (tmp_path / "here").mkdir(); monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", "", "./"):
        with pytest.raises(DataProblem, match="a name of its own|other files"): model.save_params_and_state(name)


def test_what_a_live_process_writes_is_not_tidied_away(tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    dead = 999999999
    mine, theirs = tmp_path / "run" / "logs" / partial_name("epochs.csv").name, [f".best_model.{dead}-0123abcd.partial", f"logs/.epochs.{dead}.partial.csv"]
    notes = tmp_path / "run" / ".my.partial.notes"
    for p in (mine, notes): p.touch()
    (tmp_path / "run" / theirs[0]).mkdir(); (tmp_path / "run" / theirs[0] / "weights").touch(); (tmp_path / "run" / theirs[1]).touch()
    with Experiment(tmp_path, "run").in_use(): pass
    assert mine.exists() and notes.exists() and not any((tmp_path / "run" / t).exists() for t in theirs)


def test_two_writers_of_one_folder_in_one_process(tmp_path, monkeypatch):
    "Neither removes what the other is writing; the last one to end has the name."
    write_folder(tmp_path / "checkpoint", {"state": lambda path: path.write_text("old")})
    inside = threading.Barrier(2, timeout=20)
    def part(word): return lambda path: (path.write_text(word), inside.wait())
    threads = [threading.Thread(target=write_folder, args=(tmp_path / "checkpoint", {"state": part(w), "params": part(w)})) for w in ("one", "two")]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({p.read_text() for p in (tmp_path / "checkpoint").iterdir()}) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


# ---- headers

def test_axes_longer_than_a_header_can_say(tmp_path):
    long = Grid(np.eye(4), (40000, 1, 1))
    writers = {"a.nii.gz": lambda p: save_volume(np.zeros((40000, 1, 1), np.uint8), long, p), "sh.nii": lambda p: write_sh(np.zeros((40000, 1, 1, 6)), np.eye(4), p),
               "a.trk": lambda p: save_tractogram(Tractogram(LINES.lines, long), p)}
    for name, write in writers.items():
        with pytest.raises(DataProblem, match="at most 32767"): write(tmp_path / name)
    nib.save(nib.Nifti2Image(np.zeros((40000, 1, 1), np.uint8), np.eye(4)), tmp_path / "v.nii")
    (tmp_path / "a").mkdir(); (tmp_path / "v.nii").rename(tmp_path / "a" / "v.nii")
    save_tractogram(Tractogram(LINES.lines), tmp_path / "a" / "l.tck")
    config = {"v": {"type": "volume", "files": "v.nii", "standardization": "none"}, "l": {"type": "streamlines", "files": "l.tck"}}
    with pytest.raises(DataProblem, match="at most 32767"): create_study(tmp_path, tmp_path / "study.hdf5", config, ["a"])
