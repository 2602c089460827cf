"""The GPU beside the CPU: sampling, neighbourhoods, a training step, tracking. Without a GPU there are no rows."""
from contextlib import contextmanager

import torch

from data_rows.reading import temporary_folder, write_study
from data_rows.volume import apart, scene
from dwiml_nb.core.volume import neighborhood_vectors, sample_neighborhood, sample_trilinear
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.demo.recipe import recipe_model, recipe_trainer
from dwiml_nb.tracking.tracker import Tracker
from side_by_side import Row, interleaved

@contextmanager
def whole_floats():
    "cuDNN without TF32: the same numbers as the CPU's."
    before,torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32,False
    try: yield
    finally: torch.backends.cudnn.allow_tf32 = before

def waited(f):
    "Until the GPU has done it."
    f()
    torch.cuda.synchronize()

def row(name, n_threads, on_gpu, on_cpu, agrees, notes=()):
    cpu = f'CPU, {n_threads} threads' if n_threads > 1 else 'CPU'
    t = interleaved({'ours': lambda: waited(on_gpu), cpu: on_cpu}, 3)
    return Row(name, n_threads, t, cpu, '', None, agrees=agrees, notes=list(notes))

def sampling_rows(n_threads, quick):
    volume,points = scene(quick)
    there,at = volume.cuda(), points.cuda()
    for kind in (None, 'axes', 'grid'):
        vectors = neighborhood_vectors(kind)
        sample = sample_trilinear if kind is None else lambda v, p, vectors=vectors: sample_neighborhood(v, p, vectors)
        off = apart(sample(there, at).cpu(), sample(volume, points))
        assert off < 1e-5
        name = f"trilinear, {'x'.join(map(str, volume.shape))}, {len(points):,} points" if kind is None else f"the same with {len(vectors)} neighbours ({kind})"
        yield row(name, n_threads, lambda: sample(there, at), lambda: sample(volume, points), f"largest difference {off:.0e} of values in 0..1")

def model_rows(n_threads, quick):
    n,k,dimensions,features = (500, 50, (20, 20, 20), 5) if quick else (5000, 500, (96, 96, 60), 45)
    with temporary_folder() as folder, whole_floats():
        path,*_ = write_study(folder/'study.hdf5', n, dimensions, features)
        dataset,trainers = MultiSubjectDataset(path).load_data(), {}
        for device in ('cuda', 'cpu'):
            torch.manual_seed(0)
            model = recipe_model(features, dropout=0., rnn_layer_sizes=[256, 256])
            (folder/device).mkdir()
            trainers[device] = recipe_trainer(dataset, folder/device, 'run', model=model, batch_size=k, device=device)
        batch = next(trainers['cpu'].batches('training', 0))
        loss = {device: trainer.run_one_batch(batch)[0].item() for device,trainer in trainers.items()}
        assert abs(loss['cuda'] - loss['cpu']) < 1e-4
        def step(trainer): trainer.back_propagation(trainer.run_one_batch(batch)[0])
        yield row(f"training step, two layers of 256, {k} lines, {len(batch.lines.data):,} points", n_threads, lambda: step(trainers['cuda']), lambda: step(trainers['cpu']),
                  f"losses {loss['cuda']:.6f} and {loss['cpu']:.6f}", ["the batch goes to the GPU within the clock"])
        seeds = torch.rand(k*4, 3)*torch.tensor(dimensions) + .5*torch.tensor(dimensions)     # the middle half, in mm (voxels of 2 mm)
        trackers = {d: Tracker(t.model, dataset, 'sub-01', 'input', theta_deg=90, min_length_mm=0., max_length_mm=40) for d,t in trainers.items()}
        for trainer in trainers.values(): trainer.model.load_state_dict(trainers['cpu'].model.state_dict())
        lines = {d: tracker.track(seeds, quiet=True).lines for d,tracker in trackers.items()}
        points = abs(len(lines['cuda'].data)/len(lines['cpu'].data) - 1)
        assert points < .02
        yield row(f"tracking, the same model, {len(seeds)} seeds, lines up to 40 mm", n_threads, lambda: trackers['cuda'].track(seeds, quiet=True), lambda: trackers['cpu'].track(seeds, quiet=True),
                  f"{len(lines['cuda'].data):,} and {len(lines['cpu'].data):,} points (the tests compare them one by one)")
        dataset.close()

def rows(n_threads, quick):
    if not torch.cuda.is_available(): return
    yield from sampling_rows(n_threads, quick)
    yield from model_rows(n_threads, quick)
