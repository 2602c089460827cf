"""What tracking costs besides the model: everything but reading the volumes and asking the model, in processor time, with the demo's model."""
import statistics
import tempfile
import time
from contextlib import contextmanager

import torch
from dwiml_nb.batch.inputs import InputsAt
from dwiml_nb.demo.recipe import recipe_tracker, recipe_trainer
from dwiml_nb.demo.run import demo_seeds, demo_study
from side_by_side import Row

OF_THE_MODEL = ('tracking_step', 'get_tracking_directions', 'warm_up')

@contextmanager
def timed(model):
    "A dict that collects the processor time of the model's methods and of sampling."
    spent,sampling = {}, InputsAt.__call__
    def clocked(name, f):
        def run(*args, **kwargs):
            start = time.process_time()
            try: return f(*args, **kwargs)
            finally: spent[name] = spent.get(name, 0) + time.process_time() - start
        return run
    for name in OF_THE_MODEL: object.__setattr__(model, name, clocked(name, getattr(model, name)))
    InputsAt.__call__ = clocked('sampling', sampling)
    try: yield spent
    finally:
        InputsAt.__call__ = sampling
        for name in OF_THE_MODEL: object.__delattr__(model, name)

def rows(threads, quick):
    if threads > 1: return                                    # processor time of one thread
    with tempfile.TemporaryDirectory() as folder:
        dataset = demo_study(folder)
        trainer = recipe_trainer(dataset, folder, 'run', 10 if quick else 100)   # enough for lines of a usual length
        trainer.train_and_validate()
        subject = dataset.testing.subjects[0]
        seeds = demo_seeds(dataset, subject)
        seeds = seeds[torch.randperm(len(seeds), generator=torch.Generator().manual_seed(0))]
        tracker = recipe_tracker(trainer.model, dataset, subject)
        for n in (20,) if quick else (200, 2000, len(seeds)):
            turns = []
            for _ in range(1 if quick else 3):
                with timed(trainer.model) as spent:
                    start = time.process_time()
                    lines = tracker.track(seeds[:n], quiet=True)
                    turns.append({**spent, 'ours': time.process_time() - start - sum(spent.values())})
            median = {k: statistics.median(o[k] for o in turns) for k in turns[0]}
            total,share = sum(median.values()), lambda k: f"{100*median[k]/total:.1f} %"
            seconds = dict(ours=median['ours'], **{'model and sampling': total - median['ours']})
            yield Row(f"the tracker's own share, {n:,} seeds, {len(lines.lines.data):,} points", threads, seconds, 'model and sampling',
                      "own share under 15 %" if n > 1000 else "", median['ours'] < .15*total if n > 1000 else None,
                      notes=[f"own {share('ours')}; " + ', '.join(f"{k} {share(k)}" for k in median if k != 'ours'),
                             "warm_up is the model's: it reads the first halves backwards, as forward does"])
    dataset.close()
