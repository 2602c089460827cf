"""Memory: a study is read for as long as one likes, from workers too, and no process grows.

What counts is memory of one's own (RssAnon): pages of a mapped file belong to the system, which shares them and takes them back.
The short form always runs; DWIML_SLOW=1 runs 10,000 batches of a 4 GiB study. `python tests/test_memory.py` prints the curve.
"""
import ctypes
import gc
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
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

def write_sources(root):
    "Two subjects, each with images of 22 MiB and tractograms whose points become as much."
    rng = np.random.default_rng(0)
    values,lengths = rng.random((*GRID, 28), np.float32), rng.integers(60, 101, 12000)
    points = rng.random((lengths.sum(), 3), np.float32)*30 + 10
    lines = Tractogram(Ragged.from_lengths(torch.from_numpy(points), torch.from_numpy(lengths)), Grid(np.eye(4), GRID))
    whole = {'sh.nii': values, 'scaled.nii': (values*1000).astype(np.int16), 't1.nii': values.reshape(210, 200, 140),
             'mask.nii': np.ones(GRID, np.uint8), 'small.nii': np.ones((4, 4, 4), np.uint8)}
    for s in 'ab':
        (root/s).mkdir(parents=True)
        for name,array in whole.items():
            image = nib.Nifti1Image(array, np.eye(4))
            if name == 'scaled.nii': image.header.set_slope_inter(.001, 0)
            if s == 'a' or name in ('sh.nii', 'small.nii'): nib.save(image, root/s/name)
    for name in ('all.trk', 'all.tck', 'all.trx'): save_tractogram(lines, root/'a'/name)
    for i in (0, 1): save_tractogram(lines[6000*i:6000*i + 6000], root/'a'/f'half_{i}.trk')
    for name in ('sh.nii', 'scaled.nii', 't1.nii', 'all.trk'):
        with open(root/'a'/name, 'rb') as f, gzip.open(root/'a'/f'{name}.gz', 'wb', 1) as packed: shutil.copyfileobj(f, packed)

def image(files, how='all', **options): return {'input': {'type': 'volume', 'files': files, 'standardization': how, **options}}
def lines(files): return {**image('mask.nii', 'none'), 'lines': {'type': 'streamlines', 'files': files}}

MADE_FROM = {
    'image': (image('sh.nii', 'none'), {}), 'standardised': (image('sh.nii'), {}), 'each feature': (image('sh.nii', 'independent'), {}),
    'each degree': (image('sh.nii', 'per_degree'), {}), 'compressed': (image('sh.nii.gz'), {}),
    'scaled, compressed': (image('scaled.nii.gz'), {}), 'one feature, compressed': (image('t1.nii.gz'), {}), 'several files': (image(['sh.nii', 'mask.nii']), {}),
    'trk': (lines('all.trk'), {}), 'trk.gz': (lines('all.trk.gz'), {}), 'tck': (lines('all.tck'), {}), 'trx': (lines('all.trx'), {}), 'two trk': (lines('half_*.trk'), {}),
    'step': (lines('all.trk'), dict(step_size=12.)), 'points': (lines('all.trk'), dict(nb_points=80)), 'compress': (lines('all.trk'), dict(compress=.1)),
    'some left out': (lines('all.trk'), dict(remove_invalid=True))}

def measure_creation(root):
    "What a subject takes while it is created, its bytes in the study and its voxels, for each of `MADE_FROM`; and for subjects of 64 bytes."
    warnings.simplefilter('ignore')
    def make(config, ids=('a',), **options): create_study(root, root/'study.hdf5', config, list(ids), overwrite=True, **options)
    found = {}
    make(lines('half_0.trk'))                                                                 # what is loaded once does not count
    for name,(config,options) in MADE_FROM.items():
        most = highest_while(lambda config=config,options=options: make(config, **options))
        with h5py.File(root/'study.hdf5') as f:
            sizes = []; f['a'].visititems(lambda _,o, sizes=sizes: sizes.append(o.nbytes) if isinstance(o, h5py.Dataset) else None)
            voxels = int(np.prod(f['a/input/data'].shape[:3]))
        found[name] = most, sum(sizes), voxels
    for ids in ('a', 'ab'):
        for name,config in (('smallest', image('small.nii', 'none')), ('large', image('sh.nii'))):
            found[f'{name} {ids}'] = highest_while(lambda config=config,ids=ids: make(config, ids)), 0, 0
    return found

@pytest.fixture(scope='module')
def taken(tmp_path_factory):
    "Measured in a process of its own, where no other test left memory to be used again; what is freed is given back, as with subjects of more than 32 MB anywhere."
    root = tmp_path_factory.mktemp('sources')
    write_sources(root)
    ran = subprocess.run([sys.executable, __file__, 'creation', root], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(MIB)}, capture_output=True, text=True, check=True)
    shutil.rmtree(root)
    return json.loads(ran.stdout.splitlines()[-1])

@pytest.mark.parametrize('made_from', MADE_FROM)
def test_creation_holds_a_subject_at_most_twice(taken, made_from):
    "Its bytes in the study, a byte a voxel for its mask, and 6 MiB beside what the smallest study takes: a third copy would be 20 MiB."
    (most,size,voxels),floor = taken[made_from], taken['smallest a'][0]
    assert 15*MIB < size < 40*MIB
    assert most - floor < 2*size + voxels + 6*MIB, f"{most/MIB:.1f} MiB for a subject of {size/MIB:.1f} MiB; the smallest takes {floor/MIB:.1f} MiB"

def test_creation_holds_one_subject_at_a_time(taken):
    for size in ('smallest', 'large'): assert taken[f'{size} ab'][0] < taken[f'{size} a'][0] + 2*MIB
    assert taken['smallest a'][0] < 6*MIB

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

if __name__ == '__main__' and sys.argv[1:2] == ['creation']: print(json.dumps(measure_creation(Path(sys.argv[2]))))
elif __name__ == '__main__':
    mode,points = (sys.argv[1:] + ['map', 'f8'])[:2] if len(sys.argv) > 2 else ('map', 'f8')
    folder = Path(tempfile.mkdtemp(prefix='dwiml_memory_'))
    try:
        start = time.time(); path = write_study(folder/'study.hdf5', 4096*MIB, points=points)
        print(f"{path.stat().st_size/2**30:.2f} GiB written in {time.time() - start:.0f} s", flush=True)
        start = time.time(); curve = walk(path, 10_000, 100, mode)
        print(mode, points, tell(curve), f"{time.time() - start:.0f} s")
        print([f"{b}: {m/MIB:.0f}" for b,m,_ in curve[::10]])
    finally: shutil.rmtree(folder)
