"""Transformers: attention over uneven lines beside torch's own layers with masks, what tracking keeps, training and tracking of a study.

Numbers of dwi_ml's three models are in test_reference_models.py, its folders in test_dwi_ml.py.
"""
import copy
import functools

import pytest
import torch
from torch import nn

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import spec_of
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import all_but_last, directions, previous_directions, unit
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import convert
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.attention import (POSITION_ENCODINGS, Attention, KeysValues, LengthBuckets, NextPoint, PositionEncoding, RotaryEncoding, WholeLines,
                                       look_back)
from dwiml_nb.models.base import load_model
from dwiml_nb.models.checks import check_model
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.seeds import seeds_from_mask
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

TTS, TTST, TTO = TransformerSrcOnlyModel, functools.partial(TransformerSrcAndTgtModel, target_embedded_size=8), OriginalTransformerModel
KINDS = dict(tts=TTS, ttst=TTST, tto=TTO)
SMALL = dict(nb_features=4, input_embedded_size=16, nheads=4, n_layers_e=2, max_len=60, step_size=1.)
FORMS = {
    "defaults": {}, "norm first, gelu": dict(norm_first=True, activation="gelu", ffnn_hidden_size=5), "rotary": dict(positional_encoding_key="rotary", nheads=2),
    "eos": dict(dg_args=dict(add_eos=True)), "axis": dict(dg_args=dict(axis_head=True, add_eos=True)),
    "classes": dict(dg_key="sphere-classification", dg_args=dict(sphere="repulsion100", add_eos=True)),
}
CLASSES = dict(sos_token_type="repulsion100")


def made(kind, form="defaults", **options):
    torch.manual_seed(0)
    more = CLASSES if form == "classes" and kind != "tts" else {}
    return KINDS[kind](**{**SMALL, **FORMS[form], **more, **options}).eval()


def batch(lengths=(3, 9, 1, 6, 12, 6), nb_features=4, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    lines = Ragged.from_list([torch.randn(n, 3, generator=gen, dtype=dtype).cumsum(0) for n in lengths])
    return lines.with_data(torch.randn(len(lines.data), nb_features, generator=gen, dtype=dtype)), lines


# ---- beside torch's own layers, padded and masked

def theirs_of(model):
    "torch's layers with the model's weights: what dwi_ml's models are made of."
    options = dict(dim_feedforward=model.ffnn_hidden_size, dropout=0., activation=model.activation, batch_first=True, norm_first=model.norm_first)
    make = lambda cls, stack: cls(model.d_model, model.nheads, **options)
    def named(state):
        "The three projections as torch has them, in one matrix."
        out = {k: v for k, v in state.items() if "_proj_weight" not in k}
        for k in [k for k in state if k.endswith("q_proj_weight")]:
            out[k.replace("q_proj_weight", "in_proj_weight")] = torch.cat([state[k.replace("q_proj", f"{o}_proj")] for o in "qkv"])
        return out
    core = model.modified_torch_transformer
    if hasattr(core, "decoder"):
        stack = nn.Transformer(model.d_model, model.nheads, custom_encoder=nn.TransformerEncoder(make(nn.TransformerEncoderLayer, 0), len(core.encoder.layers), enable_nested_tensor=False),
                               custom_decoder=nn.TransformerDecoder(make(nn.TransformerDecoderLayer, 0), len(core.decoder.layers)), batch_first=True)
    else: stack = nn.TransformerEncoder(make(nn.TransformerEncoderLayer, 0), len(core.layers), enable_nested_tensor=False)
    stack.load_state_dict(named(core.state_dict()))
    return stack.double().train()


def masked(stack, model, x, tokens, lines):
    "Rows of the lines through torch's layers: padded to the longest, the future and the padding masked."
    pads = [lines.with_data(o).to_padded() for o in (x, tokens) if o is not None]
    real, n = pads[0][1], pads[0][0].shape[1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    if len(pads) == 1: return stack(pads[0][0], mask=future, src_key_padding_mask=~real)[real]
    return stack(pads[0][0], pads[1][0], src_mask=future, tgt_mask=future, memory_mask=future, src_key_padding_mask=~real, tgt_key_padding_mask=~real,
                 memory_key_padding_mask=~real)[real]


@pytest.mark.parametrize("form", ["defaults", "norm first, gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_masks_and_padding(kind, form):
    model, (inputs, lines) = made(kind, form).double(), batch(dtype=torch.float64)
    theirs, way = theirs_of(model), None
    x = inputs.data.clone().requires_grad_()
    starts, dirs = lines.point_index == 0, previous_directions(lines, model.nb_previous_dirs).data
    features = [model.position_encoding_layer.add(o, lines.point_index) for o in model.read(x, dirs, starts)]
    ours = model.modified_torch_transformer(*features, WholeLines(lines, model.position_encoding_layer))
    peer = masked(theirs, model, *(features if len(features) == 2 else (features[0], None)), lines)
    assert torch.allclose(ours, peer, atol=1e-10)
    way = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = (torch.autograd.grad((o*way).sum(), x, retain_graph=True)[0] for o in (ours, peer))
    assert torch.allclose(a, b, atol=1e-10)
    weight = next(p for name, p in model.modified_torch_transformer.named_parameters() if name.endswith("linear1.weight"))
    of_peer = next(p for name, p in theirs.named_parameters() if name.endswith("linear1.weight"))
    assert torch.allclose(torch.autograd.grad((ours*way).sum(), weight)[0], torch.autograd.grad((peer*way).sum(), of_peer)[0], atol=1e-10)


@pytest.mark.parametrize("window, where", [(None, "in groups"), (4, "padded")])
def test_dropout_drops_weights(window, where):
    "As many as asked for, in the mean the attention without; none of the future."
    lines = Ragged.from_lengths(torch.zeros(20, 1), [6, 11, 3])
    q, k, v = torch.randn(3, 20, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain, buckets = look_back(q, k, v, lines, LengthBuckets(lines), window=window), LengthBuckets(lines, 1 if where == "padded" else 8)
    ones = torch.stack([look_back(q, k, torch.ones_like(v), lines, buckets, .25, window) for _ in range(300)])[..., 0]
    assert torch.allclose(ones.mean(0), torch.ones(20, 2), atol=.15)
    first = ones[:, lines.offsets[:-1]]                                                              # they read themselves alone: dropped, or not
    assert set(first.unique().tolist()) <= {0., torch.tensor(4/3).item()} and abs((first == 0).float().mean() - .25) < .06
    assert torch.allclose(torch.stack([look_back(q, k, v, lines, buckets, .25, window) for _ in range(600)]).mean(0), plain, atol=.2)
    assert not look_back(q, k, v, lines, buckets, 1., window).any()


@pytest.mark.parametrize("nb_buckets", [1, 2, 3, 8])
def test_groups_change_no_number(nb_buckets):
    "Lines without points, alone, all alike; gradients too."
    for lengths in ((3, 9, 0, 1, 6, 12, 6), (5,), (4, 4, 4), (0, 0), (1, 1, 2)):
        lines = Ragged.from_lengths(torch.zeros(sum(lengths), 1), lengths)
        q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
        found = look_back(q, k, v, lines, LengthBuckets(lines, nb_buckets))
        alone = [look_back(*(o[a:b] for o in (q, k, v)), (one := Ragged.from_lengths(lines.data[a:b], [b - a])), LengthBuckets(one)) for a, b in
                 zip(lines.offsets[:-1].tolist(), lines.offsets[1:].tolist())]
        assert torch.allclose(found, torch.cat(alone), atol=1e-12)
        if not len(found): continue
        for a, b in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v), retain_graph=True) for o in (found, torch.cat(alone)))): assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    model, (inputs, lines) = made(kind, "rotary", n_layers_e=1).double(), batch((2, 4, 1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: model(inputs.with_data(x), lines).data, inputs.data.requires_grad_(), atol=1e-6)


# ---- what every model promises

@pytest.mark.parametrize("kind, form", [("tts", "axis"), ("tts", "norm first, gelu"), ("ttst", "classes"), ("ttst", "eos"), ("tto", "rotary"), ("tto", "classes")])
def test_checks_of_models(kind, form, capsys):
    "Learns, gradients, lines are alone, steps as whole lines, a folder."
    found = check_model(made(kind, form, dropout_rate=0.))
    assert found["tracking"].startswith("largest difference")


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_ragged(kind):
    model, (inputs, lines) = made(kind), batch()
    outputs, as_list = model(inputs, lines), model(inputs.unbind(), lines.unbind())
    assert isinstance(outputs, Ragged) and isinstance(as_list, list) and torch.equal(torch.cat(as_list), outputs.data)
    assert model(inputs[[]], lines[[]]).data.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["defaults", "rotary"])
def test_the_future_does_not_leak(kind, form):
    "Neither data nor points that come later; the step to a point is known at that point."
    model, (inputs, lines) = made(kind, form), batch()
    before = model(inputs, lines).data
    first = int(lines.offsets[4])                                                                    # line 4 has 12 points
    other = inputs.data.clone(); other[first + 7] += 1
    assert torch.equal(model(inputs.with_data(other), lines).data[:first + 7], before[:first + 7])
    moved = lines.data.clone(); moved[first + 7] += 1
    after = model(inputs, lines.with_data(moved)).data
    assert torch.equal(after[:first + 7], before[:first + 7])
    assert torch.equal(after[first + 7], before[first + 7]) == (kind == "tts")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_attention(kind):
    model, (inputs, lines) = made(kind), batch()
    outputs, weights = model(inputs, lines, return_weights=True)
    assert torch.equal(outputs.data, model(inputs, lines).data)
    assert [len(o) for o in weights] == ([2, 2, 2] if kind == "tto" else [2])
    for o in (o for part in weights for o in part):
        assert o.shape == (6, 4, 12, 12) and not o.triu(1).any()
        assert torch.allclose(o.sum(-1), (torch.arange(12) < lines.lengths[:, None])[:, None].float().expand(6, 4, 12), atol=1e-5)


def test_a_training_step_draws_dropout():
    "In every place: the embeddings, the attention, the layers; none in evaluation."
    model, (inputs, lines) = made("tto", dropout_rate=.5).train(), batch()
    assert not torch.equal(model(inputs, lines).data, model(inputs, lines).data)
    assert all(m.dropout == .5 for m in model.modules() if isinstance(m, Attention))
    model.eval()
    assert torch.equal(model(inputs, lines).data, model(inputs, lines).data)


# ---- what a decoder reads

@pytest.mark.parametrize("space", ["voxmm", "vox"])
@pytest.mark.parametrize("tokens", ["as_label", "repulsion100"])
def test_the_tracker_gives_the_tokens_of_training(dataset, space, tokens):
    "A tracked line, read at once as in training, gives the outputs that made its steps, in the space of the model."
    torch.manual_seed(0)
    model = OriginalTransformerModel(dataset.nb_features["input"], sos_token_type=tokens, streamline_space=space, **{k: v for k, v in SMALL.items() if k != "nb_features"}).eval()
    read = []
    run = model.run
    model.run = lambda inputs, dirs, points: (read.append((points.at.clone(), model.tokens(dirs, points.at == 0))), run(inputs, dirs, points))[1]
    tracker = tracker_of(model, dataset, forward_only=True, min_length_mm=0, max_length_mm=6)
    tractogram = tracker.track(seeds_of(dataset, 3), quiet=True)
    line = tractogram.lines[0]
    seen = Ragged.from_list([convert(line, tracker.grid, "rasmm", "voxmm")*tracker.walk.scale])
    steps = len(line) - 1
    assert steps >= 2
    expected = model.tokens(previous_directions(seen, 1).data, seen.point_index == 0)[:steps]
    assert torch.allclose(torch.stack([o[0] for _, o in read[:steps]]), expected, atol=1e-5)
    assert [int(at[0]) for at, _ in read[:steps]] == list(range(steps))


def test_points_that_stand_still_are_no_start():
    "A step of length zero is not the start of a line, at once or step by step."
    model, (inputs, lines) = made("ttst"), batch((5,))
    lines.data[2] = lines.data[1]
    state, whole = None, model(inputs, lines).data
    for i in range(5):
        outputs, state = model.tracking_step(inputs.data[[i]], previous_directions(lines, 1).data[[i]], state)
        assert torch.allclose(outputs[0], whole[i], atol=1e-5)


# ---- what tracking keeps

def steps_of(model, inputs, lines, state=None, which=None, start=0):
    "Outputs of each line, point by point, lines ending on the way; and the last state."
    which = torch.arange(len(lines)) if which is None else which
    prev, found, nb_rows = previous_directions(lines, model.nb_previous_dirs).data, [[] for _ in range(len(lines))], []
    for i in range(start, int(lines.lengths.max())):
        go_on = lines.lengths[which] > i
        if not bool(go_on.all()): state, which = model.select_state(state, go_on), which[go_on]
        at = lines.offsets[:-1][which] + i
        outputs, state = model.tracking_step(inputs.data[at], prev[at], state)
        for line, o in zip(which.tolist(), outputs): found[line].append(o)
        nb_rows.append(state.nb_rows)
    return [torch.stack(o) if o else None for o in found], state, nb_rows


@pytest.mark.parametrize("kind", KINDS)
def test_many_lines_that_end(kind):
    "Rows move together as lines end; memory is that of the lines that go on, and of at most max_len points."
    model, (inputs, lines) = made(kind, "rotary", max_len=40), batch(tuple(range(1, 41)))
    with torch.no_grad():
        found, state, nb_rows = steps_of(model, inputs, lines)
        whole = model(inputs, lines)
    assert max(float((a - b).abs().max()) for a, b in zip(found, whole)) < 1e-5
    assert (state.room, state.nb_rows, len(set(nb_rows))) == (40, 1, 10)
    assert all(rows*.75 <= 40 - i for i, rows in enumerate(nb_rows))
    assert sum(o.nbytes for o in state.tensors) == model.bytes_per_point*40


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_values(kind):
    "Two ways on from one state, in any order; lines chosen by number, twice or turned; a copy."
    model, (inputs, lines) = made(kind), batch((6, 6, 6))
    prev, at = previous_directions(lines, model.nb_previous_dirs).data, lines.offsets[:-1]
    with torch.no_grad():
        first = model.warm_up(*(Ragged.from_list([o[:3] for o in r]) for r in (inputs, lines)))
        kept = copy.deepcopy(first)
        here, there = (model.tracking_step(x, prev[at + 3], first) for x in (inputs.data[at + 3], inputs.data[at + 3] + 1))
        again = model.tracking_step(inputs.data[at + 3], prev[at + 3], kept)
        ways = [model.tracking_step(inputs.data[at + 4], prev[at + 4], state)[0] for _, state in (there, here, again)]
        assert torch.equal(here[0], again[0]) and torch.equal(ways[1], ways[2]) and not torch.allclose(ways[0], ways[1])
        chosen = torch.tensor([2, 0, 2])
        some = model.select_state(here[1], chosen)
        outputs, after = model.tracking_step(inputs.data[(at + 4)[chosen]], prev[(at + 4)[chosen]], some)
        assert torch.allclose(outputs, ways[1][chosen], atol=1e-6)
        shifted = inputs.data[(at + 5)[chosen]] + torch.tensor([0., 0, 1])[:, None]
        outputs, _ = model.tracking_step(shifted, prev[(at + 5)[chosen]], after)
        assert not torch.allclose(outputs[0], outputs[2])
    assert model.select_state(None, chosen) is None


def test_a_window_forgets():
    "A state of full windows goes on in two ways as long as what it remembers is there; then it says so."
    model, (inputs, lines) = made("tto", window=3), batch((9, 9))
    prev, at = previous_directions(lines, 1).data, lines.offsets[:-1]
    step = lambda i, state: model.tracking_step(inputs.data[at + i], prev[at + i], state)
    with torch.no_grad():
        state, whole = None, model(inputs, lines).data
        for i in range(5): _, state = step(i, state)
        kept = copy.deepcopy(state)
        one, other = step(5, state), step(5, state)
        for outputs, after in (one, other):
            assert torch.allclose(outputs, whole[at + 5], atol=1e-5) and torch.allclose(step(6, after)[0], whole[at + 6], atol=1e-5)
        _, first = step(5, kept)
        step(6, first)
        with pytest.raises(RuntimeError, match="2 steps were made from this state.*copy.deepcopy"): step(5, kept)
        with pytest.raises(RuntimeError, match="2 steps"): model.select_state(kept, torch.tensor([0]))


@pytest.mark.parametrize("kind", KINDS)
def test_first_halves_of_other_lengths(kind):
    "Backward halves begin after lines of different lengths, none at all among them."
    model, (inputs, lines) = made(kind), batch((7, 9, 8, 12))
    begun = torch.tensor([0, 3, 1, 6])
    first = [Ragged.from_list([o[:n] for o, n in zip(r, begun)]) for r in (inputs, lines)]
    with torch.no_grad():
        state, whole, prev = model.warm_up(*first), model(inputs, lines), previous_directions(lines, model.nb_previous_dirs).data
        for i in range(4):
            at = lines.offsets[:-1] + begun + i
            outputs, state = model.tracking_step(inputs.data[at], prev[at], state)
            assert torch.allclose(outputs, whole.data[at], atol=1e-5)


def test_gradients_through_steps():
    "Training on what one's own steps lead to: gradients are those of whole lines."
    model, (inputs, lines) = made("tto").double(), batch((4, 4), dtype=torch.float64)
    weight = model.modified_torch_transformer.encoder.layers[0].self_attn.k_proj_weight
    found, _, _ = steps_of(model, inputs, lines)
    a, b = (torch.autograd.grad(o.sin().sum(), weight)[0] for o in (torch.cat(found), model(inputs, lines).data))
    assert torch.allclose(a, b, atol=1e-10)


def test_a_step_costs_no_prefix():
    "No tensor of the whole prefix is projected again: a step's linear layers see one row a line."
    model, (inputs, lines) = made("tto"), batch((30, 30))
    rows = []
    for m in model.modules():
        if isinstance(m, nn.Linear): m.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    with torch.no_grad(): steps_of(model, inputs, lines)
    assert set(rows) == {2}


# ---- limits

def test_lines_that_are_too_long():
    model, (inputs, lines) = made("tto", max_len=10), batch((3, 11, 5))
    with pytest.raises(ValueError, match="line 1 of the batch has 11 points, more than max_len=10 of this model"): model(inputs, lines)
    with pytest.raises(ValueError, match="a line has 11 points, more than max_len=10"): steps_of(model, inputs, lines)
    with pytest.raises(ValueError, match="has 11 points"): model.warm_up(inputs, lines)


@pytest.mark.parametrize("options, says", [
    (dict(nheads=3), "must be a multiple of nheads"), (dict(nheads=0), "nheads is a whole number"), (dict(max_len=0), "max_len is a whole number"),
    (dict(dropout_rate=1.5), "dropout_rate is a number"), (dict(activation="elu"), "activation is one of relu, gelu"), (dict(n_layers_e=1.5), "n_layers_e is a whole"),
    (dict(positional_encoding_key="relational"), "unknown positional encoding 'relational'"), (dict(input_embedded_size=15, nheads=3), "an even d_model of at least 4"),
    (dict(input_embedded_size=12, nheads=4, positional_encoding_key="rotary"), "an even number of features a head"), (dict(input_embedded_size=None), "needs an embedded size"),
    (dict(n_layers_e=10**9), "no memory for 3000000000 attentions"), (dict(max_len=10**12), "no memory for positions"), (dict(ffnn_hidden_size=0), "ffnn_hidden_size is"),
    (dict(n_layers_d=0), "n_layers_d is a whole number"), (dict(sos_token_type="a sphere"), "unknown sphere"), (dict(target_embedding_key="cnn"), "unknown embedding")], ids=str)
def test_arguments_are_checked_when_the_model_is_made(options, says):
    with pytest.raises((ValueError, DataProblem), match=says): TTO(**{**SMALL, **options})


def test_memory_that_there_is_not():
    state = KeysValues(torch.full((2,), 16), 10**7, [torch.zeros(2, 2, 1, 16, 2).expand(2, 2, 10**6, 16, 2)])
    state.longest = 10**6
    with pytest.raises(DataProblem, match="no memory for what 2 lines remember.*take a smaller batch_size"): state.grown()


def test_another_encoding():
    "One class, in one place."
    class Falling(PositionEncoding):
        def add(self, x, at): return x/(1 + at[:, None])
    POSITION_ENCODINGS.register("falling", Falling)
    model, (inputs, lines) = made("ttst", positional_encoding_key="falling"), batch()
    with torch.no_grad(): found, _, _ = steps_of(model, inputs, lines)
    assert torch.allclose(torch.cat(found), model(inputs, lines).data, atol=1e-5)
    assert not torch.allclose(torch.cat(found), made("ttst")(inputs, lines).data, atol=1e-3)


# ---- a study

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    dataset = MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()
    yield dataset
    dataset.close()


def learner(dataset, kind="tto", **options):
    torch.manual_seed(0)
    return KINDS[kind](**{**SMALL, "nb_features": dataset.nb_features["input"], "step_size": 2., "dg_args": dict(add_eos=True), **options})


def trainer_of(model, dataset, folder, resume=False, cls=DWIMLTrainerOneInput, **options):
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=20)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", split_ratio=.3, reverse_ratio=.5)
    given = {} if resume else dict(max_epochs=2, max_batches_per_epoch_training=3, max_batches_per_epoch_validation=1)
    return (cls.init_from_checkpoint if resume else cls)(model, folder, "run", sampler, loader, **{**given, "device": "cpu", **options})


def tracker_of(model, dataset, **options):
    return Tracker(model, dataset, dataset.training.subject(0).subj_id, "input", **options)


def seeds_of(dataset, n):
    subset = dataset.training
    return seeds_from_mask(subset.get_volume(0, "wm_mask")[..., 0], subset.grid(0, "wm_mask").affine, npv=1, seed=1)[:n]


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_exactly(kind, dataset, tmp_path):
    "Dropout in every layer: after a stop between epochs, the weights of a run without one, bit for bit."
    trainer_of(whole := learner(dataset, kind), dataset, tmp_path/"whole").train_and_validate()
    first = trainer_of(learner(dataset, kind), dataset, tmp_path/"halves")
    first.control.on_epoch_end.append(lambda row: first.control.request_stop())
    first.train_and_validate()
    second = trainer_of(again := learner(dataset, kind), dataset, tmp_path/"halves", resume=True)
    second.train_and_validate()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(whole.state_dict()["input_embedding_layer.linear.weight"], learner(dataset, kind).state_dict()["input_embedding_layer.linear.weight"])
    assert load_model(tmp_path/"whole"/"run"/"best_model").params_for_checkpoint == whole.params_for_checkpoint


@pytest.mark.parametrize("algo", ["det", "prob"])
@pytest.mark.parametrize("kind", KINDS)
def test_lines_do_not_depend_on_their_company(kind, algo, dataset):
    "All together, a few at a time; with EOS, in both directions."
    head = dict(dg_key="sphere-classification", dg_args=dict(add_eos=True, sphere="repulsion100"))
    model, seeds = learner(dataset, kind, **(head if algo == "prob" else {})).eval(), seeds_of(dataset, 12)
    options = dict(algo=algo, theta_deg=180, min_length_mm=0, max_length_mm=40, eos_threshold=.6 if algo == "det" else .02, tracking_mask_group="wm_mask")
    a, b = (tracker_of(model, dataset, batch_size=n, **options).track(seeds, quiet=True) for n in (None, 5))
    assert len(a) == len(b) and a.lines.lengths.tolist() == b.lines.lengths.tolist() and int(a.lines.lengths.max()) > 4
    assert torch.allclose(a.lines.data, b.lines.data, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_half_goes_on_as_the_line_read_backwards(kind, dataset):
    model, seeds = learner(dataset, kind, dg_args={}).eval(), seeds_of(dataset, 6)
    tracker = tracker_of(model, dataset, theta_deg=180, min_length_mm=0, max_length_mm=30, tracking_mask_group="wm_mask")
    tractogram, second_steps = tracker.track(seeds, quiet=True), 0
    for line, seed in zip(tractogram.lines, tractogram.info["seeds"]):
        back = Ragged.from_list([convert(line, tracker.grid, "rasmm", "voxmm").flip(0)])
        from_seed = int((line.flip(0) - seed).norm(dim=1).argmin())
        with torch.inference_mode(): outputs = model(tracker.walk.inputs_along(back), back).data
        ours, went = unit(model.get_tracking_directions(outputs)), unit(directions(back).data)
        if from_seed > 0: assert torch.allclose(ours[from_seed:-1], went[from_seed:], atol=1e-3)
        second_steps += len(went) - from_seed
    assert second_steps > 3


def test_the_tracker_knows_what_a_model_takes(dataset):
    model = learner(dataset)
    spec = spec_of(model)
    assert (spec.max_len, spec.bytes_per_point) == (60, 6*2*16*4) and spec.nb_previous_dirs == 1 and spec.accepts_ragged
    with pytest.raises(ValueError, match="up to 151 points, and OriginalTransformerModel takes max_len=60"): tracker_of(model, dataset)
    assert tracker_of(model, dataset, max_length_mm=100).batch_size == 20_000
    large = learner(dataset, input_embedded_size=512, nheads=8, n_layers_e=6)
    assert tracker_of(large, dataset, max_length_mm=100).batch_size == (2 << 30)//(18*2*512*4*51)


# ---- a GPU

@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, (inputs, lines) = made(kind, "rotary"), batch()
    expected = model(inputs, lines).data
    on_gpu = copy.deepcopy(model).to("cuda")
    assert torch.allclose(on_gpu(inputs.to("cuda"), lines.to("cuda")).data.cpu(), expected, atol=1e-4)
    with torch.no_grad(): found, _, _ = steps_of(on_gpu, Ragged(inputs.data.cuda(), inputs.offsets.cuda()), Ragged(lines.data.cuda(), lines.offsets.cuda()), which=torch.arange(6, device="cuda"))
    assert torch.allclose(torch.cat(found).cpu(), expected, atol=1e-4)


@pytest.mark.cuda
def test_lengths_as_they_are_in_half_precision():
    lines = Ragged.from_lengths(torch.zeros(37, 1), [3, 9, 0, 1, 6, 12, 6]).to("cuda")
    q, k, v = torch.randn(3, 37, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True).unbind()
    found, plain = look_back(q, k, v, lines, LengthBuckets(lines)), look_back(*(o.float() for o in (q, k, v)), lines, LengthBuckets(lines))
    assert torch.allclose(found.float(), plain, atol=.05)
    found.sum().backward()


def test_keys_turn_with_their_points():
    "The same answer wherever a line begins: only the distance counts."
    encoding, layer = RotaryEncoding(16, 2, 100), Attention(16, 2).eval()
    x, lines = torch.randn(5, 16), Ragged.from_lengths(torch.zeros(5, 1), [5])
    points = WholeLines(lines, encoding)
    a = layer(x, x, points)
    points.at = points.at + 40
    assert torch.allclose(a, layer(x, x, points), atol=1e-5)
    state = KeysValues.at_start(1, 100).grown()
    assert NextPoint(state, encoding).at.tolist() == [0]


def test_inputs_of_other_points():
    model, (inputs, lines) = made("tts"), batch()
    with pytest.raises(ValueError, match="inputs and streamlines must have the same points"): model(all_but_last(inputs), lines)
