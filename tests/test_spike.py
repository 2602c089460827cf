"""A clicked batch: its losses per point and line under the model as it is now, and the widget that shows them."""
import threading
import time

import pytest
import torch
from bands import Bands

from dwiml_nb.batch.loader import DWIMLBatchLoader, DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.batch_losses import losses_of_batch, ready
from dwiml_nb.models.items import RegisteredBatchLoader
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.registered import registered_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.registered import RegisteredTrainer
from dwiml_nb.training.sinks import read_rows
from dwiml_nb.training.trainer import DWIMLTrainer, DWIMLTrainerOneInput
from dwiml_nb.widgets.batch_preview import BatchPreview
from dwiml_nb.widgets.training_dashboard import TrainingDashboard, between_batches


@pytest.fixture(scope="module")
def study(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


class Guess(MainModelAbstract):
    "A loss without average_results, and a model that draws numbers in evaluation too."
    def __init__(self, nb_features, dropout=0., **kwargs):
        super().__init__(**kwargs)
        self.layer, self.drop = torch.nn.Linear(nb_features, 3), torch.nn.Dropout(dropout)
    def forward(self, inputs, streamlines): return [self.drop(self.layer(x)) + 0*torch.rand(1) for x in inputs]
    def compute_loss(self, outputs, targets):
        errors = torch.cat([o[:-1] - s.diff(dim=0) for o, s in zip(outputs, targets)]).square().sum(1)
        return errors.mean(), len(errors)


class JudgedBands(Bands):
    "A registered class that can be validated."
    def validate_step(self, batch): return {"loss": self.criterion(self(batch), batch.argmax(1) % 3).item()}


def bands(study, cls=JudgedBands):
    return registered_model(cls, {"model": {"Bands": {"classes": 3}}}, study, streamline_group_name="bundles", input_group_name="input")


def learn2track(study, **options):
    return Learn2TrackModel(study.nb_features["input"], step_size=2., rnn_layer_sizes=[4], **options)


MODELS = {
    "regression": learn2track,
    "sphere": lambda study: learn2track(study, dg_key="sphere-classification"),
    "end": lambda study: learn2track(study, dg_args={"add_eos": True}),
    "own": lambda study, **options: Guess(study.nb_features["input"], step_size=2., **options),
    "auto-encoder": lambda study: ModelAE(),
    "registered": bands,
}


@pytest.fixture
def trainer_of(study, tmp_path):
    "A function that makes a small trainer of a kind of model."
    def make(kind="regression", augment=None, model_options=None, folder=tmp_path, **options):
        torch.manual_seed(0)
        model, groups = MODELS[kind](study, **(model_options or {})), {"streamline_group_name": "bundles", **(augment or {})}
        cls, loader = {"auto-encoder": (DWIMLTrainer, DWIMLBatchLoader), "registered": (RegisteredTrainer, RegisteredBatchLoader)}.get(
            kind, (DWIMLTrainerOneInput, DWIMLBatchLoaderOneInput))
        if loader is not DWIMLBatchLoader: groups["input_group_name"] = "input"
        most = dict(max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, max_epochs=1)
        return cls(model, folder, kind, DWIMLBatchIDSampler(study, "bundles", 20, 20), loader(study, model, **groups), device="cpu",
                   **{**most, **options})
    return make


# ---- losses

@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_that_the_trainer_logs(trainer_of, kind):
    trainer = trainer_of(kind)
    trainer.train_and_validate()
    row = [o for o in read_rows(trainer.experiment_folder / "logs" / "batches.jsonl") if o["phase"] == "validation"][0]
    batch = trainer.batch_loader.load_batch_streamlines(next(iter(trainer.batch_sampler.batches("validation", epoch=0))))
    before, at_hand = torch.get_rng_state(), trainer.batch_loader.at_hand
    per_point, per_line, loss = losses_of_batch(trainer.model, ready(trainer.batch_loader, batch))
    assert torch.equal(torch.get_rng_state(), before) and trainer.batch_loader.at_hand is at_hand
    assert loss == pytest.approx(row["loss"], rel=1e-5)
    assert per_point.shape == (len(batch.lines.data),) and per_line.shape == (len(batch),)
    if kind == "registered": assert per_line.mean().item() == pytest.approx(loss, rel=1e-4)
    elif kind == "own": assert (per_line*(batch.lines.lengths - 1)).sum().item()/row["n"] == pytest.approx(loss, rel=1e-4)
    elif kind != "end": assert per_point.nanmean().item() == pytest.approx(loss, rel=1e-4)
    for i in (0, len(batch) - 1):
        of_line = per_point[batch.lines.offsets[i]:batch.lines.offsets[i + 1]]
        assert of_line.nanmean().item() == pytest.approx(per_line[i].item(), rel=1e-4)


def test_a_model_that_cannot_be_judged_says_so(study):
    model = bands(study, Bands)
    loader = RegisteredBatchLoader(study, model, streamline_group_name="bundles", input_group_name="input")
    batch = loader.load_batch_streamlines(next(iter(DWIMLBatchIDSampler(study, "bundles", 20, 20).batches())))
    with pytest.raises(ValueError, match="Bands cannot be validated, so it gives no loss of a batch"):
        losses_of_batch(model, ready(loader, batch))


# ---- the preview

def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def preview_of():
    "A function that makes a preview of a trainer's batches."
    made = []
    def make(trainer):
        made.append(BatchPreview(trainer.batch_loader, trainer.batch_sampler))
        return made[-1]
    yield make
    for preview in made: preview.close()


def test_that_very_batch_opens_in_the_colours_of_its_loss(trainer_of, preview_of):
    trainer = trainer_of(augment={"reverse_ratio": .5, "segment_mm": 20., "off_track_mm": 1.})
    preview, before = preview_of(trainer), bits(trainer.model)
    preview.show_batch("training", 3, 1, loss=2.5, model=trainer.model)
    ids = next(iter(trainer.batch_sampler.batches("training", epoch=3, start=1)))
    batch = trainer.batch_loader.load_batch_streamlines(ids)
    losses = losses_of_batch(trainer.model, ready(trainer.batch_loader, batch))
    assert torch.equal(preview.batch.lines.data, batch.lines.data) and preview.error == ""
    assert torch.equal(preview.losses.per_line, losses.per_line) and preview.viewer.colour == "loss"
    assert f"logged loss 2.5, now {losses.loss:.4g}" in preview.told.value
    assert same(bits(trainer.model), before) and trainer.model.training

    shown = [line for _, line in preview.worst.options]
    assert shown == losses.per_line.argsort(descending=True, stable=True)[:20].tolist()
    assert all(word in preview.worst.options[0][0] for word in ("1. ", "sub-", "id in the study", " mm", "loss"))
    preview.worst.value = shown[2]
    assert preview.viewer.highlighted == shown[2] and preview.viewer.selection == (shown[2],)

    preview.subject = preview.subject_options[-1]
    which, scene = list(batch.ids_per_subj.values())[-1], preview.viewer.scene
    assert which.start > 0
    assert torch.equal(torch.from_numpy(scene.lines[0].data_per_line["mean loss"]), losses.per_line[which])
    points = losses.per_point[batch.lines.offsets[which.start]:batch.lines.offsets[which.stop]]
    assert torch.allclose(torch.from_numpy(scene.lines[0].data_per_point["loss"]), points, rtol=0, atol=0, equal_nan=True)

    preview.next_batch()
    assert "; loss " in preview.info and "logged" not in preview.info
    preview.augmented = False
    assert preview.losses is None and preview.viewer.colour == "direction" and preview.worst.layout.display == "none"


def test_a_batch_that_does_not_exist_or_has_no_losses(trainer_of, preview_of, study):
    preview = preview_of(trainer_of())
    with pytest.raises(ValueError, match="there is no batch 1001"): preview.show_batch("training", 0, 1000)
    assert (preview.epoch, preview.index) == (0, 0)
    preview.show_batch("validation", 1, 0, loss=float("nan"), model=bands(study, Bands))
    assert preview.context == "validation" and preview.losses is None
    assert "Losses cannot be shown" in preview.info and "logged" not in preview.info


# ---- a click in the dashboard

def click(board, phase, i):
    key = board.run_name, "loss", phase, "batch"
    board.curves.pick(key, board.curves.traces[key], type("Points", (), {"point_inds": [i]}), None)


def test_clicks_while_it_trains_change_no_bit(trainer_of, tmp_path):
    looked, clicking = [], threading.Event()
    for name in ("alone", "watched"):
        trainer = trainer_of("own", model_options={"dropout": .5}, folder=tmp_path / name, max_epochs=3, max_batches_per_epoch_training=4)
        board = TrainingDashboard(trainer, seconds=0.)
        if name == "watched": trainer.control.on_batch_end.append(lambda row: clicking.wait(30))
        board.start()
        while name == "watched" and board.is_running:
            if not board.curves.traces.get((board.run_name, "loss", "training", "batch")): time.sleep(.01); continue
            running = trainer.control.is_running
            clicking.set()
            click(board, "training", 0)
            assert board.error == "" and "now" in board.preview.info, board.preview.info
            looked.append(running)
        assert board.wait(60) == "ended" and board.exception is None
        made = bits(trainer.model), [o["loss"] for o in read_rows(trainer.experiment_folder / "logs" / "batches.jsonl")]
        if name == "alone": alone = made
        board.close()
    assert any(looked) and same(made[0], alone[0]) and made[1] == alone[1]


def test_a_function_that_fails_between_batches_fails_where_it_was_asked_for(trainer_of):
    control, threads = trainer_of().control, []
    assert between_batches(control, lambda: 7) == 7 and control.on_batch_end == []
    with pytest.raises(ZeroDivisionError): between_batches(control, lambda: 1/0)
    control.state = "training"
    with pytest.raises(TimeoutError, match="no batch within 0.05 s"): between_batches(control, lambda: 7, seconds=.05)
    ender = threading.Timer(.1, lambda: control.tell(control.on_batch_end, {}))
    ender.start()
    assert between_batches(control, lambda: threads.append(threading.current_thread())) is None
    assert threads == [ender] and control.on_batch_end == []


def test_a_folder_says_where_its_batches_open(trainer_of):
    trainer = trainer_of()
    trainer.train_and_validate()
    board = TrainingDashboard(trainer.experiment_folder)
    click(board, "training", 1)
    assert board.preview is None and "opens where its trainer is" in board.message.value
    board.close()
    board = TrainingDashboard(trainer)
    click(board, "validation", 0)
    row = [o for o in read_rows(trainer.experiment_folder / "logs" / "batches.jsonl") if o["phase"] == "validation"][0]
    assert f"logged loss {row['loss']:.4g}, now {row['loss']:.4g}" in board.preview.info and "validation batch 1" in board.still()
    board.close()
