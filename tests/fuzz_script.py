"""What test_fuzz.py runs in processes of its own: damage a small file by a seed, read it, say what came of it; one line of JSON a seed.

    python tests/fuzz_script.py make FOLDER             writes a whole file of each format there
    python tests/fuzz_script.py read FORMAT FOLDER 0 1 2 …     damages FOLDER/whole.FORMAT by each seed and reads it
    python tests/fuzz_script.py bombs FOLDER            writes small files that claim terabytes, and reads them within 256 MiB
"""
import faulthandler
import io
import json
import re
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.check import check_study
from dwiml_nb.study.check_apart import limit_memory
from dwiml_nb.study.create import create_study
from dwiml_nb.study.sources import tractogram_header

FORMATS = ("hdf5", "trk", "tck", "trx")
MEMORY, SECONDS = 2 << 30, 15


# ---- whole files

def tiny_tractogram(seed, grid):
    rng = np.random.default_rng(seed)
    lines = [np.cumsum(rng.normal(0, .4, (n, 3)), 0).clip(-3, 3) + 5 for n in rng.integers(2, 12, 14)]
    return Tractogram(Ragged.from_list([line.astype(np.float32) for line in lines]), grid, {"weight": rng.random((14, 1)), "colour": rng.random((14, 3))},
                      {"some": np.array([1, 3, 5])})


def copy_to(a, b):
    "All of one HDF5 group to another."
    b.attrs.update(a.attrs)
    for name, o in a.items():
        if isinstance(o, h5py.Group): copy_to(o, b.create_group(name))
        else: b.create_dataset(name, data=o[()]).attrs.update(o.attrs)


def make(folder):
    "A whole file of each format; of HDF5 also in its oldest form, which dwi_ml writes and which has no checksums of its own."
    grid = Grid(np.diag([2., 2, 2, 1]), (6, 6, 6))
    for kind in FORMATS[1:]: save_tractogram(tiny_tractogram(0, grid), folder / f"whole.{kind}", drop_dps=kind == "tck")
    with zipfile.ZipFile(folder / "whole.trx") as z: members = {name: z.read(name) for name in sorted(z.namelist())}
    with zipfile.ZipFile(folder / "whole.trx", "w") as z:
        for name, content in members.items(): z.writestr(zipfile.ZipInfo(name), content)  # without the time
    root = folder / "subjects"
    for i in (1, 2):
        (root / f"sub-{i}").mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.random.default_rng(i).random((6, 6, 6, 4), np.float32), grid.affine), root / f"sub-{i}" / "fa.nii.gz")
        np.save(root / f"sub-{i}" / "matrix.npy", np.eye(8))
        save_tractogram(tiny_tractogram(i, grid), root / f"sub-{i}" / "lines.trk")
    config = {"fa": {"type": "volume", "files": "fa.nii.gz", "standardization": "all"},
              "bundles": {"type": "streamlines", "files": "lines.trk", "dps_keys": "weight", "connectivity_matrix": "matrix.npy", "connectivity_nb_blocs": 2}}
    time.strftime = lambda *args: "1 January 2026 00:00:00"  # the same bytes each time, so that a seed means the same damage
    create_study(root, folder / "whole.hdf5", config, ["sub-1"], ["sub-2"])
    with h5py.File(folder / "whole.hdf5") as a, h5py.File(folder / "oldest.hdf5", "w") as b: copy_to(a, b)
    for name in ("whole.hdf5", "oldest.hdf5"): assert check_study(folder / name).ok


# ---- damage

HUGE = [np.int64(v) for v in (2**31 - 1, -1, 10**12, 2**40, 2**62, -2**31)] + [np.int32(v) for v in (2**31 - 1, -1, 10**8, -2**31)] + [np.float32(v) for v in (np.nan, np.inf, 1e30)]


def place(data, where, rng):
    "A position to spoil: mostly in the header or the metadata."
    return int(rng.choice(where)) if rng.random() < .8 else int(rng.integers(len(data)))


def flip(data, where, rng):
    for _ in range(rng.integers(1, 9)): data[place(data, where, rng)] ^= 1 << int(rng.integers(8))
    return data


def scramble(data, where, rng):
    for _ in range(rng.integers(1, 5)): data[place(data, where, rng)] = int(rng.integers(256))
    return data


def truncate(data, where, rng): return data[:int(rng.integers(len(data)))]


def zero(data, where, rng):
    at, n = place(data, where, rng), int(rng.integers(1, 300))
    data[at:at + n] = bytes(len(data[at:at + n]))
    return data


def repeat(data, where, rng):
    at, n = place(data, where, rng), int(rng.integers(1, 300))
    return data[:at] + data[at:at + n] + data[at:] if rng.random() < .5 else data[:at] + data[at:at + n] * 2 + data[at + 2 * n:]


def swap(data, where, rng):
    n = int(rng.choice([2, 4, 8]))
    a, b = (place(data, where, rng) // n * n for _ in "ab")
    data[a:a + n], data[b:b + n] = data[b:b + n], data[a:a + n]
    return data


def huge(data, where, rng):
    value = HUGE[rng.integers(len(HUGE))].tobytes()
    at = place(data, where, rng) // 2 * 2
    data[at:at + len(value)] = value[:len(data) - at]
    return data


def garbage(data, where, rng): return data + (rng.bytes(int(rng.integers(1, 2000))) if rng.random() < .5 else data)


def huge_words(data, where, rng):
    "A number that is written as text gets another value."
    numbers = list(re.finditer(rb"\d+", bytes(data[:2000])))
    if not numbers: return data
    m = numbers[rng.integers(len(numbers))]
    return data[:m.start()] + rng.choice([b"999999999999", b"0", b"-7", b"2147483647", b"x"]) + data[m.end():]


ANY = (flip, scramble, truncate, zero, repeat, swap, huge, garbage)


def header_places(kind, data):
    "Where the bytes are that say how to read the rest."
    if kind == "trk": return np.r_[0:1000, [1000 + i for i in range(4)]]
    if kind == "tck": return np.r_[0:min(len(data), 200)]
    if kind == "trx": return np.arange(len(data))
    with h5py.File(io.BytesIO(data)) as f:  # all that is not values of a dataset
        values = []
        f.visititems(lambda name, o: values.append((o.id.get_offset(), o.nbytes)) if isinstance(o, h5py.Dataset) and o.id.get_offset() else None)
        keep = np.ones(len(data), bool)
        for at, n in values: keep[at:at + n] = False
        return np.flatnonzero(keep)


def spoil_member(data, rng):
    "A .trx whose zip is fine and one of whose files is not."
    with zipfile.ZipFile(io.BytesIO(data)) as z: members = {name: bytearray(z.read(name)) for name in z.namelist()}
    names = list(members)
    name = "header.json" if rng.random() < .4 else names[rng.integers(len(names))]
    what = huge_words if name == "header.json" and rng.random() < .7 else ANY[rng.integers(len(ANY))]
    if len(members[name]): members[name] = what(members[name], np.arange(len(members[name])), rng)
    if rng.random() < .15: del members[names[rng.integers(len(names))]]
    if rng.random() < .05: members[names[rng.integers(len(names))]] = bytearray(30 << 20)  # zeros: small in the zip
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < .4 else zipfile.ZIP_STORED) as z:
        for name, content in members.items(): z.writestr(zipfile.ZipInfo(name), bytes(content), z.compression)
    return bytearray(out.getvalue())


def damage(kind, data, where, seed):
    "The bytes of a file, damaged in one to three ways."
    rng, data = np.random.default_rng([FORMATS.index(kind), seed]), bytearray(data)
    if kind == "trx" and rng.random() < .5: return bytes(spoil_member(data, rng))
    ways = ANY + (huge_words,) * 3 if kind == "tck" else ANY
    for _ in range(rng.integers(1, 4)):
        if len(data): data = ways[rng.integers(len(ways))](data, where[where < len(data)] if where[0] < len(data) else np.arange(len(data)), rng)
    return bytes(data)


# ---- reading

def all_finite(*arrays): return all(bool(np.isfinite(np.asarray(a)).all()) for a in arrays)


def read_all(path, lazy):
    "Every value of a study, as a user would ask for them, and one batch."
    dataset, out = MultiSubjectDataset(path, lazy=lazy), {}
    dataset.load_data()
    for name, subset in dataset.subsets.items():
        for i, subject in enumerate(subset.subjects):
            for g in dataset.volume_groups: out[subject, g] = subset.get_volume(i, g).numpy()
            for g in dataset.streamline_groups:
                lines, data = subset.get_lines(i, g), subset.streamlines_of(i, g)
                assert len(lines) == len(data) and int(lines.offsets[-1]) == len(lines.data)
                out[subject, g], out[subject, g, "mm"] = np.concatenate([lines.data.numpy().ravel(), lines.offsets.numpy()]), np.asarray(data.lengths_mm)
                for k, v in data.get_dps().items(): out[subject, g, k] = np.asarray(v)
                matrix = data.get_connectivity_matrix_and_info()[0]
                if matrix is not None: out[subject, g, "matrix"] = matrix
                if len(lines): data.get_lines([len(lines) - 1, 0])
    if "bundles" in dataset.streamline_groups and "fa" in dataset.volume_groups and len(dataset.training):
        sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=8)
        loader = DWIMLBatchLoaderOneInput(dataset, ModelSpec(step_size=1.), "fa", "bundles")
        lines, ids = loader.load_batch_streamlines(next(iter(sampler)))
        loader.load_batch_inputs(lines, ids)
    dataset.close()
    return out


def read_study(path):
    "Eagerly, lazily, and by check_study: the same values, and nothing wrong with them that the report does not tell."
    report, values, refusal = check_study(path), {}, None
    for lazy in (False, True):
        try: values[lazy] = read_all(path, lazy)
        except DataProblem as e: refusal = refusal or e
    if len(values) == 2:
        assert values[False].keys() == values[True].keys(), "eager and lazy give other groups"
        for k, v in values[False].items(): assert np.array_equal(v, values[True][k], equal_nan=v.dtype.kind == "f"), f"eager and lazy differ in {k}"
    for found in values.values():
        if not all(all_finite(v) for v in found.values() if v.dtype.kind == "f"):
            assert not report.ok or any("NaN" in r.problem for r in report.remarks), "NaN was read, and check_study says nothing"
    if refusal is not None: raise refusal
    if not values[False]: raise DataProblem("nothing to read")


def read_tractogram(path):
    "The lines and the header: numbers that fit each other."
    try: dps = tractogram_header(path)[1]
    except DataProblem: dps = None
    t = load_tractogram(path)
    offsets = t.lines.offsets
    assert int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all()) and int(offsets[-1]) == len(t.lines.data), "offsets do not fit the points"
    assert all(len(v) == len(t) for v in t.dps.values()), "data per streamline do not fit the lines"
    for name, ids in t.groups.items(): assert ids.size == 0 or 0 <= ids.min() <= ids.max() < len(t), f"group {name} has lines that are not there"
    if dps is not None: assert set(dps) <= set(t.dps) or len(t) == 0, "the header promises other data per streamline"
    if not t.lines.data.isfinite().all(): raise DataProblem("NaN", file=path)  # as create_study says it


def outcome(read, path):
    "What came of reading a file."
    try: read(path)
    except DataProblem as e: return "refused", str(e)
    except MemoryError as e: return "memory", f"{type(e).__name__}: {e}"
    except AssertionError as e: return "wrong", str(e)
    except Exception as e:
        if path.name in str(e): return "refused", f"{type(e).__name__}: {e}"
        import traceback
        return "unclear", "".join(traceback.format_exception(e)[-4:])
    return "ok", ""


# ---- small files that claim much

def study_bomb(path, change):
    with h5py.File(path, "r+") as f: change(f)


def claim_points(f):
    g = f["sub-1/bundles"]
    del g["data"]
    g.create_dataset("data", (10**12, 3), chunks=(1000, 3), dtype=np.float64)


def claim_lines(f):
    g = f["sub-1/bundles"]
    for subject in ("sub-1", "sub-2"): del f[f"{subject}/bundles/data_per_streamline/weight"]
    for k in ("offsets", "lengths", "euclidean_lengths"):
        del g[k]
        g.create_dataset(k, (10**12,), chunks=(1000,), dtype=np.int64, compression="gzip")


def claim_volume(f):
    g = f["sub-1/fa"]
    del g["data"]
    g.create_dataset("data", (20000, 20000, 20000, 4), chunks=(100, 100, 100, 4), dtype=np.float32, compression="gzip")


def claim_chunk(f):
    g = f["sub-1/fa"]
    del g["data"]
    g.create_dataset("data", (6, 6, 6, 4), maxshape=(None, None, None, 4), chunks=(700, 700, 500, 4), dtype=np.float32, compression="gzip")


def claim_length(f): f["sub-1/bundles/lengths"][3] = 10**12


def bombs(folder):
    "(name, how to read it) of each file."
    for change in (claim_points, claim_lines, claim_volume, claim_chunk, claim_length):
        path = folder / f"{change.__name__}.hdf5"
        path.write_bytes((folder / "whole.hdf5").read_bytes())
        study_bomb(path, change)
        yield path, read_study
    for name, at, value in (("streamlines", 988, np.int32(2**31 - 1)), ("points", 1000, np.int32(2**31 - 1)), ("scalars", 36, np.int16(32000)), ("properties", 238, np.int16(32000))):
        data, path = bytearray((folder / "whole.trk").read_bytes()), folder / f"{name}.trk"
        data[at:at + value.itemsize] = value.tobytes()
        path.write_bytes(data)
        yield path, read_tractogram
    whole = (folder / "whole.tck").read_bytes()
    for name, old, new in (("offset", rb"file: \. \d+", b"file: . 999999999999"),):
        path = folder / f"{name}.tck"
        path.write_bytes(re.sub(old, new, whole))
        yield path, read_tractogram
    with zipfile.ZipFile(folder / "whole.trx") as z: members = {n: z.read(n) for n in z.namelist()}
    header = json.loads(members["header.json"])
    spoilt = {"lines": {"header.json": json.dumps({**header, "NB_STREAMLINES": 10**12}).encode()},
              "vertices": {"header.json": json.dumps({**header, "NB_VERTICES": 10**12}).encode()},
              "zip": {"positions.3.float32": bytes(400 << 20)}}
    for name, change in spoilt.items():
        path = folder / f"{name}.trx"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for n, content in {**members, **change}.items(): z.writestr(n, content)
        yield path, read_tractogram


def main_bombs(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    todo = list(bombs(folder))
    for kind in ("hdf5", "trk", "tck", "trx"): (read_study if kind == "hdf5" else read_tractogram)(folder / f"whole.{kind}")
    limit_memory(256 << 20)
    for path, read in todo: print(json.dumps([path.name, *outcome(read, path)]), flush=True)


def main(kind, folder, seeds):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wholes = [(folder / f"{name}.{kind}").read_bytes() for name in (("whole", "oldest") if kind == "hdf5" else ("whole",))]  # in turns, seed by seed
    places, read = [header_places(kind, whole) for whole in wholes], read_study if kind == "hdf5" else read_tractogram
    faulthandler.enable()
    read(folder / f"whole.{kind}")  # also imports and compiles all there is to import and compile
    limit_memory(MEMORY)
    for seed in seeds:
        with tempfile.TemporaryDirectory(dir=folder) as d:
            path = Path(d) / f"seed{seed}.{kind}"
            which = seed % len(wholes)
            path.write_bytes(damage(kind, wholes[which], places[which], seed))
            print(json.dumps([seed, "begun", ""]), flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            print(json.dumps([seed, *outcome(read, path)]), flush=True)
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    if sys.argv[1] == "make": make(Path(sys.argv[2]))
    elif sys.argv[1] == "bombs": main_bombs(Path(sys.argv[2]))
    else: main(sys.argv[2], Path(sys.argv[3]), [int(s) for s in sys.argv[4:]])
