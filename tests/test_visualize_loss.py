"""Losses along lines: the training's own numbers, by hand for a model whose answer is known, files, and bad input in one sentence."""
from pathlib import Path

import numpy as np
import pytest
import torch

import dwiml_nb.core.sizes as sizes
import dwiml_nb.evaluation.line_losses as page
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import BatchIds, DWIMLBatchIDSampler
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.losses import dwiml_visualize_loss
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import directions
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import convert
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.evaluation.line_losses import line_losses, losses_of_lines, share_of, without_gaps, zigzags
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainerOneInput


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()
    yield dataset
    dataset.close()


def learn2track(nb, **options): return Learn2TrackModel(nb, rnn_layer_sizes=[4], step_size=2., dropout=.3, **options)
def transformer(cls, nb, **options): return cls(nb, input_embedded_size=4, nheads=2, n_layers_e=1, max_len=40, step_size=2., **options)


MODELS = {
    "regression": learn2track, "ends": lambda nb: learn2track(nb, dg_args=dict(add_eos=True)), "classes": lambda nb: learn2track(nb, dg_key="sphere-classification", dg_args=dict(add_eos=True)),
    "lengths": lambda nb: learn2track(nb, dg_key="l2-regression"), "axis": lambda nb: learn2track(nb, dg_args=dict(axis_head=True)), "vox": lambda nb: learn2track(nb, streamline_space="vox"),
    "tts": lambda nb: transformer(TransformerSrcOnlyModel, nb, dg_args=dict(add_eos=True)), "ttst": lambda nb: transformer(TransformerSrcAndTgtModel, nb, target_embedded_size=4),
    "tto": lambda nb: transformer(OriginalTransformerModel, nb),
}


def made(study, name, **options):
    torch.manual_seed(0)
    model = MODELS[name](study.nb_features["input"], **options)
    return model, DWIMLBatchLoaderOneInput(study, model, "input", "bundles")


# ---- the numbers of the training

def draws(*args): torch.rand(1)              # as a model may that draws in evaluation, too


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_training(name, study, tmp_path):
    model, loader = made(study, name)
    trainer = DWIMLTrainerOneInput(model, tmp_path, name, DWIMLBatchIDSampler(study, "bundles", 20, 20), loader, device="cpu")
    state, mine = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state().clone()
    drawing = model.register_forward_hook(draws)
    losses = losses_of_lines(model.train(), loader, study.validation, 0, 12, batch_size=7)
    assert model.training and torch.equal(torch.get_rng_state(), mine) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    drawing.remove(); model.eval()
    for k, ids in enumerate((np.arange(7), np.arange(7, 12))):
        with torch.no_grad(): row = trainer.run_one_batch(loader.load_batch_streamlines(BatchIds([(0, ids)], "validation")))
        assert losses.batches[k] == row[0].item()
    n = losses.lines.lengths.numpy()
    assert np.allclose(losses.per_line, [np.nanmean(o) for o in np.split(losses.per_point, np.cumsum(n)[:-1])], atol=1e-6)
    has_ends = name in ("ends", "classes", "tts")
    assert (losses.eos_probs is not None) == has_ends and np.isnan(losses.per_point).sum() == (0 if has_ends else 12)
    if not has_ends and name != "axis": assert np.nanmean(losses.per_point[:n[:7].sum()]) == pytest.approx(losses.batches[0], rel=1e-5)
    assert losses.steps.shape == (n.sum(), 3) and np.isnan(losses.displacement).sum() == 12


def test_many_batches_are_one(study):
    model, loader = made(study, "regression")
    every, few = (losses_of_lines(model, loader, study.validation, 0, 20, batch_size=b) for b in (20, 3))
    assert np.allclose(every.per_point, few.per_point, atol=1e-5, equal_nan=True) and len(few.batches) == 7 and torch.equal(every.lines.data, few.lines.data)


# ---- by hand

@pytest.mark.parametrize("space", ["voxmm", "vox"])
def test_a_model_whose_answer_is_known(study, space):
    "It always says: along the second axis of the image, and P(end) = 0.2."
    torch.manual_seed(0)
    model = Learn2TrackModel(study.nb_features["input"], rnn_layer_sizes=[4], step_size=2., dg_args=dict(add_eos=True), streamline_space=space)
    last = model.direction_getter.layers[1]
    with torch.no_grad(): last.weight.zero_(); last.bias.copy_(torch.tensor([0., 7, 0, np.log(.25)]))
    losses = losses_of_lines(model, DWIMLBatchLoaderOneInput(study, model, "input", "bundles"), study.validation, 0, 5)
    affine, own = study.validation.grid(0, "bundles").affine, directions(losses.lines)
    axis = affine[:3, 1]/np.linalg.norm(affine[:3, 1])
    assert np.allclose(losses.eos_probs, .2) and losses.ends.sum() == 5 and np.allclose(losses.eos_errors, np.where(losses.ends, .8, .2))
    rows = ~losses.ends
    length = np.linalg.norm(own.data, axis=1, keepdims=True)
    assert np.allclose(losses.steps[rows], length*axis, atol=1e-4)
    assert np.allclose(losses.displacement[rows], np.linalg.norm(length*axis - own.data.numpy(), axis=1), atol=1e-4)
    cosine = (own.data.numpy()/length) @ axis
    assert np.allclose(losses.per_point[rows], 1 - cosine - np.log(.8), atol=1e-4)
    assert np.allclose(losses.per_point[losses.ends], -np.log(.2), atol=1e-4)
    zigzag = zigzags(losses, 1)
    assert len(zigzag) == 2 and np.allclose(zigzag.lines[1][1::2] - zigzag.lines[1][::2], np.linalg.norm(np.diff(zigzag.lines[0], axis=0), axis=1)[:, None]*axis, atol=1e-4)


def test_ranks_and_gaps(study):
    model, loader = made(study, "regression")
    losses = losses_of_lines(model, loader, study.validation, 0, 20)
    losses.per_line[3] = np.nan
    best, worst = share_of(losses, 10)
    order = sorted(set(range(20)) - {3}, key=lambda i: losses.per_line[i])
    assert best.tolist() == order[:2] and worst.tolist() == order[::-1][:2] and sorted(share_of(losses, 100)[0]) == sorted(order)
    lines = Ragged.from_list([torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(3, 3)])
    assert without_gaps(np.array([1, np.nan, np.nan, 5, np.nan]), lines).tolist() == [1, 1, 0, 5, 5]


# ---- from a folder

@pytest.fixture(scope="module")
def run(study, tmp_path_factory):
    "Two experiments: one learns where lines end."
    folder = tmp_path_factory.mktemp("runs")
    for name in ("ends", "regression"):
        model, loader = made(study, name)
        DWIMLTrainerOneInput(model, folder, name, DWIMLBatchIDSampler(study, "bundles", 20, 20), loader, device="cpu", max_epochs=1, max_batches_per_epoch_training=1,
                             max_batches_per_epoch_validation=1).train_and_validate()
    return folder


def test_every_file(run, study, tmp_path, capsys):
    subject = study.validation.subjects[0]
    run_command(dwiml_visualize_loss, [str(run/"ends"), subject, "--device", "cpu", "--out_dir", str(tmp_path/"new"), "--out_prefix", "a_", "--compute_histogram", "--save_colored_tractogram",
                                       "--save_colored_best_and_worst", "--min_range", "0", "--max_range", "1.5", "--save_colored_eos_probs", "--save_colored_eos_errors", "--save_displacement", "2"])
    told = capsys.readouterr().out
    names = {"a_histogram.png", "a_best10percent.trk", "a_worst10percent.trk", "a_displacement.trk"}
    names |= {f"a_{kind}{what}.{suffix}" for what in ("loss_clipped0-1.5", "eos_probs", "eos_errors") for kind, suffix in (("colored_", "trk"), ("colorbar_", "png"))}
    assert {p.name for p in (tmp_path/"new").iterdir()} == names and all(n in told for n in names)
    losses, coloured = line_losses(run/"ends", subject, device="cpu"), load_tractogram(tmp_path/"new"/"a_colored_loss_clipped0-1.5.trk")
    assert np.allclose(coloured.dpp["loss"][:, 0], losses.per_point, atol=1e-6) and np.allclose(coloured.dps["mean_loss"][:, 0], losses.per_line, atol=1e-6)
    assert np.allclose(coloured.lines.data, losses.lines.data, atol=1e-3) and coloured.dpp["color"].max() <= 255 and len(np.unique(coloured.dpp["color"], axis=0)) > 5
    over = losses.per_point >= 1.5
    assert over.any() and (coloured.dpp["color"][over] == coloured.dpp["color"][over][0]).all()
    worst = load_tractogram(tmp_path/"new"/"a_worst10percent.trk")
    assert np.allclose(worst.dps["mean_loss"][:, 0], np.sort(losses.per_line)[::-1][:len(worst)], atol=1e-6) and len(worst) == round(len(losses)/10)


def test_lines_of_a_file(run, study, tmp_path):
    "The study's own lines, from a file of each kind: the same losses."
    subject, kept = study.validation.subjects[0], study.validation.subject(0).streamlines["bundles"]
    lines = Ragged.from_list([torch.from_numpy(np.asarray(o)) for o in kept.as_sft(np.arange(9)).streamlines])
    grid = study.validation.grid(0, "bundles")
    known = line_losses(run/"ends", subject, device="cpu")
    for kind in ("trk", "tck", "trx"):
        save_tractogram(Tractogram(convert(lines, grid, "vox", "rasmm"), grid), tmp_path/f"a.{kind}")
        found = line_losses(run/"ends", subject, streamlines_file=tmp_path/f"a.{kind}", device="cpu")
        assert np.allclose(found.per_line, known.per_line[:9], atol=1e-4) and len(found) == 9


def test_bad_input_is_a_sentence(run, study, tmp_path, capsys):
    subject, grid = study.validation.subjects[0], study.validation.grid(0, "bundles")
    files = {"point": [[0., 0, 0]], "far": [[1e6, 0, 0], [1e6 + 1, 0, 0]]}
    for name, line in files.items(): save_tractogram(Tractogram(Ragged.from_list([torch.tensor(line)]), grid), tmp_path/f"{name}.trx")
    (tmp_path/"none.trk").write_bytes(b"nothing"); (tmp_path/"file").write_text("")
    (tmp_path/f"{subject}_histogram.png").write_text("precious")
    ends, other = [str(run/"ends"), subject], [str(run/"regression"), subject]
    cases = [(["nowhere", subject], "not the folder of an experiment"), ([str(run/"ends"), "nobody"], "nobody"), ([*ends, "--streamlines_group", "bundle"], "bundle"),
             ([*ends, "--input_group", "inputs"], "inputs"), ([*ends, "--streamlines_group", "bundles", "--streamlines_file", str(tmp_path/"far.trx")], "one of the two"),
             ([*ends, "--streamlines_file", str(tmp_path/"point.trx")], "at least two points"), ([*ends, "--streamlines_file", str(tmp_path/"far.trx")], "far outside"),
             ([*ends, "--streamlines_file", str(tmp_path/"none.trk")], "none.trk: the tractogram cannot be read"), ([*ends, "--streamlines_file", "no.trk"], "no.trk: no such tractogram"),
             ([*ends, "--colormap", "plasmo"], "Did you mean 'plasma'"), ([*ends, "--save_colored_tractogram", "--min_range", "2", "--max_range", "1"], "begins below its end"),
             ([*ends, "--save_colored_best_and_worst", "101"], "a percentage above 0"), ([*ends, "--batch_size", "0"], "1 or more"), ([*ends, "--compute_histogram", "--out_dir", str(tmp_path/"a"/"b")], "no such folder"),
             ([*ends, "--compute_histogram", "--out_dir", str(tmp_path/"file")], "not a folder"), ([*ends, "--compute_histogram", "--out_dir", str(tmp_path)], "a file of that name already"),
             ([*other, "--compute_histogram", "--out_dir", str(tmp_path/"new"), "--save_colored_eos_probs"], "does not learn where lines end")]
    for words, says in cases:
        with pytest.raises(SystemExit) as e: run_command(dwiml_visualize_loss, [*words, "--device", "cpu"])
        told = str(e.value.code) + capsys.readouterr().err
        assert says in told and "Traceback" not in told and "fault of dwiml_nb" not in told, (words, told)
    assert (tmp_path/f"{subject}_histogram.png").read_text() == "precious" and not (tmp_path/"new").exists()


def test_memory_is_asked_for_first(run, study, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "losses_of_lines", lambda *args: pytest.fail("begun"))
    monkeypatch.setattr(sizes, "UNASKED", 0); monkeypatch.setattr(sizes, "free_memory", lambda device="cpu": 20_000)
    monkeypatch.setattr(page, "experiment_model", lambda *args, model=made(study, "ends")[0]: model)
    with pytest.raises(DataProblem, match="no memory for the losses of"): line_losses(run/"ends", study.validation.subjects[0])
    assert Path(run/"ends").is_dir()
