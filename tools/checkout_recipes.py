"""Small trainings, trackings and scores whose every number is written down; compare_checkouts.py runs this in two checkouts.

    PYTHONPATH=CHECKOUT python tools/checkout_recipes.py FOLDER [NAME …]     results: FOLDER/NAME.npz and FOLDER/NAME.json

Recipes use only names that both checkouts have, from their own modules. A new recipe is one function with @recipe.
"""
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch

import dwiml_nb
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.ragged import Ragged, as_ragged
from dwiml_nb.core.tractograms import load_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.demo import recipe as demo_recipe
from dwiml_nb.demo.run import demo_seeds, demo_study
from dwiml_nb.evaluation.bundles import score_tractogram
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.parts import ModelWithDirectionGetter, ModelWithOneInput
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainer, DWIMLTrainerOneInput

try: from dwiml_nb.training.sinks import read_rows
except ImportError: from dwiml_nb.training.loggers import read_rows  # where version 0.1.0 has it

TIMES = ("seconds", "points_per_second", "waiting_seconds")  # of a logged row
WHOLE = 2  # batches of each phase whose values are kept; of later ones a digest
RECIPES = {}


def recipe(f):
    "Register a recipe under its name, with hyphens."
    RECIPES[f.__name__.replace("_", "-")] = f
    return f


# ---- what is written down

class Notes:
    "Arrays and values by name (what/where/which), in the order in which they came to be."
    def __init__(self): self.arrays, self.values, self.order = {}, {}, []

    def add(self, name, value, whole=True):
        "Keep a number, a text, lists of them, a tensor or lines; of an array that is not wanted whole, its digest."
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor): value = as_ragged(list(value))
        if isinstance(value, Ragged):
            self.add(f"{name}/lengths", value.lengths, whole)
            value = value.data
        if isinstance(value, torch.Tensor): value = value.detach().cpu().numpy()
        self.order.append(name)
        if not isinstance(value, np.ndarray): self.values[name] = json.loads(json.dumps(value, default=str))
        elif whole: self.arrays[name] = value.copy()
        else: self.values[name] = f"{value.dtype} {value.shape} {hashlib.sha1(np.ascontiguousarray(value).tobytes()).hexdigest()}"
        return self

    def save(self, folder, name):
        np.savez(folder/f"{name}.npz", **self.arrays)
        (folder/f"{name}.json").write_text(json.dumps({"order": list(dict.fromkeys(self.order)), "values": self.values}))


def note_batch(notes, batch):
    "What the loader gave, before it is finished for the model."
    lines, ids_per_subj = batch
    place = getattr(ids_per_subj, "place", ids_per_subj)
    name, whole = f"batches/{place.subset} {place.epoch} {place.index}", place.epoch == 0 and place.index < WHOLE
    notes.add(f"{name}/ids", [[int(s), np.asarray(ids).tolist()] for s, ids in batch.history["ids"]])
    notes.add(f"{name}/lines of", [[int(s), which.start, which.stop] for s, which in ids_per_subj.items()])
    notes.add(f"{name}/lines", lines, whole).add(f"{name}/loaded targets", batch.targets, whole)
    for k, v in vars(batch.history["draws"]).items(): notes.add(f"{name}/draws {k}", v)
    return name, whole


@contextlib.contextmanager
def watched(notes, trainer):
    "While a trainer trains: each batch, what the model saw, what its loss was computed against, each checkpoint's weights."
    model, now = trainer.model, []
    owner = lambda cls, method: next(c for c in cls.__mro__ if method in vars(c))
    def one_batch(original):
        @functools.wraps(original)
        def run_one_batch(self, batch, *args, **kwargs):
            if now: return original(self, batch, *args, **kwargs)  # called by a child's method of that name
            now.append(note_batch(notes, batch))
            try: return original(self, batch, *args, **kwargs)
            finally: now.clear()
        return run_one_batch
    def loss(original):
        @functools.wraps(original)
        def compute_loss(self, outputs, target_streamlines, *args, **kwargs):
            if now: notes.add(f"{now[0][0]}/targets", target_streamlines, now[0][1])
            return original(self, outputs, target_streamlines, *args, **kwargs)
        return compute_loss
    def seen(module, args):
        for i, arg in enumerate(args if now else ()): notes.add(f"{now[0][0]}/argument {i} of forward", arg, now[0][1])
    def checkpoint(row): note_weights(notes, f"weights/after epoch {row['epoch']}", trainer.experiment_folder/"checkpoint"/"model")
    hook = model.register_forward_pre_hook(seen)
    trainer.control.on_epoch_end.append(checkpoint)
    with contextlib.ExitStack() as stack:
        for cls, method, wrap in ((type(trainer), "run_one_batch", one_batch), (type(model), "compute_loss", loss)):
            where = owner(cls, method)
            stack.enter_context(mock.patch.object(where, method, wrap(vars(where)[method])))
        yield
    hook.remove()
    trainer.control.on_epoch_end.remove(checkpoint)


def note_weights(notes, name, folder):
    "The tensors of a model folder, under their names, in their order."
    state = torch.load(folder/"model_state.pkl", weights_only=True)
    notes.add(f"{name}/keys", list(state))
    for k, v in state.items(): notes.add(f"{name}/{k}", v)


def note_experiment(notes, folder, when=""):
    "Logs, weights, the optimizer, and what the experiment says of itself: no dates, versions and folders."
    for log in ("batches", "epochs"):
        for i, row in enumerate(read_rows(folder/"logs"/f"{log}.jsonl")):
            notes.add(f"logs/{when}{log} {i}", [[k, v if v == v else "nan"] for k, v in row.items() if k not in TIMES])
    for name in ("checkpoint/model", "best_model"):
        note_weights(notes, f"weights/{when}{name}", folder/name)
        for text in ("parameters.json", "model_class.json", "model_type.txt"):
            notes.add(f"records/{when}{name}/{text}", (folder/name/text).read_text())
    state = torch.load(folder/"checkpoint"/"state.pt", weights_only=True)
    for i, slots in state["optimizer"]["state"].items():
        for k, v in slots.items(): notes.add(f"weights/{when}optimizer {i} {k}", v)
    notes.add(f"weights/{when}torch_rng", state.get("torch_rng"))
    notes.add(f"records/{when}place", {k: state.get(k) for k in ("epoch", "phase", "batch")})
    notes.add(f"records/{when}monitor", state.get("monitor"))
    for name in ("checkpoint/params.json", "parameters_latest.json"):
        record = json.loads((folder/name).read_text())
        record["dataset"]["hdf5_file"] = Path(record["dataset"]["hdf5_file"]).name
        notes.add(f"records/{when}{name}", {k: v for k, v in record.items() if k not in ("date", "versions")})
    notes.add(f"records/{when}files", sorted(str(p.relative_to(folder)) for p in folder.rglob("*")
                                      if not p.name.startswith(("parameters_2", "."))))


def note_tractogram(notes, name, lines, truth):
    "Points, stop reasons and seeds of a tractogram, and its scores."
    notes.add(f"tractograms/{name}/points", lines.lines)
    for k, v in lines.info.items(): notes.add(f"tractograms/{name}/{k}", v)
    scores = score_tractogram(lines, truth)
    notes.add(f"scores/{name}", scores.as_dict())
    notes.add(f"scores/{name}/reason", scores.reason).add(f"scores/{name}/bundle", scores.bundle)


def note_study(notes, name, file):
    "Every attribute and every dataset of an HDF5 file, links followed."
    plain = lambda v: v.tolist() if hasattr(v, "tolist") else v
    def note(path, item):
        for k, v in item.attrs.items():
            if k != "data_and_time": notes.add(f"study/{name}/{path} @{k}", plain(v))
        if isinstance(item, h5py.Dataset): notes.add(f"study/{name}/{path}", item[()], whole=False)
    with h5py.File(file) as f:
        note("", f)
        for subject in f:
            note(subject, f[subject])
            f[subject].visititems(lambda path, item: note(f"{subject}/{path}", item))


# ---- the studies, made once for all recipes

@functools.cache
def toy(): return toy_study(Path("toy"), overwrite=True)


@functools.cache
def toy_with_peaks():
    root = write_phantom(Path("toy_with_peaks")/"subjects", peaks=True)
    lists = [root/f"{s}.txt" for s in ("training", "validation", "testing")]
    return create_study(root, Path("toy_with_peaks")/"study.hdf5", root/"config.json", *lists).path


@functools.cache
def people(): return quietly(demo_study, Path("people")).path


def quietly(f, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): return f(*args, **kwargs)


def opened(study, lazy=False):
    dataset = MultiSubjectDataset(study, lazy=lazy)
    dataset.load_data()
    return dataset


# ---- training and tracking on the toy study

SMALL = dict(rnn_key="gru", rnn_layer_sizes=[12], dropout=.1, nb_previous_dirs=1, step_size=1.)


def run(notes, trainer, when=""):
    "Train to the end or until it is stopped, and write everything down."
    with watched(notes, trainer): trainer.train_and_validate()
    note_experiment(notes, trainer.experiment_folder, when)
    return trainer


def stop_after(trainer, n):
    "Ask a trainer to stop after n batches."
    count = itertools.count(1)
    trainer.control.on_batch_end.append(lambda row: next(count) == n and trainer.control.request_stop())
    return trainer


def parts(dataset, model=None, loader=None, sampler=None, inputs="input"):
    "Model, sampler and loader; twenty training batches in two epochs."
    torch.manual_seed(7)
    groups = [inputs] if isinstance(inputs, str) else inputs
    sampler = {**dict(batch_size_training=24, batch_size_validation=50, seed=8), **(sampler or {})}
    if not isinstance(model, torch.nn.Module):
        nb_features = sum(dataset.nb_features[g] for g in groups)
        options = {**SMALL, **(model or {})}
        compress = options.pop("compress_lines", None)          # set afterwards: most direction getters refuse it
        model = Learn2TrackModel(nb_features, **options)
        if compress: model.set_preprocessing(compress_lines=compress)
    loader = DWIMLBatchLoaderOneInput(dataset, model, inputs, "bundles", seed=9, **(loader or {}))
    return model, DWIMLBatchIDSampler(dataset, "bundles", **sampler), loader


def trainer_of(name, model, sampler, loader, cls=DWIMLTrainerOneInput, **options):
    options = {**dict(learning_rates=[5e-3], max_epochs=2, seed=10, device="cpu"), **options}
    return cls(model, Path("experiments"), name, sampler, loader, **options)


def track(notes, model, dataset, name="", inputs="input", algos=("det", "prob"), **options):
    "The test subject, from 150 seeds, with each algorithm; and the scores."
    subset, subject = dataset.testing, dataset.testing.subjects[0]
    affine = subset.grid(0, "seed_mask").affine
    seeds = seeds_from_mask(subset.get_volume(0, "seed_mask"), affine, nt=150, seed=11)
    notes.add(f"tractograms/{name}all seeds", seeds)
    truth = Path(dataset.path).parent/"subjects"/subject
    for algo in algos:
        options = {**dict(theta_deg=80, min_length_mm=4, max_length_mm=60), **options}
        lines = Tracker(model, dataset, subject, inputs, "wm_mask", algo=algo, seed=12, **options).track(seeds, quiet=True)
        note_tractogram(notes, f"{name}{algo}", lines, truth)


def small(name, notes, model=None, loader=None, sampler=None, algos=("det",), tracking=None, study=toy, lazy=False,
          inputs="input", **trainer):
    "A whole recipe on the toy study."
    dataset = opened(study(), lazy)
    made = run(notes, trainer_of(name, *parts(dataset, model, loader, sampler, inputs), **trainer))
    if algos: track(notes, made.model, dataset, inputs=inputs, algos=algos, **(tracking or {}))


OFF_TRACK = dict(reverse_ratio=.5, segment_mm=12., widen_mm=1., off_track_mm=.5, off_track_corr_mm=6., lead_mm=4.)
SPHERE = dict(dg_key="sphere-classification")


@recipe
def studies(notes):
    "What is made of subject folders: plain, prepared in three ways, grown and packed."
    note_study(notes, "toy", toy())
    root = toy().parent/"subjects"
    config, lists = json.loads((root/"config.json").read_text()), (["sub-01"], ["sub-02"], ["sub-03"])
    for kind in ("all", "independent", "per_file", "per_degree"):
        config["input"]["standardization"], config["input"]["std_mask"] = kind, ["masks/wm.nii.gz"]
        options = {"all": dict(step_size=.7), "independent": dict(nb_points=12), "per_file": dict(compress=.1),
                   "per_degree": dict(volume_dtype="float16", remove_invalid=True)}[kind]
        made = create_study(root, Path(f"{kind}.hdf5"), config, *lists, **options).path
        note_study(notes, kind, made)
        add_subjects(made, root, testing=["sub-04"])
        note_study(notes, f"{kind}, grown", made)
    note_study(notes, "repacked", repack_study(made, Path("repacked.hdf5")))


@recipe
def noise(notes): small("noise", notes, loader=dict(noise_mm_forward=.2, noise_mm_loss=.1))


@recipe
def split_step(notes): small("split_step", notes, loader=dict(split_ratio=.6, reverse_ratio=.5))


@recipe
def split_points(notes):
    small("split_points", notes, dict(step_size=None, nb_points=14), dict(split_ratio=.6, reverse_ratio=.5), tracking=dict(step_mm=1.))


@recipe
def split_compress(notes):
    small("split_compress", notes, dict(step_size=None, compress_lines=.05), dict(split_ratio=.6, noise_mm_forward=.1),
          tracking=dict(step_mm=1.))


@recipe
def as_stored(notes): small("as_stored", notes, dict(step_size=None), dict(widen_mm=1.), tracking=dict(step_mm=1.))


@recipe
def eos(notes):
    small("eos", notes, dict(rnn_key="lstm", dg_args=dict(add_eos=True, eos_weight=2., normalize_targets=1.)),
          dict(split_ratio=.5, noise_mm_forward=.1), tracking=dict(eos_threshold=.4, keep_last_point=True))


@recipe
def sphere(notes):
    small("sphere", notes, dict(**SPHERE, dg_args=dict(sphere="symmetric362", dropout=.1)), dict(reverse_ratio=.5),
          algos=("det", "prob"))


@recipe
def sphere_eos(notes):
    small("sphere_eos", notes, dict(**SPHERE, rnn_layer_sizes=[8, 6], use_skip_connection=True, use_layer_normalization=True,
          dg_args=dict(add_eos=True)), dict(split_ratio=.3), algos=("det", "prob"), tracking=dict(eos_threshold="max"))


class Lists(MainModelAbstract):
    "A plain model: lists in, lists out, a bare loss."
    def __init__(self, nb_features):
        super().__init__(step_size=1.)
        self.layer = torch.nn.Linear(nb_features, 3)

    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]

    def compute_loss(self, outputs, target_streamlines, average_results=True):
        errors = [((o[:-1] - (s[1:] - s[:-1]))**2).mean(1) for o, s in zip(outputs, target_streamlines)]
        return torch.cat(errors).mean() if average_results else errors


class LinesAlone(MainModelAbstract):
    "A plain model of streamlines alone, without their last points; it says how many rows count."
    uses_last_point = False
    def __init__(self):
        super().__init__(nb_points=10)
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, streamlines): return [self.layer(s) for s in streamlines]

    def compute_loss(self, outputs, target_streamlines):
        errors = torch.cat([o - (s[1:] - s[:-1]) for o, s in zip(outputs, target_streamlines)])
        return (errors**2).mean(), len(errors)


class Pointwise(ModelWithOneInput, ModelWithDirectionGetter):
    "A model of parts that takes lists and can track."
    def __init__(self, **parts):
        super().__init__(**parts)
        self.hidden = torch.nn.Linear(self.computed_input_embedded_size, 10)
        self.instantiate_direction_getter(10)

    def rows(self, x): return self.direction_getter(torch.tanh(self.hidden(self.input_embedding_layer(x))))
    def forward(self, inputs, streamlines): return [self.rows(x) for x in inputs]
    def tracking_step(self, inputs, previous_dirs, state=None): return self.rows(inputs), None


@recipe
def lists(notes): small("lists", notes, Lists(15), dict(noise_mm_loss=.1, reverse_ratio=.5), algos=())


@recipe
def lines_alone(notes):
    dataset, model = opened(toy()), LinesAlone()
    model, sampler, _ = parts(dataset, model)
    loader = DWIMLBatchLoader(dataset, model, "bundles", seed=9, split_ratio=.5, noise_mm_forward=.1)
    run(notes, trainer_of("lines_alone", model, sampler, loader, DWIMLTrainer))


@recipe
def own_parts(notes):
    torch.manual_seed(7)
    model = Pointwise(nb_features=15, step_size=1.2, neighborhood_type="grid", neighborhood_radius=1, dg_args=dict(axis_head=True))
    small("own_parts", notes, model, OFF_TRACK)


@recipe
def vox(notes):
    small("vox", notes, dict(streamline_space="vox", neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=.6),
          dict(noise_mm_forward=.2, split_ratio=.4, widen_mm=.5))


@recipe
def vox_half(notes): small("vox_half", notes, dict(streamline_space="vox", legacy_half_voxel=True), OFF_TRACK)


@recipe
def two_groups(notes):
    small("two_groups", notes, dict(neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=.7), dict(reverse_ratio=.5),
          study=toy_with_peaks, inputs=["input", "peaks"])


@recipe
def peaks(notes):
    small("peaks", notes, study=toy_with_peaks, algos=("det", "prob"), model=dict(**SPHERE, dg_args=dict(sphere="symmetric362")),
          tracking=dict(first_direction="peaks:peaks", batch_size=40))


@recipe
def inputs_in_workers(notes):
    small("inputs_in_workers", notes, dict(neighborhood_type="axes"), dict(inputs_in_workers=True, noise_mm_forward=.1, reverse_ratio=.5),
          lazy=True, nb_cpu_processes=2)


@recipe
def nn(notes):
    small("nn", notes, dict(neighborhood_type="axes", neighborhood_radius=2, neighborhood_resolution=.5, input_embedding_key="nn_embedding",
          input_embedded_size=20, nb_previous_dirs=3, prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=5,
          normalize_prev_dirs=True))


@recipe
def cnn(notes):
    small("cnn", notes, dict(neighborhood_type="grid", neighborhood_radius=1, neighborhood_resolution=1., input_embedding_key="cnn_embedding",
          nb_cnn_filters=[6, 8], kernel_size=[2, 2]), sampler=dict(batch_size_training=12), max_batches_per_epoch_training=10)


@recipe
def axis(notes): small("axis", notes, dict(dg_args=dict(axis_head=True, axis_weight=.7)), dict(reverse_ratio=.5))


@recipe
def axis_second(notes):
    small("axis_second", notes, dict(dg_args=dict(axis_head=True, add_eos=True, second_step_weight=.25)), dict(split_ratio=.3))


@recipe
def off_track(notes): small("off_track", notes, loader={**OFF_TRACK, "noise_mm_forward": .1, "noise_mm_loss": .1})


@recipe
def validation(notes):
    "Many small validation batches, fewer than there are; patience; batches by points, of few subjects at a time."
    small("validation", notes, sampler=dict(batch_size_training=500, batch_size_validation=150, batch_size_units="nb_points", step_size=1.,
          nb_subjects_per_batch=1, cycles=2), max_batches_per_epoch_training=7, max_batches_per_epoch_validation=12, max_epochs=3,
          patience=1, patience_delta=.5, algos=())


@recipe
def by_length(notes):
    small("by_length", notes, sampler=dict(batch_size_training=500, batch_size_validation=900, batch_size_units="length_mm", nb_passes=2,
          budget_per_subject="equal"), max_batches_per_epoch_training=10, lr_schedule="cosine", optimizer="SGD", clip_grad=.5, algos=())


@recipe
def schedule(notes):
    small("schedule", notes, lr_schedule="cosine-warmup", learning_rates="0.01 0.004", optimizer="RAdam", weight_decay=.1, max_epochs=3,
          max_batches_per_epoch_training=7, max_batches_per_epoch_validation=1, algos=())


@recipe
def resume(notes):
    "Stopped in the middle of an epoch, resumed by a script, stopped in validation, resumed by command; tracked by command."
    dataset, options = opened(toy()), dict(optimizer="AdamW", max_epochs=3)
    made = lambda: parts(dataset, dict(neighborhood_type="axes", dropout=.3), OFF_TRACK)
    run(notes, stop_after(trainer_of("resume", *made(), **options), 15), "stopped, ")
    model, sampler, loader = made()
    again = DWIMLTrainerOneInput.init_from_checkpoint(model, Path("experiments"), "resume", sampler, loader, device="cpu")
    run(notes, stop_after(again, 9), "stopped again, ")
    quietly(dwiml_resume_training_from_checkpoint, "experiments", "resume", device="cpu")
    note_experiment(notes, Path("experiments/resume"))
    for suffix in ("trx", "trk"):
        quietly(dwiml_track_from_model, "experiments/resume", "sub-04", f"resume.{suffix}", "seed_mask", npv=1, save_seeds=True, device="cpu",
                tracking_mask_group="wm_mask", theta=80., min_length=4., use_latest_epoch=suffix == "trk", overwrite=True)
        lines = load_tractogram(f"resume.{suffix}")
        notes.add(f"tractograms/{suffix}/points", lines.lines)
        for k, v in lines.dps.items(): notes.add(f"tractograms/{suffix}/{k}", np.asarray(v))


# ---- the demo's recipe on the demo's five people

def demo(notes, name, nb_batches=60, nb_seeds=400, workers=0, lazy=False, **tracking):
    "The recipe as the demo uses it, here with workers or a lazy dataset; tracked and scored on the person held out."
    dataset = opened(people(), lazy)
    changed = functools.partial(DWIMLTrainerOneInput, nb_cpu_processes=workers)
    with mock.patch.object(demo_recipe, "DWIMLTrainerOneInput", changed):
        trainer = demo_recipe.recipe_trainer(dataset, Path("experiments"), name, nb_batches, device="cpu")
    run(notes, trainer)
    seeds = demo_seeds(dataset, "sub_5", nt=nb_seeds, seed=1)
    notes.add("tractograms/all seeds", seeds)
    for algo in tracking.pop("algos", ("det",)):
        lines = demo_recipe.recipe_tracker(trainer.model, dataset, "sub_5", **tracking).track(seeds, quiet=True)
        note_tractogram(notes, algo, lines, people().parent/"subjects"/"sub_5")


@recipe
def demo_60(notes): demo(notes, "demo_60")


@recipe
def demo_60_workers(notes): demo(notes, "demo_60_workers", workers=2)


@recipe
def demo_60_lazy(notes): demo(notes, "demo_60_lazy", lazy=True)


@recipe
def demo_60_lazy_workers(notes): demo(notes, "demo_60_lazy_workers", workers=2, lazy=True)


@recipe
def demo_full(notes): demo(notes, "demo_full", 1000, None)


def main(folder, names):
    folder, checkout = Path(folder).absolute(), Path(os.environ["PYTHONPATH"].partition(os.pathsep)[0]).absolute()
    if not Path(dwiml_nb.__file__).is_relative_to(checkout): sys.exit(f"dwiml_nb is {dwiml_nb.__file__}, not that of {checkout}")
    work = folder/"work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work)
    for name in names or RECIPES:
        notes, start = Notes(), time.time()
        torch.set_num_threads(1)
        try: RECIPES[name](notes)
        except Exception:
            traceback.print_exc()
            notes.add("error", traceback.format_exc().splitlines()[-1])
        notes.save(folder, name)
        print(f"  {name}: {time.time() - start:.1f} s", flush=True)
    os.chdir(folder)
    shutil.rmtree(work)


if __name__ == "__main__": main(sys.argv[1], sys.argv[2:])
