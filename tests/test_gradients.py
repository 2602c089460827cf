"""b-values and b-vectors as people write them, schemes with and without shells, and images that are no images: what `dwiml_fit_sh` makes of them."""
import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from dwiml_nb.cli.prepare import dwiml_fit_sh
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.gradients import choose_shell, clear_shell, flip_bvecs, read_gradients, shells_of
from dwiml_nb.core.sh import fit_attenuation, fit_sh_files
from dwiml_nb.evaluation.csd import Acquisition, csd_fodf

AFFINE = np.diag([-2., 2, 2, 1])
BVALS = np.r_[0, 0, np.full(30, 1000.)]
AXES = np.random.default_rng(3).normal(size=(30, 3))
BVECS = np.vstack([np.zeros((2, 3)), AXES/np.linalg.norm(AXES, axis=1, keepdims=True)])


def row(values, fmt='%.6f', sep=' '): return sep.join(fmt % v for v in values)
VAL, VEC = row(BVALS, '%g'), '\n'.join(row(r) for r in BVECS.T)


class Subject:
    "A DWI of one fibre, its gradients and its mask, to spoil."
    def __init__(self, folder, bvals=BVALS, bvecs=BVECS):
        self.folder = folder
        signal = 100*np.exp(-np.asarray(bvals)*1e-3*(.2 + 1.5*(bvecs @ [1, 0, 0])**2))
        nib.save(nib.Nifti1Image(np.broadcast_to(signal.astype('f4'), (3, 3, 3, len(bvals))).copy(), AFFINE), folder/'dwi.nii.gz')
        nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), AFFINE), folder/'mask.nii.gz')
        self.write(row(bvals, '%g'), '\n'.join(row(r) for r in bvecs.T))
    def write(self, bval, bvec):
        for name,text in (('bval', bval), ('bvec', bvec)):
            (self.folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    def fit(self, order=4, **options):
        path = fit_sh_files(*(self.folder/n for n in ('dwi.nii.gz', 'bval', 'bvec', 'mask.nii.gz', 'sh.nii.gz')), order=order, overwrite=True, **options)
        return np.asarray(nib.load(path).dataobj)
    def record(self): return json.loads((self.folder/'sh.json').read_text())
    def refused(self, *words, **options):
        with pytest.raises(DataProblem) as caught: self.fit(**options)
        for word in words: assert str(word) in str(caught.value), f"'{word}' is not in: {caught.value}"
        assert not (self.folder/'sh.nii.gz').exists()

@pytest.fixture
def subject(tmp_path): return Subject(tmp_path)


WRITTEN = {
    'a row a volume': (VAL, '\n'.join(row(r) for r in BVECS)), 'a column': ('\n'.join(VAL.split()), VEC),
    'wrapped': (VAL.replace(' 1000 1000 1000 1000 ', ' 1000\n1000 1000 1000 '), VEC),
    'blanks': ('  '.join(VAL.split()) + '  \n', '\n'.join('  ' + row(r, sep='  ') + '  ' for r in BVECS.T) + '\n\n'),
    'tabs': (VAL.replace(' ', '\t'), VEC.replace(' ', '\t')), 'commas': (VAL.replace(' ', ','), VEC.replace(' ', ', ')),
    'CRLF': (VAL + '\r\n', VEC.replace('\n', '\r\n') + '\r\n'), 'CR': (VAL + '\r', VEC.replace('\n', '\r')),
    'exponent': (row(BVALS, '%.18e'), '\n'.join(row(r, '%.18e') for r in BVECS.T)),
    'remarks': ('# b-values\n' + VAL, VEC.replace('\n', ' # x\n', 1)), 'UTF-8 mark': (b'\xef\xbb\xbf' + VAL.encode(), b'\xef\xbb\xbf' + VEC.encode()),
    'UTF-16': (VAL.encode('utf-16'), VEC.encode('utf-16')), 'nan where b is 0': (VAL, '\n'.join('nan nan ' + row(r[2:]) for r in BVECS.T))}

def test_any_way_of_writing_gives_the_same_numbers(subject):
    "Separators, line ends, marks, encodings, rows and columns."
    reference = subject.fit()
    for name,(bval,bvec) in WRITTEN.items():
        subject.write(bval, bvec)
        np.testing.assert_allclose(subject.fit(), reference, atol=1e-4, err_msg=name)

def test_gradients_that_cannot_be(subject):
    bad = {'not a table of numbers': ('0 b0', VEC), 'holds no number': ('\n', VEC), 'not a text file': (VAL.encode('utf-16-le'), VEC),
           'volume 3 cannot be one': (VAL.replace('0 0 1000 1000', '0 0 1000 -5', 1), VEC), 'differ in length': (VAL, VEC + ' 1'),
           'do not match': (VAL + ' 1000', VEC), 'b-values come first': (VEC.replace('-', ''), VAL), '-export_grad_fsl': (VAL, '0 0 0 0\n'*32),
           'a trace image': (VAL, '\n'.join('0 0 0' + row(r[2:])[8 + (r[2] < 0):] for r in BVECS.T)),
           'b times length squared': (VAL, '\n'.join(row(r*.5) for r in BVECS.T))}
    for words,(bval,bvec) in bad.items():
        subject.write(bval, bvec)
        subject.refused(words, 'bv')
    (subject.folder/'bval').unlink()
    subject.refused('no such gradient file', 'bval')
    (subject.folder/'bval').symlink_to('.git/annex/objects/bval')
    subject.refused('git annex get', 'bval')

def test_three_volumes_are_rows_or_columns_by_their_lengths(tmp_path):
    vectors = np.array([[0, 0, 0], [.6, .8, 0], [0, .6, .8]])
    (tmp_path/'bval').write_text('0 1000 1000')
    for table in (vectors, vectors.T):
        (tmp_path/'bvec').write_text('\n'.join(row(r) for r in table))
        np.testing.assert_allclose(read_gradients(tmp_path/'bval', tmp_path/'bvec', convention='image')[1], vectors)
    turned = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    (tmp_path/'bval').write_text('1000 1000 1000'); (tmp_path/'bvec').write_text('\n'.join(row(r) for r in turned))
    with pytest.warns(UserWarning, match='as FSL writes them'): bvecs = read_gradients(tmp_path/'bval', tmp_path/'bvec', AFFINE)[1]
    np.testing.assert_allclose(bvecs, flip_bvecs(turned.T, AFFINE, 'fsl'))


# ---- shells

def test_b_values_that_scatter_are_shells():
    bvals = np.array([10, 10, 1490, 2990, 1490, 3010, 1500, 2990, 1495, 3005, 1510, 2985, 1505, 3000, 5.])
    assert sorted(set(shells_of(bvals))) == [0, 1500, 3000] and (shells_of(bvals)[bvals <= 50] == 0).all()
    assert set(shells_of(np.r_[np.zeros(10), np.full(6, 80.), np.full(30, 1000.)])) == {0, 80, 1000}

def test_schemes_without_shells_are_refused_until_a_b_value_is_named(tmp_path):
    subject = Subject(tmp_path, np.r_[0, 0, np.linspace(200, 3000, 30)])
    subject.refused('form no clear shells', '30 volumes from b = 200 to 3000', 'bval', '--shell_width')
    subject.refused('form no clear shells', shell=1600)
    subject.refused('no shell at b = 2000', '--shell_width', shell=2000)
    subject.refused('a width needs', width=100)
    subject.refused('no volume lies within', shell=5000, width=100)
    subject.fit(shell=2000, width=1000)
    assert subject.record()['shell_volumes'] == 21 and subject.record()['shell_range'] == pytest.approx([1069, 3000], abs=1)
    q = np.unique(np.indices((9, 9, 9)).reshape(3, -1) - 4, axis=1)
    grid = 200.*(q**2).sum(0)[(q**2).sum(0) <= 16]
    with pytest.raises(DataProblem, match='b-values'): clear_shell(grid)
    assert clear_shell(grid, 2800)[1].sum() == 48

def test_csd_refuses_them_too():
    ramp = np.r_[0, 0, np.linspace(200, 3000, 30)]
    with pytest.raises(DataProblem, match='form no clear shells'):
        csd_fodf(Acquisition(np.ones((1, 1, 1, 32)), ramp, BVECS, np.ones((1, 1, 1), bool), None))

def test_b0_that_is_not_zero(tmp_path):
    "The threshold is an option, and it is written down with what it took."
    subject = Subject(tmp_path, np.r_[60, 70, np.full(30, 1000.)], np.vstack([np.eye(3)[:2], BVECS[2:]]))
    subject.refused('no b0 volume', '60', 'b0_max')
    subject.fit(b0_max=100)
    record = subject.record()
    assert (record['b0_max'], record['b0_volumes'], record['shell'], record['shell_volumes']) == (100, 2, 1000, 30)
    assert record['shells_of_the_scheme'] == {'1000': 30}
    with pytest.raises(DataProblem, match='in ms/um2'): choose_shell([0, 1, 2.])
    for shell in (float('nan'), -1000., 5000., float('inf')):
        with pytest.raises(DataProblem, match='no shell at'): choose_shell(BVALS, shell)

def test_the_command_says_what_it_took(subject, capsys):
    dwiml_fit_sh(*(str(subject.folder/n) for n in ('dwi.nii.gz', 'bval', 'bvec', 'mask.nii.gz', 'sh.nii.gz')), order=4)
    assert '30 volumes with b from 1000 to 1000, over the mean of 2 with b <= 50' in capsys.readouterr().out

def test_directions_measured_twice_count_once(tmp_path):
    few = np.r_[0:2, 2:18, 2:18]
    subject = Subject(tmp_path, BVALS[few], np.where(np.arange(len(few))[:, None] < 18, 1, -1)*BVECS[few])
    subject.refused('too few directions for order 6', '16 in 32 volumes', 'use order 4', order=6)
    subject.fit(order=4)

def test_vectors_of_another_threshold_are_no_directions():
    "Zeros for volumes that another threshold took for b0 would fit to NaN."
    with pytest.raises(DataProblem, match='volume 0 is no unit vector'):
        fit_attenuation(np.ones((1, 1, 1, 32)), np.r_[40., 0, BVALS[2:]], BVECS, np.ones((1, 1, 1)), 0, shell=40, b0_max=10)


# ---- images

POINTER = b'/annex/objects/MD5E-s1896--439b33f3e4d39bb3502c0e7d2fc2c9b7.nii.gz\n'

def test_damaged_images_are_named(subject):
    good = {n: (subject.folder/n).read_bytes() for n in ('dwi.nii.gz', 'mask.nii.gz')}
    plain = gzip.decompress(good['dwi.nii.gz'])
    for name,content,words in (
            ('dwi.nii.gz', good['dwi.nii.gz'][:200], 'cannot be read'), ('dwi.nii.gz', POINTER, 'git annex get'), ('dwi.nii.gz', plain, 'cannot be read'),
            ('dwi.nii.gz', b'', 'cannot be read'), ('dwi.nii.gz', gzip.compress(plain[:-400]), 'cannot be read to its end'),
            ('mask.nii.gz', POINTER, 'git annex get'), ('mask.nii.gz', good['mask.nii.gz'][:60], 'cannot be read'), ('mask.nii.gz', good['dwi.nii.gz'], 'wrong axes'),
            ('dwi.nii.gz', good['mask.nii.gz'], 'wrong axes')):
        (subject.folder/name).write_bytes(content)
        subject.refused(name, words)
        (subject.folder/name).write_bytes(good[name])
    nib.save(nib.Nifti1Image(np.ones((3, 3, 4), np.uint8), AFFINE), subject.folder/'mask.nii.gz')
    subject.refused('mask.nii.gz', 'another grid than the DWI')
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3, 1), np.uint8), AFFINE), subject.folder/'mask.nii.gz')
    subject.fit()

def test_other_formats_to_write_are_refused_before_any_work(subject):
    files = [subject.folder/n for n in ('nowhere.nii.gz', 'bval', 'bvec', 'mask.nii.gz')]
    for out,peaks in (('sh.mif', None), ('sh', None), ('sh.nii.gz', 'peaks.txt')):
        with pytest.raises(DataProblem, match='written as NIfTI'): fit_sh_files(*files, subject.folder/out, peaks=peaks)

def test_counts_that_differ_name_the_image(subject):
    subject.write(VAL + ' 1000', '\n'.join(r + ' 1' for r in ('0', '0', '1')) and '\n'.join(row([*r, x]) for r,x in zip(BVECS.T, (0, 0, 1))))
    subject.refused('dwi.nii.gz', 'gradients do not match the DWI', '33 b-values')
