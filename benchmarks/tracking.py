"""Whole-brain tracking: what it costs beside dipy's fast trackers, its memory over seeds, the same bits whoever tracks, other batch sizes.

    python benchmarks/tracking.py                                # cost, memory, bits, sizes: some minutes
    python benchmarks/tracking.py cost --threads 2 --repeats 5
    python benchmarks/tracking.py bits sizes --seeds 20000
    python benchmarks/tracking.py --million --processes 2        # 1,000,000 seeds, once: memory, seconds, size

`cost`: both follow the same single peak of each voxel, with the same seeds, step, angle and mask, in turns: ours through `Tracker` with a model
that only reads its input, dipy's compiled `eudx_tracking` with as many threads. Processor time is told beside wall time: where others use the
machine, only the first means something. The other parts track the toy study with the demo's model, trained for a few batches.
"""
import argparse
import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from side_by_side import interleaved, rss

from dwiml_nb.core.phantom import FieldReader
from dwiml_nb.core.space import Grid, convert
from dwiml_nb.core.tractograms import load_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.demo.recipe import recipe_trainer
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking import whole_brain
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.tracking.whole_brain import TrackedParts, parts_folder_of

OPTIONS = dict(tracking_mask_group='wm_mask', theta_deg=45, min_length_mm=2, max_length_mm=200, device='cpu')


# ---- cost beside dipy

def one_peak_each():
    "Directions that circle around the z axis, one vertex of dipy's sphere in each voxel."
    from dipy.data import get_sphere
    vertices = get_sphere(name='repulsion724').vertices
    affine = np.diag([2., 2, 2, 1])
    affine[:3, 3] = -90, -90, -20
    grid = Grid(affine, (90, 90, 20))
    x,y,_ = np.moveaxis((np.indices(grid.dimensions) + .5).astype(float) - np.array([45, 45, 0])[:, None, None, None], 0, 0)
    away = np.maximum(np.hypot(x, y), 1e-6)
    which = (np.stack([-y, x, 0*x], -1)/away[..., None] @ vertices.T).argmax(-1)
    field = vertices[which]                                           # the vertex itself: never its opposite
    return grid, vertices, which, torch.tensor(field).float(), torch.tensor((away > 12) & (away < 40) & (x > 0))      # arcs that end


def cost(args):
    from dipy.core.sphere import Sphere
    from dipy.direction.peaks import PeaksAndMetrics
    from dipy.tracking.stopping_criterion import BinaryStoppingCriterion
    from dipy.tracking.tracker import eudx_tracking
    grid,vertices,which,field,ring = one_peak_each()
    volumes = dict(field=field, ring=ring[..., None].float())
    subset = SimpleNamespace(name='testing', subjects=['a'], grid=lambda *_: grid, get_volume=lambda s, g, device='cpu': volumes[g])
    dataset = SimpleNamespace(volume_groups=list(volumes), nb_features=dict(field=3, ring=1), testing=subset, training=None, validation=None)
    seeds = seeds_from_mask(ring, grid.affine, nt=args.seeds)
    tracker = Tracker(FieldReader(), dataset, 'a', 'field', 'ring', max_length_mm=1000, min_length_mm=0, theta_deg=45)
    pam = PeaksAndMetrics()
    pam.peak_indices,pam.peak_values,pam.odf_vertices = which[..., None].astype(np.int32), np.ones((*which.shape, 1)), vertices
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [.5, .5, .5]                    # dipy counts from the centre of the first voxel
    start = seeds.numpy().astype(float)
    dirs = field.numpy()[tuple(np.floor(convert(seeds, grid, 'rasmm', 'vox').numpy()).astype(int).T)].astype(float)
    made = {}

    def ours():
        torch.set_num_threads(args.threads)                           # dipy's end sets OpenMP back to all cores
        made['ours'] = tracker.track(seeds, quiet=True).lines
    def dipys():
        stop = BinaryStoppingCriterion(ring.numpy().astype(np.uint8))
        made['dipy'] = list(eudx_tracking(start, stop, affine, seed_directions=dirs, pam=pam, step_size=1., max_angle=45, min_len=0, max_len=1000,
                                          sphere=Sphere(xyz=vertices), nbr_threads=args.threads, random_seed=1))
    torch.set_num_threads(args.threads)
    import numba
    numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    print(f"\n{args.seeds} seeds, {args.threads} threads, medians of {args.repeats} turns")
    print("| clock | dwiml_nb (s) | dipy eudx (s) | dwiml_nb / dipy | per point | lines, points: ours | dipy's |\n|---|---|---|---|---|---|---|")
    for name,clock in (('processor', time.process_time), ('wall', time.perf_counter)):
        s = interleaved(dict(ours=ours, dipy=dipys), args.repeats, clock=clock)
        points = len(made['ours'].data), sum(map(len, made['dipy']))
        each = s['ours']/points[0]/(s['dipy']/points[1])
        print(f"| {name} | {s['ours']:.2f} | {s['dipy']:.2f} | {s['ours']/s['dipy']:.2f} | {each:.2f} | {len(made['ours'])}, {points[0]} | "
              f"{len(made['dipy'])}, {points[1]} |")


# ---- the demo's model on the toy study

def experiment_in(folder, nb_batches):
    "A short training of the demo's recipe."
    dataset = MultiSubjectDataset(toy_study(folder)).load_data()
    trainer = recipe_trainer(dataset, Path(folder)/'experiments', 'small', nb_batches, device='cpu')
    trainer.train_and_validate()
    return trainer.experiment_folder


def watching(f):
    "What f gives, and the most memory of this process's own (bytes) meanwhile, every 5 ms."
    most,done = [rss()], threading.Event()
    def watch():
        while not done.wait(.005): most[0] = max(most[0], rss())
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try: given = f()
    finally: done.set(); thread.join()
    return given, max(most[0], rss())


def track_alone(queue, threads, experiment, out, options):
    "Track in a process of its own; tells its memory."
    torch.set_num_threads(threads)
    began = time.time(), time.process_time()
    told,most = watching(lambda: track_from_model(experiment, 'sub-04', out, 'seed_mask', in_memory=False, **options))
    queue.put((len(told), told.nb_points, most/2**20, time.time() - began[0], time.process_time() - began[1]))


def apart(experiment, out, threads=1, **options):
    "Lines, points, MiB, seconds and processor seconds of a run in a process of its own."
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=track_alone, args=(queue, threads, experiment, out, {**OPTIONS, **options}))
    process.start()
    while process.is_alive() and queue.empty(): process.join(.1)
    told = queue.get(timeout=5)
    process.join()
    return told


def memory(args, experiment, folder):
    print("\n| seeds | file | lines | points | most RssAnon (MiB) | above the smallest run | seconds | processor s |\n|---|---|---|---|---|---|---|---|")
    first = None
    for n,name in ((2_000, 'a.trx'), (20_000, 'b.trx'), (20_000, 'b.trk'), (20_000, 'b.tck'), (200_000, 'c.trx')):
        if n > args.most_seeds: continue
        lines,points,most,wall,own = apart(experiment, folder/name, nt=n, batch_size=1_000, points='float16' if name.endswith('trx') else 'float32')
        first = first or most
        print(f"| {n} | {name[2:]} | {lines} | {points} | {most:.0f} | {most - first:+.0f} | {wall:.0f} | {own:.0f} |", flush=True)
        (folder/name).unlink()


def digest(path):
    "Of everything that a tractogram says."
    found,h = load_tractogram(path), hashlib.sha256()
    for o in (found.lines.data.numpy(), found.lines.offsets.numpy(), *(found.dps[k] for k in sorted(found.dps))): h.update(np.ascontiguousarray(o).data)
    return h.hexdigest()[:12]


def die(threads, experiment, out, n, options):
    "Track, and end this process by SIGKILL once n parts are there."
    torch.set_num_threads(threads)
    write = TrackedParts.write
    def write_and_die(parts, *batch):
        write(parts, *batch)
        if len(list(parts.folder.glob('[0-9]*.npz'))) >= n: os.kill(os.getpid(), signal.SIGKILL)
    TrackedParts.write = write_and_die
    track_from_model(experiment, 'sub-04', out, 'seed_mask', in_memory=False, **options)


def shuffle(threads, experiment, out, seed, options):
    "Track the batches in another order."
    torch.set_num_threads(threads)
    jobs_of = whole_brain.missing_jobs
    def shuffled(*args):
        jobs = list(jobs_of(*args))
        return (jobs[i] for i in np.random.default_rng(seed).permutation(len(jobs)))
    whole_brain.missing_jobs = shuffled
    track_from_model(experiment, 'sub-04', out, 'seed_mask', in_memory=False, **options)


def bits(args, experiment, folder):
    options = dict(nt=args.seeds, batch_size=1_000, save_seeds=True, save_reasons=True)
    print(f"\n{args.seeds} seeds in batches of 1,000, one thread in each process\n| run | lines | sha256 of points, offsets, seeds, reasons |\n|---|---|---|")
    def row(name, out): print(f"| {name} | {len(load_tractogram(out))} | {digest(out)} |", flush=True)
    apart(experiment, out := folder/'one.trk', **options); row("one process", out)
    apart(experiment, out := folder/'two.trk', processes=2, **options); row("two processes", out)
    apart(experiment, out := folder/'other.trx', processes=2, **options); row("two processes, .trx", out)
    for seed in (1, 2):
        process = multiprocessing.get_context('spawn').Process(target=shuffle, args=(1, experiment, out := folder/f'shuffled_{seed}.trk', seed, {**OPTIONS, **options}))
        process.start(); process.join(); row(f"batches in a shuffled order, {seed}", out)
    out = folder/'killed.trk'
    for n in (3, 9):
        process = multiprocessing.get_context('spawn').Process(target=die, args=(1, experiment, out, n, {**OPTIONS, **options}))
        process.start(); process.join()
        there = len(list(parts_folder_of(out).glob('[0-9]*.npz')))
        print(f"| killed (exit {process.exitcode}), {there} parts are there, the file is {'there' if out.exists() else 'not there'} | | |")
    lost = sorted(parts_folder_of(out).glob('[0-9]*.npz'))[4]
    lost.unlink()                                                     # as if another order had been tracked: a gap
    apart(experiment, out, processes=2, **options); row("killed twice, one part lost, gone on with two processes", out)
    print(f"left beside the files: {[p.name for p in folder.glob('.*')] or 'nothing'}")


def sizes(args, experiment, folder):
    torch.set_num_threads(1)
    runs = {}
    for n in (250, 1_000, 4_000, 20_000):
        runs[n] = track_from_model(experiment, 'sub-04', folder/f'{n}.tck', 'seed_mask', nt=args.seeds, batch_size=n, **{**OPTIONS, 'min_length_mm': 0})
    reference = runs[1_000]
    names = [o.tobytes() for o in reference.info['seeds'].numpy()]
    print(f"\n{args.seeds} seeds, beside batches of 1,000\n| batch size | lines | of the same points (%) | of these, farthest point (mm) | within 0.01 mm (%) |\n"
          "|---|---|---|---|---|")
    for n,lines in runs.items():
        at = {o.tobytes(): i for i,o in enumerate(lines.info['seeds'].numpy())}
        pairs = [(i, at[name]) for i,name in enumerate(names) if name in at]
        a,b = (list(o.lines) for o in (reference, lines))
        same = [(a[i], b[j]) for i,j in pairs if len(a[i]) == len(b[j])]
        far = np.array([float((x - y).norm(dim=1).max()) for x,y in same])
        print(f"| {n} | {len(lines)} | {100*len(same)/max(len(names), len(lines)):.3f} | {far.max():.2g} | {100*(far <= .01).mean():.3f} |", flush=True)


# ---- once

def million(args, experiment, folder):
    "A million seeds beside twenty thousand."
    print("\n| seeds | lines | points | most RssAnon (MiB) | above 20,000 seeds | hours | processor hours | GB |\n|---|---|---|---|---|---|---|---|")
    first = None
    for n in (20_000, args.million):
        out = folder/f'{n}.trx'
        lines,points,most,wall,own = apart(experiment, out, nt=n, batch_size=1_000, points='float16', processes=args.processes)
        first = first or most
        print(f"| {n} | {lines} | {points} | {most:.0f} | {most - first:+.0f} | {wall/3600:.2f} | {own/3600:.2f} | {out.stat().st_size/1e9:.2f} |", flush=True)


PARTS = dict(memory=memory, bits=bits, sizes=sizes)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', choices=['cost', *PARTS, []], default=[], help="all but the million when not given")
    parser.add_argument('--seeds', type=int, default=20_000)
    parser.add_argument('--most_seeds', type=int, default=200_000, help="of `memory`")
    parser.add_argument('--threads', type=int, default=2, help="of `cost`")
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--batches', type=int, default=60, help="of the training")
    parser.add_argument('--processes', type=int, default=1, help="of the million: with 1, the memory is that of the one that tracks")
    parser.add_argument('--million', type=int, nargs='?', const=1_000_000, help="track so many seeds, and nothing else")
    args = parser.parse_args()
    wanted = args.parts or ([] if args.million else ['cost', *PARTS])
    if 'cost' in wanted: cost(args)
    if args.million or set(wanted) & set(PARTS):
        with tempfile.TemporaryDirectory() as folder:
            experiment = experiment_in(folder, args.batches)
            for name in wanted:
                if name in PARTS: PARTS[name](args, experiment, Path(folder))
            if args.million: million(args, experiment, Path(folder))
