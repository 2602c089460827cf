"""What is added to a training from outside: values for the logs, sinks, optimisers, schedules. By name it all resumes from the folder alone."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.means import Logged
from dwiml_nb.training.sinks import SINKS, Sink, read_logs, row_position
from dwiml_nb.training.trainer import DWIMLTrainerOneInput


class Telling(Learn2TrackModel):
    "Also tells how long its outputs are, and the longest of each batch."
    def compute_loss(self, outputs, target_streamlines, **kwargs):
        loss, n = super().compute_loss(outputs, target_streamlines, **kwargs)
        lengths = outputs.data.norm(dim=1)
        return loss, n, {"length": lengths.mean(), "longest": Logged(lengths.max(), how="last"), "batches": Logged(1, weight=1)}


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def make(dataset, folder, name="run", cls=DWIMLTrainerOneInput, model=Learn2TrackModel, resume=False, **kwargs):
    torch.manual_seed(0)
    model = model(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], dropout=0.1, step_size=2.0)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40, batch_size_validation=40)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    options = {} if resume else dict(max_epochs=2, max_batches_per_epoch_training=4, max_batches_per_epoch_validation=2)
    return (cls.init_from_checkpoint if resume else cls)(model, folder, name, sampler, loader, **{**options, "device": "cpu", **kwargs})


def stop_after(trainer, nb):
    seen = []
    trainer.control.on_batch_end.append(lambda row: seen.append(row) or (len(seen) == nb and trainer.control.request_stop()))
    return trainer


def rows_of(trainer, which):
    "The rows as they are on disk, times apart."
    rows = [json.loads(line) for line in (trainer.experiment_folder / "logs" / f"{which}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "points_per_second", "waiting_seconds")} for row in rows]


# ---- values

def test_values_of_compute_loss(dataset, tmp_path):
    "They land in the rows of batches and epochs, with the means they asked for, and change nothing else."
    plain, telling = make(dataset, tmp_path, "plain"), make(dataset, tmp_path, "telling", model=Telling)
    plain.train_and_validate()
    telling.train_and_validate()
    own = ("length", "longest", "batches")
    names = [*own, *(f"valid_{name}" for name in own)]
    for which in ("batches", "epochs"):
        a, b = rows_of(plain, which), rows_of(telling, which)
        assert [list(row.items()) for row in a] == [[(k, v) for k, v in row.items() if k not in names] for row in b]
    batches, epochs = rows_of(telling, "batches"), rows_of(telling, "epochs")
    assert list(batches[0]) == ["phase", "epoch", "batch", "loss", "n", "grad_norm", "learning_rate", *own]
    assert list(epochs[0]) == ["epoch", "train_loss", "valid_loss", "grad_norm", "learning_rate", "nb_batches", "n", *names, "is_best", "best_epoch", "best_loss"]
    for epoch in epochs:
        for phase, prefix in (("training", ""), ("validation", "valid_")):
            rows = [row for row in batches if (row["phase"], row["epoch"]) == (phase, epoch["epoch"])]
            mean = sum(row["length"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
            assert epoch[f"{prefix}length"] == pytest.approx(mean, rel=1e-12)
            assert epoch[f"{prefix}longest"] == rows[-1]["longest"] and epoch[f"{prefix}batches"] == 1


def test_values_survive_a_stop(dataset, tmp_path):
    through = make(dataset, tmp_path, "through", model=Telling)
    through.train_and_validate()
    for i, nb in enumerate((2, 5)):
        stop_after(make(dataset, tmp_path, f"stopped{i}", model=Telling), nb).train_and_validate()
        on = make(dataset, tmp_path, f"stopped{i}", model=Telling, resume=True)
        on.train_and_validate()
        for which in ("batches", "epochs"): assert rows_of(on, which) == rows_of(through, which)


def with_values(values):
    class Trainer(DWIMLTrainerOneInput):
        def run_one_batch(self, batch): return *super().run_one_batch(batch)[:2], values
    return Trainer


@pytest.mark.parametrize("values, error, words", [
    ({"n": 3}, ValueError, "the logs have a column 'n' already"), ({"valid_loss": 3}, ValueError, "column 'valid_loss'"),
    ({"errors": torch.ones(3)}, TypeError, "'errors' of a batch must be one number"), ({"word": "abc"}, TypeError, "'word' of a batch"),
    ([1, 2], TypeError, "with values by name")])
def test_values_that_cannot_be_kept(dataset, tmp_path, values, error, words):
    with pytest.raises(error, match=words): make(dataset, tmp_path, cls=with_values(values)).train_and_validate()


def test_values_that_are_not_finite_are_logged(dataset, tmp_path):
    trainer = make(dataset, tmp_path, cls=with_values({"ratio": torch.tensor(torch.inf)}))
    trainer.train_and_validate()
    assert read_logs(trainer.experiment_folder)["ratio"] == [float("inf")] * 2


def test_a_loss_alone_is_not_enough_for_a_step(dataset, tmp_path):
    class Trainer(DWIMLTrainerOneInput):
        def run_one_batch(self, batch): return super().run_one_batch(batch)[0]
    with pytest.raises(TypeError, match=r"comes as \(loss, n\) or \(loss, n, values\), found a Tensor"): make(dataset, tmp_path, cls=Trainer).train_and_validate()


# ---- sinks

@SINKS.register("diary")
class Diary(Sink):
    "Keeps what it gets, and forgets what it is told to."
    latest = None
    def __init__(self):
        Diary.latest = self
        self.calls, self.rows, self.epochs = [], [], []

    def begin(self, record):
        self.calls.append("begin")
        self.record = record

    def rewind(self, place):
        self.calls.append("rewind")
        self.rows = [row for row in self.rows if row_position(row) < place]
        self.epochs = [row for row in self.epochs if row["epoch"] < place[0]]

    def batch(self, row):
        self.calls.append("batch")
        self.rows.append(row)

    def epoch(self, row):
        self.calls.append("epoch")
        self.epochs.append(row)

    def close(self): self.calls.append("close")


def test_a_sink_hears_it_all(dataset, tmp_path):
    trainer = make(dataset, tmp_path, sinks=["diary"])
    diary = Diary.latest
    trainer.train_and_validate()
    assert diary.calls == ["begin", "rewind", *(["batch"] * 6 + ["epoch"]) * 2, "close"]
    record = json.loads((trainer.experiment_folder / "parameters_latest.json").read_text())
    assert diary.record == {**record, "experiment_folder": str(tmp_path / "run")} and record["trainer"]["params"]["sinks"] == ["diary"]
    assert [r["loss"] for r in diary.rows] == read_logs(trainer.experiment_folder, "batches")["loss"]


def test_a_sink_is_rewound_after_a_failure(dataset, tmp_path):
    "Rows after the last checkpoint come again: a sink that forgets them has each row once, in order."
    class FailsOnce(DWIMLTrainerOneInput):
        failed = False
        def run_one_batch(self, batch):
            if (self.epoch, self.batch, self.failed) == (1, 3, False):
                self.failed = True
                raise MemoryError("once")
            return super().run_one_batch(batch)
    diary = Diary()
    trainer = make(dataset, tmp_path, cls=FailsOnce, sinks=[diary])
    with pytest.raises(MemoryError): trainer.train_and_validate()
    assert len(diary.rows) == 9 and diary.calls[-1] == "close"
    trainer.train_and_validate()
    assert [row_position(row) for row in diary.rows] == sorted({row_position(row) for row in diary.rows}) and len(diary.rows) == 12
    assert [{k: v for k, v in row.items() if k not in ("seconds", "points_per_second", "waiting_seconds")} for row in diary.rows] == rows_of(trainer, "batches")


@pytest.mark.parametrize("when", ["begin", "rewind", "batch", "epoch", "close"])
def test_a_sink_that_fails_is_dropped(dataset, tmp_path, when):
    def fail(self, *news): raise OSError("the server is gone")
    faulty, diary = type("Faulty", (Sink,), {when: fail})(), Diary()
    trainer = make(dataset, tmp_path, sinks=[faulty, diary])
    with pytest.warns(UserWarning, match=f"the sink Faulty raised OSError in {when}: the server is gone") as told: trainer.train_and_validate()
    assert len([w for w in told if "Faulty" in str(w.message)]) == 1 and trainer.sinks.others == [diary] and len(diary.rows) == 12
    assert trainer.control.state == "ended"


def test_logs_that_fail_end_the_training(dataset, tmp_path, monkeypatch):
    trainer = make(dataset, tmp_path)
    def fail(row): raise OSError(28, "No space left on device")
    monkeypatch.setattr(trainer.sinks.logs, "batch", fail)
    with pytest.raises(OSError, match="No space left"): trainer.train_and_validate()
    assert trainer.control.state == "failed"


def test_sinks_of_a_run_that_goes_on(dataset, tmp_path):
    stop_after(make(dataset, tmp_path, sinks=["diary", Diary()]), 3).train_and_validate()
    with pytest.warns(UserWarning, match="sent its rows to <test_training_parts.Diary> too, which was an object"): on = trainer_from_folder(tmp_path, "run", device="cpu")
    assert [type(sink) for sink in on.sinks.others] == [Diary]
    on.train_and_validate()
    assert [row_position(row) for row in on.sinks.others[0].rows][0] == (0, 0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(dataset, tmp_path, "named", sinks=[Diary()]).train_and_validate()
        on = make(dataset, tmp_path, "named", resume=True, new_max_epochs=3, sinks=[])
    assert not on.sinks.others


def test_sinks_that_are_none(dataset, tmp_path):
    with pytest.raises(ValueError, match="unknown sink 'dairy'.*Did you mean 'diary'"): make(dataset, tmp_path, sinks=["dairy"])
    with pytest.raises(TypeError, match="a sink is made from a child of Sink, or named"): make(dataset, tmp_path, sinks=[Diary])
    assert not list(tmp_path.iterdir())


# ---- optimisers and schedules

def test_nothing_new_is_recorded_unasked(dataset, tmp_path):
    assert list(make(dataset, tmp_path).own_params) == [
        "learning_rates", "lr_schedule", "optimizer", "weight_decay", "max_epochs", "max_batches_per_epoch_training",
        "max_batches_per_epoch_validation", "patience", "patience_delta", "clip_grad", "nb_cpu_processes", "seed"]


OPTIMISERS = {"SGD": dict(optimizer="SGD", optimizer_args={"momentum": 0.9, "nesterov": True}), "of torch": dict(optimizer="Adagrad", optimizer_args={"lr_decay": 0.1}),
              "tuple": dict(optimizer="Adam", optimizer_args={"betas": (0.8, 0.99)})}


@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS)
def test_arguments_of_an_optimiser(dataset, tmp_path, options):
    "They are used, and they resume from the folder alone, to the last bit."
    through = make(dataset, tmp_path, "through", lr_schedule="cosine", **options)
    for name, value in options["optimizer_args"].items(): assert through.optimizer.param_groups[0][name] == value
    through.train_and_validate()
    stop_after(make(dataset, tmp_path, "stopped", lr_schedule="cosine", **options), 3).train_and_validate()
    on = trainer_from_folder(tmp_path, "stopped", device="cpu")
    on.train_and_validate()
    for p, q in zip(on.model.parameters(), through.model.parameters()): assert torch.equal(p, q)
    assert rows_of(on, "batches") == rows_of(through, "batches")


@pytest.mark.parametrize("options, words", [
    (dict(optimizer="SGD", optimizer_args={"momentun": 0.9}), "SGD has no argument 'momentun'. Its optimizer_args are momentum.*Did you mean 'momentum'"),
    (dict(optimizer="SGD", optimizer_args={"momentum": -1}), "Invalid momentum"), (dict(optimizer_args={"lr": 1}), "which the trainer gives"),
    (dict(optimizer="Adm"), "Did you mean 'Adam'"), (dict(optimizer="Rprop"), "Rprop has no weight_decay, found 0.01"), (dict(lr_schedule="cosin"), "Did you mean 'cosine'"),
    (dict(optimizer=lambda ps: torch.optim.SGD(ps, lr=1), optimizer_args={"momentum": 0.9}), "a function has its own")])
def test_optimisers_that_cannot_be(dataset, tmp_path, options, words):
    with pytest.raises(ValueError, match=words): make(dataset, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_optimiser_from_a_function(dataset, tmp_path):
    "Groups keep their rates in proportion; whoever resumes gives the function again."
    def mine(parameters): return torch.optim.SGD([{"params": parameters[:2], "lr": 0.2}, {"params": parameters[2:]}], lr=0.02, momentum=0.9)
    options = dict(optimizer=mine, lr_schedule="cosine", learning_rates=[1e-3, 1e-4])
    through = make(dataset, tmp_path, "through", **options)
    through.train_and_validate()
    rates = read_logs(through.experiment_folder, "batches")["learning_rate"]
    assert rates[0] == pytest.approx(0.2) and rates[6] == pytest.approx(0.2 * 0.1 * 0.5)
    assert [group["lr"] for group in through.optimizer.param_groups][1] == pytest.approx(rates[9] / 10)
    stop_after(make(dataset, tmp_path, "stopped", **options), 3).train_and_validate()
    for again in (dict(), dict(lr_schedule="cosine")):
        with pytest.raises(ValueError, match=r"the run's optimizer was a function, <function.*mine.*optimizer=…"): make(dataset, tmp_path, "stopped", resume=True, **again)
    on = make(dataset, tmp_path, "stopped", resume=True, optimizer=mine)
    on.train_and_validate()
    for p, q in zip(on.model.parameters(), through.model.parameters()): assert torch.equal(p, q)
    make(dataset, tmp_path, "named").train_and_validate()
    with pytest.raises(ValueError, match="the run's optimizer is 'Adam', and its state goes on"): make(dataset, tmp_path, "named", resume=True, new_max_epochs=3, optimizer="SGD")


OUTSIDE = '''
import torch
from dwiml_nb.training.optimizers import OPTIMIZERS
from dwiml_nb.training.schedules import SCHEDULES
from dwiml_nb.training.sinks import SINKS, Sink

@OPTIMIZERS.register("signs")
class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, shrink=0.0): super().__init__(params, dict(lr=lr, shrink=shrink))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None: p.mul_(1 - group["shrink"]).sub_(group["lr"]*p.grad.sign())

@SCHEDULES.register("stairs")
def stairs(iteration, total): return 0.5**(4*iteration//total)

@SINKS.register("counter")
class Counter(Sink):
    def begin(self, record): self.file = record["experiment_folder"] + "/count.txt"
    def batch(self, row):
        with open(self.file, "a") as f: f.write(".")
'''
TRAIN = """
import sys
import torch
import {module}
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
study, folder = sys.argv[1:]
dataset = MultiSubjectDataset(study).load_data()
for name, stop in (("through", None), ("stopped", 3)):
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], step_size=2.0)
    trainer = DWIMLTrainerOneInput(model, folder, name, DWIMLBatchIDSampler(dataset, "bundles", 40), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles"),
                                   optimizer="signs", optimizer_args=dict(shrink=1e-4), weight_decay=0, lr_schedule="stairs", sinks=["counter"], max_epochs=2,
                                   max_batches_per_epoch_training=4, max_batches_per_epoch_validation=2, device="cpu")
    trainer.control.on_batch_end.append(lambda row: row["batch"] + 1 == stop and trainer.control.request_stop())
    trainer.train_and_validate()
"""


def test_from_a_file_of_ones_own(study, tmp_path):
    "Optimiser, schedule and sink by name; gone on with from the command line, which must be told to trust the file."
    (tmp_path / "outside_parts.py").write_text(OUTSIDE)
    (tmp_path / "train.py").write_text(TRAIN.format(module="outside_parts"))
    (tmp_path / "resume.py").write_text("from dwiml_nb.cli.training import *\ndwiml_resume_training_from_checkpoint()")
    run = lambda *args: subprocess.run([sys.executable, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
    made = run("train.py", study, tmp_path / "runs")
    assert made.returncode == 0, made.stderr
    resume = ("resume.py", tmp_path / "runs", "stopped", "--device", "cpu")
    refused = run(*resume)
    assert refused.returncode == 1 and "the run's lr_schedule 'stairs' is not known here" in refused.stderr and "--trust" in refused.stderr and "Traceback" not in refused.stderr
    went_on = run(*resume, "--trust", "outside_parts.py")
    assert went_on.returncode == 0, went_on.stderr
    weights = [torch.load(Path(tmp_path, "runs", name, "checkpoint", "model", "model_state.pkl"), weights_only=True) for name in ("through", "stopped")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert read_logs(tmp_path / "runs" / "stopped", "batches")["learning_rate"] == read_logs(tmp_path / "runs" / "through", "batches")["learning_rate"]
    assert [len((tmp_path / "runs" / name / "count.txt").read_text()) for name in ("through", "stopped")] == [12, 12]
    assert read_checkpoint(tmp_path / "runs" / "stopped").params["trainer"]["params"]["optimizer"] == "signs"


def test_values_that_would_share_a_column(dataset, tmp_path):
    class Clash(Learn2TrackModel):
        def compute_loss(self, outputs, target_streamlines, **kwargs):
            return *super().compute_loss(outputs, target_streamlines, **kwargs), {"x": 1.0, "valid_x": 5.0}
    with pytest.raises(ValueError, match="'valid_x' of the phase 'training' would share a column with the phase 'validation'"):
        make(dataset, tmp_path, model=Clash).train_and_validate()


def test_a_value_summed_up_in_another_way():
    with pytest.raises(ValueError, match="found how='max'"): Logged(1.0, how="max")


def test_one_sink_without_a_list(dataset, tmp_path):
    class Heard(Sink):
        rows = ()
        def epoch(self, row): self.rows = [*self.rows, row]
    sink = Heard()
    trainer = make(dataset, tmp_path, sinks=sink)
    trainer.train_and_validate()
    assert len(sink.rows) == 2 and trainer.given_sinks == [sink]
    with pytest.raises(ValueError, match="unknown sink 'herd'"): make(dataset, tmp_path, "other", sinks="herd")


def test_another_optimiser_does_not_take_over(dataset, tmp_path):
    "The state of an optimiser that was named is not handed to a function's."
    stop_after(make(dataset, tmp_path), 2).train_and_validate()
    function = lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9)
    with pytest.raises(ValueError, match="the run's optimizer is 'Adam', and its state goes on"): make(dataset, tmp_path, resume=True, optimizer=function)


def test_an_object_that_looks_like_a_name(dataset, tmp_path):
    class Half:
        def __repr__(self): return "half"
        def __call__(self, iteration): return 0.5
    stop_after(make(dataset, tmp_path, lr_schedule=Half()), 2).train_and_validate()
    with pytest.raises(ValueError, match="lr_schedule was a function, <half>. Give it again"): make(dataset, tmp_path, resume=True)
    make(dataset, tmp_path, resume=True, lr_schedule=Half()).train_and_validate()
