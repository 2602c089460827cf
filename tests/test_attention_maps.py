"""Attention maps: by hand and by dwi_ml's own outputs, of all lines and heads, summed up, coloured, and bad input in one sentence."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_nb.cli.attention import dwiml_visualize_weights
from dwiml_nb.cli.common import run_command
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import previous_directions
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.tractograms import read_tractogram
from dwiml_nb.evaluation.attention_maps import arranged, attention_of, line_attention, rescaled, summaries, thinner
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel
from dwiml_nb.runs.run_files import train
from dwiml_nb.study.toy import toy_study

REFERENCE = Path(__file__).parent / "data" / "dwi_ml_models"
KINDS = {"tts": TransformerSrcOnlyModel, "ttst": TransformerSrcAndTgtModel, "tto": OriginalTransformerModel}


def made(kind, **options):
    torch.manual_seed(0)
    more = {"target_embedded_size": 4} if kind == "ttst" else {}
    return KINDS[kind](5, input_embedded_size=8, nheads=2, n_layers_e=2, max_len=20, **more, **options)


def some(lengths=(4, 7, 2)):
    g = torch.Generator().manual_seed(1)
    lines = Ragged.from_list([torch.randn(n, 3, generator=g).cumsum(0) for n in lengths])
    return lines.with_data(torch.randn(len(lines.data), 5, generator=g)), lines


@pytest.mark.parametrize("window", [None, 3])
def test_the_weights_of_the_first_layer_by_hand(window):
    "Point by point, head by head: exp(q·k/√c) over what lies before."
    model, (inputs, lines) = made("tts", window=window).eval(), some()
    found = attention_of(model, inputs, lines)["encoder"][0]
    layer = model.modified_torch_transformer.layers[0].self_attn
    with torch.no_grad(): x = model.position_encoding_layer.add(model.input_embedding_layer(inputs.data), lines.point_index).double()
    bias = layer.in_proj_bias.detach().double()
    d = x.shape[1]
    q, k = (x @ layer.get_parameter(f"{name}_proj_weight").detach().double().T + bias[i*d:(i + 1)*d] for i, name in enumerate("qk"))
    for s, (first, n) in enumerate(zip(lines.offsets.tolist(), lines.lengths.tolist())):
        assert found[s].shape == (2, n, n)
        for h in range(2):
            c = slice(h*d//2, (h + 1)*d//2)
            for i in range(n):
                seen = range(max(0, i + 1 - (window or n)), i + 1)
                e = {j: math.exp(float(q[first + i, c] @ k[first + j, c])/math.sqrt(d/2)) for j in seen}
                for j in range(n): assert found[s][h, i, j] == pytest.approx(e.get(j, 0)/sum(e.values()), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_line_has_its_own(kind):
    "Of a batch or alone; the fault of dwi_ml was the maps of the first line for all, and cross maps that were the decoder's."
    model, (inputs, lines) = made(kind).train(), some()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attention_of(model, inputs, lines)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: len(v) for k, v in found.items()} == ({"encoder": 2, "decoder": 2, "cross": 2} if kind == "tto" else {"encoder": 2})
    for s in range(3):
        alone = attention_of(model, inputs[s:s + 1], lines[s:s + 1])
        for name, layers in found.items():
            for k, layer in enumerate(layers):
                assert np.allclose(layer[s], alone[name][k][0], atol=1e-6) and np.allclose(layer[s].sum(2), 1, atol=1e-5) and not np.triu(layer[s], 1).any()
                assert not np.allclose(layer[s][0], layer[s][1], atol=1e-3) or len(layer[s][0]) < 2     # heads differ
    if kind == "tto": assert not np.allclose(found["decoder"][1][1], found["cross"][1][1], atol=1e-3)


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto", "tto_sphere_sos"])
def test_the_maps_make_the_outputs_of_dwi_ml(kind):
    "The values of each layer, mixed by the maps and led through the rest of the model, are the outputs that dwi_ml wrote."
    model, io = load_model(REFERENCE / kind).eval(), np.load(REFERENCE / kind / "io.npz")
    lines = Ragged.from_list([torch.tensor(o) for o in np.split(io["streamlines"], np.cumsum(io["lengths"])[:-1])])
    inputs = lines.with_data(torch.tensor(io["inputs"]))
    maps = attention_of(model, inputs, lines)
    order = [w for k in range(len(maps["encoder"])) for w in [maps["encoder"][k]]]
    for k in range(len(maps.get("decoder", ()))): order += [maps["decoder"][k], maps["cross"][k]]
    called = iter(order)

    class Mixed:
        at = lines.point_index
        def look_back(self, q, k, v, dropout=0.):
            each = zip(next(called), lines.with_data(v).unbind())
            return torch.cat([torch.einsum("hij,jhc->ihc", torch.tensor(w), o) for w, o in each])
    with torch.no_grad():
        outputs = model.direction_getter(model.run(inputs.data, previous_directions(lines, model.nb_previous_dirs).data, Mixed()))
    assert next(called, None) is None and np.abs(outputs.numpy() - io["outputs"]).max() < 2e-5*max(1, np.abs(io["outputs"]).max())


def test_rescaling_by_hand():
    a = np.array([[[1., 0, 0, 0], [.25, .75, 0, 0], [.1, .2, .7, 0], [.25, .25, .25, .25]]])
    assert np.allclose(rescaled(a, "0_1")[0, 2], [1/7, 2/7, 1, 0]) and rescaled(a) is a
    assert np.allclose(rescaled(a, "non_lin")[0, 1], [.25, .75, 0, 0]) and np.allclose(rescaled(a, "non_lin")[0, 3], .5)
    assert np.allclose(rescaled(a, "z")[0, 1, :2], [-1, 1]) and np.allclose(rescaled(a, "z")[0, 3], 0) and not np.triu(rescaled(a, "z")[0], 1).any()
    assert np.allclose(thinner(a, 2), [[[1, 0], [.4, .6]]])


def test_five_numbers_by_hand():
    a = np.array([[1., 0, 0, 0], [.9, .1, 0, 0], [.0, .0, 1., 0], [.6, .0, .0, .4]])
    found = summaries(a, np.array([0., 1., 3., 6.]))
    assert np.allclose(found["x_mean"], [2.5/4, .1/3, .5, .4]) and np.allclose(found["x_importance"], [3/4, 0, 1/2, 0])
    assert np.allclose(found["y_looked_far"], [0, 1, 0, 6]) and np.allclose(found["y_max_pos"], [0, 1, 0, 6]) and found["y_nb_looked"].tolist() == [1, 1, 1, 1]
    nothing = summaries(a, np.arange(4.), 2.)
    assert np.isnan(nothing["y_looked_far"]).all() and not nothing["y_nb_looked"].any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    study = toy_study(folder / "study")
    for name, model in (("tto", "OriginalTransformerModel"), ("l2t", "Learn2TrackModel")):
        own = dict(input_embedded_size=4, nheads=2, n_layers_e=1, max_len=60) if name == "tto" else dict(rnn_layer_sizes=[4])
        train({"data": {"hdf5_file": str(study), "input_group_name": "input", "streamline_group_name": "bundles"}, "model": {"name": model, "step_size": 2.0, **own},
               "training": {"experiments_path": str(folder), "experiment_name": name, "max_epochs": 1, "max_batches_per_epoch_training": 1}})
    return folder


def test_all_lines_of_a_subject(runs):
    whole, some = line_attention(runs / "tto", "sub-03", device="cpu"), line_attention(runs / "tto", "sub-03", batch_size=7, most=20, device="cpu")
    assert len(whole) == 120 and len(some) == 20 and all(len(o) == 120 for layers in whole.maps.values() for o in layers)
    for name, layers in some.maps.items():
        for a, b in zip(layers[0], whole.maps[name][0]): assert np.allclose(a, b, atol=1e-6)
    assert [a.shape[1] for a in whole.maps["cross"][0]] == whole.lines.lengths.tolist()
    back = line_attention(runs / "tto", "sub-03", most=3, reverse=True, device="cpu")
    assert len(back) == 3 and torch.dist(back.lines[0][0], whole.lines[0][0]) > torch.dist(back.lines[0][0], whole.lines[0][-1])


def test_files_of_the_command(runs, capsys):
    out = runs / "maps"
    run_command(dwiml_visualize_weights, [str(runs / "tto"), "sub-03", "--device", "cpu", "--out_dir", str(out), "--out_prefix", "a_", "--nb_lines", "3", "--as_matrices",
                                          "--color_multi_length", "--color_x_y_summary", "--group_heads", "--rescale_non_lin"])
    words = [f"{o}_l0_heads" for o in ("encoder", "decoder", "cross")]
    names = {"matrices.html", *(f"colored_multi_length_{o}.trk" for o in words), *(f"{o}_{what}.trk" for o in words for what in ("x_mean", "x_importance", "y_looked_far", "y_max_pos", "y_nb_looked"))}
    assert {p.name for p in out.iterdir()} == {f"a_{o}" for o in names}
    found = line_attention(runs / "tto", "sub-03", most=3, device="cpu")
    a = arranged(found.maps, "heads", rescaling="non_lin")["cross"][0]
    kept = read_tractogram(out / "a_cross_l0_heads_x_mean.trk")
    assert np.allclose(kept.dpp["x_mean"][:, 0], np.concatenate([np.where(np.tri(len(o[0])), o[0], 0).sum(0)/np.arange(len(o[0]), 0, -1) for o in a]), atol=1e-5)
    growing = read_tractogram(out / "a_colored_multi_length_cross_l0_heads.trk")
    assert len(growing) == int((found.lines.lengths - 1).sum()) and np.allclose(growing.dpp["attention"][:2, 0], a[0][0, 1, :2], atol=1e-6)
    page = (out / "a_matrices.html").read_text()
    assert page.count('class="plotly-graph-div"') == 3 and 'src="http' not in page
    with pytest.raises(SystemExit, match="already"): run_command(dwiml_visualize_weights, [str(runs / "tto"), "sub-03", "--device", "cpu", "--out_dir", str(out), "--out_prefix", "a_", "--as_matrices"])


@pytest.mark.parametrize("words, said", [
    (["l2t", "sub-03"], "no attention to look at"), (["tto", "nobody"], "nobody"), (["tto", "sub-03", "--group_with_max"], "group_heads"),
    (["tto", "sub-03", "--cmap", "viridi"], "viridis"), (["tto", "sub-03", "--rescale_z", "--rescale_0_1"], "in one way"), (["tto", "sub-03", "--streamlines_group", "a", "--streamlines_file", "b"], "one of the two"),
], ids=range(6))
def test_bad_input_is_one_sentence(runs, words, said):
    with pytest.raises(SystemExit) as e: run_command(dwiml_visualize_weights, [str(runs / words[0]), *words[1:], "--device", "cpu"])
    assert said in str(e.value) and "Traceback" not in str(e.value)


def test_other_models_are_refused():
    inputs, lines = some()
    with pytest.raises(DataProblem, match="Transformer"): attention_of(Learn2TrackModel(5, rnn_layer_sizes=[4]), inputs, lines)
