"""The connectivity commands: matrices counted again in plain Python, what is hidden, bundles, and files that do not fit."""
import numpy as np
import pytest
import torch

from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.connectivity import (dwiml_compute_connectivity_matrix_from_blocs, dwiml_compute_connectivity_matrix_from_labels, dwiml_compute_connectivity_score,
                                       dwiml_divide_volume_into_blocs)
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid, convert, save_volume
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram

GRID = Grid(np.array([[-2., 0, 0, 20], [0, 1.5, 0, -3], [0, 0, 1, 4], [0, 0, 0, 1]]), (12, 10, 8))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Labels 0, 3, 7 and 20, and 200 lines between random places, written as .tck."
    folder, rng = tmp_path_factory.mktemp("connectivity"), np.random.default_rng(0)
    labels = np.zeros(GRID.dimensions, np.int32)
    for label, where in ((3, np.s_[:4]), (7, np.s_[5:8]), (20, np.s_[9:])): labels[where] = label
    save_volume(labels, GRID, folder / "labels.nii.gz")
    ends = torch.from_numpy(rng.uniform(0, GRID.dimensions, (200, 2, 3)).astype(np.float32))
    lines = Ragged.from_list([torch.lerp(a, b, torch.linspace(0, 1, 9)[:, None]) for a, b in ends])
    save_tractogram(Tractogram(convert(lines, GRID, "vox", "rasmm"), GRID), folder / "lines.tck")
    return folder, labels, load_tractogram(folder / "lines.tck", GRID).lines


def places(lines):
    vox = convert(lines, GRID, "rasmm", "vox")
    return [(line[0].numpy(), line[-1].numpy()) for line in vox.unbind()]


def run(command, *words): run_command(command, [str(o) for o in words])


def test_blocs_are_counted_as_by_hand(here, tmp_path):
    folder, labels, lines = here
    run(dwiml_compute_connectivity_matrix_from_blocs, folder / "labels.nii.gz", folder / "lines.tck", tmp_path / "m.npy", 5, 3, 2, "--save_biggest", tmp_path / "b.trk", "--save_smallest", tmp_path / "s.tck")
    wanted = np.zeros((30, 30), int)
    number = lambda p: int(np.ravel_multi_index((np.floor(p.astype(float) * (5, 3, 2) / GRID.dimensions)).astype(int), (5, 3, 2)))
    for a, b in places(lines): wanted[tuple(sorted((number(a), number(b))))] += 1
    found = np.load(tmp_path / "m.npy")
    assert (found == wanted).all() and found.sum() == 200
    assert len(load_tractogram(tmp_path / "b.trk")) == found.max() and len(load_tractogram(tmp_path / "s.tck", GRID)) == 1
    run(dwiml_compute_connectivity_matrix_from_blocs, folder / "labels.nii.gz", folder / "lines.tck", tmp_path / "m.npy", 5, 3, 2, "--binary", "-f")
    assert (np.load(tmp_path / "m.npy") == (wanted > 0)).all()
    run(dwiml_divide_volume_into_blocs, folder / "labels.nii.gz", tmp_path / "d.nii.gz", 5, 3, 2, "--shuffle_colors")


def test_labels_and_a_background_that_is_hidden(here, tmp_path, capsys):
    folder, labels, lines = here
    words = folder / "labels.nii.gz", folder / "lines.tck", tmp_path / "m.npy"
    wanted = np.zeros((4, 4), int)
    row = {0: 0, 3: 1, 7: 2, 20: 3}
    for a, b in places(lines): wanted[tuple(sorted(row[labels[tuple(p.astype(int))]] for p in (a, b)))] += 1
    run(dwiml_compute_connectivity_matrix_from_labels, *words)
    assert (np.load(tmp_path / "m.npy") == wanted).all() and (tmp_path / "m_labels.txt").read_text().split("\n")[1] == "1 = 3"
    run(dwiml_compute_connectivity_matrix_from_labels, *words, "--hide_background", "-f")
    hidden = np.load(tmp_path / "m.npy")
    assert (hidden[1:, 1:] == wanted[1:, 1:]).all() and not hidden[0].any()
    assert len(load_tractogram(tmp_path / "m_rejected_from_background.trk")) == wanted[0].sum()
    run(dwiml_compute_connectivity_matrix_from_labels, *words, "--use_longest_segment", "-f")
    longest = np.load(tmp_path / "m.npy")
    assert longest[1, 3] == 0 and longest[1, 2] + longest[2, 3] > 50                 # straight lines from 3 to 20 pass 7: a piece never spans it
    capsys.readouterr()
    np.save(tmp_path / "r.npy", wanted)
    run(dwiml_compute_connectivity_score, tmp_path / "r.npy", tmp_path / "r.npy")
    assert capsys.readouterr().out == "false_connections: 0\nfound_connections: 1\n"


@pytest.mark.parametrize("words, says", [(["m.txt"], "ends in .npy"), (["m.npy", "--hide_background", "5"], "no such label to hide"), (["m.npy", "--save_biggest", "m.npy"], "would be one file"),
                                         (["m.npy", "--save_smallest", "x.xyz"], "x.xyz")])
def test_what_cannot_be_is_one_sentence(here, tmp_path, words, says, monkeypatch):
    folder, *_ = here
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=says): run(dwiml_compute_connectivity_matrix_from_labels, folder / "labels.nii.gz", folder / "lines.tck", *words)
