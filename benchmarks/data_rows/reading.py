"""Reading: random lines of a study that stays on disk, the ways of reading it, and opening a large one."""
import mmap
import os
import shutil
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch

from dwiml_nb.core.ragged import Ragged
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.stored import gather_lines
from dwiml_nb.study.lists import SUBSETS
from side_by_side import Row, interleaved, peak_memory


# ---- studies as create_study writes them, of random numbers

def root_attributes(f, subjects):
    for s in SUBSETS: f.attrs[f'{s}_subjs'] = list(subjects) if s == 'training' else []

def lines_group(subject, points, lengths, dimensions, **how):
    "A streamlines group; `how` is for its points."
    g = subject.create_group('bundles')
    g.create_dataset('data', data=points, **how)
    for k,v in dict(offsets=np.cumsum(lengths) - lengths, lengths=lengths, euclidean_lengths=lengths.astype(float)).items(): g.create_dataset(k, data=v)
    g.create_group('data_per_streamline')
    g.attrs.update({'type': 'streamlines', 'space': 'Space.VOX', 'origin': 'Origin.TRACKVIS', 'affine': np.diag([2., 2, 2, 1]),
                    'dimensions': np.array(dimensions, np.int16), 'voxel_sizes': np.full(3, 2, np.float32), 'voxel_order': 'RAS'})

def volume_group(subject, values):
    g = subject.create_group('input')
    g.create_dataset('data', data=values)
    g.attrs.update({'type': 'volume', 'affine': np.diag([2., 2, 2, 1]), 'voxres': np.full(3, 2, np.float32), 'nb_features': values.shape[-1]})

def random_lines(n, dimensions, rng):
    "Walks of 20 to 120 points that stay inside."
    lengths = rng.integers(20, 121, n)
    start = rng.uniform(.35, .65, (n, 3))*dimensions
    step = np.repeat(rng.normal(size=(n, 3))*.1, lengths, 0) + rng.normal(size=(lengths.sum(), 3))*.05
    walk = np.cumsum(step, 0)
    first = np.cumsum(lengths) - lengths
    return np.clip(walk - np.repeat(walk[first] - start, lengths, 0), .01, np.array(dimensions) - .01), lengths

def write_study(path, n, dimensions, features, seed=0, **how):
    rng = np.random.default_rng(seed)
    points,lengths = random_lines(n, dimensions, rng)
    with h5py.File(path, 'w', libver=('v108', 'latest')) as f:
        root_attributes(f, ['sub-01'])
        lines_group(f.create_group('sub-01'), points, lengths, dimensions, **how)
        volume_group(f['sub-01'], rng.random((*dimensions, features), np.float32))
    return path, points, lengths

def headers_of(f, subject, n, points, dimensions, features):
    "A subject whose values have their place in the file and were never written."
    def unwritten(g, name, shape, dtype):
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_layout(h5py.h5d.CONTIGUOUS); how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY); how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(g.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), how)
    s = f.create_group(subject)
    lines_group(s, np.zeros((0, 3)), np.zeros(0, np.int64), dimensions); volume_group(s, np.zeros((1, 1, 1, 1), np.float32))
    for k,shape,dtype in (('data', (points, 3), 'f8'), ('offsets', (n,), 'i8'), ('lengths', (n,), 'i8'), ('euclidean_lengths', (n,), 'f8')):
        del s['bundles'][k]; unwritten(s['bundles'], k, shape, dtype)
    del s['input/data']; unwritten(s['input'], 'data', (*dimensions, features), 'f4')
    s['input'].attrs['nb_features'] = features

def write_large(folder, n_subjects, external):
    "A sparse study of many subjects: one file, or a file each behind a root of links."
    subjects = [f'sub-{i:03}' for i in range(n_subjects)]
    size = dict(n=100_000, points=4_000_000, dimensions=(96, 96, 60), features=45)
    with h5py.File(folder/'large.hdf5', 'w', libver=('v108', 'latest')) as root:
        root_attributes(root, subjects)
        for s in subjects:
            if not external: headers_of(root, s, **size); continue
            with h5py.File(folder/f'{s}.hdf5', 'w', libver=('v108', 'latest')) as f: headers_of(f, s, **size)
            root[s] = h5py.ExternalLink(f'{s}.hdf5', f'/{s}')
    return folder/'large.hdf5'

@contextmanager
def temporary_folder():
    folder = Path(tempfile.mkdtemp(prefix='dwiml_bench_'))
    try: yield folder
    finally: shutil.rmtree(folder)


# ---- random lines

def one_by_one(f, ids):
    "Textbook: offset, length and points of each line looked up in the file, one after the other."
    return [f['sub-01/bundles/data'][(o := f['sub-01/bundles/offsets'][i]):o + f['sub-01/bundles/lengths'][i]].astype(np.float32) for i in ids]

def one_by_one_held(f, ids):
    "The same with the three datasets held open."
    data,offsets,lengths = (f[f'sub-01/bundles/{k}'] for k in ('data', 'offsets', 'lengths'))
    return [data[offsets[i]:offsets[i] + lengths[i]].astype(np.float32) for i in ids]

def slice_per_line(f, ids, offsets, lengths):
    "h5py, with all offsets and lengths in memory."
    data = f['sub-01/bundles/data']
    return [data[offsets[i]:offsets[i] + lengths[i]].astype(np.float32) for i in ids]

def nibabel_lazy(path, ids):
    "nibabel: a lazy .tck is walked through from its start."
    wanted,found = set(ids.tolist()), {}
    for i,s in enumerate(nib.streamlines.load(path, lazy_load=True).streamlines):
        if i in wanted: found[i] = s
    return [found[i] for i in ids]

def other_work(array=np.zeros(2**24, np.float32)):
    "What a training does between two batches: the processor's caches hold something else."
    array += 1

def forget(dataset, path):
    "Empty the page cache of a file, and the map of the dataset: the next read comes from the disk."
    for file in dataset.file.held.files.values(): file.bytes.base.obj.madvise(mmap.MADV_DONTNEED)
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally: os.close(fd)

def ask_then_read(descriptor, places):
    "The disk alone: every place asked for at once, in the order of the disk, then each read; nothing is done with the bytes."
    for at,n in places: os.posix_fadvise(descriptor, at, n, os.POSIX_FADV_WILLNEED)
    for at,n in places: os.pread(descriptor, n, at)

def random_line_rows(n_threads, quick):
    n,k = (5000, 200) if quick else (50_000, 1000)
    with temporary_folder() as folder:
        path,points,lengths = write_study(folder/'study.hdf5', n, (20, 20, 20), 1)
        first = np.cumsum(lengths) - lengths
        nib.streamlines.save(nib.streamlines.Tractogram([p for p in np.split(points.astype(np.float32), first[1:])], affine_to_rasmm=np.eye(4)), str(folder/'lines.tck'))
        ids = np.random.default_rng(1).choice(n, k, replace=False)
        dataset = MultiSubjectDataset(path, lazy=True).load_data()
        calls = MultiSubjectDataset(path, lazy=True, read_mode='pread').load_data()
        offsets = np.concatenate([[0], np.cumsum(lengths[ids])]); out = np.empty((offsets[-1], 3), np.float32)
        mapped = dataset.training.streamlines_of(0, 'bundles').rows.mapped()
        with h5py.File(path) as f:
            ways = {'ours': lambda: dataset.training.get_lines(0, 'bundles', ids),
                    'textbook, one by one': lambda: one_by_one(f, ids),
                    'the same, datasets held open': lambda: one_by_one_held(f, ids),
                    'h5py slice per line, places known': lambda: slice_per_line(f, ids, first, lengths),
                    'pread': lambda: calls.training.get_lines(0, 'bundles', ids)}
            truth = Ragged.from_list([points[first[i]:first[i] + lengths[i]].astype(np.float32) for i in ids]).data
            for w in ways.values():
                got = w()
                assert torch.equal(truth, got.data if isinstance(got, Ragged) else torch.from_numpy(np.concatenate(got)))
            assert np.array_equal(np.concatenate(nibabel_lazy(folder/'lines.tck', ids)), truth.numpy())
            copied,disk = 'the copy alone, places known', 'the disk alone: all places asked for, then read'
            places = sorted(zip((dataset.training.streamlines_of(0, 'bundles').rows.address + 24*first[ids]).tolist(), (24*lengths[ids]).tolist()))
            descriptor = os.open(path, os.O_RDONLY)
            memory = peak_memory(lambda: [dataset.training.get_lines(0, 'bundles', ids)])/out.nbytes
            for state in ('warm', 'cold'):
                cold = state == 'cold'
                before = (lambda: forget(dataset, path)) if cold else other_work
                limit = {disk: lambda: ask_then_read(descriptor, places)} if cold else {copied: lambda: gather_lines(mapped, first[ids], offsets, out)}
                t = interleaved({**ways, **({} if cold or quick else {'nibabel, lazy .tck': lambda: nibabel_lazy(folder/'lines.tck', ids)}), **limit}, before=before)
                goal = t['textbook, one by one']/t['ours']
                yield Row(f"{k} random lines of {n}, lazy, {state}", n_threads, t, 'textbook, one by one', '>= 100x', goal >= 100 if not quick else None,
                          limit=next(iter(limit)), memory=None if cold else memory, agrees="all ways, every coordinate: equal",
                          why='' if goal >= 100 or quick else f"the disk alone takes {t['textbook, one by one']/t.get(disk, 1):.0f} times less than the textbook form; ours also looks the places up, which are on the disk themselves" if cold else "the machine was busy",
                          notes=[f"{name}: {t[name]*1e3:.1f} ms, ours is {t[name]/t['ours']:.1f}x" for name in t if name not in ('ours', 'textbook, one by one', *limit)])
        dataset.close(); calls.close(); os.close(descriptor)


# ---- whole batches

def whole_batch_rows(n_threads, quick):
    from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
    from dwiml_nb.batch.spec import ModelSpec
    n,k,dimensions,features = (3000, 100, (20, 20, 20), 5) if quick else (50_000, 1000, (96, 96, 60), 45)
    with temporary_folder() as folder:
        straight,*_ = write_study(folder/'study.hdf5', n, dimensions, features)
        zipped,*_ = write_study(folder/'zipped.hdf5', n, dimensions, features, chunks=(4096, 3), compression='gzip')
        kinds = {'ours': (straight, dict(lazy=True)), 'pread': (straight, dict(lazy=True, read_mode='pread')),
                 'chunked, gzip': (zipped, dict(lazy=True)), 'eager': (straight, dict(lazy=False))}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                                     # that gzip is slow is what is shown here
            sets = {name: MultiSubjectDataset(p, **how).load_data() for name,(p,how) in kinds.items()}
        def batch(dataset):
            loader = DWIMLBatchLoaderOneInput(dataset=dataset, model=ModelSpec(step_size=1.), streamline_group_name='bundles', input_group_name='input', reverse_ratio=.5)
            def load(ids):
                lines,where = loader.load_batch_streamlines([(0, ids)])
                return lines, loader.load_batch_inputs(lines, where)
            return load
        loads,rng = {name: batch(d) for name,d in sets.items()}, np.random.default_rng(2)
        ids = [rng.choice(n, k, replace=False) for _ in range(8)]
        want = loads['eager'](ids[0])
        for load in loads.values():
            for a,b in zip(load(ids[0]), want): assert torch.equal(a.data, b.data)
        turn = {name: iter(range(1000)) for name in loads}
        t = interleaved({name: lambda name=name: loads[name](ids[next(turn[name]) % 8]) for name in loads})
        yield Row(f"whole batch of {k} lines with {features} features: map against pread", n_threads, t, 'pread', 'printed', None, limit='eager',
                  agrees="map, pread, chunked and eager: equal",
                  notes=[f"map / pread: {t['ours']/t['pread']:.2f}; chunked and gzip through HDF5: {t['chunked, gzip']*1e3:.1f} ms, {t['chunked, gzip']/t['ours']:.1f}x the map"])
        for d in sets.values(): d.close()


# ---- opening

def bytes_read() -> int:
    "What this process has read by system calls so far."
    return next(int(line.split()[1]) for line in open('/proc/self/io') if line.startswith('rchar'))

def every_line(path):
    "Textbook: the offsets and lengths of every line of every subject."
    with h5py.File(path) as f:
        return [(f[s]['bundles/offsets'][()].sum(), f[s]['bundles/lengths'][()].sum()) for s in f]

def shapes_alone(path):
    "The least there is to do: where each dataset is and how large."
    with h5py.File(path) as f: return [f[s][g]['data'].shape for s in f for g in ('bundles', 'input')]

def opening_rows(n_threads, quick):
    n = 20 if quick else 200
    for external in (False, True):
        with temporary_folder() as folder:
            path = write_large(folder, n, external)
            held = []
            def ours():
                held.append(MultiSubjectDataset(path, lazy=True).load_data())
                held.pop().close()
            before = bytes_read(); ours(); read = bytes_read() - before
            assert read < 8*100_000*n/10, f"{read} bytes were read: more than headers"
            t = interleaved({'ours': ours, 'textbook, all offsets and lengths': lambda: every_line(path), 'shapes alone, h5py': lambda: shapes_alone(path)})
            start = time.process_time(); ours(); processor = time.process_time() - start
            kind = f"{n} files behind links" if external else "one file"
            yield Row(f"opening {n} subjects x 100,000 lines, {kind}", n_threads, t, 'textbook, all offsets and lengths', '< 1 s' if n == 200 else 'printed',
                      t['ours'] < 1 if n == 200 else None, limit='shapes alone, h5py', agrees=f"{read/1e3:.0f} kB read of {sum(f.stat().st_size for f in folder.iterdir())/1e9:.0f} GB (sparse)",
                      why=f"other programs had the processor: {processor:.2f} s of processor time, load {os.getloadavg()[0]:.1f}" if t['ours'] > max(1, 1.5*processor) else
                          "" if t['ours'] < 1 or n < 200 else "headers are read one attribute at a time",
                      notes=[f"{t['ours']/n*1e3:.2f} ms a subject, {processor/n*1e3:.2f} ms of processor time"])


def rows(threads, quick):
    yield from random_line_rows(threads, quick)
    yield from whole_batch_rows(threads, quick)
    yield from opening_rows(threads, quick)
