"""The constants behind docs/scaling.md: what creating, checking, fitting, training, tracking and scoring cost for a line and a point, in processor time.

    python benchmarks/scaling.py                 # a minute or two, one thread
    python benchmarks/scaling.py --subjects 10000 --lines 1000000 --points 40

Each row is measured on one subject of this machine's making, then multiplied. Creating, checking, fitting, tracking and scoring are one
subject a core: hours on 100 cores are a hundredth. Training is a step of so many lines on this processor; the table of several machines comes from
the step, the bytes of the gradients and the bandwidth, by the formula of the page. Nothing here is a test.
"""
import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.sh import fit_sh
from dwiml_nb.core.space import Grid, save_volume
from dwiml_nb.core.tractograms import Tractogram, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcAndTgtModel
from dwiml_nb.study.check import check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

SHAPE, FEATURES = (96, 96, 60), 45


def cost(f, *args, **kwargs):
    "Processor seconds of a call, and what it gives; the second call counts, when all is compiled and read."
    start = time.process_time()
    value = f(*args, **kwargs)
    return time.process_time() - start, value


def subject(folder, lines, points, seed=0):
    "Files of one subject: smooth lines through a volume of noise."
    rng, grid = np.random.default_rng(seed), Grid(np.diag([2., 2, 2, 1]), SHAPE)
    t = np.linspace(-1, 1, points)[None, :, None]
    middle, way, bend = (rng.uniform(-1, 1, (lines, 1, 3)) for _ in range(3))
    extent = np.array(SHAPE) * 2.
    way *= points / 2 / np.linalg.norm(way, axis=2, keepdims=True)                       # steps of about 1 mm
    data = (extent / 2 + middle * extent / 5 + way * t + 3 * bend * t**2).astype(np.float32).reshape(-1, 3)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        save_tractogram(Tractogram(Ragged.from_lengths(torch.from_numpy(data), [points] * lines), grid), folder / name / "lines.trk")
        save_volume(rng.normal(size=(*SHAPE, FEATURES)).astype(np.float32), grid, folder / name / "input.nii.gz")
        save_volume(np.ones(SHAPE, np.float32), grid, folder / name / "mask.nii.gz")
    return folder


def rows_of(folder, args):
    "name, unit, seconds for one unit; measured on a sample."
    lines, points = args.sample, args.points
    config = {"input": {"type": "volume", "files": "input.nii.gz", "standardization": "all"}, "mask": {"type": "volume", "files": "mask.nii.gz", "standardization": "none"},
              "bundles": {"type": "streamlines", "files": "lines.trk"}}
    subject(folder / "in", lines, points)
    subject(folder / "few", 100, points)
    make = lambda root, name: cost(create_study, folder / root, folder / name, config, ["a"], ["b"])[0] / 2
    make("few", "warm")
    base = make("few", "few")
    whole = make("in", "study")
    yield "create", "a subject's volumes", base, f"{base:.2f} s"
    per_line = (whole - base) / (lines - 100)
    yield "create", "a million lines", per_line * 1e6, f"{whole:.2f} s for {lines} lines and the volumes"
    checks = [cost(check_study, folder / f"{name}.hdf5")[0] / 2 for name in ("few", "few", "study")]
    yield "check", "a subject's volumes", checks[1], ""
    yield "check", "a million lines", (checks[2] - checks[1]) / (lines - 100) * 1e6, ""
    mask = np.zeros(SHAPE, bool)
    mask[20:60, 20:60, 10:40] = True
    bvecs = np.random.default_rng(1).normal(size=(70, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvals = np.r_[np.zeros(6), np.full(64, 2000.)]
    dwi = np.random.default_rng(2).uniform(100, 900, (*SHAPE, 70)).astype(np.float32)
    yield "fit_sh", "a million brain voxels, order 8", cost(fit_sh, dwi, bvals, bvecs, mask)[0] / mask.sum() * 1e6, ""
    dataset = MultiSubjectDataset(folder / "study.hdf5", lazy=True).load_data()
    for name, model in (("Learn2Track, 2 x 512", Learn2TrackModel(FEATURES, "lstm", [512, 512], dg_key="cosine-regression", step_size=1.)),
                        ("TTST, 6 layers of 512", TransformerSrcAndTgtModel(FEATURES, max_len=points + 2, n_layers_e=6, nheads=8, ffnn_hidden_size=1024, input_embedded_size=384,
                                                              target_embedded_size=128, dg_key="cosine-regression", step_size=1.))):
        sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=args.batch, batch_size_validation=args.batch)
        loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
        how = dict(max_epochs=1, max_batches_per_epoch_validation=1, device="cpu")
        trainer = DWIMLTrainerOneInput(model, folder, name.split(",")[0], sampler, loader, max_batches_per_epoch_training=4, **how)
        times = []
        inner = trainer.run_one_batch
        def timed(*a, **k): times.append(time.process_time()); return inner(*a, **k)
        trainer.run_one_batch = timed
        trainer.train_and_validate()
        yield f"train {name}", f"a step of {args.batch} lines, one core", float(np.median(np.diff(times))), f"{4 * sum(p.numel() for p in model.parameters()) / 1e6:.1f} MB of gradients"
        if name.startswith("Learn"):
            tracker = Tracker(model, dataset, "a", "input", "mask", max_length_mm=points, theta_deg=180, min_length_mm=0)
            seeds = torch.rand(600, 3) * 30 + 70
            tracker.track(seeds[:50], quiet=True)
            seconds, tracked = cost(tracker.track, seeds, quiet=True)
            yield "track Learn2Track", "a million points", seconds / len(tracked.lines.data) * 1e6, f"{len(tracked.lines.data) / len(tracked):.0f} points a line"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("subjects", 10_000), ("lines", 1_000_000), ("points", 40), ("sample", 30_000), ("batch", 100)): parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(f"one thread; volumes of {SHAPE} x {FEATURES}, {args.points} points a line, measured with {args.sample} lines\n")
        for what, unit, seconds, remark in rows_of(Path(d), args):
            found[what, unit] = seconds
            print(f"{what:26} {unit:40} {seconds:10.3f} s   {remark}", flush=True)
    millions = args.lines / 1e6
    print(f"\n{args.subjects} subjects x {args.lines} lines, on one core:")
    for what in ("create", "check"):
        one = found[what, "a subject's volumes"] + found[what, "a million lines"] * millions
        print(f"{what:10} {one:8.1f} s a subject   {one * args.subjects / 3600:10.1f} hours")
    one = found["track Learn2Track", "a million points"] * args.lines * args.points / 1e6
    print(f"{'track':10} {one:8.1f} s a subject   {one * args.subjects / 3600:10.1f} hours")


if __name__ == "__main__": main()
