"""A child class replaces one stage of the training, as with dwi_ml: it is the one that runs, and folder, logs, stop and resume are as ever."""
import inspect
import textwrap

import pytest
import torch

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.feed import Phase
from dwiml_nb.training.sinks import read_logs
from dwiml_nb.training.trainer import DWIMLTrainer, DWIMLTrainerOneInput

TRAIN_AND_VALIDATE = """
def train_and_validate(self):
    for epoch in range(self.max_epochs):
        self.train_one_epoch()
        self.validate_one_epoch()
        self.save_checkpoint()
"""
RUN_ONE_BATCH = """
def run_one_batch(self, data):
    streamlines, ids_per_subj = data
    batch_inputs = self.batch_loader.load_batch_inputs(streamlines, ids_per_subj)
    streamlines_f = self.batch_loader.add_noise_streamlines_forward(streamlines, self.device)
    model_outputs = self.model(batch_inputs, streamlines_f)
    mean_loss, n = self.model.compute_loss(model_outputs, streamlines, average_results=True)
    return mean_loss, n
"""
APART = RUN_ONE_BATCH.replace("data):\n    streamlines, ids_per_subj = data", "streamlines, ids_per_subj):")  # as dwi_ml 1.0 has it
BODIES = {"loop": TRAIN_AND_VALIDATE, "batch": RUN_ONE_BATCH, "both": TRAIN_AND_VALIDATE + RUN_ONE_BATCH, "apart": APART}


class Lists(MainModelAbstract):
    "Takes lists of tensors and nothing else, as models written for dwi_ml do."
    def __init__(self, nb_features):
        super().__init__(step_size=2.0)
        self.layer, self.drop = torch.nn.Linear(nb_features, 3), torch.nn.Dropout(0.1)

    def forward(self, inputs, streamlines):
        assert type(inputs) is list and type(streamlines) is list
        return self.layer(self.drop(torch.cat(inputs))).split([len(s) for s in streamlines])

    def compute_loss(self, outputs, target_streamlines, average_results=True):
        assert type(target_streamlines) is list and average_results
        errors = torch.cat([o[:-1] - s.diff(dim=0) for o, s in zip(outputs, target_streamlines)])
        return errors.square().mean(), len(errors)


def learn2track(nb_features, **dg_args):
    return Learn2TrackModel(nb_features, rnn_key="gru", rnn_layer_sizes=[8], dropout=0.1, nb_previous_dirs=1, step_size=2.0, dg_args=dg_args)


MODELS = {"lists": Lists, "learn2track": learn2track, "learn2track with EOS": lambda n: learn2track(n, add_eos=True)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


def child(bodies, base=DWIMLTrainerOneInput, name="Child"):
    "A child of the trainer whose methods are these lines."
    made = {}
    exec(f"class {name}(base):\n{textwrap.indent(bodies or 'pass', '    ')}", {"base": base}, made)
    return made[name]


def make(dataset, folder, cls=DWIMLTrainerOneInput, model=Lists, name="run", resume=False, loader=None, **kwargs):
    torch.manual_seed(0)
    model = model(dataset.nb_features["input"])
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40, batch_size_validation=40)
    loader = (loader or DWIMLBatchLoaderOneInput)(dataset, model, input_group_name="input", streamline_group_name="bundles", noise_mm_forward=0.2)
    options = {} if resume else dict(max_epochs=3, learning_rates=[0.01], max_batches_per_epoch_training=4, max_batches_per_epoch_validation=2)
    return (cls.init_from_checkpoint if resume else cls)(model, folder, name, sampler, loader, **{**options, "device": "cpu", **kwargs})


def stop_after(trainer, nb):
    seen = []
    trainer.control.on_batch_end.append(lambda row: seen.append(row) or (len(seen) == nb and trainer.control.request_stop()))
    return trainer


def numbers(trainer, which="batches"):
    return {k: v for k, v in read_logs(trainer.experiment_folder, which).items() if "second" not in k}


def assert_same(a, b):
    for which in ("batches", "epochs"): assert numbers(a, which) == numbers(b, which)
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


# ---- the two bodies that people know

@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bodies", BODIES.values(), ids=BODIES)
def test_bodies_of_dwi_ml_train_and_resume(dataset, tmp_path, bodies, model):
    cls = child(bodies)
    trainer = make(dataset, tmp_path, cls, model)
    states = []
    trainer.control.on_state.append(states.append)
    trainer.train_and_validate()
    log = numbers(trainer, "epochs")
    assert log["epoch"] == [0, 1, 2] and log["train_loss"][2] < log["train_loss"][0] and log["valid_loss"][2] < log["valid_loss"][0]
    assert log["nb_batches"] == [4] * 3 and numbers(trainer)["phase"] == (["training"] * 4 + ["validation"] * 2) * 3
    assert (trainer.experiment_folder / "best_model" / "model_state.pkl").exists() and read_checkpoint(trainer.experiment_folder).state["epoch"] == 3
    assert states == ["saving", *["training", "validating", "saving"] * 3, "ended"]
    for i, nb in enumerate((2, 5, 6)):  # in training, in validation, at the end of an epoch
        stopped = stop_after(make(dataset, tmp_path, cls, model, name=f"stopped{i}"), nb)
        stopped.train_and_validate()
        assert stopped.control.state == "stopped" and len(numbers(stopped)["batch"]) == nb
        on = make(dataset, tmp_path, cls, model, name=f"stopped{i}", resume=True)
        on.train_and_validate()
        assert_same(on, trainer)
        assert on.control.state == "ended"


def test_the_body_of_the_loop_is_the_loop(dataset, tmp_path):
    "Bit for bit what the trainer itself does, for as long and with as many checkpoints; after a stop nothing is written again."
    plain = make(dataset, tmp_path, name="plain")
    plain.train_and_validate()
    mine = make(dataset, tmp_path, child(TRAIN_AND_VALIDATE))
    mine.train_and_validate()
    assert_same(mine, plain)
    stopped = stop_after(make(dataset, tmp_path, child(TRAIN_AND_VALIDATE), name="stopped", max_epochs=50), 3)
    saved = []
    stopped.control.on_state.append(lambda state: saved.append(state == "saving"))
    stopped.train_and_validate()
    assert sum(saved) == 2  # the first checkpoint and the one after the stop
    stopped.train_and_validate()
    assert stopped.control.state == "ended" and stopped.epoch == 50


def test_patience_ends_the_body_of_the_loop(dataset, tmp_path):
    trainer = make(dataset, tmp_path, child(TRAIN_AND_VALIDATE), max_epochs=9, patience=1, patience_delta=1e9)
    trainer.train_and_validate()
    assert trainer.epoch == 2 and numbers(trainer, "epochs")["epoch"] == [0, 1] and trainer.control.state == "ended"


def test_noise_of_the_batch_at_hand(dataset, tmp_path):
    "The body's noise is the very noise of the trainer's own step."
    plain, mine = make(dataset, tmp_path, name="plain"), make(dataset, tmp_path, child(RUN_ONE_BATCH))
    batch = next(plain.batches("training", 0))
    torch.manual_seed(1)
    expected = plain.run_one_batch(batch)[0]
    torch.manual_seed(1)
    found = mine.run_one_batch(mine.batch_loader.hand_out(batch))[0]
    assert torch.equal(found, expected)


# ---- each stage alone

TRAINER_METHODS = ["train_and_validate", "train_one_epoch", "validate_one_epoch", "run_one_batch", "back_propagation", "save_checkpoint"]
LOADER_METHODS = ["load_batch_streamlines", "load_batch_inputs", "add_noise_streamlines_forward", "add_noise_streamlines_loss"]


def recording(base, name, calls):
    "A child that writes down each call of one method."
    def method(self, *args, **kwargs):
        calls.append(args)
        return getattr(super(cls, self), name)(*args, **kwargs)
    cls = type(f"Recording{base.__name__}", (base,), {name: method})
    return cls


@pytest.mark.parametrize("name, times", zip(TRAINER_METHODS, [1, 3, 3, 18, 12, 4]))
@pytest.mark.parametrize("bodies", ["", TRAIN_AND_VALIDATE], ids=["its loop", "a loop of one's own"])
def test_each_method_of_the_trainer(dataset, tmp_path, name, times, bodies):
    calls, plain = [], make(dataset, tmp_path, name="plain")
    plain.train_and_validate()
    trainer = make(dataset, tmp_path, recording(child(bodies), name, calls))
    trainer.train_and_validate()
    assert len(calls) == times
    if name in ("train_one_epoch", "validate_one_epoch"): assert calls == [(0,), (1,), (2,)]  # the epoch, whoever calls
    assert_same(trainer, plain)


@pytest.mark.parametrize("name, times", zip(LOADER_METHODS, [18, 18, 18, 18]))
@pytest.mark.parametrize("in_workers", [False, True])
def test_each_method_of_the_loader(dataset, tmp_path, name, times, in_workers):
    calls, plain = [], make(dataset, tmp_path, name="plain")
    plain.train_and_validate()
    base = recording(DWIMLBatchLoaderOneInput, name, calls)
    loader = lambda *args, **kwargs: base(*args, inputs_in_workers=in_workers, **kwargs)
    trainer = make(dataset, tmp_path, loader=loader)
    trainer.train_and_validate()
    assert len(calls) == times
    assert_same(trainer, plain)


def test_methods_without_arguments(dataset, tmp_path):
    "Nothing but self: not even the epoch."
    class Bare(DWIMLTrainerOneInput):
        def train_one_epoch(self): super().train_one_epoch()
        def validate_one_epoch(self): super().validate_one_epoch()
        def save_checkpoint(self): super().save_checkpoint()
    plain, bare = make(dataset, tmp_path, name="plain"), make(dataset, tmp_path, Bare)
    plain.train_and_validate()
    bare.train_and_validate()
    assert_same(bare, plain)


@pytest.mark.parametrize("bodies", ["", TRAIN_AND_VALIDATE], ids=["its loop", "a loop of one's own"])
def test_an_epoch_of_ones_own(dataset, tmp_path, bodies):
    "Nothing of `train_one_epoch` is left, not even what moves the run on."
    class Own(child(bodies)):
        def train_one_epoch(self, epoch):
            self.model.train()
            for batch in self.batches("training", epoch): self.back_propagation(self.run_one_batch(batch)[0])
    trainer = make(dataset, tmp_path, Own)
    trainer.train_and_validate()
    log = numbers(trainer, "epochs")
    assert log["epoch"] == [0, 1, 2] and log["valid_loss"][2] < log["valid_loss"][0] and log["nb_batches"] == [0] * 3
    assert read_checkpoint(trainer.experiment_folder).state["epoch"] == 3


def test_a_checkpoint_of_ones_own(dataset, tmp_path):
    "Epochs go on also where nothing is saved."
    class Unsaved(DWIMLTrainerOneInput):
        def save_checkpoint(self): pass
    trainer, told = make(dataset, tmp_path, Unsaved), []
    trainer.control.on_epoch_end.append(lambda row: told.append(row["epoch"]))
    trainer.train_and_validate()
    assert told == numbers(trainer, "epochs")["epoch"] == [0, 1, 2] and trainer.control.state == "ended"


LOOPS = {
    "epochs by number": "for epoch in range(self.max_epochs):\n    self.train_one_epoch(epoch)\n    self.validate_one_epoch(epoch)\n    self.save_checkpoint()",
    "no checkpoint": "for epoch in range(self.max_epochs):\n    self.train_one_epoch()\n    self.validate_one_epoch()",
    "a checkpoint now and then": "for epoch in range(self.max_epochs):\n    self.train_one_epoch(epoch)\n    self.validate_one_epoch(epoch)\n    if epoch % 2: self.save_checkpoint()",
    "until it has ended": "while not self.has_ended:\n    self.train_one_epoch()\n    self.validate_one_epoch()\n    self.save_checkpoint()\n    if self.control.stop_requested: break",
    "the parent's": "super().train_and_validate()",
    "more than enough": "for epoch in range(99):\n    self.train_one_epoch()\n    self.validate_one_epoch()\n    self.save_checkpoint()"}


@pytest.mark.parametrize("body", LOOPS.values(), ids=LOOPS)
def test_other_loops(dataset, tmp_path, body):
    cls = child("def train_and_validate(self):\n" + textwrap.indent(body.replace("super()", "super(type(self), self)"), "    "))
    plain = make(dataset, tmp_path, name="plain")
    plain.train_and_validate()
    trainer = make(dataset, tmp_path, cls)
    trainer.train_and_validate()
    assert_same(trainer, plain)
    assert trainer.control.state == "ended" and read_checkpoint(trainer.experiment_folder).state["epoch"] == 3
    stopped = stop_after(make(dataset, tmp_path, cls, name="stopped"), 11)
    stopped.train_and_validate()
    on = make(dataset, tmp_path, cls, name="stopped", resume=True)
    on.train_and_validate()
    assert_same(on, plain)


def test_a_loop_that_validates_now_and_then(dataset, tmp_path):
    body = "for epoch in range(self.max_epochs):\n    self.train_one_epoch()\n    if epoch != 1: self.validate_one_epoch()"
    trainer = make(dataset, tmp_path, child("def train_and_validate(self):\n" + textwrap.indent(body, "    ")))
    trainer.train_and_validate()
    log = numbers(trainer, "epochs")
    assert log["epoch"] == [0, 1, 2] and [v is None for v in log["valid_loss"]] == [False, True, False]


def test_an_epoch_that_is_not_next(dataset, tmp_path):
    trainer = make(dataset, tmp_path)
    with pytest.raises(ValueError, match="epoch 6 was asked for .epoch=5., but the run is at epoch 2"):
        with trainer.running(): trainer.train_one_epoch(), trainer.train_one_epoch(5)
    assert trainer.control.state == "failed"


def test_by_hand(dataset, tmp_path):
    "Stage by stage, outside of any loop: the folder is made, and each call leaves a checkpoint to go on from."
    plain, trainer = make(dataset, tmp_path, name="plain"), make(dataset, tmp_path)
    plain.train_and_validate()
    trainer.train_one_epoch()
    assert (trainer.phase, trainer.batch) == ("validation", 0) and read_checkpoint(trainer.experiment_folder).state["phase"] == "validation"
    trainer.validate_one_epoch()
    assert trainer.epoch == 1 and numbers(trainer, "epochs")["epoch"] == [0]
    trainer.train_and_validate()
    assert_same(trainer, plain)


def test_streamlines_alone(dataset, tmp_path):
    class Alone(Lists):
        def forward(self, streamlines): return [self.layer.bias.expand(len(s), 3) for s in streamlines]
    loader = lambda dataset, model, input_group_name, **kwargs: DWIMLBatchLoader(dataset, model, **kwargs)
    trainer = make(dataset, tmp_path, child(TRAIN_AND_VALIDATE, DWIMLTrainer), Alone, loader=loader)
    trainer.train_and_validate()
    assert numbers(trainer, "epochs")["epoch"] == [0, 1, 2]


# ---- a phase more

class Fit(DWIMLTrainerOneInput):
    def make_phases(self):
        look = lambda epoch: self.go_through("fit", epoch, self.run_one_batch)
        return [*super().make_phases(), Phase("fit", "training", look, nb_batches=2)]


def test_a_phase_more(dataset, tmp_path):
    "It changes nothing of the others, comes last, and a run stopped within it goes on within it."
    plain, trainer, states = make(dataset, tmp_path, name="plain"), make(dataset, tmp_path, Fit), []
    trainer.control.on_state.append(states.append)
    plain.train_and_validate()
    trainer.train_and_validate()
    assert states == ["saving", *["training", "validating", "fit", "saving"] * 3, "ended"]
    log, rows = numbers(trainer, "epochs"), numbers(trainer)
    assert {k: v for k, v in log.items() if k != "fit_loss"} == numbers(plain, "epochs") and all(torch.tensor(log["fit_loss"]) > 0)
    assert rows["phase"] == (["training"] * 4 + ["validation"] * 2 + ["fit"] * 2) * 3
    for i, nb in enumerate((7, 8, 15)):
        stopped = stop_after(make(dataset, tmp_path, Fit, name=f"stopped{i}"), nb)
        stopped.train_and_validate()
        assert stopped.phase == "fit"
        on = make(dataset, tmp_path, Fit, name=f"stopped{i}", resume=True)
        on.train_and_validate()
        assert_same(on, trainer)


def test_parts_do_not_know_the_trainer():
    from dwiml_nb.training import checkpoints, control, feed, means, optimizers, run, schedules, sinks, step
    for part in (checkpoints, control, feed, means, optimizers, run, schedules, sinks, step):
        assert "DWIMLTrainer" not in inspect.getsource(part), part.__name__


def test_a_second_phase_that_learns(dataset, tmp_path):
    "Its loss has a column of its own in the row of an epoch."
    class Twice(DWIMLTrainerOneInput):
        def make_phases(self):
            again = lambda epoch: self.go_through("again", epoch, self.run_one_batch, self.back_propagation)
            return [*super().make_phases(), Phase("again", "training", again, nb_batches=2, train=True)]
    trainer = make(dataset, tmp_path, Twice, max_epochs=1)
    trainer.train_and_validate()
    rows, epoch = numbers(trainer), numbers(trainer, "epochs")
    losses = [loss for phase, loss, n in zip(rows["phase"], rows["loss"], rows["n"]) if phase == "again"]
    assert trainer.control.done == trainer.control.total == 4
    assert min(losses) <= epoch["again_loss"][0] <= max(losses) and epoch["again_loss"] != epoch["train_loss"]


def test_a_phase_with_nothing_to_do(dataset, tmp_path):
    class Idle(DWIMLTrainerOneInput):
        def make_phases(self): return [*super().make_phases(), Phase("idle", "validation")]
    with pytest.raises(TypeError, match="the phase 'idle' has nothing to do"): make(dataset, tmp_path, Idle).train_and_validate()


def test_streamlines_alone_with_a_loader_of_inputs(dataset, tmp_path):
    "As ever: the trainer of models of streamlines hands them nothing else."
    class Alone(Lists):
        def forward(self, streamlines): return [self.layer.bias.expand(len(s), 3) for s in streamlines]
    trainer = make(dataset, tmp_path, DWIMLTrainer, Alone)
    trainer.train_and_validate()
    assert numbers(trainer, "epochs")["epoch"] == [0, 1, 2]


def test_a_norm_that_is_forgotten(dataset, tmp_path):
    cls = child("def back_propagation(self, loss): super(self.__class__, self).back_propagation(loss)")
    with pytest.raises(TypeError, match="must return the norm"): make(dataset, tmp_path, cls).train_and_validate()


def test_a_phase_that_is_gone(dataset, tmp_path):
    stop_after(make(dataset, tmp_path, Fit), 7).train_and_validate()
    with pytest.raises(DataProblem, match="the run stopped within its phase 'fit', which this trainer does not have"):
        make(dataset, tmp_path, child("pass", name="Fit"), resume=True)
