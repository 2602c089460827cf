"""The batch, understood: every stage that its lines went through, what a model sees along a line and answers there, and the widget that shows it."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from dwiml_nb.batch.augment import Draws
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import InputSpec, ModelSpec
from dwiml_nb.batch.stages import batch_in_stages, counts, inputs_along, places_around, same_lines
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.toy import toy_study


@pytest.fixture(scope="module")
def study(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


@pytest.fixture(scope="module")
def ids(study): return next(iter(DWIMLBatchIDSampler(study, "bundles", 40, 40).batches("training", epoch=1, start=1)))


ALL = dict(split_ratio=.4, reverse_ratio=.5, segment_mm=20., widen_mm=1., off_track_mm=1., noise_mm_forward=.1, noise_mm_loss=.2)
AROUND = torch.tensor([[0., 0, 0], [1, 0, 0], [0, 0, -1]])
LOADERS = {  # what the model asks for, options of the loader, the stages
    "all": (dict(step_size=1., uses_last_point=False), ALL, "as stored resampled split segment reversed widened off track noise"),
    "voxels": (dict(step_size=1., streamline_space="vox", legacy_half_voxel=True), dict(split_ratio=.4, widen_mm=1., noise_mm_forward=.1), "as stored resampled split widened noise"),
    "beyond": (dict(step_size=1., loss_takes=("left",)), dict(segment_mm=30., ends_ratio=.5, beyond_mm=3.), "as stored resampled segment beyond"),
    "points": (dict(nb_points=16), dict(split_ratio=1., reverse_ratio=1.), "as stored split resampled reversed"),
    "compressed": (dict(compress_lines=.05), dict(split_ratio=.3, noise_mm_loss=.1), "as stored split resampled noise"),
    "as they are": ({}, dict(widen_mm=2.), "as stored widened"),
    "nothing": ({}, {}, "as stored"),
}


def loader_of(study, kind, with_inputs=True):
    asked, options, _ = LOADERS[kind]
    if not with_inputs: return DWIMLBatchLoader(study, ModelSpec(**asked), "bundles", **options)
    return DWIMLBatchLoaderOneInput(study, ModelSpec(neighborhood_vectors=AROUND, **asked), "input", "bundles", **options)


# ---- stages

@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_last_stage_is_bit_for_bit_the_batch_that_trains(study, ids, kind, with_inputs):
    loader = loader_of(study, kind, with_inputs)
    alone = loader_of(study, kind, with_inputs)
    trained = alone.finish(alone.load_batch_streamlines(ids))
    batch, stages = batch_in_stages(loader, ids)
    assert " ".join(s.name for s in stages) == LOADERS[kind][2]
    assert loader.at_hand is None and "listen" not in vars(loader)
    noisy = stages[-1].name == "noise"
    assert torch.equal(batch.lines.data, trained.lines.data) and batch.draws == trained.draws
    assert torch.equal(stages[-2 if noisy else -1].batch.lines.data, trained.lines.data)
    assert torch.equal(stages[-1].batch.lines.data, (trained.seen if noisy else trained.lines).data)
    assert torch.equal(stages[-1].batch.targets.data, trained.targets.data)

    kept = [study.training.get_lines(s, "bundles", i) for s, i in ids]
    stored = stages[0].batch
    sizes = [float(study.training.grid(s, "bundles").voxel_sizes[0]) for s, _ in ids]
    scale = [1. if kind == "voxels" else size for size in sizes]
    assert torch.allclose(stored.lines.data, torch.cat([o.data*k for o, k in zip(kept, scale)]), atol=1e-4)
    assert [len(s) for s in stages][-1] == len(batch) and dict(stored.ids_per_subj).keys() == dict(batch.ids_per_subj).keys()
    for stage in stages: assert sum(o.stop - o.start for o in stage.batch.ids_per_subj.values()) == len(stage) == len(stage.words)
    for a, b in zip(trained.inputs or (), inputs_along(loader, batch, 5)): assert torch.equal(a[5], b.values.flatten(1))


def test_words_and_numbers_are_those_of_the_draws(study, ids):
    batch, stages = batch_in_stages(loader_of(study, "all"), ids)
    draws, last = batch.draws, stages[-1]
    assert np.array_equal(last.numbers["reversed"] == 1, draws.turned.numpy())
    assert np.allclose(last.numbers["moved (mm)"], draws.shift_mm.norm(dim=1)) and len(last) == 40 + int((draws.split > 0).sum())
    found = {what: n for what, n, _ in counts(last)}
    assert found["first part"] == found["second part"] == int((draws.split > 0).sum()) and found["off track, SD (mm)"] == int((draws.sigma_mm > 0).sum())
    for i in range(len(last)):
        said = ", ".join(last.words[i])
        assert ("reversed" in said) == bool(draws.turned[i]) and ("second part" in said) == (last.part[i] == 2)
        assert f"moved {draws.shift_mm[i].norm():.2g} mm" in said and "noise 0.1 mm on what is seen, noise 0.2 mm on the targets" in said
    split, resampled = stages[2].batch.lines, stages[1].batch.lines
    for i in range(len(last)):  # where each piece comes from
        whole, first = resampled[int(stages[2].origin[i])], last.part[i] < 2
        n = len(split[i])
        assert torch.equal(split[i], whole[:n] if first else whole[-n:])


def test_a_line_is_found_again_at_every_stage(study, ids):
    _, stages = batch_in_stages(loader_of(study, "all"), ids)
    _, plain = batch_in_stages(loader_of(study, "all"), ids, Draws())
    first = int(np.flatnonzero(stages[-1].part == 1)[0])
    assert same_lines(stages[-1], stages[-2], [first]) == [first]
    whole = same_lines(stages[-1], stages[0], [first])
    assert same_lines(stages[0], stages[-1], whole) == [first, first + 1] and same_lines(stages[-1], plain[-1], [first]) == whole
    assert same_lines(stages[0], stages[-1], []) == []


def test_own_classes_and_empty_batches(study, ids):
    class Mine(DWIMLBatchLoader):
        def load_batch_streamlines(self, batch_ids, draws=None):
            batch = super().load_batch_streamlines(batch_ids, draws)
            moved = batch.lines.with_data(batch.lines.data + 1)
            return replace(batch, lines=moved, targets=moved)
    loader = Mine(study, ModelSpec(step_size=1.), "bundles", reverse_ratio=.5)
    batch, stages = batch_in_stages(loader, ids)
    assert [s.name for s in stages] == ["as stored", "resampled", "reversed", "your loader"] and torch.equal(stages[-1].batch.lines.data, batch.lines.data)

    class Other(DWIMLBatchLoader):
        def load_batch_streamlines(self, batch_ids, draws=None): return super().load_batch_streamlines([(s, i[:2]) for s, i in batch_ids], draws)
    assert [s.name for s in batch_in_stages(Other(study, ModelSpec(), "bundles"), ids)[1]] == ["as stored"]
    for kind in ("all", "points", "nothing"):
        batch, stages = batch_in_stages(loader_of(study, kind), [(0, [])])
        assert len(batch) == 0 and all(len(s) == 0 for s in stages)
        assert all(n == 0 for _, n, _ in counts(stages[-1]))


def test_several_inputs_and_places_of_the_neighbourhood(study, ids):
    both = DWIMLBatchLoaderOneInput(study, ModelSpec(step_size=2., inputs={"a": InputSpec(None, AROUND), "b": InputSpec()}),
                                    {"a": "input", "b": "input"}, "bundles")
    batch = both.load_batch_streamlines(ids)
    a, b = inputs_along(both, batch, 3)
    assert a.name == "a" and a.values.shape[1] == 3 and b.values.shape[1] == 1 and torch.equal(a.values[:, :1, :b.values.shape[2]], b.values)
    places = places_around(both, batch, 3, 0, AROUND)
    affine = study.training.grid(ids[0][0], "bundles").affine
    assert torch.allclose(places[1] - places[0], torch.tensor(affine[:3, 0], dtype=places.dtype), atol=1e-3)
