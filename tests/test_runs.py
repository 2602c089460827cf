"""Runs that last: one trainer at a time, the same data, targets that stay, and a sentence wherever a number is none."""
import functools
import json
import multiprocessing
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_nb.batch.augment import Augmentation
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.registry import Registry
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.directions.base import DIRECTION_GETTERS, DirectionGetter
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.base import MainModelAbstract, load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.config import read_config
from dwiml_nb.study.grow import add_subjects, repack_study
from dwiml_nb.study.lists import read_subject_lists
from dwiml_nb.study.standardize import standardized
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.stops import StopRule, stop_rules_of
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.means import BestEpochMonitor
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.viz.plots import plot_logs

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def learner(dataset, cls=Learn2TrackModel, **options):
    torch.manual_seed(0)
    return cls(**{**dict(nb_features=dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], nb_previous_dirs=1, step_size=2.0), **options})


def make(dataset, folder, name="run", model=None, resume=False, cls=DWIMLTrainerOneInput, **kwargs):
    model = model or learner(dataset)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30, **({"line_weights": kwargs.pop("line_weights")} if "line_weights" in kwargs else {}))
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    options = {} if resume else dict(max_epochs=1, max_batches_per_epoch_training=2, max_batches_per_epoch_validation=1)
    return (cls.init_from_checkpoint if resume else cls)(model, folder, name, sampler, loader, **{**options, "device": "cpu", **kwargs})


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    "An experiment of one epoch; tests work on copies."
    folder = tmp_path_factory.mktemp("made")
    make(dataset, folder).train_and_validate()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path/"experiments")
    return tmp_path/"experiments"


def place(folder, name="run"): return tuple(read_checkpoint(folder/name).state[k] for k in ("epoch", "phase", "batch"))


# ---- one experiment, one trainer

def test_a_second_trainer_of_this_process_is_refused(dataset, folder):
    "One trains in a thread, as in a dashboard; the cell is run again."
    first, second = (make(dataset, folder, resume=True, new_max_epochs=3) for _ in range(2))
    inside, go = threading.Event(), threading.Event()
    first.control.on_batch_end.append(lambda row: (inside.set(), go.wait(60)))
    thread = threading.Thread(target=first.train_and_validate)
    thread.start()
    assert inside.wait(60)
    for _ in range(2):                                                  # a refusal does not free the other's lock
        with pytest.raises(RuntimeError, match="another trainer of this process is training this experiment"): second.train_and_validate()
    assert locked_elsewhere(folder/"run")
    go.set()
    thread.join()
    log = read_logs(folder/"run", "batches")
    places = list(zip(log["epoch"], log["phase"], log["batch"]))
    assert len(places) == len(set(places)) == 9 and not locked_elsewhere(folder/"run")


def tries_the_lock(path, answer):
    import fcntl
    with open(path, "a") as f:
        try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: answer.put(True)
        else: answer.put(False)


def locked_elsewhere(experiment):
    "Does another process find the experiment locked?"
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=tries_the_lock, args=(experiment/".lock", answer))
    child.start()
    child.join(60)
    return answer.get()


def test_a_trainer_that_read_an_older_checkpoint_undoes_nothing(dataset, folder):
    stale = make(dataset, folder, resume=True, new_max_epochs=2)
    make(dataset, folder, resume=True, new_max_epochs=4).train_and_validate()
    logs = {p: p.read_bytes() for p in (folder/"run"/"logs").iterdir()}
    with pytest.raises(DataProblem, match="Expected: its checkpoint of epoch 2 after 0 training batches. Found: one of epoch 5 after 0 training batches. To do: .*init_from_checkpoint"): stale.train_and_validate()
    assert place(folder) == (4, "training", 0) and logs == {p: p.read_bytes() for p in (folder/"run"/"logs").iterdir()}


def test_an_experiment_made_again_is_another_one(dataset, folder):
    "Same name, same place, other numbers: the trainer of the first one does not go on with it."
    kept = make(dataset, folder, resume=True, new_max_epochs=3)
    shutil.rmtree(folder/"run")
    make(dataset, folder, seed=7, learning_rates=[0.5]).train_and_validate()
    with pytest.raises(DataProblem, match="another trainer has trained this experiment"): kept.train_and_validate()


def test_a_trainer_goes_on_from_its_own_checkpoint(dataset, folder):
    "Stopped and started again, or asked for one epoch after the other."
    trainer = make(dataset, folder, resume=True, new_max_epochs=4)
    trainer.train_one_epoch()
    trainer.validate_one_epoch()
    trainer.train_and_validate()
    assert trainer.control.state == "ended" and place(folder) == (4, "training", 0)


def test_of_two_who_make_one_experiment_one_goes_on(dataset, tmp_path):
    "Two processes at the same moment: one trains to its end, the other is told, and nothing is left beside the experiment."
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.SimpleQueue()

    def run():
        torch.set_num_threads(1)
        trainer = make(dataset, tmp_path)
        start.wait(60)
        try: trainer.train_and_validate()
        except Exception as e: answers.put(str(e))
        else: answers.put("")
    children = [context.Process(target=run) for _ in range(2)]
    for child in children: child.start()
    for child in children: child.join(100)
    told = sorted(answers.get() for _ in range(2))
    assert told[0] == "" and ("is training this experiment" in told[1] or "the experiment exists already" in told[1]), told
    assert place(tmp_path) == (1, "training", 0) and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_file_system_without_locks_is_told_once(dataset, folder, monkeypatch):
    import errno
    import fcntl
    from dwiml_nb.training import control
    monkeypatch.setattr(control, "told_of", set())
    def no_locks(*args): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for epochs in (2, 3): make(dataset, folder, resume=True, new_max_epochs=epochs).train_and_validate()
    assert [str(w.message) for w in told if "has no locks (No locks available)" in str(w.message)] != [] and len(told) == 1


# ---- what somebody removed

def test_a_best_model_that_was_removed_is_made_again_where_that_is_exact(dataset, folder):
    best = folder/"run"/"best_model"
    before = torch.load(best/"model_state.pkl", weights_only=True)
    shutil.rmtree(best)
    (folder/"run"/"best_epoch_losses.json").unlink()
    trainer = make(dataset, folder, resume=True, new_max_epochs=2)
    trainer.control.request_stop()                                      # nothing is trained, but the folder is entered
    trainer.train_and_validate()
    after = torch.load(best/"model_state.pkl", weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in before) and json.loads((folder/"run"/"best_epoch_losses.json").read_text())["epoch"] == 0


def test_what_cannot_be_made_again_is_told(dataset, folder):
    trainer = make(dataset, folder, resume=True, new_max_epochs=3)
    trainer.monitor.best_value = -1.0                                   # no later epoch is better
    trainer.train_and_validate()
    for name in ("best_model", "logs"): shutil.rmtree(folder/"run"/name)
    on = make(dataset, folder, resume=True, new_max_epochs=4)
    with pytest.warns(UserWarning) as told: on.train_and_validate()
    words = [str(w.message) for w in told]
    assert any("the rows of 3 of 3 epochs are gone" in w for w in words) and any("the model of epoch 1 is gone, and only one with a loss below -1" in w for w in words)
    assert read_logs(folder/"run")["epoch"] == [3]


# ---- the same data

def test_other_data_of_the_same_counts_are_refused(dataset, folder, tmp_path):
    other = toy_study(tmp_path/"other", seed=99)
    again = lambda study, **kwargs: trainer_from_folder(folder, "run", study, new_max_epochs=2, device="cpu", **kwargs)
    with pytest.raises(DataProblem, match=r"subject sub-0\d, group (input|bundles), file .*other.*study holds other data than the run was trained on.*Expected: the data of .*To do: .*--other_data"): again(other)
    again(other, other_data=True).train_and_validate()
    with pytest.raises(DataProblem, match="other data"): trainer_from_folder(folder, "run", dataset.path, new_max_epochs=3, device="cpu")  # now those are the run's


def test_a_copy_of_the_study_is_the_study(dataset, folder, tmp_path):
    "Moved, copied, touched, read in another way."
    copy = tmp_path/"elsewhere"/"copy.hdf5"
    copy.parent.mkdir()
    shutil.copy(dataset.path, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_from_folder(folder, "run", copy, new_max_epochs=2, device="cpu")
        make(MultiSubjectDataset(copy, lazy=True, read_mode="pread").load_data(load_testing=False), folder, resume=True, new_max_epochs=2)


def test_a_study_that_has_grown(dataset, folder, tmp_path):
    "By a testing subject, and repacked: the same run goes on. By a training subject: it would be another run."
    more = write_phantom(tmp_path/"more", n_subjects=5)
    for subset in ("testing", "training"):
        study = tmp_path/f"{subset}.hdf5"
        shutil.copy(dataset.path, study)
        add_subjects(study, more, **{subset: ["sub-05"]})
        if subset == "testing": repack_study(study)
        again = lambda: trainer_from_folder(folder, "run", study, new_max_epochs=2, device="cpu")
        if subset == "testing": assert again().epoch == 1
        else:
            with pytest.raises(DataProblem, match="another study .training subjects.*Found: sub-05=120"): again()


def test_a_run_of_before_resumes_with_a_warning(dataset, folder):
    file = folder/"run"/"checkpoint"/"params.json"
    params = json.loads(file.read_text())
    assert sorted(params["fingerprint"]) == ["bundles", "input"] and str(dataset.path.parent) not in json.dumps(params["fingerprint"])
    del params["fingerprint"]
    file.write_text(json.dumps(params))
    with pytest.warns(UserWarning, match="kept no fingerprint of its data"): trainer = make(dataset, folder, resume=True, new_max_epochs=2)
    trainer.train_and_validate()
    assert "fingerprint" in read_checkpoint(folder/"run").params


def test_opening_looks_at_nothing(study, monkeypatch):
    "The fingerprint is taken when a training starts."
    from dwiml_nb.training import run
    asked, real = [], run.fingerprint
    monkeypatch.setattr(run, "fingerprint", lambda *args: (asked.append(1), real(*args))[1])
    lazy = MultiSubjectDataset(study, lazy=True).load_data()
    trainer = make(lazy, Path("nowhere"))
    assert not asked
    assert trainer.params["fingerprint"] == trainer.params["fingerprint"] and len(asked) == 1


# ---- targets stay what they were

class InPlace(Learn2TrackModel):
    accepts_ragged, writes = False, True
    def forward(self, inputs, lines, **kwargs):
        if self.writes:
            for line in lines: line.sub_(line.mean(0)).mul_(3)
        return super().forward(inputs, [torch.zeros_like(line).cumsum(0) for line in lines], **kwargs)


class Quiet(InPlace): writes = False


@pytest.mark.parametrize("eos", [False, True])
def test_forward_may_write_into_its_lines(dataset, tmp_path, eos):
    "Bit for bit the same weights and logs as with a forward that does not."
    ends = []
    for cls in (InPlace, Quiet):
        trainer = make(dataset, tmp_path, cls.__name__, learner(dataset, cls, dg_args={"add_eos": eos}))
        trainer.train_and_validate()
        ends.append((trainer.model.state_dict(), read_logs(trainer.experiment_folder)["train_loss"]))
    assert ends[0][1] == ends[1][1] and all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])


def test_a_step_that_shares_lines_with_targets_is_told(dataset, tmp_path):
    class Step(DWIMLTrainerOneInput):
        def run_one_batch(self, data):
            lines, ids = data
            outputs = self.model(self.batch_loader.load_batch_inputs(lines, ids), lines)
            return self.model.compute_loss(outputs, lines)
    with pytest.raises(DataProblem, match="forward wrote into its lines, and they are the targets too"):
        make(dataset, tmp_path, model=learner(dataset, InPlace, dg_args={"add_eos": True}), cls=Step).train_and_validate()
    make(dataset, tmp_path, "quiet", learner(dataset, Quiet, dg_args={"add_eos": True}), cls=Step).train_and_validate()


# ---- not a number, in training

class Told(Learn2TrackModel):
    "Gives the n, or the loss, that it is told."
    n, loss = None, None
    def compute_loss(self, outputs, targets, average_results=True):
        loss, n = super().compute_loss(outputs, targets)
        return loss if self.loss is None else self.loss(loss), n if self.n is None else self.n


@pytest.mark.parametrize("n", [0, -3, NAN, 2.5, "many", torch.zeros(2)])
def test_rows_behind_a_loss(dataset, tmp_path, n):
    model = learner(dataset, Told)
    model.n = n
    with pytest.raises(ValueError, match="compute_loss gave n = .*Expected the number of rows"): make(dataset, tmp_path, model=model).train_and_validate()
    assert not (tmp_path/"run"/"best_model").exists()


@pytest.mark.parametrize("loss", [torch.Tensor.detach, lambda loss: torch.tensor(loss.item()), lambda loss: torch.ones((), requires_grad=True) * loss.item()])
def test_a_loss_that_reaches_no_weight(dataset, tmp_path, loss):
    model = learner(dataset, Told)
    model.loss = loss
    with pytest.raises(DataProblem, match=r"the loss reaches no weight of the model.*detach\(\)"): make(dataset, tmp_path, model=model).train_and_validate()


def test_weights_that_are_no_numbers_are_not_kept(dataset, tmp_path):
    "An absurd rate in the last step of an epoch without validation: the checkpoint of before stays."
    trainer = make(dataset, tmp_path, learning_rates=[1e38], optimizer="SGD", weight_decay=0, max_batches_per_epoch_training=1)
    trainer.max_batches["validation"] = 0
    trainer.phases = trainer.phases[:1]
    step = trainer.optimizer.step
    def overflowing():
        step()
        with torch.no_grad(): next(trainer.model.parameters()).mul_(INF)
    trainer.optimizer.step = overflowing
    with pytest.raises(DataProblem, match="the weights of the model are not all numbers"): trainer.train_and_validate()
    assert place(tmp_path) == (0, "training", 0)
    with pytest.raises(DataProblem, match="not all numbers"): make(dataset, tmp_path, "second", trainer.model).train_and_validate()
    assert not (tmp_path/"second").exists() and not list(tmp_path.glob(".second*"))


@pytest.mark.parametrize("factor", [NAN, -1.0, INF, "x"])
def test_factors_of_a_schedule(dataset, tmp_path, factor):
    with pytest.raises(ValueError, match="the factor of lr_schedule at training batch 1 of epoch 1 is a number >= 0"):
        make(dataset, tmp_path, lr_schedule=lambda iteration: factor).train_and_validate()


# ---- not a number, in tracking

def spoil(folder, value, which=-1):
    file = folder/"run"/"best_model"/"model_state.pkl"
    weights = torch.load(file, weights_only=True)
    weights[list(weights)[which]].view(-1)[0] = value
    torch.save(weights, file)
    return file


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_model_of_no_numbers_does_not_load(folder, tmp_path, capsys, value):
    file = spoil(folder, value)
    with pytest.raises(DataProblem, match=r"file .*model_state.pkl: the weights of the model are not all numbers.*NaN or infinity in direction_getter"): load_model(file.parent)
    with pytest.raises(SystemExit) as ended: dwiml_track_from_model(str(folder/"run"), "sub-04", str(tmp_path/"o.trk"), "seed_mask", nt=20, device="cpu")
    assert "not all numbers" in str(ended.value.code) and not (tmp_path/"o.trk").exists()


def track(dataset, model, **options):
    tracker = Tracker(model, dataset, "sub-04", "input", **options)
    return tracker.track(seeds_from_mask(dataset.testing.get_volume(0, "seed_mask"), dataset.testing.grid(0, "seed_mask").affine, nt=20), quiet=True)


class Answers(Learn2TrackModel):
    "Outputs or directions as they are told."
    outputs = directions = staticmethod(lambda o: o)
    def tracking_step(self, *args):
        outputs, state = super().tracking_step(*args)
        return self.outputs(outputs), state
    def get_tracking_directions(self, outputs, *args, **kwargs): return self.directions(super().get_tracking_directions(outputs, *args, **kwargs))


def first_row(value):
    def change(o):
        o = o.clone()
        o[0, 1] = value
        return o
    return change


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["outputs", "directions"])
def test_answers_that_are_no_numbers(dataset, what, value):
    model = learner(dataset, Answers).eval()
    setattr(model, what, first_row(value))
    with pytest.raises(DataProblem, match=r"not all numbers.*for 1 of \d+ lines, at \[.*\] mm \(RAS\).*the inputs there are finite.*look at the weights|gave directions that are not numbers"): track(dataset, model)


def test_lines_may_end_by_nan(dataset):
    "All three numbers, in the model's own method: the way to end a line."
    model = learner(dataset, Answers).eval()
    model.directions = lambda o: torch.full_like(o, NAN)
    assert track(dataset, model).info["reasons"]["end"] == {"eos": 20}


def test_an_image_of_no_numbers(study):
    dataset = MultiSubjectDataset(study).load_data()
    dataset.testing.get_volume(0, "input")[...] = NAN
    with pytest.raises(DataProblem, match="subject sub-04: the model's outputs are not all numbers.*the inputs there are not finite either.*nan_to_num"): track(dataset, learner(dataset).eval())


class Careless(DirectionGetter):
    "Divides by a length that may be 0."
    def direction_terms(self, rows, dirs): return (rows - dirs.data).norm(dim=1)
    def det_directions(self, rows): return rows/(rows.norm(dim=1, keepdim=True)*0)


def test_a_getter_that_divides_by_zero(dataset, monkeypatch):
    monkeypatch.setitem(DIRECTION_GETTERS.entries, "careless", Careless)
    for eos in (False, True):
        with pytest.raises(DataProblem, match="the direction getter 'Careless' gave directions that are not numbers.*the outputs behind it are finite"):
            track(dataset, learner(dataset, dg_key="careless", dg_args={"add_eos": eos}).eval(), eos_threshold=1.0 if eos else None)


def test_rules_and_getters_write_into_their_own(dataset):
    class Writes(StopRule):
        def __call__(self, walk, positions, codes, state):
            same = codes.clone()
            positions.zero_(), codes.fill_(1)
            return same, state
    class Model(Answers):
        def get_tracking_directions(self, outputs, *args, previous_dirs=None, **kwargs):
            found = super().get_tracking_directions(outputs, *args, previous_dirs=previous_dirs, **kwargs)
            if self.writes: previous_dirs.zero_()
            return found
    ends = []
    for Model.writes, rules in ((False, None), (True, Writes)): ends.append(track(dataset, learner(dataset, Model).eval(), stop_rules=rules, min_length_mm=0, theta_deg=40))
    assert torch.equal(ends[0].lines.data, ends[1].lines.data) and len(ends[0].lines.data) > 20


@pytest.mark.parametrize("answer, found", [(lambda d: d[:-1], r"\(\d+, 3\)"), (lambda d: d[:, :2], r"\(\d+, 2\)"), (lambda d: d.numpy(), "a ndarray"), (lambda d: None, "a NoneType")], ids=["a row less", "two columns", "numpy", "none"])
def test_directions_of_another_shape(dataset, answer, found):
    class Model(Learn2TrackModel):
        def get_tracking_directions(self, *args, **kwargs): return answer(super().get_tracking_directions(*args, **kwargs))
    with pytest.raises(DataProblem, match=f"get_tracking_directions answered something else.*Found: {found}"): track(dataset, learner(dataset, Model).eval())


# ---- arguments, before there is anything

BAD_NUMBERS = [NAN, INF, "x", -1, [1]]


@pytest.mark.parametrize("name", ["patience_delta", "weight_decay", "clip_grad", "max_epochs", "patience", "max_batches_per_epoch_training", "nb_cpu_processes", "seed", "learning_rates"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_numbers_of_a_trainer(dataset, tmp_path, name, value):
    if (name, value) in (("learning_rates", [1]), ("patience_delta", -1)): pytest.skip("is right")
    with pytest.raises(ValueError, match=f"{name}|learning rate"): make(dataset, tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a\nb", "a\x1b[31m", "a" * 300, None, 5, "/abs"])
def test_names_of_experiments(dataset, tmp_path, name):
    with pytest.raises(DataProblem, match="name"): make(dataset, tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, None, 2**64, 0.5, NAN, "1"])
def test_seeds(dataset, tmp_path, seed):
    model = learner(dataset)
    for use in (lambda: make(dataset, tmp_path, seed=seed), lambda: DWIMLBatchIDSampler(dataset, "bundles", seed=seed), lambda: DWIMLBatchLoader(dataset, model, "bundles", seed=seed),
                lambda: Tracker(model, dataset, "sub-04", "input", seed=seed), lambda: seeds_from_mask(np.ones((3, 3, 3)), np.eye(4), seed=seed)):
        with pytest.raises(ValueError, match="seed is a whole number from 0"): use()


def test_large_seeds_work(dataset):
    for seed in (2**63 + 5, 2**64 - 1):
        track(dataset, learner(dataset, dg_key="sphere-classification").eval(), seed=seed, algo="prob", min_length_mm=0)
        next(DWIMLBatchIDSampler(dataset, "bundles", seed=seed).batches())


NUMBERS = {
    "sampler": (lambda d, m, **o: DWIMLBatchIDSampler(d, "bundles", batch_size_units="nb_points", **o), ["batch_size_training", "batch_size_validation", "nb_passes", "cycles", "nb_subjects_per_batch", "step_size"]),
    "loader": (lambda d, m, **o: DWIMLBatchLoader(d, m, "bundles", **o), ["split_ratio", "reverse_ratio", "segment_mm", "noise_mm_forward", "noise_mm_loss", "widen_mm", "off_track_mm", "off_track_corr_mm", "lead_mm"]),
    "tracker": (lambda d, m, **o: Tracker(m, d, "sub-04", "input", **o), ["step_mm", "theta_deg", "min_length_mm", "max_length_mm", "batch_size"]),
    "seeds": (lambda d, m, **o: seeds_from_mask(np.ones((3, 3, 3)), np.eye(4), **o), ["npv", "nt"]),
    "augmentation": (lambda d, m, **o: Augmentation(**o), ["off_track_ratio"]),
    "spec": (lambda d, m, **o: ModelSpec(**o), ["step_size", "nb_points", "compress_lines"]),
    "monitor": (lambda d, m, **o: BestEpochMonitor(**o), ["patience"]),
    "getter": (lambda d, m, **o: direction_getter("cosine-regression", 4, **o), ["dropout", "eos_weight", "axis_weight", "second_step_weight", "normalize_targets", "normalize_outputs"]),
    "model": (lambda d, m, **o: learner(d, **o), ["dropout", "step_size", "nb_features", "nb_previous_dirs"]),
}


@pytest.mark.parametrize("part, name", [(part, name) for part, (_, names) in NUMBERS.items() for name in names])
def test_numbers_of_the_other_parts(dataset, part, name):
    model = learner(dataset)
    for value in BAD_NUMBERS:
        what = "seeds" if part == "seeds" else name
        with pytest.raises(ValueError, match=what): NUMBERS[part][0](dataset, model, **{name: value})


@pytest.mark.parametrize("threshold", [NAN, "often"])
def test_thresholds(dataset, threshold):
    with pytest.raises(ValueError, match="eos_threshold is a probability, 'max' or None"): Tracker(learner(dataset), dataset, "sub-04", "input", eos_threshold=threshold)
    with pytest.raises(ValueError, match="eos_threshold"): direction_getter("cosine-regression", 4, add_eos=True).get_tracking_directions(torch.ones(2, 4), eos_threshold=threshold)


def test_parts_that_do_not_belong_together(dataset, study, tmp_path):
    model = learner(dataset)
    sampler, loader = DWIMLBatchIDSampler(dataset, "bundles"), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    with pytest.raises(TypeError, match="batch_sampler has a method nb_batches"): DWIMLTrainerOneInput(model, tmp_path, "run", loader, sampler)
    copy = tmp_path/"copy.hdf5"
    shutil.copy(study, copy)
    other = DWIMLBatchIDSampler(MultiSubjectDataset(copy).load_data(), "bundles")
    with pytest.raises(DataProblem, match="sampler and loader are not about the same streamlines"): DWIMLTrainerOneInput(model, tmp_path, "run", other, loader)
    with pytest.raises(DataProblem, match="there is no such device. Expected: cpu.*Found: 'gpu'"): make(dataset, tmp_path, device="gpu")


@pytest.mark.parametrize("name", ["..", "a/b", ".x", "a\tb", "x" * 300])
def test_names_in_a_study(name):
    with pytest.raises(DataProblem, match="cannot be the name of a group"): read_config({name: {"type": "streamlines", "files": ["a.trk"]}})
    _, bad = read_subject_lists([name], None, None)
    assert "must be the name of a folder" in str(bad[0])


# ---- images that cannot be standardised

@pytest.mark.parametrize("how", ["all", "independent", "per_file", "per_degree"])
@pytest.mark.parametrize("scale, word", [(1e-12, "small"), (1e-30, "small"), (1e-41, "small"), (1e17, "large"), (1e30, "large")])
def test_standardising_tiny_and_huge_values(how, scale, word):
    image = np.random.default_rng(0).normal(3, 1, (6, 6, 6, 6)).astype(np.float32)
    with pytest.raises(DataProblem, match=f"the values are too {word} to be standardised.*magnitudes up to.*To do"): standardized(image*np.float32(scale), np.ones((6, 6, 6), bool), how)
    assert np.isfinite(standardized(image, np.ones((6, 6, 6), bool), how)[0]).all()


def test_a_feature_of_rounding_noise_is_no_error():
    image = np.random.default_rng(0).normal(3, 1, (6, 6, 6, 2)).astype(np.float32)
    image[..., 1] = 1e-9*image[..., 0]
    for how in ("all", "independent"): assert np.isfinite(standardized(image, np.ones((6, 6, 6), bool), how)[0]).all()


def test_a_stored_volume_beyond_single_precision(study, tmp_path):
    "As another program may write it: never an infinity that nobody sees."
    import h5py
    copy = tmp_path/"study.hdf5"
    shutil.copy(study, copy)
    with h5py.File(copy, "r+") as f:
        group = f["sub-01/input"]
        values = group["data"][()].astype(np.float64)
        values[3, 3, 3, 0] = 1e300
        del group["data"]
        group["data"] = values
    with pytest.raises(DataProblem, match=r"subject sub-01, group input.*single precision cannot.*Found: 1e\+300"): MultiSubjectDataset(copy).load_data()


# ---- figures, records, names

def test_two_experiments_of_one_name_in_one_figure(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"others"/"experiments")
    labels = lambda *folders: [label for label in plot_logs(list(folders), {"loss": ["train_loss"]})[0].axes[0].get_legend_handles_labels()[1]]
    assert labels(folder/"run", tmp_path/"others"/"experiments"/"run") == [f"{tmp_path.name}/experiments/run", "others/experiments/run"]
    assert labels(folder/"run", folder/"run") == []


@pytest.mark.parametrize("options, error, words", [
    (dict(optimizer_args=[1]), ValueError, "optimizer_args are a dict"), (dict(optimizer_args={"betas": (2, 3)}), ValueError, "Correct its optimizer_args"),
    (dict(optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), weight_decay=0.3), ValueError, "weight_decay=0.3 is for an optimiser that is named"),
    (dict(optimizer=5), ValueError, "optimizer is one of"), (dict(lr_schedule=5), ValueError, "lr_schedule is None, one of"), (dict(learning_rates=None), ValueError, "no learning rate")])
def test_optimisers_asked_for_in_vain(dataset, tmp_path, options, error, words):
    with pytest.raises(error, match=words): make(dataset, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_goes_on_cannot_be_given_again(dataset, folder):
    for given in (dict(optimizer_args={"betas": (0.8, 0.9)}), dict(learning_rates=[1.0]), dict(seed=3)):
        with pytest.raises(ValueError, match=f"{next(iter(given))} goes on as it was in the run"): make(dataset, folder, resume=True, new_max_epochs=2, **given)


@pytest.mark.parametrize("options, words", [
    (dict(rnn_key=dict(key="gru", foo=1)), "gru takes no 'foo'. It takes bias"), (dict(rnn_key=dict(key="gru", batch_first=True)), "gru takes no 'batch_first'"),
    (dict(dg_args=dict(input_size=3)), "cosine-regression takes no 'input_size'"), (dict(dg_args=[1]), "dg_args is a dict"), (dict(rnn_layer_sizes=[NAN]), "a layer's size is a whole number")])
def test_options_of_models_asked_for_in_vain(dataset, options, words):
    with pytest.raises(ValueError, match=words): learner(dataset, **options)


def power(subset, subject, group, exponent=1.0): return subset.streamlines_of(subject, group).lengths_mm**exponent


def test_weights_by_a_partial_function_are_told_apart(dataset, tmp_path):
    half, double = (functools.partial(power, exponent=e) for e in (0.5, 2))
    make(dataset, tmp_path, line_weights=half).train_and_validate()
    assert read_checkpoint(tmp_path/"run").params["sampler"]["params"]["line_weights"] == f"{__name__}.power(exponent=0.5)"
    again = lambda weights: make(dataset, tmp_path, resume=True, new_max_epochs=2, line_weights=weights)
    again(half)
    with pytest.raises(DataProblem, match=r"another sampler.*power\(exponent=0.5\).*power\(exponent=2\)"): again(double)
    file = tmp_path/"run"/"checkpoint"/"params.json"                     # an earlier version kept no more than this
    file.write_text(file.read_text().replace(f"{__name__}.power(exponent=0.5)", "functools.partial"))
    again(half)


def test_a_subject_whose_weights_are_all_zero(dataset):
    sampler = DWIMLBatchIDSampler(dataset, "bundles", line_weights=lambda subset, subject, group: np.zeros(subset.nb_streamlines(group)[subject]))
    with pytest.raises(DataProblem, match="subject sub-0.*at least one weight above 0.*To do: give some of its lines a weight"): next(sampler.batches())


class Layers(MainModelAbstract):
    def __init__(self, nb_features, *widths, step_size=1.0):
        super().__init__(step_size=step_size)
        sizes = [nb_features, *widths, 3]
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))


class ByPlace(MainModelAbstract):
    def __init__(self, nb_features, /, width=4):
        super().__init__(step_size=1.0)
        self.layer = torch.nn.Linear(nb_features, width)


@pytest.mark.parametrize("model", [lambda: Layers(5, 4, 3, step_size=2.0), lambda: Layers(5), lambda: ByPlace(5, width=2)])
def test_models_with_arguments_by_place_load(tmp_path, model):
    model = model()
    model.save_params_and_state(tmp_path/"model")
    again = load_model(tmp_path/"model")
    assert again.params_for_checkpoint == model.params_for_checkpoint and again.step_size == model.step_size
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_cell_does_not_replace_what_the_library_registered():
    "Of the same name: refused, unless it does the same, as when a page of the library is run."
    ours = DIRECTION_GETTERS["cosine-regression"]
    def defined(body):
        names = {"__name__": "__main__", "DirectionGetter": DirectionGetter, "F": torch.nn.functional}
        exec(f"class CosineRegressionDG(DirectionGetter):\n    key = 'cosine-regression'\n    {body}", names)
        return names["CosineRegressionDG"]
    with pytest.raises(ValueError, match="the direction getter 'cosine-regression' is there already"): DIRECTION_GETTERS.register(obj=defined("def direction_terms(self, rows, dirs): return rows[:, 0]"))
    assert DIRECTION_GETTERS["cosine-regression"] is ours
    same = "def direction_terms(self, rows, dirs): return 1 - F.cosine_similarity(rows, dirs.data.to(rows.dtype), dim=1)"
    try: DIRECTION_GETTERS.register(obj=defined(same))
    finally: DIRECTION_GETTERS.entries["cosine-regression"] = ours


def test_a_registry_without_entries():
    with pytest.raises(ValueError, match="unknown thing 'a'. No thing has been registered. One of yours"): Registry("thing")["a"]
    with pytest.raises(TypeError, match="found 5. (No stop rule has been registered|It is one of)"): stop_rules_of(5)


# ---- the folder of a run is its trainer's

def while_training(dataset, folder, do):
    "What came of the training in whose first batch something was done to its folder; and what `do` returned."
    trainer, done = make(dataset, folder, resume=True, new_max_epochs=2), []
    trainer.control.on_batch_end.append(lambda row: done or done.append(do(folder/"run")))
    try: trainer.train_and_validate()
    except (DataProblem, RuntimeError) as e: return str(e), done[0]
    return trainer.control.state, done[0]


@pytest.mark.parametrize("look", [lambda run: shutil.copytree(run, run.parent/"copy"), lambda run: (run/".lock").read_bytes()], ids=["copied", "read"])
def test_a_folder_that_is_copied_stays_locked(dataset, folder, look):
    assert while_training(dataset, folder, lambda run: (look(run), locked_elsewhere(run))[1]) == ("ended", True)


def replaced(run): run.rename(run.parent/"away"); shutil.copytree(run.parent/"away", run)


@pytest.mark.parametrize("do", [lambda run: (run/".lock").unlink(), lambda run: run.rename(run.parent/"away"), replaced, shutil.rmtree], ids=["lock deleted", "moved", "replaced", "removed"])
def test_a_folder_that_was_taken_away_is_not_written_to(dataset, folder, do):
    told, _ = while_training(dataset, folder, do)
    assert "moved, removed or replaced while it was trained, or its .lock was deleted" in told
    if (folder/"run").exists(): assert place(folder) == (1, "training", 0)


def test_who_deletes_a_lock_to_train_is_the_one_that_trains(dataset, folder):
    def second(run):
        (run/".lock").unlink()
        make(dataset, folder, resume=True, new_max_epochs=3).train_and_validate()
    told, _ = while_training(dataset, folder, second)
    assert "was deleted" in told and place(folder) == (3, "training", 0)


def test_a_checkpoint_by_itself_is_a_short_run(dataset, folder, tmp_path):
    new = make(dataset, tmp_path, "new")
    new.save_checkpoint()
    assert place(tmp_path, "new") == (0, "training", 0)
    new.train_and_validate()
    stale, other = (make(dataset, folder, resume=True, new_max_epochs=3) for _ in range(2))
    told, _ = while_training(dataset, folder, lambda run: pytest.raises(RuntimeError, stale.save_checkpoint))
    assert told == "ended" and place(folder) == (2, "training", 0)
    with pytest.raises(DataProblem, match="another trainer has trained this experiment"): other.save_checkpoint()


@pytest.mark.parametrize("name", [".lock", "logs/epochs.jsonl", "logs/batches.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_in_an_experiment_is_not_waited_for(dataset, folder, name, kind):
    import os
    file = folder/"run"/name
    file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.mkdir()
    with pytest.raises(DataProblem, match=file.name): make(dataset, folder, resume=True, new_max_epochs=2).train_and_validate()
    assert file.exists()


# ---- records that somebody edited

def optimiser(change): return lambda state: state["optimizer"].update(change(state["optimizer"]))
def of_weights(change): return optimiser(lambda o: {"state": {k: change(v) for k, v in o["state"].items()}})
def options(**new): return optimiser(lambda o: {"param_groups": [{**g, **new} for g in o["param_groups"]]})


STATES = {
    "epoch": lambda s: s.update(epoch=-1), "epoch is": lambda s: s.update(epoch=True), "batch": lambda s: s.update(batch=-3), "batch is a number": lambda s: s.update(batch=10**9),
    "best_value": lambda s: s["monitor"].update(best_value=NAN), "best_epoch": lambda s: s["monitor"].update(best_epoch=99), "n_bad": lambda s: s["monitor"].update(n_bad=-1),
    "seconds": lambda s: s["spent"].update(seconds=NAN), "points": lambda s: s["spent"].update(points="many"), "KeyError: 'seconds'": lambda s: s.update(spent={}),
    "weight of": lambda s: s.update(sums={"training": {"loss": [NAN, NAN]}}),
    "exp_avg of the optimiser": of_weights(lambda v: {**v, "exp_avg": v["exp_avg"]*NAN}),
    "lr": options(lr=NAN), "betas": options(betas=(NAN, NAN)), "weight_decay": options(weight_decay="x"),
    "another optimiser": optimiser(lambda o: {"param_groups": [{k: v for k, v in g.items() if k != "betas"} for g in o["param_groups"]]}),
}


@pytest.mark.parametrize("words", STATES)
def test_states_that_cannot_be(dataset, folder, words):
    file = folder/"run"/"checkpoint"/"state.pt"
    state = torch.load(file, weights_only=True)
    STATES[words](state)
    torch.save(state, file)
    with pytest.raises(DataProblem, match=f"the state of the run cannot be used.*{words}"): make(dataset, folder, resume=True, new_max_epochs=2)


@pytest.mark.parametrize("value", [[], {}, {"bundles": None}, {"bundles": ["a"]}, "x"], ids=repr)
def test_fingerprints_that_are_none(dataset, folder, value):
    file = folder/"run"/"checkpoint"/"params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": value}))
    with pytest.raises(DataProblem, match="the fingerprint of the run's data cannot be read"): make(dataset, folder, resume=True, new_max_epochs=2)
    make(dataset, folder, resume=True, new_max_epochs=2, other_data=True)


@pytest.mark.parametrize("row", ["{}", '{"epoch": "x", "phase": "training", "batch": 0}', '{"epoch": null, "phase": [1], "batch": 3}'])
@pytest.mark.parametrize("name", ["epochs", "batches"])
def test_rows_that_are_none(dataset, folder, name, row):
    with open(folder/"run"/"logs"/f"{name}.jsonl", "a") as f: f.write(row + "\n")
    with pytest.raises(DataProblem, match=f"{name}.jsonl: a row of the log is not one of a training"): make(dataset, folder, resume=True, new_max_epochs=2).train_and_validate()


@pytest.mark.parametrize("name, value", [("nb_features", NAN), ("nb_features", "x"), ("nb_features", 1e30), ("rnn_key", []), ("rnn_layer_sizes", -1), ("dg_key", []), ("nb_previous_dirs", INF)])
def test_parameters_that_make_no_model(folder, name, value):
    file = folder/"run"/"best_model"/"parameters.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(DataProblem, match=r"parameters.json: (no model can be built with these arguments|there is no memory)"): load_model(folder/"run"/"best_model")
