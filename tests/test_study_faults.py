"""A study is whole at every instant: every prefix of the writes of creating, adding and repacking, a disk that is full at every write, SIGKILLs, readers beside a writer.

The writes are recorded once (every file operation below the study's folder, with its bytes) and played again into an empty folder, operation by operation, also with the last write torn in
two. After each one a power cut or a kill is imagined: the study's name holds nothing or a whole study, nobody's data are lost, and the same call made again gives what it would have given.
"""
import builtins
import errno
import gc
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study import create as create_module, grow, parts
from dwiml_nb.study.create import create_study
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.schema import attr_words, open_study
from unchecked import save_unchecked

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIG = {"fa": {"type": "volume", "files": "fa.nii.gz", "standardization": "all"}, "lines": {"type": "streamlines", "files": "*.trk", "dps_keys": "weight"}}
DEAD = 999999999  # no process has this number


def make_sources(root, n=4, size=4, nb_lines=3):
    "Subject folders a, b, … with an image and a tractogram."
    grid, rng = Grid(np.eye(4), (size,) * 3), np.random.default_rng(0)
    for s in "abcdefgh"[:n]:
        (root / s).mkdir(parents=True)
        nib.save(nib.Nifti1Image(rng.random((size, size, size, 2)).astype(np.float32), np.eye(4)), root / s / "fa.nii.gz")
        lines = Ragged.from_lengths(torch.from_numpy(rng.random((5 * nb_lines, 3)).astype(np.float32)) * (size - 1), [5] * nb_lines)
        save_tractogram(Tractogram(lines, grid, {"weight": rng.random((nb_lines, 1))}), root / s / "all.trk")
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory): return make_sources(tmp_path_factory.mktemp("sources"))


def create(sources, path, **options): return create_study(sources, path, CONFIG, ["a"], ["b"], **options)
def add(sources, path, ids=("c", "d"), **options): return add_subjects(path, sources, list(ids), **options)


def content(path):
    "All that a study holds, through its links; not when it was made."
    with open_study(path) as f:
        listed = {s: attr_words(f.attrs[f"{s}_subjs"]) for s in SUBSETS}
        found = {"": {k: str(v) for k, v in f.attrs.items() if k != "data_and_time"}, "listed": listed}
        for s in itertools.chain(*listed.values()):
            def keep(name, o, s=s): found[f"{s}/{name}"] = ({k: str(v) for k, v in o.attrs.items()}, o[()].tobytes() if isinstance(o, h5py.Dataset) else None)
            f[s].visititems(keep)
    return found


def subjects_of(found): return {k for ids in found["listed"].values() for k in ids}
def of_subject(found, s): return {k: v for k, v in found.items() if k.startswith(f"{s}/")}

# ---- recording and replaying


class Recorder:
    "Writes down what is done to files below a folder."
    def __init__(self, folder, monkeypatch):
        self.folder, self.ops, self.files = Path(folder).resolve(), [], {}
        for name in ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "fsync"): monkeypatch.setattr(os, name, self.noting(name, getattr(os, name)))
        for place in (builtins, io): monkeypatch.setattr(place, "open", self.opening(io.open))

    def inside(self, path): return os.path.abspath(path).startswith(f"{self.folder}/")
    def relative(self, path): return os.path.relpath(os.path.abspath(path), self.folder).replace(f".{os.getpid()}-", f".{DEAD}-")

    def noting(self, name, function):
        def noted(*args, dir_fd=None, **options):
            result = function(*args, **({} if dir_fd is None else {"dir_fd": dir_fd}), **options)
            if name == "fsync": paths = [os.readlink(f"/proc/self/fd/{args[0]}")]
            else: paths = [Path(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(p)) if dir_fd is not None else p for p in args if isinstance(p, (str, os.PathLike))]
            if self.inside(paths[0]) or str(paths[0]) == str(self.folder): self.ops.append(({"remove": "unlink", "replace": "rename"}.get(name, name), *map(self.relative, paths)))
            return result
        return noted

    def opening(self, function):
        def opened(path, mode="r", *args, **options):
            file = function(path, mode, *args, **options)
            if not isinstance(path, (str, os.PathLike)) or not self.inside(path) or not set(mode) & set("wax+"): return file
            self.ops.append(("create", self.relative(path)))
            return Noted(file, self.relative(path), self.ops)
        return opened


class Noted:
    "A file whose writes are written down."
    def __init__(self, file, name, ops): self.file, self.name, self.ops = file, name, ops
    def write(self, data):
        at = 0 if isinstance(data, str) else self.file.tell()
        self.ops.append(("write", self.name, at, data.encode() if isinstance(data, str) else bytes(data)))
        return self.file.write(data)
    def truncate(self, size=None):
        self.ops.append(("truncate", self.name, self.file.tell() if size is None else size))
        return self.file.truncate(size)
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)


def play(op, folder):
    "Do one recorded operation again."
    kind, paths = op[0], [folder / p for p in op[1:] if isinstance(p, str)]
    if kind == "create": paths[0].write_bytes(b"")
    elif kind == "write":
        with open(paths[0], "r+b") as f: f.seek(op[2]); f.write(op[3])
    elif kind == "truncate": os.truncate(paths[0], op[2])
    elif kind != "fsync": getattr(os, kind)(*paths)


def tree(folder):
    "What lies in a folder, byte by byte."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def recorded(do, folder, monkeypatch):
    "The operations of a call; playing them all gives the same folder, so that none was missed."
    before = folder.with_name(f"{folder.name}_before")
    shutil.copytree(folder, before)
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        do()
    again = folder.with_name(f"{folder.name}_again")
    shutil.copytree(before, again)
    for op in recorder.ops: play(op, again)
    assert tree(again) == tree(folder)
    return recorder.ops, before


def check_flushes(ops):
    "Before a file takes its name, its bytes are on the disk; before the study takes its name, so are the names that it links to."
    dirty, unnamed = set(), set()
    for kind, *args in ops:
        if kind in ("create", "write", "truncate"): dirty.add(args[0])
        elif kind == "fsync": dirty.discard(args[0]); unnamed -= {n for n in unnamed if str(Path(n).parent) == args[0]}
        elif kind in ("rename", "link"):
            assert args[0] not in dirty, f"{args[0]} takes the name {args[1]} before it is flushed"
            if args[1] == "study.hdf5": assert not {n for n in unnamed if ".subjects/" in n}, unnamed
            unnamed.add(args[1])
    assert "study.hdf5" not in unnamed


def instants(ops, before, tmp_path):
    "(number, folder) after every prefix of the operations; a write also torn in two."
    state = tmp_path / "state"
    shutil.copytree(before, state)
    yield 0, state
    for k, op in enumerate(ops, 1):
        if op[0] == "write" and len(op[3]) > 1:
            play((*op[:3], op[3][:len(op[3]) // 2]), state)
            yield k - .5, state
        if op[0] != "fsync":
            play(op, state)
            yield k, state


def linked_copy(folder, to):
    "The same folder under hard links: what is written to in place shows in both."
    for p in [folder, *sorted(folder.rglob("*"))]: (to / p.relative_to(folder)).mkdir() if p.is_dir() else os.link(p, to / p.relative_to(folder))


def visible(folder):
    "What lies there under names of its own, and in which state."
    return {(str(p), p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if ".partial." not in p.name}


def replayed(ops, before, tmp_path, check, again):
    """After every prefix `check(study)` holds, and `again(study)`, in a copy, succeeds.

    Writes to a file under a temporary name all leave the same to go on from, so the call is made again after every tenth of them only; with DWIML_SLOW=1 after each.
    """
    trial, n, seen = tmp_path / "trial", 0, None
    for k, state in instants(ops, before, tmp_path):
        if (now := visible(state)) != seen: check(state / "study.hdf5", k)
        seen = now
        if k == int(k) and (os.environ.get("DWIML_SLOW") or k == 0 or ops[int(k) - 1][0] != "write" or k % 10 == 0):
            linked_copy(state, trial)
            again(trial / "study.hdf5", k)
            shutil.rmtree(trial)
            n += 1
    check(state / "study.hdf5", k)
    return n


def test_every_prefix_of_creating(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"; out.mkdir()
    ops, before = recorded(lambda: create(sources, out / "study.hdf5"), out, monkeypatch)
    expected, taken = content(out / "study.hdf5"), []
    check_flushes(ops)

    def check(study, k): assert not study.exists() or content(study) == expected, k
    def again(study, k):
        there = study.exists()
        summary = create(sources, study, overwrite=there)
        taken.append(sum(r.taken for r in summary.reports))
        assert content(study) == expected and sorted(p.name for p in study.parent.iterdir()) == ["study.hdf5", "study.json"], k
    assert replayed(ops, before, tmp_path, check, again) > 20
    assert set(taken) == {0, 1, 2} and taken.index(1) < taken.index(2)                           # finished subjects are not made again


def test_every_prefix_of_replacing(sources, tmp_path, monkeypatch):
    "A study of links is replaced: the old one stays until the new one is there."
    out = tmp_path / "out"; out.mkdir()
    create(sources, out / "study.hdf5"); add(sources, out / "study.hdf5", "c")
    old = content(out / "study.hdf5")
    ops, before = recorded(lambda: create(sources, out / "study.hdf5", nb_points=3, overwrite=True), out, monkeypatch)
    new = content(out / "study.hdf5")
    check_flushes(ops)
    def check(study, k): assert content(study) in (old, new), k
    def again(study, k):
        create(sources, study, nb_points=3, overwrite=True)
        assert content(study) == new, k
    replayed(ops, before, tmp_path, check, again)


@pytest.mark.parametrize("linked", [False, True], ids=["first time", "again"])
def test_every_prefix_of_adding(sources, tmp_path, monkeypatch, linked):
    out = tmp_path / "out"; out.mkdir()
    create(sources, out / "study.hdf5")
    if linked: add(sources, out / "study.hdf5", "c")
    ids = "d" if linked else "cd"
    old = content(out / "study.hdf5")
    ops, before = recorded(lambda: add(sources, out / "study.hdf5", ids), out, monkeypatch)
    new, seen = content(out / "study.hdf5"), []
    check_flushes(ops)
    assert subjects_of(new) == set("abcd") and all(of_subject(new, s) == of_subject(old, s) for s in subjects_of(old))
    assert not any(op[0] in ("write", "truncate") and not re.search(r"\.partial\.", op[1]) for op in ops)        # nothing that exists is written to

    def check(study, k):
        found = content(study)
        assert found in (old, new), k
        seen.append(found == new)
    def again(study, k):
        if subjects_of(content(study)) != subjects_of(new): add(sources, study, ids)
        assert content(study) == new, k
        left = {p.name for p in study.parent.rglob("*.hdf5")}
        assert not any(".partial" in name for name in left if ".parts" not in name), left
        dataset = MultiSubjectDataset(study, lazy=True).load_data()
        assert set(dataset.training.subjects) == {"a", "c", "d"}
        dataset.close()
    assert replayed(ops, before, tmp_path, check, again) > 10
    assert seen == sorted(seen) and seen[-1] and not seen[0]


def test_every_prefix_of_repacking(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"; out.mkdir()
    create(sources, out / "study.hdf5"); add(sources, out / "study.hdf5")
    old = content(out / "study.hdf5")
    ops, before = recorded(lambda: repack_study(out / "study.hdf5"), out, monkeypatch)
    check_flushes(ops)
    assert content(out / "study.hdf5") == old and sorted(p.name for p in out.iterdir()) == ["study.hdf5", "study.json"]
    def check(study, k): assert content(study) == old, k
    def again(study, k):
        repack_study(study)
        assert content(study) == old, k
    replayed(ops, before, tmp_path, check, again)

# ---- a disk that is full


class FullDisk:
    "A disk on which the k-th write through `SteadyFile`, and every later one, finds no room."
    def __init__(self, monkeypatch): self.left, self.write = None, parts.SteadyFile.attempt; monkeypatch.setattr(parts.SteadyFile, "attempt", lambda *args: self.attempt(*args))
    def attempt(self, steady, f, *args):
        if f.__name__ != "write" or self.left is None: return self.write(steady, f, *args)
        self.left -= 1
        if self.left < 0 and steady.error is None: steady.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(steady, f, *args)


@pytest.mark.parametrize("act", ["create", "add", "repack"])
def test_full_at_every_write(sources, tmp_path, monkeypatch, act):
    study, disk = tmp_path / "study.hdf5", FullDisk(monkeypatch)
    acts = {"create": lambda: create(sources, study), "add": lambda: add(sources, study), "repack": lambda: repack_study(study)}
    if act != "create": create(sources, study)
    if act == "repack": add(sources, study)
    old, finished, refused = content(study) if study.exists() else None, 0, 0
    for disk.left in itertools.count(0, 1 if os.environ.get("DWIML_SLOW") else 5):
        room = disk.left
        try: acts[act]()
        except DataProblem as e:
            refused += 1
            assert "the disk is full" in str(e) and "To do" in str(e)
            assert (content(study) if study.exists() else None) == old, room
            hidden = [*tmp_path.glob(".study.parts/*.hdf5"), *(p for p in tmp_path.glob("study.subjects/[cd].hdf5") if act == "add")]
            finished = max(finished, len(hidden))
            assert (f"{len(hidden)} finished subjects" if hidden else "nothing was left behind") in str(e), e
            assert not [p for p in tmp_path.rglob("*") if ".partial" in p.name], room
            for folder in (".study.parts", "study.subjects")[:1 if act == "repack" else 2]: shutil.rmtree(tmp_path / folder, ignore_errors=True)
        else: break
    assert refused > 8 and finished == (0 if act == "repack" else 2)
    disk.left = None
    assert len(subjects_of(content(study))) == (2 if act == "create" else 4)


def small_disk(where, size_kb):
    "Mount a small file system at a folder, if that is allowed here."
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(where)], capture_output=True) if os.geteuid() == 0 and shutil.which("mount") else None
    return done is not None and done.returncode == 0


@pytest.mark.parametrize("act,room_kb", [("add", 220), ("repack", 300)])
def test_a_small_disk(tmp_path, monkeypatch, act, room_kb):
    "The same with a disk that is small indeed: a part is 70 kB, a study of two 140 kB."
    for place in ("create", "grow"): monkeypatch.setattr(f"dwiml_nb.study.{place}.check_room", lambda *args: None)
    sources, out = make_sources(tmp_path / "in", size=20), tmp_path / "out"
    out.mkdir()
    if not small_disk(out, room_kb + 140): pytest.skip("a small file system can be mounted by root only")
    try:
        study = out / "study.hdf5"
        create(sources, study)
        if act == "repack": add(sources, study, "c")
        old = content(study)
        (out / "filler").write_bytes(bytes(shutil.disk_usage(out).free - 4096 * 10))
        with pytest.raises(DataProblem, match="the disk is full"): add(sources, study, "d") if act == "add" else repack_study(study)
        assert content(study) == old
        (out / "filler").unlink()
        add(sources, study, "d")
        assert subjects_of(content(study)) == set("abd" if act == "add" else "abcd")
    finally:
        gc.collect()                                                                              # an exception holds the frames, and they the files
        subprocess.run(["umount", str(out)], check=True)


# ---- processes that are killed, and processes that read

server = multiprocessing.get_context("forkserver")


def quietly(do, *args, started=None):
    "In another process."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if started: started.set()
    do(*args)


def create_here(sources, path): create(sources, path)
def add_here(sources, path): add(sources, path)


def uninterrupted(do, *args):
    "Seconds that a call takes in another process, once that has begun."
    started = server.Event()
    process = server.Process(target=quietly, args=(do, *args), kwargs=dict(started=started))
    process.start()
    started.wait()
    start = time.time()
    process.join()
    assert process.exitcode == 0
    return time.time() - start


def killed(do, sources, path, after):
    "Run in another process, kill it after some seconds; whether it was still running."
    started = server.Event()
    process = server.Process(target=quietly, args=(do, sources, path), kwargs=dict(started=started))
    process.start()
    started.wait()
    time.sleep(after)
    running = process.is_alive()
    process.kill()                                                                                # SIGKILL
    process.join()
    return running


def test_random_kills(tmp_path):
    "10 kills at random instants of creating and of adding: nothing or a whole study, the old one or the new one; then the same call succeeds."
    sources, rng, alive = make_sources(tmp_path / "in", size=24, nb_lines=2000), random.Random(1234), 0
    seconds = uninterrupted(create_here, sources, tmp_path / "study.hdf5")
    made = content(tmp_path / "study.hdf5")
    shutil.copytree(tmp_path, tmp_path / "grown", ignore=shutil.ignore_patterns("in"))
    more_seconds = uninterrupted(add_here, sources, tmp_path / "grown" / "study.hdf5")
    grown = content(tmp_path / "grown" / "study.hdf5")
    for i in range(10):
        out = tmp_path / f"out{i}"; out.mkdir()
        study, after = out / "study.hdf5", rng.uniform(0, 1.1 * (seconds, more_seconds)[i % 2])
        if i % 2 == 0:
            alive += killed(create_here, sources, study, after)
            assert not study.exists() or content(study) == made
            if not study.exists(): create(sources, study)
            assert content(study) == made
        else:
            shutil.copy(tmp_path / "study.hdf5", study)
            alive += killed(add_here, sources, study, after)
            found = content(study)
            assert found in (made, grown)
            if found == made: add(sources, study)
            assert content(study) == grown
        assert not [p for p in out.rglob("*") if ".partial" in p.name and str(os.getpid()) not in p.name and "json" not in p.name]
        shutil.rmtree(out)
    print(f"{alive} of 10 were still at work when they were killed")
    assert alive


@pytest.mark.slow
def test_no_process_outlives_its_parent(tmp_path):
    "A creation with two processes is killed: its processes end too, and what they finished is taken."
    code = f"""
import multiprocessing, os
from dwiml_nb.study import create, parts
if __name__ == '__main__': create.create_study({str(make_sources(tmp_path / 'in', size=48, nb_lines=8000))!r}, {str(tmp_path / 'study.hdf5')!r}, {CONFIG!r}, list('abcd'), n_procs=2)
"""
    (tmp_path / "script.py").write_text(code)
    run = subprocess.Popen([sys.executable, "-W", "ignore", str(tmp_path / "script.py")], start_new_session=True)
    while run.poll() is None and not list(tmp_path.glob(".study.parts/[!.]*.hdf5")): time.sleep(.01)
    assert run.poll() is None
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL); run.wait()
    assert len(children) >= 2
    deadline = time.time() + 20
    while any(Path(f"/proc/{c}").exists() for c in children) and time.time() < deadline: time.sleep(.1)
    assert not [c for c in children if Path(f"/proc/{c}").exists()]
    summary = create_study(tmp_path / "in", tmp_path / "study.hdf5", CONFIG, list("abcd"))
    assert any(r.taken for r in summary.reports)


def read_on(path, grow, done, keep):
    "Read a study again and again; what each look found. With `keep`, one dataset stays open all the time."
    looks, kept = [], MultiSubjectDataset(path, lazy=True).load_data() if keep else None
    first = kept and kept.training.get_lines(0, "lines").data.clone()
    while True:
        last = done.is_set()
        dataset = kept or MultiSubjectDataset(path, lazy=True).load_data()
        subjects = list(dataset.training.subjects)
        for i in range(len(subjects)):
            lines, volume = dataset.training.get_lines(i, "lines"), dataset.training.get_volume(i, "fa")
            assert len(lines) == 50 and bool(torch.isfinite(volume).all()) and volume.std() > .1, (subjects, len(lines))
        if keep: assert torch.equal(kept.training.get_lines(0, "lines").data, first)
        else: dataset.close()
        looks.append(len(subjects))
        if len(looks) == 1: grow.release()
        if last: return looks


def reader(path, grow, done, answers, keep):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try: answers.put((keep, read_on(path, grow, done, keep)))
    except BaseException as e: grow.release(); answers.put((keep, f"{type(e).__name__}: {e}"))


def test_two_read_while_one_adds(tmp_path):
    sources, study = make_sources(tmp_path / "in", n=8, size=16, nb_lines=50), tmp_path / "study.hdf5"
    create(sources, study)
    grow, done, answers = server.Semaphore(0), server.Event(), server.Queue()
    readers = [server.Process(target=reader, args=(study, grow, done, answers, keep)) for keep in (False, True)]
    for r in readers: r.start()
    for r in readers: assert grow.acquire(timeout=60)
    for s in "cdefgh":
        add(sources, study, s)
        time.sleep(.1)
    done.set()
    told = dict(answers.get(timeout=60) for r in readers)
    for r in readers: r.join()
    assert not any(isinstance(looks, str) for looks in told.values()), told
    assert told[False] == sorted(told[False]) and told[False][0] == 1 and told[False][-1] == 7 and set(told[True]) == {1}
    print(f"{len(told[False])} and {len(told[True])} looks; subjects seen {sorted(set(told[False]))}")


# ---- one at a time, and dead leftovers

def test_one_writer_at_a_time(sources, tmp_path):
    study = tmp_path / "study.hdf5"
    create(sources, study)
    with parts.parts_folder(study):
        for act in (lambda: create(sources, study, overwrite=True), lambda: add(sources, study), lambda: repack_study(study)):
            with pytest.raises(DataProblem, match="another process is making this study"): act()
    add(sources, study)


def test_parts_of_other_sources_are_never_taken(tmp_path):
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    good = (sources / "b" / "all.trk").read_bytes()
    def attempt(**options):
        save_unchecked([np.full((3, 3), np.nan)], Grid(np.eye(4), (4, 4, 4)), sources / "b" / "all.trk", {"weight": np.ones((1, 1))})
        with pytest.raises(DataProblem, match="NaN"): create(sources, study, **options)
        (sources / "b" / "all.trk").write_bytes(good)
        return [p.name for p in (tmp_path / ".study.parts").glob("*.hdf5")]
    assert attempt() == ["a.hdf5"]
    touched = [lambda: os.utime(sources / "a" / "fa.nii.gz"), lambda: (sources / "a" / "all.trk").write_bytes(good)]
    for touch, options in ((touched[0], {}), (touched[1], {}), (lambda: None, dict(nb_points=3)), (lambda: None, dict(volume_dtype="float16"))):
        attempt(overwrite=study.exists()); touch()
        assert [r.taken for r in create(sources, study, overwrite=True, **options).reports] == [False, False]
    attempt(overwrite=True)
    assert [r.taken for r in create(sources, study, overwrite=True).reports] == [True, False]
    assert json.loads((tmp_path / "study.json").read_text()) == CONFIG


@pytest.mark.parametrize("when", ["planned", "read"])
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 4, 4, 2), None])
def test_files_that_change_under_a_creation_stop_it(tmp_path, monkeypatch, when, shape):
    "Between the check of all subjects and the values of one, another image takes the place of the first, or none."
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    def change():
        path = sources / "b" / "fa.nii.gz"
        path.unlink()
        if shape: nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), path)
    act, module, name = {"planned": (create_module.write_study, create_module, "write_study"), "read": (parts.add_subject, parts, "add_subject")}[when]
    def changed(*args, **options):
        if when == "planned": change()
        made = act(*args, **options)
        if when == "read" and args[1].subject == "b": change()
        return made
    monkeypatch.setattr(module, name, changed)
    if when == "planned" and shape == (4, 4, 4, 2): return create(sources, study)                # it has not begun
    with pytest.raises(DataProblem, match="b.*(changed while the study was made|is gone)"): create(sources, study)
    assert not study.exists()


def test_leftovers_of_the_dead_are_tidied(sources, tmp_path):
    for name in (f".study.{DEAD}.partial.hdf5", f".study.{DEAD}.partial.json", f".other.{DEAD}.partial.hdf5", ".study.1.partial.hdf5"): (tmp_path / name).touch()
    (tmp_path / ".study.parts").mkdir(); (tmp_path / ".study.parts" / f".a.{DEAD}.partial.hdf5").touch()
    create(sources, tmp_path / "study.hdf5")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".other.{DEAD}.partial.hdf5", ".study.1.partial.hdf5", "study.hdf5", "study.json"]


# ---- other subjects' files

@pytest.mark.parametrize("what", ["a source is touched", "a part cannot be read"])
def test_an_addition_cut_short_goes_on(tmp_path, monkeypatch, what):
    "It has moved its part beside the others; whatever is found out about that part later, the others stay."
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    create(sources, study); add(sources, study, "c")
    def cut_short(*args, **options): raise OSError("cut short")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut short"):
        patch.setattr(grow, "linked_root", cut_short)
        add(sources, study, "d")
    assert {p.name for p in (tmp_path / "study.subjects").iterdir()} == {"study.hdf5", "c.hdf5", "d.hdf5"}
    old, made = content(study), grow.finished_parts
    def touched(*args, **options):
        os.utime(sources / "d" / "fa.nii.gz")
        return made(*args, **options)
    if what == "a source is touched": monkeypatch.setattr(grow, "finished_parts", touched)
    else: monkeypatch.setattr(parts, "finished_part", lambda *args: None)
    add(sources, study, "d")
    new = content(study)
    assert subjects_of(new) == set("abcd") and all(of_subject(new, s) == of_subject(old, s) for s in "abc")
    assert {p.name for p in (tmp_path / "study.subjects").iterdir()} == {"study.hdf5", "c.hdf5", "d.hdf5", "d-1.hdf5"}


@pytest.mark.parametrize("act", ["repack", "replace"])
@pytest.mark.parametrize("other", ["old.hdf5", "study.hdf5.bak"])
def test_studies_that_share_a_folder(sources, tmp_path, act, other):
    "A root was renamed and its name given to another study, or was copied: what it links to is kept."
    study, other = tmp_path / "study.hdf5", tmp_path / other
    create(sources, study); add(sources, study, "c")
    old = content(study)
    if other.suffix == ".bak": shutil.copy(study, other)
    else: study.rename(other); (tmp_path / "study.json").unlink(); create(sources, study)
    add(sources, study, "d")
    with pytest.warns(UserWarning, match=f"study.subjects stays, because {other.name} may need it"):
        repack_study(study) if act == "repack" else create(sources, study, nb_points=3, overwrite=True)
    assert content(other) == old and not (tmp_path / "study.subjects" / "d.hdf5").exists()
    if act == "replace": add(sources, study, "d")
    assert content(other) == old
    other.unlink()
    repack_study(study)
    assert subjects_of(content(study)) == set("abd") | ({"c"} if act == "repack" and other.suffix == ".bak" else set())


def test_files_that_cannot_be_read_are_kept(sources, tmp_path):
    "A file beside the study that is damaged may be a root that links to the same files."
    study, other = tmp_path / "study.hdf5", tmp_path / "other.hdf5"
    create(sources, study); add(sources, study, "c")
    other.write_bytes(study.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="study.subjects stays, because other.hdf5 may need it"): repack_study(study)
    assert {p.name for p in (tmp_path / "study.subjects").iterdir()} == {"study.hdf5", "c.hdf5"}


# ---- what growing refuses

def test_what_does_not_fit_is_refused(tmp_path):
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    create(sources, study, step_size=.5)
    before = study.read_bytes()
    def refused(*words, change=lambda: None, undo=lambda: None, ids=("c",), **options):
        change()
        with pytest.raises(DataProblem) as caught: add_subjects(study, sources, list(ids), **options)
        undo()
        for word in words: assert word in str(caught.value), caught.value
        assert study.read_bytes() == before and not (tmp_path / "study.subjects").exists()
    refused("holds a subject of that name already", "subject a", "subject b", ids=("a", "b", "c"))
    refused("no folder for a listed subject", ids=("nobody",))
    refused("the three lists hold no subject at all", ids=())
    refused("does not make the groups of the study", config={"fa": CONFIG["fa"]})
    refused("standardization is not that of the study", config={**CONFIG, "fa": {**CONFIG["fa"], "standardization": "none"}})
    refused("dps_keys is not that of the study", config={**CONFIG, "lines": {"type": "streamlines", "files": "*.trk"}})
    image = sources / "c" / "fa.nii.gz"
    good = image.read_bytes()
    def save(data, affine): return lambda: nib.save(nib.Nifti1Image(data.astype(np.float32), affine), image)
    refused("the number of features differs", "2 in the study; 3 in c", change=save(np.random.rand(4, 4, 4, 3), np.eye(4)), undo=lambda: image.write_bytes(good))
    lines = sources / "c" / "all.trk"
    def mirrored():
        grid = Grid(np.diag([-1., 1, 1, 1]), (4, 4, 4))
        save(np.random.rand(4, 4, 4, 2), grid.affine)()
        save_tractogram(Tractogram(Ragged.from_list([-torch.rand(4, 3)]), grid, {"weight": np.ones((1, 1))}), lines)
    refused("voxel orders differ", "LAS in c", change=mirrored)
    add_subjects(study, sources, ["d"])
    with h5py.File(study) as f: assert f.attrs["step_size"] == .5 and f["d/lines"].file.filename.endswith("study.subjects/d.hdf5")


def test_tracts_by_name_and_subjects_without_lines_are_added(tmp_path):
    "The numbers of the tracts are columns that no file holds; a subject without tractograms has none to compare."
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    for s in "abcd":
        for tract in ("AF", "CST"): shutil.copy(sources / s / "all.trk", sources / s / f"{s}_tract-{tract}_tractogram.trk")
        (sources / s / "all.trk").unlink()
    config = {**CONFIG, "lines": {**CONFIG["lines"], "file_labels": {"tract": ["AF", "CST"]}}}
    create_study(sources, study, config, ["a"])
    add(sources, study, "b")
    swapped = {**config, "lines": {**config["lines"], "file_labels": {"tract": ["CST", "AF"]}}}
    with pytest.raises(DataProblem, match="file_labels is not that of the study"): add(sources, study, "c", config=swapped)
    for p in (sources / "c").glob("*.trk"): p.unlink()
    add(sources, study, "c", skip_missing=True)
    with h5py.File(study) as f:
        assert [f[f"{s}/lines/data_per_streamline/tract"][()].ravel().tolist() for s in "abc"] == [[0] * 3 + [1] * 3] * 2 + [[]]
    shutil.move(study, tmp_path / "other.hdf5"); (tmp_path / "study.json").unlink()
    create_study(sources, study, config, ["c"], skip_missing=True)                               # without lines itself, it asks for no widths
    add(sources, study, "d")


def test_lines_that_leave_the_volume_are_treated_alike(tmp_path):
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    for s in "ab":
        lines = Ragged.from_list([torch.full((3, 3), 1.) + torch.arange(3)[:, None] * far for far in (.5, 50.)])
        save_tractogram(Tractogram(lines, Grid(np.eye(4), (4, 4, 4)), {"weight": np.ones((2, 1))}), sources / s / "all.trk")
    create_study(sources, study, CONFIG, ["a"], remove_invalid=True)
    with pytest.raises(DataProblem, match="remove_invalid is not that of the study"): add(sources, study, "b", remove_invalid=False)
    with pytest.raises(DataProblem, match="streamlines leave the volume"): add(sources, study, "b", remove_invalid="refuse")
    add(sources, study, "b")
    with h5py.File(study) as f: assert [len(f[f"{s}/lines/lengths"]) for s in "ab"] == [1, 1]


def test_a_study_by_dwi_ml_grows(tmp_path):
    "Its config is a printed dict; its file is not touched."
    reference = Path(__file__).parent / "data" / "dwi_ml_study"
    study = tmp_path / "study.hdf5"
    shutil.copy(reference / "study_v1.hdf5", study)
    shutil.copytree(reference / "sources" / "subj-02", tmp_path / "more" / "subj-09")
    before = study.read_bytes()
    add_subjects(study, tmp_path / "more", testing=["subj-09"])
    assert (tmp_path / "study.subjects" / "study.hdf5").read_bytes() == before
    with h5py.File(study) as f, h5py.File(reference / "study_v1.hdf5") as g:
        assert set(f.attrs) == set(g.attrs) | set(INDEX_KEYS) and attr_words(f.attrs["testing_subjs"]) == ["subj-04", "subj-09"]
        for name in ("input/data", "streamlines/data"): np.testing.assert_allclose(f[f"subj-09/{name}"][()], g[f"subj-02/{name}"][()], atol=1e-5)
        for key in g.attrs: assert f.attrs.get_id(key).dtype == g.attrs.get_id(key).dtype, key
    dataset = MultiSubjectDataset(study, lazy=True).load_data()
    assert list(dataset.testing.subjects) == ["subj-04", "subj-09"]
    dataset.close()
    repack_study(study)
    assert not (tmp_path / "study.subjects").exists() and content(study)["listed"]["testing"] == ["subj-04", "subj-09"]


def test_ids_like_other_files(tmp_path):
    "A subject called as the study is, or as another's second file, replaces nothing."
    sources, study = make_sources(tmp_path / "in"), tmp_path / "study.hdf5"
    create(sources, study)
    for old, new in (("c", "study"), ("d", "study-1")): (sources / old).rename(sources / new)
    old = content(study)
    add(sources, study, ["study"]); add(sources, study, ["study-1"])
    new = content(study)
    assert subjects_of(new) == {"a", "b", "study", "study-1"} and all(of_subject(new, s) == of_subject(old, s) for s in "ab")
    assert len(list((tmp_path / "study.subjects").iterdir())) == 3


def test_float16(tmp_path):
    sources, study = make_sources(tmp_path / "in", size=12), tmp_path / "study.hdf5"
    create(sources, tmp_path / "full.hdf5")
    summary = create(sources, study, volume_dtype="float16")
    assert "float16 moved values by at most" in summary.headline() and set(summary.reports[0].rounding) == {"fa"}
    summary = add(sources, study, "c")
    assert set(summary.reports[0].rounding) == {"fa"}
    for lazy in (True, False):
        half, full = (MultiSubjectDataset(p, lazy=lazy).load_data() for p in (study, tmp_path / "full.hdf5"))
        a, b = (d.training.get_volume(0, "fa") for d in (half, full))
        assert a.dtype == torch.float32 and 0 < float((a - b).abs().max()) <= max(r.rounding["fa"][0] for r in create(sources, study, volume_dtype="float16", overwrite=True).reports)
        half.close(); full.close()
        if lazy: add(sources, study, "c")
    with h5py.File(study) as f: assert f["a/fa/data"].dtype == np.float16
    config = {**CONFIG, "fa": {**CONFIG["fa"], "standardization": "none"}}
    nib.save(nib.Nifti1Image(np.full((12, 12, 12, 2), 1e5, np.float32), np.eye(4)), sources / "a" / "fa.nii.gz")
    with pytest.raises(DataProblem, match="too large for float16.*65504.*100000"): create_study(sources, tmp_path / "x.hdf5", config, ["a"], volume_dtype="float16")
