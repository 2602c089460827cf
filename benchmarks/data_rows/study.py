"""Creation: five subjects' images and tractograms become one study."""
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch

from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.study.create import create_study
from side_by_side import Row, interleaved, peak_memory

AFFINE = np.diag([2., 2, 2, 1])
CONFIG = {'input': {'type': 'volume', 'files': 'sh.nii.gz', 'standardization': 'all'}, 'wm': {'type': 'volume', 'files': 'wm.nii.gz', 'standardization': 'none'},
          'bundles': {'type': 'streamlines', 'files': 'bundles/*.trk'}}


# ---- what goes in

def write_subjects(root, n, dimensions, features, nb_lines):
    "Subject folders: 'sh' with a brain in the middle and nothing around it, its mask, two tractograms of walks of 20 to 60 points."
    rng = np.random.default_rng(0)
    distance = np.sqrt(sum(((i - d/2)/d)**2 for i,d in zip(np.indices(dimensions), dimensions)))
    brain = distance < .45
    for s in range(n):
        folder = Path(root)/f'sub-{s + 1:02d}'; (folder/'bundles').mkdir(parents=True)
        sh = rng.normal(size=(*dimensions, features)).astype(np.float32).round(3)*brain[..., None]
        nib.save(nib.Nifti1Image(sh, AFFINE), folder/'sh.nii.gz')
        nib.save(nib.Nifti1Image(brain.astype(np.uint8), AFFINE), folder/'wm.nii.gz')
        for b in range(2):
            lengths = rng.integers(20, 61, nb_lines//2)
            step = (np.repeat(rng.normal(size=(len(lengths), 3)), lengths, 0)*.3 + rng.normal(size=(lengths.sum(), 3))*.1)*min(dimensions)/40
            walk = np.cumsum(step, 0)
            first = np.cumsum(lengths) - lengths
            start = rng.uniform(.4, .6, (len(lengths), 3))*dimensions*2
            points = np.clip(walk - np.repeat(walk[first] - start, lengths, 0), 1, np.array(dimensions)*2 - 3).astype(np.float32)
            save_tractogram(Tractogram(Ragged.from_lengths(torch.from_numpy(points), torch.from_numpy(lengths)), Grid(AFFINE, dimensions)), folder/'bundles'/f'{b}.trk')
    return [f'sub-{s + 1:02d}' for s in range(n)]


# ---- three ways

def plain_way(root, path, subjects):
    "nibabel, dipy and h5py, one file, as a script would do it: no checks, no temporary name, nothing flushed."
    from dipy.io.streamline import load_tractogram
    from dipy.tracking.streamline import length
    with h5py.File(path, 'w') as f:
        for s in subjects:
            for g,name in (('input', 'sh'), ('wm', 'wm')):
                data = nib.load(f'{root}/{s}/{name}.nii.gz').get_fdata(dtype=np.float32)
                data = data[..., None] if data.ndim == 3 else data
                if g == 'input':
                    values = data[(data != 0).all(-1)]
                    data = (data - values.mean())/values.std()
                f[f'{s}/{g}/data'] = data
            parts = []
            for trk in sorted(Path(root, s, 'bundles').glob('*.trk')):
                sft = load_tractogram(str(trk), 'same', bbox_valid_check=False)
                mm = length(sft.streamlines)
                sft.to_vox(); sft.to_corner()
                parts.append((sft.streamlines, mm))
            joined = nib.streamlines.ArraySequence([line for lines,_ in parts for line in lines])
            g = f.create_group(f'{s}/bundles')
            g['data'],g['offsets'],g['lengths'] = joined._data.astype(np.float64), joined._offsets, joined._lengths
            g['euclidean_lengths'] = np.concatenate([mm for _,mm in parts])

def read_inputs(root, subjects):
    "nibabel's reading of the same files; nothing is done with the values."
    for s in subjects:
        for name in ('sh', 'wm'): np.asanyarray(nib.load(f'{root}/{s}/{name}.nii.gz').dataobj, dtype=np.float32)
        for trk in sorted(Path(root, s, 'bundles').glob('*.trk')): nib.streamlines.load(str(trk))

def write_twice(folder, sizes):
    "The bytes of the study: a file for each subject, then one for all, each flushed to the disk; then all are removed."
    noise = np.random.default_rng(0).bytes(16 << 20)
    def write(path, size):
        with open(path, 'wb', buffering=0) as f:
            for at in range(0, size, len(noise)): f.write(noise[:size - at])
            os.fsync(f.fileno())
    for i,size in enumerate(sizes): write(folder/f'{i}', size)
    write(folder/'all', sum(sizes))
    for p in folder.iterdir(): p.unlink()

def agreement(ours, plain, subjects):
    "Largest difference between our study and the script's."
    worst = 0.
    with h5py.File(ours) as f, h5py.File(plain) as g:
        for s in subjects:
            for name in ('input/data', 'wm/data', 'bundles/data', 'bundles/euclidean_lengths'): worst = max(worst, float(np.abs(f[s][name][()] - g[s][name][()]).max()))
            for name in ('offsets', 'lengths'): assert np.array_equal(f[s]['bundles'][name][()], g[s]['bundles'][name][()])
    assert worst < 1e-3
    return worst


def rows(threads, quick):
    "One row: five subjects, one process."
    dimensions,features,nb_lines,repeats = ((24, 24, 16), 6, 400, 1) if quick else ((64, 64, 40), 28, 20000, 5)
    folder = Path(tempfile.mkdtemp(prefix='creation_'))
    try:
        subjects = write_subjects(folder/'in', 5, dimensions, features, nb_lines)
        (folder/'scratch').mkdir()
        ours,plain = folder/'ours.hdf5', folder/'plain.hdf5'
        def create(ids=subjects):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                return create_study(folder/'in', ours, CONFIG, ids, overwrite=True)
        create()
        with h5py.File(ours) as f:
            sizes = []
            for s in subjects: n = []; f[s].visititems(lambda _,o, n=n: n.append(o.id.get_storage_size()) if isinstance(o, h5py.Dataset) else None); sizes.append(sum(n))
        def limit(): read_inputs(folder/'in', subjects); write_twice(folder/'scratch', sizes)
        def raw():
            for p in (folder/'in').rglob('*.*'): p.read_bytes()
            write_twice(folder/'scratch', sizes)
        ways = {'ours': create, 'nibabel, dipy, h5py': lambda: plain_way(folder/'in', plain, subjects), 'reading the inputs (nibabel), writing twice': limit, 'raw bytes': raw}
        seconds = interleaved(ways, repeats)
        worst = agreement(ours, plain, subjects)
        memory = peak_memory(lambda: create(subjects[:1])), peak_memory(create)
        key = 'reading the inputs (nibabel), writing twice'
        ratio = seconds['ours']/seconds[key]
        yield Row(f'creation of a study, 5 subjects, {sum(sizes)/1e6:.0f} MB, one process', threads, seconds, 'nibabel, dipy, h5py', '<= 1.5x limit', ratio <= 1.5, key, memory[1]/max(sizes),
                  f'values, points and lengths of the script, largest difference {worst:.1e}',
                  '' if ratio <= 1.5 else 'see the notes',
                  [f"memory: {memory[0]/1e6:.0f} MB above the start for one subject, {memory[1]/1e6:.0f} MB for five ({max(sizes)/1e6:.0f} MB a subject; the column is per subject)",
                   f"without decoding, reading the files' bytes and writing twice takes {seconds['raw bytes']*1e3:.0f} ms; the script writes once, flushes nothing, checks nothing"])
    finally: shutil.rmtree(folder, ignore_errors=True)
