"""Whole batches from the file to the features, the next batch of a huge study, and what a training step waits for."""
import time
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import torch
from dipy.tracking.streamline import length, set_number_of_points

from data_rows.reading import other_work, temporary_folder, write_study
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.data.dataset import MultiSubjectDataset
from side_by_side import Row, interleaved, peak_memory


# ---- a whole batch

def gather_8(volume, points):
    "Textbook trilinear interpolation: the eight corners of each point in an array (n, 8, F)."
    low = torch.floor(points - .5)
    corners = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    frac = points - .5 - low
    where = (low.long()[:, None] + corners).clamp(torch.zeros(3, dtype=torch.long), torch.tensor(volume.shape[:3]) - 1)
    weight = torch.where(corners.bool(), frac[:, None], 1 - frac[:, None]).prod(2)
    return (volume[where[..., 0], where[..., 1], where[..., 2]]*weight[..., None]).sum(1)

def textbook_batch(f, volume, ids, size, step_mm, draws):
    "Line by line: offset, length and points read, dipy's resampling, split, reverse, a tensor each; then the 8-corner gather."
    lines = []
    for n,i in enumerate(ids):
        offset,nb = f['sub-01/bundles/offsets'][i], f['sub-01/bundles/lengths'][i]
        line = f['sub-01/bundles/data'][offset:offset + nb].astype(np.float32)*size
        line = set_number_of_points(line, max(2, int(np.ceil(length(line)/step_mm))))
        lines += [line[:draws.split[n]], line[draws.split[n]:]] if draws.split[n] > 0 else [line]
    lines = [torch.from_numpy(np.ascontiguousarray(line[::-1] if turned else line)) for line,turned in zip(lines, draws.turned)]
    return lines, gather_8(volume, torch.cat(lines)/size)

def whole_batch_rows(n_threads, quick):
    n,k,dimensions,features = (3000, 100, (20, 20, 20), 5) if quick else (50_000, 1000, (96, 96, 60), 45)
    with temporary_folder() as folder:
        path,*_ = write_study(folder/'study.hdf5', n, dimensions, features)
        dataset = MultiSubjectDataset(path, lazy=True).load_data()
        loader = DWIMLBatchLoaderOneInput(dataset, ModelSpec(step_size=1.), 'input', 'bundles', split_ratio=.5, reverse_ratio=.5)
        ids = np.random.default_rng(1).choice(n, k, replace=False)
        def ours():
            batch = loader.load_batch_streamlines([(0, ids)])
            return batch, loader.load_batch_inputs(*batch)
        batch,inputs = ours()
        volume,draws = dataset.training.get_volume(0, 'input'), batch.history['draws']
        with h5py.File(path) as f:
            textbook = lambda: textbook_batch(f, volume, ids, 2., 1., draws)
            theirs,values = textbook()
            same = np.array([len(o) for o in theirs]) == batch.lines.lengths.numpy()       # a length of 40.000001 steps may round either way
            pick = torch.from_numpy(np.repeat(same, batch.lines.lengths.numpy()))
            theirs = Ragged.from_list(theirs)
            pick_theirs = torch.from_numpy(np.repeat(same, theirs.lengths.numpy()))
            points = (batch.lines.data[pick] - theirs.data[pick_theirs]).abs().max().item()
            both = (inputs.data[pick] - values[pick_theirs]).abs().max().item()
            assert same.mean() > .99 and points < 1e-3 and both < 1e-2
            ways = {'ours': ours, 'textbook, line by line': textbook}
            for turn in range(2): ours()
            stages = interleaved({'lines': lambda: loader.load_batch_streamlines([(0, ids)])}, before=other_work)
            t = interleaved(ways, before=other_work)
            memory = peak_memory(ours)/(inputs.data.nbytes + batch.lines.data.nbytes)
        goal = t['textbook, line by line']/t['ours']
        yield Row(f"whole batch of {k} lines of {n}, lazy, {features} features", n_threads, t, 'textbook, line by line', '>= 50x', None if quick else goal >= 50, memory=memory,
                  agrees=f"{same.mean():.1%} of lines with the same number of points: points to {points:.1e} mm, features to {both:.1e}",
                  why='' if quick or goal >= 50 else "sampling the features is most of it, and there the textbook gather is only about 12x slower",
                  notes=[f"{len(inputs.data)} points; read, resample, split, reverse alone: {stages['lines']*1e3:.1f} ms"])
        dataset.close()


# ---- the sampler

class FlagArray:
    "Textbook: a flag per line of the study, chance drawn among those that are left."
    def __init__(self, n): self.unused = np.ones(n, bool)
    def next(self, k):
        ids = np.random.default_rng(0).choice(np.flatnonzero(self.unused), k, replace=False)
        self.unused[ids] = False
        return ids

def sampler_rows(n_threads, quick):
    seconds,memory,nb = {}, {}, {}
    for lines,subjects in ((300_000, 100), (300_000_000, 100), (300_000_001, 10_000)):
        subset = SimpleNamespace(nb_streamlines=lambda group, lines=lines, n=subjects: np.full(n, lines//n))
        tracemalloc.start()
        sampler = DWIMLBatchIDSampler(SimpleNamespace(streamline_groups=['bundles'], subset=lambda name, subset=subset: subset), 'bundles', 1000)
        nb[lines] = sampler.nb_batches()
        batches = sampler.batches(start=nb[lines]//2)
        next(batches)
        memory[lines] = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        seconds[lines] = lambda batches=batches: next(batches)
    small = FlagArray(300_000 if quick else 3_000_000)
    many = 'ours, 10,000 subjects'
    t = interleaved({'ours': seconds[300_000_000], many: seconds[300_000_001], 'ours, 300,000 lines': seconds[300_000], f'a flag a line, {len(small.unused):,} lines': lambda: small.next(1000)}, repeats=9)
    peer = list(t)[3]
    yield Row("sampler: next 1,000 of 300,000,000 lines", n_threads, t, peer, '< 5 ms', t['ours'] < .005, limit='ours, 300,000 lines',
              agrees=f"memory {memory[300_000_000]/1e3:.0f} kB, with 300,000 lines {memory[300_000]/1e3:.0f} kB; {nb[300_000_000]:,} batches counted, each line once (tests/test_batch_properties.py)",
              notes=[f"of 10,000 subjects rather than 100: {1e3*t[many]:.2f} ms, {memory[300_000_001]/1e3:.0f} kB"])


# ---- what training waits for

def waiting_rows(n_threads, quick):
    from dwiml_nb.models.learn2track import Learn2TrackModel
    from dwiml_nb.training.trainer import DWIMLTrainerOneInput
    n,k,dimensions,features,steps = (3000, 20, (20, 20, 20), 5, 3) if quick else (50_000, 200, (96, 96, 60), 45, 6)
    median = lambda values: float(np.median(values[2:]))                       # the first batches wait for the workers to start
    with temporary_folder() as folder:
        path,*_ = write_study(folder/'study.hdf5', n, dimensions, features)
        dataset = MultiSubjectDataset(path, lazy=True).load_data()
        said = {}
        for where in ('here', 'in workers'):
            torch.manual_seed(0)
            model = Learn2TrackModel(nb_features=features, step_size=.5, rnn_key='gru', rnn_layer_sizes=[20, 20] if quick else [500, 500], nb_previous_dirs=1)
            loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', split_ratio=.5, reverse_ratio=.5, inputs_in_workers=where == 'in workers')
            trainer = DWIMLTrainerOneInput(model, folder, where, DWIMLBatchIDSampler(dataset, 'bundles', k), loader, nb_cpu_processes=2, device='cpu')
            waited,sampled,whole,points = [], [], [], []
            batches = trainer.batches('training', 0)
            for _ in range(steps + 2):
                start = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - start)
                loader.finish(batch)                                           # once for the clock; the step does it again
                sampled.append(time.perf_counter() - start - waited[-1])
                start = time.perf_counter() - waited[-1]
                trainer.back_propagation(trainer.run_one_batch(batch)[0])
                whole.append(time.perf_counter() - start); points.append(len(batch.lines.data))
            del batches
            said[where] = [median(o) for o in (waited, sampled, whole, points)]
        wait,sample,step,points = said['here']
        share = (wait + sample)/step
        yield Row(f"Learn2Track 2x500 GRU, {k} lines, two workers: waiting for data", n_threads, {'ours': wait + sample, 'the whole step': step}, 'the whole step', '< 5 % of a step', None if quick else share < .05,
                  agrees=f"{share:.2%} of a step of {step:.2f} s, {points:.0f} points: waiting for lines {wait*1e3:.2f} ms, then sampling the features in the training process {sample*1e3:.1f} ms",
                  why='' if quick or share < .05 else "the workers and the training share the same cores",
                  notes=[f"features sampled by the workers: waiting {said['in workers'][0]*1e3:.2f} ms, {said['in workers'][0]/said['in workers'][2]:.2%} of a step of {said['in workers'][2]:.2f} s"])
        dataset.close()


def rows(threads, quick):
    yield from whole_batch_rows(threads, quick)
    yield from sampler_rows(threads, quick)
    yield from waiting_rows(threads, quick)
