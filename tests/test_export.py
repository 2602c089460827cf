"""Models as ONNX files: the same numbers for any number of lines and points, or no file at all."""
import gc
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dwiml_nb.runs.export as export
from dwiml_nb.study.toy import toy_study
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import train
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import need_extra
from dwiml_nb.batch.spec import InputSpec
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.padded import OnnxRecurrent, PaddedForm, padded_form
from dwiml_nb.models.parts import ModelWithDirectionGetter
from dwiml_nb.models.registered import registered_model
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel

SMALL = dict(input_embedded_size=16, nheads=2, n_layers_e=1)
AROUND = dict(neighborhood_type="grid", neighborhood_radius=1, input_embedding_key="cnn_embedding", nb_cnn_filters=[4], kernel_size=[3])
MODELS = {
    "lstm": lambda: Learn2TrackModel(2, rnn_layer_sizes=[8, 6], nb_previous_dirs=3, use_skip_connection=True, use_layer_normalization=True, normalize_prev_dirs=True,
                                     dg_key="fisher-von-mises", step_size=.5, **AROUND),
    "gru": lambda: Learn2TrackModel(4, rnn_key=dict(key="gru", num_layers=2, bias=False), rnn_layer_sizes=[8], dg_key="sphere-classification", dg_args=dict(add_eos=True)),
    "tts": lambda: TransformerSrcOnlyModel(4, dg_args=dict(add_eos=True, axis_head=True), **SMALL),
    "ttst": lambda: TransformerSrcAndTgtModel(4, target_embedded_size=8, sos_token_type="repulsion724", positional_encoding_key="rotary", window=4, max_len=20, **SMALL),
    "tto": lambda: OriginalTransformerModel(4, dg_key="gaussian", **SMALL)}


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name, tmp_path):
    "Files of all kinds of models, on other sizes than the sample, lines of one and two points among them."
    torch.manual_seed(0)
    model = MODELS[name]().train()  # its state is not touched
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    about = export.export_onnx(model, tmp_path / "model.onnx")
    assert model.training and all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert max(o["difference"] for o in about["compared"]) < 1e-5
    assert {(o["lines"], o["points"]) for o in about["compared"]} >= {(1, 2), (9, 2), (3, 1)}
    form = padded_form(model.eval())
    fed = form.sample([1, 2, 40, 17], seed=9)  # a size that the export did not look at; beyond max_len it is cut
    junk = {k: v.clone() for k, v in fed.items()}
    for k in ("inputs", "streamlines"): junk[k][torch.arange(fed[k].shape[1]) >= fed["lengths"][:, None]] = np.nan
    found, again = (export.run_onnx(tmp_path / "model.onnx", o) for o in (fed, junk))
    for k, wanted in form.expected(fed, found).items():
        np.testing.assert_allclose(found[k], wanted, atol=2e-6)
        np.testing.assert_array_equal(found[k], again[k])  # what stands in the padding is not read


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_both_ways(cls, tmp_path):
    "A layer that reads lines from both ends begins at their ends, not at the padding."
    class Net(nn.Module):
        outputs, axes = ["y"], {"x": {0: "lines", 1: "points"}, "lengths": {0: "lines"}}
        def __init__(self):
            super().__init__()
            self.layer = cls(3, 5, num_layers=2, bidirectional=True)
            self.onnx = OnnxRecurrent(self.layer)
        def forward(self, x, lengths): return self.onnx(x.transpose(0, 1), lengths).transpose(0, 1)
        def sample(self, lengths, seed=0):
            lengths = torch.tensor(lengths)
            return {"x": torch.randn(len(lengths), int(lengths.max()), 3, generator=torch.Generator().manual_seed(seed)), "lengths": lengths}
        def expected(self, fed, found):
            packed = pack_padded_sequence(fed["x"], fed["lengths"], batch_first=True, enforce_sorted=False)
            with torch.no_grad(): return {"y": pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]}
    torch.manual_seed(0)
    net = Net().eval()
    export.write_onnx(net, tmp_path / "net.onnx")
    assert max(o["difference"] for o in export.compare(tmp_path / "net.onnx", net)) < 1e-6


class TwoInputs(ModelWithDirectionGetter):
    "Two volumes, each an input with a name."
    accepts_ragged = True
    def __init__(self):
        super().__init__()
        self.input_specs = {"t1": InputSpec(3), "odf": InputSpec(2)}
        self.instantiate_direction_getter(5)
    def forward(self, t1, odf, streamlines): return t1.with_data(self.direction_getter(torch.cat([t1.data, odf.data], 1)))


@padded_form.register(TwoInputs)
class TwoForm(PaddedForm):
    def rows(self, inputs, lines, lengths): return torch.cat(inputs, 2).flatten(0, 1)


class Both(nn.Module):
    "A registered model that gets a named tuple, and gives one."
    def __init__(self, config, data_sample):
        super().__init__()
        self.lines, self.mean = nn.Linear(data_sample.rows.shape[2], 4), nn.Linear(data_sample.mean.shape[1], 4)
    def forward(self, batch): return self.lines(batch.rows).masked_fill(~batch.there[..., None], 0.) + self.mean(batch.mean)[:, None]
    def train_step(self, batch): raise NotImplementedError
    @staticmethod
    def to_tensor(data_dict):
        from collections import namedtuple
        rows = data_dict["data"]["input"]
        there = np.arange(rows.shape[1]) < data_dict["data"]["input_lengths"][:, None]
        return namedtuple("Lines", "rows there mean")(rows, there, rows.mean(1))


@pytest.mark.parametrize("name", ["ae", "two", "both", "fixed"])
def test_several_inputs_and_the_auto_encoder(name, tmp_path):
    "Each input by its name, sizes that the export did not look at, other weights are a mismatch; a size that is not free is said."
    torch.manual_seed(0)
    if name in ("both", "fixed"):
        dataset = MultiSubjectDataset(toy_study(tmp_path))
        dataset.load_data()
        model = registered_model(Both, {}, dataset, "bundles", "input", collate_fn="pad").eval()
    else: model = {"ae": ModelAE, "two": TwoInputs}[name]().eval()
    if name == "fixed":
        model.net.forward = lambda batch: model.net.lines(batch.rows)*torch.ones(len(batch.rows), 1, 1)  # len is a number, not a free size
        with pytest.raises(DataProblem, match="(?s)nothing was written.*x.shape"): export.export_onnx(model, tmp_path / "model")
        assert not list(tmp_path.glob("model*"))
        return
    about = export.export_onnx(model, tmp_path / "model")
    assert about["inputs"] == {"ae": {"streamlines": ["lines"]}, "two": {"t1": ["lines", "points"], "odf": ["lines", "points"], "streamlines": ["lines", "points"], "lengths": ["lines"]},
                               "both": {"rows": ["items", "points"], "there": ["items", "points"], "mean": ["items"]}}[name]
    form = padded_form(model)
    fed = form.sample([256]*4 if name == "ae" else [3, 50, 2], seed=4)
    found = export.run_onnx(tmp_path / "model.onnx", fed)
    for k, wanted in form.expected(fed, found).items(): np.testing.assert_allclose(found[k], wanted, atol=2e-6)
    with torch.no_grad(): next(p for p in reversed(list(model.parameters())) if p.ndim == 1).add_(.01)
    with pytest.raises(DataProblem, match="nothing was written"): export.compare(tmp_path / "model.onnx", form)


class Peeks(ModelWithDirectionGetter):
    accepts_ragged = True
    def __init__(self):
        super().__init__()
        self.input_specs = {"t1": InputSpec(5)}
        self.instantiate_direction_getter(5)
    def forward(self, t1, streamlines): return t1.with_data(self.direction_getter(t1.data))


@padded_form.register(Peeks)
class PeeksForm(PaddedForm):
    def rows(self, inputs, lines, lengths): return inputs[0][:, :int(lengths.max())].flatten(0, 1)


def test_what_torch_says_is_one_sentence_with_the_line_of_the_model(tmp_path, capfd, caplog):
    "No codes of a terminal, no advice about torch, nothing printed beside it."
    with pytest.raises(DataProblem) as e: export.export_onnx(Peeks(), tmp_path / "model")
    told, said = str(e.value), capfd.readouterr()
    assert told.startswith("a PeeksForm cannot be written as ONNX.") and "int(lengths.max())" in told and "test_export.py, line " in told and "x.shape" in told
    assert not any(word in told for word in ("x1b", "\x1b", "\n", "torch.export.export", "http")) and len(told) < 600
    assert not said.out and not said.err and not caplog.records and not list(tmp_path.iterdir())


TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}


def test_the_note_of_a_registered_model_says_what_to_feed(tmp_path):
    "Shapes and types are those of the file itself; preparation and fields are those of the class and its loader."
    class Steps(Both): step_size, nb_previous_dirs, neighborhood_type, neighborhood_radius = 2., 3, "axes", 1.
    torch.manual_seed(0)
    dataset = MultiSubjectDataset(toy_study(tmp_path)).load_data()
    model = registered_model(Steps, {}, dataset, "bundles", "input", collate_fn="pad").eval()
    note = export.export_onnx(model, tmp_path / "model")
    told = json.loads((tmp_path / "model.json").read_text())["preparation"]
    assert told == note["preparation"] and (told["step_size_mm"], told["nb_previous_dirs"], told["collate_fn"]) == (2., 3, "pad")
    session = need_extra("onnxruntime", "onnx").InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(o["name"], o["shape"], TYPES[o["dtype"]]) for o in told["inputs"]] == [(o.name, o.shape, o.type) for o in session.get_inputs()]
    assert told["inputs"][0]["shape"] == ["items", "points", 7*15] and told["inputs"][0]["comes_from"] == "to_tensor(data_dict)['rows']"
    assert told["fields"]["input"]["nb_features"] == 15 and len(told["fields"]["input"]["neighborhood_vectors_vox"]) == 7
    assert set(told["fields"]) == {"input", "bundles", "input_lengths", "bundles_lengths"} and 'data_dict["data"]["input"]' in told["to_tensor"]


def test_no_file_that_is_wrong(tmp_path, monkeypatch):
    "A mismatch leaves nothing; what is there is not replaced; a model without a form says so."
    torch.manual_seed(0)
    model = MODELS["tts"]()
    right = export.run_onnx
    monkeypatch.setattr(export, "run_onnx", lambda file, fed: {k: v + .01 for k, v in right(file, fed).items()})
    with pytest.raises(DataProblem, match="nothing was written"): export.export_onnx(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(DataProblem, match="of that name already"): export.export_onnx(model, tmp_path / "there.onnx")
    with pytest.raises(DataProblem, match="no form for padded lines"): export.export_onnx(nn.Linear(3, 3), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["there.json"] and (tmp_path / "there.json").read_text() == "mine"


def test_cards_with_best_models(tmp_path):
    "A run that goes on with the sinks has a card and safetensors of the model that is best already; weights are equal bit for bit."
    from safetensors.torch import load_file
    run = dict(data=dict(hdf5_file=str(toy_study(tmp_path)), input_group_name="input", streamline_group_name="bundles"), model=dict(name="Learn2TrackModel", rnn_layer_sizes=[4], step_size=2.),
               optimizer=dict(lr=1e-9), training=dict(experiments_path=str(tmp_path), experiment_name="<b>run", max_epochs=1, device="cpu", max_batches_per_epoch_training=1, max_batches_per_epoch_validation=1, patience_delta=1.))
    best = train(run).experiment_folder / "best_model"
    assert not (best / "README.md").exists()
    trainer_from_folder(tmp_path, "<b>run", new_max_epochs=2, sinks=["model_card", "safetensors"]).train_and_validate()  # no epoch of it is better
    weights, again = torch.load(best / "model_state.pkl", weights_only=True), load_file(best / "model.safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
    card = (best / "README.md").read_text()
    assert card.startswith("# &lt;b&gt;run") and "<b>" not in card and "| epoch | 0 |" in card


def test_the_note_of_an_experiment_is_about_its_study(tmp_path):
    "Groups and standardisation are those of the study, as long as it holds what the run was trained on."
    study = toy_study(tmp_path)
    run = dict(data=dict(hdf5_file=str(study), input_group_name="input", streamline_group_name="bundles"), model=dict(name="Learn2TrackModel", rnn_layer_sizes=[4], step_size=2.),
               training=dict(experiments_path=str(tmp_path), experiment_name="run", max_epochs=1, device="cpu", max_batches_per_epoch_training=1, max_batches_per_epoch_validation=1))
    folder = train(run).experiment_folder
    about = export.export_onnx(folder, tmp_path / "model")["data"]
    with h5py.File(study) as f: config = json.loads(f.attrs["groups_config_json"])
    wanted = {"study": str(study), "streamline_group": "bundles", "input_groups": "input", "nb_features": {"input": 15}, "standardization": {"input": config["input"]["standardization"]}, "frame": {"input": "image"}}
    assert about == wanted == export.about_data(folder)
    gc.collect()  # what the training had open
    with h5py.File(study, "r+") as f: f["sub-01/input/data"][...] = f["sub-01/input/data"][...] + 1
    assert "holds other data" in export.about_data(folder)["standardization"]
    Path(study).unlink()
    assert "not known" in export.about_data(folder)["standardization"]
