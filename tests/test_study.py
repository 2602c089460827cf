"""The study: dwi_ml's file read here, the same file built here from its sources, eager and lazy alike, in workers too.

tests/data/dwi_ml_study holds a study written by dwi_ml 1.0 and the (synthetic) subject folders it was made from.
"""
import glob
import json
import multiprocessing
import pickle
import shutil
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.space import convert
from dwiml_nb.core.tractograms import load_tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.stored import mapped_address
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.describe import describe_study
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.schema import group_grid
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.tracker import Tracker

REFERENCE = Path(__file__).parent/'data'/'dwi_ml_study'
OURS = {'/': {'remove_invalid', 'groups_config_json', 'dwiml_nb_format', 'dwiml_nb_version', *INDEX_KEYS}, 'volume': {'frame'}, 'streamlines': {'report'}}       # docs/file_format.md
quiet = pytest.mark.filterwarnings('ignore:.*oblique')


def build(folder, sources=REFERENCE/'sources', name='study.hdf5', **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return create_study(sources, Path(folder)/name, sources/'config.json', *(sources/f'{s}.txt' for s in SUBSETS), **options)


@pytest.fixture(scope='module')
def ours(tmp_path_factory): return build(tmp_path_factory.mktemp('built')).path

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp('toy'))


def objects(file):
    "All groups and datasets of a file by name, the root too."
    found = {'/': file}
    file.visititems(lambda name, o: found.__setitem__(name, o))
    return found

# ---- the reference study, and ours from the same sources

def test_same_names(ours):
    with h5py.File(REFERENCE/'study_v1.hdf5') as a, h5py.File(ours) as b: assert set(objects(a)) == set(objects(b))

def test_same_attributes(ours):
    "Name, dtype, shape, string form and value of every attribute, apart from the stated additions."
    with h5py.File(REFERENCE/'study_v1.hdf5') as a, h5py.File(ours) as b:
        for name,theirs in objects(a).items():
            mine = objects(b)[name]
            extra = set(mine.attrs) - set(theirs.attrs)
            assert set(theirs.attrs) <= set(mine.attrs) and extra <= OURS.get('/' if name == '/' else theirs.attrs.get('type'), set()), name
            for key in theirs.attrs:
                x,y = (o.attrs.get_id(key) for o in (theirs, mine))
                assert (x.dtype, x.shape) == (y.dtype, y.shape) and h5py.check_string_dtype(x.dtype) == h5py.check_string_dtype(y.dtype), (name, key)
                if key == 'chosen_subjs': assert sorted(theirs.attrs[key]) == sorted(mine.attrs[key])         # the reference's order is arbitrary
                elif key != 'data_and_time': np.testing.assert_array_equal(theirs.attrs[key], mine.attrs[key], err_msg=f'{name} {key}')

def test_same_numbers(ours):
    with h5py.File(REFERENCE/'study_v1.hdf5') as a, h5py.File(ours) as b:
        for name,theirs in objects(a).items():
            if not isinstance(theirs, h5py.Dataset): continue
            mine = objects(b)[name]
            assert (theirs.dtype, theirs.shape, theirs.chunks, theirs.compression) == (mine.dtype, mine.shape, mine.chunks, mine.compression), name
            approximate = name.endswith(('streamlines/data', 'euclidean_lengths'))
            np.testing.assert_allclose(mine[()], theirs[()], rtol=0, atol=1e-5 if approximate else 0, err_msg=name)

def test_config_copy(ours): assert ours.with_suffix('.json').read_bytes() == (REFERENCE/'study_v1.json').read_bytes()

@quiet
@pytest.mark.parametrize('lazy', [True, False])
def test_opening_the_reference_study(lazy):
    dataset = MultiSubjectDataset(REFERENCE/'study_v1.hdf5', lazy=lazy).load_data()
    assert dataset.nb_features == {'input': 6, 'wm_mask': 1} and dataset.streamline_groups == ['streamlines']
    assert [dataset.subset(s).subjects for s in SUBSETS] == [['subj-01', 'subj-02'], ['subj-03'], ['subj-04']]
    with h5py.File(REFERENCE/'study_v1.hdf5') as f:
        group = f['subj-02/streamlines']
        sft = dataset.training.streamlines_of(1, 'streamlines')
        np.testing.assert_array_equal(sft.get_lines().data.numpy(), group['data'][()].astype(np.float32))
        np.testing.assert_array_equal(sft.get_dps([5, 2])['colour'], group['data_per_streamline/colour'][()][[5, 2]])
        np.testing.assert_array_equal(sft.lengths_mm, group['euclidean_lengths'][()])
        np.testing.assert_array_equal(dataset.training.get_volume(1, 'input').numpy(), f['subj-02/input/data'][()])
        matrix,dimensions,blocs,labels = sft.get_connectivity_matrix_and_info()
        assert dimensions == (21, 20, 15) and blocs == [4, 4, 4] and labels is None and (matrix == group['connectivity_matrix'][()]).all()
    assert 'subj-04' in repr(describe_study(REFERENCE/'study_v1.hdf5'))
    dataset.close()

@quiet
def test_world_points_are_those_of_the_source_files():
    dataset = MultiSubjectDataset(REFERENCE/'study_v1.hdf5', lazy=True).load_data()
    for subset in SUBSETS:
        for s in dataset.subset(subset).data:
            source = [load_tractogram(REFERENCE/'sources'/s.subj_id/'bundles'/f'bundle_{x}.trk').lines.data for x in 'ab']
            torch.testing.assert_close(s.streamlines['streamlines'].as_tractogram().lines.data, torch.cat(source), rtol=0, atol=1e-4)
    dataset.close()

# ---- making a study

def test_several_processes_make_the_same_file(ours, tmp_path):
    build(tmp_path, n_procs=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['study.hdf5', 'study.json']
    with h5py.File(ours) as a, h5py.File(tmp_path/'study.hdf5') as b:
        for name,x in objects(a).items():
            y = objects(b)[name]
            if isinstance(x, h5py.Dataset): np.testing.assert_array_equal(x[()], y[()]); assert y.chunks is None
            for key in set(x.attrs) - {'data_and_time'}: np.testing.assert_array_equal(x.attrs[key], y.attrs[key])

def test_channel_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    "Fault 12.1.2: wildcards in the order of the file system."
    import nibabel as nib
    for s in ('a', 'b'):
        (tmp_path/'in'/s).mkdir(parents=True)
        for i in (1, 2, 10): nib.save(nib.Nifti1Image(np.full((3, 3, 3), i, np.float32), np.eye(4)), tmp_path/'in'/s/f'x{i}.nii.gz')
    config = {'x': {'type': 'volume', 'files': 'x*.nii.gz', 'standardization': 'none'}}
    found,orders = glob.glob, []
    for scramble in (lambda p: list(reversed(sorted(found(p)))), lambda p: sorted(found(p), key=len)):
        monkeypatch.setattr(glob, 'glob', scramble)
        with h5py.File(create_study(tmp_path/'in', tmp_path/'out.hdf5', config, ['a'], ['b'], overwrite=True).path) as f:
            orders += [f[s]['x/data'][0, 0, 0].tolist() for s in 'ab']
    assert orders == [[1, 10, 2]]*4

def test_a_feature_of_zeros_does_not_empty_the_mask(tmp_path):
    "Fault 12.1.16: one channel that is zero everywhere turned the whole volume into NaN."
    import nibabel as nib
    (tmp_path/'in'/'a').mkdir(parents=True)
    data = np.random.default_rng(0).random((5, 5, 5, 3)).astype(np.float32) + 1
    data[..., 1] = 0
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path/'in'/'a'/'x.nii.gz')
    for how in ('all', 'independent', 'per_file'):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            path = create_study(tmp_path/'in', tmp_path/'out.hdf5', {'x': {'type': 'volume', 'files': 'x.nii.gz', 'standardization': how}}, ['a'], overwrite=True).path
        with h5py.File(path) as f: values = f['a/x/data'][()]
        assert np.isfinite(values).all() and values.std() > .1 and np.abs(values).max() < 100
        assert any('constant' in str(w.message) for w in told) == (how == 'independent')

@pytest.mark.parametrize('options,check', [
    (dict(step_size=.5), lambda n, mm: np.array_equal(n, np.maximum(2, np.ceil(mm.astype(np.float32)/np.float32(.5))))),
    (dict(nb_points=7), lambda n, mm: set(n.tolist()) == {7}),
    (dict(compress=.1), lambda n, mm: n.mean() < 15)])
def test_points_are_placed_as_asked(tmp_path, ours, options, check):
    path = build(tmp_path, **options).path
    key,value = next(iter(options.items()))
    with h5py.File(path) as f, h5py.File(ours) as plain:
        assert f.attrs[key] == value and sum(f.attrs[k] == 'Not defined by user' for k in ('step_size', 'nb_points', 'compress')) == 2
        for s in f:
            group,before = f[s]['streamlines'], plain[s]['streamlines']
            assert check(group['lengths'][()], before['euclidean_lengths'][()])
            np.testing.assert_allclose(group['data'][()][group['offsets'][()]], before['data'][()][before['offsets'][()]], atol=1e-4)      # first points stay
            assert (group['euclidean_lengths'][()] <= before['euclidean_lengths'][()] + 1e-3).all()

@pytest.mark.parametrize('kind', ['.trk', '.tck', '.trx'])
def test_every_format_gives_the_same_points(tmp_path, ours, kind):
    sources = tmp_path/'in'
    shutil.copytree(REFERENCE/'sources', sources)
    config = json.loads((sources/'config.json').read_text())
    for path in sorted(sources.glob('*/bundles/*.trk')):
        lines = load_tractogram(path)
        path.unlink()
        save_tractogram(lines, path.with_suffix(kind), drop_dps=True)
    config['streamlines']['files'] = 'bundles/*'
    if kind == '.tck': del config['streamlines']['dps_keys']
    (sources/'config.json').write_text(json.dumps(config))
    with h5py.File(build(tmp_path, sources).path) as f, h5py.File(ours) as g:
        for s in f:
            np.testing.assert_allclose(f[s]['streamlines/data'][()], g[s]['streamlines/data'][()], rtol=0, atol=1e-4)
            if kind != '.tck': np.testing.assert_allclose(f[s]['streamlines/data_per_streamline/colour'][()], g[s]['streamlines/data_per_streamline/colour'][()], atol=1e-6)

def test_labels_and_intermediate_files(tmp_path):
    import nibabel as nib
    sources = tmp_path/'in'
    shutil.copytree(REFERENCE/'sources', sources)
    config = json.loads((sources/'config.json').read_text())
    for folder in sources.glob('subj-*'):
        fa = nib.load(folder/'anat'/'fa.nii.gz')
        nib.save(nib.Nifti1Image((np.arange(np.prod(fa.shape)).reshape(fa.shape) % 7).astype(np.int16), fa.affine), folder/'labels.nii.gz')
        np.save(folder/'connectivity.npy', np.tril(np.ones((7, 7))))
    del config['streamlines']['connectivity_nb_blocs']
    config['streamlines']['connectivity_labels'] = 'labels.nii.gz'
    (sources/'config.json').write_text(json.dumps(config))
    build(tmp_path, sources, save_intermediate=True)
    with h5py.File(tmp_path/'study.hdf5') as f:
        group = f['subj-01/streamlines']
        assert group.attrs['connectivity_matrix_type'] == 'from_labels' and 'connectivity_nb_blocs' not in group.attrs
        assert group['connectivity_label_volume'].dtype.kind == 'i' and group['connectivity_label_volume'].shape == (20, 22, 14)
        assert (group['connectivity_matrix'][()] == np.triu(np.ones((7, 7), bool))).all()
    folder, = tmp_path.glob('intermediate_*')
    assert {f'subj-0{i}_{g}' for i in (1, 2, 3, 4) for g in ('input.nii.gz', 'wm_mask.nii.gz', 'streamlines.trk')} == {p.name for p in folder.iterdir()}
    assert len(load_tractogram(folder/'subj-02_streamlines.trk', sources/'subj-02'/'anat'/'fa.nii.gz')) == 120

# ---- eager and lazy, and files from elsewhere

def foreign(path, source, how):
    "A copy of a study as somebody else might have written it, same content."
    shutil.copy(source, path)
    with h5py.File(path, 'r+') as f:
        for s in list(f):
            for name in [g for g in f[s] if f[s][g].attrs['type'] == 'streamlines']:
                g = f[s][name]
                data,offsets,lengths = g['data'][()], g['offsets'][()], g['lengths'][()]
                attrs,keep = {}, {}
                if how == 'chunked': keep = dict(chunks=(64, 3), compression='gzip')
                if how == 'float32': data = data.astype('>f4')
                if how == 'center': data,attrs = data - .5, dict(space='vox', origin='Origin.NIFTI')
                if how == 'rasmm': data,attrs = convert(data, group_grid(g), 'vox', 'rasmm'), dict(space='Space.RASMM', origin='Origin.NIFTI')
                if how == 'shuffled':                                                # the lines lie in the file in another order than they are counted
                    order = np.random.default_rng(0).permutation(len(lengths))
                    data = np.concatenate([data[offsets[i]:offsets[i] + lengths[i]] for i in order])
                    new = np.zeros_like(offsets); new[order] = np.cumsum(lengths[order]) - lengths[order]
                    offsets = new
                for key,value in (('data', data), ('offsets', offsets), ('lengths', lengths.astype(np.int16))):
                    del g[key]
                    g.create_dataset(key, data=value, **(keep if key == 'data' else {}))
                if how == 'no_mm': del g['euclidean_lengths']
                g.attrs.update(attrs)
    return path

@pytest.fixture(scope='module', params=['as_is', 'chunked', 'float32', 'center', 'rasmm', 'shuffled', 'no_mm'])
def pair(request, tmp_path_factory):
    "A study as some library may have written it, opened lazily and eagerly, with the original beside."
    path = foreign(tmp_path_factory.mktemp('foreign')/'study.hdf5', REFERENCE/'study_v1.hdf5', request.param)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        three = [MultiSubjectDataset(p, lazy=lazy).load_data() for p,lazy in ((path, True), (path, False), (REFERENCE/'study_v1.hdf5', False))]
    yield three
    for d in three: d.close()

ids_of_120 = st.one_of(st.none(), st.integers(-120, 119), st.lists(st.integers(-120, 119), max_size=30), st.lists(st.booleans(), min_size=120, max_size=120).map(np.array),
                       st.builds(slice, *[st.one_of(st.none(), st.integers(-130, 130))]*2, st.one_of(st.none(), st.integers(-5, 5).filter(bool))))

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(ids=ids_of_120, subset=st.sampled_from(SUBSETS))
def test_lazy_is_eager_is_the_original(pair, ids, subset):
    lazy,eager,original = (d.subset(subset).streamlines_of(0, 'streamlines') for d in pair)
    a,b,c = (s.get_lines(ids) for s in (lazy, eager, original))
    assert torch.equal(a.data, b.data) and torch.equal(a.offsets, b.offsets) and torch.equal(a.offsets, c.offsets)
    torch.testing.assert_close(a.data, c.data, rtol=0, atol=1e-5)
    for x in ('weight', 'colour'): assert np.array_equal(lazy.get_dps(ids)[x], eager.get_dps(ids)[x]) and np.array_equal(lazy.get_dps(ids)[x], original.get_dps(ids)[x])
    assert torch.equal(lazy.as_tractogram(ids).lines.data, eager.as_tractogram(ids).lines.data)

def test_every_other_accessor(pair):
    for subset in SUBSETS:
        lazy,eager,original = (d.subset(subset) for d in pair)
        for f in ('nb_streamlines', 'streamline_lengths', 'total_nb_points', 'total_nb_streamlines', 'streamline_ids_per_subj'):
            for other in (eager, original): np.testing.assert_equal(getattr(lazy, f)('streamlines'), getattr(other, f)('streamlines'))
        for i in range(len(lazy)):
            np.testing.assert_array_equal(lazy.streamline_lengths_mm('streamlines')[i], eager.streamline_lengths_mm('streamlines')[i])
            np.testing.assert_allclose(lazy.streamline_lengths_mm('streamlines')[i], original.streamline_lengths_mm('streamlines')[i], rtol=0, atol=1e-3)
            assert lazy.streamline_lengths('streamlines')[i].dtype == np.int64                     # int16 in the file: sums would overflow
            for g in ('input', 'wm_mask'):
                assert torch.equal(lazy.get_volume(i, g), eager.get_volume(i, g)) and lazy.grid(i, g) == eager.grid(i, g)
            a,b = (s.streamlines_of(i, 'streamlines').get_connectivity_matrix_and_info() for s in (lazy, eager))
            assert np.array_equal(a[0], b[0]) and a[1:] == b[1:]

def test_opening_lazily_reads_no_values(monkeypatch):
    def refuse(self, *args, **kwargs): raise AssertionError(f"{self.name} was read")
    monkeypatch.setattr(h5py.Dataset, '__getitem__', refuse)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        dataset = MultiSubjectDataset(REFERENCE/'study_v1.hdf5', lazy=True).load_data()
    assert dataset.training.nb_streamlines('streamlines').tolist() == [120, 120] and 'subj-01' in repr(dataset)
    dataset.close()

def test_an_empty_group(tmp_path):
    "No streamlines: a dataset without an address in the file."
    from dwiml_nb.core.ragged import Ragged
    from dwiml_nb.core.tractograms import Tractogram
    sources = tmp_path/'in'
    shutil.copytree(REFERENCE/'sources', sources)
    for x in 'ab':
        path = sources/'subj-01'/'bundles'/f'bundle_{x}.trk'
        whole = load_tractogram(path)
        save_tractogram(Tractogram(Ragged.from_list([]), whole.grid), path)
    config = json.loads((sources/'config.json').read_text())
    del config['streamlines']['dps_keys']
    (sources/'config.json').write_text(json.dumps(config))
    summary = build(tmp_path, sources)
    assert any('no streamline is left' in w and 'subj-01' in w for w in summary.warnings)
    with h5py.File(summary.path) as f: assert mapped_address(f['subj-01/streamlines/data']) is None
    for lazy in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            dataset = MultiSubjectDataset(summary.path, lazy=lazy).load_data()
        assert dataset.training.nb_streamlines('streamlines').tolist() == [0, 120]
        assert dataset.training.get_lines(0, 'streamlines').data.shape == (0, 3)
        assert dataset.training.streamline_lengths_mm('streamlines')[0].shape == (0,)
        dataset.close()

def test_groups_keep_the_callers_order(toy):
    "Fault 12.1.17: chosen groups were put in alphabetical order."
    dataset = MultiSubjectDataset(toy, lazy=True).load_data(volume_groups=['wm_mask', 'input', 'seed_mask'], streamline_groups=[])
    assert dataset.volume_groups == list(dataset.training.subject(0).volumes) == ['wm_mask', 'input', 'seed_mask'] and dataset.streamline_groups == []
    dataset.close()

def test_volumes_are_read_once_within_the_budget(toy, monkeypatch):
    from dwiml_nb.data.volumes import MRIData
    reads,read = [], MRIData.read
    monkeypatch.setattr(MRIData, 'read', lambda self: (reads.append(self.name), read(self))[1])
    one = 16*16*5*15*4
    dataset = MultiSubjectDataset(toy, lazy=True, cache_size=one + 100, read_mode='pread').load_data()        # from a map they are not read at all
    for i in (0, 0, 1, 1, 0): dataset.training.get_volume(i, 'input')
    assert reads == ['sub-01/input', 'sub-02/input', 'sub-01/input'] and dataset.cache.used('cpu') == one
    dataset.close()

# ---- other processes

def ask(dataset):
    "In another process: some of everything."
    return dataset.training.get_lines(1, 'bundles', [3, 1]).data.numpy(), dataset.training.get_volume(0, 'input').sum().item()

@pytest.mark.parametrize('lazy', [True, False])
def test_datasets_go_to_workers(toy, lazy):
    dataset = MultiSubjectDataset(toy, lazy=lazy).load_data()
    here = ask(dataset)                                                   # the handle is open when the dataset leaves
    for method in ('spawn', 'fork'):
        with multiprocessing.get_context(method).Pool(1) as pool: there = pool.apply(ask, (dataset,))
        np.testing.assert_array_equal(here[0], there[0])
        assert here[1] == pytest.approx(there[1])
    if lazy: assert len(pickle.dumps(dataset)) < 20_000
    dataset.close()

def test_forked_children_open_the_file_for_themselves(toy):
    dataset = MultiSubjectDataset(toy, lazy=True).load_data()
    here = ask(dataset)
    loader = torch.utils.data.DataLoader([0, 1, 2, 3], batch_size=1, num_workers=2, collate_fn=lambda _: ask(dataset)[0])
    for there in loader: np.testing.assert_array_equal(here[0], there)
    dataset.close()

# ---- one judgement of grids

@pytest.mark.parametrize('change, opens', [(2e-5, 'quietly'), (5e-4, 'with a warning'), (5e-3, 'not at all')])
def test_grids_are_judged_alike_from_checking_to_tracking(toy, tmp_path, change, opens):
    "One entry of the affine of the input and of the mask differs: batches, tracking and the check agree, and nothing that opened before is refused."
    study = shutil.copy(toy, tmp_path/'study.hdf5')
    with h5py.File(study, 'r+') as f:
        for key in INDEX_KEYS: del f.attrs[key]
        for s in f:
            for g in ('input', 'wm_mask'): f[s][g].attrs['affine'] = f[s][g].attrs['affine'] + change*np.outer([1, 0, 0, 0], [g == 'input', 0, 0, 0])
    dataset = MultiSubjectDataset(study, lazy=True).load_data()
    model = Learn2TrackModel(dataset.nb_features['input'], rnn_layer_sizes=[4], step_size=1.)
    loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles')
    def load(): loader.load_batch_inputs(*loader.load_batch_streamlines([(0, [0, 1])]))
    def track(): Tracker(model, dataset, dataset.testing.subjects[0], 'input', 'wm_mask', step_mm=1.)
    report = check_study(study)
    assert bool(report.problems) == (opens == 'not at all') and any('not quite the same' in p.problem for p in report.remarks) == (opens == 'with a warning')
    for f in (load, track):
        if opens == 'quietly':
            with warnings.catch_warnings(): warnings.simplefilter('error'); f()
        elif opens == 'with a warning':
            with pytest.warns(UserWarning, match='not quite the same.*mm apart'): f()
        else:
            with pytest.raises(DataProblem, match='grid'): f()
    dataset.close()

def test_images_whose_headers_differ_by_rounding_make_a_study(tmp_path):
    sources = shutil.copytree(REFERENCE/'sources', tmp_path/'sources')
    for file in sources.glob('*/masks/wm.nii.gz'):
        image = nib.load(file); affine = image.affine.copy(); affine[:3, 3] += (5e-4, -5e-4, 5e-4)          # less than 1e-3 mm, more than 1e-5
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), file)
    assert check_study(build(tmp_path, sources).path).ok
    affine[0, 0] += 1e-3                                                                                    # 1e-3 mm a voxel is too much over the volume
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), file)
    with pytest.raises(DataProblem, match='images of one subject lie on different grids'): build(tmp_path, sources, 'other.hdf5')
