"""Memory: a study is read for as long as one likes, from workers too, and no process grows.

What counts is memory of one's own (RssAnon): pages of a mapped file belong to the system, which shares them and takes them back.
The short form always runs; DWIML_SLOW=1 runs 10,000 batches of a 4 GiB study. `python tests/test_memory.py` prints the curve.
"""
import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.create import create_study
from dwiml_nb.study.lists import SUBSETS

MIB = 2**20
GRID = (60, 70, 50)


def write_study(path, size, subjects=4, points='f8', features=28, seed=0):
    "A study of `size` bytes of random walks, written piece by piece."
    rng = np.random.default_rng(seed)
    names = [f'sub-{i}' for i in range(subjects)]
    with h5py.File(path, 'w') as f:
        for s in SUBSETS: f.attrs[f'{s}_subjs'] = names if s == 'training' else []
        f.attrs['step_size'] = 1.
        for s in names:
            v = f.create_group(f'{s}/input')
            v.attrs.update({'type': 'volume', 'affine': np.eye(4), 'voxres': np.ones(3, np.float32), 'nb_features': features})
            v['data'] = rng.random((*GRID, features), np.float32)
            n = int(size/subjects/np.dtype(points).itemsize/3/80)                     # lines of 60 to 100 points, 80 on average
            lengths = rng.integers(60, 101, n)
            g = f.create_group(f'{s}/bundles')
            g.attrs.update({'type': 'streamlines', 'space': 'Space.VOX', 'origin': 'Origin.TRACKVIS', 'affine': np.eye(4), 'dimensions': np.int16(GRID)})
            g['lengths'],g['offsets'],g['euclidean_lengths'] = lengths, np.cumsum(lengths) - lengths, lengths - 1.
            data = g.create_dataset('data', (lengths.sum(), 3), points)
            for row in range(0, len(data), 2**20):
                block = rng.random((min(2**20, len(data) - row), 3))*2 - 1
                data[row:row + len(block)] = np.clip(np.cumsum(block, 0) + 25, 1, 49)
    return path


def of_process(pid):
    "Its own memory in bytes, its descriptors."
    words = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return int(words['RssAnon'].split()[0])*1024, len(os.listdir(f'/proc/{pid}/fd'))

def walk(path, nb_batches, every, read_mode='map', nb_workers=2, batch_size=100):
    "Read batches as a training does; (batch, bytes of all processes, most descriptors of one) now and then."
    torch.set_num_threads(1)
    dataset = MultiSubjectDataset(path, lazy=True, read_mode=read_mode).load_data()
    sampler = DWIMLBatchIDSampler(dataset, 'bundles', batch_size_training=batch_size, nb_subjects_per_batch=2)
    loader = DWIMLBatchLoaderOneInput(dataset=dataset, model=ModelSpec(step_size=1.), streamline_group_name='bundles', input_group_name='input', reverse_ratio=.5)
    def ids():
        epoch = 0
        while True:
            yield from sampler.batches('training', epoch)
            epoch += 1
    class Ids(torch.utils.data.Dataset):
        def __getitem__(self, item): return item
    numbers,curve = ids(), []
    workers = iter(torch.utils.data.DataLoader(Ids(), sampler=(next(numbers) for _ in range(nb_batches)), batch_size=None, num_workers=nb_workers,
                                               collate_fn=loader.load_batch_streamlines))
    pids = [os.getpid(), *(w.pid for w in workers._workers)]
    for b,batch in enumerate(workers):
        lines,where = batch
        inputs = loader.load_batch_inputs(lines, where)
        assert len(inputs.data) == len(lines.data) and len(where) <= 2
        del batch, lines, where, inputs
        if b % every == 0:
            each = [of_process(p) for p in pids]
            curve.append((b, sum(m for m,_ in each), max(n for _,n in each)))
    dataset.close()
    return curve

def check_flat(curve, warm_up, most=50*MIB):
    "After the warm-up nothing grows."
    before,after = ([c for c in curve if (c[0] < warm_up) == early] for early in (True, False))
    memory = [m for _,m,_ in after]
    assert max(memory) - min(memory) <= 2*most and abs(np.mean(memory[-5:]) - np.mean(memory[:5])) <= most, [f"{b}: {m/MIB:.0f} MiB" for b,m,_ in curve]
    held = [n for *_,n in after]                                       # batches on their way hold some, now more, now fewer
    assert abs(np.mean(held[-10:]) - np.mean(held[:10])) <= 3 and max(held) <= max(n for *_,n in before) + 12, [f"{b}: {n}" for b,_,n in curve]


@pytest.mark.parametrize('read_mode', ['map', 'pread'])
def test_memory_is_flat(tmp_path, read_mode):
    curve = walk(write_study(tmp_path/'study.hdf5', 96*MIB), 240, 8, read_mode)
    check_flat(curve, 80)
    shutil.rmtree(tmp_path)

def highest_while(do):
    "How far this process's own memory rises above where it was, in bytes."
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'): libc.malloc_trim(0)
    base,highest,done = of_process('self')[0], [0], threading.Event()
    def watch():
        while not done.is_set(): highest[0] = max(highest[0], of_process('self')[0] - base); time.sleep(2e-4)
    watcher = threading.Thread(target=watch); watcher.start()
    try: do()
    finally: done.set(); watcher.join()
    return highest[0]

@pytest.mark.parametrize('how', ['none', 'all'])
def test_creation_holds_an_uncompressed_volume_at_most_twice(tmp_path, how):
    "However many subjects there are. Compressed images and streamlines take more: benchmarks/data_rows/dwi_ml.py says how much."
    values = np.random.default_rng(0).random((*GRID, 28), np.float32)
    for s in 'ab':
        (tmp_path/s).mkdir()
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path/s/'sh.nii')
    config = {'input': {'type': 'volume', 'files': 'sh.nii', 'standardization': how}}
    make = lambda ids: create_study(tmp_path, tmp_path/'study.hdf5', config, ids, overwrite=True)
    size = values.nbytes
    del values
    make(['a'])
    for ids in (["a"], ["a", "b"]): assert highest_while(lambda ids=ids: make(ids)) < 2.1*size + 12*MIB  # a third copy would be 22 MiB
    shutil.rmtree(tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('read_mode,points', [('map', 'f8'), ('pread', 'f4')])
def test_ten_thousand_batches_of_4_gib(tmp_path, read_mode, points):
    curve = walk(write_study(tmp_path/'study.hdf5', 4096*MIB, points=points), 10_000, 100, read_mode)
    shutil.rmtree(tmp_path)
    print(tell(curve))
    check_flat(curve, 1000)

def tell(curve):
    b,m,n = zip(*curve)
    warm = [x for i,x in zip(b, m) if i >= .1*b[-1]]
    return json.dumps(dict(batches=b[-1] + 1, first_MiB=round(m[0]/MIB), warm_MiB=round(warm[0]/MIB), last_MiB=round(m[-1]/MIB), lowest_MiB=round(min(warm)/MIB),
                           highest_MiB=round(max(warm)/MIB), descriptors=[n[0], max(n), n[-1]]))

if __name__ == '__main__':
    mode,points = (sys.argv[1:] + ['map', 'f8'])[:2] if len(sys.argv) > 2 else ('map', 'f8')
    folder = Path(tempfile.mkdtemp(prefix='dwiml_memory_'))
    try:
        start = time.time(); path = write_study(folder/'study.hdf5', 4096*MIB, points=points)
        print(f"{path.stat().st_size/2**30:.2f} GiB written in {time.time() - start:.0f} s", flush=True)
        start = time.time(); curve = walk(path, 10_000, 100, mode)
        print(mode, points, tell(curve), f"{time.time() - start:.0f} s")
        print([f"{b}: {m/MIB:.0f}" for b,m,_ in curve[::10]])
    finally: shutil.rmtree(folder)
