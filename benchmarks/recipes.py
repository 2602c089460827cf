"""Runs behind the page "Attempts": recipes on the human-bundle study, scored beside dipy's CSD tracker.

    python benchmarks/recipes.py attempts        # every way x 3 seeds, scored on sub_4 as validation subject
    python benchmarks/recipes.py folds           # the frozen recipe, 5 held-out people x 3 seeds, once
    python benchmarks/recipes.py csd             # the baseline on all five people

Each finished run is added to benchmarks/recipes.json at once (commit, seed, seconds, scores), and a run that is already
there is not made again, so the command can be stopped and repeated. `--jobs 2` makes two runs at a time, one thread each.
"""
import argparse
import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
HERE = Path(__file__).parent
RESULTS = HERE/'recipes.json'
SEEDS = (1, 2, 3)
CHOSEN_ON,CHOSEN_FOLD = 'sub_4', 'sub_3'        # the fold that holds sub_3 out validates on sub_4
KEPT = ('VB', 'VS', 'IB', 'NC', 'OL', 'OR', 'F1', 'nb_lines')
WAYS = {                                        # name -> changes to the recipe: model, training, tracking, nb_batches
    'the recipe': {},
    'lines not widened': dict(training=dict(widen_mm=0.)),
    'nothing off track': dict(training=dict(off_track_mm=0.)),
    'no axis head, first step along the peak': dict(model=dict(dg_args={}), tracking=dict(first_direction='peaks:peaks')),
    'no neighbours': dict(model=dict(neighborhood_type=None, neighborhood_radius=None, neighborhood_resolution=None)),
    'a Transformer (TTST)': dict(build='transformer', nb_batches=1000),
    'drawn steps (Fisher-von Mises), temperature 0.1': dict(model=dict(dg_key='fisher-von-mises', dg_args=dict(axis_head=True, second_step_weight=.25, max_kappa=1000.)),
                                                            tracking=dict(algo='prob', temperature=.1, theta_deg=60)),
}

def transformer(nb_features:int, **changes):
    "The recipe's inputs and getter on a Transformer of the data and the directions. Segments have 40 points, so it reads 40 back."
    from dwiml_nb.models.transformers import TransformerSrcAndTgtModel
    settings = dict(nb_features=nb_features, step_size=1., input_embedding_key='nn_embedding', input_embedded_size=96, target_embedded_size=32,
                    neighborhood_type='axes', neighborhood_radius=1, neighborhood_resolution=1., positional_encoding_key='rotary', window=40,
                    nheads=4, n_layers_e=2, ffnn_hidden_size=256, norm_first=True, activation='gelu', dropout_rate=.1,
                    dg_key='cosine-regression', dg_args=dict(axis_head=True, second_step_weight=.25))
    return TransformerSrcAndTgtModel(**{**settings, **changes})

def commit() -> str:
    return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=HERE, capture_output=True, text=True).stdout.strip()

COMMIT = commit()                                # when this process loaded the code; HEAD may move during a run

def read() -> list:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []

def keep(record:dict):
    RESULTS.write_text(json.dumps([*read(), record], indent=1) + '\n')
    print({k: record[k] for k in ('kind', 'way', 'subject', 'seed')}, record['scores'], record['seconds'], flush=True)

def study(fold:str, cache:Path):
    "The human-bundle study of a fold, made once."
    from dwiml_nb.data.dataset import MultiSubjectDataset
    from dwiml_nb.demo.run import demo_study
    folder = cache/fold
    if (folder/'study.hdf5').is_file():
        dataset = MultiSubjectDataset(folder/'study.hdf5')
        dataset.load_data()
        return dataset
    folder.mkdir(parents=True, exist_ok=True)
    return demo_study(folder, fold)

def one_run(kind:str, way:str, changes:dict, fold:str, subject:str, seed:int, nb_batches:int, cache:Path) -> dict:
    "Train, track and score once."
    import torch
    from dwiml_nb.demo.recipe import recipe_model, recipe_tracker, recipe_trainer
    from dwiml_nb.demo.run import demo_scores, demo_seeds
    torch.set_num_threads(1)
    dataset,seconds = study(fold, cache), {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        build = transformer if changes.get('build') == 'transformer' else recipe_model
        model = build(dataset.nb_features['input'], **changes.get('model', {}))
        began = time.perf_counter()
        trainer = recipe_trainer(dataset, folder, 'run', nb_batches, seed, model=model, **changes.get('training', {}))
        trainer.train_and_validate()
        seconds['train'] = time.perf_counter() - began
    began = time.perf_counter()
    lines = recipe_tracker(trainer.model, dataset, subject, **changes.get('tracking', {})).track(demo_seeds(dataset, subject), quiet=True)
    seconds['track'] = time.perf_counter() - began
    scores = demo_scores(lines, cache/fold/'subjects'/subject)
    return dict(kind=kind, way=way, fold=fold, subject=subject, seed=seed, nb_batches=nb_batches, commit=COMMIT, seconds={k: round(v) for k,v in seconds.items()},
                scores={k: scores[k] for k in KEPT if k in scores})

def one_csd(subject:str, cache:Path) -> dict:
    "The baseline once, with the demo's seeds, mask, step and lengths."
    from dwiml_nb.demo.run import demo_scores, demo_seeds
    from dwiml_nb.evaluation.csd import track_csd
    fold = 'sub_3' if subject != 'sub_3' else 'sub_1'
    dataset,folder = study(fold, cache), cache/fold/'subjects'/subject
    began = time.perf_counter()
    lines = track_csd(folder, demo_seeds(dataset, subject))
    scores = demo_scores(lines, folder)
    return dict(kind='csd', way='dipy CSD', fold=None, subject=subject, seed=1, commit=COMMIT, seconds={'track': round(time.perf_counter() - began)}, scores={k: scores[k] for k in KEPT if k in scores})

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['attempts', 'folds', 'csd'])
    parser.add_argument('--nb-batches', type=int, help="600 for attempts, 1,000 for folds, if nothing else is said")
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--cache', type=Path, default=HERE.parent/'build'/'recipes', help="where the studies are kept between runs")
    args = parser.parse_args()
    done = {(r['kind'], r['way'], r['subject'], r['seed']) for r in read()}
    people = [f'sub_{k}' for k in range(1, 6)]
    if args.what == 'csd': jobs = [(one_csd, (p, args.cache)) for p in people if ('csd', 'dipy CSD', p, 1) not in done]
    elif args.what == 'folds': jobs = [(one_run, ('fold', 'the recipe', {}, p, p, s, args.nb_batches or 1000, args.cache)) for s in SEEDS for p in people if ('fold', 'the recipe', p, s) not in done]
    else: jobs = [(one_run, ('attempt', way, changes, CHOSEN_FOLD, CHOSEN_ON, s, args.nb_batches or changes.get('nb_batches', 600), args.cache)) for way,changes in WAYS.items() for s in SEEDS if ('attempt', way, CHOSEN_ON, s) not in done]
    for fold in dict.fromkeys([a[3] for f,a in jobs if f is one_run] or (['sub_3', 'sub_1'] if jobs else [])): study(fold, args.cache)   # before the processes start
    if args.jobs == 1:
        for f,a in jobs: keep(f(*a))
        return
    import multiprocessing
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context('spawn')) as pool:
        from concurrent.futures import as_completed
        for future in as_completed([pool.submit(f, *a) for f,a in jobs]): keep(future.result())

if __name__ == '__main__': main()
