"""What a GPU computes, beside what the CPU computes: sampling, a training step, tracked lines, batches on their way to the device.

Nothing here draws or needs a notebook; `tools/gpu_check.sh` runs these tests and the GPU rows of benchmarks/data.py.
"""
from functools import partial

import numpy as np
import pytest
import torch
from distributed_script import connected_train, in_ranks, make, train

from dwiml_nb.core.volume import neighborhood_vectors, sample_neighborhood, sample_trilinear
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.directions.registry import DIRECTION_GETTERS, direction_getter
from dwiml_nb.demo.recipe import recipe_model, recipe_tracker, recipe_trainer
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask

pytestmark = pytest.mark.cuda
GPU = "cuda"
MODELS = {
    "cosine-axis": {},
    "cosine-eos": dict(dg_args=dict(add_eos=True), rnn_key="lstm"),
    "sphere-eos": dict(dg_key="sphere-classification", dg_args=dict(add_eos=True)),
    "gaussian-mixture": dict(dg_key="gaussian-mixture"),
    "fisher-mixture-eos": dict(dg_key="fisher-von-mises-mixture", dg_args=dict(add_eos=True)),
}


@pytest.fixture(autouse=True)
def whole_floats(monkeypatch):
    "No TF32, which keeps ten bits of a product's factors: cuDNN uses it unless told otherwise."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def agree(record_property):
    "A function that holds two results to a largest difference, and tells it (for the table of `tools/gpu_check.sh`)."
    def check(found, expected, allowed, unit=""):
        difference = max((torch.as_tensor(a).cpu() - torch.as_tensor(b).cpu()).abs().max().item() for a, b in zip(found, expected, strict=True))
        record_property("difference", f"{difference:.1e} of {allowed:g}{unit}")
        assert difference <= allowed
    return check


@pytest.fixture(scope="module")
def dataset(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


def trainer_on(device, dataset, folder, **model):
    "The recipe without dropout, which each device draws in its own way."
    torch.manual_seed(0)
    model = recipe_model(dataset.nb_features["input"], dropout=0., **model)
    folder = folder / device
    folder.mkdir()
    return recipe_trainer(dataset, folder, "run", 300, model=model, device=device)


@pytest.mark.parametrize("kind", [None, "axes", "grid"])
def test_sampling(kind, agree):
    rng = np.random.default_rng(0)
    volume = torch.from_numpy(rng.random((30, 28, 20, 15), np.float32))
    points = torch.from_numpy((rng.random((5000, 3))*34 - 2).astype(np.float32))  # some outside
    if kind is None: sample = sample_trilinear
    else: sample = lambda *both: sample_neighborhood(*both, neighborhood_vectors(kind))
    agree([sample(volume.to(GPU), points.to(GPU))], [sample(volume, points)], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step(model, dataset, tmp_path, agree):
    "The loss of a batch, and of the same batch after a step."
    losses = []
    for device in (GPU, "cpu"):
        trainer = trainer_on(device, dataset, tmp_path, **MODELS[model])
        batch, each = next(trainer.batches("training", 0)), []
        for _ in range(2):
            each.append(trainer.run_one_batch(batch)[0])
            trainer.back_propagation(each[-1])
        assert each[0].device.type == device and each[1] < each[0]
        losses.append([loss.detach() for loss in each])
    agree(*losses, 1e-4)


@pytest.mark.parametrize("key", [key for key, getter in DIRECTION_GETTERS.items() if getter.__module__.startswith("dwiml_nb.")])
def test_directions_and_densities(key, agree):
    "The same outputs and draws: the same directions, densities and pictures."
    getter = direction_getter(key, 6, add_eos=True, axis_head=True)
    gen = torch.Generator().manual_seed(0)
    rows, draws, before = (torch.rand(200, n, generator=gen) for n in (getter.nb_columns + getter.nb_more, 4, 3))
    found = []
    for device in (GPU, "cpu"):
        getter, rows, draws, before = (o.to(device) for o in (getter, rows, draws, before))
        go = lambda algo: getter.get_tracking_directions(rows, algo, 1., before, draws)
        found.append([go("det"), getter.picture(rows)] + ([go("prob"), getter.log_density(rows, before)] if getter.is_probabilistic else []))
        assert {o.device.type for o in found[-1]} == {device}
    agree(*found, 1e-3)


def test_tracked_lines(dataset, tmp_path, agree):
    "A model that was trained on the GPU tracks there and on the CPU: the same points from each seed on, until one of the two stops."
    trainer = trainer_on(GPU, dataset, tmp_path)
    trainer.train_and_validate()
    index = dataset.testing.subjects.index(subject := dataset.testing.subjects[0])
    seeds = seeds_from_mask(dataset.testing.get_volume(index, "seed_mask"), dataset.testing.grid(index, "seed_mask").affine, nt=300)
    halves, stops = [], []
    for device in (GPU, "cpu"):
        tractogram = recipe_tracker(trainer.model.to(device), dataset, subject, min_length_mm=0.).track(seeds, quiet=True)
        from_seed, codes = {}, {}
        for line, seed, code in zip(tractogram.lines.unbind(), tractogram.info["seeds"], tractogram.info["stop_reasons"]):
            at = int((line - seed).norm(dim=1).argmin())
            from_seed[tuple(seed.tolist())] = line[at:], line[:at + 1].flip(0)
            codes[tuple(seed.tolist())] = code.tolist(), len(line)
        halves.append(from_seed)
        stops.append(codes)
    both = halves[0].keys() & halves[1].keys()
    assert len(both) > 250 and np.mean([stops[0][seed] == stops[1][seed] for seed in both]) > .9
    pairs = [(a[:len(b)], b[:len(a)]) for seed in both for a, b in zip(halves[0][seed], halves[1][seed])]
    assert np.mean([len(a) for a, _ in pairs]) > 10
    agree(*zip(*pairs), .05, " mm")


@pytest.mark.parametrize("inputs_in_workers", [False, True])
@pytest.mark.parametrize("nb_workers", [0, 2])
def test_batches_made_ahead_are_the_same(nb_workers, inputs_in_workers, dataset, tmp_path, agree):
    "Pinned memory, a stream of its own, the next batch on its way while this one is used: not a bit changes."
    batches = []
    for device in (GPU, "cpu"):
        trainer = trainer_on(device, dataset, tmp_path)
        trainer.nb_cpu_processes, trainer.batch_loader.inputs_in_workers = nb_workers, inputs_in_workers
        tensors = []
        for batch in trainer.batches("training", 0):
            if device != "cpu":
                assert all(t.device.type == device for t in batch.tensors())
                torch.ones(4000, 4000, device=device).matmul(torch.ones(4000, 4000, device=device))  # keeps the device busy
            tensors += [t.to("cpu", torch.float64) for t in batch.tensors()]
        batches.append(tensors)
    assert len(batches[0]) > 30
    agree(*batches, 0.)


def test_training_in_several_processes(dataset, tmp_path, agree):
    "One process for each GPU, two at most, connected by NCCL: the weights of one process. With one GPU, the same calls in a group of one."
    pytest.importorskip("lightning_fabric")
    size = min(2, torch.cuda.device_count())
    found = in_ranks(partial(connected_train, size, GPU, dataset.path, tmp_path), size=size, method="spawn")
    alone = train(make, dataset.path, tmp_path, "alone", device=GPU)
    for backend, sums, weights in found:
        assert (backend, sums) == ("nccl", [2.*size]*6)
        agree([weights[name] for name in alone], list(alone.values()), 1e-4)
