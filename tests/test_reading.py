"""Reading: every way gives the same values; files that change are named; who has a study open goes on while it grows."""
import faulthandler
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.stored import coalesced, pick_lines
from dwiml_nb.data.volumes import VolumeCache
from dwiml_nb.study.schema import INDEX_KEYS
from dwiml_nb.study.files import HeldFiles
from dwiml_nb.study.describe import describe_study
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.schema import StudyFile
from dwiml_nb.study.toy import toy_study

WAYS = {'map': dict(lazy=True), 'pread': dict(lazy=True, read_mode='pread'), 'eager': {}}
AFFINE = np.diag([2., 2, 2, 1])
def quiet(n): return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


def root_attributes(f, subjects):
    for s in SUBSETS: f.attrs[f'{s}_subjs'] = list(subjects) if s == 'training' else []

def write_subject(group, lengths, points='f8', numbers=('i8', 'i8'), volume='f4', shuffled=False, chunked=False, seed=0):
    "A subject as some library may have written it; the points are whole quarters, which every type holds (int16: whole numbers)."
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int64)
    order = rng.permutation(len(lengths)) if shuffled else np.arange(len(lengths))           # the file's order of the lines
    starts = np.zeros(len(lengths), np.int64); starts[order] = np.cumsum(lengths[order]) - lengths[order]
    data = rng.integers(0, 400, (int(lengths.sum()), 3))/(1 if np.dtype(points).kind == 'i' else 4)
    keep = dict(chunks=(64, 3), compression='gzip', shuffle=True) if chunked else {}
    s = group.create_group('bundles')
    s.attrs.update({'type': 'streamlines', 'space': 'Space.VOX', 'origin': 'Origin.TRACKVIS', 'affine': AFFINE, 'dimensions': np.int16([9, 8, 7])})
    s.create_dataset('data', data=data.astype(points), **(keep if len(data) >= 64 else {}))
    s['offsets'],s['lengths'] = starts.astype(numbers[0]), lengths.astype(numbers[1])
    s['euclidean_lengths'] = lengths*2.
    s['data_per_streamline/weight'] = rng.random((len(lengths), 2)).astype('f4')
    s['connectivity_matrix'] = rng.random((5, 5)) > .5                                          # 25 bytes: what comes after lies askew
    s.attrs['connectivity_nb_blocs'] = [5, 1, 1]
    v = group.create_group('input')
    v.attrs.update({'type': 'volume', 'affine': AFFINE, 'voxres': np.float32([2, 2, 2]), 'nb_features': 2})
    v.create_dataset('data', data=rng.integers(0, 99, (9, 8, 7, 2)).astype(volume), **(dict(chunks=(4, 4, 4, 2), compression='lzf') if chunked else {}))

def write_study(path, lengths=(3, 2, 40, 7, 2, 90), subjects=('a',), userblock=0, **how):
    with h5py.File(path, 'w', userblock_size=userblock) as f:
        root_attributes(f, subjects)
        for i,s in enumerate(subjects): write_subject(f.create_group(s), lengths, seed=i, **how)
    return Path(path)

def opened(path, way):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return MultiSubjectDataset(path, **WAYS[way]).load_data()

def everything(dataset, subject=0, ids=None):
    "All that can be asked of a subject."
    subset = dataset.training
    sft = subset.streamlines_of(subject, 'bundles')
    lines,(matrix,*info) = sft.get_lines(ids), sft.get_connectivity_matrix_and_info()
    return [lines.data.numpy(), lines.offsets.numpy(), sft.get_dps(ids)['weight'], sft.lengths, sft.starts, sft.lengths_mm, matrix, np.array(info[1]),
            subset.get_volume(subject, 'input').clone().numpy()]         # (pickling to a worker moves torch's storage)

def assert_same(a, b):
    for x,y in zip(a, b, strict=True): assert x.dtype == y.dtype and np.array_equal(x, y)

def by_h5py(path, subject='a', ids=None):
    "The lines, read one by one."
    with h5py.File(path) as f:
        g = f[subject]['bundles']
        n = len(g['lengths'])
        return np.concatenate([np.zeros((0, 3), np.float32), *(g['data'][int(g['offsets'][i]):int(g['offsets'][i]) + int(g['lengths'][i])].astype(np.float32)
                                                                for i in np.arange(n)[ids if ids is not None else slice(None)])])


# ---- the same values

layouts = st.fixed_dictionaries(dict(
    points=st.sampled_from(['f8', 'f4', '>f8', '>f4', 'i2', 'f2', 'i4']),
    numbers=st.tuples(*[st.sampled_from(['i8', 'i4', 'i2', '>i4', 'u8', 'u2'])]*2),
    volume=st.sampled_from(['f4', 'f2', '>f4', 'f8', 'i2']),
    shuffled=st.booleans(), chunked=st.booleans(), userblock=st.sampled_from([0, 512, 2048])))

@quiet(20)
@given(how=layouts, lengths=st.lists(st.integers(0, 60), max_size=25), data=st.data())
def test_every_way_reads_the_same(tmp_path_factory, how, lengths, data):
    path = write_study(tmp_path_factory.mktemp('any')/'study.hdf5', lengths, **how)
    n = len(lengths)
    numbers = st.lists(st.integers(-n, n - 1), max_size=40) if n else st.just([])
    ids = data.draw(st.one_of(st.none(), numbers, st.lists(st.booleans(), min_size=n, max_size=n).map(np.array), st.builds(slice, *[st.integers(-30, 30)]*2)))
    if isinstance(ids, np.ndarray) and n == 0: ids = None
    sets = [opened(path, way) for way in WAYS]
    first,*others = [everything(d, 0, ids) for d in sets]
    for other in others: assert_same(first, other)
    assert np.array_equal(first[0], by_h5py(path, ids=np.array(ids, np.int64) if isinstance(ids, list) else ids))
    assert first[3].tolist() == lengths and (first[5] == np.array(lengths)*2.).all()
    for d in sets: d.close()

@pytest.mark.parametrize('way', WAYS)
def test_which_lines(tmp_path, way):
    dataset = opened(write_study(tmp_path/'study.hdf5'), way)
    get = lambda ids: dataset.training.get_lines(0, 'bundles', ids).lengths.tolist()
    every = [3, 2, 40, 7, 2, 90]
    assert get(None) == every and get(5) == get(-1) == get(np.int8(-1)) == get(torch.tensor(5)) == [90]
    assert get([2, 2, 0]) == [40, 40, 3] and get(slice(4, None)) == [2, 90] and get(np.array(every) > 5) == [40, 7, 90] and get(range(2)) == [3, 2]
    assert get([]) == get(np.zeros(6, bool)) == get(slice(3, 3)) == [] and dataset.training.get_lines(0, 'bundles', []).data.shape == (0, 3)
    for ids in (6, -7, [0, 6], np.ones(5, bool), [.5], np.array(2**40)):
        with pytest.raises(IndexError): get(ids)
    dataset.close()

def test_slow_layouts_are_named_once(tmp_path):
    path = write_study(tmp_path/'study.hdf5', chunked=True, subjects=('a', 'b', 'c'))
    with pytest.warns(UserWarning, match='dwiml_hdf5_repack') as told: dataset = MultiSubjectDataset(path, lazy=True).load_data()
    assert len(told) == 1 and str(path) in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        everything(dataset); everything(dataset, 1, [3])
        MultiSubjectDataset(path).load_data()
    dataset.close()

@quiet(200)
@given(lines=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=40), gap=st.integers(0, 50))
def test_runs_hold_all_lines(lines, gap):
    starts,lengths = (np.array([x[i] for x in lines], np.int64) for i in (0, 1))
    rows = np.arange(400*3.).reshape(400, 3)
    begin,end,moved = coalesced(starts, lengths, gap)
    laid = np.concatenate([rows[:0], *(rows[b:e] for b,e in zip(begin, end))])
    assert torch.equal(pick_lines(laid, moved, lengths).data, pick_lines(rows, starts, lengths).data)
    assert (begin[1:] > end[:-1] + gap).all() and len(laid) <= len(rows)


# ---- what a damaged file may say

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('where,value', [('offsets', -1), ('offsets', 10**12), ('offsets', 2**63 - 3), ('lengths', -5), ('lengths', 2**62), ('offsets', 143), ('lengths', 140)])
def test_nothing_outside_the_points_is_read(tmp_path, way, where, value):
    path = write_study(tmp_path/'study.hdf5')
    with h5py.File(path, 'r+') as f: f[f'a/bundles/{where}'][2] = value
    def read(): return opened(path, way).training.get_lines(0, 'bundles', [1, 2])
    with pytest.raises(DataProblem, match='outside the stored points') as caught: read()
    assert (caught.value.subject, caught.value.group) == ('a', 'bundles') and str(path) in str(caught.value)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('damage,says', [
    (lambda g: g['bundles'].__delitem__('data'), 'missing'), (lambda g: g['bundles'].__delitem__('offsets'), 'missing or damaged'),
    (lambda g: g['bundles'].attrs.__delitem__('affine'), 'missing or damaged'), (lambda g: g['bundles'].attrs.__setitem__('affine', np.zeros((4, 4))), 'cannot be inverted'),
    (lambda g: (g['bundles'].__delitem__('data'), g['bundles'].create_dataset('data', data=np.zeros((144, 2)))), 'three coordinates'),
    (lambda g: (g['bundles'].__delitem__('offsets'), g['bundles'].create_dataset('offsets', data=np.zeros(3, int))), 'one row a streamline'),
    (lambda g: (g['bundles'].__delitem__('lengths'), g['bundles'].create_dataset('lengths', data=np.full(6, 1.5))), 'whole numbers'),
    (lambda g: (g['input'].__delitem__('data'), g['input'].create_dataset('data', data=np.zeros((9, 8, 7)))), 'four axes'),
    (lambda g: g.__delitem__('input'), 'group is missing'), (lambda g: g['input'].attrs.__setitem__('type', 'streamlines'), 'group is missing')])
def test_headers_that_do_not_fit(tmp_path, way, damage, says):
    path = write_study(tmp_path/'study.hdf5', subjects=('a', 'b'))
    with h5py.File(path, 'r+') as f: damage(f['b'])
    with pytest.raises(DataProblem, match=says) as caught: opened(path, way)
    assert 'b' in str(caught.value) and str(path) in str(caught.value)


# ---- files that change

def replaced(path): shutil.copy(path, str(path) + '.new'); os.replace(str(path) + '.new', path)
def truncated(path): os.truncate(path, os.path.getsize(path) - 64)
def grown(path):
    with open(path, 'ab') as f: f.write(b'x')
def rewritten(path):
    with open(path, 'r+b') as f: f.seek(-16, 2); f.write(b'12345678')
def touched(path): os.utime(path, ns=(1, 1))

@pytest.mark.parametrize('way', ['map', 'pread', 'chunked'])
@pytest.mark.parametrize('change', [truncated, grown, rewritten, touched])
def test_changes_are_noticed_and_named(tmp_path, way, change):
    path = write_study(tmp_path/'study.hdf5', chunked=way == 'chunked')
    dataset = opened(path, 'map' if way == 'chunked' else way)
    sft,volume = dataset.training.streamlines_of(0, 'bundles'), dataset.training.volume_of(0, 'input')
    sft.get_lines([1]); volume.get_data_as_tensor()
    change(path)
    for read in (lambda: sft.get_lines([1]), lambda: sft.get_lines([]), lambda: sft.get_dps([0]), lambda: volume.get_data_as_tensor(), lambda: sft.lengths, lambda: sft.lengths_mm,
                 sft.get_connectivity_matrix_and_info, lambda: pickle.loads(pickle.dumps(sft)).get_lines([1])):
        with pytest.raises(DataProblem, match='has changed since it was first opened|damaged or was cut short') as caught: read()
        assert str(path) in str(caught.value)

def test_what_is_in_memory_does_not_change(tmp_path):
    path = write_study(tmp_path/'study.hdf5')
    dataset = opened(path, 'eager')
    before = everything(dataset, 0, [4, 2])[:6]
    truncated(path)
    sft = dataset.training.streamlines_of(0, 'bundles')
    assert np.array_equal(before[0], sft.get_lines([4, 2]).data.numpy()) and np.array_equal(before[2], sft.get_dps([4, 2])['weight'])
    dataset.training.get_volume(0, 'input')

@pytest.mark.parametrize('way', ['map', 'pread'])
def test_a_short_read_raises(tmp_path, way):
    "With the check out of the way, as if the file were cut between check and read: a map would end the process, a system call answers."
    path = write_study(tmp_path/'study.hdf5')
    dataset = opened(path, way)
    rows = dataset.training.streamlines_of(0, 'bundles').rows
    before = rows.take([143]); file = rows.data_file()
    os.truncate(path, rows.address + 100)
    with pytest.raises(DataProblem, match='has changed'): file.read_into(bytearray(24), rows.address + 90)
    assert before.shape == (1, 3)

@pytest.mark.parametrize('way,ends', [('map', -signal.SIGBUS), ('pread', 3)])
def test_what_a_truncation_during_a_read_does(tmp_path, way, ends):
    "docs/scaling.md: through a map it ends the process, by system calls it raises."
    path = write_study(tmp_path/'study.hdf5', [3000]*20)
    def child():
        faulthandler.disable()
        rows = opened(path, way).training.streamlines_of(0, 'bundles').rows
        array = rows.mapped() if way == 'map' else None
        os.truncate(path, rows.address + 4096)
        rows.data_file = lambda: rows.file.data_file(rows.name, rows.seen)                  # too late for the check
        try: array.sum() if way == 'map' else rows.read_runs(np.array([59_000]), np.array([60_000]))
        except DataProblem: os._exit(3)
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start(); process.join(60)
    assert process.exitcode == ends

def test_another_file_under_the_name(tmp_path):
    path = write_study(tmp_path/'study.hdf5')
    dataset = opened(path, 'map')
    before = dataset.training.get_lines(0, 'bundles', [2]).data
    replaced(path)
    assert torch.equal(dataset.training.get_lines(0, 'bundles', [2]).data, before)           # who has it open goes on
    with pytest.raises(DataProblem, match='another file has taken the place'): pickle.loads(pickle.dumps(dataset)).training.get_lines(0, 'bundles', [2])
    path.unlink()
    assert torch.equal(dataset.training.get_lines(0, 'bundles', [2]).data, before)
    dataset.close()
    with pytest.raises(DataProblem, match='no such study'): dataset.training.get_lines(0, 'bundles', [2])


# ---- a study that grows

def grow(path, new, lengths=(5, 6)):
    "What `add_subjects` does: the file gets a second name, the new subject a file of its own, and a root of links takes the name."
    folder = path.with_name('study.subjects'); folder.mkdir(exist_ok=True)
    with h5py.File(path) as f: links = {s: f.get(s, getlink=True) for s in f}
    if not any(isinstance(x, h5py.ExternalLink) for x in links.values()):
        os.link(path, folder/'first.hdf5')
        links = {s: h5py.ExternalLink('study.subjects/first.hdf5', f'/{s}') for s in links}
    with h5py.File(folder/f'{new}.hdf5', 'w') as f: write_subject(f.create_group(new), lengths, seed=99)
    links[new] = h5py.ExternalLink(f'study.subjects/{new}.hdf5', f'/{new}')
    with h5py.File(folder/'root.new', 'w') as f:
        root_attributes(f, list(links))
        for s,link in links.items(): f[s] = link
    os.replace(folder/'root.new', path)

def ask(dataset): return everything(dataset, 0, [4, 2, 2]) + everything(dataset, 1, [0])

@pytest.mark.parametrize('way', WAYS)
def test_growing_disturbs_nobody(tmp_path, way):
    path = write_study(tmp_path/'study.hdf5', subjects=('a', 'b'))
    dataset = opened(path, way)
    before = ask(dataset)
    for new in ('c', 'd'):
        grow(path, new)
        assert_same(ask(dataset), before)
        assert_same(ask(pickle.loads(pickle.dumps(dataset))), before)                          # a worker that opens the study now
        for method in ('fork',) if new == 'c' else ('fork', 'spawn'):
            with multiprocessing.get_context(method).Pool(1) as pool: assert_same(pool.apply(ask, (dataset,)), before)
    assert dataset.training.subjects == ['a', 'b']
    dataset.close()
    assert_same(ask(dataset), before)                                                           # closed, and opened again by its name
    larger = opened(path, way)
    assert larger.training.subjects == ['a', 'b', 'c', 'd'] and larger.training.nb_streamlines('bundles').tolist() == [6, 6, 2, 2]
    assert_same(ask(larger), before)
    assert np.array_equal(larger.training.get_lines(3, 'bundles').data.numpy(), by_h5py(path, 'd'))
    rows = larger.training.streamlines_of(3, 'bundles').rows
    assert way != 'map' or rows.way() == 'map' and rows.data_file().path.endswith('study.subjects/d.hdf5')     # mapped through the link
    assert 'd' in repr(describe_study(path))
    for d in (dataset, larger): d.close()

@pytest.mark.parametrize('way', ['map', 'pread'])
def test_linked_files_that_change_or_vanish(tmp_path, way):
    path = write_study(tmp_path/'study.hdf5', subjects=('a', 'b'))
    grow(path, 'c')
    dataset = opened(path, way)
    part = tmp_path/'study.subjects'/'c.hdf5'
    dataset.training.get_lines(2, 'bundles', [0]); before = dataset.training.get_lines(0, 'bundles', [0]).data
    touched(part)
    with pytest.raises(DataProblem, match='c.hdf5.*has changed'): dataset.training.get_lines(2, 'bundles', [0])
    with pytest.raises(DataProblem, match='c.hdf5.*has changed'): dataset.training.get_volume(2, 'input')
    assert torch.equal(dataset.training.get_lines(0, 'bundles', [0]).data, before)           # the others are as they were
    dataset.close(); part.unlink()
    with pytest.raises(DataProblem, match='missing or damaged') as caught: opened(path, way)
    assert 'c' in str(caught.value) and 'study.subjects/c.hdf5' in str(caught.value)
    with pytest.raises(DataProblem, match='missing or damaged'): describe_study(path)

def test_a_subject_that_is_gone(tmp_path):
    path = write_study(tmp_path/'study.hdf5', subjects=('a', 'b'))
    dataset = opened(path, 'map')
    os.replace(write_study(tmp_path/'other.hdf5', subjects=('a',)), path)
    with pytest.raises(DataProblem, match="no such subject"): pickle.loads(pickle.dumps(dataset)).training.get_lines(1, 'bundles', [0])


# ---- descriptors, threads, processes

def descriptors(): return len(os.listdir('/proc/self/fd'))

@pytest.mark.parametrize('way', ['map', 'pread'])
def test_descriptors_do_not_grow(tmp_path, way):
    path = write_study(tmp_path/'study.hdf5')
    for i in range(12): grow(path, f's{i:02}')
    dataset = opened(path, way)
    dataset.file.held = HeldFiles(most=4)
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(150):
        s = int(rng.integers(13))
        dataset.training.get_lines(s, 'bundles', [0, 1]); dataset.training.get_volume(s, 'input')
        counts.append(descriptors())
    assert max(counts[50:]) <= max(counts[:50]) and len(dataset.file.held) == 4
    start = descriptors()
    for _ in range(5):
        again = opened(path, way)
        for s in range(13): again.training.get_lines(s, 'bundles', [0])
        again.close(); del again
    assert descriptors() <= start + 1
    dataset.close()

def test_many_threads_read_alike(tmp_path):
    path = write_study(tmp_path/'study.hdf5', subjects=('a', 'b'))
    for i in range(4): grow(path, f's{i}')
    for way in ('map', 'pread'):
        dataset = opened(path, way)
        want = [dataset.training.get_lines(i, 'bundles').data for i in range(6)]
        dataset.file.held = HeldFiles(most=2)
        wrong = []
        def work(seed):
            rng = np.random.default_rng(seed)
            try:
                for _ in range(40):
                    i = int(rng.integers(6))
                    if not torch.equal(dataset.training.get_lines(i, 'bundles').data, want[i]): wrong.append(i)
            except Exception as e: wrong.append(e)
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not wrong
        dataset.close()

def test_a_child_forked_while_a_thread_reads(tmp_path):
    "A lock held by a thread of the parent does not stop the child."
    dataset = opened(write_study(tmp_path/'study.hdf5'), 'map')
    held,done = threading.Event(), threading.Event()
    def hold():
        with dataset.file.lock, dataset.file.held.lock, dataset.cache.lock: held.set(); done.wait(30)
    thread = threading.Thread(target=hold); thread.start(); held.wait(10)
    context = multiprocessing.get_context('fork')
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(everything(dataset)[0].shape))
    child.start(); child.join(30)
    done.set(); thread.join()
    assert child.exitcode == 0 and answers.get() == (144, 3)
    dataset.close()

def test_the_cache_loads_once_and_keeps_its_budget():
    loads,cache = [], VolumeCache(4000)
    def load(key): loads.append(key); return torch.full((250,), float(key))
    def work():
        for key in [1, 2, 3, 1, 2, 3, 4]:
            assert cache.get(key, 'cpu', lambda: load(key))[0] == key
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(loads) == [1, 2, 3, 4] and cache.used('cpu') == 4000 and not cache.loading
    cache.get(9, 'cpu', lambda: torch.zeros(2000))
    assert cache.used('cpu') == 4000                                     # too large to keep: nothing else has to go
    def failing(): raise OSError('no disk')
    with pytest.raises(OSError): cache.get(10, 'cpu', failing)
    assert cache.get(10, 'cpu', lambda: load(10))[0] == 10

def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    import mmap
    path = write_study(tmp_path/'study.hdf5')
    want = everything(opened(path, 'eager'))
    def refuse(*args, **kwargs): raise OSError(12, 'Cannot allocate memory')
    monkeypatch.setattr(mmap, 'mmap', refuse)
    dataset = opened(path, 'map')
    assert dataset.training.streamlines_of(0, 'bundles').rows.way() == 'pread'
    assert_same(everything(dataset), want)

def test_read_modes_have_names(tmp_path):
    with pytest.raises(DataProblem, match="Did you mean 'pread'"): MultiSubjectDataset(write_study(tmp_path/'study.hdf5'), read_mode='read')
    assert StudyFile(tmp_path/'study.hdf5').read_mode == 'map'


# ---- attributes that are not what they should be

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_study(tmp_path_factory.mktemp('toy'))


@pytest.mark.parametrize('key,value,says', [
    ('affine', np.arange(1000.), 'not a 4x4 matrix'), ('affine', np.ones((8, 4)), 'not a 4x4 matrix'), ('affine', np.eye(4)[:3], 'not a 4x4 matrix'),
    ('affine', np.arange(16, dtype='i1'), 'not a 4x4 matrix|inverted|last row'), ('affine', 'diagonal', 'damaged'), ('affine', np.full((4, 4), np.nan), 'inverted'),
    ('type', ['volume']*50, 'missing'), ('type', np.arange(40), 'missing'), ('dimensions', np.arange(5000), None), ('space', ['Space.VOX', 'Space.VOX'], 'space'), ('origin', np.zeros(9), 'origin')])
def test_an_attribute_of_another_form_is_never_believed(toy, tmp_path, key, value, says):
    "h5py writes past the end of an array that is too small for an attribute: its size is looked at first."
    path = tmp_path/'study.hdf5'; shutil.copy(toy, path)
    with h5py.File(path, 'r+') as f:
        f[f"sub-02/{'bundles' if key in ('dimensions', 'space', 'origin') else 'input'}"].attrs[key] = value
        for key in INDEX_KEYS: del f.attrs[key]
    try: MultiSubjectDataset(path, lazy=True).load_data()
    except DataProblem as e: assert says and re.search(says, str(e)), e
    else: assert says is None
