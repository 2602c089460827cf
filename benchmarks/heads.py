"""Runs behind the tutorial "Choosing a head": every head under two models, on one fold, with the same small budget.

    python benchmarks/heads.py                 # what benchmarks/heads.json does not have yet
    python benchmarks/heads.py --quick         # seconds a run: 20 batches, 150 seeds, nothing is kept

Nine direction getters x {Learn2Track, TTS, a Transformer of the data alone} x {without, with EOS}, each with the demo's inputs, an
axis for the first step, and 150 batches of 42 segments (the demo has 1,000 of 126). Trained on three people and scored on `sub_4`, the validation subject. Without
EOS, lines walk in the truth's mask of white matter, as in the demo; with EOS (learned as in `ends.py`), in the whole brain, and only P(end) or the
brain's border stop them. Each run is added to benchmarks/heads.json at once and one that is there is not made again, so the command can be stopped and
repeated. One process, one thread; seconds are of the processor.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

from ends import CHOSEN, CHOSEN_FOLD, CHOSEN_ON, THRESHOLD, WAYS, along_true_lines, ends_learnt, study   # it sets one thread, before torch
import numpy as np
import torch
from dwiml_nb.batch.sampler import BatchIds
from dwiml_nb.core.lines import unit
from dwiml_nb.demo.recipe import recipe_model, recipe_tracker, recipe_trainer
from dwiml_nb.demo.run import demo_scores, demo_seeds, true_lines
from dwiml_nb.directions.base import rows_in
from dwiml_nb.directions.registry import DIRECTION_GETTERS
from dwiml_nb.models.batch_losses import ready, untouched
from dwiml_nb.models.transformers import TransformerSrcOnlyModel
from dwiml_nb.training.sinks import read_logs

RESULTS = Path(__file__).parent/'heads.json'
HEADS = ('cosine-regression', 'l2-regression', 'cosine-plus-l2-regression', 'sphere-classification', 'smooth-sphere-classification',
         'gaussian', 'gaussian-mixture', 'fisher-von-mises', 'fisher-von-mises-mixture')
KEPT = ('VB', 'VS', 'IB', 'NC', 'OL', 'OR', 'F1', 'n_lines')

def tts(nb_features:int, **changes) -> TransformerSrcOnlyModel:
    "The recipe's inputs on a Transformer that sees no direction. Segments have 40 points, so it reads 40 back."
    settings = dict(nb_features=nb_features, step_size=1., input_embedding_key='nn_embedding', input_embedded_size=128, neighborhood_type='axes',
                    neighborhood_radius=1, neighborhood_resolution=1., positional_encoding_key='rotary', window=40, nheads=4, n_layers_e=2,
                    ffnn_hidden_size=256, norm_first=True, activation='gelu', dropout_rate=.1)
    return TransformerSrcOnlyModel(**settings, **changes)

MODELS = {'Learn2Track': recipe_model, 'TTS': tts}

def judged(model, loader, dataset) -> dict:
    "The head's own loss, and how far its likeliest step is off, on whole lines; without first steps, whose sign nobody knows."
    ids = BatchIds([(0, np.arange(int(dataset.validation.nb_streamlines('bundles')[0])))], 'validation')
    batch = ready(loader, loader.load_batch_streamlines(ids))
    with untouched(model) as model:
        getter, rows = model.direction_getter, rows_in(model(*batch.inputs, batch.seen))
        true, where, _ = getter.rows_with_direction(batch.targets)
        rows, later = rows if where is None else rows[where], true.point_index > 0
        losses = getter.direction_terms(getter.end.seen(rows), getter.target_steps(true))[later]
        cosine = (unit(getter.det_directions(rows[:, :getter.nb_columns]))*unit(true.data)).sum(1)[later]
    degrees = torch.rad2deg(cosine.clamp(-1, 1).acos()).quantile(torch.tensor([.25, .5, .75, .95]))
    return dict(loss=round(float(losses.mean()), 4), degrees=[round(float(q), 2) for q in degrees])

def options_of(head:str, with_eos:bool) -> tuple: # of the getter, of the loader
    "The recipe's start; the end as `ends.py` chose it, but that a class cannot be weighted beside the direction."
    getter, loader = WAYS[CHOSEN] if with_eos else ({}, {})
    if 'sphere' in head: getter = {k: v for k, v in getter.items() if k != 'eos_weight'}
    return dict(axis_head=True, second_step_weight=.25, add_eos=with_eos, **getter), loader

def one_run(model:str, head:str, with_eos:bool, seed:int, nb_batches:int, batch_size:int, nb_seeds:int, cache:Path) -> dict:
    "Train, judge and track once."
    torch.set_num_threads(1)
    dataset, folder, (getter, loader) = study(CHOSEN_FOLD, cache), cache/CHOSEN_FOLD/'subjects'/CHOSEN_ON, options_of(head, with_eos)
    torch.manual_seed(seed)
    made, seconds, began = MODELS[model](dataset.nb_features['input'], dg_key=head, dg_args=getter), {}, time.process_time()
    with tempfile.TemporaryDirectory() as experiments:
        trainer = recipe_trainer(dataset, experiments, 'run', nb_batches, seed, model=made, batch_size=batch_size, device='cpu', **loader)
        untrained = judged(made, trainer.batch_loader, dataset)
        trainer.train_and_validate()
        losses = [round(loss, 4) for loss in read_logs(trainer.experiment_folder)['valid_loss']]
    seconds['train'], made = round(time.process_time() - began, 1), trainer.model.eval()
    record = dict(model=model, head=head, eos=with_eos, fold=CHOSEN_FOLD, subject=CHOSEN_ON, seed=seed, nb_batches=nb_batches, batch_size=batch_size, nb_seeds=nb_seeds,
                  weights=sum(p.numel() for p in made.parameters()), valid_loss=losses, untrained=untrained,
                  **judged(made, trainer.batch_loader, dataset))
    tracking = dict(tracking_mask_group='brain_mask', eos_threshold=THRESHOLD) if with_eos else {}
    tracker, began = recipe_tracker(made, dataset, CHOSEN_ON, **tracking), time.process_time()
    lines = tracker.track(demo_seeds(dataset, CHOSEN_ON, nt=nb_seeds), quiet=True)
    seconds['track'] = round(time.process_time() - began, 1)
    scores = demo_scores(lines, folder)
    if with_eos: record['learnt'] = {k: v for k, v in ends_learnt(*along_true_lines(tracker, true_lines(folder).lines)).items() if k != 'quartiles'}
    return record | dict(scores={k: round(scores[k], 4) for k in KEPT}, seconds=seconds, ended=lines.info.get('reasons', {}).get('end'))

def read() -> list: return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', nargs='*', type=int, default=[1])
    parser.add_argument('--nb-batches', type=int, default=150)
    parser.add_argument('--batch-size', type=int, default=42, help="segments")
    parser.add_argument('--nb-seeds', type=int, default=1000)
    parser.add_argument('--heads', nargs='*', default=HEADS)
    parser.add_argument('--models', nargs='*', default=list(MODELS))
    parser.add_argument('--eos', nargs='*', type=int, choices=[0, 1], default=[0, 1], help="without, with")
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--cache', type=Path, default=RESULTS.parent.parent/'build'/'ends', help="where the study is kept between runs")
    args = parser.parse_args()
    for head in args.heads: DIRECTION_GETTERS[head]                       # an unknown one ends here
    if args.quick: args.nb_batches, args.nb_seeds = 20, 150
    budget = args.nb_batches, args.batch_size, args.nb_seeds
    done = {(r['model'], r['head'], r['eos'], r['seed'], r['nb_batches'], r['batch_size'], r['nb_seeds']) for r in read()}
    runs = [(model, head, eos, s) for s in args.seeds for eos in map(bool, args.eos) for model in args.models for head in args.heads]
    runs = [run for run in runs if (*run, *budget) not in done or args.quick]
    if runs: one_run(args.models[0], args.heads[0], False, 1, 10, 6, 20, args.cache)     # imports and compiled loops: no run pays for them
    for run in runs:
        record = one_run(*run, *budget, args.cache)
        if not args.quick: RESULTS.write_text(json.dumps([*read(), record], indent=1) + '\n')
        s, learnt = record['scores'], record.get('learnt', {})
        print(*run, f"loss {record['loss']:.3f} ({record['untrained']['loss']:.3f} untrained), {record['degrees'][1]:.1f} degrees, VB {s['VB']}, VS {s['VS']:.3f}, OL {s['OL']:.3f}, {s['n_lines']} lines,",
              record['seconds'], {k: round(v, 4) for k, v in learnt.items()}, flush=True)

if __name__ == '__main__': main()
