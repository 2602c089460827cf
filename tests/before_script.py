"""What test_before.py compares with: experiments, model folders and studies as version 0.1.0 wrote them, and what they gave there.

tests/data/before_0_1/ was made with a checkout of that version: PYTHONPATH=CHECKOUT python tests/before_script.py FOLDER
(FOLDER must not exist; it is made, and its path is what the old records name). The functions that use a folder are shared with the tests.
"""
import contextlib
import hashlib
import io
import itertools
import json
import platform
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
from dwiml_nb.core.phantom import phantom_subject, write_phantom, write_subject
from dwiml_nb.core.tractograms import load_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MainModelAbstract, load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.parts import ModelWithDirectionGetter, ModelWithOneInput
from dwiml_nb.study.create import create_study
from dwiml_nb.study.grow import add_subjects
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

try: from dwiml_nb.training.sinks import read_rows
except ImportError: from dwiml_nb.training.loggers import read_rows  # where version 0.1.0 has it

TIMES = ("seconds", "points_per_second", "waiting_seconds")  # of a logged row: never twice the same

# name -> study, lines of a training batch, after how many batches (training and validation) it was stopped, and the options of its parts
EXPERIMENTS = {
    "mid_epoch": dict(
        study="plain", lines=15, stop=8,
        model=dict(rnn_key="gru", rnn_layer_sizes=[6, 5], use_skip_connection=True, dropout=.2, step_size=1.5, nb_previous_dirs=1,
                   input_embedding_key="nn_embedding", input_embedded_size=4, prev_dirs_embedding_key="nn_embedding",
                   prev_dirs_embedded_size=2, normalize_prev_dirs=True, neighborhood_type="axes", neighborhood_radius=1,
                   neighborhood_resolution=.5, dg_args=dict(axis_head=True, second_step_weight=.25)),
        loader=dict(reverse_ratio=.5, segment_mm=15., widen_mm=1., off_track_mm=.4, lead_mm=4., noise_mm_forward=.1,
                    noise_mm_loss=.05),
        trainer=dict(learning_rates=[.01], clip_grad=1.)),
    "sphere_eos": dict(
        study="plain", lines=15, stop=11,
        model=dict(rnn_key="lstm", rnn_layer_sizes=[6], use_layer_normalization=True, step_size=2., streamline_space="vox",
                   dg_key="sphere-classification", dg_args=dict(add_eos=True, sphere="symmetric362")),
        loader=dict(split_ratio=.5, noise_mm_forward=.1),
        trainer=dict(learning_rates="0.02*2 0.01", optimizer="RAdam", patience=2)),
    "schedule_workers": dict(
        study="grown", lines=30, stop=9, lazy=True,
        model=dict(rnn_key="gru", rnn_layer_sizes=[5], step_size=2., nb_previous_dirs=2, dg_args=dict(add_eos=True, normalize_targets=1.)),
        loader=dict(reverse_ratio=.5, inputs_in_workers=True),
        trainer=dict(learning_rates="0.02*2 0.01", lr_schedule="cosine-warmup", optimizer="AdamW", nb_cpu_processes=2)),
}


class Listing(MainModelAbstract):
    "A user's plain model: lists in, lists out, its options in a Namespace."
    def __init__(self, args, more=None, experiment_name=None):
        super().__init__(experiment_name, step_size=args.step_size)
        self.layer = torch.nn.Linear(args.nb_features, 3)

    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]

    def compute_loss(self, outputs, target_streamlines):
        errors = torch.cat([o[:-1] - (s[1:] - s[:-1]) for o, s in zip(outputs, target_streamlines)])
        return (errors**2).mean(), len(errors)


class Pointwise(ModelWithOneInput, ModelWithDirectionGetter):
    "A user's model of parts, which passes their options on."
    def __init__(self, width=4, **parts):
        super().__init__(**parts)
        self.hidden = torch.nn.Linear(self.computed_input_embedded_size, width)
        self.instantiate_direction_getter(width)

    def forward(self, inputs, streamlines):
        return [self.direction_getter(self.hidden(self.input_embedding_layer(x))) for x in inputs]


def model_configs():
    "{name: (class, positional arguments, keyword arguments)}: every option of Learn2Track, and models of a user."
    axes = dict(neighborhood_type="axes")
    grid = dict(neighborhood_type="grid", neighborhood_radius=1, neighborhood_resolution=1.5)
    nn = dict(input_embedding_key="nn_embedding", input_embedded_size=4)
    prev = dict(nb_previous_dirs=2, prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=3, normalize_prev_dirs=True)
    sphere = dict(dg_key="sphere-classification")
    l2t = {
        "defaults": {}, "small lstm": dict(rnn_layer_sizes=[4]), "gru": dict(rnn_key="gru", rnn_layer_sizes=(4, 3)),
        "skip": dict(rnn_layer_sizes=[4, 3], use_skip_connection=True, dropout=.1),
        "norm": dict(rnn_layer_sizes=[4, 3], use_layer_normalization=True), "nn": dict(rnn_layer_sizes=[4], **nn, **axes),
        "skip and norm": dict(rnn_key="gru", rnn_layer_sizes=[4, 3], use_skip_connection=True, use_layer_normalization=True),
        "cnn": dict(rnn_layer_sizes=[4], input_embedding_key="cnn_embedding", nb_cnn_filters=[3, 2], kernel_size=[2, 2], **grid),
        "cnn of one layer": dict(rnn_layer_sizes=[4], input_embedding_key="cnn_embedding", nb_cnn_filters=3, kernel_size=3, **grid),
        "grid": dict(rnn_layer_sizes=[4], **grid), "previous": dict(rnn_layer_sizes=[4], nb_previous_dirs=1), "nn of previous": prev,
        "step": dict(rnn_layer_sizes=[4], step_size=1), "points": dict(rnn_layer_sizes=[4], nb_points=20),
        "compressed": dict(rnn_layer_sizes=[4], compress_lines=np.float64(.1)),
        "vox": dict(rnn_layer_sizes=[4], streamline_space="vox", legacy_half_voxel=True), "named": dict(rnn_layer_sizes=[4], experiment_name="é 1"),
        "eos": dict(rnn_layer_sizes=[4], dg_args=dict(add_eos=True, eos_weight=2)),
        "axis": dict(rnn_layer_sizes=[4], dg_args=dict(axis_head=True, axis_weight=.5, second_step_weight=.25, dropout=.1)),
        "axis and eos": dict(rnn_layer_sizes=[4], dg_args=dict(add_eos=True, axis_head=True, normalize_targets=1., normalize_outputs=2.)),
        "sphere": dict(rnn_layer_sizes=[4], **sphere, dg_args={}),
        "sphere and eos": dict(rnn_layer_sizes=[4], **sphere, dg_args=dict(add_eos=True, sphere="symmetric362", dropout=.2)),
    }
    return {
        **{name: (Learn2TrackModel, (), dict(nb_features=5, **options)) for name, options in l2t.items()},
        "by position": (Learn2TrackModel, (5, "gru", [4], True, True, .1), {}),
        "in full": (Learn2TrackModel, (), dict(nb_features=np.int64(5), rnn_key="gru", rnn_layer_sizes=[4], use_skip_connection=True, dropout=.1,
                    step_size=1.5, streamline_space="vox", dg_key="cosine-regression", dg_args=dict(add_eos=True), **prev, **nn, **axes)),
        "own model": (Listing, (Namespace(nb_features=5, step_size=2.),), dict(experiment_name="own")),
        "own model, not kept": (Listing, (Namespace(nb_features=5, step_size=2.),), dict(more={1, 2})),
        "own parts": (Pointwise, (), dict(width=3, nb_features=5, step_size=1., dg_args=dict(add_eos=True), **nn)),
    }


def built(cls, args, kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def texts_of(model, folder):
    "What a saved model's folder says besides its weights, and the shapes of these."
    model.save_params_and_state(folder)
    names = ("parameters.json", "model_class.json", "model_type.txt")
    return {**{name: (folder/name).read_text() for name in names},
            "state": [[k, list(v.shape), str(v.dtype)] for k, v in model.state_dict().items()],
            "sha1": {k: hashlib.sha1(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}}


def machine():
    "What decides the last bits of a float: values are compared bit for bit where this is the same."
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__, "system": platform.system(),
            "machine": platform.machine(), "cpu": name, "capability": torch.backends.cpu.get_cpu_capability()}


def weights(folder):
    "{file/name: array} of the two models of an experiment."
    load = lambda name: torch.load(folder/name/"model_state.pkl", weights_only=True)
    return {f"{name}/{k}": v.numpy() for name in ("checkpoint/model", "best_model") for k, v in load(name).items()}


def rows(folder):
    "What an experiment logged, times apart; lists of pairs, because the order of the columns counts too."
    kept = lambda name: [[p for p in row.items() if p[0] not in TIMES] for row in read_rows(folder/"logs"/name)]
    return json.loads(json.dumps({name: kept(name) for name in ("batches.jsonl", "epochs.jsonl")}))


def quietly(command, *args, **kwargs):
    "Run a command as a function, without its words."
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): return command(*args, **kwargs)


def go_on(experiment, study):
    "Resume an experiment, as its folder says, on a study that moved; to the end."
    torch.set_num_threads(1)
    quietly(dwiml_resume_training_from_checkpoint, str(experiment.parent), experiment.name, hdf5_file=str(study), device="cpu")


def tracked(experiment, study, out):
    "{name: array} of what the best model of an experiment tracks: by command (det), and by a `Tracker` (det and prob)."
    torch.set_num_threads(1)
    options = dict(tracking_mask_group="wm_mask", theta=150., min_length=2., max_length=60., eos_stop=.6)
    quietly(dwiml_track_from_model, str(experiment), "sub-04", str(out), "seed_mask", hdf5_file=str(study), nt=40, device="cpu", **options)
    lines = load_tractogram(out).lines
    found = {"command/points": lines.data.numpy(), "command/lengths": lines.lengths.numpy()}
    dataset = MultiSubjectDataset(study, lazy=True)
    dataset.load_data(subj_id="sub-04")
    subset = dataset.training if "sub-04" in dataset.training.subjects else dataset.testing
    subject = subset.subjects.index("sub-04")
    affine = subset.grid(subject, "seed_mask").affine
    seeds = seeds_from_mask(subset.get_volume(subject, "seed_mask"), affine, nt=40, seed=3)
    for algo in ("det", "prob") if "sphere" in experiment.name else ("det",):
        tracker = Tracker(load_model(experiment/"best_model"), dataset, "sub-04", "input", "wm_mask", theta_deg=150, min_length_mm=2,
                          max_length_mm=60, algo=algo, eos_threshold=.6, seed=7)
        lines = tracker.track(seeds, quiet=True)
        found |= {f"{algo}/points": lines.lines.data.numpy(), f"{algo}/lengths": lines.lines.lengths.numpy(),
                  f"{algo}/stop reasons": lines.info["stop_reasons"].numpy(), f"{algo}/seeds": lines.info["seeds"].numpy()}
    return found


def contents(study):
    "{name: array} of everything in a study that is opened, and the sha1 of it: volumes, lines and grids of all subjects."
    dataset, found = MultiSubjectDataset(study), {}
    dataset.load_data()
    for name in ("training", "validation", "testing"):
        subset = dataset.subset(name)
        for i, subject in enumerate(subset.subjects):
            for g in dataset.volume_groups: found[f"{name}/{subject}/{g}"] = subset.get_volume(i, g).numpy()
            for g in dataset.streamline_groups:
                lines = subset.get_lines(i, g)
                own = f"{name}/{subject}/{g}"
                found |= {f"{own}/points": lines.data.numpy(), f"{own}/lengths": lines.lengths.numpy()}
            found[f"{name}/{subject}/affine"] = subset.grid(i, dataset.volume_groups[0]).affine
    said = {k: getattr(dataset, k) for k in ("step_size", "nb_points", "compress", "nb_features")}
    return {"said": said, "sha1": {k: hashlib.sha1(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in found.items()}}


def configs():
    "What the two studies are made of: all coefficients as half floats; one volume of peaks, standardised."
    volume = lambda file, **more: {"type": "volume", "files": [file], **more}
    masks = {f"{name}_mask": volume(f"masks/{file}.nii.gz", standardization="none") for name, file in (("wm", "wm"), ("seed", "seeds"))}
    lines = lambda name: {"bundles": {"type": "streamlines", "files": [f"bundles/{name}.trk"]}}
    sh = volume("dwi/sh.nii.gz", standardization="none", frame="image")
    peaks = volume("dwi/peaks.nii.gz", standardization="independent", std_mask=["masks/wm.nii.gz"], frame="image")
    return {"input": sh, **masks, **lines("bent")}, {"input": peaks, **masks, **lines("across")}


def source_of_another(folder):
    "The folder of a fifth subject, to grow a study by."
    write_subject(folder/"sub-05", phantom_subject("toy", 4, 1234))
    return folder


def make_studies(folder, scratch):
    "A plain study, and one that was created and then grown."
    root, (plain, grown) = write_phantom(scratch/"subjects"), configs()
    (folder/"studies").mkdir()
    create_study(root, folder/"studies"/"plain.hdf5", plain, ["sub-01"], ["sub-03"], ["sub-04"],
                 compress=.05, volume_dtype="float16")
    create_study(root, folder/"studies"/"grown.hdf5", grown, ["sub-01"], ["sub-03"], step_size=2.,
                 volume_dtype="float16")
    add_subjects(folder/"studies"/"grown.hdf5", root, training=["sub-02"], testing=["sub-04"])


def make_experiment(folder, name):
    "Train and stop."
    how = EXPERIMENTS[name]
    dataset = MultiSubjectDataset(folder/"studies"/f"{how['study']}.hdf5", lazy=how.get("lazy", False))
    dataset.load_data()
    torch.manual_seed(1)
    model = Learn2TrackModel(dataset.nb_features["input"], **how["model"])
    sampler = DWIMLBatchIDSampler(dataset, "bundles", how["lines"], 30, seed=2)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", seed=3, **how["loader"])
    trainer = DWIMLTrainerOneInput(model, folder/"experiments", name, sampler, loader, max_epochs=3, seed=4, device="cpu",
                                   **how["trainer"])
    done = itertools.count(1)
    trainer.control.on_batch_end.append(lambda row: next(done) == how["stop"] and trainer.control.request_stop())
    trainer.train_and_validate()
    (folder/"experiments"/name/".lock").unlink()


def a_line_each(expected):
    "JSON with a line for each part of each kind."
    parts = lambda kind: ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in kind.items())
    return "{\n" + ",\n".join(f" {json.dumps(k)}: {{\n{parts(v)}\n }}" for k, v in expected.items()) + "\n}\n"


def make(folder):
    "Everything in tests/data/before_0_1."
    torch.set_num_threads(1)
    folder, scratch = Path(folder).absolute(), Path(folder).absolute().with_suffix(".scratch")
    folder.mkdir(); scratch.mkdir()
    make_studies(folder, scratch)
    expected = {"machine": machine(), "models": {}, "experiments": {}, "studies": {}}
    for s in ("plain", "grown"): expected["studies"][s] = contents(folder/"studies"/f"{s}.hdf5")
    for name, how in EXPERIMENTS.items():
        study = folder/"studies"/f"{how['study']}.hdf5"
        make_experiment(folder, name)
        shutil.copytree(folder/"experiments"/name, scratch/name)
        arrays = tracked(scratch/name, study, scratch/f"{name}.trx")
        go_on(scratch/name, study)
        expected["experiments"][name] = rows(scratch/name)
        np.savez_compressed(folder/f"{name}.npz", **arrays, **weights(scratch/name))
    for name, config in model_configs().items(): expected["models"][name] = texts_of(built(*config), scratch/"model")
    (folder/"models").mkdir()
    for name in ("cnn", "own model", "own parts"):
        built(*model_configs()[name]).save_params_and_state(folder/"models"/name.replace(" ", "_"))
    (folder/"expected.json").write_text(a_line_each(expected))
    shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.modules["before_script"] = sys.modules["__main__"]
    for cls in (Listing, Pointwise): cls.__module__ = "before_script"  # as the tests import it
    make(sys.argv[1])
