"""Trainings in one, two and three processes on the same global batches: how far their losses and weights are apart, and what a step costs besides.

    python benchmarks/several.py              # 200 steps of each (some minutes on one core)
    python benchmarks/several.py --steps 20

No dropout, no noise: what is drawn belongs to a rank. Each epoch ends with a batch that is smaller than the others. The talk of a step is the
processor time of rank 0 in `agree`, in the wishes and in adding up, timed apart; on one machine, with gloo.
"""
import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from distributed_script import in_ranks, make, make_registered, train

from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.means import Row
from dwiml_nb.training.several import ranks_for
from dwiml_nb.training.sinks import read_rows

MODELS = {"Learn2Track": make, "registered": make_registered}


def losses(folder): return np.array([row["loss"] for row in read_rows(folder/"logs"/"batches.jsonl") if row["phase"] == "training"])


def costs(size):
    "Seconds that a step's talk takes, and adding up gradients of a million weights, in one rank."
    ranks, model = ranks_for(size, device="cpu"), torch.nn.Linear(1000, 1000)
    def per_call(f, nb=100):
        f(); began = time.perf_counter(), time.process_time()
        for _ in range(nb): f()
        return [(now - then)/nb for now, then in zip((time.perf_counter(), time.process_time()), began)]
    def add():
        with ranks.summing(model): model.weight.grad = torch.ones(1000, 1000)
    found = per_call(lambda: ranks.gather(Row(1., 100, {"accuracy": .5}, 100))), per_call(add)
    ranks.end_run()
    return found


def main(steps):
    print(f"{steps} steps, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}")
    print(f"{'model':12} {'dtype':8} {'processes':>9} {'loss apart':>11} {'weights apart':>13} {'ranks equal':>11}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        study = toy_study(folder/"study")
        for model, of in MODELS.items():
            for dtype in ("float64", "float32"):
                options = dict(dtype=dtype, max_batches_per_epoch_training=None, max_batches_per_epoch_validation=1, clip_grad=1., batch_size=23)
                nb = of(study, folder, "count", **options).nb_batches("training")
                options["max_epochs"] = -(-steps//nb)
                one = train(of, study, folder, f"{model}-{dtype}-1", **options)
                for size in (2, 3):
                    name = f"{model}-{dtype}-{size}"
                    found = in_ranks(partial(train, of, study, folder, name, devices=size, **options), size=size)
                    a, b = (losses(folder/o) for o in (f"{model}-{dtype}-1", name))
                    apart = max(np.abs(one[k] - found[0][k]).max() for k in one)
                    equal = all((found[0][k] == other[k]).all() for other in found for k in one)
                    print(f"{model:12} {dtype:8} {size:9} {np.abs(a - b).max():11.1e} {apart:13.1e} {str(equal):>11}", flush=True)
        print(f"{'':21} {'processes':>9} {'a talk, ms':>11} {'cpu, ms':>8} {'million weights, ms':>20} {'cpu, ms':>8}")
        for size in (2, 3):
            (talk, cpu), (add, add_cpu) = in_ranks(partial(costs, size), size=size)[0]
            print(f"{'':21} {size:9} {1e3*talk:11.2f} {1e3*cpu:8.2f} {1e3*add:20.2f} {1e3*add_cpu:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
