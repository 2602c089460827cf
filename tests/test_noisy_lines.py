"""Noise on streamlines: what the loader of a training gives, and what the command writes."""
import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoader
from dwiml_nb.batch.sampler import BatchIds
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.noise import dwiml_visualize_noise_on_streamlines
from dwiml_nb.core.space import apply_affine
from dwiml_nb.core.tractograms import read_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.evaluation.noisy_lines import LinesAlone, noisy_lines
from dwiml_nb.models.batch_losses import ready
from dwiml_nb.study.toy import toy_study


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("noise"))


def test_it_is_what_a_training_gets(study):
    "The same draws as a loader of the same options, for the same batch."
    how = dict(noise_mm_forward=.4, noise_mm_loss=.2, split_ratio=.25, reverse_ratio=.5)
    noisy = noisy_lines(study, "sub-02", "bundles", *how.values(), seed=7)
    dataset = MultiSubjectDataset(study).load_data()
    loader = DWIMLBatchLoader(dataset, LinesAlone(), "bundles", **how, seed=7)
    at = dataset.training.subjects.index("sub-02")
    batch = ready(loader, loader.load_batch_streamlines(BatchIds([(at, np.arange(120))], "training")))
    for mine, own in ((noisy.clean, batch.lines), (noisy.seen, batch.seen), (noisy.targets, batch.targets)):
        assert torch.equal(mine.data, apply_affine(own, batch.history["to_rasmm"][at]).data)
    dataset.close()
    assert len(noisy) == 120 + 30 and len(np.unique(noisy.line)) == 120 and 30 < noisy.turned.sum() < 120
    for what, sd in (("seen", .4), ("targets", .2)):
        far = noisy.moved_mm(what)
        assert sd < far.mean() < 1.7*sd and far.max() < np.sqrt(3)*2*sd + 1e-3                 # clipped at two standard deviations


def test_without_options_lines_are_as_they_are_stored(study):
    noisy = noisy_lines(study, "sub-01", "bundles", most=10)
    assert len(noisy) == 10 and not noisy.moved_mm().any() and not noisy.moved_mm("targets").any() and noisy.line.tolist() == list(range(10))


def test_files_of_the_command(study, tmp_path):
    words = [str(study), "sub-01", "bundles", str(tmp_path / "a.trk"), "--noise_gaussian_size_forward", ".3", "--noise_gaussian_size_loss", ".1", "--html", str(tmp_path / "a.html")]
    run_command(dwiml_visualize_noise_on_streamlines, words)
    noisy = noisy_lines(study, "sub-01", "bundles", .3, .1)
    for name, what in (("a.trk", "seen"), ("a_loss.trk", "targets")):
        kept = read_tractogram(tmp_path / name)
        assert np.allclose(kept.dpp["moved_mm"][:, 0], noisy.moved_mm(what), atol=1e-5) and set(kept.dps) >= {"line", "reversed"} and kept.dpp["color"].shape[1] == 3
    assert "dwiml-turns" in (tmp_path / "a.html").read_text()
    with pytest.raises(SystemExit, match="already"): run_command(dwiml_visualize_noise_on_streamlines, words)


@pytest.mark.parametrize("words, said", [
    (["sub-03", "bundles", "a.trk"], "a training subject"), (["nobody", "bundles", "a.trk"], "nobody"), (["sub-01", "bundels", "a.trk"], "bundles"), (["sub-01", "bundles", "a.tck"], "a .trk or .trx"),
], ids=range(4))
def test_bad_input_is_one_sentence(study, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: run_command(dwiml_visualize_noise_on_streamlines, [str(study), *words])
    assert said in str(e.value) and "Traceback" not in str(e.value) and not list(tmp_path.iterdir())
