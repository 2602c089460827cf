"""BIDS derivatives as people have them: tables by hand, ids spelled otherwise, sessions, names with more entities, links whose content is elsewhere."""
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.bids import bids_sources
from dwiml_nb.study.create import create_study

GRID = Grid(np.diag([2., 2, 2, 1]), (10, 10, 10))
FOD = {'input': {'param': 'fod'}}
TABLE = 'participant_id\tage\tsplit\nsub-01\t20\ttraining\nsub-02\t30\tvalidation\nsub-03\t40\ttesting\n'
WANT = {'training': ['sub-01'], 'validation': ['sub-02'], 'testing': ['sub-03']}
LINE = torch.tensor([[4., 4, 4], [6, 4, 4], [8, 5, 4]])


class Tree:
    "A small derivatives folder, one line a tractogram."
    def __init__(self, path, people=('01', '02', '03'), sessions=None, names=('tract-AF_tractogram.trk',)):
        self.path = path
        for p in people:
            for s in (sessions or {}).get(p, [None]):
                stem = f'sub-{p}' + (f'_ses-{s}' if s else '')
                folder = path/f'sub-{p}'/(f'ses-{s}' if s else '')/'dwi'
                folder.mkdir(parents=True)
                nib.save(nib.Nifti1Image(np.ones((10, 10, 10), 'f4'), GRID.affine), folder/f'{stem}_param-fod_dwimap.nii.gz')
                for n in names: save_tractogram(Tractogram(Ragged.from_list([LINE]), GRID), folder/f'{stem}_{n}')
    def __truediv__(self, name): return self.path/name
    def sources(self, volumes=FOD, **options): return bids_sources(self.path, volumes, **options)
    def lists(self, table=None, **options):
        if table is not None: (self.path/'participants.tsv').write_bytes(table if isinstance(table, bytes) else table.encode())
        return self.sources(**{'split': 'split', **options}).lists
    def refused(self, *words, table=None, **options):
        with pytest.raises(DataProblem) as caught: self.lists(table, **options)
        for word in words: assert str(word) in str(caught.value), f"'{word}' is not in: {caught.value}"
    def labels(self, out, **options):
        "The words of each line of the first training subject in the study made of it."
        sources = self.sources(training=['01'], **options)
        dataset = MultiSubjectDataset(create_study(hdf5_file=out, **sources.arguments).path).load_data()
        dps = {k: np.asarray(v) for k,v in dataset.training.streamlines_of(0, 'bundles').get_dps().items()}
        dataset.close()
        words = sources.config['bundles'].get('file_labels', {})
        return sources, sorted(tuple(words[k][int(v)] for k,v in zip(words, line)) for line in zip(*(dps[k].ravel() for k in words)))

@pytest.fixture
def tree(tmp_path): return Tree(tmp_path/'deriv')


# ---- tables

def test_any_way_of_writing_a_table_gives_the_same_lists(tree):
    for name,text in {
            'plain': TABLE, 'no sub-': TABLE.replace('sub-', ''), 'CR': TABLE.replace('\n', '\r'), 'mark': '\ufeff' + TABLE, 'CRLF': TABLE.replace('\n', '\r\n'),
            'UTF-16': TABLE.encode('utf-16'), 'Latin-1': TABLE.replace('20', 'Zoé').encode('latin-1'), 'closing tab': TABLE.replace('\n', '\t\n'),
            'missing cell': TABLE.replace('split', 'split\tnote').replace('training', 'training\tyes'), 'blanks': TABLE.replace('training', 'training ').replace('sub-02', ' sub-02 '),
            'blank lines': TABLE.replace('\n', '\n\n') + '\t\n\n', 'capitals in the header': TABLE.replace('participant_id', 'Participant_ID'), 'capitals': TABLE.replace('sub-', 'SUB-'),
            'no zeros': TABLE.replace('sub-0', ''), 'as floats': re.sub(r'sub-0(\d)', r'\1.0', TABLE), 'quoted by R': '\n'.join('\t'.join(f'"{c}"' for c in r.split('\t')) for r in TABLE.splitlines()),
            'a quotation mark begins a cell': TABLE.replace('20', '"left handed').replace('40', '"5 mm'), 'cells too many': TABLE.replace('20\ttraining', '20\ttraining\textra\tcells'),
            'no-break space': TABLE.replace('sub-01', 'sub-01\u00a0'), 'other words': TABLE.replace('training', 'Train').replace('validation', 'VAL').replace('testing', 'test')}.items():
        assert tree.lists(text) == WANT, name

def test_what_was_taken_otherwise_is_told(tree):
    tree.lists(TABLE.replace('sub-01\t20\ttraining', '1\t20\ttraining\tcells').replace('sub-03', 'sub-33').replace('validation', 'n/a'))
    told = '\n'.join(tree.sources(split='split').remarks)
    for words in ('more cells than columns', '1 for sub-01', 'without a folder are left out: sub-33', 'without a row in participants.tsv: sub-03',
                  "column 'split' puts these in no subset: sub-02, sub-03"): assert words in told, words

def test_tables_whose_content_is_elsewhere_are_told(tree):
    (tree/'participants.tsv').symlink_to('.git/annex/objects/participants.tsv')
    tree.refused('no table of participants', 'git annex get')
    assert tree.lists(split=None, training='1')['training'] == ['sub-01']

def test_tables_that_cannot_be_read(tree):
    for separator in ',; ': tree.refused("no column 'participant_id'", 'put tabs between', table=TABLE.replace('\t', separator))
    tree.refused('lists nobody', table='participant_id\tsplit\n')
    tree.refused('lists nobody', table='')
    tree.refused('not a text file', table=bytes(100))
    tree.refused('row.names=FALSE', table='participant_id\tsplit\n1\tsub-01\ttraining\n2\tsub-02\ttesting\n')
    tree.refused('two columns have one name', table=TABLE.replace('age', 'split'))
    tree.refused("no column 'splt'", "Did you mean 'split'?", table=TABLE, split='splt')
    tree.refused('names no subset', 'n/a', table=TABLE.replace('training', 'n/a').replace('validation', 'n/a').replace('testing', 'n/a'))
    tree.refused('no subject has a row', table=TABLE.replace('sub-0', 'patient'))
    assert tree.lists(bytes(100), split=None, training='01', validation='02', testing='03') == WANT, 'the table is not needed'

def test_ids_of_lists(tree):
    "As in the folders, without sub-, without zeros; a word that could mean two is nobody."
    for words in (('sub-01', 'sub-02', 'sub-03'), ('01', '02', '03'), (1, 2, 3), ('SUB-01', 'sub-2', 'sub_03'), ('sub-01/', '02', '3 ')):
        assert tree.lists(split=None, **dict(zip(WANT, words))) == WANT
    shutil.copytree(tree/'sub-01', tree/'sub-001')
    tree.refused('no such subject', split=None, training='1')
    assert tree.lists(split=None, training='01')['training'] == ['sub-01']

def test_a_row_per_session(tmp_path):
    tree = Tree(tmp_path, sessions={'01': ['1', '2'], '02': ['1'], '03': ['1']})
    want = {'training': ['sub-01_ses-1', 'sub-01_ses-2'], 'validation': ['sub-02_ses-1'], 'testing': ['sub-03_ses-1']}
    rows = ['sub-01\t1\ttraining', 'sub-01\t2\ttraining', 'sub-02\t1\tvalidation', 'sub-03\t1\ttesting']
    table = lambda key, rows=rows: '\n'.join([f'participant_id\t{key}\tsplit', *rows])
    for key in ('session', 'session_id', 'visit'): assert tree.lists(table(key)) == want
    assert tree.lists(table('session', [r.replace('2\ttraining', 'ses-02\tn/a') for r in rows]))['training'] == ['sub-01_ses-1']
    assert tree.lists(table('session', rows[1:]) + '\nsub-03\t2\ttesting')['training'] == ['sub-01_ses-2']
    tree.refused('a person is in two subsets', table=table('session', [r.replace('2\ttraining', '2\ttesting') for r in rows]))
    tree.refused("rows of a participant differ in column 'split'", 'sub-01', 'To do', table=table('visit', [r.replace('2\ttraining', '2\ttesting') for r in rows]))
    assert tree.lists(split=None, training='01', validation='02', testing='03') == want

def test_a_table_of_sessions(tmp_path):
    "`sub-01_sessions.tsv` says more of a session than participants.tsv, in the derivatives or in the raw data."
    tree = Tree(tmp_path/'raw'/'derivatives'/'x', sessions={'01': ['1', '2'], '02': ['1'], '03': ['1']})
    (tmp_path/'raw'/'sub-01').mkdir()
    (tmp_path/'raw'/'participants.tsv').write_text(TABLE)
    (tmp_path/'raw'/'sub-01'/'sub-01_sessions.tsv').write_text('session_id\tsplit\nses-1\ttraining\nses-2\tn/a\n')
    assert tree.lists()['training'] == ['sub-01_ses-1']

def test_folders_that_hold_no_subjects(tmp_path):
    tree = Tree(tmp_path/'raw'/'derivatives'/'x')
    for place in (tmp_path/'raw', tmp_path/'raw'/'derivatives'):
        with pytest.raises(DataProblem, match=f"give the folder that holds them: {tree.path}"): bids_sources(place, FOD, training='01')
    (tree/'sub-04').symlink_to('nowhere')
    assert 'links that lead nowhere are left out: sub-04.' in tree.sources(training='01').remarks


# ---- names

def test_what_tells_tractograms_apart_becomes_labels_or_groups(tmp_path):
    names = ('tract-AF_hemi-L_tractogram.trk', 'tract-AF_hemi-R_tractogram.trk', 'tract-CC_tractogram.trk')
    tree = Tree(tmp_path/'t', people=['01'], names=names)
    sources,labels = tree.labels(tmp_path/'a.hdf5')
    assert labels == [('AF', 'L'), ('AF', 'R'), ('CC', 'none')]
    assert sources.config['bundles']['file_labels'] == {'tract': ['AF', 'CC'], 'hemi': ['L', 'R', 'none']}
    grouped = tree.sources(training=['01'], tract='groups')
    create_study(hdf5_file=tmp_path/'g.hdf5', **grouped.arguments)
    assert list(grouped.config) == ['input', 'AF_L', 'AF_R', 'CC']
    assert tree.labels(tmp_path/'c.hdf5', streamlines={'hemi': ['L', None]})[1] == [('AF', 'L'), ('CC', 'none')]

def test_versions_of_one_tractogram_are_a_choice(tmp_path):
    tree = Tree(tmp_path/'t', people=['01'], names=[f'tract-{t}_{e}_tractogram.trk' for t in ('AF', 'CST') for e in ('desc-raw', 'desc-clean')])
    tree.refused('differ in desc', 'clean, raw', '--entities tract desc', split=None, training='01')
    assert tree.labels(tmp_path/'a.hdf5', streamlines={'desc': 'clean'})[1] == [('AF',), ('CST',)]
    assert len(tree.labels(tmp_path/'b.hdf5', streamlines={'desc': '*'})[1]) == 4
    assert tree.labels(tmp_path/'c.hdf5', entities=['tract', 'desc'])[1] == [('AF', 'clean'), ('AF', 'raw'), ('CST', 'clean'), ('CST', 'raw')]
    tree.refused('differ in tract, desc', split=None, training='01', tract='none')
    tree.refused("no tractogram's name has 'dsc'", "Did you mean 'desc'?", split=None, training='01', entities='dsc')

def test_what_differs_between_subjects_is_told(tree):
    for old,new in (('sub-02/dwi/sub-02_param-fod_dwimap.nii.gz', 'sub-02/dwi/sub-02_model-dti_param-fod_dwimap.nii.gz'),
                    ('sub-03/dwi/sub-03_tract-AF_tractogram.trk', 'sub-03/dwi/sub-03_tract-AF_hemi-L_desc-raw_tractogram.trk')): (tree/old).rename(tree/new)
    sources = tree.sources(training=['01', '02', '03'])
    assert sources.remarks == ['group input: subjects differ in model: dti, none.', 'group bundles: subjects differ in desc: none, raw.']
    assert sources.config['bundles']['file_labels'] == {'tract': ['AF'], 'hemi': ['L', 'none']}
    assert tree.sources(training='01').remarks == []

def test_other_programs_name_them_otherwise(tmp_path):
    tree = Tree(tmp_path/'t', people=['01'], names=['model-gqi_bundle-AF_streamlines.trk', 'model-gqi_bundle-CST_streamlines.trk'])
    tree.refused('no tractogram answers', 'sub-01_model-gqi_bundle-AF_streamlines.trk', 'bundles:suffix=streamlines', split=None, training='01')
    assert tree.labels(tmp_path/'a.hdf5', streamlines={'suffix': 'streamlines'})[1] == [('AF',), ('CST',)]
    tree.refused('bundle: AF, CST', split=None, training='01', streamlines={'suffix': 'streamlines', 'bundle': 'UF'})
    plain = Tree(tmp_path/'p', people=['01'], names=())
    plain.refused('no tractogram at all', split=None, training='01')

def test_names_that_say_nothing_as_bids_does(tmp_path):
    tree = Tree(tmp_path/'t', people=['01'], names=())
    (tree/'sub-01'/'tracks').mkdir()
    for name in ('AF_left', 'AF_right', 'CC_1', 'sub-01__AF_L', 'sub-01__CST_L'):
        save_tractogram(Tractogram(Ragged.from_list([LINE]), GRID), tree/'sub-01'/('tracks' if 'sub' not in name else 'dwi')/f'{name}.trk')
    ask = dict(split=None, training='01')
    tree.refused('no tractogram answers', '--streamlines bundles:suffix=L', **ask)
    tree.refused('differ in name', 'AF_L, CST_L', '--entities name', streamlines={'suffix': 'L'}, tract='none', **ask)
    assert tree.labels(tmp_path/'a.hdf5', streamlines={'suffix': 'L'}, entities='name')[1] == [('AF_L',), ('CST_L',)]
    assert tree.labels(tmp_path/'b.hdf5', streamlines={'suffix': '*', 'datatype': 'tracks'}, entities='name')[1] == [('AF_left',), ('AF_right',), ('CC_1',)]
    assert len(tree.labels(tmp_path/'c.hdf5', streamlines={'suffix': 'L', 'name': '*'}, tract='none')[1]) == 0
    shutil.rmtree(tree/'sub-01'/'dwi'); (tree/'sub-01'/'dwi').mkdir()
    tree.refused("--entities name", **ask)

def test_a_choice_that_nobody_can_answer_is_told_at_once(tree):
    ask = dict(split=None, training='01')
    tree.refused('subject sub-01, group input', 'no file with suffix dwimap, param fa', 'not param fa', volumes={'input': {'param': 'fa'}}, **ask)
    shutil.copy(tree/'sub-01/dwi/sub-01_param-fod_dwimap.nii.gz', tree/'sub-01/dwi/sub-01_space-MNI_param-fod_dwimap.nii.gz')
    tree.refused('differ in space', **ask)
    (tree/'sub-01'/'dwi'/'sub-01_param-odf_dwimap.mif').touch()
    tree.refused('sub-01_param-odf_dwimap.mif', 'mrconvert', volumes={'input': {'param': 'odf'}}, **ask)
    tree.refused("cannot be the name of a group", group='a/b', **ask)
    tree.refused('standardization', volumes={'input': {'param': 'fod', 'standardization': 'some', 'space': None}}, **ask)

def test_links_whose_content_is_elsewhere_are_told(tmp_path):
    tree = Tree(tmp_path/'t', people=['01', '02'], names=('tract-AF_tractogram.trk', 'tract-CST_tractogram.trk'))
    lost = tree/'sub-02'/'dwi'/'sub-02_tract-CST_tractogram.trk'
    lost.unlink()
    sources = tree.sources(training=['01', '02'])
    for content in ('../../.git/annex/objects/qF/8V/MD5E-s1896--00/MD5E-s1896--00.trk', '/nowhere/x.trk'):
        lost.symlink_to(content)
        with pytest.raises(DataProblem, match='a link') as caught: create_study(hdf5_file=tmp_path/'a.hdf5', **sources.arguments)
        assert str(lost) in str(caught.value) and caught.value.do
        lost.unlink()
    lost.write_text('/annex/objects/MD5E-s1896--00.trk\n')
    with pytest.raises(DataProblem, match='git annex get') as caught: create_study(hdf5_file=tmp_path/'a.hdf5', **sources.arguments)

def test_a_folder_behind_a_link(tmp_path):
    tree = Tree(tmp_path/'t', people=['01'])
    shutil.move(tree/'sub-01'/'dwi', tmp_path/'elsewhere')
    (tree/'sub-01'/'dwi').symlink_to(tmp_path/'elsewhere')
    (tree/'sub-01'/'again').symlink_to('.')
    assert tree.labels(tmp_path/'a.hdf5')[1] == [('AF',)]

def test_a_file_in_another_subjects_folder(tmp_path):
    tree = Tree(tmp_path/'t', people=['01', '02'])
    sources,stray = tree.sources(training=['01', '02']), tree/'sub-01'/'dwi'/'sub-02_tract-AF_tractogram.trk'
    shutil.copy(tree/'sub-02'/'dwi'/stray.name, stray)
    with pytest.raises(DataProblem, match='another subject or session than its folder') as caught: create_study(hdf5_file=tmp_path/'a.hdf5', **sources.arguments)
    assert str(stray) in str(caught.value)
