"""One user's file with ten extensions: each in one place, used by its name, resumed from the command line, and refused where nobody trusts it."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import nibabel as nib
import pytest
import torch

from dwiml_nb.cli.study import dwiml_create_hdf5_dataset, dwiml_hdf5_add_subjects
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import convert
from dwiml_nb.core.volume import sample_nearest
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.sinks import read_logs

MINE = '''
import os
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from dwiml_nb.all import (DIRECTION_GETTERS, EMBEDDINGS, LINE_WEIGHTS, OPTIMIZERS, RNNS, SCHEDULES, SINKS, STANDARDIZATIONS, STOP_RULES,
                          TRACTOGRAM_FORMATS, DirectionGetter, Embedding, Grid, Ragged, Sink, StopRule, Tractogram, TractogramFormat)

with open(Path(__file__).with_name('imported'), 'a') as file: print(os.getpid(), file=file)      # for the test

@STANDARDIZATIONS.register('quartiles')
def quartiles(data, mask):
    "Median 0, and half the distance of the quartiles 1."
    low, middle, high = np.quantile(data[mask], (.25, .5, .75), axis=0)
    return (data - middle)/np.maximum((high - low)/2, 1e-6)

@TRACTOGRAM_FORMATS.register('.lines')
class Lines(TractogramFormat):
    "An archive of NumPy."
    def save(self, tractogram, path):
        points, offsets = tractogram.lines.numpy()
        grid = {'affine': tractogram.grid.affine, 'dimensions': tractogram.grid.dimensions}
        with open(path, 'wb') as f: np.savez(f, points=points, offsets=offsets, **grid, **{f'dps_{k}': v for k, v in tractogram.dps.items()})
    def load(self, path):
        with np.load(path) as f: found = dict(f)
        lines = Ragged(torch.from_numpy(found['points']), found['offsets'])
        return Tractogram(lines, Grid(found['affine'], found['dimensions']), {k[4:]: v for k, v in found.items() if k.startswith('dps_')})

@LINE_WEIGHTS.register('surely')
def surely(subset, subject, group):
    "The square of how sure somebody was of each line."
    return subset.streamlines_of(subject, group).get_dps(keys=['certainty'])['certainty']**2

@EMBEDDINGS.register('centre-and-mean')
class CentreAndMean(Embedding):
    "The centre and the mean of its neighbourhood, through one layer."
    def __init__(self, nb_features, nb_places, size):
        super().__init__()
        self.nb_places, self.output_size, self.layer = nb_places, size, nn.Linear(2*nb_features, size)
    @classmethod
    def build(cls, spec, size=8): return cls(spec.nb_features, len(spec.vectors), size)
    def forward(self, x):
        places = x.reshape(len(x), self.nb_places, -1)
        return self.layer(torch.cat([places[:, 0], places.mean(1)], 1)).tanh()

@RNNS.register('forgetful')
class Forgetful(nn.Module):
    "Each unit forgets at a rate of its own."
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.inward, self.around = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size, bias=False)
        self.rate = nn.Parameter(torch.zeros(hidden_size))
    def forward(self, x, state=None):
        h, outputs = x.new_zeros(x.shape[1], len(self.rate)) if state is None else state[0], []
        for now in self.inward(x):
            h = torch.lerp(h, (now + self.around(h)).tanh(), self.rate.sigmoid())
            outputs.append(h)
        return torch.stack(outputs), h[None]

@DIRECTION_GETTERS.register('chord')
class Chord(DirectionGetter):
    "A direction, as wrong as the chord between it and the target is long."
    def __init__(self, input_size, *, power=1., **parts):
        super().__init__(input_size, **parts)
        self.power = power
    def direction_terms(self, rows, dirs):
        return ((F.normalize(rows) - F.normalize(dirs.data)).square().sum(1) + 1e-6)**(self.power/2)
    def det_directions(self, rows): return rows

@OPTIMIZERS.register('Lion')
class Lion(torch.optim.Optimizer):
    "Steps along the sign of a momentum (Chen et al. 2023)."
    def __init__(self, params, lr=1e-3, weight_decay=0., betas=(.9, .99)):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                p.mul_(1 - group['lr']*group['weight_decay']).sub_(group['lr']*m.lerp(p.grad, 1 - group['betas'][0]).sign())
                m.lerp_(p.grad, 1 - group['betas'][1])

@SCHEDULES.register('there-and-back')
def there_and_back(iteration, total):
    "Up in the first half, down in the second."
    return 1 - abs(2*(iteration + 1)/(total + 1) - 1)

@SINKS.register('daybook')
class Diary(Sink):
    "All that is told, in a text file."
    def note(self, *words):
        with open(self.file, 'a') as f: print(*words, file=f)
    def begin(self, record):
        self.file = Path(record['experiment_folder'])/'diary.txt'
        self.note('begin', record['experiment_name'])
    def rewind(self, place): self.note('rewind', *place)
    def batch(self, row): self.note(row['phase'], row['epoch'], row['batch'], repr(row['loss']))
    def epoch(self, row): self.note('epoch', row['epoch'], repr(row['valid_loss']))
    def close(self): self.note('close')

@STOP_RULES.register('grace')
class Grace(StopRule):
    "A line may be outside the mask for two steps."
    def begin(self, positions): return torch.zeros(len(positions), dtype=torch.long, device=positions.device)
    def __call__(self, walk, positions, codes, state):
        outside = codes == walk.code('mask')
        state = torch.where(outside, state + 1, 0)
        return torch.where(outside & (state <= 2), 0, codes), state
'''

DAY = '''
import json
from pathlib import Path
import numpy as np
import torch
import mine
from dwiml_nb.all import *
from dwiml_nb.core.files import read_json, write_json

EPOCHS = 15

def subject_folders():
    "The toy's, with tractograms in a format of one's own that say how sure somebody was of each line."
    root = write_phantom('subjects')
    for trk in root.glob('*/bundles/*.trk'):
        tractogram = load_tractogram(trk)
        tractogram.dps['certainty'] = np.linspace(.5, 1, len(tractogram), dtype=np.float32)[:, None]
        save_tractogram(tractogram, trk.with_suffix('.lines'))
        trk.unlink()
    config = read_json(root/'config.json')
    config['input']['standardization'] = 'quartiles'
    config['bundles'] |= {'files': ['bundles/*.lines'], 'dps_keys': ['certainty']}
    write_json(config, root/'config.json')
    for i, subset in enumerate(('first', 'later'), 1): (root/f'{subset}.txt').write_text(f'sub-0{i}')
    return root

def parts():
    dataset = MultiSubjectDataset('study.hdf5')
    dataset.load_data()
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features['input'], step_size=1., rnn_key='forgetful', rnn_layer_sizes=[32], neighborhood_type='axes',
                             input_embedding_key=dict(key='centre-and-mean', size=12), nb_previous_dirs=1, dropout=.05, dg_key='chord',
                             dg_args=dict(power=1.5, add_eos=True, eos_weight=3., axis_head=True))
    sampler = DWIMLBatchIDSampler(dataset, 'bundles', 15, line_weights='surely')
    return dataset, model, sampler, DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', reverse_ratio=.5)

def train(name, at_batch_end=lambda trainer, row: None):
    dataset, model, sampler, loader = parts()
    trainer = DWIMLTrainerOneInput(model, 'experiments', name, sampler, loader, learning_rates=2e-3, lr_schedule='there-and-back', optimizer='Lion',
                                   optimizer_args=dict(betas=(.9, .95)), weight_decay=0., max_epochs=EPOCHS, sinks=['daybook'], device='cpu')
    trainer.control.on_batch_end.append(lambda row: at_batch_end(trainer, row))
    trainer.train_and_validate()

class Steps:
    "How far each weight went at each batch, over the learning rate: 0 or 1 for Lion."
    def __init__(self): self.before, self.seen = None, set()
    def __call__(self, trainer, row):
        now = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().double()
        if row['phase'] == 'training' and self.before is not None:
            self.seen |= set(((now - self.before).abs()/row['learning_rate']).round(decimals=2).unique().tolist())
        self.before = now

def stop(trainer, row):
    if (row['phase'], row['epoch'], row['batch']) == ('training', EPOCHS - 1, 1): trainer.control.request_stop()

if __name__ == '__main__':
    root, facts, steps = subject_folders(), {}, Steps()
    lists = [root/f'{o}.txt' for o in ('first', 'validation', 'testing')]
    create_study(root, 'study.hdf5', root/'config.json', *lists)
    add_subjects('study.hdf5', root, root/'later.txt')
    dataset, model, sampler, loader = parts()
    facts['model'] = check_model(model)
    facts['sampler'] = [sampler.repeats, repr(sampler), sampler.params['line_weights']]
    of_first = lambda epoch: np.concatenate([ids for batch in sampler.batches('training', epoch) for subject, ids in batch if subject == 0])
    facts['times'] = [np.bincount(of_first(epoch), minlength=120).tolist() for epoch in range(60)]
    train('through', steps)
    facts['steps'] = sorted(steps.seen)
    train('half', stop)
    track = lambda out, eos, mask=None: track_from_model('experiments/through', 'sub-04', out, 'seed_mask', tracking_mask_group=mask, nt=200, device='cpu',
                                                         min_length_mm=0, eos_threshold=eos, save_seeds=True).info['reasons']
    facts['tracked'] = {'plain': track('plain.lines', 1., 'wm_mask'), 'free': track('free.lines', 1.), 'eos': track('eos.lines', .2)}
    Path('facts.json').write_text(json.dumps(facts))
'''

RESUME = '''
import multiprocessing
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    dwiml_resume_training_from_checkpoint()
'''


def run(folder, *command):
    environment = {k: v for k, v in os.environ.items() if k != "DWIML_TRUST"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def command(name): return Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    "The user's folder after a day of work: a study that has grown, one whole training and one that was stopped in its last epoch."
    folder = tmp_path_factory.mktemp("day")
    for name, text in {"mine.py": MINE, "day.py": DAY, "resume.py": RESUME}.items(): (folder/name).write_text(text)
    done = run(folder, sys.executable, "day.py")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/"imported").unlink()
    shutil.copytree(folder/"experiments"/"half", folder/"experiments"/"stopped")
    return folder


@pytest.fixture(scope="module")
def facts(day): return json.loads((day/"facts.json").read_text())


@pytest.fixture(scope="module")
def resumed(day):
    "The same folder when the stopped training was resumed from the command line, with workers that are started anew."
    done = run(day, sys.executable, "resume.py", "experiments", "half", "--trust", "mine.py", "--nb_cpu_processes", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    return day


@pytest.fixture(scope="module")
def tracked(day):
    "Lines tracked from the command line, with two steps of grace."
    done = run(day, command("dwiml_track_from_model"), "experiments/through", "sub-04", "grace.lines", "seed_mask", "--tracking_mask_group", "wm_mask",
               "--min_length", 0, "--nt", 200, "--eos_stop", 1, "--save_seeds", "--device", "cpu", "--stop_rules", "grace", "--trust", "mine.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: lines_of(day/f"{name}.lines") for name in ("plain", "free", "eos", "grace")} | {"said": done.stdout}


def lines_of(path):
    "The lines of the user's format, read without the user's code."
    with np.load(path) as f: return Ragged(torch.from_numpy(f["points"]), f["offsets"])


@pytest.fixture(scope="module")
def dataset(day):
    dataset = MultiSubjectDataset(day/"study.hdf5")
    dataset.load_data()
    yield dataset
    dataset.close()


# ---- what the extensions do

def test_standardisation_and_format_make_a_study(day, dataset):
    "Created and grown with both; reading it needs neither."
    for subject, name in enumerate(("sub-01", "sub-02")):
        raw = np.asarray(nib.load(day/"subjects"/name/"dwi"/"sh.nii.gz").dataobj, np.float32)
        low, middle, high = np.quantile(raw[(raw != 0).all(-1)], (.25, .5, .75), axis=0)
        np.testing.assert_allclose(dataset.training.get_volume(subject, "input"), (raw - middle)/((high - low)/2), atol=1e-4, rtol=1e-4)
        stored = dataset.training.streamlines_of(subject, "bundles")
        files = sorted((day/"subjects"/name/"bundles").iterdir())
        assert [f.suffix for f in files] == [".lines"]*2
        assert stored.nb_streamlines == sum(len(lines_of(f)) for f in files)
        np.testing.assert_allclose(stored.get_dps()["certainty"].ravel(), np.tile(np.linspace(.5, 1, stored.nb_streamlines//2), 2), rtol=1e-6)


def test_weighted_lines_come_as_often_as_said(facts, dataset):
    certainty = dataset.training.streamlines_of(0, "bundles").get_dps()["certainty"].ravel()
    said, times = certainty**2/np.mean(certainty**2), np.array(facts["times"])       # (lines,), (epochs, lines)
    assert (times >= np.floor(said)).all() and (times <= np.ceil(said)).all() and (times.sum(1) == len(said)).all()
    assert times.max() == 2 and times.min() == 0 and np.abs(times.mean(0) - said).max() < .25
    repeats, words, name = facts["sampler"]
    assert repeats and "lines may repeat" in words and name == "surely"


def test_embedding_cell_and_getter_are_in_the_model(day, facts):
    "The kit's own check passes; the weights are theirs, and were trained."
    assert facts["model"]["tracking"].startswith("largest difference"), facts["model"]
    weights = torch.load(day/"experiments"/"through"/"best_model"/"model_state.pkl", weights_only=True)
    nb_features = nib.load(day/"subjects"/"sub-01"/"dwi"/"sh.nii.gz").shape[-1]
    assert weights["input_embedding_layer.layer.weight"].shape == (12, 2*nb_features)
    assert weights["rnn_model.rnn_0.rate"].abs().min() > 1e-3                       # 0 at the start
    assert len(weights["direction_getter.layers.1.bias"]) == 3 + 1 + 6              # direction, end, axis
    losses = read_logs(day/"experiments"/"through")["valid_loss"]
    assert losses[-1] < .5*losses[0]


def test_optimiser_and_schedule(day, facts):
    "Each weight goes as far as the rate says, or stays; the rate goes up and comes down."
    assert facts["steps"] in ([1.], [0., 1.]), facts["steps"]
    state = read_checkpoint(day/"experiments"/"through").state["optimizer"]
    assert all(list(o) == ["momentum"] for o in state["state"].values()) and list(state["param_groups"][0]["betas"]) == [.9, .95]
    logs = read_logs(day/"experiments"/"through", "batches")
    rates = np.array([r for r, phase in zip(logs["learning_rate"], logs["phase"]) if phase == "training"])
    np.testing.assert_allclose(rates, 2e-3*(1 - abs(2*np.arange(1, len(rates) + 1)/(len(rates) + 1) - 1)))


def test_getter_stops_lines(facts, tracked):
    "Without a mask, the end that the getter has learned ends lines that would go on to the border of the volume."
    assert "eos" not in str(facts["tracked"]["free"]) and facts["tracked"]["eos"]["end"]["eos"] > 50
    free, eos = tracked["free"], tracked["eos"]
    assert len(eos) == len(free) == 200 and (eos.lengths < free.lengths).float().mean() > .4 and eos.lengths.sum() < .9*free.lengths.sum()


def test_grace_lets_lines_go_on(day, tracked, dataset):
    "From the same seeds, longer lines; none is outside the mask for more than two steps in a row."
    plain, grace = tracked["plain"], tracked["grace"]
    assert "200 streamlines in grace.lines" in tracked["said"] and len(grace) == 200 >= len(plain) > 190
    seeds = [np.load(day/f"{name}.lines")["dps_seeds"] for name in ("plain", "grace")]
    more = grace.lengths[(seeds[1] == seeds[0][:, None]).all(-1).argmax(1)] - plain.lengths
    assert (more >= 2).float().mean() > .8 and (more > 6).any()
    grid, mask = dataset.testing.grid(0, "wm_mask"), dataset.testing.get_volume(0, "wm_mask")
    outside = [sample_nearest(mask, convert(o, grid, "rasmm", "vox"))[:, 0] < .5 for o in grace]
    in_a_row = lambda o: max(map(len, "".join("x" if x else " " for x in o.tolist()).split()), default=0)
    assert max(map(in_a_row, outside)) == 2
    assert not any(in_a_row(sample_nearest(mask, convert(o, grid, "rasmm", "vox"))[:, 0] < .5) for o in plain)


# ---- resumed from the command line

def test_resumed_to_the_same_bits(resumed):
    "As if it had never been stopped: weights, the optimiser's momenta, logs."
    half, through = (resumed/"experiments"/name for name in ("half", "through"))
    for name in ("checkpoint/model", "best_model"):
        a, b = (torch.load(e/name/"model_state.pkl", weights_only=True) for e in (half, through))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    a, b = (read_checkpoint(e).state for e in (half, through))
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    assert all(torch.equal(a["optimizer"]["state"][i]["momentum"], slots["momentum"]) for i, slots in b["optimizer"]["state"].items())
    for which in ("batches", "epochs"):
        a, b = ({k: v for k, v in read_logs(e, which).items() if "second" not in k} for e in (half, through))
        assert a == b, which


def test_workers_know_the_extensions(resumed):
    "The command, and two workers for each of two phases."
    assert len(set((resumed/"imported").read_text().split())) >= 1 + 2*2


def test_sink_received_every_row(resumed):
    "Also of the resumed run, which told it where it goes on."
    for name, told in {"through": ["begin through", "rewind 0 0 0", "close"],
                       "half": ["begin half", "rewind 0 0 0", "close", "begin half", "rewind 14 0 2", "close"]}.items():
        experiment = resumed/"experiments"/name
        diary = (experiment/"diary.txt").read_text().splitlines()
        batches, epochs = (read_logs(experiment, which) for which in ("batches", "epochs"))
        rows = [f"{phase} {epoch} {batch} {loss!r}" for phase, epoch, batch, loss in zip(*(batches[k] for k in ("phase", "epoch", "batch", "loss")))]
        ends = [f"epoch {epoch} {loss!r}" for epoch, loss in zip(epochs["epoch"], epochs["valid_loss"])]
        assert [o for o in diary if o.split()[0] in ("training", "validation")] == rows and len(rows) > 15*8
        assert [o for o in diary if o.startswith("epoch")] == ends and len(ends) == 15
        assert [o for o in diary if o.split()[0] in ("begin", "rewind", "close")] == told


# ---- refused where nobody trusts them: in this process, which has never imported the file

def told(f, *args, lines=1, **kwargs):
    "The one sentence with which a command ends; a study's says what is wrong with each of its files."
    with pytest.raises(SystemExit) as ended: f(*args, **kwargs)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("Error: ") and ended.value.code.count("\n") == lines - 1
    assert "mine" not in sys.modules
    return ended.value.code


def test_refused_on_the_command_line(day):
    "One sentence and status 1, for a training and a tracking; nothing of the file has run."
    (day/"imported").unlink(missing_ok=True)
    done = run(day, command("dwiml_resume_training_from_checkpoint"), "experiments", "stopped", "--device", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "unknown embedding 'centre-and-mean'" in done.stderr and "--trust mine.py" in done.stderr
    assert not (day/"imported").exists()


MODEL = dict(rnn_key="gru", input_embedding_key="no_embedding", dg_key="cosine-regression", dg_args=dict(add_eos=True, axis_head=True))
TRAINER = dict(optimizer="Adam", optimizer_args=None, lr_schedule=None, sinks=[])
KINDS = {"dg_key": "unknown direction getter 'chord'", "rnn_key": "unknown recurrent layer 'forgetful'",
         "input_embedding_key": "unknown embedding 'centre-and-mean'", "optimizer": "optimizer 'Lion' is not known here",
         "lr_schedule": "lr_schedule 'there-and-back' is not known here", "sinks": "sinks 'daybook' is not known here",
         "line_weights": "no data per streamline 'surely', and no weight of that name"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_of_a_record(day, kind, tmp_path):
    "A record where all but one name are of the library."
    shutil.copytree(day/"experiments"/"stopped", tmp_path/"one")
    file = tmp_path/"one"/"checkpoint"/"params.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(keep_one(record, kind)))
    model = tmp_path/"one"/"checkpoint"/"model"
    if kind in MODEL: (model/"parameters.json").write_text(json.dumps(record["model"]["params"]))
    else: Learn2TrackModel(**record["model"]["params"]).save_params_and_state(model)
    sentence = told(dwiml_resume_training_from_checkpoint, str(tmp_path), "one", device="cpu")
    assert KINDS[kind] in sentence and "--trust " in sentence, sentence


def keep_one(record, kind):
    "The record with names of the library, and one of the user."
    if kind != "line_weights": record["sampler"]["params"].pop("line_weights")
    record["model"]["params"] |= {k: v for k, v in MODEL.items() if k != kind}
    record["trainer"]["params"] |= {k: v for k, v in TRAINER.items() if k != kind}
    return record


def test_names_on_a_command_line(day, tmp_path):
    "A format, a stop rule, a model's parts; a study's standardisation and format."
    def track(experiment, out, **kwargs): return told(dwiml_track_from_model, str(experiment), "sub-04", str(tmp_path/out), "seed_mask", device="cpu", **kwargs)
    through, ours = day/"experiments"/"through", tmp_path/"ours"
    assert "'.lines' is not a tractogram format" in (said := track(through, "a.lines")) and "--trust mine.py" in said
    assert "unknown embedding" in (said := track(through, "a.trx")) and "--trust mine.py" in said
    ours.mkdir()
    shutil.copy(through/"parameters_latest.json", ours)
    Learn2TrackModel(**json.loads((through/"best_model"/"parameters.json").read_text()) | MODEL).save_params_and_state(ours/"best_model")
    assert "unknown stop rule 'grace'" in (said := track(ours, "a.trx", stop_rules=["grace"])) and "--trust mine.py" in said

    root, config = day/"subjects", json.loads((day/"subjects"/"config.json").read_text())
    for group, words, lines in (("input", "unknown standardization", 1), ("bundles", "bent.lines: this is not a tractogram", 1 + 3*2)):
        (tmp_path/"config.json").write_text(json.dumps({k: config[k] for k in (group, "wm_mask")}))
        lists = [str(root/f"{o}.txt") for o in ("first", "validation", "testing")]
        said = told(dwiml_create_hdf5_dataset, str(root), str(tmp_path/"new.hdf5"), str(tmp_path/"config.json"), *lists, lines=lines)
        assert words in said and "--trust mine.py" in said, said
    assert not (tmp_path/"new.hdf5").exists()
    (tmp_path/"more.txt").write_text("sub-05")
    shutil.copytree(root/"sub-02", tmp_path/"subjects"/"sub-05")
    said = told(dwiml_hdf5_add_subjects, str(day/"study.hdf5"), str(tmp_path/"subjects"), training=str(tmp_path/"more.txt"))
    assert "quartiles" in said and "--trust mine.py" in said, said
