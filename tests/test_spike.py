"""A clicked batch: its losses per point and line under the model as it is now, and the widget that shows them."""
import torch
import pytest
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


@pytest.fixture(scope="module")
def study(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


class Guess(MainModelAbstract):
    "A loss without average_results."
    def __init__(self, nb_features, **kwargs):
        super().__init__(**kwargs)
        self.layer = torch.nn.Linear(nb_features, 3)
    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]
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
    "regression": lambda study: learn2track(study),
    "sphere": lambda study: learn2track(study, dg_key="sphere-classification"),
    "end": lambda study: learn2track(study, dg_args={"add_eos": True}),
    "own": lambda study: Guess(study.nb_features["input"], step_size=2.),
    "auto-encoder": lambda study: ModelAE(),
    "registered": bands,
}


@pytest.fixture
def trainer_of(study, tmp_path):
    "A function that makes a small trainer of a kind of model."
    def make(kind="regression", augment=None, **options):
        torch.manual_seed(0)
        model, groups = MODELS[kind](study), {"streamline_group_name": "bundles", **(augment or {})}
        cls, loader = {"auto-encoder": (DWIMLTrainer, DWIMLBatchLoader), "registered": (RegisteredTrainer, RegisteredBatchLoader)}.get(
            kind, (DWIMLTrainerOneInput, DWIMLBatchLoaderOneInput))
        if loader is not DWIMLBatchLoader: groups["input_group_name"] = "input"
        most = dict(max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1, max_epochs=1)
        return cls(model, tmp_path, kind, DWIMLBatchIDSampler(study, "bundles", 20, 20), loader(study, model, **groups), device="cpu",
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
    assert "now" in preview.info and "logged" not in preview.info
    preview.augmented = False
    assert preview.losses is None and preview.viewer.colour == "direction" and preview.worst.layout.display == "none"


def test_a_batch_that_does_not_exist_or_has_no_losses(trainer_of, preview_of, study):
    preview = preview_of(trainer_of())
    with pytest.raises(ValueError, match="there is no batch 1001"): preview.show_batch("training", 0, 1000)
    assert (preview.epoch, preview.index) == (0, 0)
    preview.show_batch("validation", 1, 0, loss=float("nan"), model=bands(study, Bands))
    assert preview.context == "validation" and preview.losses is None
    assert "Losses cannot be shown" in preview.info and "logged" not in preview.info
