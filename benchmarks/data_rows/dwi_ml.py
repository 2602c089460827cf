"""Creating, loading and opening a study beside what dwi_ml does, in processor time, with the floor: numpy writing and reading the same bytes.

dwi_ml's steps are spelled out below with the calls it makes of h5py, nibabel and dipy. What ours does besides, and the script does not: check all sources first, finish each subject as
a file of its own, flush to the disk, appear under its name as a whole; at opening, measure the index of headers (or look at each subject's groups, types, sizes and affine), and tell all
that is wrong at once. What the script does and ours does not: read the lengths of all lines, which a lazy dataset reads when they are asked for.
"""
import datetime
import gc
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch
from dipy.io.stateful_tractogram import StatefulTractogram
from dipy.io.streamline import load_tractogram
from dipy.io.utils import is_header_compatible
from dipy.tracking.streamline import length
from nibabel.streamlines import ArraySequence
from scipy.spatial.transform import Rotation

from data_rows.study import CONFIG, write_subjects
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.create import copy_attributes, create_study
from dwiml_nb.study.headers import headers_in, write_index
from dwiml_nb.study.schema import INDEX_KEYS
from side_by_side import Row, peak_memory


# ---- dwi_ml's steps

def load_4d(path):
    "get_fdata in float32, a fourth axis."
    img = nib.load(path)
    data = img.get_fdata(dtype=np.float32)
    return (data[..., None] if data.ndim == 3 else data), img.affine, np.array(img.header.get_zooms()[:3], np.float32), img.header

def standardize(data):
    "Mean and deviation over the voxels where all features are non-zero."
    mask = np.all(data != 0, axis=-1)
    mean,std = np.mean(data[mask]), np.std(data[mask])
    return (data - mean)/np.maximum(std, 1e-6)

def create_volume(subject, name, config, path, ref):
    "Load, standardise, compare with the first header, one dataset and four attributes."
    data,affine,res,header = load_4d(path)
    if config['standardization'] == 'all': data = standardize(data)
    if ref is not None and not is_header_compatible(ref, header): raise ValueError(path)
    group = subject.create_group(name); group.create_dataset('data', data=data)
    for k,v in (('affine', affine), ('type', 'volume'), ('voxres', res), ('nb_features', data.shape[-1])): group.attrs[k] = v
    return ref or header

def create_streamlines(subject, name, files, ref):
    "Each tractogram: header compared, loaded and checked by dipy, lengths in mm, to voxels and corner, joined; four datasets, six attributes."
    whole,mm = None, []
    for trk in files:
        if not is_header_compatible(str(trk), ref): raise ValueError(trk)
        sft = load_tractogram(str(trk), 'same')
        sft.to_rasmm(); mm.extend(length(sft.streamlines))
        sft.to_vox(); sft.to_corner()
        if whole is None: whole = sft; continue
        joined = whole.streamlines.copy(); joined.extend(sft.streamlines)
        whole = StatefulTractogram.from_sft(joined, whole)
    group = subject.create_group(name)
    affine,dimensions,sizes,order = whole.space_attributes
    for k,v in (('type', 'streamlines'), ('space', str(whole.space)), ('origin', str(whole.origin)), ('affine', affine), ('dimensions', dimensions), ('voxel_sizes', sizes),
                ('voxel_order', order)): group.attrs[k] = v
    group.create_group('data_per_streamline')
    x = whole.streamlines
    for k,v in (('data', x._data), ('offsets', x._offsets), ('lengths', x._lengths), ('euclidean_lengths', mm)): group.create_dataset(k, data=v)

def dwi_ml_creates(root, out, ids):
    with h5py.File(out, 'w') as f:
        attrs = {'data_and_time': datetime.datetime.now().strftime('%d %B %Y %X'), 'chosen_subjs': ids, 'groups_config': str(CONFIG), 'training_subjs': ids, 'validation_subjs': [],
                 'testing_subjs': [], **dict.fromkeys(('step_size', 'nb_points', 'compress'), 'Not defined by user')}
        for k,v in attrs.items(): f.attrs[k] = v
        for s in ids:
            subject,ref = f.create_group(s), None
            for g,c in CONFIG.items():
                if c['type'] == 'volume': ref = create_volume(subject, g, c, Path(root, s, c['files']), ref)
                else: create_streamlines(subject, g, sorted(Path(root, s).glob(c['files'])), ref)

def groups(f):
    ids = sorted(f.attrs['training_subjs'])
    kinds = {g: f[ids[0]][g].attrs['type'] for g in f[ids[0]]}
    return ids, [g for g,k in kinds.items() if k == 'volume'], [g for g,k in kinds.items() if k == 'streamlines']

def space(group):
    return [np.array(group.attrs[k]) for k in ('affine', 'dimensions', 'voxel_sizes')] + [str(group.attrs[k]) for k in ('voxel_order', 'space', 'origin')]

def dwi_ml_loads(path):
    "Each volume as a float32 tensor with resolution and affine; each tractogram as an ArraySequence of the stored float64 points, its lengths in points and mm."
    with h5py.File(path, 'r') as f:
        ids,volumes,lines = groups(f)
        found = []
        for s in ids:
            for g in volumes:
                h = f[s][g]
                found.append((torch.as_tensor(np.array(h['data'], dtype=np.float32)), np.array(h.attrs['voxres'], np.float32), np.array(h.attrs['affine'], np.float32)))
            for g in lines:
                h,x = f[s][g], ArraySequence()
                x._data,x._offsets,x._lengths = np.array(h['data']), np.array(h['offsets']), np.array(h['lengths'])
                mm,dps = np.array(h['euclidean_lengths']), {k: np.array(v) for k,v in h['data_per_streamline'].items()}
                found.append((x, np.array(h['lengths']), mm, dps, space(h)))
    return found

def dwi_ml_opens(path):
    "Of each volume the number of features; of each tractogram its space, the number of lines and the lengths of all of them in points and mm."
    with h5py.File(path, 'r') as f:
        ids,volumes,lines = groups(f)
        found = [[int(f[s][g].attrs['nb_features']) for g in volumes] for s in ids]
        for s in ids:
            for g in lines:
                h = f[s][g]
                found.append((len(h['offsets']), space(h), np.array(h['lengths'], np.int16), np.array(h['euclidean_lengths'], np.int16)))
    return found


# ---- rows

def processor_seconds(ways, repeats):
    "Median processor time of each way, the ways taking turns."
    times = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name,f in ways.items():
            gc.collect()
            start = time.process_time()
            found = f()
            if turn: times[name].append(time.process_time() - start)
            del found
    return {name: statistics.median(t) for name,t in times.items()}

def many_subjects(path, out, n):
    "A study of n subjects, the first one of another again and again, each turned a little so that no two grids are the same."
    rng = np.random.default_rng(0)
    with h5py.File(path) as a, h5py.File(out, 'w', libver=('v108', 'latest')) as b:
        copy_attributes(a, b)
        ids,affine = [f'sub-{i:05d}' for i in range(n)], a['sub-01/input'].attrs['affine']
        for s in ids:
            a.copy('sub-01', b, s)
            turned = affine.copy(); turned[:3] = Rotation.from_euler('xyz', rng.normal(size=3)*5, degrees=True).as_matrix() @ affine[:3]
            for group in b[s].values(): group.attrs['affine'] = turned
        b.attrs['training_subjs'] = b.attrs['chosen_subjs'] = ids
        write_index(b, {s: headers_in(b[s]) for s in ids})
    return out

def drop_index(path):
    "Make a study like those of earlier versions and other programs."
    with h5py.File(path, 'r+') as f:
        for k in INDEX_KEYS: del f.attrs[k]

def numpy_writes(folder, arrays):
    for i,a in enumerate(arrays): a.tofile(folder/f'{i}')

def numpy_reads(folder, arrays): return [np.fromfile(folder/f'{i}', a.dtype) for i,a in enumerate(arrays)]

def three_rows(kind, threads, root, folder, ids, repeats):
    "Creation, eager loading, opening."
    ours,theirs,scratch = folder/'ours.hdf5', folder/'theirs.hdf5', folder/'scratch'
    scratch.mkdir()
    create = lambda which=ids: create_study(root, ours, CONFIG, which, overwrite=True)
    create(); dwi_ml_creates(root, theirs, ids)
    arrays = []
    with h5py.File(ours) as f: f.visititems(lambda _,o: arrays.append(o[()]) if isinstance(o, h5py.Dataset) else None)
    size = sum(a.nbytes for a in arrays)
    where = f"{len(ids)} subjects, {kind}, {size/1e6:.0f} MB"
    peer,floor = "dwi_ml's steps", 'numpy, the same bytes'
    seconds = processor_seconds({'ours': create, peer: lambda: dwi_ml_creates(root, theirs, ids), floor: lambda: numpy_writes(scratch, arrays)}, repeats)
    each,most = size/len(ids), peak_memory(create)
    said = f"memory: {most/1e6:.1f} MB while subjects of {each/1e6:.2f} MB are made; Python and HDF5 take some 2 MB however small a subject is (tests/test_memory.py)"
    yield Row(f'creation, {where}', threads, seconds, peer, '>= 1.0x', seconds[peer] >= seconds['ours'], floor, most/each, 'see the rows of study', notes=[said])
    seconds = processor_seconds({'ours': lambda: MultiSubjectDataset(ours).load_data(), peer: lambda: dwi_ml_loads(theirs), floor: lambda: numpy_reads(scratch, arrays)}, 3*repeats)
    yield Row(f'eager loading, {where}', threads, seconds, peer, '>= 1.5x', seconds[peer] >= 1.5*seconds['ours'], floor)
    seconds = processor_seconds({'ours': lambda: MultiSubjectDataset(ours, lazy=True).load_data(), peer: lambda: dwi_ml_opens(theirs)}, 3*repeats)
    yield Row(f'lazy opening, {where}', threads, seconds, peer, '>= 1.5x', seconds[peer] >= 1.5*seconds['ours'])
    drop_index(ours)
    seconds = processor_seconds({'ours': lambda: MultiSubjectDataset(ours, lazy=True).load_data(), peer: lambda: dwi_ml_opens(theirs)}, 3*repeats)
    yield Row(f'lazy opening without an index, {where}', threads, seconds, peer, '', None)
    shutil.rmtree(scratch)

def rows(threads, quick):
    if threads > 1: return
    folder = Path(tempfile.mkdtemp(prefix='beside_'))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for kind,n,sizes in (('large', 3, ((64, 64, 40), 28, 20000)), ('small', 20, ((16, 16, 10), 15, 200))):
                if quick: n,sizes = 2, ((16, 16, 10), 6, 100)
                here = folder/kind; here.mkdir()
                yield from three_rows(kind, threads, here/'in', here, write_subjects(here/'in', n, *sizes), 1 if quick else 3)
            many = many_subjects(folder/'small'/'ours.hdf5', folder/'many.hdf5', n := 50 if quick else 10_000)
            seconds = processor_seconds({'ours': lambda: MultiSubjectDataset(many, lazy=True).load_data(), "dwi_ml's steps": lambda: dwi_ml_opens(many)}, 3)
            drop_index(many)
            plain = processor_seconds({'ours': lambda: MultiSubjectDataset(many, lazy=True).load_data()}, 1)['ours']
            yield Row(f'lazy opening of {n} subjects', threads, seconds, "dwi_ml's steps", '< 3 s', seconds['ours'] < 3, notes=[f"{os.path.getsize(many)/1e6:.0f} MB; without an index {plain:.2f} s"])
    finally: shutil.rmtree(folder, ignore_errors=True)
