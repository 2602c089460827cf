"""Runs behind the page "Where a line ends": a model that learns EOS, on a person that it never saw, without a mask from the truth.

    python benchmarks/ends.py ways             # every way of learning the end, scored on sub_4 as validation subject
    python benchmarks/ends.py folds            # the way that was chosen, on held-out people
    python benchmarks/ends.py folds --quick    # a few minutes: 60 batches, 500 seeds, nothing is kept

P(end) is measured along the true lines, walked both ways: at their ends, and at points more than 10 mm before an end (the other end among
them). Then lines are tracked from seeds where FA > 0.3 in the brain, and stopped by EOS and the brain's border; dipy's CSD tracker gets
the same seeds, mask, step and lengths. Each finished run is added to benchmarks/ends.json at once; one that is there is not made again.
"""
import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
from dwiml_nb.core.files import read_json, write_json
from dwiml_nb.core.human_bundles import human_folds, write_human_study
from dwiml_nb.core.lines import reverse, unit
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import convert, image_values
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.demo.recipe import recipe_model, recipe_tracker, recipe_trainer
from dwiml_nb.demo.run import demo_scores, true_lines
from dwiml_nb.evaluation.csd import read_acquisition, track_csd
from dwiml_nb.study.create import create_study
from dwiml_nb.tracking.seeds import seeds_from_mask

HERE = Path(__file__).parent
RESULTS = HERE/'ends.json'
CHOSEN_ON,CHOSEN_FOLD = 'sub_4', 'sub_3'        # the fold that holds sub_3 out validates on sub_4
WAYS = {                                        # name -> options of the direction getter, of the loader
    'real ends have the label': ({}, {}),
    'ends_ratio .5': ({}, dict(ends_ratio=.5)),
    'weight 200': (dict(eos_pos_weight=200.), {}),
    'ends_ratio .5, weight 200': (dict(eos_pos_weight=200.), dict(ends_ratio=.5)),
    'ends_ratio .5, weight 200, eos_weight .1': (dict(eos_pos_weight=200., eos_weight=.1), dict(ends_ratio=.5)),
    'ends_ratio .5, beyond 6 mm, weight 3, eos_weight .3': (dict(eos_pos_weight=3., eos_weight=.3), dict(ends_ratio=.5, beyond_mm=6.)),
    'ends_ratio .5, beyond 6 mm, weight 20, eos_weight .2': (dict(eos_pos_weight=20., eos_weight=.2), dict(ends_ratio=.5, beyond_mm=6.)),
    'ends_ratio .5, beyond 6 mm, weight 50, eos_weight .2': (dict(eos_pos_weight=50., eos_weight=.2), dict(ends_ratio=.5, beyond_mm=6.)),
}
CHOSEN = list(WAYS)[-1]
THRESHOLD = .95                                 # where lines are stopped: a little behind the place where P(end) passes .5
DISTANCES = [-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60]      # mm to the end, in front of it
KEPT = ('VB', 'VS', 'IB', 'NC', 'OL', 'OR', 'F1', 'n_lines')

def study(fold:str, cache:Path) -> MultiSubjectDataset:
    "The human-bundle study of a fold with the brain's mask as a group, made once."
    folder = cache/fold
    if not (folder/'study.hdf5').is_file():
        root = write_human_study(folder/'subjects', fold)
        config = read_json(root/'config.json')
        write_json({**config, 'brain_mask': {'type': 'volume', 'files': ['masks/brain.nii.gz'], 'standardization': 'none'}}, root/'config.json')
        create_study(root, folder/'study.hdf5', root/'config.json', *(root/f'{s}.txt' for s in ('training', 'validation', 'testing')))
    dataset = MultiSubjectDataset(folder/'study.hdf5')
    dataset.load_data()
    return dataset

def anisotropy(folder:Path, brain) -> np.ndarray:
    "FA of the weakest shell: what anybody has without knowing the bundles."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from dipy.core.gradients import gradient_table
        from dipy.reconst.dti import TensorModel
        a = read_acquisition(folder)
        weak = a.bvals < 1500
        return np.nan_to_num(TensorModel(gradient_table(a.bvals[weak], bvecs=a.bvecs[weak])).fit(a.dwi[..., weak].astype(float), mask=brain).fa)

def along_true_lines(tracker, lines:Ragged, beyond:int=6) -> tuple:
    "P(end) at every point of lines, walked both ways and straight on beyond their ends, and the mm to the end."
    found,lines = [], convert(lines, tracker.grid, 'rasmm', 'voxmm')
    for one_way in (lines, reverse(lines)):
        longer = Ragged.from_list([torch.cat([o, o[-1] + unit(o[-1:] - o[-2:-1])*torch.arange(1, beyond + 1)[:, None]]) for o in one_way.unbind()])
        with torch.inference_mode():
            rows = tracker.model(tracker.walk.inputs_along(longer), longer)
            left = (longer.lengths - 1 - beyond).repeat_interleave(longer.lengths) - longer.point_index
            found.append((tracker.model.direction_getter.eos_probs(rows.data), left))
    return tuple(torch.cat(o) for o in zip(*found))

def ends_learnt(probs, left) -> dict:
    "The two numbers that matter, and the way there."
    far = probs[left > 10]
    return {'median at ends': float(probs[left == 0].median()), '95 % far': float(far.quantile(.95)), 'above .5 far': float((far > .5).float().mean()),
            'quartiles': {d: [round(float(probs[left == d].quantile(q)), 4) for q in (.25, .5, .75)] for d in DISTANCES}}

def tracked(model, dataset, subject:str, folder:Path, seeds, masks:dict) -> dict:
    "Scores of lines that nothing of the truth stops, ours and CSD's."
    ours = lambda **more: recipe_tracker(model, dataset, subject, tracking_mask_group='brain_mask', **more).track(seeds, quiet=True)
    ways = {'EOS and brain mask': lambda: ours(eos_threshold=THRESHOLD), 'EOS at .5 and brain mask': ours, 'brain mask alone': lambda: ours(eos_threshold=1.)}
    ways |= {f'CSD, {name}': lambda mask=mask: track_csd(folder, seeds, mask, n_threads=1) for name,mask in masks.items()}
    scores = {}
    for name,track in ways.items():
        began = time.process_time()
        lines = track()
        all_scores = demo_scores(lines, folder)
        scores[name] = {k: all_scores[k] for k in KEPT} | {'seconds': round(time.process_time() - began), 'ended': lines.info.get('reasons', {}).get('end')}
    return scores

def one_run(kind:str, way:str, fold:str, subject:str, seed:int, nb_batches:int, nb_seeds:int, cache:Path, track:bool=True) -> dict:
    "Train, look at P(end), track and score once; seconds are of the processor."
    torch.set_num_threads(1)
    dataset,(getter,loader),began = study(fold, cache), WAYS[way], time.process_time()
    folder = cache/fold/'subjects'/subject
    torch.manual_seed(seed)
    model = recipe_model(dataset.nb_features['input'], dg_args=dict(axis_head=True, second_step_weight=.25, add_eos=True, **getter))
    with tempfile.TemporaryDirectory() as experiments:
        trainer = recipe_trainer(dataset, experiments, 'run', nb_batches, seed, model=model, device='cpu', **loader)
        trainer.train_and_validate()
    seconds,model = round(time.process_time() - began), trainer.model.eval()
    learnt = ends_learnt(*along_true_lines(recipe_tracker(model, dataset, subject), true_lines(folder).lines))
    record = dict(kind=kind, way=way, fold=fold, subject=subject, seed=seed, nb_batches=nb_batches, nb_seeds=nb_seeds, seconds=seconds, learnt=learnt)
    if track:
        brain = image_values(folder/'masks/brain.nii.gz') > 0
        fa = anisotropy(folder, brain)
        seeds = seeds_from_mask((fa > .3) & brain, read_acquisition(folder).grid.affine, nt=nb_seeds, seed=seed)
        record['scores'] = tracked(model, dataset, subject, folder, seeds, {'brain mask': brain, 'FA > 0.2': (fa > .2) & brain})
    return record

def read() -> list: return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['ways', 'folds'])
    parser.add_argument('--people', nargs='*', default=['sub_5', 'sub_1', 'sub_2', 'sub_3', 'sub_4'], help="who is held out")
    parser.add_argument('--seeds', nargs='*', type=int, default=[1])
    parser.add_argument('--nb-batches', type=int, default=600)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--cache', type=Path, default=HERE.parent/'build'/'ends', help="where the studies are kept between runs")
    args = parser.parse_args()
    runs = [('way', way, CHOSEN_FOLD, CHOSEN_ON, s) for way in WAYS for s in args.seeds] if args.what == 'ways' else \
           [('fold', CHOSEN, person, person, s) for s in args.seeds for person in args.people]
    for person in args.people: human_folds(person)
    done = {(r['kind'], r['way'], r['subject'], r['seed'], r['nb_batches']) for r in read()}
    for kind,way,fold,subject,seed in runs:
        if (kind, way, subject, seed, args.nb_batches) in done and not args.quick: continue
        nb_batches,nb_seeds = (60, 500) if args.quick else (args.nb_batches, 4000)
        record = one_run(kind, way, fold, subject, seed, nb_batches, nb_seeds, args.cache, track=kind == 'fold' or way == CHOSEN)
        if not args.quick: RESULTS.write_text(json.dumps([*read(), record], indent=1) + '\n')
        print(way, subject, seed, {k: round(v, 4) for k,v in record['learnt'].items() if k != 'quartiles'}, f"{record['seconds']} s", flush=True)
        for name,s in record.get('scores', {}).items(): print(f"    {name}: VB {s['VB']}, VS {s['VS']:.3f}, OL {s['OL']:.3f}, OR {s['OR']:.4f}, {s['n_lines']} lines, {s['seconds']} s, {s['ended']}", flush=True)

if __name__ == '__main__': main()
