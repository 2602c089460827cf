"""Bad studies and bad sources: each is refused in words that say where, what was expected, what was found and what to do; nothing is left behind."""
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.space import grid_of
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study import create
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.describe import describe_study
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.toy import toy_study
from unchecked import save_unchecked

REFERENCE = Path(__file__).parent/'data'/'dwi_ml_study'


class Folder:
    "Subject folders to spoil, and an empty folder to write to."
    def __init__(self, path):
        self.sources,self.out = path/'in', path/'out'
        shutil.copytree(REFERENCE/'sources', self.sources)
        self.out.mkdir()
        self.config = json.loads((self.sources/'config.json').read_text())
        self.lists = {s: (self.sources/f'{s}.txt').read_text().split() for s in SUBSETS}
    def __truediv__(self, name): return self.sources/name
    def create(self, **options): return create_study(**{**dict(root=self.sources, hdf5_file=self.out/'study.hdf5', config=self.config, **self.lists), **options})
    def refused(self, *words, parts=1, **options):
        "The study is refused with these words; in the folder to write to there is nothing but, perhaps, finished subjects that wait for the next attempt."
        with pytest.raises(DataProblem) as caught: self.create(**options)
        for word in words: assert str(word) in str(caught.value), f"'{word}' is not in: {caught.value}"
        assert len(getattr(caught.value, 'problems', [1])) == parts, str(caught.value)
        assert {p.name for p in self.out.iterdir()} <= {'.study.parts'}
        for part in self.out.glob('.study.parts/*.hdf5'): h5py.File(part).close()
        return caught.value
    def made(self, **options):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            summary = self.create(**options)
        assert sorted(p.name for p in self.out.iterdir()) == ['study.hdf5', 'study.json']
        return summary
    def edit_image(self, name, change):
        image = nib.load(self/name)
        data,affine = change(image.get_fdata(dtype=np.float32), image.affine.copy())
        nib.save(nib.Nifti1Image(data, affine), self/name)
    def edit_lines(self, name, change):
        old = load_tractogram(self/name)
        lines = [x.clone() for x in old.lines]
        change(lines)
        save_unchecked(lines, old.grid, self/name, old.dps)

@pytest.fixture
def folder(tmp_path): return Folder(tmp_path)

# ---- folders, lists, config

def test_no_such_things(folder):
    folder.refused('no such folder of subjects', 'nowhere', root=folder/'nowhere')
    folder.refused('no such config file', 'nowhere.json', config=folder/'nowhere.json')
    folder.refused('no such subject list', 'nowhere.txt', 'To do', training=folder/'nowhere.txt')
    folder.refused('no such folder to write to', hdf5_file=folder.out/'deeper'/'study.hdf5')

def test_subject_lists(folder):
    folder.refused('subject subj-05', 'no folder for a listed subject', "Did you mean 'subj-0", 'Expected', 'Found', training=['subj-01', 'subj-05'])
    folder.refused('subject subj-01', 'in two lists', 'training', 'testing', 'To do', testing=['subj-01'])
    folder.refused('subject subj-01', 'listed twice', training=['subj-01', 'subj-02', 'subj-01'])
    folder.refused('no subject at all', training=[], validation=None, testing=[])

def test_ignored_folders_are_told(folder):
    summary = folder.made(testing=None)
    assert any('ignored: subj-04' in w for w in summary.warnings)

@pytest.mark.parametrize('change,words', [
    (lambda c: c['input'].update(standardisation='all'), ["unknown config key 'standardisation'", "Did you mean 'standardization'?", 'group input']),
    (lambda c: c['input'].update(standardization='perfile'), ["Did you mean 'per_file'?", 'group input']),
    (lambda c: c['input'].pop('standardization'), ['must say how it is standardised', 'To do']),
    (lambda c: c['input'].update(type='volumes'), ["Did you mean 'volume'?"]),
    (lambda c: c['wm_mask'].update(files=[]), ['no files are listed', 'group wm_mask']),
    (lambda c: c['streamlines'].pop('connectivity_nb_blocs'), ['connectivity_nb_blocs or connectivity_labels']),
    (lambda c: c['input'].update(frame='scanner'), ['unknown frame', "'image' or 'world'"]),
    (lambda c: c['input'].update(standardization='per_degree'), ['not a symmetric SH volume', 'Found: 5'])])
def test_config(folder, change, words):
    change(folder.config)
    folder.refused(*words, parts=4 if 'Found: 5' in words else 1)

def test_config_that_is_not_json(folder):
    (folder/'config.json').write_text('{"input": ')
    with pytest.raises(ValueError, match='config.json is not valid JSON'): folder.create(config=folder/'config.json')
    assert list(folder.out.iterdir()) == []

@pytest.mark.parametrize('group,key,value', [('input', 'std_mask', 5), ('input', 'files', [['a.nii.gz']]), ('streamlines', 'connectivity_matrix', ['connectivity.npy']),
                                             ('streamlines', 'connectivity_matrix', 7), ('streamlines', 'dps_keys', {'weight': 1}), ('streamlines', 'dps_keys', 'a/b'),
                                             ('streamlines', 'file_labels', {'tract': [1, 2]})])
def test_values_of_the_wrong_kind(folder, group, key, value):
    folder.config[group][key] = value
    folder.refused(f'group {group}: {key} cannot be read', 'Expected', 'Found')

def test_config_files(folder):
    text = json.dumps(folder.config)
    (folder/'twice.json').write_text(text[:-1] + ', "input": ' + json.dumps(folder.config['wm_mask']) + '}')
    with pytest.raises(ValueError, match="the key 'input' is there twice"): folder.create(config=folder/'twice.json')
    (folder/'latin.json').write_bytes('{"é": {}}'.encode('latin1'))
    with pytest.raises(ValueError, match='not valid JSON'): folder.create(config=folder/'latin.json')
    assert list(folder.out.iterdir()) == []
    (folder/'mark.json').write_text(text, encoding='utf-8-sig'); (folder/'mark.txt').write_text('subj-01', encoding='utf-8-sig')
    folder.made(config=folder/'mark.json', training=folder/'mark.txt')

# ---- files

def test_missing_mask(folder):
    "Without its mask an image would be standardised in another way than those of the others: that is refused, also when files may miss."
    folder.config['input']['std_mask'] = 'masks/wm.nii.gz'
    del folder.config['wm_mask']
    (folder/'subj-02/masks/wm.nii.gz').unlink()
    folder.refused('subject subj-02', 'group input', 'no such file', 'wm.nii.gz', skip_missing=True)

def test_missing_labels(folder):
    "A matrix goes with its labels."
    folder.config['streamlines'] |= {'connectivity_labels': 'masks/regions.nii.gz'}
    del folder.config['streamlines']['connectivity_nb_blocs']
    summary = folder.made(skip_missing=True)
    assert sum('connectivity.npy is left out with its labels' in w for w in summary.warnings) == 4
    with h5py.File(summary.path) as f: assert 'connectivity_matrix' not in f['subj-01/streamlines']

def test_missing_files(folder):
    folder.config['streamlines']['files'] = ['bundles/c*.trk']
    folder.refused("nothing matches 'bundles/c*.trk'", 'subject subj-03', 'group streamlines', 'bundle_a.trk', 'To do', parts=4)
    folder.config['streamlines']['files'] = ['bundles/bundle_a.trk', 'bundles/bundle_b.trk']
    (folder/'subj-02/bundles/bundle_b.trk').unlink()
    folder.refused('no such file', 'subject subj-02', 'bundle_b.trk')
    summary = folder.made(skip_missing=True)
    assert any('bundle_b.trk' in w and 'left out' in w for w in summary.warnings)
    with h5py.File(summary.path) as f: assert f['subj-02/streamlines/lengths'].shape == (60,) and f['subj-01/streamlines/lengths'].shape == (120,)

def test_everything_is_told_at_once(folder):
    (folder/'subj-01/anat/fa.nii.gz').unlink()
    (folder/'subj-02/bundles/bundle_a.trk').write_bytes(b'TRACK')
    folder.edit_image('subj-03/masks/wm.nii.gz', lambda d, a: (d[:-1], a))
    problem = folder.refused('subj-01', 'subj-02', 'subj-03', 'subj-09', parts=4, testing=['subj-09'])
    assert {p.subject for p in problem.problems} == {'subj-01', 'subj-02', 'subj-03', 'subj-09'}

@pytest.mark.parametrize('name', ['subj-01/dwi/sh5.nii.gz', 'subj-02/masks/wm.nii.gz', 'subj-03/bundles/bundle_b.trk'])
@pytest.mark.parametrize('part', [.1, .7])
def test_files_cut_short(folder, name, part):
    whole = (folder/name).read_bytes()
    (folder/name).write_bytes(whole[:int(len(whole)*part)])
    folder.refused('cannot be read', f'subject {name[:7]}', Path(name).name, 'Expected', 'To do')

@pytest.mark.parametrize('kind', ['.tck', '.trx'])
def test_other_tractograms_cut_short(folder, kind):
    lines = load_tractogram(folder/'subj-02/bundles/bundle_a.trk')
    save_tractogram(lines, folder/f'subj-02/bundles/bundle_a{kind}', drop_dps=True)
    whole = (folder/f'subj-02/bundles/bundle_a{kind}').read_bytes()
    (folder/f'subj-02/bundles/bundle_a{kind}').write_bytes(whole[:len(whole)*2//3])
    folder.config['streamlines'] = {'type': 'streamlines', 'files': f'bundles/*{kind}'}
    folder.lists.update(training=['subj-02'], validation=[], testing=[])
    folder.refused('cannot be read', 'subject subj-02', f'bundle_a{kind}', f'a whole {kind} file')

def test_not_the_right_kind_of_file(folder):
    folder.config['input']['files'] = ['connectivity.npy']
    folder.refused('not a NIfTI file', 'connectivity.npy', parts=4)
    folder.config['input']['files'] = ['anat/fa.nii.gz']; folder.config['streamlines']['files'] = ['anat/fa.nii.gz']
    folder.refused('not a tractogram', parts=4)

@pytest.mark.parametrize('values,says', [(np.zeros((21, 20, 15), np.complex64), 'no plain numbers'), (np.zeros((21, 20, 15, 0), np.float32), 'none of length 0'),
                                         (np.zeros((21, 20, 15), [(c, np.uint8) for c in 'RGB']), 'no plain numbers')])
def test_images_without_plain_numbers(folder, values, says):
    nib.save(nib.Nifti1Image(values, nib.load(folder/'subj-02/anat/fa.nii.gz').affine), folder/'subj-02/anat/fa.nii.gz')
    folder.refused(says, 'subject subj-02', 'group input', 'fa.nii.gz', 'Expected', 'Found')

# ---- grids, features, frames

def test_grids_of_one_subject(folder):
    folder.edit_image('subj-02/anat/fa.nii.gz', lambda d, a: (d, a + np.diag([0, 0, .01, 0])))
    folder.refused('different grids', 'subject subj-02', 'group input', 'fa.nii.gz', 'To do')
    folder.edit_image('subj-02/anat/fa.nii.gz', lambda d, a: (d[:, :, :-1], a))
    folder.refused('different grids', 'Expected: Grid(21 x 20 x 15', 'Found: Grid(21 x 20 x 14')

def test_tractogram_of_another_image(folder):
    shutil.copy(folder/'subj-01/bundles/bundle_a.trk', folder/'subj-02/bundles/bundle_a.trk')
    refused = folder.refused('does not fit the reference image', 'subject subj-02', 'group streamlines', 'bundle_a.trk', 'Expected', 'Found', 'To do')
    assert refused.expected != refused.found

def test_voxel_orders(folder):
    def flip(d, a):
        a[:3, 3] += a[:3, 0]*(d.shape[0] - 1); a[:3, 0] *= -1
        return d[::-1], a
    for name in ('dwi/sh5', 'anat/fa', 'masks/wm'): folder.edit_image(f'subj-03/{name}.nii.gz', flip)
    for x in 'ab':
        old = load_tractogram(folder/f'subj-03/bundles/bundle_{x}.trk')
        save_tractogram(Tractogram(old.lines, grid_of(folder/'subj-03/anat/fa.nii.gz'), old.dps), folder/f'subj-03/bundles/bundle_{x}.trk')
    folder.refused('voxel orders differ', 'LAS in subj-03', 'RAS in subj-01, subj-02, subj-04', 'To do')

def test_number_of_features(folder):
    folder.edit_image('subj-04/dwi/sh5.nii.gz', lambda d, a: (d[..., :4], a))
    folder.refused('number of features differs', 'group input', '5 in subj-04', '6 in subj-01')

def test_world_directions_on_an_oblique_grid(folder):
    folder.config['input']['frame'] = 'world'
    folder.refused('world axes on an oblique grid', 'subject subj-02', 'group input', 'To do')            # subj-02 is turned by 15 degrees
    folder.config['input']['frame'] = 'image'
    with h5py.File(folder.made().path) as f: assert f['subj-02/input'].attrs['frame'] == 'image' and 'frame' not in f['subj-02/wm_mask'].attrs

def test_data_per_streamline(folder):
    folder.config['streamlines']['dps_keys'] = ['color', 'weight']
    folder.refused("no data per streamline 'color'", "Did you mean 'colour'?", 'bundle_a.trk', parts=8)

def test_width_of_data_per_streamline(folder):
    folder.config['streamlines']['dps_keys'] = ['weight']
    for x in 'ab':
        old = load_tractogram(folder/f'subj-03/bundles/bundle_{x}.trk')
        save_tractogram(Tractogram(old.lines, old.grid, {'weight': np.ones((len(old), 3))}), folder/f'subj-03/bundles/bundle_{x}.trk')
    folder.refused("the width of the data per streamline 'weight' differs", '3 in subj-03', 'group streamlines')

def test_data_that_float32_cannot_hold(folder):
    folder.config['streamlines'] = {'type': 'streamlines', 'files': 'bundles/bundle_a.*', 'dps_keys': ['id']}
    from trx.trx_file_memmap import load, save
    for i in range(1, 5):
        path = folder/f'subj-0{i}/bundles/bundle_a.trk'
        save_tractogram(load_tractogram(path), path.with_suffix('.trx')); path.unlink()
        trx = load(str(path.with_suffix('.trx')))
        trx.data_per_streamline = {'id': np.arange(60)[:, None] + (2**24 if i == 3 else 0)}
        save(trx, str(folder/'new.trx')); trx.close()
        os.replace(folder/'new.trx', path.with_suffix('.trx'))
    folder.refused("the data per streamline 'id' do not fit into float32", 'subject subj-03', 'bundle_a.trx', 'Found: 16777217')

def test_empty_tractogram_beside_full_ones(folder):
    old = load_tractogram(folder/'subj-02/bundles/bundle_a.trk')
    for x in 'ab': save_tractogram(old[:0], folder/f'subj-02/bundles/bundle_{x}.trk')
    with pytest.warns(UserWarning, match='no streamline is left'): summary = folder.create()
    with h5py.File(summary.path) as f: assert f['subj-02/streamlines/data_per_streamline/colour'].shape[0] == 0
    assert check_study(summary.path).ok

def test_connectivity(folder):
    np.save(folder/'subj-02/connectivity.npy', np.zeros((27, 27)))
    folder.refused('wrong shape', 'Expected: (64, 64)', 'Found: (27, 27)', 'subject subj-02')
    np.save(folder/'subj-02/connectivity.npy', np.full((64, 64), np.nan))
    folder.refused('the connectivity matrix holds NaN', 'subject subj-02', 'group streamlines')
    np.save(folder/'subj-02/connectivity_2.npy', np.zeros((64, 64)))
    folder.config['streamlines']['connectivity_matrix'] = 'connectivity*.npy'
    folder.refused('several files match', 'subject subj-02', 'connectivity.npy, connectivity_2.npy')

# ---- contents

@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_in_a_volume(folder, bad):
    def spoil(d, a): d[3, 3, 3] = bad; return d, a
    folder.edit_image('subj-03/dwi/sh5.nii.gz', spoil)
    folder.refused('NaN or infinite values', 'subject subj-03', 'group input', 'sh5.nii.gz', '1 voxels', 'To do')

def test_nan_in_a_line(folder):
    def spoil(lines): lines[7][0, 1] = float('nan')
    folder.edit_lines('subj-02/bundles/bundle_b.trk', spoil)
    folder.refused('NaN or infinite coordinates', 'subject subj-02', 'group streamlines', 'bundle_b.trk', '1 of 60 streamlines, number [7]')

def test_contents_are_told_together(folder):
    def spoil(d, a): d[3, 3, 3] = np.nan; return d, a
    for s in ('subj-01', 'subj-04'): folder.edit_image(f'{s}/masks/wm.nii.gz', spoil)
    folder.refused('subj-01', 'subj-04', parts=2)

def test_images_of_zeros_cannot_be_standardised(folder):
    folder.edit_image('subj-02/anat/fa.nii.gz', lambda d, a: (d*0, a))
    folder.refused('no voxel to standardise over', 'subject subj-02', 'group input', 'fa.nii.gz')

def test_lines_without_direction_and_repeated_points(folder):
    def spoil(lines):
        lines[3] = lines[3][:1]                                             # one point
        lines[5] = lines[5][:1].repeat(4, 1)                                # no length
        lines[8] = torch.cat([lines[8][:1], lines[8]])                       # a repeated point
    before = load_tractogram(folder/'subj-01/bundles/bundle_a.trk')
    folder.edit_lines('subj-01/bundles/bundle_a.trk', spoil)
    summary = folder.made()
    assert any('subject subj-01, group streamlines: 2 streamlines of fewer than two different points were left out' in w for w in summary.warnings)
    assert any('1 points that repeated the one before were kept once' in w for w in summary.warnings)
    with h5py.File(summary.path) as f:
        group = f['subj-01/streamlines']
        kept = np.delete(np.arange(60), [3, 5])
        np.testing.assert_array_equal(group['lengths'][:58], before.lines.lengths.numpy()[kept])
        np.testing.assert_allclose(group['data_per_streamline/weight'][:58], before.dps['weight'][kept])         # the data moved with the lines
        report = json.loads(group.attrs['report'])
        assert report == dict(read=120, kept=118, without_direction=2, repeated_points=1, outside=0, removed_outside=0)
        assert (np.diff(group['data'][()], axis=0) != 0).any(1).all()

@pytest.mark.parametrize('remove,kept', [(False, 120), (True, 118), ('refuse', None)])
def test_lines_that_leave_the_volume(folder, remove, kept):
    def spoil(lines):
        for i in (4, 9): lines[i][-1] += 100
    folder.edit_lines('subj-04/bundles/bundle_a.trk', spoil)
    if kept is None:
        folder.refused('leave the volume', 'subject subj-04', 'bundle_a.trk', '2 of 60 lines outside, number [4, 9]', 'To do', remove_invalid=remove)
        return
    summary = folder.made(remove_invalid=remove)
    assert any(f"2 streamlines {'that leave the volume were left out' if remove else 'leave the volume and were kept'}" in w for w in summary.warnings)
    with h5py.File(summary.path) as f: assert f['subj-04/streamlines/lengths'].shape == (kept,)

# ---- where it goes

def test_a_study_of_that_name(folder):
    (folder.out/'study.hdf5').write_text('precious')
    with pytest.raises(DataProblem, match='there is a file of that name already'): folder.create()
    assert (folder.out/'study.hdf5').read_text() == 'precious'
    def spoil(d, a): d[3, 3, 3] = np.nan; return d, a
    image = (folder/'subj-04/masks/wm.nii.gz').read_bytes()
    folder.edit_image('subj-04/masks/wm.nii.gz', spoil)
    with pytest.raises(DataProblem, match='NaN'): folder.create(overwrite=True)
    assert sorted(p.name for p in folder.out.iterdir()) == ['.study.parts', 'study.hdf5'] and (folder.out/'study.hdf5').read_text() == 'precious'      # a failed attempt costs nothing
    (folder/'subj-04/masks/wm.nii.gz').write_bytes(image)
    folder.made(overwrite=True)
    with pytest.raises(DataProblem, match='extension .hdf5'): folder.create(hdf5_file=folder.out/'study.h5')
    with pytest.raises(DataProblem, match='one way only'): folder.create(step_size=1, nb_points=4, overwrite=True)
    with pytest.raises(DataProblem, match='must be positive'): folder.create(step_size=0, overwrite=True)
    with pytest.raises(DataProblem, match='nb_points must be a whole number'): folder.create(nb_points=2.5, overwrite=True)
    with pytest.raises(DataProblem, match='step_size must be a number'): folder.create(step_size='1', overwrite=True)

def full_disk(where, size_kb):
    "Mount a small file system at a folder, if that is allowed here."
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size_kb}k', 'tmpfs', str(where)], capture_output=True) if os.geteuid() == 0 and shutil.which('mount') else None
    return done is not None and done.returncode == 0

@pytest.mark.parametrize('room_kb', [24, 300, 700])
def test_disk_full(folder, monkeypatch, room_kb):
    if not full_disk(folder.out, room_kb): pytest.skip('a small file system can be mounted by root only')
    try:
        folder.refused('no room', 'Expected', 'Found', 'To do') if room_kb < 700 else None             # known beforehand, from the headers
        monkeypatch.setattr(create, 'check_room', lambda *args: None)
        refused = folder.refused('the disk is full', 'Expected', 'Found', 'To do')                        # found out while writing
        finished = len(list(folder.out.glob('.study.parts/*.hdf5')))
        assert (f'{finished} finished subjects' if finished else 'nothing was left behind') in str(refused) and finished == {24: 0, 300: 1, 700: 2}[room_kb]
    finally: subprocess.run(['umount', str(folder.out)], check=True)

def test_file_size_limit(folder):
    "The same where no file system can be mounted: the system refuses to let the file grow."
    code = f"""
import resource, sys
import dwiml_nb.study.create as create
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: create.create_study({str(folder.sources)!r}, {str(folder.out/'study.hdf5')!r}, {folder.config!r}, *{list(folder.lists.values())!r})
except create.DataProblem as e: print(e); sys.exit(7)
"""
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert run.returncode == 7 and 'the disk is full' in run.stdout, run.stdout + run.stderr
    assert [p.name for p in folder.out.rglob('*') if '.partial' in p.name or p.name == 'study.hdf5'] == []

def test_killed_while_writing(folder):
    "SIGKILL half-way: nothing under the final name, and the next attempt succeeds."
    code = f"""
import os, time
from dwiml_nb.study import create, parts
make,done = parts.make_part, []
def slow(*args, **kwargs):
    if done: print('one', flush=True); time.sleep(60)
    done.append(make(*args, **kwargs)); return done[-1]
parts.make_part = slow
create.create_study({str(folder.sources)!r}, {str(folder.out/'study.hdf5')!r}, {folder.config!r}, *{list(folder.lists.values())!r})
"""
    run = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout.readline() == b'one\n'
    run.send_signal(signal.SIGKILL); run.wait()
    assert not (folder.out/'study.hdf5').exists() and all(p.name.startswith('.') for p in folder.out.iterdir())
    assert [r.taken for r in folder.made().reports] == [True, False, False, False]

# ---- opening

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp('toy'))

def spoiled(toy, tmp_path, change):
    path = tmp_path/'study.hdf5'
    shutil.copy(toy, path)
    with h5py.File(path, 'r+') as f: change(f)
    return path

@pytest.mark.parametrize('part', [.02, .5, .99])
def test_truncated_study(toy, tmp_path, part):
    whole = toy.read_bytes()
    (tmp_path/'cut.hdf5').write_bytes(whole[:int(len(whole)*part)])
    for opening in (MultiSubjectDataset, describe_study):
        with pytest.raises(DataProblem, match='damaged or was cut short.*Expected.*Found.*To do'): opening(tmp_path/'cut.hdf5')

def test_not_a_study(tmp_path):
    (tmp_path/'text.hdf5').write_text('not at all')
    with h5py.File(tmp_path/'other.hdf5', 'w') as f: f['x'] = 1
    for name,says in dict(none='no such study', text='not an HDF5 file', other='not a study').items():
        with pytest.raises(DataProblem, match=says): MultiSubjectDataset(tmp_path/f'{name}.hdf5')

def test_names_that_are_not_there(toy):
    dataset = MultiSubjectDataset(toy, lazy=True)
    with pytest.raises(DataProblem, match="no volume group 'inputs'.*Did you mean 'input'?"): dataset.load_data(volume_groups=['inputs'])
    with pytest.raises(DataProblem, match="no streamlines group 'bundle'.*Did you mean 'bundles'?"): dataset.load_data(streamline_groups='bundle')
    dataset.load_data()
    with pytest.raises(DataProblem, match="subject sub-01: no streamlines group 'streamlines'"): dataset.training.get_lines(0, 'streamlines')
    with pytest.raises(DataProblem, match="Did you mean 'wm_mask'?"): dataset.training.get_volume(0, 'wm_msk')
    with pytest.raises(DataProblem, match="Did you mean 'training'?"): dataset.subset('trainig')
    one = dataset.training.subject(0)
    for names,wrong,says in ((dataset.nb_features, 'inputs', "no volume group 'inputs'. Did you mean 'input'? Expected: input or seed_mask or wm_mask"), (dataset.subjects, 'train', "no subset 'train'. Did you mean 'training'?"),
                             (one.volumes, 'bundles', "subject sub-01: no volume group 'bundles'. Expected: input or"), (one.streamlines, 'bundle', "no streamlines group 'bundle'. Did you mean 'bundles'?"), (one.groups, 'wm', "no group 'wm'"), (dataset.nb_features, 7, "no volume group '7'")):
        with pytest.raises(DataProblem) as caught: names[wrong]
        assert says in str(caught.value) and isinstance(caught.value, KeyError) and wrong not in names and names.get(wrong) is None
    with pytest.raises(IndexError, match='one list, found one of'): dataset.training.get_lines(0, 'bundles', [[3, 4]])
    with pytest.raises(IndexError, match='streamline 120 of 120'): dataset.training.get_lines(0, 'bundles', [3, 120])
    with pytest.raises(IndexError, match='a mask of 3 for 120'): dataset.training.get_lines(0, 'bundles', np.ones(3, bool))
    dataset.close()

@pytest.mark.parametrize('change,words', [
    (lambda f: f['sub-02'].__delitem__('input'), 'subject sub-02, group input.*the volume group is missing.*Expected.*Found'),
    (lambda f: f['sub-03'].move('bundles', 'bundels'), "subject sub-03, group bundles.*missing.*Did you mean 'bundels'?"),
    (lambda f: (f['sub-02/input'].__delitem__('data'), f['sub-02/input'].create_dataset('data', data=np.zeros((16, 16, 5, 6), np.float32))), 'another number of features.*Expected: 15. Found: 6'),
    (lambda f: [f['sub-04'][g].attrs.__setitem__('affine', np.diag([-2., 2, 2, 1])) for g in f['sub-04']], 'voxel orders differ.*LAS in sub-04'),
    (lambda f: f['sub-01/bundles'].attrs.__setitem__('space', 'Space.WORLD'), 'the space of the streamlines is unknown.*Space.WORLD'),
    (lambda f: f['sub-01/bundles'].attrs.__setitem__('affine', np.zeros((4, 4))), 'affine cannot be inverted'),
    (lambda f: f.__delitem__('sub-02'), 'subjects are listed that the study does not hold'),
    (lambda f: f.attrs.__delitem__('training_subjs'), 'not a study')])
def test_studies_that_do_not_agree(toy, tmp_path, change, words):
    path = spoiled(toy, tmp_path, change)
    other = shutil.copy(path, tmp_path/'without_index.hdf5')
    with h5py.File(other, 'r+') as f:                                  # with its index, a lazy dataset would tell at the first use
        for key in INDEX_KEYS: del f.attrs[key]
    for file,lazy in ((path, False), (other, True)):
        with pytest.raises(DataProblem, match=words): MultiSubjectDataset(file, lazy=lazy).load_data()

def test_extra_groups_are_ignored(toy, tmp_path):
    dataset = MultiSubjectDataset(spoiled(toy, tmp_path, lambda f: f.copy('sub-02/input', f['sub-02'], 'more')), lazy=True).load_data()
    assert list(dataset.training.subject('sub-02').volumes) == ['input', 'seed_mask', 'wm_mask']
    dataset.close()

def test_a_study_replaced_meanwhile(toy, tmp_path):
    path = spoiled(toy, tmp_path, lambda f: None)
    dataset = MultiSubjectDataset(path, lazy=True).load_data()
    expected = dataset.training.get_lines(0, 'bundles', [1]).data
    shutil.copy(REFERENCE/'study_v1.hdf5', tmp_path/'new.hdf5'); os.replace(tmp_path/'new.hdf5', path)
    assert torch.equal(dataset.training.get_lines(0, 'bundles', [1]).data, expected)                  # the open file is still the old one
    dataset.close()
    with pytest.raises(DataProblem, match='has changed since it was first opened'): dataset.training.get_volume(0, 'input')
