"""Registered models: the contract, and each thing that Hyrax's own code does otherwise."""
import ast
import copy
import json
import multiprocessing
import os
import random
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bands import Bands
from test_loggers import KEYS, OWN, READERS, check_same_numbers

from dwiml_nb.core.config import Config
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import seed_all
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.checks import check_model
from dwiml_nb.models.items import COLLATE_FUNCTIONS, ITEM_DATASETS, RegisteredBatchLoader
from dwiml_nb.models.registered import REGISTERED_MODELS, build, dwiml_model, registered_model
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import train, write_run_file
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.tractograms import load_tractogram, save_tractogram
from dwiml_nb.study.create import create_study
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.registered import RegisteredTrainer, trace_model
from dwiml_nb.training.sinks import Sink, read_logs, read_rows
from dwiml_nb.widgets.training_dashboard import TrainingDashboard

GROUPS = dict(streamline_group_name="bundles", input_group_name="input")
CONFIG = {"model": {"Bands": {"classes": 3}}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    made = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study")))
    made.load_data()
    return made


@pytest.fixture
def make(dataset, tmp_path):
    "A trainer of a registered class, new or going on."
    def made(cls=Bands, name="run", config=CONFIG, loader=None, resume=False, groups=GROUPS, batch_size=40, **options):
        loader = loader or {}
        torch.manual_seed(1)
        model = registered_model(cls, config, dataset, **groups, **loader)
        sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=batch_size, batch_size_validation=batch_size)
        parts = model, tmp_path, name, sampler, RegisteredBatchLoader(dataset, model, **groups, **loader)
        if resume: return RegisteredTrainer.init_from_checkpoint(*parts, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no validate_step.*")
            return RegisteredTrainer(*parts, **{"max_epochs": 2, **options})
    return made


def weights(trainer): return [p.detach().clone() for p in trainer.model.parameters()]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_class_of_the_issue_runs_as_it_stands(make):
    trainer = make()
    before = weights(trainer)
    trainer.train_and_validate()
    assert not same(before, weights(trainer))
    assert isinstance(trainer.optimizer, torch.optim.SGD) and isinstance(trainer.model.net.criterion, torch.nn.CrossEntropyLoss)
    epochs, batches = (read_logs(trainer.experiment_folder, k) for k in ("epochs", "batches"))
    assert epochs["norm"][0] > 0 and len(batches["norm"]) == len(batches["loss"]) > 2


def test_it_tracks_with_an_infer_step_that_gives_directions(make, dataset):
    class Along(Bands):
        nb_previous_dirs = 1
        @staticmethod
        def to_tensor(data_dict):
            along = [np.array([0., 0., 1.]) if len(v) < 2 else v[-1] - v[-2] for v in data_dict["data"]["bundles"]]
            return np.c_[np.stack(along), np.stack([np.asarray(v).mean(0) for v in data_dict["data"]["input"]])]
        def infer_step(self, batch): return batch[:, :3] + 0*self(batch)[:, :1]
    trainer = make(dwiml_model(Along))
    trainer.train_and_validate()
    model = load_model(trainer.experiment_folder / "best_model")
    subject = dataset.training.subjects[0]
    tracker = Tracker(model, dataset, subject, "input", step_mm=1., min_length_mm=0, max_length_mm=20)
    seed = np.array([[0., 0., 0.]]) + tracker.grid.affine[:3, :3] @ (np.array(tracker.grid.dimensions)/2) + tracker.grid.affine[:3, 3]
    lines = tracker.track(seed, quiet=True).lines
    assert len(lines) == 1 and len(lines.data) in (9, 10)
    assert torch.allclose((lines.data[1:] - lines.data[:-1]).norm(dim=1), torch.ones(len(lines.data) - 1, dtype=lines.data.dtype), atol=1e-3)


def test_aliases_and_optional_steps(make):
    @dwiml_model
    class Other(Bands):
        def train_batch(self, batch): return {**Bands.train_step(self, batch), "extra": torch.tensor([1., 3.])}
        def validate_batch(self, batch): return {"loss": (self(batch)**2).mean(), "spread": self(batch).std()}
        def infer_batch(self, batch): return self(batch)*2
        @staticmethod
        def prepare_inputs(data_dict): return Bands.to_tensor(data_dict)[:, :5]
    trainer = make(Other)
    assert trainer.model.net.layer.in_features == 5
    trainer.train_and_validate()
    epochs = read_logs(trainer.experiment_folder)
    assert epochs["extra"] == [2., 2.] and epochs["valid_spread"][0] > 0 and "valid_norm" not in epochs
    ones = torch.ones(2, 5)
    assert torch.equal(trainer.model.infer(ones), 2*trainer.model.net(ones))


def test_save_and_load_of_the_class(make):
    @dwiml_model
    class Keeps(Bands):
        def save(self, path): path.write_text(f"{self.counted}")
        def load(self, path): self.counted = int(path.read_text())
        counted = 0
        def train_step(self, batch):
            self.counted += 1
            return super().train_step(batch)
    trainer = make(Keeps, max_epochs=1)
    trainer.train_and_validate()
    assert load_model(trainer.experiment_folder / "best_model").net.counted == trainer.model.net.counted > 0
    assert trainer_from_folder(trainer.experiments_path, "run", new_max_epochs=2).model.net.counted == trainer.model.net.counted


def test_several_datasets_and_collate_functions(make, dataset):
    class Ages:
        def __getitem__(self, object_id): return {"age": np.array([30.]), "of": np.arange(3.)}
        @staticmethod
        def collate_fn(items): return {"together": np.stack([item["of"] for item in items])}
    ITEM_DATASETS.entries.pop("ages", None)
    ITEM_DATASETS.register("ages", Ages)
    seen = []
    @dwiml_model
    class Both(Bands):
        @staticmethod
        def to_tensor(data_dict):
            seen.append(data_dict)
            lengths, of = data_dict["data"]["input_lengths"], data_dict["people"]["together"]
            return data_dict["data"]["input"].sum(1)/lengths[:, None] + of.sum(1, keepdims=True)
    trainer = make(Both, loader=dict(collate_fn="pad", datasets={"people": "ages"}))
    trainer.train_and_validate()
    last = seen[-1]
    n = len(last["object_id"])
    assert set(last) == {"data", "people", "object_id"} and list(last["people"]) == ["together"] and last["people"]["together"].shape == (n, 3)
    assert last["data"]["input"].ndim == 3 and last["object_id"][0].partition("/")[0] in dataset.training.subjects
    assert trainer_from_folder(trainer.experiments_path, "run", new_max_epochs=3).batch_loader.params == trainer.batch_loader.params


class Padding(MultiSubjectDataset):
    @staticmethod
    def collate_fn(items): return COLLATE_FUNCTIONS["pad"](items)


@pytest.mark.parametrize("whose", ["dataset", "class", "function"])
def test_a_collate_function_on_the_dataset_is_kept_or_refused(dataset, tmp_path, whose):
    @dwiml_model
    class Padded(Bands):
        @staticmethod
        def to_tensor(data_dict): return data_dict["data"]["input"].sum(1)/data_dict["data"]["input_lengths"][:, None]
    study = (Padding if whose == "class" else MultiSubjectDataset)(dataset.path).load_data()
    pad = COLLATE_FUNCTIONS["pad"]
    if whose != "class": study.collate_fn = pad if whose == "dataset" else lambda items: pad(items)
    def trainer(name):
        seed_all(1234)
        model = registered_model(Padded, CONFIG, study, **GROUPS)
        sampler, loader = DWIMLBatchIDSampler(study, "bundles", batch_size_training=40, batch_size_validation=40), RegisteredBatchLoader(study, model, **GROUPS)
        return RegisteredTrainer(model, tmp_path, name, sampler, loader, max_epochs=2, max_batches_per_epoch_training=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole, part = trainer("whole"), trainer("part")
    assert any("the collate function has no name" in str(o.message) for o in said) == (whose == "function")
    part.control.on_batch_end.append(lambda row: row["epoch"] == 1 and part.control.request_stop())
    for one in (whole, part): one.train_and_validate()
    if whose == "function":
        for work in (lambda: trainer_from_folder(tmp_path, "part"), lambda: load_model(part.experiment_folder / "best_model"), lambda: write_run_file(part, tmp_path / "run.toml")):
            with pytest.raises(DataProblem, match="register"): work()
        return
    again = trainer_from_folder(tmp_path, "part")
    again.train_and_validate()
    made = train(write_run_file(whole, tmp_path / "run.toml"), "training.experiment_name=made")
    assert same(weights(whole), weights(again)) and same(weights(whole), weights(made))


def test_a_child_has_its_table_and_those_of_its_parents(make, dataset, tmp_path):
    @dwiml_model
    class Grown(Bands):
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample)
            self.more = torch.nn.Linear(data_sample.shape[1], config["model"]["Grown"]["width"])
    trainer = make(Grown, config={"model": {"Bands": {"classes": 3}, "Grown": {"width": 4}}}, max_epochs=1)
    text = write_run_file(trainer, tmp_path / "run.toml").read_text()
    assert "[model.Bands]" in text and "[model.Grown]" in text
    again = train(tmp_path / "run.toml", "training.experiment_name=again", "model.Bands.classes=5")
    assert again.model.net.layer.out_features == 5 and again.model.net.more.out_features == 4
    with pytest.raises(DataProblem, match="unknown key model.Band"): train(tmp_path / "run.toml", "model.Band.classes=5")


def test_an_object_among_the_datasets_is_refused_by_files_and_folders(make, tmp_path):
    class Ages:
        def __getitem__(self, object_id): return {"age": np.array(30.)}
    trainer = make(loader=dict(datasets={"people": Ages()}), max_epochs=1)
    trainer.train_and_validate()
    with pytest.raises(DataProblem, match="the dataset 'people' of this run was an object"): trainer_from_folder(tmp_path, "run", new_max_epochs=2)
    with pytest.raises(DataProblem, match="loader.people"): write_run_file(trainer, tmp_path / "run.toml")
    torch.manual_seed(1)
    make(loader=dict(datasets={"people": Ages()}), resume=True, new_max_epochs=2).train_and_validate()


def test_ragged_on_the_device(make):
    @dwiml_model
    class OfRagged(Bands):
        accepts_ragged = True
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample["data"]["input"].data)
        def forward(self, batch): return self.layer(batch["data"]["input"].data)
        def train_step(self, batch):
            self.optimizer.zero_grad()
            loss = self(batch).square().mean()
            loss.backward()
            self.optimizer.step()
            return {"loss": loss, "lines": len(batch["data"]["bundles"])}
        @staticmethod
        def to_tensor(data_dict): raise AssertionError("not called")
    trainer = make(OfRagged)
    trainer.train_and_validate()
    assert max(read_logs(trainer.experiment_folder, "batches")["lines"]) == 40


def test_every_problem_of_a_class_is_listed_at_once():
    class Wrong(torch.nn.Module):
        def train_step(self): pass
        def to_tensor(self, data_dict): pass
        def infer_step(self): pass
    with pytest.raises(TypeError) as e: dwiml_model(Wrong)
    assert all(o in str(e.value) for o in ("no __init__(self, config, data_sample)", "no forward", "train_step does not take", "infer_step does not take", "to_tensor is not static"))
    with pytest.raises(TypeError, match="not a class"): dwiml_model(3)


def test_promises_of_other_models_are_not_asked_of_it(make):
    with pytest.raises(DataProblem, match="this model has a step of its own.*dwiml_config check"): check_model(make().model)


def test_the_preflight_changes_nothing_and_names_the_stage(make):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    trainer = make()
    kept = weights(trainer), torch.get_rng_state()
    table = trace_model(trainer, 5)
    assert same(kept[0], weights(trainer)) and torch.equal(kept[1], torch.get_rng_state()) and not trainer.optimizer.state
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert [row["stage"] for row in table] == ["items", "to_tensor", "forward", "infer_step", "train_step"] and "(5, 15)" in repr(table)
    @dwiml_model
    class Fewer(Bands):
        def forward(self, batch): return self.layer(batch)[:1]
    with pytest.raises(ValueError, match="forward gives another number of rows"): make(Fewer, "fewer")


# What a folder keeps

def test_no_line_and_no_image_lies_in_a_folder(make, dataset):
    trainer = make()
    items = trainer.batch_loader.sample(32)
    trainer.train_and_validate()
    files = [f for f in trainer.experiments_path.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert "sample.json" in names and "items.pt" not in names
    points = [p.numpy().tobytes()[:12] for line in items["data"]["bundles"] for p in line[1:]] + [v.numpy().tobytes()[:60] for v in items["data"]["input"]]
    held = [(f.name, o) for f in files for o in points if o in f.read_bytes()]
    assert len(points) > 100 and not held
    subject = items["object_id"][0].partition("/")[0]
    assert subject not in (trainer.experiment_folder / "best_model/sample.json").read_text()


def test_folders_that_hold_two_items_still_load_and_resume(make, tmp_path):
    trainer = make(max_epochs=1)
    items = trainer.batch_loader.sample()
    trainer.train_and_validate()
    for folder in (trainer.experiment_folder / "best_model", trainer.experiment_folder / "checkpoint/model"):
        (folder / "sample.json").unlink()
        torch.save(items, folder / "items.pt")
    assert same(weights(trainer), list(load_model(trainer.experiment_folder / "best_model").parameters()))
    again = trainer_from_folder(tmp_path, "run", new_max_epochs=2)
    again.train_and_validate()
    assert again.epoch == 2 and not (again.experiment_folder / "checkpoint/model/items.pt").exists()


@pytest.mark.parametrize("text, says", [("{}", "cannot be read"), ('{"sample": {"shape": [100000000000000], "dtype": "float32"}, "points": 3, "why_no_validation": null}', "no memory"),
                                        ('{"sample": {"shape": [2], "dtype": "load"}, "points": 3, "why_no_validation": null}', "cannot be read")])
def test_a_damaged_shape_of_a_sample_is_one_sentence(make, text, says):
    trainer = make(max_epochs=1)
    trainer.model.save_params_and_state(trainer.experiments_path / "model")
    (trainer.experiments_path / "model/sample.json").write_text(text)
    with pytest.raises(DataProblem, match=says): load_model(trainer.experiments_path / "model")


def test_values_of_a_sample_are_refused_before_the_first_epoch(make, tmp_path):
    @dwiml_model
    class Sized(Bands):
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample)
            self.more = torch.nn.Linear(3, int(1000*data_sample.abs().max()))
    with pytest.raises(DataProblem, match="the size of more.weight comes from the values"): make(Sized)
    @dwiml_model
    class Looks(Bands):
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample)
            self.known = {"a": [1, data_sample.mean().item()]}
    with pytest.raises(DataProblem, match="self.known comes from the values"): make(Looks)
    assert not (tmp_path / "run").exists()
    @dwiml_model
    class Keeps(Bands):
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample)
            self.register_buffer("middle", data_sample.mean(0))
            self.example, self.drawn, self.n = data_sample, np.random.rand(), len(data_sample)
    trainer = make(Keeps, max_epochs=1)
    trainer.train_and_validate()
    assert torch.equal(load_model(trainer.experiment_folder / "best_model").net.middle, trainer.model.net.middle)


# In the loop

def test_workers_load_the_same_batches(make):
    @dwiml_model
    class Padded(Bands):
        @staticmethod
        def to_tensor(data_dict): return data_dict["data"]["input"].sum(1)/data_dict["data"]["input_lengths"][:, None] + data_dict["ages"]["age"][0]
    class Ages:
        def __getitem__(self, object_id): return {"age": np.array(1.)}
    loader = dict(collate_fn="pad", datasets={"ages": Ages()})
    runs = [make(Padded, f"workers{n}", nb_cpu_processes=n, loader=loader, max_epochs=1) for n in (0, 2)]
    for run in runs: run.train_and_validate()
    assert same(*map(weights, runs)) and len({tuple(read_logs(run.experiment_folder, "batches")["loss"]) for run in runs}) == 1


def test_the_control_and_a_sink_of_its_own(make, tmp_path):
    seen = []
    class Hears(Sink):
        def batch(self, row): seen.append(row)
    trainer = make(sinks=[Hears()], optimizer="Adam", learning_rates=[.01])
    control, states = trainer.control, []
    control.on_state.append(states.append)
    def orders(row):
        place = row["epoch"], row["batch"]
        if place == (0, 0): control.set_learning_rate(.5)
        if place == (0, 1): control.checkpoint_now()
        if place == (1, 0): control.pause(); threading.Timer(.2, control.resume).start()
        if place == (1, 1): control.stop()
    control.on_batch_end.append(orders)
    trainer.train_and_validate()
    assert "paused" in states and states[-1] == "stopped" and (trainer.epoch, trainer.batch) == (1, 2)
    assert [o["learning_rate"] for o in seen[:3]] == [.01, .5, .5] and {"loss", "norm", "grad_norm"} <= set(seen[0])
    assert [o["do"] for o in read_rows(trainer.experiment_folder / "logs/control.jsonl")] == ["set_learning_rate", "checkpoint_now", "pause", "resume", "stop"]
    again = trainer_from_folder(tmp_path, "run", sinks=[])
    again.train_and_validate()
    assert again.epoch == 2 and set(read_logs(again.experiment_folder, "batches")["learning_rate"][1:]) == {.5}


def test_the_dashboard_trains_it(make):
    board = TrainingDashboard(make(max_epochs=2))
    try:
        board.start()
        board.wait(60)
        assert board.state == "ended" and len(read_logs(board.trainer.experiment_folder)["train_loss"]) == 2
        assert 2 in [len(trace.x) for trace in board.figure.data if trace.name == "training"]
        assert "trainer_from_folder(" in board.advice()
        board.trainer.model.model_class = type("Mine", (Bands,), {"__module__": "__main__"})
        assert "run its cells again" in board.advice()
    finally: board.close()


def test_all_loggers_have_its_values(make):
    @dwiml_model
    class Tells(Bands):
        def train_step(self, batch): return {**super().train_step(batch), "mean <mm>": batch.mean()}
        def validate_step(self, batch): return {"loss": self(batch).square().mean(), "spread": batch.std()}
    trainer = make(Tells, sinks=OWN, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1)
    trainer.train_and_validate()
    for key in KEYS: check_same_numbers(trainer.experiment_folder, key)
    names = {o[:2] for o in READERS["csv"](trainer.experiment_folder)}
    assert {("training", "norm"), ("validation", "spread"), ("epoch", "valid_spread")} <= names


# Its scheduler

SCHEDULERS = {"epoch": {"name": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": .5}, "step": {"name": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": .5, "per": "step"},
              "model": {"name": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": .5, "per": "model"}, "plateau": {"name": "plateau", "patience": 0, "threshold": 1e9, "factor": .5},
              "its plateau": {"name": "plateau", "patience": 0, "threshold": 1e9, "factor": .5, "per": "model"}, "cosine": {"name": "cosine"}}
RATES = {"epoch": [1, 1, 1, .5, .5, .5], "step": [1, .5, .25, .125, .0625, .03125], "model": [1, 1, .5, .5, .25, .25], "plateau": [1, 1, 1, .5, .5, .5], "its plateau": [1, .5, .25, .125, .0625, .03125],
         "cosine": [.5*(1 + np.cos(np.pi*i/6)) for i in range(6)]}


@pytest.mark.parametrize("which", SCHEDULERS)
def test_a_class_finds_its_scheduler(make, which):
    @dwiml_model
    class Paces(Bands):
        def train_step(self, batch):
            told = super().train_step(batch)
            if SCHEDULERS[which].get("per") == "model": self.scheduler.step(told["loss"][0])
            return {**told, "rate": self.scheduler.get_last_lr()}
    config = {**CONFIG, "optimizer": {"name": "Adam", "lr": 1.}, "scheduler": SCHEDULERS[which]}
    options = dict(config=config, max_batches_per_epoch_training=3)
    whole, part = make(Paces, "whole", **options), make(Paces, "part", **options)
    part.control.on_batch_end.append(lambda row: (row["epoch"], row["batch"]) == (1, 0) and part.control.request_stop())
    for trainer in (whole, part): trainer.train_and_validate()
    assert isinstance(whole.optimizer, torch.optim.Adam) and which.split()[-1] in repr(whole.model.net.scheduler) + "epochstepmodel"
    again = trainer_from_folder(whole.experiments_path, "part")
    again.train_and_validate()
    rows = read_logs(whole.experiment_folder, "batches")
    assert rows["learning_rate"] == rows["rate"] == pytest.approx(RATES[which])
    assert same(weights(whole), weights(again)) and read_logs(again.experiment_folder, "batches")["learning_rate"] == rows["learning_rate"]


def test_what_a_scheduler_cannot_be_is_said_before_the_first_epoch(make, tmp_path):
    assert make(name="none").model.net.scheduler is None
    @dwiml_model
    class Twice(Bands):
        def train_step(self, batch):
            self.scheduler.step()
            return super().train_step(batch)
    tried = lambda cls, **table: make(cls, "tried", config={**CONFIG, "scheduler": table})
    with pytest.raises(DataProblem, match="per epoch: leave the call out, or say per = 'model'"): tried(Twice, **SCHEDULERS["epoch"])
    with pytest.raises(DataProblem, match="a plateau is seen by a value"): tried(Twice, **SCHEDULERS["its plateau"])
    with pytest.raises(ValueError, match="gama.*Did you mean 'gamma'"): tried(Bands, name="torch.optim.lr_scheduler.StepLR", step_size=1, gama=.1)
    with pytest.raises(ValueError, match="Did you mean 'cosine'"): tried(Bands, name="cosin")
    with pytest.raises(DataProblem, match="arguments and no name"): tried(Bands, gamma=.1)
    with pytest.raises(DataProblem, match=r"\[optimizer\] of the configuration is a table"): make(config={**CONFIG, "optimizer": "Adam"})
    assert not (tmp_path / "tried").exists()
    assert make(name="said", config={**CONFIG, "optimizer": {"name": "Adam", "betas": [.5, .9]}}, optimizer="SGD", learning_rates=[3.]).learning_rates == [3.]


# What authors get wrong

def after_step(give): return lambda self, batch: give(Bands.train_step(self, batch))
def in_init(work):
    def __init__(self, config, data_sample): Bands.__init__(self, config, data_sample); work(self, config)
    return __init__
def nothing(self, config, data_sample): pass
def twice(self, config): self.lock = threading.Lock()
def early(self, config): self.criterion.reduction = "sum"
def raises(self, *_): raise ZeroDivisionError("of the author")


WRONG = {"a word": (dict(train_step=after_step(lambda o: {"loss": "3"})), {}, "'loss' of a step is a number.*found '3'"),
         "no values": (dict(train_step=after_step(lambda o: {"loss": []})), {}, "'loss' of a step is a number"),
         "not a number": (dict(train_step=after_step(lambda o: {"loss": [1., float("nan")]})), {}, "train_step gives numbers that are not finite in .'loss'."),
         "no dict": (dict(train_step=after_step(lambda o: 3.)), {}, "gives a dict with 'loss'"), "a key that is taken": (dict(train_step=after_step(lambda o: {**o, "epoch": 1})), {}, "epoch"),
         "no parent": (dict(__init__=nothing), {}, "does not begin with super"), "a lock": (dict(__init__=in_init(twice)), {}, "cannot be copied.*lock"),
         "too early": (dict(__init__=in_init(early)), {}, "Wrong.__init__ fails, AttributeError.*criterion.*is there after __init__"),
         "a field": (dict(to_tensor=staticmethod(lambda d: d["data"]["inputs"])), {}, "Wrong.to_tensor fails.*no more than there is: data.*Did you mean 'input'"),
         "objects": (dict(to_tensor=staticmethod(lambda d: np.array([None, 1], object))), {}, "Wrong.to_tensor fails.*object_"),
         "its save": (dict(save=raises, load=raises), {}, "save fails on 2 items, ZeroDivisionError: of the author"), "its validation": (dict(validate_step=raises), {}, "validate_step fails on 2 items, ZeroDivisionError"),
         "a class's value": ({}, {"model": {"Bands": {"classes": "a"}}}, "Wrong.__init__ fails, TypeError.*data_sample.2, 15."), "a criterion": ({}, {"criterion": "L1Loss"}, r"\[criterion\] is a table"),
         "its words": ({}, {"criterion": {"weight": ["a"]}}, "criterion CrossEntropyLoss cannot be made"), "a function": ({}, {"criterion": {"name": "torch.nn.functional.l1_loss"}}, "not allowed"),
         "a scheduler's": ({}, {"scheduler": {"name": "StepLR", "step_size": "a"}}, "cannot go on with.*step_size"), "no table": ({}, {"scheduler": "cosine"}, r"\[scheduler\] of the configuration is a table")}


@pytest.mark.parametrize("which", WRONG)
def test_what_is_wrong_is_one_sentence_before_the_run(make, tmp_path, which):
    own, config, says = WRONG[which]
    with pytest.raises(ValueError, match=f"(?s){says}"): make(dwiml_model(type("Wrong", (Bands,), own)), config={**CONFIG, **config})
    assert not (tmp_path / "run").exists()


def test_what_to_tensor_writes_into_its_arrays_stays_there(make):
    class Shifts(Bands):
        @staticmethod
        def to_tensor(data_dict):
            for line in data_dict["data"]["bundles"]: line += 100
            return Bands.to_tensor(data_dict)
    plain, shifts = make(max_epochs=1), make(dwiml_model(Shifts), "shifts", max_epochs=1)
    for trainer in (plain, shifts): trainer.train_and_validate()
    assert same(weights(plain), weights(shifts))


def test_a_class_that_is_defined_again_leaves_a_running_trainer_alone(make):
    def define(factor):
        @dwiml_model
        class Cell(Bands):
            def forward(self, batch): return factor*self.layer(batch)
        return Cell
    plain = make(define(1.), "plain")
    plain.train_and_validate()
    trainer = make(define(1.), "again")
    trainer.control.on_batch_end.append(lambda row: row["batch"] == 1 and define(5.))
    trainer.train_and_validate()
    assert same(weights(plain), weights(trainer)) and make(define(5.), "new").model.net(torch.ones(1, 15)).shape == (1, 3)


# Where Hyrax's own code falls short

def test_hyrax_per_item_loss_lists(make):
    @dwiml_model
    class PerItem(Bands):
        def train_step(self, batch):
            super().train_step(batch)
            return {"loss": [1., *[3.]*(len(batch) - 1)]}
    trainer = make(PerItem, max_epochs=1)
    trainer.train_and_validate()
    rows = read_logs(trainer.experiment_folder, "batches")
    assert rows["loss"] == [pytest.approx((1 + 3*(n - 1))/n) for n in rows["n"]]


def test_hyrax_epoch_values_are_means_over_items(make):
    trainer = make(max_epochs=1, batch_size=37)                                           # batches of 34 and of 35
    trainer.train_and_validate()
    rows, epoch = read_logs(trainer.experiment_folder, "batches"), read_logs(trainer.experiment_folder)
    assert epoch["train_loss"][0] != rows["loss"][-1] and len(set(rows["n"])) > 1
    for name, column in (("loss", "train_loss"), ("norm", "norm")): assert epoch[column][0] == pytest.approx(np.average(rows[name], weights=rows["n"]))
    assert epoch["norm"][0] != pytest.approx(np.mean(rows["norm"]), rel=1e-9)


def test_hyrax_shuffling_draws_each_item_once(make, dataset):
    ids = []
    @dwiml_model
    class Listens(Bands):
        @staticmethod
        def to_tensor(data_dict):
            ids.extend(data_dict["object_id"])
            return Bands.to_tensor(data_dict)
    trainer = make(Listens, max_epochs=1)
    ids.clear()
    trainer.train_and_validate()
    assert len(ids) == len(set(ids)) == sum(dataset.training.nb_streamlines("bundles"))


def test_hyrax_a_write_to_the_config_is_refused(make):
    @dwiml_model
    class Writes(Bands):
        def __init__(self, config, data_sample):
            config["model"]["Bands"]["classes"] = 7
            super().__init__(config, data_sample)
    with pytest.raises(TypeError, match="model.Bands.classes"): make(Writes)


def test_hyrax_fine_tuning_moves_the_weights_that_were_loaded(make):
    first = make()
    first.train_and_validate()
    second = make(name="second", learning_rates=[.5])
    second.model.load_state_dict(load_model(first.experiment_folder / "best_model").state_dict())
    before = weights(second)
    assert same(before, [p for p in load_model(first.experiment_folder / "best_model").parameters()])
    second.train_and_validate()
    assert not same(before, weights(second))


def test_hyrax_a_decorated_child_trains_its_new_layers(make):
    @dwiml_model
    class Child(Bands):
        def __init__(self, config, data_sample):
            super().__init__(config, data_sample)
            self.more = torch.nn.Linear(data_sample.shape[1], 3)
        def forward(self, batch): return self.layer(batch) + self.more(batch)
    trainer = make(Child)
    before = trainer.model.net.more.weight.detach().clone()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.net.parameters()}
    trainer.train_and_validate()
    assert not torch.equal(before, trainer.model.net.more.weight)


def test_hyrax_to_tensor_is_inherited_and_a_renamed_one_survives_loading(make):
    @dwiml_model
    class Parent(torch.nn.Module):
        def __init__(self, config, data_sample):
            super().__init__()
            self.layer = torch.nn.Linear(data_sample.shape[1], 2)
        def forward(self, batch): return self.layer(batch)
        def train_step(self, batch):
            self.optimizer.zero_grad()
            loss = self(batch).square().mean()
            loss.backward()
            self.optimizer.step()
            return {"loss": loss}
        @staticmethod
        def prepare_inputs(data_dict): return np.stack([v[0] for v in data_dict["data"]["input"]])
    @dwiml_model
    class Heir(Parent): pass
    trainer = make(Heir)
    trainer.train_and_validate()
    again = load_model(trainer.experiment_folder / "best_model")
    fields = {"data": {"input": [np.ones((2, 15), np.float32)]}, "object_id": ["a"]}
    assert again.prepared(fields).shape == (1, 15)
    assert "def prepare_inputs" in (trainer.experiment_folder / "best_model/to_tensor.txt").read_text()


def test_hyrax_arguments_of_the_criterion_count_and_a_typo_raises(make):
    assert make(config={**CONFIG, "criterion": {"name": "CrossEntropyLoss", "label_smoothing": .2}}).model.net.criterion.label_smoothing == .2
    with pytest.raises(ValueError, match="criterion.label_smothing.*Did you mean 'label_smoothing'"):
        make(name="b", config={**CONFIG, "criterion": {"label_smothing": .2}})
    with pytest.raises(ValueError, match="momentum"): make(name="c", optimizer_args={"momentun": .9})
    with pytest.raises(ValueError, match="model.Bands.classes is not in the configuration"): make(name="d", config={"model": {"Bands": {"clases": 3}}})


def test_hyrax_a_run_of_three_iterations_logs(make):
    trainer = make(max_epochs=1, max_batches_per_epoch_training=3)
    trainer.train_and_validate()
    assert len(read_logs(trainer.experiment_folder, "batches")["loss"]) == 3


def test_hyrax_the_same_seed_gives_the_same_weights(make):
    @dwiml_model
    class Drops(Bands):
        def forward(self, batch): return self.layer(torch.nn.functional.dropout(batch, .5, self.training))
    runs = [make(Drops, name) for name in "ab"]
    torch.rand(3)
    for run in runs: run.train_and_validate()
    assert same(*map(weights, runs))


def test_hyrax_inference_builds_no_gradient(make):
    trainer = make()
    assert not trainer.model.infer(torch.ones(2, 15)).requires_grad
    assert trainer.model.net(torch.ones(2, 15)).requires_grad


def test_hyrax_different_keys_from_train_and_validate(make):
    @dwiml_model
    class Differs(Bands):
        def validate_step(self, batch): return {"loss": self(batch).square().mean(), "only_valid": 3.}
    trainer = make(Differs)
    trainer.train_and_validate()
    epochs = read_logs(trainer.experiment_folder)
    assert epochs["valid_only_valid"] == [3., 3.] and len(epochs["norm"]) == 2 and not {"only_valid", "valid_norm"} & set(epochs)


def test_hyrax_ragged_arrays_of_different_lengths_collate(make):
    seen = []
    @dwiml_model
    class Collects(Bands):
        @staticmethod
        def to_tensor(data_dict):
            seen.append([len(v) for v in data_dict["data"]["bundles"]])
            return Bands.to_tensor(data_dict)
    make(Collects, max_epochs=1).train_and_validate()
    assert len(set(seen[-1])) > 1                                                        # as lists
    seen.clear()
    @dwiml_model
    class Collects(Bands):
        @staticmethod
        def to_tensor(data_dict):
            own = data_dict["data"]
            seen.append((own["input"].shape[:2], own["input_lengths"]))
            return own["input"].sum(1)/own["input_lengths"][:, None]
    make(Collects, "padded", max_epochs=1, loader=dict(collate_fn="pad")).train_and_validate()
    (n, longest), lengths = seen[-1]
    assert len(lengths) == n and max(lengths) == longest > min(lengths)                  # padded


def test_names_are_unique_or_warned_about():
    class Twin(Bands): pass
    Twin.__module__ = "somewhere.else"
    dwiml_model(Twin)
    class Twin(Bands): pass
    with pytest.warns(UserWarning, match="two registered models are called Twin"): dwiml_model(Twin)
    for path in [k for k in REGISTERED_MODELS.entries if k.endswith("Twin")]: del REGISTERED_MODELS.entries[path]
    assert copy.copy(Twin) is Twin


# Data per streamline

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    "The toy study with two numbers for each line: its bundle, and its place in the file."
    folder = tmp_path_factory.mktemp("labelled")
    subjects = write_phantom(folder / "subjects")
    for trk in subjects.glob("*/bundles/*.trk"):
        tractogram = load_tractogram(trk)
        tractogram.dps["bundle"] = np.c_[np.full(len(tractogram), float(trk.stem == "bent")), np.arange(len(tractogram))]
        save_tractogram(tractogram, trk, overwrite=True)
    config = json.loads((subjects / "config.json").read_text())
    config["bundles"]["dps_keys"] = ["bundle"]
    return MultiSubjectDataset(create_study(subjects, folder / "study.hdf5", config, *(subjects / f"{o}.txt" for o in ("training", "validation", "testing"))).path).load_data()


@pytest.mark.parametrize("ragged", [False, True])
def test_data_per_streamline_is_a_field(labelled, tmp_path, ragged):
    seen = []
    @dwiml_model
    class Labels(torch.nn.Module):
        accepts_ragged = ragged
        def __init__(self, config, data_sample):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
        def forward(self, batch): return self.layer(self.of(batch)[0])
        def of(self, batch):
            if not ragged: return batch
            table = batch["data"]["bundle"]
            seen.append((batch["object_id"], table.numpy()))
            return table, table[:, 0].long()
        def train_step(self, batch):
            self.optimizer.zero_grad()
            loss = self.criterion(self(batch), self.of(batch)[1])
            loss.backward()
            self.optimizer.step()
            return {"loss": loss}
        def validate_step(self, batch): return {"loss": self.criterion(self(batch), self.of(batch)[1])}
        @staticmethod
        def to_tensor(data_dict):
            table = np.stack(data_dict["data"]["bundle"]).astype(np.float32)
            seen.append((data_dict["object_id"], table))
            return table, table[:, 0].astype(int)
    groups = dict(streamline_group_name="bundles", input_group_name=None)
    model = registered_model(Labels, {}, labelled, **groups)
    sampler = DWIMLBatchIDSampler(labelled, "bundles", batch_size_training=50, batch_size_validation=50)
    loader = RegisteredBatchLoader(labelled, model, split_ratio=.5, reverse_ratio=.5, **groups)
    trainer = RegisteredTrainer(model, tmp_path, "labels", sampler, loader, max_epochs=1)
    seen.clear()
    trainer.train_and_validate()
    kept = {s: subset.streamlines_of(i, "bundles").get_dps()["bundle"] for subset in (labelled.training, labelled.validation) for i, s in enumerate(subset.subjects)}
    rows = [(o, row) for ids, table in seen for o, row in zip(ids, table, strict=True)]
    assert {o.partition("/")[0] for o, _ in rows} == set(kept)
    for o, row in rows: assert np.array_equal(row, kept[o.partition("/")[0]][int(o.partition("/")[2])]), o
    assert {row[0] for _, row in rows} == {0., 1.}
    again = trainer_from_folder(tmp_path, "labels", new_max_epochs=2)
    again.train_and_validate()
    assert len(read_logs(again.experiment_folder)["valid_loss"]) == 2


# The loop's options

@pytest.fixture
def one_thread():
    "A forked child cannot use the threads that its parent has begun, and the last bits depend on how many there are."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_goes_on_to_the_same_bits(make, tmp_path, one_thread):
    def killed():
        trainer = make(name="killed", max_epochs=3, optimizer="Adam")
        trainer.control.on_batch_end.append(lambda row: (row["epoch"], row["batch"]) == (1, 2) and os.kill(os.getpid(), signal.SIGKILL))
        trainer.train_and_validate()
    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start(); child.join(60)
    assert child.exitcode == -signal.SIGKILL
    whole, again = make(name="whole", max_epochs=3, optimizer="Adam"), trainer_from_folder(tmp_path, "killed")
    for trainer in (whole, again): trainer.train_and_validate()
    assert same(weights(whole), weights(again))
    for which in ("epochs", "batches"):
        a, b = ({k: v for k, v in read_logs(o.experiment_folder, which).items() if "second" not in k} for o in (whole, again))
        assert a == b, which


def test_what_a_class_draws_belongs_to_its_batch(make, tmp_path, one_thread):
    "In to_tensor and in a step, from Python, numpy and torch: after a kill, in workers; outside nothing is noticed."
    @dwiml_model
    class Draws(Bands):
        def train_step(self, batch): return Bands.train_step(self, batch*(1 + .1*random.random() + .1*np.random.rand()))
        @staticmethod
        def to_tensor(data_dict): return Bands.to_tensor(data_dict)*(1 + np.random.rand() + random.random() + torch.rand(1).item())
    def run(seed, trainer):
        seed_all(seed)
        trainer.train_and_validate()
        return weights(trainer), np.random.rand(), random.random()
    def killed():
        trainer = make(Draws, name="drawn", max_epochs=3)
        trainer.control.on_batch_end.append(lambda row: (row["epoch"], row["batch"]) == (1, 2) and os.kill(os.getpid(), signal.SIGKILL))
        run(1, trainer)
    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start(); child.join(60)
    assert child.exitcode == -signal.SIGKILL
    again, whole, worker = run(2, trainer_from_folder(tmp_path, "drawn")), run(3, make(Draws, max_epochs=3)), run(4, make(Draws, name="worker", max_epochs=3, nb_cpu_processes=1))
    assert same(again[0], whole[0]) and same(whole[0], worker[0])
    for seed, found in ((2, again), (3, whole), (4, worker)):
        seed_all(seed)
        assert found[1:] == (np.random.rand(), random.random())
    assert not same(whole[0], run(3, make(Draws, name="other", max_epochs=3, seed=77))[0])


OPTIONS = {"bf16": dict(autocast="bf16"), "ema": dict(ema_decay=.5), "frozen": dict(frozen=["*bias"]), "cosine": dict(lr_schedule="cosine"),
           "torch": dict(lr_schedule=dict(key="torch.optim.lr_scheduler.StepLR", step_size=1, gamma=.1)), "groups": dict(param_groups={"*bias": {"lr": .5}})}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loop_count_and_resume(make, tmp_path, option):
    plain, whole, part = make(name="plain"), make(name="whole", **OPTIONS[option]), make(name="part", **OPTIONS[option])
    before = weights(whole)
    part.control.on_batch_end.append(lambda row: (row["epoch"], row["batch"]) == (1, 0) and part.control.request_stop())
    for trainer in (plain, whole, part): trainer.train_and_validate()
    assert part.epoch == 1
    again = trainer_from_folder(tmp_path, "part")
    again.train_and_validate()
    assert same(weights(whole), weights(again)) and read_logs(whole.experiment_folder)["train_loss"] == read_logs(again.experiment_folder)["train_loss"]
    best = [list(load_model(o.experiment_folder / "best_model").parameters()) for o in (whole, plain)]
    assert not same(*best)
    if option == "frozen": assert torch.equal(before[1], weights(whole)[1]) and not torch.equal(before[0], weights(whole)[0])


def test_init_weights_are_what_it_begins_with(make):
    first = make()
    first.train_and_validate()
    second = make(name="second", init_weights=first.experiment_folder)
    start = weights(second)
    assert same(start, list(load_model(first.experiment_folder / "best_model").parameters()))
    second.train_and_validate()
    assert not same(start, weights(second))


@pytest.mark.parametrize("option", [dict(accumulate=2), dict(clip_value=.1), dict(on_nan="skip")])
def test_what_is_the_steps_own_is_refused_by_name(make, tmp_path, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} cannot be had"): make(**option)
    assert not (tmp_path / "run").exists()


def test_the_models_of_the_page_are_short():
    page = json.loads((Path(__file__).parent.parent / "nbs/tutorials/04_three_models.ipynb").read_text())
    found = [node for cell in page["cells"] if cell["cell_type"] == "code" for node in ast.parse("".join(cell["source"])).body if isinstance(node, ast.ClassDef)]
    assert [o.name for o in found] == ["Around", "Names", "Squeezes"] and all(o.end_lineno - o.lineno + 2 < 40 for o in found)


@pytest.mark.parametrize("size, says", [(10**11, "no memory"), (10**18, "cannot have such a size"), (-1, "cannot have such a size")])
def test_a_size_that_no_memory_holds_is_refused_before(size, says):
    class Wide(torch.nn.Module):
        def __init__(self, config, data_sample):
            super().__init__()
            self.layer = torch.nn.Linear(3, config["model"]["Wide"]["classes"])
    with pytest.raises(DataProblem, match=says): build(Wide, Config({"model": {"Wide": {"classes": size}}}), None)
    assert build(Wide, Config({"model": {"Wide": {"classes": 4}}}), None).layer.weight.shape == (4, 3)
