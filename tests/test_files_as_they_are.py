"""Tractograms, images and file systems as people have them: what is odd is read with a remark, or refused in a sentence that says what to do, and nothing is placed at a guess.

All files are made here, byte by byte where the library would not write them so.
"""
import errno
import gzip
import itertools
import json
import re
import struct
import warnings
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.streamlines.trk import header_2_dtype

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.files import can_be_made_again, read_json
from dwiml_nb.core.gradients import read_bvals
from dwiml_nb.core.sh import fit_sh_files
from dwiml_nb.core.sizes import read_array
from dwiml_nb.core.space import SPACES, Grid, convert, grid_of, open_image, same_grid
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, read_tractogram, save_tractogram, tractogram_format
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.extract import extract_data
from dwiml_nb.batch.loader import DWIMLBatchLoader
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.evaluation.bundles import score_tractogram
from dwiml_nb.models.base import load_model
from dwiml_nb.runs.track import read_experiment
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects
from dwiml_nb.study.lists import read_subject_list
from dwiml_nb.study.schema import open_study
from dwiml_nb.study.volumes_in import load_labels, load_volume
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.widgets.viz import viz

AFFINE = np.array([[-2.0, 0, 0, 20], [0, 2, 0, -18], [0, 0, 2, -10], [0, 0, 0, 1]])
SHAPE = (20, 20, 12)
GRID = Grid(AFFINE, SHAPE)
LINES = [np.array([[-10 + i, -8 + k, 2 * np.sin(i / 4)] for i in range(12)], np.float32) for k in (0, 3, 6)]  # RAS mm
NONE = np.zeros((0, 3), np.float32)


def image(path, data=None, affine=AFFINE, change=None):
    data = np.random.default_rng(1).normal(size=(*SHAPE, 2)).astype(np.float32) if data is None else data
    nifti = nib.Nifti1Image(data, affine)
    if change: change(nifti)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nifti, path)
    return path


def trk(path, lines=LINES, ids=None, swap=False, scalars=0, **fields):
    "A .trk byte by byte: the stored points belong to AFFINE, whatever the header says."
    h = np.zeros((), header_2_dtype)
    usual = dict(magic_number=b"TRACK", dim=SHAPE, voxel_size=(2, 2, 2), voxel_order=b"LAS", voxel_to_rasmm=AFFINE, version=2, hdr_size=1000, nb_streamlines=len(lines),
                 nb_scalars_per_point=scalars, nb_properties_per_streamline=int(ids is not None))
    names = dict(dim="dimensions", voxel_size="voxel_sizes")
    for k, v in (usual | fields).items(): h[names.get(k, k)] = v
    if ids is not None: h["property_name"][0] = b"id"
    body, end = b"", ">" if swap else "<"
    for i, line in enumerate(lines):
        points = (nib.affines.apply_affine(np.linalg.inv(AFFINE), line) + .5) * 2 if len(line) else line
        body += struct.pack(end + "i", len(line)) + np.hstack([points, np.full((len(line), scalars), .5)]).astype(end + "f4").tobytes()
        if ids is not None: body += struct.pack(end + "f", ids[i])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((h.astype(header_2_dtype.newbyteorder(">")) if swap else h).tobytes() + body)
    return path


def tck(path, lines=LINES, kind="<f4", name="Float32LE", header="", file=None, end=True):
    head = f"mrtrix tracks\n{header}datatype: {name}\n"
    at = len(head.encode("latin1")) + len("file: . 00000000\nEND\n")
    head += f"file: {file or f'. {at:08d}'}\nEND\n"
    rows = [row for line in lines for row in (*line, [np.nan] * 3)] + [[np.inf] * 3] * end
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode("latin1") + np.array(rows, kind).tobytes())
    return path


class Folder:
    "A subject's folder beside its study."
    def __init__(self, root): self.root, self.sub = root, root / "subjects" / "s1"

    def config(self, lines=None, **volume):
        groups = {"input": {"type": "volume", "standardization": "none", "files": "input.nii.gz", **volume}}
        return groups | ({"lines": {"type": "streamlines", **(lines if isinstance(lines, dict) else {"files": lines})}} if lines else {})

    def create(self, lines=None, config=None, **options):
        with warnings.catch_warnings(), can_be_made_again():
            warnings.simplefilter("ignore")
            return create_study(self.root / "subjects", self.root / "study.hdf5", config or self.config(lines), ["s1"], overwrite=True, **options)

    def lines(self, *args, **kwargs):
        "Lines of the study that is made, RAS mm."
        self.create(*args, **kwargs)
        with h5py.File(self.root / "study.hdf5") as f:
            g = f["s1/lines"]
            return [nib.affines.apply_affine(g.attrs["affine"], g["data"][o:o + n] - .5) for o, n in zip(g["offsets"][()], g["lengths"][()])]


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    image(made.sub / "input.nii.gz")
    return made


def same(a, b): return len(a) == len(b) and all(x.shape == y.shape and np.abs(np.asarray(x) - y).max(initial=0) < 1e-3 for x, y in zip(a, b))


def warned(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = f()
    return found, " ".join(str(w.message) for w in said)


# ---- the same numbers as nibabel

@pytest.mark.parametrize("seed", range(3))
def test_readers_give_what_nibabel_gives(tmp_path, seed):
    "Bit for bit, for lines of any length, oblique grids, flipped voxel orders, scalars and data per streamline."
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(1, 3, 3)
    affine = np.vstack([np.column_stack([q, rng.normal(0, 40, 3)]), [0, 0, 0, 1]])
    lines = [rng.normal(0, 30, (n, 3)).astype(np.float32) for n in rng.integers(1, 300, 40)]
    content = nib.streamlines.Tractogram(lines, data_per_streamline={"w": rng.random((40, 1)), "c": rng.random((40, 3))}, data_per_point={"fa": [rng.random((len(x), 1)) for x in lines]}, affine_to_rasmm=np.eye(4))
    header = {"voxel_to_rasmm": affine, "dimensions": [40, 50, 60], "voxel_sizes": np.linalg.norm(q, axis=0), "voxel_order": ("LPS", "RAS", "ASR")[seed]}
    nib.streamlines.save(content, str(tmp_path / "a.trk"), header=header)
    nib.streamlines.save(nib.streamlines.Tractogram(lines, affine_to_rasmm=np.eye(4)), str(tmp_path / "a.tck"))
    for kind in ("trk", "tck"):
        theirs, ours = nib.streamlines.load(tmp_path / f"a.{kind}"), read_tractogram(tmp_path / f"a.{kind}")
        assert np.array_equal(ours.lines.data.numpy(), theirs.streamlines.get_data()) and ours.lines.lengths.tolist() == [len(x) for x in lines] and not ours.remarks
        assert ours.dps.keys() == theirs.tractogram.data_per_streamline.keys()
        for k, v in theirs.tractogram.data_per_streamline.items(): assert np.array_equal(ours.dps[k], v)
        assert ours.dpp.keys() == theirs.tractogram.data_per_point.keys()
        for k, v in theirs.tractogram.data_per_point.items(): assert np.array_equal(ours.dpp[k], v.get_data())
        format = tractogram_format(f"a.{kind}")
        assert format.size(tmp_path / f"a.{kind}") == (40, len(ours.lines.data)) and torch.equal(format.first_lines(tmp_path / f"a.{kind}", 7).data, ours.lines[:7].data)


# ---- headers that are wrong or say little

@pytest.mark.parametrize("header", ["count: 5000\n", "count: 3\ntotal_count: 9000\ncount: 7\n", "count: many\n", "comment: é: a colon\ncount: 0\n"])
def test_tck_counts_that_lie(folder, header):
    tck(folder.sub / "a.tck", header=header)
    assert same(folder.lines("a.tck"), LINES)
    assert any("a.tck: the header counts" in w and "3 are there and are read" in w for w in folder.create("a.tck").warnings)
    assert "3 streamlines, 36 points" in str(folder.create("a.tck", dry_run=True))
    assert "3 are there and are read" in warned(lambda: load_tractogram(folder.sub / "a.tck"))[1]


def test_trk_counts_that_lie(folder):
    "All lines are read where the header counts fewer; where it counts more, the end of the file is missing."
    trk(folder.sub / "a.trk", nb_streamlines=2)
    summary = folder.create("a.trk")
    assert any("the header counts 2 streamlines; 3 are there and are read" in w for w in summary.warnings) and "3 of 3" in str(summary)
    assert "3 streamlines, 36 points" in str(folder.create("a.trk", dry_run=True))
    trk(folder.sub / "a.trk", nb_streamlines=0)
    assert not any("counts" in w for w in folder.create("a.trk").warnings)
    trk(folder.sub / "a.trk", nb_streamlines=5000)
    with pytest.raises(DataProblem, match="3 streamlines, the header says 5000: the file was cut short"): folder.create("a.trk")


def test_right_counts_say_nothing(folder):
    tck(folder.sub / "a.tck", header="count: 0000000003\ntotal_count: 3\n")
    trk(folder.sub / "b.trk")
    assert not warned(lambda: [load_tractogram(folder.sub / n) for n in ("a.tck", "b.trk")])[1]


@pytest.mark.parametrize("name, kind", [("Float64LE", "<f8"), ("Float32BE", ">f4"), ("Float64BE", ">f8"), ("Float32", "<f4"), ("Float64", "<f8")])
def test_tck_number_types(folder, name, kind):
    tck(folder.sub / "a.tck", kind=kind, name=name)
    assert same(folder.lines("a.tck"), LINES)


def test_trk_of_a_big_endian_machine(tmp_path):
    lines = read_tractogram(trk(tmp_path / "a.trk", ids=[1, 2, 3], swap=True, scalars=2))
    assert same(lines.lines.unbind(), LINES) and lines.dps["id"].ravel().tolist() == [1, 2, 3]


NOWHERE = {"no affine": (dict(version=1), "no affine"), "affine of zeros": (dict(voxel_to_rasmm=np.zeros((4, 4))), "no affine"), "voxel sizes": (dict(voxel_size=0), "no voxel sizes"),
           "version": (dict(version=9), "this version of TrackVis files is not read. Expected: 1, 2 or 3. Found: 9"), "order": (dict(voxel_order=b"XYZ"), "voxel order in the header is not understood"),
           "turned": (dict(voxel_order=b"RAS", dim=0), "cannot be turned.*without the dimensions"), "flat affine": (dict(voxel_to_rasmm=np.diag([2, 2, 0, 1])), "cannot be inverted")}


@pytest.mark.parametrize("what", NOWHERE)
def test_trk_that_says_not_where_lines_are(folder, what, tmp_path):
    "Everywhere: making a study, with an image and without, scoring, looking."
    fields, says = NOWHERE[what]
    path = trk(folder.sub / "a.trk", **fields)
    lines_only = {"lines": {"type": "streamlines", "files": "a.trk"}}
    for use in (lambda: folder.create("a.trk"), lambda: folder.create(config=lines_only), lambda: load_tractogram(path), lambda: viz(path)):
        with pytest.raises(DataProblem, match=f"a.trk: .*{says}"): use()


def test_trk_that_leaves_something_open(folder):
    "Without dimensions an image must give them; without a voxel order TrackVis's own is taken; sizes that contradict the affine are told."
    path = trk(folder.sub / "a.trk", dim=0)
    assert same(folder.lines("a.trk"), LINES)
    with pytest.raises(DataProblem, match="does not say how many voxels its image has"): folder.create(config={"lines": {"type": "streamlines", "files": "a.trk"}})
    assert "no voxel order; LPS is taken" in warned(lambda: load_tractogram(trk(path, voxel_order=b"")))[1]
    found, said = warned(lambda: load_tractogram(trk(path, voxel_size=1)))
    assert "(1 x 1 x 1 mm) are not those of its affine (2 x 2 x 2 mm)" in said
    assert any("wrong size" in w for w in folder.create("a.trk").warnings)


def test_valid_but_not_read(folder):
    "What the format allows and the library does not read is not called damaged."
    for fields, says in ((dict(name="Int16LE"), "numbers of this kind are not read. Expected: Float32 or Float64"), (dict(file="points.dat 0"), "the points lie in another file")):
        tck(folder.sub / "a.tck", **fields)
        for use in (lambda: folder.create("a.tck"), lambda: load_tractogram(folder.sub / "a.tck")):
            with pytest.raises(DataProblem, match=f"a.tck: {says}") as told: use()
            assert "cut short" not in str(told.value)
    for content in (b"", b"TRACK", b"hello"):
        for kind in ("tck", "trk"):
            (folder.sub / f"b.{kind}").write_bytes(content)
            with pytest.raises(DataProblem, match="cannot be read. Expected: a whole"): load_tractogram(folder.sub / f"b.{kind}")
    tck(folder.sub / "b.tck", end=False)
    with pytest.raises(DataProblem, match="closing row is missing: the file was cut short"): load_tractogram(folder.sub / "b.tck")


def test_columns_of_data_per_streamline(tmp_path):
    "Two columns of one name are both kept; more columns than there are is damage."
    def names(h_names, n):
        path = trk(tmp_path / "a.trk", ids=[1, 2, 3], nb_properties_per_streamline=1)
        raw = bytearray(path.read_bytes())
        at = header_2_dtype.fields["property_name"][1]
        for i, name in enumerate(h_names): raw[at + 20*i:at + 20*(i + 1)] = name.ljust(20, b"\0")
        path.write_bytes(raw)
        return path
    assert load_tractogram(names([b""], 1)).dps["properties"].ravel().tolist() == [1, 2, 3]
    with pytest.raises(DataProblem, match="'w' has 4 columns, 1 are left"): load_tractogram(names([b"w\x004"], 1))


# ---- lines of no point

@pytest.mark.parametrize("kind", ["trk", "tck", "trx"])
@pytest.mark.parametrize("options", [{}, {"step_size": .5}, {"nb_points": 10}, {"compress": .1}])
def test_lines_without_a_direction_are_counted(folder, kind, options):
    odd = [NONE, LINES[0], NONE, LINES[1][:1], np.repeat(LINES[1][:1], 4, 0), LINES[2], NONE]
    if kind == "trk": trk(folder.sub / "a.trk", odd)
    elif kind == "tck": tck(folder.sub / "a.tck", odd)
    else: save_tractogram(Tractogram(odd, GRID), folder.sub / "a.trx")
    assert folder.create(f"a.{kind}", dry_run=True, **options).bytes
    summary = folder.create(f"a.{kind}", **options)
    assert any("5 streamlines of fewer than two different points were left out" in w for w in summary.warnings)
    with h5py.File(summary.path) as f: assert f["s1/lines/lengths"].shape == (2,) and np.isfinite(f["s1/lines/data"][()]).all()


def test_data_stay_with_their_lines(folder):
    odd = [LINES[0], NONE, LINES[1], LINES[2]]
    trk(folder.sub / "a.trk", odd, ids=[0, 10, 20, 30], scalars=3)
    save_tractogram(Tractogram([NONE, *odd], GRID, {"id": np.array([-1, 0, 10, 20, 30])[:, None]}, {"odd": [0, 2]}), folder.sub / "a.trx")
    for kind in ("trk", "trx"):
        folder.create({"files": f"a.{kind}", "dps_keys": "id"})
        with h5py.File(folder.root / "study.hdf5") as f: assert f["s1/lines/data_per_streamline/id"][()].ravel().tolist() == [0, 20, 30]
    again = load_tractogram(folder.sub / "a.trx")
    assert again.lines.lengths.tolist() == [0, 12, 0, 12, 12] and again.groups["odd"].tolist() == [0, 2]


def test_lines_of_no_point_are_written(tmp_path):
    for kind, lines in itertools.product(("trk", "tck", "trx"), ([LINES[0], NONE], [NONE, LINES[0]], [NONE, LINES[0], NONE], [NONE, NONE])):
        if kind == "trk" and not any(map(len, lines)): continue
        save_tractogram(Tractogram(lines, GRID), tmp_path / f"a.{kind}")
        assert load_tractogram(tmp_path / f"a.{kind}").lines.lengths.tolist() == [len(x) for x in lines]
    with pytest.raises(DataProblem, match="a .trk file needs a line with points"): save_tractogram(Tractogram([NONE], GRID), tmp_path / "b.trk")


@pytest.mark.parametrize("kind", ["trk", "trx"])
def test_data_per_point_stay_with_their_points(tmp_path, kind):
    "Written, read, chosen and written again; by nibabel and trx-python too."
    lines = [LINES[0], NONE, *LINES[1:]]
    n = sum(map(len, lines))
    whole = Tractogram(lines, GRID, {"w": np.arange(len(lines))[:, None]}, dpp={"fa": np.arange(n)[:, None]/8, "v1": np.arange(3*n).reshape(n, 3)})
    save_tractogram(whole, tmp_path/f"a.{kind}")
    again = load_tractogram(tmp_path/f"a.{kind}")
    assert again.lines.lengths.tolist() == [len(x) for x in lines] and again.dpp.keys() == {"fa", "v1"} == whole.dpp.keys() and "dpp ['fa', 'v1']" in repr(again)
    for k, v in whole.dpp.items(): assert again.dpp[k].shape == v.shape and np.array_equal(again.dpp[k], v.astype(np.float32))
    some = again[[3, 0]]
    save_tractogram(some, tmp_path/f"b.{kind}")
    assert np.array_equal(load_tractogram(tmp_path/f"b.{kind}").dpp["v1"], np.concatenate([whole.dpp["v1"][-len(lines[3]):], whole.dpp["v1"][:len(lines[0])]]))
    if kind == "trk": theirs = nib.streamlines.load(tmp_path/"b.trk").tractogram.data_per_point
    else:
        from trx.trx_file_memmap import load
        theirs = load(str(tmp_path/"b.trx")).data_per_vertex
    assert np.array_equal(np.concatenate([np.asarray(x) for x in theirs["fa"]]), some.dpp["fa"])


def test_data_per_point_are_not_lost_in_silence(tmp_path):
    lines = Tractogram(LINES, GRID, dpp={"fa": np.ones((sum(map(len, LINES)), 1))})
    with pytest.raises(DataProblem, match=r"a .tck file cannot keep the data per point \['fa'\]. To do: save a .trk or .trx, or pass drop_dps=True"): save_tractogram(lines, tmp_path/"a.tck")
    save_tractogram(lines, tmp_path/"a.tck", drop_dps=True)
    for name, kind, words in (("a.b", "trx", "cannot keep the name 'a.b'"), ("a name that is too long", "trk", "no room for the name")):
        with pytest.raises(DataProblem, match=words): save_tractogram(Tractogram(LINES, GRID, dpp={name: lines.dpp["fa"]}), tmp_path/f"b.{kind}")
    with pytest.raises(DataProblem, match="ten kinds of data per point. Expected: at most 10. Found: 11"):
        save_tractogram(Tractogram(LINES, GRID, dpp={f"n{i}": lines.dpp["fa"] for i in range(11)}), tmp_path/"b.trk")
    with pytest.raises(DataProblem, match="the data per point 'fa' does not fit. Expected: .* rows, one a point. Found: 2 rows"):
        save_tractogram(Tractogram(LINES, GRID, dpp={"fa": np.ones(2)}), tmp_path/"b.trk")
    save_tractogram(lines, tmp_path/"c.trx")
    with zipfile.ZipFile(tmp_path/"c.trx", "a") as z: z.writestr("dpv/x.float32", np.ones(2, "<f4").tobytes())
    with pytest.raises(DataProblem, match="dpv/x.float32 has 8 bytes"): load_tractogram(tmp_path/"c.trx")


def test_trx_of_ours_is_theirs(tmp_path):
    from trx.trx_file_memmap import load, save
    whole = Tractogram(LINES, GRID, {"w": np.arange(3.0)[:, None], "c": np.ones((3, 3))}, {"two": [0, 2]})
    save_tractogram(whole, tmp_path / "a.trx")
    trx = load(str(tmp_path / "a.trx"))
    assert same([np.asarray(x) for x in trx.streamlines], LINES) and trx.data_per_streamline["c"].shape == (3, 3) and list(trx.groups["two"]) == [0, 2]
    assert np.allclose(trx.header["VOXEL_TO_RASMM"], AFFINE) and list(trx.header["DIMENSIONS"]) == list(SHAPE)
    trx.data_per_streamline = {"id": np.arange(3)[:, None] + 2**40, "half": np.ones((3, 2), np.float16)}
    save(trx, str(tmp_path / "b.trx"))
    trx.close()
    theirs = load_tractogram(tmp_path / "b.trx")
    assert same(theirs.lines.unbind(), LINES) and theirs.dps["id"].ravel().tolist() == [2**40, 2**40 + 1, 2**40 + 2] and theirs.dps["half"].shape == (3, 2)
    with zipfile.ZipFile(tmp_path / "a.trx") as a, zipfile.ZipFile(tmp_path / "c.trx", "w", zipfile.ZIP_DEFLATED) as z:  # as other programs write them
        for name in a.namelist():
            if name.startswith("positions"): z.writestr("positions.3.float16", np.concatenate(LINES).astype("<f2").tobytes())
            elif name.startswith("offsets"): z.writestr("offsets.uint64", np.array([0, 12, 24], "<u8").tobytes())  # without the end
            else: z.writestr(name, a.read(name))
        z.writestr("__MACOSX/._header.json", b"junk"); z.writestr("dpv/", b"")
    assert np.allclose(load_tractogram(tmp_path / "c.trx").lines.data, np.concatenate(LINES), atol=.01)
    with zipfile.ZipFile(tmp_path / "a.trx") as a, zipfile.ZipFile(tmp_path / "d.trx", "w") as z:
        for name in a.namelist(): z.writestr(f"packed/{name}", a.read(name))
    with pytest.raises(DataProblem, match="its arrays lie in a folder of the archive.*zip -0 -r"): load_tractogram(tmp_path / "d.trx")
    with zipfile.ZipFile(tmp_path / "a.trx", "a") as z: z.writestr("dps/c.float32", np.ones(3, "<f4").tobytes())
    with pytest.raises(DataProblem, match="dps/c is there twice"): load_tractogram(tmp_path / "a.trx")


@pytest.mark.parametrize("change", [dict(VOXEL_TO_RASMM=np.zeros((4, 4)).tolist()), dict(VOXEL_TO_RASMM=None), dict(DIMENSIONS=None), dict(VOXEL_TO_RASMM=np.eye(4).tolist(), DIMENSIONS=[1, 1, 1])])
def test_trx_whose_header_was_left_empty(folder, change):
    "Points are in RAS mm whatever the header says: an image gives the grid."
    save_tractogram(Tractogram(LINES, GRID), folder.root / "whole.trx")
    with zipfile.ZipFile(folder.root / "whole.trx") as a, zipfile.ZipFile(folder.sub / "a.trx", "w") as z:
        for name in a.namelist(): z.writestr(name, a.read(name) if name != "header.json" else json.dumps({k: v for k, v in (json.loads(a.read(name)) | change).items() if v is not None}))
    assert same(folder.lines("a.trx"), LINES) and any("a.trx: the header has no affine" in w for w in folder.create("a.trx").warnings)
    with pytest.raises(DataProblem, match="a .trx does not say which image it belongs to"): folder.create(config={"lines": {"type": "streamlines", "files": "a.trx"}})


def test_tck_headers_as_others_write_them(tmp_path):
    plain = tck(tmp_path / "a.tck").read_bytes()
    at = plain.index(b"END\n") + 4
    windows = plain[:at].replace(b"\n", b"\r\n").replace(b". %08d" % at, b". %08d" % (at + plain[:at].count(b"\n")))
    padded = plain[:at].replace(b". %08d" % at, b". %08d" % (at + 50)) + b"roi: seed x.nii\nEND\n".ljust(50, b"\0") + plain[at:]  # what an earlier, longer header left
    strange = np.frombuffer(plain[at:], "<u4").copy(); strange[np.isnan(strange.view("<f4"))] = 0xFFC12345                        # another of the many NaNs
    for content in (padded, plain[:at] + strange.tobytes(), windows + plain[at:], tck(tmp_path / "a.tck", header="comments: the END of\nEND: no\n").read_bytes(), tck(tmp_path / "a.tck", header=f"command_history: {'x'*3_000_000}\n").read_bytes(),
                    tck(tmp_path / "a.tck", name="float32le").read_bytes(), re.sub(rb"file: . \d+", b"file: .", plain), plain.replace(b"datatype", b"other   ")):
        (tmp_path / "b.tck").write_bytes(content)
        assert same(load_tractogram(tmp_path / "b.tck").lines.unbind(), LINES)
    (tmp_path / "b.tck").write_bytes(b"mrtrix tracks    \n" + bytes(200))
    with pytest.raises(DataProblem, match="the header has no END: it was never finished"): load_tractogram(tmp_path / "b.tck")
    (tmp_path / "b.tck").write_bytes(plain + plain)
    with pytest.raises(DataProblem, match=f"{len(plain)} bytes follow the closing row"): load_tractogram(tmp_path / "b.tck")


# ---- compressed, in folders

def test_compressed_tractograms(folder, tmp_path, capsys):
    for kind, make in (("tck", tck), ("trk", trk)):
        (folder.sub / f"a.{kind}.gz").write_bytes(gzip.compress(make(tmp_path / f"a.{kind}").read_bytes()))
        assert same(folder.lines(f"a.{kind}.gz"), LINES) and "3 streamlines, 36 points" in str(folder.create(f"a.{kind}.gz", dry_run=True))
        assert len(load_tractogram(folder.sub / f"a.{kind}.gz")) == 3
        with pytest.raises(DataProblem, match=f"a compressed .{kind} is not written"): save_tractogram(Tractogram(LINES, GRID), tmp_path / f"b.{kind}.gz")
        cut = (folder.sub / f"a.{kind}.gz").read_bytes()[:-30]
        (folder.sub / f"a.{kind}.gz").write_bytes(cut)
        with pytest.raises(DataProblem, match="cannot be read"): folder.create(f"a.{kind}.gz")
    (folder.sub / "a.trx.gz").write_bytes(b"x")
    with pytest.raises(DataProblem, match="To do: unpack it first: gunzip"): folder.create("a.trx.gz")


def test_names_that_do_not_say_what_is_compressed(folder):
    raw = tck(folder.sub / "a.tck").read_bytes()
    (folder.sub / "b.tck").write_bytes(gzip.compress(raw)); (folder.sub / "c.tck.gz").write_bytes(raw)
    plain = nib.load(folder.sub / "input.nii.gz").to_bytes()
    (folder.sub / "plain.nii.gz").write_bytes(plain); (folder.sub / "packed.nii").write_bytes(gzip.compress(plain))
    for name, says in {"b.tck": "it is compressed, and its name does not end in .gz", "c.tck.gz": "it is not compressed, and its name ends in .gz"}.items():
        with pytest.raises(DataProblem, match=says): folder.create(name)
    for name, says in {"plain.nii.gz": "it is not compressed", "packed.nii": "it is compressed"}.items():
        with pytest.raises(DataProblem, match=says): folder.create(config=folder.config(files=name))


def test_names_in_capitals(folder):
    (folder.sub / "input.nii.gz").rename(folder.sub / "INPUT.NII.GZ"); trk(folder.sub / "A.TRK")
    assert folder.create(config=folder.config("A.TRK", files="INPUT.NII.GZ")).reports[0].lines["lines"].kept == 3


def test_trx_folders_are_told_how_to_pack(folder):
    (folder.sub / "a.trx").mkdir()
    (folder.sub / "s1_tractogram.trx").mkdir()
    query = {"files": {"suffix": "tractogram"}}
    for use in (lambda: folder.create("a.trx"), lambda: folder.create("*.trx"), lambda: folder.create(query), lambda: load_tractogram(folder.sub / "a.trx"), lambda: viz(folder.sub / "a.trx")):
        with pytest.raises(DataProblem, match="this tractogram is a folder.*zip -0 -r"): use()


# ---- sheared grids

LEANING = AFFINE + np.array([[0, .8, 0, 0], [0] * 4, [0] * 4, [0] * 4])


def test_lengths_on_a_sheared_grid():
    grid, rng = Grid(LEANING, SHAPE), np.random.default_rng(0)
    p = rng.normal(0, 30, (50, 3))
    step = lambda x: np.linalg.norm(np.diff(x, axis=0), axis=1)
    assert grid.sheared and not GRID.sheared
    np.testing.assert_allclose(step(convert(p, grid, "rasmm", "voxmm")), step(p))
    for a, b in itertools.product(SPACES, SPACES): np.testing.assert_allclose(convert(convert(p, grid, a, b), grid, b, a), p)
    for turn in (1e-5, 1e-4):  # what rounding does to an affine is no shear, and changes nothing
        off = AFFINE.copy(); off[0, 1] = 2 * turn
        assert not Grid(off, SHAPE).sheared


def test_sheared_grids_are_refused_where_axes_are_walked(folder, tmp_path):
    says = "the grid is sheared.*Found: two axes at 68.20 degrees.*resample"
    image(folder.sub / "leaning.nii.gz", affine=LEANING)
    with pytest.raises(DataProblem, match=f"subject s1, group input, file .*leaning.nii.gz: {says}"): folder.create(config=folder.config(files="leaning.nii.gz"))
    save_tractogram(Tractogram(LINES, Grid(LEANING, SHAPE)), folder.sub / "leaning.trk")
    with pytest.raises(DataProblem, match=says): folder.create(config={"lines": {"type": "streamlines", "files": "leaning.trk"}})
    assert same(load_tractogram(folder.sub / "leaning.trk").lines.unbind(), LINES)  # the world is right on any grid
    path = folder.create(tck(folder.sub / "a.tck").name).path  # a study made elsewhere
    with h5py.File(path, "r+") as f:
        for g in ("input", "lines"): f["s1"][g].attrs["affine"] = LEANING
    assert any("sheared" in p.problem for p in check_study(path).problems)
    world = load_tractogram(extract_data(path, "s1", "lines", tmp_path / "vox.trk")).lines.data
    with h5py.File(path, "r+") as f:  # the same in millimetres along its axes, as dipy has them
        f["s1/lines"].attrs["space"] = "Space.VOXMM"
        f["s1/lines/data"][...] = f["s1/lines/data"][()] * Grid(LEANING, SHAPE).voxel_sizes
    assert np.allclose(load_tractogram(extract_data(path, "s1", "lines", tmp_path / "voxmm.trk")).lines.data, world, atol=1e-3)
    with h5py.File(path, "r+") as f:
        f["s1/lines"].attrs["space"] = "Space.VOX"
        f["s1/lines/data"][...] = f["s1/lines/data"][()] / Grid(LEANING, SHAPE).voxel_sizes
    dataset = MultiSubjectDataset(path).load_data()
    sampler, loader = DWIMLBatchIDSampler(dataset, "lines"), DWIMLBatchLoader(dataset, ModelSpec(), "lines")
    with pytest.raises(DataProblem, match=f"subject s1, group lines: {says}"): loader.load_batch_streamlines(next(iter(sampler)))


def test_harmonics_on_a_sheared_grid_are_refused(tmp_path):
    "Their directions would be neither those of the image's axes nor those of the world."
    image(tmp_path / "dwi.nii.gz", affine=LEANING); image(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.uint8), LEANING)
    with pytest.raises(DataProblem, match="dwi.nii.gz: the grid is sheared"): fit_sh_files(*(tmp_path / n for n in ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz", "sh.nii.gz")))


def test_walking_on_a_sheared_grid_is_refused():
    from dwiml_nb.tracking.propagate import Walk

    class Inputs: spec, device = ModelSpec(), "cpu"
    with pytest.raises(DataProblem, match="the grid is sheared"): Walk(None, Inputs(), Grid(LEANING, SHAPE))


# ---- two affines, or none

def mirrored(nifti):
    nifti.set_sform(AFFINE, 1)
    nifti.set_qform(np.diag([-1, 1, 1, 1]) @ AFFINE, 1)


def nowhere(nifti): nifti.set_sform(None, 0); nifti.set_qform(None, 0)
def damaged(nifti): nifti.set_sform(AFFINE, 1); nifti.set_qform(AFFINE, 1); nifti.header["quatern_b"] = 7


ODD_PLACES = {"mirrored": (mirrored, "sform and qform lie up to .* mm apart, and its axes run LAS and RAS; the sform is used"), "nowhere": (nowhere, "neither qform nor sform is set, so its affine is a guess"),
              "damaged": (damaged, "its qform is damaged; the sform is used"), "metres": (lambda nifti: nifti.header.set_xyzt_units("meter"), "its header says meters; its numbers are taken as mm")}


@pytest.mark.parametrize("what", ODD_PLACES)
def test_odd_places_are_told(folder, what):
    change, says = ODD_PLACES[what]
    path = image(folder.sub / "input.nii.gz", change=change)
    for dry_run in (True, False):
        assert any(re.search(f"subject s1, group input, input.nii.gz: {says}", w) for w in folder.create(dry_run=dry_run).warnings)
    if what != "nowhere":
        with h5py.File(folder.root / "study.hdf5") as f: assert np.allclose(f["s1/input"].attrs["affine"], AFFINE)
    assert re.search(says, warned(lambda: grid_of(path))[1])


def test_headers_that_nibabel_mends_or_trusts(folder):
    "A size of 0 that becomes 1 mm is told; values that begin at byte 0 were read out of the header."
    plain = nib.Nifti1Image(np.ones((*SHAPE, 2), np.float32), AFFINE).to_bytes()
    def patched(at, value, name="input.nii"): (folder.sub / name).write_bytes(plain[:at] + value + plain[at + len(value):])
    patched(80, bytes(4))
    assert any("input.nii: nibabel mended its header: pixdim" in w for w in folder.create(config=folder.config(files="input.nii")).warnings)
    patched(108, bytes(4))
    with pytest.raises(DataProblem, match="the values begin at byte 0, within the header"): folder.create(config=folder.config(files="input.nii"))
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 1, 3), np.float32), AFFINE), folder.sub / "five.nii")
    with pytest.raises(DataProblem, match="wrong axes.*take out axes of length 1"): folder.create(config=folder.config(files="five.nii"))


def test_usual_places_say_nothing(folder):
    def both(nifti): nifti.set_sform(AFFINE, 1); nifti.set_qform(AFFINE, 1)
    def qform(nifti): nifti.set_sform(None, 0); nifti.set_qform(AFFINE, 1)
    for change in (both, qform, None):
        image(folder.sub / "input.nii.gz", change=change)
        assert not folder.create().warnings and not warned(lambda: open_image(folder.sub / "input.nii.gz"))[1]


def test_affines_that_differ_by_rounding(folder):
    "One float32 step is the same grid for images, masks, tractograms, labels and references; a hundredth of a millimetre is not."
    far = AFFINE.copy(); far[:3, 3] = 134.640289, -184.381409, -147.122208
    near = far.copy(); near[:3, 3] = np.nextafter(far[:3, 3].astype(np.float32), np.float32(0))
    image(folder.sub / "input.nii.gz", affine=far)
    image(folder.sub / "mask.nii.gz", np.ones(SHAPE, np.uint8), near)
    folder.create(config=folder.config(std_mask="mask.nii.gz", standardization="all"))
    assert same_grid(Grid(far, SHAPE), Grid(near, SHAPE))
    away = far.copy(); away[0, 3] += .01
    image(folder.sub / "mask.nii.gz", np.ones(SHAPE, np.uint8), away)
    with pytest.raises(DataProblem, match="different grids"): folder.create(config=folder.config(std_mask="mask.nii.gz", standardization="all"))


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<f4", ">f8"])
@pytest.mark.parametrize("slope, shift", [(0, 0), (-0., 5), (np.nan, np.nan), (np.inf, 0), (.1, 3.3), (-2, 0)])
def test_scaling_as_the_header_has_it(tmp_path, kind, slope, shift):
    "A slope of 0, or none, means the values as they are: many programs write that."
    header = nib.Nifti1Header(endianness=kind[0])
    header.set_data_dtype(np.dtype(kind)); header.set_data_shape((3, 4, 5, 2)); header.set_sform(AFFINE, 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = slope, shift, 352, b"n+1"
    values = np.arange(120).reshape(3, 4, 5, 2).astype(kind)
    raw = header.binaryblock + bytes(4) + values.tobytes("F")
    (tmp_path / "a.nii").write_bytes(raw); (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw))
    expected = np.asanyarray(nib.load(tmp_path / "a.nii").dataobj, np.float32)
    for name in ("a.nii", "a.nii.gz"): assert np.array_equal(load_volume(tmp_path / name), expected)
    if not slope: assert np.array_equal(expected, values)


# ---- labels

def test_labels_moved_by_rounding(folder):
    labels = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 7 * 2000).astype(np.int32)
    def slope(nifti): nifti.header.set_slope_inter(1.0000001, 0)
    image(folder.sub / "scaled.nii.gz", labels, change=slope)
    image(folder.sub / "floats.nii.gz", np.nextafter(labels.astype(np.float32), np.float32(0)))
    tck(folder.sub / "a.tck"); np.save(folder.sub / "matrix.npy", np.ones((6, 6)))
    for name in ("scaled", "floats"):
        path = folder.create({"files": "a.tck", "connectivity_matrix": "matrix.npy", "connectivity_labels": f"{name}.nii.gz"}).path
        with h5py.File(path) as f: assert np.array_equal(f["s1/lines/connectivity_label_volume"][()], labels)
    image(folder.sub / "between.nii.gz", labels + np.float32(.5))
    with pytest.raises(DataProblem, match="must hold whole numbers.*values such as 0.5.*nearest label"):
        folder.create({"files": "a.tck", "connectivity_matrix": "matrix.npy", "connectivity_labels": "between.nii.gz"})
    with h5py.File(path, "r+") as f:  # a study by another program keeps labels as floats
        del f["s1/lines/connectivity_label_volume"]
        f["s1/lines"]["connectivity_label_volume"] = labels - 1e-4
    assert np.array_equal(load_labels(extract_data(path, "s1", "lines", folder.root / "labels.nii.gz")), labels)


def test_large_labels_are_exact(tmp_path):
    labels = np.full((2, 2, 2), 2**24 + 1, np.int32)
    assert np.array_equal(load_labels(image(tmp_path / "a.nii.gz", labels)), labels)


# ---- there by name only

STAND_INS = {"a broken link of git-annex": lambda p: p.symlink_to("../.git/annex/objects/qF/8V/MD5E-s9--0/MD5E-s9--0"), "an unlocked pointer of git-annex": lambda p: p.write_text("/annex/objects/MD5E-s9--0\n"),
             "a link of git-annex as text": lambda p: p.write_text("../../.git/annex/objects/qF/8V/MD5E-s9--0/MD5E-s9--0"), "a pointer of Git LFS": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
             "a broken link": lambda p: p.symlink_to("/gone/away"), "a web page": lambda p: p.write_text("\n<!DOCTYPE html>\n<html>Sign in</html>")}
SAYS = {"a broken link": "a link that leads nowhere \\(/gone/away\\)", "a web page": "a web page", "a pointer of Git LFS": "a pointer of Git LFS, whose content is not here.*git lfs pull"}


@pytest.mark.parametrize("what", STAND_INS)
def test_files_that_are_there_by_name_only(folder, tmp_path, what):
    "Images, masks, matrices, tractograms, studies, models, references: each says what is there instead, and how to get it."
    make, says = STAND_INS[what], SAYS.get(what, "git-annex, whose content is not here.*datalad get, or git annex get")
    tck(folder.sub / "a.tck"); np.save(folder.sub / "m.npy", np.ones((2, 2)))
    def lacking(name, use):
        path = Path(folder.sub / name) if isinstance(name, str) else name
        kept = path.read_bytes() if path.is_file() else None
        path.unlink(missing_ok=True); path.parent.mkdir(parents=True, exist_ok=True); make(path)
        with pytest.raises(DataProblem, match=f"{path.name}: .*{says}"): use()
        path.unlink()
        if kept is not None: path.write_bytes(kept)
    with_matrix = {"files": "a.tck", "connectivity_matrix": "m.npy", "connectivity_nb_blocs": 2}
    lacking("input.nii.gz", folder.create)
    lacking("mask.nii.gz", lambda: folder.create(config=folder.config(std_mask="mask.nii.gz", standardization="all")))
    for pattern in ("a.tck", "*.tck"): lacking("a.tck", lambda: folder.create(pattern))
    for kind in ("tck", "trk", "trx", "tck.gz"): lacking(f"b.{kind}", lambda: load_tractogram(folder.sub / f"b.{kind}"))
    lacking("m.npy", lambda: folder.create(with_matrix))
    lacking(tmp_path / "study.hdf5", lambda: open_study(tmp_path / "study.hdf5"))
    lacking(tmp_path / "other.nii", lambda: grid_of(tmp_path / "other.nii"))
    lacking(tmp_path / "c.tck", lambda: viz(tmp_path / "c.tck"))
    for name, use in {"record.json": read_json, "array.npy": read_array, "ids.txt": read_subject_list, "bvals": read_bvals}.items(): lacking(tmp_path / name, lambda: use(tmp_path / name))
    (tmp_path / "truth").mkdir()
    for name, use in {"config.json": lambda: folder.create(config=tmp_path / "config.json"), "scoring.json": lambda: score_tractogram(LINES, tmp_path), "truth/scoring.json": lambda: score_tractogram(LINES, tmp_path),
                      "parameters_latest.json": lambda: read_experiment(tmp_path)}.items(): lacking(tmp_path / name, use)
    for name in ("params.json", "state.pt"): lacking(tmp_path / "checkpoint" / name, lambda: read_checkpoint(tmp_path))
    (tmp_path / "model").mkdir()
    for name in ("parameters.json", "model_type.txt"): (tmp_path / "model" / name).write_text("{}")
    for name in ("model_state.pkl", "parameters.json", "model_class.json"): lacking(tmp_path / "model" / name, lambda: load_model(tmp_path / "model"))


def test_a_broken_link_in_a_bids_tree_is_no_missing_tract(folder):
    query = {"files": {"suffix": "tractogram", "tract": "*"}}
    for tract in ("AF", "CST"): trk(folder.sub / f"s1_tract-{tract}_tractogram.trk")
    assert len(folder.lines(query)) == 6
    (folder.sub / "s1_tract-CST_tractogram.trk").unlink()
    (folder.sub / "s1_tract-CST_tractogram.trk").symlink_to(".git/annex/objects/CST.trk")
    with pytest.raises(DataProblem, match="CST_tractogram.trk: no such file: a link of git-annex"): folder.create(query)
    assert any("git-annex" in w and "It is left out" in w for w in folder.create(query, skip_missing=True).warnings)


def test_a_subject_of_a_grown_study_that_is_a_pointer(folder):
    path = folder.create().path
    image(folder.root / "subjects" / "s2" / "input.nii.gz")
    with can_be_made_again(): add_subjects(path, folder.root / "subjects", ["s2"])
    own = folder.root / "study.subjects" / "s2.hdf5"
    for make in (lambda: own.write_text("/annex/objects/MD5E-s9--0\n"), lambda: own.symlink_to("../.git/annex/objects/s2")):
        own.unlink(); make()
        with pytest.raises(DataProblem, match="s2.hdf5: the file that holds this subject cannot be read: a .* of git-annex"): MultiSubjectDataset(path).load_data()
        assert any("git-annex" in p.problem for p in check_study(path).problems)


# ---- file systems without locks

@pytest.mark.parametrize("code, says", [(errno.ENOLCK, "no locks"), (errno.EIO, "no locks"), (errno.ENOSYS, "no locks"), (errno.EOPNOTSUPP, "no locks"), (errno.EPERM, "no locks"),
                                        (errno.EAGAIN, "being written"), (errno.EACCES, "being written")])
def test_which_error_a_lock_gives(folder, monkeypatch, code, says):
    "Only a lock that somebody holds is waited for."
    path = folder.create().path
    def opened(*args, **kwargs): raise OSError(f"Unable to synchronously open file (unable to lock file, errno = {code}, error message = '…')")
    monkeypatch.setattr(h5py, "File", opened)
    for use in (lambda: open_study(path), lambda: MultiSubjectDataset(path)):
        with pytest.raises(DataProblem) as told: use()
        said = str(told.value)
        assert says in said and ("HDF5_USE_FILE_LOCKING=FALSE" in said) == (says == "no locks") and ("wait for it" in said) == (says != "no locks")
    report = check_study(path)
    assert says in report.problems[0].problem


# ---- told before any work, or not at all

def test_a_disk_without_locks_is_told_before_a_part_is_made(folder, monkeypatch):
    opened, made = h5py.File, []
    def file(name, mode="r", **kwargs):
        if mode == "r": raise OSError(f"Unable to synchronously open file (unable to lock file, errno = {errno.ENOLCK}, error message = 'No locks available')")
        made.append(name)
        return opened(name, mode, **kwargs)
    monkeypatch.setattr(h5py, "File", file)
    with pytest.raises(DataProblem, match="HDF5_USE_FILE_LOCKING=FALSE"): folder.create()
    assert len(made) == 1 and not [p for p in folder.root.iterdir() if p.name != "subjects"]


def test_copies_appear_when_all_are_there(folder, monkeypatch):
    from dwiml_nb.study import create
    save, seen = create.save_copies, []
    def slowly(subject, to): save(subject, to); seen.append([p.name for p in folder.root.iterdir()]); raise KeyboardInterrupt
    monkeypatch.setattr(create, "save_copies", slowly)
    with pytest.raises(KeyboardInterrupt): folder.create(save_intermediate=True)
    assert len(seen) == 1 and not any(name.startswith("intermediate") for name in seen[0]) and not list(folder.root.rglob("*input.nii.gz.*")) + list(folder.root.glob("intermediate*"))
    killed = folder.root / ".study.parts" / "intermediate"                    # of a process that could not tidy up
    killed.mkdir(); (killed / "half.nii.gz").touch()
    monkeypatch.setattr(create, "save_copies", save)
    folder.create(save_intermediate=True)
    copies, = folder.root.glob("intermediate_*")
    assert [p.name for p in copies.iterdir()] == ["s1_input.nii.gz"] and not killed.parent.exists()


def test_a_slope_of_infinity_is_told(folder):
    path = image(folder.sub / "input.nii.gz", np.full((*SHAPE, 2), 7, np.int16))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:116] = np.float32(np.inf).tobytes()                               # scl_slope
    path.write_bytes(gzip.compress(raw))
    assert "scales the values by infinity; they are taken as they are" in " ".join(folder.create().warnings)


@pytest.mark.parametrize("n", [float("nan"), 2.5, "4", 0, None])
def test_a_number_of_subjects_that_is_none(tmp_path, n):
    from dwiml_nb.study.toy import toy_study
    with pytest.raises(DataProblem, match="a phantom study has at least one subject"): toy_study(tmp_path, n_subjects=n)
    assert not list(tmp_path.iterdir())
