"""The options of the loop, and control: what needs a folder alone, another process or a signal. The page 07_training/16_exactly tries each option."""
import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.control import send_control
from dwiml_nb.training.feed import Phase
from dwiml_nb.training.run import Experiment
from dwiml_nb.training.sinks import read_logs, read_rows
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

FORK = multiprocessing.get_context("fork")
TORCH = "torch.optim.lr_scheduler."
EVERYTHING = dict(accumulate=2, autocast="bf16", ema_decay=.9, clip_value=.05, on_nan={"key": "skip", "in_a_row": 3}, keep_last=2, keep_best=2,
                  monitor="grad_norm", monitor_mode="max", patience=9, frozen=["*bias_hh*"], param_groups={"*rnn*": {"lr": .005}}, optimizer="AdamW",
                  lr_schedule={"key": TORCH + "OneCycleLR", "max_lr": .05, "total_steps": 9})


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def make(dataset, folder, name="run", cls=DWIMLTrainerOneInput, resume=False, **options):
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], dropout=.1, step_size=2.)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=20, batch_size_validation=20)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    place = model, folder, name, sampler, loader
    if resume: return cls.init_from_checkpoint(*place, device="cpu", **options)
    few = dict(max_epochs=3, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, learning_rates=[.01])
    return cls(*place, device="cpu", **{**few, **options})


def after(trainer, nb, do):
    "Call a function once, after so many batches of this session."
    left = iter(range(nb - 1, -1, -1))
    trainer.control.on_batch_end.append(lambda row: next(left, 1) or do())
    return trainer


def same(a, b):
    "Equal to the last bit, whatever it is made of."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def assert_same(a, b):
    "Two experiments left the same: files of weights, state, logs apart from times."
    files = [{p.relative_to(o).as_posix(): torch.load(p) for p in sorted(o.rglob("*.pkl"))} for o in (a, b)]
    assert list(files[0]) == list(files[1]) and same(*files)
    states = [{k: v for k, v in read_checkpoint(o).state.items() if k != "spent"} for o in (a, b)]
    assert same(*states)
    for which in ("epochs", "batches"):
        assert same(*({k: v for k, v in read_logs(o, which).items() if "second" not in k} for o in (a, b))), which


# ---- options

def test_everything_from_the_folder_alone(dataset, study, tmp_path):
    "Stopped between two steps, and built again from its folder: what a checkpoint and a record say is enough."
    through = make(dataset, tmp_path, "through", **EVERYTHING)
    through.train_and_validate()
    first = make(dataset, tmp_path, "broken", **EVERYTHING)
    after(first, 5, first.control.stop).train_and_validate()
    assert (first.epoch, first.phase, first.batch) == (1, "training", 1) and read_checkpoint(first.experiment_folder).state["gathered"]["done"] == 1
    again = trainer_from_folder(tmp_path, "broken", device="cpu")
    assert {k: again.own_params[k] for k in EVERYTHING} == EVERYTHING
    again.train_and_validate()
    assert_same(through.experiment_folder, again.experiment_folder)
    assert [p.name for p in sorted((tmp_path/"broken"/"checkpoints").iterdir())] == ["epoch_0002", "epoch_0003"]
    assert len(list((tmp_path/"broken"/"best_models").iterdir())) == 2


def test_defaults_leave_no_trace(dataset, tmp_path):
    "A run without these options writes what it wrote before there were any."
    trainer = make(dataset, tmp_path, max_epochs=1)
    trainer.train_and_validate()
    assert list(read_checkpoint(trainer.experiment_folder).state) == ["optimizer", "epoch", "phase", "batch", "spent", "sums", "monitor", "torch_rng"]
    assert sorted(p.name for p in (trainer.experiment_folder/"logs").iterdir()) == ["batches.jsonl", "epochs.jsonl"]
    assert not set(trainer.own_params) & {"accumulate", "monitor", "frozen"} and "initialised" not in trainer.params


def test_the_mean_of_the_weights_is_the_best_model(dataset, tmp_path):
    "Validation and best_model use the mean, the checkpoint has both, and the weights are as without a mean."
    plain, mean = make(dataset, tmp_path, "plain", max_epochs=1), make(dataset, tmp_path, "mean", max_epochs=1, ema_decay=.5)
    plain.train_and_validate()
    mean.train_and_validate()
    weights = lambda trainer, place: torch.load(trainer.experiment_folder/place/"model_state.pkl")
    assert same(weights(plain, "checkpoint/model"), weights(mean, "checkpoint/model"))
    kept, best = read_checkpoint(mean.experiment_folder).state["average"]["mean"], weights(mean, "best_model")
    assert all(torch.equal(best[k], kept[k]) for k in kept) and not same(best, weights(plain, "best_model"))
    assert read_logs(plain.experiment_folder)["valid_loss"] != read_logs(mean.experiment_folder)["valid_loss"]


def test_a_value_that_is_not_there_each_epoch(dataset, tmp_path):
    "A phase that comes every other epoch may judge: the others count neither as good nor as bad."
    class Rare(DWIMLTrainerOneInput):
        def make_phases(self):
            look = lambda epoch: epoch % 2 and self.go_through("look", epoch, lambda batch: (torch.tensor(1.), 1, {"x": 10. - epoch}))
            return [*super().make_phases(), Phase("look", "validation", look, nb_batches=1)]
    trainer = make(dataset, tmp_path, cls=Rare, monitor="look_x", monitor_mode="max", patience=1, max_epochs=9)
    trainer.train_and_validate()
    log = read_logs(trainer.experiment_folder)
    assert log["is_best"] == [False, True, False, False] and log["best_value"] == [None, 9., 9., 9.]
    wrong = make(dataset, tmp_path, "wrong", monitor="valid_los")
    with pytest.raises(DataProblem, match="Did you mean 'valid_loss'"): wrong.train_and_validate()


@pytest.mark.parametrize("options, told", [
    (dict(clip_grad=1., clip_value=1.), "give one of them"), (dict(accumulate=0), "accumulate is a whole number >= 1"), (dict(autocast="fp16"), "'bf16' or None"),
    (dict(ema_decay=1.), "ema_decay is a number"), (dict(on_nan="skp"), "Did you mean 'skip'"), (dict(max_hours=0), "max_hours is a number > 0"),
    (dict(monitor_mode="high"), "monitor_mode is 'min'"), (dict(keep_last=0), "keep_last is a whole number"), (dict(init_weights="/nowhere"), "no weights to begin with"),
    (dict(init_match="x"), "init_weights, which is not given"), (dict(frozen="*"), "nothing to train"), (dict(frozen="rn"), "frozen: no weight is called 'rn'"),
    (dict(param_groups={"x": {}}), "no weight is left for 'x'"), (dict(param_groups={"*": {"lrr": 1}}), "Did you mean 'lr'"),
    (dict(lr_schedule={"key": "plateau", "factr": .1}), "Did you mean 'factor'"), (dict(lr_schedule={"key": TORCH + "os"}), "no scheduler"),
    (dict(lr_schedule={"key": "os.system", "command": "touch x"}), "lr_schedule is None, one of"), (dict(lr_schedule=TORCH + "LRScheduler"), "no scheduler"),
])
def test_refused(dataset, tmp_path, options, told):
    "In a sentence, before a folder is made."
    with pytest.raises((ValueError, DataProblem), match=told): make(dataset, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_files_say_is_judged(dataset, tmp_path):
    "A record or a checkpoint that was tampered with names no function and brings no number that cannot be."
    trainer = make(dataset, tmp_path, ema_decay=.5)
    after(trainer, 2, trainer.control.stop).train_and_validate()
    params, state = trainer.experiment_folder/"checkpoint"/"params.json", trainer.experiment_folder/"checkpoint"/"state.pt"
    was, kept = params.read_text(), torch.load(state)
    for given in ("os.system", {"key": "builtins.print"}, {"key": TORCH + "os.system"}):
        record = json.loads(was)
        record["trainer"]["params"]["lr_schedule"] = given
        params.write_text(json.dumps(record))
        with pytest.raises(DataProblem, match="is not known here"): make(dataset, tmp_path, resume=True)
    params.write_text(was)
    for wrong in ({"average": {"t": 1, "mean": {}}}, {"average": {}}, {"rates": {"changed": [float("nan"), 1.]}}, {"skips": {"in_a_row": -1}}):
        torch.save({**kept, **wrong}, state)
        with pytest.raises(DataProblem, match="the state of the run cannot be used"): make(dataset, tmp_path, resume=True)


def test_back_to_an_earlier_epoch(dataset, tmp_path):
    "A checkpoint that was kept takes the place of the last one, and the run goes on from there."
    through = make(dataset, tmp_path, "through")
    through.train_and_validate()
    kept = make(dataset, tmp_path, "kept", keep_last=3)
    kept.train_and_validate()
    (kept.experiment_folder/"checkpoint").rename(tmp_path/"away")
    (kept.experiment_folder/"checkpoints"/"epoch_0001").rename(kept.experiment_folder/"checkpoint")
    again = make(dataset, tmp_path, "kept", resume=True)
    assert again.epoch == 1
    again.train_and_validate()
    assert same(dict(through.model.state_dict()), dict(again.model.state_dict()))


# ---- control

def test_time_is_up(dataset, tmp_path):
    "The run stops by itself, with a checkpoint, and a later session has its hours again."
    trainer = make(dataset, tmp_path, max_hours=1.5/3600, max_epochs=100)
    trainer.control.on_batch_end.append(lambda row: time.sleep(.05))
    trainer.train_and_validate()
    assert trainer.control.state == "stopped" and 0 < trainer.control.done < 300
    row = read_rows(trainer.experiment_folder/"logs"/"control.jsonl")[-1]
    assert row["do"] == "stop" and row["by"] == "max_hours" and row["batch"] == trainer.batch
    again = make(dataset, tmp_path, resume=True, max_hours=2)
    assert again.loop.max_hours == 2 and again.own_params["max_hours"] == 2


def in_a_process(dataset, folder, slow=.03, **options):
    "A training in another process, once it has begun."
    def run():
        torch.set_num_threads(1)
        trainer = make(dataset, folder, **options)
        trainer.control.on_batch_end.append(lambda row: time.sleep(slow))
        trainer.train_and_validate()
        os._exit(0)
    process = FORK.Process(target=run)
    process.start()
    wait_for(lambda: len(read_rows(folder/"run"/"logs"/"batches.jsonl")) > 0)
    return process


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(.01)


def test_orders_from_another_process(dataset, tmp_path):
    "Paused, slowed down, saved and stopped by a file; the same orders at the same batches give the same run."
    process = in_a_process(dataset, tmp_path, max_epochs=1000)
    run, rows = tmp_path/"run", lambda: len(read_rows(tmp_path/"run"/"logs"/"batches.jsonl"))
    done = lambda do: any(row["do"] == do for row in read_rows(run/"logs"/"control.jsonl"))
    send_control(run, "pause")
    wait_for(lambda: done("pause"))
    before = rows()
    send_control(run, "set_learning_rate", rate=.002)
    wait_for(lambda: done("set_learning_rate"))
    assert rows() == before
    send_control(run, "checkpoint_now")
    send_control(run, "resume")
    wait_for(lambda: rows() > before)
    send_control(run, "stop", after="epoch")
    process.join(30)
    assert process.exitcode == 0
    with pytest.raises(DataProblem, match="nobody is training"): send_control(run, "stop")
    orders = read_rows(run/"logs"/"control.jsonl")
    assert [row["do"] for row in orders] == ["pause", "set_learning_rate", "checkpoint_now", "resume", "stop"] and orders[0]["by"] == "file"
    state = read_checkpoint(run).state
    assert state["phase"] == "training" and state["batch"] == 0 and state["epoch"] == orders[-1]["epoch"] + 1

    change = orders[1]
    through = make(dataset, tmp_path, "through", max_epochs=1000)
    per_epoch = {"training": 0, "validation": 3}
    nb = change["epoch"]*4 + per_epoch[change["phase"]] + change["batch"]
    after(through, nb, lambda: through.control.set_learning_rate(.002))
    through.control.on_epoch_end.append(lambda row: row["epoch"] + 1 == state["epoch"] and through.control.stop())
    through.train_and_validate()
    assert_same(through.experiment_folder, run)


def test_sigusr1(dataset, tmp_path):
    "The signal of a scheduler: a checkpoint, then the end that the signal brings."
    process = in_a_process(dataset, tmp_path, max_epochs=1000, slow=.01)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(30)
    assert process.exitcode == -signal.SIGUSR1
    row = read_rows(tmp_path/"run"/"logs"/"control.jsonl")[-1]
    assert (row["do"], row["by"]) == ("stop", "SIGUSR1")
    state = read_checkpoint(tmp_path/"run").state
    assert [state[k] for k in ("epoch", "phase", "batch")] == [row[k] for k in ("epoch", "phase", "batch")]


def test_a_bad_control_file(dataset, tmp_path):
    "Lines that make no sense are told, with nothing of theirs reaching the terminal as it is; the run goes on."
    trainer = make(dataset, tmp_path, max_epochs=1)
    lines = ['{"do": "\\u001b[2J"}', "[1]", "not json", '{"do": "set_learning_rate", "rate": "NaN"}', '{"do": "stop", "x": 1}', "\udcff"*5]
    def scribble():
        with open(trainer.control.file, "ab") as f: f.write("\n".join(lines).encode(errors="surrogateescape") + b"\n")
    after(trainer, 1, scribble)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train_and_validate()
    told = [str(o.message) for o in told if "a line was left out" in str(o.message)]
    assert len(told) == len(lines) and not any("\x1b" in o for o in told) and trainer.control.state == "ended"
    assert not (trainer.experiment_folder/"logs"/"control.jsonl").exists()


def test_two_trainers_of_one_process(dataset, tmp_path):
    "An order reaches the experiment that it names, also from a thread of the same process."
    trainer = make(dataset, tmp_path, max_epochs=50)
    after(trainer, 2, lambda: send_control(trainer.experiment_folder, "stop")).train_and_validate()
    assert trainer.control.done == 2 and Experiment(tmp_path, "run").folder == Path(tmp_path/"run")
