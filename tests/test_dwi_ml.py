"""dwi_ml both ways: its Learn2Track and Transformer folders open here, ours open there or are refused there, and a script written for it is told what to use.

data/dwi_ml_api.json has the facts of dwi_ml 1.0. The tables of docs/migration_from_dwi_ml.md are made of core/dwi_ml.py: python tests/test_dwi_ml.py writes
them again.
"""
import ast
import importlib
import inspect
import json
import math
import pkgutil
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dwiml_nb.all as door
from dwiml_nb.batch.augment import draw_splits, split_lengths
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import BatchIds, DWIMLBatchIDSampler
from dwiml_nb.cli.common import anno_parser
from dwiml_nb.core.dwi_ml import ARGUMENTS, ATTRIBUTES, CALLED, COMMANDS, DOOR, OF_CLASSES, OPTIONS, Works, told
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import options_of
from dwiml_nb.core.sphere import sphere_vertices
from dwiml_nb.core.volume import neighborhood_vectors
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import load_model
from dwiml_nb.models.embeddings import names_here
from dwiml_nb.models.learn2track import DWI_ML_GETTERS, Learn2TrackModel, dwi_ml_problems
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

ROOT = Path(__file__).resolve().parent.parent
DATA, DOCS = ROOT / "tests" / "data", ROOT / "docs" / "migration_from_dwi_ml.md"
API = json.loads((DATA / "dwi_ml_api.json").read_text())

THEIRS = dict(nb_features=6, rnn_layer_sizes=[5, 4], streamline_space="vox", legacy_half_voxel=True)
GRID = dict(neighborhood_type="grid", neighborhood_radius=1, neighborhood_resolution=.5)
CNN = dict(input_embedding_key="cnn_embedding", nb_cnn_filters=[3, 2], kernel_size=[2, 2], **GRID)
CASES = {
    "defaults": {}, "gru": dict(rnn_key="gru"), "one layer": dict(rnn_layer_sizes=[5], dropout=.1), "skip": dict(use_skip_connection=True),
    "norm": dict(use_layer_normalization=True), "skip and norm": dict(rnn_key="gru", use_skip_connection=True, use_layer_normalization=True),
    "axes": dict(neighborhood_type="axes", neighborhood_radius=2, neighborhood_resolution=1.), "grid": GRID,
    "nn": dict(input_embedding_key="nn_embedding", input_embedded_size=7, **GRID), "cnn": CNN,
    "cnn of one layer": {**CNN, "nb_cnn_filters": [3], "kernel_size": [3]},
    "cnn of three layers": {**CNN, "neighborhood_radius": 2, "nb_cnn_filters": [4, 3, 2], "kernel_size": [3, 1, 2], "dropout": .2},
    "previous": dict(nb_previous_dirs=2, normalize_prev_dirs=True),
    "nn of previous": dict(nb_previous_dirs=1, prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=4),
    "eos": dict(dg_args=dict(add_eos=True, eos_weight=.5, dropout=.1)), "step": dict(step_size=1), "points": dict(nb_points=20),
    "compressed": dict(compress_lines=.1, dg_key="l2-regression"), "normalised": dict(dg_args=dict(normalize_targets=1., normalize_outputs=1.)),
    "sphere": dict(dg_key="sphere-classification"), "dropout of a whole number": dict(dropout=0),
    "l2": dict(dg_key="l2-regression", dg_args=dict(normalize_targets=1.)), "cosine and l2": dict(dg_key="cosine-plus-l2-regression", dg_args=dict(add_eos=True)),
    "smooth": dict(dg_key="smooth-sphere-classification", dg_args=dict(sphere="repulsion200")),
    "gaussian": dict(dg_key="gaussian", dg_args=dict(normalize_targets=1., entropy_weight=.1, add_eos=True, eos_weight=.5)),
    "fisher": dict(dg_key="fisher-von-mises", dg_args=dict(add_eos=True, dropout=.1)),
    "sphere and eos": dict(dg_key="sphere-classification", dg_args=dict(add_eos=True, sphere="repulsion100", dropout=.1)),
    "all": dict(nb_previous_dirs=2, prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=5, use_skip_connection=True,
                use_layer_normalization=True, dg_args=dict(add_eos=True), experiment_name="all", **CNN),
}
TRANSFORMER = dict(nb_features=6, input_embedded_size=16, nheads=4, n_layers_e=2, max_len=30, streamline_space="vox", legacy_half_voxel=True)
TRANSFORMERS = {
    "tts": (TransformerSrcOnlyModel, {}), "tts norm first": (TransformerSrcOnlyModel, dict(norm_first=True, activation="gelu", dropout_rate=0)),
    "tts of the input as it is": (TransformerSrcOnlyModel, dict(input_embedding_key="no_embedding", input_embedded_size=None, nheads=3)),
    "tts and eos": (TransformerSrcOnlyModel, dict(dg_args=dict(add_eos=True), ffnn_hidden_size=5, **GRID)), "ttst": (TransformerSrcAndTgtModel, dict(target_embedded_size=8)),
    "ttst of classes": (TransformerSrcAndTgtModel, dict(target_embedded_size=4, sos_token_type="repulsion100", dg_key="sphere-classification")),
    "ttst of labels as they are": (TransformerSrcAndTgtModel, dict(target_embedding_key="no_embedding")), "tto": (OriginalTransformerModel, {}),
    "tto of another depth": (OriginalTransformerModel, dict(n_layers_d=1, sos_token_type="symmetric362", step_size=1., experiment_name="deep")),
}
CASES |= TRANSFORMERS


def built(**options):
    torch.manual_seed(0)
    return Learn2TrackModel(**{**THEIRS, **options})


def of_case(case):
    "The model of a case, and the name of its class."
    if case not in TRANSFORMERS: return built(**CASES[case]), "Learn2TrackModel"
    cls, options = TRANSFORMERS[case]
    torch.manual_seed(0)
    return cls(**{**TRANSFORMER, **options}), cls.__name__


# ---- names of parameters

def parameters_in_dwi_ml(p, kind="Learn2TrackModel"):
    "Name -> shape of every parameter of the model that dwi_ml makes of a parameters.json."
    table, getter, r, filters, kernel = API["parameters"], p["dg_args"] or {}, p["neighborhood_radius"] or 0, p["nb_cnn_filters"] or [], p["kernel_size"] or []
    K = {None: 1, "axes": 1 + 6*r, "grid": (2*r + 1)**3}[p["neighborhood_type"]]
    cube = (2*r + 1 - sum(k - 1 for k in kernel))**3
    size = {"no_embedding": p["nb_features"]*K, "nn_embedding": p["input_embedded_size"], "cnn_embedding": cube*(filters or [0])[-1]}
    values = dict(F=p["nb_features"], K=K, E=p["input_embedded_size"], eos=int(getter.get("add_eos", False)), filters=filters, kernel=kernel,
                  V=len(sphere_vertices(getter.get("sphere", "symmetric724"))), N=getter.get("nb_gaussians", 3))
    parts = [("input_embedding_layer", p["input_embedding_key"], len(filters)), ("direction_getter", p["dg_key"], 1)]
    more, own = (of_learn2track if kind == "Learn2TrackModel" else of_transformers)(p, size[p["input_embedding_key"]])
    values |= own; values["half"] = math.ceil(values["R"]/2)
    return {f"{module}.{name.format(i=i)}": [eval(o, {}, {**values, "i": i}) for o in shape]      # `shape` is our own text
            for module, kind, layers in parts + more for name, shape in table[module][kind].items() for i in range(layers if "{i}" in name else 1)}


def of_learn2track(p, embedded):
    "Its own modules, and what the letters of their shapes stand for."
    n, H = p["nb_previous_dirs"], list(p["rnn_layer_sizes"])
    D = (p["prev_dirs_embedded_size"] or 3*n)*bool(n)
    first = embedded + D
    parts = [("rnn_model", "layers", len(H))]
    if n: parts.append(("prev_dirs_embedding", p["prev_dirs_embedding_key"] or "no_embedding", 1))
    if p["use_layer_normalization"]: parts.append(("rnn_model", "use_layer_normalization", len(H)))
    return parts, dict(n=n, D=D, G={"lstm": 4, "gru": 3}[p["rnn_key"]], H=H, B=[first, *(h + first*p["use_skip_connection"] for h in H)],
                       R=sum(H) + first if p["use_skip_connection"] else H[-1])


def of_transformers(p, embedded):
    "The same for the three Transformers."
    tokens = 4 if p.get("sos_token_type", "as_label") == "as_label" else len(sphere_vertices(p["sos_token_type"])) + 1
    T = embedded if "n_layers_d" in p else p.get("target_embedded_size", 0) or tokens
    D = embedded + T*("target_embedded_size" in p)
    parts = [("position_encoding_layer", p["positional_encoding_key"], 1)]
    if "sos_token_type" in p: parts.append(("embedding_layer_t", p["target_embedding_key"], 1))
    stacks = {"encoder": p["n_layers_e"], "decoder": p["n_layers_d"]} if "n_layers_d" in p else {"layers": p["n_layers_e"]}
    return parts + [("modified_torch_transformer", stack, layers) for stack, layers in stacks.items()], dict(
        D=D, R=D, T=T, tokens=tokens, max_len=p["max_len"], ff=p["ffnn_hidden_size"] or D//2)


def shapes(weights): return {k: list(v.shape) for k, v in weights.items()}


@pytest.mark.parametrize("folder", sorted((DATA / "dwi_ml_models").iterdir()), ids=lambda folder: folder.name)
def test_the_table_of_names_is_that_of_dwi_ml(folder):
    "What dwi_ml itself wrote has these parameters and no others."
    weights = torch.load(folder/"model_state.pkl", weights_only=True)
    assert shapes(weights) == parameters_in_dwi_ml(json.loads((folder/"parameters.json").read_text()), (folder/"model_type.txt").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_folder_opens_in_dwi_ml(case, tmp_path):
    "Each option: dwi_ml's constructors take what parameters.json says, and its layers what model_state.pkl has."
    model, kind = of_case(case)
    assert dwi_ml_problems(model) == []
    model.save_params_and_state(tmp_path/"model")
    params = json.loads((tmp_path/"model"/"parameters.json").read_text())
    constructor(API[kind]).bind(**params)
    constructor(API["direction_getters"][params["dg_key"]]).bind(input_size=1, **params["dg_args"] or {})
    assert isinstance(params["dropout" if "dropout" in params else "dropout_rate"], float) and isinstance(params["nb_features"], int)
    assert shapes(torch.load(tmp_path/"model"/"model_state.pkl", weights_only=True)) == parameters_in_dwi_ml(params, kind)
    again = load_model(tmp_path/"model")
    assert again.what_is_saved()[0] == params and (kind != "Learn2TrackModel" or again.params_for_checkpoint == model.params_for_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_dwi_ml_opens(case, tmp_path):
    "Written as dwi_ml does: its arguments, its names, random weights."
    model, kind = of_case(case)
    params = model.what_is_saved()[0]
    weights = {k: torch.randn(shape) for k, shape in parameters_in_dwi_ml(params, kind).items()}
    (tmp_path/"parameters.json").write_text(json.dumps(params, indent=4, separators=(",", ": ")))
    (tmp_path/"model_type.txt").write_text(kind)
    torch.save(weights, tmp_path/"model_state.pkl")
    model = load_model(tmp_path)
    assert (model.streamline_space, model.legacy_half_voxel, model.training) == ("vox", True, False)
    found = model.state_dict()
    assert found.keys() == names_here(weights).keys() and all(torch.equal(found[k], v) for k, v in names_here(weights).items())


def constructor(arguments):
    "The signature of a constructor of dwi_ml."
    kind, none = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    return inspect.Signature([inspect.Parameter(k, kind, default=none if v == "required" else v) for k, v in arguments.items()])


def test_the_getters_of_dwi_ml():
    "The options that we take for dwi_ml's are dwi_ml's."
    for key, options in DWI_ML_GETTERS.items(): assert set(options) == set(API["direction_getters"][key]) - {"input_size"}


@pytest.mark.parametrize("change", [
    dict(streamline_space="voxmm"), dict(legacy_half_voxel=False), dict(rnn_key=dict(key="gru", bias=False)), dict(dg_args=dict(axis_head=True)),
    dict(dg_args=dict(axis_head=False)), dict(dg_key="gaussian-mixture"), dict(dg_key="fisher-von-mises-mixture"), dict(dg_key="cos-plus-l2-regression"),
    dict(dg_key="fisher-von-mises", dg_args=dict(max_kappa=9.)), dict(dg_args=dict(add_eos=True, normalize_outputs=1.)), dict(neighborhood_type="axes"),
    dict(nb_previous_dirs=None), dict(input_embedding_key=dict(key="nn_embedding", output_size=3)), {**CNN, "nb_cnn_filters": 3, "kernel_size": 3},
    {**CNN, "input_embedded_size": 9}, {**CNN, "neighborhood_radius": 3, "nb_cnn_filters": [2], "kernel_size": [2]}], ids=str)
def test_every_other_model_is_refused_by_dwi_ml(change, tmp_path):
    "Its folder keeps what dwi_ml has no word for."
    model = built(**change)
    assert len(dwi_ml_problems(model)) >= 1
    model.save_params_and_state(tmp_path/"model")
    params = json.loads((tmp_path/"model"/"parameters.json").read_text())
    assert params == json.loads(json.dumps(model.params_for_checkpoint))
    with pytest.raises(TypeError, match="unexpected keyword argument '(streamline_space|legacy_half_voxel)'"): constructor(API["Learn2TrackModel"]).bind(**params)
    assert load_model(tmp_path/"model").params_for_checkpoint == model.params_for_checkpoint


@pytest.mark.parametrize("cls, change, says", [
    (TransformerSrcOnlyModel, dict(positional_encoding_key="rotary"), "sinusoidal"), (TransformerSrcOnlyModel, dict(window=40), "window"), (OriginalTransformerModel, dict(streamline_space="voxmm"), "streamline_space"),
    (TransformerSrcOnlyModel, {**CNN, "nb_cnn_filters": [3, 4], "input_embedded_size": None}, "no CNN"),
    (TransformerSrcAndTgtModel, dict(target_embedding_key=dict(key="nn_embedding", output_size=8)), "target_embedding_key"),
    (OriginalTransformerModel, dict(input_embedding_key="no_embedding", input_embedded_size=None, nheads=2), "input_embedded_size is a number")], ids=str)
def test_every_other_transformer_is_refused_by_dwi_ml(cls, change, says, tmp_path):
    model = cls(**{**TRANSFORMER, **change})
    assert any(says in o for o in dwi_ml_problems(model))
    model.save_params_and_state(tmp_path/"model")
    params = json.loads((tmp_path/"model"/"parameters.json").read_text())
    with pytest.raises(TypeError, match="unexpected keyword argument"): constructor(API[cls.__name__]).bind(**params)
    assert load_model(tmp_path/"model").params_for_checkpoint == model.params_for_checkpoint


def test_a_child_class_keeps_its_own_words(tmp_path):
    class Mine(Learn2TrackModel): pass
    model = Mine(**THEIRS)
    assert "no such class" in dwi_ml_problems(model)[0]
    model.save_params_and_state(tmp_path/"model")
    assert json.loads((tmp_path/"model"/"parameters.json").read_text())["legacy_half_voxel"] is True


def test_a_cnn_computes_what_dwi_ml_computes():
    "Each neighbour in the place of its vector, convolutions with ReLU, filters last."
    model = built(**{**CNN, "neighborhood_resolution": .3})
    weights = model.what_is_saved()[1]
    w0, b0, w1, b1 = (weights[f"input_embedding_layer.cnn_{i}.{kind}"] for i in (0, 1) for kind in ("weight", "bias"))
    rows = torch.randn(4, 27*6)
    cube = torch.zeros(4, 6, 3, 3, 3)
    for k, (x, y, z) in enumerate((neighborhood_vectors("grid", 1, .3)/.3).round().long() + 1): cube[:, :, x, y, z] = rows[:, 6*k:6*k + 6]
    expected = F.relu(F.conv3d(F.relu(F.conv3d(cube, w0, b0)), w1, b1)).permute(0, 2, 3, 4, 1).flatten(1)
    assert torch.allclose(model.input_embedding_layer(rows), expected, atol=1e-6)


def test_a_cnn_folder_from_before_opens(tmp_path):
    "With our names and our arguments, as 0.1 wrote every model."
    model = built(**CNN)
    model.save_params_and_state(tmp_path/"model")
    (tmp_path/"model"/"parameters.json").write_text(json.dumps(model.params_for_checkpoint))
    torch.save(model.state_dict(), tmp_path/"model"/"model_state.pkl")
    again = load_model(tmp_path/"model")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_model_of_one_folder_and_weights_of_another(tmp_path):
    "The advice can be followed: which argument differs; or that the two files are not of one model."
    small, other = built(), built(rnn_layer_sizes=[5, 3])
    small.save_params_and_state(tmp_path/"small")
    with pytest.raises(DataProblem, match=r"build the model with rnn_layer_sizes=\[5, 4\], as parameters.json says"): other.load_state(tmp_path/"small")
    torch.save(other.state_dict(), tmp_path/"small"/"model_state.pkl")
    with pytest.raises(DataProblem, match="copy both again, from one folder"): load_model(tmp_path/"small")


def test_older_arguments_of_dwi_ml(tmp_path):
    "Folders written before 1.0, and by branches with other options, which were off."
    params, weights = built(input_embedding_key="nn_embedding", input_embedded_size=7).what_is_saved()
    before = {"nb_features": "nb_features_per_point", "input_embedded_size": "input_embedding_nn_out_size", "nb_cnn_filters": "input_embedding_cnn_nb_filters",
              "kernel_size": "input_embedding_cnn_kernel_size"}
    was = {before.get(k, k): v for k, v in params.items()} | dict(add_raw_coords_to_input=False, start_from_copy_prev=False, use_bundle_ids=False, num_bundles=0)
    (tmp_path/"parameters.json").write_text(json.dumps(was))
    (tmp_path/"model_type.txt").write_text("Learn2TrackModel")
    torch.save(weights, tmp_path/"model_state.pkl")
    assert load_model(tmp_path).what_is_saved()[0] == params
    (tmp_path/"parameters.json").write_text(json.dumps(was | dict(start_from_copy_prev=True)))
    with pytest.raises(DataProblem, match="takes no argument 'start_from_copy_prev'"): load_model(tmp_path)


@pytest.mark.parametrize("change, says", [(dict(dg_key="gausian"), "unknown direction getter 'gausian'.*Did you mean 'gaussian'"), (dict(neighborhood_radius=[1., 3.]), "neighborhood_radius is a whole number"),
                                          (dict(rnn_layer_sizes=None), "no model can be built with these arguments")], ids=str)
def test_arguments_that_make_no_model_are_told(tmp_path, change, says):
    "A getter that nobody has, or a value that makes no sense: one sentence with the file."
    shutil.copytree(DATA/"dwi_ml_models"/"l2t_lstm", tmp_path/"model")
    file = tmp_path/"model"/"parameters.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataProblem, match=says) as told: load_model(tmp_path/"model")
    assert str(file) in str(told.value)


# ---- names in scripts

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study")))
    dataset.load_data()
    yield dataset
    dataset.close()


@pytest.fixture(scope="module")
def objects(toy, tmp_path_factory):
    "What the tables call by these names."
    model = built(nb_features=toy.nb_features["input"], step_size=1., nb_previous_dirs=1, **CNN)
    sampler = DWIMLBatchIDSampler(toy, "bundles", batch_size_training=20)
    loader = DWIMLBatchLoaderOneInput(toy, model, "input", "bundles", split_ratio=.5)
    trainer = DWIMLTrainerOneInput(model, tmp_path_factory.mktemp("runs"), "run", sampler, loader, max_epochs=2, max_batches_per_epoch_training=1,
                                   max_batches_per_epoch_validation=1, device="cpu")
    subject = toy.training.subject(0)
    tracker = Tracker(model, toy, subject.subj_id, "input")
    return dict(dataset=toy, subset=toy.training, subject=subject, sft_data=subject.streamlines["bundles"], mri_data=subject.volumes["input"], model=model,
                batch_sampler=sampler, batch_loader=loader, trainer=trainer, tracker=tracker, batch_ids=BatchIds(), batch=None, loss=None, checkpoint=None,
                lines=None, ids_per_subj=None, seeds=None, tractogram=door.Tractogram([]), subjects=toy.training.subjs_data_list)


OWNERS = {"MultiSubjectDataset": "dataset", "MultisubjectSubset": "subset", "SubjectData": "subject", "MRIData": "mri_data", "SFTData": "sft_data",
          "SubjectsDataList": "subjects", "DWIMLBatchIDSampler": "batch_sampler", "DWIMLBatchLoader": "batch_loader", "MainModelAbstract": "model",
          "DWIMLTrainer": "trainer", "Tracker": "tracker"}


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_attributes(objects, owner):
    "Each works, or is an error that says what to use; hasattr tells the truth."
    obj = objects[OWNERS[owner]]
    assert any(c.__name__ == owner for c in type(obj).__mro__)
    for name, here in ATTRIBUTES[owner].items():
        assert name not in dir(obj) or name in OF_CLASSES[owner]
        if isinstance(here, Works):
            getattr(obj, name)
            continue
        assert not hasattr(obj, name)
        with pytest.raises(AttributeError, match=re.escape(f"does not have dwi_ml's {name}. {told(here)}")): getattr(obj, name)
    with pytest.raises(AttributeError, match="no attribute 'something_else'"): obj.something_else


def test_containers_of_dwi_ml(toy):
    "A script's way through the data, line by line as dwi_ml has it."
    subset = toy.training_set
    group = toy.volume_groups.index("input")
    assert toy.nb_features[group] == toy.nb_features["input"] and subset.nb_subjects == len(subset) and toy.validation_set is toy.validation
    assert subset.total_nb_streamlines[0] == subset.total_nb_streamlines("bundles") == sum(len(s.sft_data_list[0]) for s in subset.subjs_data_list)
    assert subset.total_nb_points[0] == len(subset.streamline_lengths[0].repeat(subset.streamline_lengths[0]))
    assert subset.streamline_ids_per_subj[0] == subset.streamline_ids_per_subj("bundles")
    assert subset.streamline_lengths_mm[0].shape == (subset.total_nb_streamlines[0],)
    subject = subset.subjs_data_list.get_subj_with_handle(1)
    assert torch.equal(subject.mri_data_list[group].as_tensor("cpu"), subset.get_volume(1, "input"))
    sft = subject.sft_data_list[0].as_sft([3, 5])
    assert (str(sft.space), str(sft.origin)) == ("Space.VOX", "Origin.TRACKVIS")
    for line, ours in zip(sft.streamlines, subset.get_lines(1, "bundles", [3, 5])): assert np.array_equal(line, ours.numpy())
    with pytest.raises(KeyError): toy.nb_features["other"]
    with pytest.raises(KeyError): toy.nb_features[9]


@pytest.mark.parametrize("owner", ARGUMENTS)
def test_arguments(objects, owner):
    cls = next(c for c in type(objects[OWNERS[owner]]).__mro__ if c.__name__ == owner)
    for name, here in ARGUMENTS[owner].items():
        with pytest.raises(TypeError, match=re.escape(f"does not take dwi_ml's {name}. {told(here)}")): cls(**{name: 1})
    class Mine(cls):
        def __init__(self, rng, log_level): self.kept = rng
    if not issubclass(cls, torch.nn.Module): assert Mine(rng=3, log_level="INFO").kept == 3          # a child's own


def test_a_model_of_the_order_and_the_arguments_of_dwi_ml():
    "Parts in the order that dwi_ml's own models have; what they hand on and nothing here takes is named."
    class Mine(door.ModelWithPreviousDirections, door.ModelWithDirectionGetter, door.ModelWithNeighborhood, door.ModelWithOneInput):
        def __init__(self, log=None, **options):
            super().__init__(experiment_name="mine", **options)
            self.layer = torch.nn.Linear(self.computed_input_embedded_size + self.prev_dirs_embedded_size, 4)
            self.instantiate_direction_getter(4)
    model = Mine(nb_features=2, nb_previous_dirs=2, neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=1.)
    assert (model.layer.in_features, model.nb_neighbors, model.input_embedding_key, model.prev_dirs_embedding_key) == (20, 7, *["no_embedding"]*2)
    assert Mine(nb_features=2, nb_previous_dirs=1).prev_dirs_embedded_size == 3
    class Logs(Mine):
        def __init__(self, log_level): super().__init__(nb_features=2, log_level=log_level)
    for make in (lambda: Logs("INFO"), lambda: Mine(nb_features=2, log_level="INFO")):
        with pytest.raises(TypeError, match=r"does not take dwi_ml's log_level. Use `logging.basicConfig\(level='INFO'\)` once"): make()
    with pytest.raises(TypeError, match="MainModelAbstract takes no 'step_siz'. Did you mean 'step_size'"): Mine(nb_features=2, step_siz=1.)


def test_a_data_loader_of_ones_own(objects):
    "As dwi_ml's trainer makes it: each batch keeps its place, so that it has its own draws."
    sampler, loader = objects["batch_sampler"], objects["batch_loader"]
    made = list(torch.utils.data.DataLoader(objects["dataset"].training_set, batch_sampler=sampler, collate_fn=loader.load_batch_streamlines))
    assert [batch.place for batch in made] == [("training", 0, i) for i in range(len(sampler))]
    for (lines, ids_per_subj), ids in zip(made, sampler.batches("training", 0)):
        again, again_per_subj = loader.load_batch_streamlines(ids)
        assert torch.equal(lines.data, again.data) and ids_per_subj == again_per_subj
    assert made[0].draws.split is not None


def test_methods_of_classes():
    "Asked of the class, as scripts that resume do."
    for cls in (DWIMLBatchIDSampler, DWIMLBatchLoaderOneInput, DWIMLTrainerOneInput, Learn2TrackModel):
        owner = next(c.__name__ for c in cls.__mro__ if c.__name__ in OF_CLASSES)
        for name in OF_CLASSES[owner]:
            assert not hasattr(cls, name)
            with pytest.raises(AttributeError, match=re.escape(f"{cls.__name__} does not have dwi_ml's {name}. {told(ATTRIBUTES[owner][name])}")): getattr(cls, name)


def test_all_old_arguments_at_once(toy):
    with pytest.raises(TypeError, match="dwi_ml's rng. Use `seed=1234`. DWIMLBatchIDSampler does not take dwi_ml's log_level"):
        DWIMLBatchIDSampler(toy, "bundles", rng=1, log_level="INFO")


def test_compress_lines_is_a_number():
    for how in (dict(compress_lines=True), dict(compress_lines=True, **CNN)):
        with pytest.raises(ValueError, match="found True: it is the tolerance in mm, 0.01 in dwi_ml's commands"): built(**how)


def test_methods_that_only_dwi_ml_calls(objects):
    for owner, names in CALLED.items():
        cls = next(c for c in type(objects[OWNERS[owner]]).__mro__ if c.__name__ == owner)
        for name, here in names.items():
            with pytest.raises(TypeError, match=re.escape(told(here))): type("Mine", (cls,), {name: lambda self: None})


@pytest.mark.parametrize("name", DOOR)
def test_at_the_door(name):
    with pytest.raises(ImportError, match=re.escape(f"dwiml_nb does not have dwi_ml's {name}. {told(DOOR[name])}")): exec(f"from dwiml_nb.all import {name}")
    assert not hasattr(door, name)


def test_an_experiment_of_dwi_ml(tmp_path):
    "It tracks, it is drawn, and its training is refused in a sentence."
    folder = tmp_path/"theirs"
    for part in ("best_model", "checkpoint/model"): shutil.copytree(DATA/"dwi_ml_models"/"l2t_lstm", folder/part)
    (folder/"logs").mkdir()
    for name in ("train_loss", "valid_local_loss", "grad_norm"): np.save(folder/"logs"/f"{name}_monitor_per_epoch.npy", [.9, .5])
    (folder/"checkpoint"/"checkpoint_state.pkl").write_bytes(b"a pickle")
    record = {"Date": "2026", "hdf5 file": str(DATA/"dwi_ml_study"/"study_v1.hdf5"), "Trainer params": {"max_epochs": 2}, "Sampler params": {}, "Model params": {},
              "Loader params": {"streamline_group_name": "streamlines", "rng": 1234, "input_group_name": "input"}, "Patience": None, "Patience_delta": 1e-6}
    (folder/"parameters_latest.json").write_text(json.dumps(record, indent=4))
    lines = door.track_from_model(folder, "subj-04", tmp_path/"lines.trx", "wm_mask", nt=20, min_length_mm=0, device="cpu")
    assert len(lines) > 0
    logs = door.read_logs(folder)
    assert (logs["train_loss"], logs["valid_loss"], logs["epoch"], door.read_logs(folder, "batches")) == ([.9, .5], [.9, .5], [0, 1], {})
    assert len(door.plot_logs([folder], {"loss": ["train_loss", "valid_loss"]})) == 1
    with pytest.raises(DataProblem, match="this training of dwi_ml cannot go on here"): trainer_from_folder(tmp_path, "theirs")
    (folder/"logs"/"grad_norm_monitor_per_epoch.npy").write_bytes(b"no array")
    with pytest.raises(DataProblem, match="this log is no list of numbers"): door.read_logs(folder)


def test_a_run_of_a_model_for_dwi_ml_resumes(objects):
    "Its folder has the words of dwi_ml, its record has ours."
    trainer = objects["trainer"]
    trainer.control.on_epoch_end.append(lambda row: trainer.control.request_stop())
    trainer.train_and_validate()
    folder = trainer.experiment_folder
    assert "streamline_space" not in json.loads((folder/"checkpoint"/"model"/"parameters.json").read_text())
    assert "streamline_space" in json.loads((folder/"parameters_latest.json").read_text())["model"]["params"]
    again = trainer_from_folder(folder.parent, folder.name, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), trainer.model.state_dict().values(), strict=True))
    assert again.epoch == 1


def test_what_differs_on_purpose(toy):
    "Batches of even sizes; short lines are not cut, and none is lost."
    sizes = [batch.nb_streamlines for batch in DWIMLBatchIDSampler(toy, "bundles", batch_size_training=100).batches("training")]
    assert sum(sizes) == toy.training.total_nb_streamlines("bundles") and max(sizes) - min(sizes) <= 1 and min(sizes) > 50
    lengths = torch.tensor([12]*50 + [13]*50)
    at = draw_splits(lengths, 1., np.random.default_rng(0))
    assert not at[:50].any() and at[50:].all() and int(split_lengths(lengths, at).sum()) >= int(lengths.sum())


# ---- what the tables promise of this library

SCRIPTS = dict(line.split("=") for line in re.search(r"console_scripts =\n((?:    .*\n)+)", (ROOT/"settings.ini").read_text())[1].split())
UNKNOWN = object()


def command(name):
    module, _, function = SCRIPTS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def spans(text): return re.findall(r"`([^`]+)`", text)


def check(node, objects):
    "The object that an expression stands for, as far as it can be known without running it; an error if a name is not there."
    if isinstance(node, ast.Name):
        for place in (objects, vars(door), dict(len=len, dict=dict, torch=torch), {"logging": __import__("logging"), "forward": 0, "compute_loss": 0, "out": 0}):
            if node.id in place: return UNKNOWN if place[node.id] is None else place[node.id]
        raise NameError(node.id)
    if isinstance(node, ast.Attribute):
        obj = check(node.value, objects)
        return UNKNOWN if obj is UNKNOWN else getattr(obj, node.attr)
    if isinstance(node, ast.Call):
        f, arguments = check(node.func, objects), [check(o, objects) for o in node.args]
        if f is UNKNOWN or f is dict: return UNKNOWN
        known = list(inspect.signature(f).parameters)
        for k in node.keywords:
            if known != ["args", "kwargs"] and k.arg not in known and "kwargs" not in known: raise TypeError(f"{ast.unparse(node)}: no {k.arg} among {known}")
            if k.arg == "dg_args":
                key = next((o.value.value for o in node.keywords if o.arg == "dg_key"), "cosine-regression")
                assert {o.arg for o in k.value.keywords} <= set(options_of(door.DIRECTION_GETTERS[key]))
        return f(*arguments) if ast.unparse(node).startswith("subset.streamlines_of") else UNKNOWN
    if isinstance(node, ast.Constant): return node.value
    if isinstance(node, ast.BinOp): check(node.left, objects); check(node.right, objects); return UNKNOWN
    raise TypeError(ast.unparse(node))


def exists(span, objects, owner=None, ours=None):
    "Is what stands in backticks there?"
    if span in SCRIPTS: return command(span)
    if span.startswith("-"): assert span in anno_parser(command(ours))._option_string_actions, f"{ours} has no {span}"
    elif re.match(r"\w+=", span): assert any(span.partition("=")[0] in inspect.signature(c.__init__).parameters for c in owner.__mro__), f"{owner} takes no {span}"
    elif span.startswith("dwiml_nb."): pkgutil.resolve_name(span)
    else: check(ast.parse(span, mode="eval").body, objects)


def test_what_the_tables_name_is_there(objects):
    for owner, names in {**ATTRIBUTES, **CALLED}.items():
        for here in names.values():
            for span in spans(getattr(here, "here", here)): exists(span, objects)
    for owner, names in ARGUMENTS.items():
        for here in names.values():
            for span in spans(here): exists(span, objects, type(objects[OWNERS[owner]]))
    for here in (*DOOR.values(), *COMMANDS.values()):
        for span in spans(here): exists(span, objects)
    for name, options in OPTIONS.items():
        for here in options.values():
            for span in spans(here): exists(span, objects, ours=COMMANDS[name].strip("`"))


def test_every_command_and_option_of_dwi_ml_has_a_line():
    assert API["commands"].keys() <= COMMANDS.keys()
    for name, options in API["commands"].items():
        if COMMANDS[name].startswith("nothing"): continue
        assert set(options) <= set(OPTIONS.get(name, {})), name
    assert OPTIONS.keys() <= COMMANDS.keys()


@pytest.mark.parametrize("name", [name for name in OPTIONS if COMMANDS[name].strip("`") in SCRIPTS])
def test_a_command_says_what_to_use(name, capsys):
    "An option of dwi_ml that is not ours ends the command with its place here."
    ours = COMMANDS[name].strip("`")
    for option, here in OPTIONS[name].items():
        parser = anno_parser(command(ours))
        assert not (here.startswith("nothing") and option in parser._option_string_actions), f"{ours} has {option}"
        if not option.startswith("--") or option in parser._option_string_actions: continue
        with pytest.raises(SystemExit) as e: parser.error(f"unrecognized arguments: {option}")
        assert e.value.code == 2 and f"About dwi_ml's {option}: {told(here)}" in capsys.readouterr().err


# ---- the page about it

def tables():
    "Name -> the table in Markdown."
    def rows(left, right, pairs): return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {a} | {b} |" for a, b in pairs)])
    def merged(names):                          # names with the same answer share a line
        says = {k: f"works: {o.here}" if isinstance(o, Works) else "the same" if o == f"`{k}`" else o for k, o in names.items()}
        for here in dict.fromkeys(says.values()): yield ", ".join(f"`{k}`" for k in says if says[k] == here), here
    made = {f"attributes of {owner}": rows(f"`{owner}` of dwi_ml", "here", merged(names)) for owner, names in ATTRIBUTES.items()}
    made |= {f"arguments of {owner}": rows(f"`{owner}(…)` of dwi_ml", "here", merged(names)) for owner, names in ARGUMENTS.items()}
    alike = {id(options): name for name, options in reversed(OPTIONS.items())}                          # commands of one table: the first
    made |= {f"options of {name}": rows(f"`{name}`", "here", merged(options)) for name, options in OPTIONS.items() if alike[id(options)] == name}
    return made | {"door": rows("dwi_ml", "here", merged(DOOR)), "commands": rows("dwi_ml", "here", merged(COMMANDS))}


def with_tables(text):
    "The page with its tables written again."
    made = tables()
    return re.sub(r"(<!-- table: (.+?) -->\n).*?(\n<!-- end -->)", lambda m: m[1] + made[m[2]] + m[3], text, flags=re.S)


def test_the_page_has_every_table_as_it_is():
    text = DOCS.read_text()
    assert with_tables(text) == text, "write the tables again: python tests/test_dwi_ml.py"
    assert set(re.findall(r"<!-- table: (.+?) -->", text)) == tables().keys()


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text()))
