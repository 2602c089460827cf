"""The tractograms of a training's epochs: the training is the same with and without them, the lines are those that tracking gives, and nothing ends the run."""
import functools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kill_resume import CTX

import kill_script
from bands import Bands
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.tractograms import read_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.evaluation.bundles import score_tractogram
from dwiml_nb.evaluation.epoch_tracks import EpochTracks, epoch_rows, tracks_of
from dwiml_nb.evaluation.tracks_viewer import TracksViewer, seeds_in
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.items import RegisteredBatchLoader
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.registered import dwiml_model, registered_model
from dwiml_nb.models.transformers import TransformerSrcOnlyModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import run_config, run_parts
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.registered import RegisteredTrainer
from dwiml_nb.training.sinks import Sink, read_logs
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.viz.panel import parts_of
from dwiml_nb.widgets.training_dashboard import TrainingDashboard
import dwiml_nb.widgets.viz  # noqa: F401 - what of a dashboard turns on a page that is kept

TRACKING = dict(tracking_mask_group="wm_mask", min_length_mm=0., max_length_mm=40.)
WANTED = dict(key="epoch_tracks", nb_seeds=12, tracking=TRACKING)


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def l2t(nb, **options): return Learn2TrackModel(nb, step_size=2., rnn_key="gru", rnn_layer_sizes=[8], dropout=.3, **options)


@pytest.fixture
def trainer_of(dataset, tmp_path):
    def made(name="run", make=l2t, sinks=(WANTED,), **options):
        torch.manual_seed(0)
        model = make(dataset.nb_features["input"])
        sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40)
        loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", noise_mm_forward=.1)
        return DWIMLTrainerOneInput(model, tmp_path, name, sampler, loader, **{**dict(max_epochs=3, max_batches_per_epoch_training=2, max_batches_per_epoch_validation=1,
                                                                                       learning_rates=[.01]), **options}, sinks=sinks)
    return made


def warned(call):
    "What is said meanwhile."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(o.message) for o in said if "tracked" in str(o.message)]


def numbers(experiment, which): return {k: v for k, v in read_logs(experiment, which).items() if "second" not in k and not k.startswith("tracks_")}
def rows_of(experiment): return [{k: v for k, v in row.items() if k != "seconds"} for row in epoch_rows(experiment)]
def files_of(experiment):  # the file itself keeps the time at which it was written
    kept = {epoch: read_tractogram(path) for epoch, path in tracks_of(experiment).items()}
    return {epoch: (o.lines.data.tolist(), o.lines.offsets.tolist(), {k: v.tolist() for k, v in o.dps.items()}) for epoch, o in kept.items()}


class Careless(Sink):
    "Draws, and leaves the model in another mode, whenever it is asked."
    def measure(self, trainer, epoch):
        torch.rand(3), np.random.rand(3)
        return {"careless": float(epoch), "train_loss": 0.}


@pytest.mark.parametrize("options", [dict(), dict(ema_decay=.5, keep_last=2, keep_best=2)])
def test_the_training_is_the_same_with_and_without(trainer_of, options):
    tracking = {**TRACKING, "algo": "prob"}
    gaussian = functools.partial(l2t, dg_key="gaussian")
    with_, without = (trainer_of(name, gaussian, sinks, **options) for name, sinks in (("with", [{**WANTED, "tracking": tracking}]), ("without", ())))
    states = []
    for trainer in (with_, without):
        torch.manual_seed(3), np.random.seed(3)
        trainer.train_and_validate()
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), [m.training for m in trainer.model.modules()]))
    assert states[0] == states[1]
    a, b = (read_checkpoint(o.experiment_folder).state for o in (with_, without))
    a.pop("spent"), b.pop("spent")
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x.keys() == y.keys() and all(same(x[k], y[k]) for k in x) if isinstance(x, dict) else \
        len(x) == len(y) and all(map(same, x, y)) if isinstance(x, list) else x == y
    assert a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    for name in ("checkpoint/model", "best_model"):
        x, y = (torch.load(o.experiment_folder / name / "model_state.pkl", weights_only=True) for o in (with_, without))
        assert all(torch.equal(x[k], y[k]) for k in x)
    for which in ("epochs", "batches"): assert numbers(with_.experiment_folder, which) == numbers(without.experiment_folder, which)
    assert list(files_of(with_.experiment_folder)) == [0, 1, 2] and not (without.experiment_folder / "tracks").exists()


def test_the_lines_are_those_that_tracking_gives(trainer_of, study):
    trainer = trainer_of(max_epochs=2)
    sink = trainer.sinks.others[0]
    trainer.train_and_validate()
    kept = read_tractogram(tracks_of(trainer.experiment_folder)[1])
    again = track_from_model(trainer.experiment_folder, "sub-03", study.parent / "again.trx", None, seeds=sink.seeds, use_latest_epoch=True, device="cpu", **TRACKING)
    assert len(kept) > 3 and torch.equal(kept.lines.data, again.lines.data) and torch.equal(kept.lines.offsets, again.lines.offsets)
    assert np.array_equal(sink.seeds[kept.dps["seed"].ravel().astype(int)], again.info["seeds"])


def test_scores_are_columns_and_may_be_the_judge(trainer_of, study):
    trainer = trainer_of(sinks=[{**WANTED, "every": 2, "reference": str(study.parent / "subjects")}], max_epochs=4, monitor="tracks_OL", monitor_mode="max")
    trainer.train_and_validate()
    epochs, folder = read_logs(trainer.experiment_folder), trainer.experiment_folder
    assert list(tracks_of(folder)) == [1, 3] and epochs["tracks_OL"][0] is epochs["tracks_OL"][2] is None
    for epoch, path in tracks_of(folder).items():
        scores = score_tractogram(read_tractogram(path), study.parent / "subjects" / "sub-03")
        assert [epochs[f"tracks_{k}"][epoch] for k in ("VS", "OL", "OR", "F1")] == [scores.VS, scores.OL, scores.OR, scores.F1]
        assert np.array_equal(read_tractogram(path).dps["verdict"].ravel(), scores.reason)
    assert epochs["is_best"][:1] == [False] and epochs["best_epoch"][-1] in (1, 3)


def test_after_a_stop_it_goes_on_under_the_same_names(trainer_of, tmp_path):
    trainer_of("through").train_and_validate()
    trainer = trainer_of("stopped")
    trainer.control.on_batch_end.append(lambda row: (row["epoch"], row["batch"]) == (1, 0) and trainer.control.stop())
    trainer.train_and_validate()
    assert list(tracks_of(trainer.experiment_folder)) == [0]
    trainer_from_folder(tmp_path, "stopped").train_and_validate()
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "through") and rows_of(tmp_path / "stopped") == rows_of(tmp_path / "through")


def train_and_die(folder, study, die=None):
    "Start a run with tracks, or go on with it; in a process of its own."
    torch.set_num_threads(1)
    if die: kill_script.die_at(die, f"{folder}/kills.txt")
    if Path(folder, "run").exists(): trainer = trainer_from_folder(folder, "run")
    else:
        trainer = DWIMLTrainerOneInput(*(lambda model, *data: (model, folder, "run", *data))(*kill_script.make_parts(study, False)), max_epochs=3, max_batches_per_epoch_training=2,
                                       max_batches_per_epoch_validation=1, device="cpu", sinks=[WANTED])
    trainer.train_and_validate()


def test_after_a_kill_no_epoch_is_there_twice(study, tmp_path):
    def run(name, **kwargs):
        (tmp_path / name).mkdir(exist_ok=True)
        process = CTX.Process(target=train_and_die, args=(str(tmp_path / name), str(study)), kwargs=kwargs)
        process.start()
        process.join(60)
        return process.exitcode
    (tmp_path / "through").mkdir()
    train_and_die(str(tmp_path / "through"), str(study))
    assert run("killed", die=("checkpoint", "flush", 2)) == -9  # the second epoch is tracked, its checkpoint not written
    assert list(tracks_of(tmp_path / "killed" / "run")) == [0, 1] and read_checkpoint(tmp_path / "killed" / "run").state["epoch"] == 1
    assert run("killed") == 0
    a, b = (tmp_path / name / "run" for name in ("killed", "through"))
    assert files_of(a) == files_of(b) and rows_of(a) == rows_of(b)
    assert read_logs(a)["tracks_mean_length_mm"] == read_logs(b)["tracks_mean_length_mm"]
    assert sorted(p.name for p in (a / "tracks").iterdir()) == ["epoch_0001.trx", "epoch_0002.trx", "epoch_0003.trx"]


@pytest.mark.parametrize("make", [
    functools.partial(TransformerSrcOnlyModel, input_embedded_size=8, nheads=2, n_layers_e=1, max_len=60, step_size=2.),
    functools.partial(Learn2TrackModel, step_size=2., rnn_layer_sizes=[6], nb_previous_dirs=1, dg_key="sphere-classification")])
def test_models_of_other_kinds(trainer_of, make):
    trainer = trainer_of(make=make, max_epochs=1)
    trainer.train_and_validate()
    assert len(read_tractogram(tracks_of(trainer.experiment_folder)[0])) > 0


def test_a_registered_model(dataset, tmp_path):
    class Straight(Bands):
        @staticmethod
        def to_tensor(data_dict): return np.stack([np.asarray(v).mean(0) for v in data_dict["data"]["input"]])
        def infer_step(self, batch): return 0*batch[:, :3] + torch.tensor([0., 0., 1.]) + 0*self(batch)[:, :1]
    groups = dict(streamline_group_name="bundles", input_group_name="input")
    model = registered_model(dwiml_model(Straight), {"model": {"Straight": {"classes": 3}, "Bands": {"classes": 3}}}, dataset, **groups)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40, batch_size_validation=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RegisteredTrainer(model, tmp_path, "run", sampler, RegisteredBatchLoader(dataset, model, **groups), max_epochs=1, max_batches_per_epoch_training=2,
                                    sinks=[{**WANTED, "tracking": {**TRACKING, "step_mm": 2.}}])
    trainer.train_and_validate()
    lines = read_tractogram(tracks_of(trainer.experiment_folder)[0]).lines
    assert len(lines) > 3 and torch.allclose((lines.data[1] - lines.data[0]).norm(), torch.tensor(2.), atol=1e-3)


class Blind(MainModelAbstract):
    "Learns, and cannot track."
    def __init__(self, nb_features, **kwargs):
        super().__init__(**kwargs)
        self.layer = torch.nn.Linear(nb_features, 3)
    def forward(self, inputs, streamlines): return [self.layer(o) for o in inputs]
    def compute_loss(self, outputs, target_streamlines): return sum((o**2).mean() for o in outputs), 1


@pytest.mark.parametrize(("make", "sink", "why"), [
    (functools.partial(Blind, step_size=2.), WANTED, "Blind has no tracking_step"),
    (l2t, {**WANTED, "tracking": dict(tracking_mask_group="wm")}, "no volume group 'wm'"),
    (l2t, {**WANTED, "subj_id": "sub-99"}, "no subject 'sub-99'"),
    (l2t, {**WANTED, "reference": "/nowhere"}, "no such reference")])
def test_what_cannot_be_tracked_is_said_once_and_the_run_goes_on(trainer_of, make, sink, why):
    trainer = trainer_of(make=make, sinks=[sink], max_epochs=2)
    said = warned(trainer.train_and_validate)
    assert len(said) == 1 and why in said[0] and "\n" not in said[0]
    assert trainer.control.state == "ended" and not (trainer.experiment_folder / "tracks").exists()


def test_an_epoch_that_cannot_walk_is_left_out(trainer_of, monkeypatch):
    walk = Learn2TrackModel.tracking_step
    def step(self, *args):
        outputs, state = walk(self, *args)
        return (outputs*float("nan") if trainer.epoch == 1 else outputs), state
    monkeypatch.setattr(Learn2TrackModel, "tracking_step", step)
    trainer = trainer_of()
    said = warned(trainer.train_and_validate)
    assert len(said) == 1 and "Epoch 2 was not tracked: subject sub-03: the model's outputs are not all numbers" in said[0]
    assert list(tracks_of(trainer.experiment_folder)) == [0, 2] and "problem" in epoch_rows(trainer.experiment_folder)[1]
    assert read_logs(trainer.experiment_folder)["tracks_mean_length_mm"][1] is None


def test_a_run_file_asks_for_it(study):
    (study.parent / "run.toml").write_text(f"""
[data]
hdf5_file = "{study.name}"
input_group_name = "input"
streamline_group_name = "bundles"
[model]
rnn_layer_sizes = [4]
step_size = 2.0
[logging]
sinks = [{{key = "epoch_tracks", nb_seeds = 9, every = 1, reference = "subjects"}}]
[tracking]
seeding_mask_group = "seed_mask"
theta_deg = 20.0
max_length_mm = 30.0
[training]
experiment_name = "filed"
max_epochs = 1
max_batches_per_epoch_training = 1
""")
    trainer = run_parts(run_config(study.parent / "run.toml")).trainer
    trainer.train_and_validate()
    sink, row = trainer.sinks.others[0], epoch_rows(trainer.experiment_folder)[0]
    assert sink.reference == str(study.parent / "subjects") and sink.said()["theta_deg"] == 20 and "VS" in row and row["mean_length_mm"] <= 31
    again = run_config(trainer.experiment_folder)["logging"]["sinks"][0]
    assert again["reference"] == sink.reference and again["nb_seeds"] == 9
    for wrong, why in (("{key='epoch_tracks', nb_seed=3}", "nb_seeds"), ("{key='epoch_tracks', tracking={theta=3}}", "theta_deg"), ("{key='epoch_tracks', every=0}", ">= 1")):
        with pytest.raises((DataProblem, ValueError), match=why): run_parts(run_config(study.parent / "run.toml", f"logging.sinks=[{wrong}]", "training.experiment_name=bad"))


def test_a_sink_that_draws_and_claims_a_column_changes_nothing(trainer_of):
    trainers = [trainer_of(name, sinks=sinks, max_epochs=2) for name, sinks in (("with", [Careless()]), ("without", ()))]
    for trainer in trainers: trainer.train_and_validate()
    a, b = (numbers(o.experiment_folder, "epochs") for o in trainers)
    assert a.pop("careless") == [0., 1.] and a == b
    assert all(torch.equal(x, y) for x, y in zip(*(o.model.parameters() for o in trainers)))


def test_options():
    assert repr(EpochTracks(every=3)) == "EpochTracks(every 3 epochs, 200 seeds)"
    for wrong in (dict(keep=0), dict(max_seconds=0), dict(nb_seeds=0), dict(tracking=dict(algo="dt"))):
        with pytest.raises((DataProblem, ValueError)): EpochTracks(**wrong)


def test_the_viewer_follows_what_another_process_tracks(trainer_of):
    trainer = trainer_of(max_epochs=4, sinks=[{**WANTED, "every": 2}])
    seen = TracksViewer(trainer.experiment_folder)
    assert seen.viewer is None and not seen.still() and not seen.look()
    trainer.control.on_epoch_end.append(lambda row: row["epoch"] == 1 and trainer.control.stop())
    trainer.train_and_validate()
    assert seen.look() and (seen.epoch, seen.epochs, seen.controls.layout.display) == (1, [1], "none"), "nothing to slide through yet"
    trainer.train_and_validate()
    assert seen.look() and (seen.epoch, seen.epochs, seen.slider.min, seen.slider.max, seen.slider.step) == (3, [1, 3], 2, 4, 2)
    late = TracksViewer(trainer.experiment_folder)
    assert (late.epoch, late.follows) == (3, True), "several came at once, and nobody moved the slider"
    late.close()
    board = TrainingDashboard(trainer.experiment_folder)
    parts = parts_of(board)
    assert ["dwiml-turns" in part.body for part in parts].count(True) == 1 and board.tracks.told.value.split(">")[1].split("<")[0] in "".join(part.body for part in parts), "kept as a page, the lines turn"
    board.close()
    seen.slider.value = 2
    seen.viewer.selection = (0,)
    assert (seen.epoch, seen.follows) == (1, False)
    seen.slider.value = 4
    assert seen.follows and not seen.error and [seeds_in(seen.viewer.scene)[i] for i in seen.viewer.selection] == [0.]
    seen.close()
