"""What is registered from outside is used everywhere a study is made: a tractogram format, a standardisation."""
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.tractograms import TRACTOGRAM_FORMATS, Tractogram, TractogramFormat, load_tractogram, save_tractogram
from dwiml_nb.data.extract import extract_data
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects
from dwiml_nb.study.standardize import STANDARDIZATIONS

LISTS = [["sub-01"], ["sub-02"], ["sub-03"]]


class Npz(TractogramFormat):
    "Points, lengths and data per streamline, in NumPy's archive."
    keeps_grid = False

    def save(self, tractogram, path):
        points, offsets = tractogram.lines.numpy()
        with open(path, "wb") as f: np.savez(f, points=points, lengths=np.diff(offsets), **tractogram.dps)

    def load(self, path):
        with np.load(path) as z: found = dict(z)
        points, lengths = (torch.from_numpy(found.pop(k)) for k in ("points", "lengths"))
        return Tractogram(Ragged.from_lengths(points, lengths), None, found)


def robust(data, mask):
    "Median 0 in the mask."
    return data - np.median(data[mask], axis=0)


@pytest.fixture(scope="module", autouse=True)
def registered():
    TRACTOGRAM_FORMATS.register(".npz", Npz)
    STANDARDIZATIONS.register("robust", robust)
    yield
    del TRACTOGRAM_FORMATS.entries[".npz"], STANDARDIZATIONS.entries["robust"]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    "Phantom subjects whose tractograms are there twice: as .trk and as .npz."
    root = write_phantom(tmp_path_factory.mktemp("formats")/"subjects", n_subjects=4)
    for file in root.glob("sub-*/bundles/*.trk"):
        tractogram = load_tractogram(file)
        tractogram.dps["weight"] = np.arange(len(tractogram), dtype=np.float32)[:, None]
        for kind in (".trk", ".npz"): save_tractogram(tractogram, file.with_suffix(kind))
    return root


def study(root, folder, kind, quiet=True, how="robust", **options):
    config = {"input": {"type": "volume", "files": "dwi/sh.nii.gz", "standardization": how},
              "bundles": {"type": "streamlines", "files": [f"bundles/*{kind}"], "dps_keys": ["weight"]}}
    with warnings.catch_warnings():
        if quiet: warnings.simplefilter("ignore")
        return create_study(root, Path(folder)/f"study{kind[1:]}.hdf5", config, *LISTS, **options)


def test_a_study_of_another_format_is_the_same_study(subjects, tmp_path):
    trk, npz = (study(subjects, tmp_path, kind, step_size=1., n_procs=n_procs).path for kind, n_procs in ((".trk", None), (".npz", 2)))
    with h5py.File(trk) as a, h5py.File(npz) as b:
        values = a["sub-01/input/data"][()]
        np.testing.assert_array_equal(values, b["sub-01/input/data"][()])
        assert abs(np.median(values[(values != values[0, 0, 0]).any(-1)], axis=0)).max() < 1e-3        # of the brain, whose voxels are not 0
        for s in ("sub-01", "sub-02", "sub-03"):
            for name in ("data", "offsets", "data_per_streamline/weight"): np.testing.assert_array_equal(a[s]["bundles"][name][()], b[s]["bundles"][name][()])
    assert "streamlines" in repr(study(subjects, tmp_path/"..", ".npz", step_size=1., dry_run=True))
    add_subjects(npz, subjects, training=["sub-04"])
    out = extract_data(npz, "sub-04", "bundles", tmp_path/"out.npz")
    assert len(load_tractogram(out)) == len(load_tractogram(extract_data(npz, "sub-04", "bundles", tmp_path/"out.trk")))


def test_what_is_wrong_with_a_file_of_another_format_is_told(subjects, tmp_path):
    bad = subjects/"sub-02/bundles"/"bad.npz"
    bad.write_bytes(b"not an archive")
    with pytest.raises(DataProblem, match="subject sub-02, group bundles, file .*bad.npz: the tractogram cannot be read. Expected: a whole .npz file"): study(subjects, tmp_path, ".npz")
    bad.unlink()
    (subjects/"sub-02/bundles"/"a.vtk").touch()
    with pytest.raises(DataProblem, match=r"this is not a tractogram. Expected: .trk or .tck or .trx or .npz. Found: a.vtk"): study(subjects, tmp_path, ".vtk")
    (subjects/"sub-02/bundles"/"a.vtk").unlink()


def test_what_other_processes_cannot_have_is_used_here(subjects, tmp_path):
    class Local(Npz): pass
    del TRACTOGRAM_FORMATS.entries[".npz"]
    TRACTOGRAM_FORMATS.register(".npz", Local)
    try:
        with pytest.warns(UserWarning, match=".npz: other processes cannot have"): plan = study(subjects, tmp_path, ".npz", n_procs=2, quiet=False)
    finally:
        del TRACTOGRAM_FORMATS.entries[".npz"]
        TRACTOGRAM_FORMATS.register(".npz", Npz)
    assert plan.path.exists()


def test_a_standardisation_is_known_by_its_name(subjects, tmp_path):
    with pytest.raises(DataProblem, match="group input: unknown standardization. Did you mean 'robust'?.*'per_degree' or 'robust'. Found: 'robost'"): study(subjects, tmp_path, ".trk", how="robost")
    with pytest.raises(DataProblem, match=r"unknown standardization.*Found: \['all'\]"): study(subjects, tmp_path, ".trk", how=["all"])
    STANDARDIZATIONS.register("longer", lambda data, mask: data[..., :2])
    try:
        with pytest.raises(DataProblem, match=r"subject sub-01, group input: the standardisation 'longer' gave what cannot be stored. Expected: values of shape .* Found: shape"): study(subjects, tmp_path, ".trk", how="longer")
        path = study(subjects, tmp_path, ".trk").path
        entry = STANDARDIZATIONS.entries.pop("robust")                                                 # as in a process that has not heard of it
        with pytest.raises(DataProblem, match="unknown standardization.*Found: 'robust'"): add_subjects(path, subjects, training=["sub-04"])
    finally:
        STANDARDIZATIONS.register("robust", entry)
        del STANDARDIZATIONS.entries["longer"]
    with pytest.raises(DataProblem, match="standardization is not that of the study. Expected: robust. Found: all"):
        add_subjects(path, subjects, training=["sub-04"], config={"input": {"type": "volume", "files": "dwi/sh.nii.gz", "standardization": "all"},
                                                                  "bundles": {"type": "streamlines", "files": ["bundles/*.trk"], "dps_keys": ["weight"]}})
