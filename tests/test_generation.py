"""Lines that a model generates while it trains: beside a walk written anew, on copies of a subject with other voxels, with every model; and what a run keeps.

The study has one subject three times, in voxels of 2 mm, 1 mm and 1 x 2 x 4 mm: its image is linear in space, so every copy says the same at every point.
"""
import functools
import json
import math
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.batch.inputs import InputsAt
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import BatchIds, DWIMLBatchIDSampler
from dwiml_nb.core.connectivity import Regions, connectivity_matrix, connectivity_scores, end_regions, is_connection, label_of_rows
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid, convert
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts, write_run_file
from dwiml_nb.study.create import create_study
from dwiml_nb.training.generation import PARTED_MM, DWIMLTrainerOneInputWithGVPhase, Generated, Generation, given_parts, points_every
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

VOXELS = {"two": (2, 2, 2), "one": (1, 1, 1), "flat": (1, 2, 4)}  # mm
BOX = np.array([48, 40, 32])  # mm
BLOCS, NB_LABELS = (4, 4, 3), 12


def real_lines(seed=7, n=14):
    "Smooth lines within the box, mm from its corner; the last ones of few points."
    rng, lines = np.random.default_rng(seed), []
    for i in range(n):
        mm, t = (26 if i < n - 3 else (1.2, 2.5, 4)[i - n + 3]), np.linspace(0, 1, 60)[:, None]
        way = rng.normal(size=3) * [1, 1, .5]
        bend = rng.normal(size=3) * 4
        lines.append(BOX / 2 + rng.uniform(-5, 5, 3) + (t - .5) * mm * way / np.linalg.norm(way) + bend * t * (1 - t) * (mm > 10))
    return lines


def write_subject(folder, sizes, seed):
    "One copy: image, mask, labels and lines on a grid with voxels of this size."
    sizes, shape = np.array(sizes, float), (BOX // np.array(sizes)).astype(int)
    affine = np.diag([*sizes, 1.])
    affine[:3, 3] = sizes / 2 - BOX / 2  # the volume's corner is that of every copy
    centres = np.moveaxis(np.indices(shape), 0, -1) + .5
    mm = centres * sizes
    rng = np.random.default_rng(seed)
    image = (mm / BOX - .5) @ rng.normal(size=(3, 6)) * 3
    coarse = (mm // 4).astype(int)  # 4 mm boxes, of whole voxels in every copy
    few = BOX // 4
    allowed = np.zeros(few, bool)
    allowed[1:-1, 1:-1, 1:-1] = rng.random(few - 2) < .93
    labels = rng.integers(0, NB_LABELS, few)
    pick = lambda o: o[tuple(np.moveaxis(coarse, -1, 0))]
    folder.mkdir(parents=True)
    for name, data in (("input", image.astype(np.float32)), ("mask", pick(allowed).astype(np.float32)), ("labels", pick(labels).astype(np.int16))):
        nib.save(nib.Nifti1Image(data, affine), folder / f"{name}.nii.gz")
    grid = Grid(affine, shape)
    lines = convert(Ragged.from_list([o.astype(np.float32) for o in real_lines()]), grid, "voxmm", "rasmm")
    save_tractogram(Tractogram(lines, grid), folder / "lines.trk")
    vox = convert(lines, grid, "rasmm", "vox")
    for name, regions in (("blocs", Regions.from_blocs(shape, BLOCS)), ("labels", Regions.from_labels(pick(labels)))):
        np.save(folder / f"{name}.npy", connectivity_matrix(end_regions(vox, regions), regions.nb).toarray())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("copies")
    for name, sizes in VOXELS.items(): write_subject(root / "subjects" / name, sizes, seed=3)
    write_subject(root / "subjects" / "train", (2, 2, 2), seed=3)
    write_subject(root / "subjects" / "other", (2, 2, 2), seed=4)  # another image, mask, labels
    for kind in ("blocs", "labels"): np.save(root / "subjects" / "other" / f"{kind}.npy", np.zeros((48, 48) if kind == "blocs" else (12, 12)))  # nothing is connected
    volume = lambda name: dict(type="volume", files=[f"{name}.nii.gz"], standardization="none")
    lines = dict(type="streamlines", files=["lines.trk"])
    config = dict(input=volume("input"), mask=volume("mask"), plain=lines, blocs=dict(**lines, connectivity_matrix="blocs.npy", connectivity_nb_blocs=list(BLOCS)),
                  labelled=dict(**lines, connectivity_matrix="labels.npy", connectivity_labels="labels.nii.gz"))
    study = create_study(root / "subjects", root / "study.hdf5", config, ["train"], [*VOXELS, "other"]).path
    return MultiSubjectDataset(study).load_data()


SMALL = dict(nb_features=6, step_size=1.)
TRANSFORMER = dict(input_embedded_size=16, nheads=4, n_layers_e=2, max_len=300)
KINDS = {
    "gru": functools.partial(Learn2TrackModel, rnn_key="gru", rnn_layer_sizes=[12, 8], nb_previous_dirs=2),
    "lstm": functools.partial(Learn2TrackModel, rnn_key="lstm", rnn_layer_sizes=[12], dropout=.2),
    "tts": functools.partial(TransformerSrcOnlyModel, **TRANSFORMER),
    "ttst": functools.partial(TransformerSrcAndTgtModel, target_embedded_size=8, **TRANSFORMER),
    "tto": functools.partial(OriginalTransformerModel, **TRANSFORMER),
}


def made(kind="gru", seed=0, eos=False, **options):
    torch.manual_seed(seed)
    args = {"dg_args": dict(add_eos=True)} if eos else {}
    return KINDS[kind](**{**SMALL, **args, **options})


def loader_of(dataset, model, group="plain"): return DWIMLBatchLoaderOneInput(dataset, model, "input", group)


def batch_of(loader, ids, subset="validation"):
    "A batch of these lines: {subject: numbers}."
    subjects = loader.dataset.subset(subset).subjects
    return loader.load_batch_streamlines(BatchIds([(subjects.index(s), np.asarray(o)) for s, o in ids.items()], subset, 0, 0))


def generated(dataset, model, ids, group="plain", mask_group="mask", **options):
    loader = loader_of(dataset, model, group)
    return {o.subject: o for o in Generation(model.eval(), loader, mask_group, **options).generate(batch_of(loader, ids))}


# ---- beside a walk written anew: each line alone, the whole line through forward at every step

@torch.no_grad()
def walked_alone(dataset, model, subject, truth, nb_segments, max_mm=200.):
    "Points of one line as plain steps make them; forward reads the whole line each time."
    subset = dataset.validation
    index = subset.subjects.index(subject)
    grid, mask = subset.grid(index, "plain"), subset.get_volume(index, "mask")[..., 0]
    sizes = torch.tensor(grid.voxel_sizes, dtype=torch.float32)
    inputs_at = InputsAt(subset, index, {"": ["input"]}, loader_of(dataset, model).spec, grid)
    line = truth[:min(nb_segments + 1, len(truth) - 1)]
    length = float(line.diff(dim=0).norm(dim=1).sum())
    while length + 1 <= max_mm:
        rows = Ragged.from_list([inputs_at(line / sizes)[0]])
        outputs = model(rows, Ragged.from_list([line]))
        last = outputs.data[-1:] if isinstance(outputs, Ragged) else outputs[0][-1:]
        step = model.get_tracking_directions(last, "det", .5)[0]
        if step.isnan().any(): break
        new = line[-1] + step / step.norm()
        where = (new / sizes).floor().long()
        if (where < 0).any() or (where >= torch.tensor(grid.dimensions)).any() or mask[tuple(where)] < .5: break
        line, length = torch.cat([line, new[None]]), length + 1
    return line


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_caches_are_those_of_the_line(dataset, kind, eos):
    "Several subjects in a batch, short lines among them: each line is what it is alone, its whole self read again at every step."
    model = made(kind, eos=eos).eval()
    lines = generated(dataset, model, {"two": range(8, 14), "other": range(9)}, nb_segments=4)
    assert set(lines) == {"two", "other"}
    moved = 0
    for subject, o in lines.items():
        for i in range(len(o)):
            alone = walked_alone(dataset, model, subject, o.truth[i], 4)
            assert len(o.lines[i]) == len(alone)
            torch.testing.assert_close(o.lines[i], alone, atol=1e-3, rtol=0)
            assert torch.equal(o.lines[i][:o.nb_given[i]], o.truth[i][:o.nb_given[i]])
            moved += len(alone) - int(o.nb_given[i])
    assert moved > 30 or eos


def test_where_the_model_says_that_lines_end(dataset):
    "A model that is sure of it adds nothing; one that never is goes on."
    for bias, sure in ((50., True), (-50., False)):
        model = made(eos=True)
        with torch.no_grad(): model.direction_getter.layers[-1].bias[-1] = bias
        o = generated(dataset, model, {"two": range(8)}, nb_segments=2, mask_group=None)["two"]
        ended = o.codes == o.reasons.index("eos")
        assert bool(ended.all()) if sure else not bool(ended.any())
        assert (o.lines.lengths == o.nb_given).all() == sure


# ---- millimetres

def test_copies_of_a_subject_give_the_same_numbers(dataset):
    "In voxels of 2 mm, 1 mm and 1 x 2 x 4 mm, with connections of blocs and of labels."
    for group in ("blocs", "labelled"):
        for kind in ("gru", "tts"):
            lines = generated(dataset, made(kind), {name: range(14) for name in VOXELS}, group, nb_segments=2)
            first = lines["two"].scores()
            assert first["final_distance_mm"].min() > 0 and 0 < first["left_mask"].mean()
            for name in ("one", "flat"):
                scores = lines[name].scores()
                assert list(scores) == list(first) and "false_connections" in scores
                for k in scores: torch.testing.assert_close(scores[k], first[k], atol=1e-3, rtol=0, msg=f"{k} of {name}")
    assert 0 < first["false_connections"].mean() < 1


def test_models_in_voxels_step_in_mm(dataset):
    "A model of dwi_ml's space walks as far as any other (there, steps of mm were taken for voxels)."
    ids = {"two": range(8), "one": range(8)}
    mm, vox = (generated(dataset, made("lstm", streamline_space=space), ids) for space in ("voxmm", "vox"))
    for name in ids:
        own = vox[name].lines
        torch.testing.assert_close(own.data, mm[name].lines.data, atol=1e-3, rtol=0)
        steps = own[0][int(vox[name].nb_given[0]):].diff(dim=0).norm(dim=1)
        torch.testing.assert_close(steps, torch.ones_like(steps), atol=1e-4, rtol=0)


def test_walkers_beside_loops(dataset):
    "Distances step by step, the place where walkers part and the mean, from plain loops over points."
    o = generated(dataset, made(), {"two": range(14)}, nb_segments=3, max_length_mm=60., mask_group=None)["two"]
    scores, way = o.scores(), o.apart()
    for i in range(len(o)):
        n, truth, new = int(o.nb_given[i]), o.truth[i].double().numpy(), o.lines[i].double().numpy()
        def place(line, s):
            line = line[n - 1:]
            along = np.r_[0, np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()]
            return np.array([np.interp(s, along, line[:, k]) for k in range(3)]), along[-1]
        longest = max(place(truth, 0)[1], place(new, 0)[1])
        steps = np.arange(math.ceil(longest - 1e-3) + 1)
        expected = [np.linalg.norm(place(truth, s)[0] - place(new, s)[0]) for s in steps]
        np.testing.assert_allclose(way[i], expected, atol=2e-3)
        assert scores["path_distance_mm"][i] == pytest.approx(np.mean(expected), abs=2e-3)
        assert scores["final_distance_mm"][i] == pytest.approx(np.linalg.norm(truth[-1] - new[-1]), abs=1e-4)
        real, far = np.linalg.norm(np.diff(truth, axis=0), axis=1).sum(), np.flatnonzero(np.array(expected) > PARTED_MM)
        given = np.linalg.norm(np.diff(truth[:n], axis=0), axis=1).sum()
        parted = abs(1 - (given + far[0]) / real) if len(far) else 0
        assert scores["diverging"][i] == pytest.approx(parted, abs=1e-4)
    assert (scores["diverging"] > 0).any() and (scores["diverging"] == 0).any()
    for r in (15, 25, 40): assert torch.equal(scores[f"within_{r}_mm"], (scores["final_distance_mm"] <= r).double())


def test_a_perfect_line_is_no_distance_away():
    lines = Ragged.from_list([torch.tensor([[0., 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]), torch.tensor([[5., 5, 5], [5, 6, 5]])])
    o = Generated("a", Grid(np.eye(4), (9, 9, 9)), lines, lines, torch.tensor([2, 1]), torch.tensor([1, 5]), ("walking", "mask", "volume", "angle", "eos", "length"), 1.)
    scores = {k: v.tolist() for k, v in o.scores().items()}
    assert scores == {"final_distance_mm": [0, 0], "path_distance_mm": [0, 0], "clipped_distance_mm": [0, 0], "diverging": [0, 0],
                      "within_15_mm": [1, 1], "within_25_mm": [1, 1], "within_40_mm": [1, 1], "left_mask": [1, 0]}


@pytest.mark.parametrize("step", [.3, 1., 7.])
def test_points_every_step(step):
    lines = Ragged.from_list([torch.tensor(o, dtype=torch.float32) for o in real_lines()] + [torch.zeros(2, 3), torch.zeros(1, 3)])
    new = points_every(lines, step)
    for line, points in zip(lines, new):
        line = line.double().numpy()
        along = np.r_[0, np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()]
        wanted = np.minimum(np.arange(math.ceil(along[-1] / step - 1e-3) + 1) * step, along[-1])
        np.testing.assert_allclose(points, np.stack([np.interp(wanted, along, line[:, k]) for k in range(3)], 1), atol=1e-4)
        assert torch.allclose(points[-1], torch.tensor(line[-1], dtype=torch.float32))


# ---- limits

@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_few_points_and_batches_of_one(dataset, kind):
    "However many segments are to be given, a line keeps its last point back; nothing given but the start works too."
    model = made(kind)
    for nb_segments in (0, 1, 50):
        for ids in ({"two": [11]}, {"two": [11, 12, 13, 0], "one": [12]}):
            for o in generated(dataset, model, ids, nb_segments=nb_segments).values():
                assert (o.nb_given == torch.minimum(o.truth.lengths - 1, torch.tensor(nb_segments + 1))).all()
                assert o.lines.data.isfinite().all() and (o.lines.lengths >= o.nb_given).all()
                assert all(v.isfinite().all() for v in o.scores().values())


def test_how_far_and_how_sharply(dataset):
    "The longest line is a whole line's, in mm; an angle limits turns if it is asked for; no point lies outside the mask."
    model, ids = made(seed=3), {"two": range(14)}
    for most in (3., 10., 17.3):
        o = generated(dataset, model, ids, mask_group=None, nb_segments=2, max_length_mm=most)["two"]
        mm = torch.stack([line.diff(dim=0).norm(dim=1).sum() for line in o.lines])
        given = torch.stack([line.diff(dim=0).norm(dim=1).sum() for line in given_parts(o.truth, 2)])
        assert (mm <= torch.maximum(given, torch.tensor(most)) + 1e-3).all()
        long = o.codes == o.reasons.index("length")
        assert long.any() and (mm[long] > most - 1 - 1e-3).all()
    free, bound = (generated(dataset, model, ids, theta_deg=t)["two"] for t in (180., 2.))
    assert not (free.codes == free.reasons.index("angle")).any() and (bound.codes == bound.reasons.index("angle")).any()
    mask = dataset.validation.get_volume(list(dataset.validation.subjects).index("two"), "mask")[..., 0]
    new = torch.cat([line[n:] for line, n in zip(free.lines, free.nb_given)])
    assert bool((mask[tuple((new / 2).floor().long().T)] > .5).all())


def test_few_lines_together_are_the_same_lines(dataset, monkeypatch):
    whole = generated(dataset, made("tto"), {"two": range(14)})["two"]
    monkeypatch.setattr("dwiml_nb.training.generation.lines_together", lambda spec, points: 3)
    parts = generated(dataset, made("tto"), {"two": range(14)})["two"]
    torch.testing.assert_close(parts.lines.data, whole.lines.data, atol=1e-4, rtol=0)
    assert torch.equal(parts.codes, whole.codes)


# ---- connections

def test_each_line_has_its_own_subjects_matrix(dataset):
    "The real ends of a subject are connected in its own matrix, never in that of another; no matrix, no value."
    for group in ("blocs", "labelled"):
        for name, expected in (("two", True), ("one", True), ("flat", True), ("other", False)):
            index = list(dataset.validation.subjects).index(name)
            generation = Generation(made().eval(), loader_of(dataset, made(), group))
            known = generation.known_connections(dataset.validation, index, dataset.validation.get_lines(index, group))
            assert known.all() == expected and known.any() == expected
    ids = {"two": range(14), "other": range(14)}
    both = generated(dataset, made(), ids, "blocs")
    loader = loader_of(dataset, made().eval(), "blocs")
    distance, n, values = Generation(made().eval(), loader, "mask")(batch_of(loader, ids))
    assert both["other"].scores()["false_connections"].mean() == 1 and n == 28
    share = torch.cat([o.scores()["false_connections"] for o in both.values()]).mean()
    assert values["false_connections"].value == pytest.approx(float(share)) and values["false_connections"].weight == 28
    assert "false_connections" not in generated(dataset, made(), ids)["two"].scores()


def test_matrices_beside_plain_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (6, 5, 4)) * 3
    lines = Ragged.from_list([torch.tensor(rng.uniform(0, (6, 5, 4), (3, 3)), dtype=torch.float32) for _ in range(80)])
    regions = Regions.from_labels(labels)
    order, expected = sorted(np.unique(labels)), np.zeros((4, 4), int)
    for line in lines:
        a, b = sorted(order.index(labels[tuple(np.floor(line[i].numpy()).astype(int))]) for i in (0, -1))
        expected[a, b] += 1
    counts = connectivity_matrix(end_regions(lines, regions), regions.nb)
    assert (counts.toarray() == expected).all() and expected.sum() == 80
    reference = expected > 6
    scores = connectivity_scores(counts, reference)
    assert scores == {"false_connections": pytest.approx(expected[~reference].sum() / 80), "found_connections": 1.}
    assert is_connection(end_regions(lines, regions), reference).sum() == expected[reference].sum()
    assert connectivity_scores(counts, reference.T) == scores
    assert connectivity_scores(np.zeros((4, 4)), reference) == {"false_connections": 0., "found_connections": 0.}


def test_rows_of_labels_take_no_memory_on_their_word():
    "A label of two billion is a label; numbers of rows that nothing explains are refused."
    labels = np.array([0, 5, 2**31 - 1]).reshape(3, 1, 1)
    assert label_of_rows(labels).tolist() == [0, 5, 2**31 - 1] and label_of_rows(labels, 2).tolist() == [5, 2**31 - 1]
    with pytest.raises(DataProblem, match="nothing says which region"): label_of_rows(labels, 17)
    assert Regions.from_labels(labels, 2).rows.ravel().tolist() == [-1, 0, 1]


# ---- a run

def trainer_of(dataset, folder, name, kind="gru", cls=DWIMLTrainerOneInputWithGVPhase, group="plain", seed=0, eos=False, **options):
    model = made(kind, seed, eos)
    sampler = DWIMLBatchIDSampler(dataset, group, batch_size_training=7, batch_size_validation=20)
    more = dict(add_a_tracking_validation_phase=True, tracking_phase_mask_group="mask") if cls is DWIMLTrainerOneInputWithGVPhase else {}
    return cls(model, folder, name, sampler, loader_of(dataset, model, group), **{**more, "max_epochs": 3, "device": "cpu", **options})


def rows_of(trainer, which="epochs"):
    rows = [json.loads(line) for line in (trainer.experiment_folder / "logs" / f"{which}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "points_per_second", "waiting_seconds")} for row in rows]


def same_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["lstm", "tto", "ttst"])
def test_training_is_what_it_is_without(dataset, tmp_path, kind):
    "The same weights, state of the optimiser, rows and best model, bit for bit, with dropout; the rows only have more columns."
    plain, off, on = (trainer_of(dataset, tmp_path, name, kind, cls, **more) for name, cls, more in (
        ("plain", DWIMLTrainerOneInput, {}), ("off", DWIMLTrainerOneInputWithGVPhase, dict(add_a_tracking_validation_phase=False)),
        ("on", DWIMLTrainerOneInputWithGVPhase, {})))
    for trainer in (plain, off, on): trainer.train_and_validate()
    assert same_weights(plain, on) and same_weights(plain, off)
    moments = [[v for s in o.optimizer.state_dict()["state"].values() for v in s.values()] for o in (plain, on)]
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert [phase.name for phase in off.phases] == ["training", "validation"]
    for which in ("epochs", "batches"):
        rows = [{k: v for k, v in row.items() if not k.startswith("generation_")} for row in rows_of(on, which) if row.get("phase") != "generation"]
        assert rows == rows_of(plain, which) == rows_of(off, which)
    names = [k for k in rows_of(on)[0] if k.startswith("generation_")]
    assert names == [f"generation_{k}" for k in ("final_distance_mm", "path_distance_mm", "clipped_distance_mm", "diverging", "within_15_mm", "within_25_mm",
                                                 "within_40_mm", "left_mask")]


def test_means_are_those_of_all_lines(dataset, tmp_path):
    "The epoch's row weighs batches by their lines, and connections by the lines that have a matrix."
    trainer = trainer_of(dataset, tmp_path, "means", group="blocs", max_epochs=1)
    trainer.train_and_validate()
    every = [o for batch in trainer.batch_sampler.batches("validation", 0) for o in trainer.generation.generate(trainer.batch_loader.load_batch_streamlines(batch))]
    assert sum(map(len, every)) == 56
    row = rows_of(trainer)[0]
    for name in every[0].scores():
        assert row[f"generation_{name}"] == pytest.approx(float(torch.cat([o.scores()[name] for o in every]).mean()), abs=1e-5)
    batches = [r for r in rows_of(trainer, "batches") if r["phase"] == "generation"]
    assert sum(r["n"] for r in batches) == 56 and len(batches) == 3


@pytest.mark.parametrize("options,expected", [({}, [0, 1, 2, 3, 4]), (dict(tracking_phase_frequency=2), [1, 3]), (dict(tracking_phase_start=3), [3, 4]),
                                              (dict(tracking_phase_start=1, tracking_phase_frequency=2), [2, 4])])
def test_which_epochs_have_the_phase(dataset, tmp_path, options, expected):
    trainer = trainer_of(dataset, tmp_path, "some", max_epochs=5, max_batches_per_epoch_training=1, tracking_phase_nb_batches=1, **options)
    trainer.train_and_validate()
    assert [row["epoch"] for row in rows_of(trainer) if "generation_final_distance_mm" in row] == expected
    assert [row["epoch"] for row in rows_of(trainer, "batches") if row["phase"] == "generation"] == expected


@pytest.mark.parametrize("kind", ["gru", "tts"])
def test_resume_in_the_middle_of_the_phase(dataset, tmp_path, kind):
    "From the folder alone; rows and weights are those of a run that was never stopped."
    whole = trainer_of(dataset, tmp_path, "whole", kind)
    whole.train_and_validate()
    stopped = trainer_of(dataset, tmp_path, "stopped", kind)
    def stop(row):
        if (row["phase"], row["epoch"], row["batch"]) == ("generation", 1, 1): stopped.control.request_stop()
    stopped.control.on_batch_end.append(stop)
    stopped.train_and_validate()
    assert (stopped.epoch, stopped.phase, stopped.batch) == (1, "generation", 2)
    again = trainer_from_folder(tmp_path, "stopped", device="cpu")
    assert again.tracking_phase == stopped.tracking_phase and (again.phase, again.batch) == ("generation", 2)
    again.train_and_validate()
    assert same_weights(whole, again)
    for which in ("epochs", "batches"): assert rows_of(again, which) == rows_of(whole, which)


@pytest.mark.parametrize("monitor,mode", [("final_distance_mm", "min"), ("within_15_mm", "max")])
def test_the_best_epoch_is_that_of_the_best_lines(dataset, tmp_path, monitor, mode):
    "Only epochs with the phase are judged; patience counts those alone; a resume keeps all this."
    options = dict(learning_rates=[.01], max_batches_per_epoch_training=3, tracking_phase_frequency=2, monitor=f"generation_{monitor}", monitor_mode=mode)
    trainer = trainer_of(dataset, tmp_path, "best", max_epochs=5, **options)
    trainer.train_and_validate()
    again = trainer_from_folder(tmp_path, "best", device="cpu", new_max_epochs=8)
    again.train_and_validate()
    values = {row["epoch"]: row[options["monitor"]] for row in rows_of(again) if options["monitor"] in row}
    assert list(values) == [1, 3, 5, 7] and again.monitor.best_epoch == (min if mode == "min" else max)(values, key=values.get)
    best = load_model(again.experiment_folder / "best_model").eval()
    sampler, loader = again.batch_sampler, loader_of(dataset, best)
    made = [o for ids in sampler.batches("validation", again.monitor.best_epoch) for o in Generation(best, loader, "mask").generate(loader.load_batch_streamlines(ids))]
    assert torch.cat([o.scores()[monitor] for o in made]).mean() == pytest.approx(values[again.monitor.best_epoch], abs=1e-5)
    still = trainer_of(dataset, tmp_path, "patient", max_epochs=50, patience=2, patience_delta=1e9 if mode == "min" else 2., **options)
    still.train_and_validate()
    assert still.epoch == 6  # the first phase is the best, two more are not


@pytest.mark.parametrize("options", [dict(ema_decay=.5), dict(autocast="bf16"), dict(accumulate=2)])
def test_with_other_options_of_the_loop(dataset, tmp_path, options):
    "Lines are those of the weights that validation uses; training stays what it is without the phase."
    plain, on = (trainer_of(dataset, tmp_path, name, "tts", cls, **options) for name, cls in (("plain", DWIMLTrainerOneInput), ("on", DWIMLTrainerOneInputWithGVPhase)))
    for trainer in (plain, on): trainer.train_and_validate()
    assert same_weights(plain, on)
    assert [row["valid_loss"] for row in rows_of(plain)] == [row["valid_loss"] for row in rows_of(on)]
    assert all(math.isfinite(row["generation_final_distance_mm"]) for row in rows_of(on))


def test_options_of_the_phase_stay_in_a_resume(dataset, tmp_path):
    trainer = trainer_of(dataset, tmp_path, "kept", max_epochs=1, max_batches_per_epoch_training=1)
    trainer.train_and_validate()
    with pytest.raises(ValueError, match="tracking_phase_frequency goes on as it was in the run, 1"):
        trainer_from_folder(tmp_path, "kept", device="cpu", new_max_epochs=2, tracking_phase_frequency=2)


def test_resume_with_another_mask_is_refused(dataset, tmp_path):
    "The mask is part of the data of a run."
    trainer = trainer_of(dataset, tmp_path, "masked", max_batches_per_epoch_training=1, tracking_phase_nb_batches=1)
    trainer.control.on_batch_end.append(lambda row: trainer.control.request_stop())
    trainer.train_and_validate()
    for name, change in (("same", 0), ("other", 1)):
        study = shutil.copy(dataset.path, tmp_path / f"{name}.hdf5")
        with h5py.File(study, "r+") as f:
            mask = f["one/mask/data"]
            mask[...] = abs(mask[...] - change)
        if not change: assert trainer_from_folder(tmp_path, "masked", study, device="cpu").batch == 1
        else:
            with pytest.raises(DataProblem, match="one.*mask"): trainer_from_folder(tmp_path, "masked", study, device="cpu")


def test_a_loop_of_ones_own(dataset, tmp_path):
    "Epochs written as in dwi_ml, without the phase's turn, go on; the phase may be run by name."
    trainer = trainer_of(dataset, tmp_path, "own", max_epochs=2)
    class Mine(DWIMLTrainerOneInputWithGVPhase):
        def train_and_validate(self):
            for epoch in range(self.epoch, self.max_epochs):
                self.train_one_epoch(epoch)
                self.validate_one_epoch(epoch)
                if epoch: self.go_through("generation", epoch, self.generate_one_batch)
                self.save_checkpoint()
        def generate_one_batch(self, batch):
            distance, n, values = super().generate_one_batch(batch)
            return distance, n, {**values, "nb_subjects": len(batch.ids_per_subj)}
    mine = trainer_of(dataset, tmp_path, "mine", cls=Mine, max_epochs=2, add_a_tracking_validation_phase=True, tracking_phase_mask_group="mask")
    trainer.train_and_validate()
    mine.train_and_validate()
    assert same_weights(trainer, mine)
    assert [row.get("generation_nb_subjects") for row in rows_of(mine)] == [None, 4]
    assert {**rows_of(trainer)[1], "generation_nb_subjects": 4} == rows_of(mine)[1]


def test_a_run_file_has_the_phase(dataset, tmp_path):
    "The options stand in the file under their names, and the same run comes of it."
    trainer = trainer_of(dataset, tmp_path, "first", max_epochs=2, tracking_phase_frequency=2, tracking_phase_max_length_mm=50)
    trainer.train_and_validate()
    write_run_file(trainer, tmp_path / "run.toml")
    again = run_parts(run_config(tmp_path / "run.toml", "training.experiment_name=second")).trainer
    assert type(again) is type(trainer) and again.tracking_phase == trainer.tracking_phase
    again.model.load_state_dict(made().state_dict())  # the weights that `trainer_of` began with
    again.train_and_validate()
    assert same_weights(trainer, again) and rows_of(trainer) == rows_of(again)


@pytest.mark.parametrize("options,match", [
    (dict(tracking_phase_mask_group="msk"), "no volume group 'msk'"), (dict(tracking_phase_mask_group="input"), "cannot be this volume"),
    (dict(tracking_phase_nb_segments_init=-1), "nb_segments"), (dict(tracking_phase_frequency=0), "tracking_phase_frequency"),
    (dict(tracking_phase_theta_deg=0), "theta_deg"), (dict(tracking_phase_eos_threshold="often"), "eos_threshold"),
    (dict(tracking_phase_max_length_mm=0), "max_length_mm"), (dict(tracking_phase_nb_batches=0), "tracking_phase_nb_batches")])
def test_options_that_cannot_work(dataset, tmp_path, options, match):
    with pytest.raises((DataProblem, ValueError), match=match):
        trainer_of(dataset, tmp_path, "no", max_epochs=1, **options).train_and_validate()


def test_models_that_cannot(dataset):
    no_step, short = made(step_size=None), made("tts", max_len=20)
    with pytest.raises(ValueError, match="no step_size"): Generation(no_step, loader_of(dataset, no_step))
    with pytest.raises(ValueError, match="max_len=20"): Generation(short, loader_of(dataset, short))
    o = Generation(no_step.eval(), loader_of(dataset, no_step), step_mm=.5).generate(batch_of(loader_of(dataset, no_step), {"one": range(3)}))[0]
    torch.testing.assert_close(o.lines[0][2:].diff(dim=0).norm(dim=1), torch.full((len(o.lines[0]) - 3,), .5), atol=1e-4, rtol=0)


@pytest.mark.cuda
def test_on_a_gpu(dataset):
    cpu, gpu = (generated(dataset, made("tto").to(device), {"two": range(14), "other": range(14)}) for device in ("cpu", "cuda"))
    for name in cpu: assert (cpu[name].scores()["final_distance_mm"] - gpu[name].scores()["final_distance_mm"].cpu()).abs().median() < 1e-2
