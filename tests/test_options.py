"""Options are said once: signatures put together from parts; ends and starts that every direction getter has; embeddings and layers by name."""
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import all_but_last, directions
from dwiml_nb.core.options import options_of, with_defaults, with_parts
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.directions.base import DIRECTION_GETTERS, DirectionGetter
from dwiml_nb.directions.ends_starts import EndClass
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.base import load_model
from dwiml_nb.models.checks import check_direction_getter, check_model
from dwiml_nb.models.embeddings import EMBEDDINGS, Embedding
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.parts import ModelWithDirectionGetter, ModelWithNeighborhood, ModelWithOneInput, ModelWithPreviousDirections
from dwiml_nb.models.rnn import RNNS
from dwiml_nb.training.checkpoints import check_same

LINES = Ragged.from_list([torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).cumsum(0) for n in (5, 9, 2, 1, 6)])


@DIRECTION_GETTERS.register("halves")
class HalvesDG(DirectionGetter):
    "Of someone who chose two kinds of answers: forward or back along x."
    nb_columns, end_part = 2, EndClass
    def direction_terms(self, rows, dirs): return F.cross_entropy(rows, (dirs.data[:, 0] < 0).long(), reduction="none")
    def det_directions(self, rows): return F.pad(1 - 2.0 * rows.argmax(1, keepdim=True), (0, 2))
    def prob_directions(self, rows, draws): return F.pad(1 - 2.0 * (draws[:, :1] > rows.softmax(1)[:, :1]), (0, 2))


@DIRECTION_GETTERS.register("distance")
class DistanceDG(DirectionGetter):
    def __init__(self, input_size, power=1.0, **parts):
        super().__init__(input_size, **parts)
        self.power = power
    def direction_terms(self, rows, dirs): return (rows - dirs.data).norm(dim=1)**self.power
    def det_directions(self, rows): return rows


@EMBEDDINGS.register("mean-around")
class MeanAround(Embedding):
    "Features of the neighbourhood's mean."
    def __init__(self, nb_features, nb_places, output_size, scale=1.0):
        super().__init__()
        self.shape, self.output_size, self.scale = (nb_places, nb_features), output_size, scale
        self.linear = nn.Linear(nb_features, output_size)
    def forward(self, x): return self.linear(self.scale * x.reshape(-1, *self.shape).mean(1))
    @classmethod
    def build(cls, spec, output_size=4, scale=1.0): return cls(spec.nb_features, len(spec.vectors), output_size, scale)


@RNNS.register("leaky")
class Leaky(nn.Module):
    "Two numbers of state for each output, and a count of steps beside them."
    def __init__(self, input_size, hidden_size, rate=0.5):
        super().__init__()
        self.into, self.rate, self.hidden_size = nn.Linear(input_size, 2 * hidden_size), rate, hidden_size
    def forward(self, x, state=None):
        h, steps = (x.new_zeros(1, x.shape[1], 2, self.hidden_size), x.new_zeros(2, x.shape[1], 1)) if state is None else state
        out = []
        for now in x:
            h = (1 - self.rate) * h + self.into(now).tanh().reshape(h.shape)
            steps = steps + 1
            out.append(h[0].prod(1) / steps[0])
        return torch.stack(out), (h, steps)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


# ---- signatures

def test_learn2track_states_its_own_options_only():
    own = inspect.getsource(Learn2TrackModel.__init__).split("super()")[0]
    everything = options_of(Learn2TrackModel)
    assert len(everything) == 25 and sum(f"{name}:" in own for name in everything) == 6
    for part in (ModelWithOneInput, ModelWithPreviousDirections, ModelWithNeighborhood, ModelWithDirectionGetter):
        for name, p in options_of(part).items(): assert name == "nb_features" or everything[name].default == p.default


def test_positions_end_after_dropout():
    assert Learn2TrackModel(4, "gru", [3], True, True, 0.1).params_for_checkpoint["dropout"] == 0.1
    with pytest.raises(TypeError): Learn2TrackModel(4, "gru", [3], True, True, 0.1, "no_embedding")


def test_a_wrong_name_is_told_with_the_right_one():
    with pytest.raises(TypeError, match="Learn2TrackModel takes no 'neighborhood_typ'. Did you mean 'neighborhood_type'"): Learn2TrackModel(4, neighborhood_typ="axes")


def test_options_that_a_class_decides_are_none():
    @with_parts(but=("nb_previous_dirs",))
    class Decided(ModelWithPreviousDirections, ModelWithOneInput):
        def __init__(self, width=3, **parts): super().__init__(nb_previous_dirs=1, **parts)
    assert list(options_of(Decided))[:3] == ["width", "experiment_name", "prev_dirs_embedding_key"] and "nb_previous_dirs" not in options_of(Decided)
    assert Decided(nb_features=2).params_for_checkpoint["neighborhood_type"] is None


def test_a_record_from_before_an_option_existed():
    now = Learn2TrackModel(4, rnn_layer_sizes=[3]).params_for_checkpoint
    before = {k: v for k, v in now.items() if k not in ("neighborhood_resolution", "dg_args", "dropout")}
    check_same("model", before, now, of=Learn2TrackModel)
    with pytest.raises(DataProblem, match="dropout=0.0. Found: dropout=0.5"): check_same("model", before, {**now, "dropout": 0.5}, of=Learn2TrackModel)
    with pytest.raises(DataProblem, match="Found: dg_args"): check_same("model", before, {**now, "dg_args": {"add_eos": True}}, of=Learn2TrackModel)
    assert json.dumps(with_defaults(Learn2TrackModel, now), sort_keys=True) == json.dumps(now, sort_keys=True)


# ---- ends and starts

@pytest.mark.parametrize("axis", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("key", ["cosine-regression", "l2-regression", "cosine-plus-l2-regression", "sphere-classification", "smooth-sphere-classification",
                                 "gaussian", "gaussian-mixture", "fisher-von-mises", "fisher-von-mises-mixture", "halves", "distance"])
def test_every_getter_ends_and_starts(key, eos, axis):
    args = {"sphere": "repulsion100"} if "sphere" in key else {}
    check_direction_getter(key, add_eos=eos, axis_head=axis, **args)
    getter = direction_getter(key, 6, add_eos=eos, axis_head=axis, second_step_weight=0.0, **args)
    seen = LINES if eos else all_but_last(LINES)
    rows = torch.randn(len(seen.data), getter.nb_columns + eos + 6 * axis, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, n = getter.compute_loss(rows, LINES)
    grad, = torch.autograd.grad(loss, rows)
    first, counts = seen.point_index == 0, (grad[:, :getter.nb_columns] != 0).any(1)
    steps = torch.zeros(len(rows), dtype=torch.bool)
    steps[[i for i in range(len(rows)) if not eos or i not in LINES.offsets[1:] - 1]] = True
    expected = steps & ~first if axis else steps
    if isinstance(getter.end, EndClass): expected = expected | ~steps            # an end is an answer, too
    assert counts.tolist() == expected.tolist()
    if axis: assert (grad[:, -6:] != 0).any(1).tolist() == steps.tolist()
    assert n == (len(rows) if isinstance(getter.end, EndClass) else len(directions(LINES).data))


@pytest.mark.parametrize("key", ["cosine-regression", "sphere-classification", "gaussian-mixture", "fisher-von-mises", "halves"])
def test_rows_of_all_points_are_fine_without_eos(key):
    getter = direction_getter(key, 6, axis_head=True)
    rows = torch.randn(len(LINES.data), getter.nb_columns + 6)
    seen = all_but_last(LINES.with_data(rows))
    assert torch.equal(getter.compute_loss(rows, LINES)[0], getter.compute_loss(seen, LINES)[0])
    per_row = getter.compute_loss(LINES.with_data(rows).unbind(), LINES.unbind(), average_results=False)[0]
    assert [len(o) for o in per_row] == seen.lengths.tolist() and torch.equal(torch.cat(per_row), getter.row_losses(seen.data, LINES))
    for n in (len(rows) - 1, len(rows) + 1, 3):
        with pytest.raises(ValueError, match="rows of outputs for 5 lines that need 18"): getter.compute_loss(torch.zeros(n, rows.shape[1]), LINES)


@pytest.mark.parametrize("key", ["cosine-regression", "gaussian", "fisher-von-mises-mixture", "smooth-sphere-classification", "halves"])
def test_a_line_that_was_cut_does_not_end(key):
    getter = direction_getter(key, 6, add_eos=True)
    rows, last = torch.randn(len(LINES.data), getter.nb_columns + 1), LINES.offsets[1:] - 1
    ends = torch.ones(5, 2, dtype=torch.bool)
    assert torch.equal(getter.compute_loss(rows, LINES)[0], getter.compute_loss(rows, LINES, ends=ends)[0])
    ends[1, 1], ends[2, 0] = False, False                                        # the second line goes on; the third began elsewhere
    whole, cut = (getter.compute_loss(rows, LINES, average_results=False, ends=e)[0].data for e in (None, ends))
    assert (whole != cut).nonzero().flatten().tolist() == [int(last[1])]
    mean = getter.compute_loss(rows, LINES, ends=ends)[0]
    if isinstance(getter.end, EndClass): torch.testing.assert_close(mean, cut.sum() / (len(rows) - 1))    # it has no answer there, so it does not count
    else: torch.testing.assert_close(cut[last[1]], F.softplus(rows[last[1], getter.nb_columns]))


# ---- by name

def of_a_user(**more):
    torch.manual_seed(0)
    return Learn2TrackModel(4, dict(key="leaky", rate=0.25), [5, 3], use_skip_connection=True, input_embedding_key=dict(key="mean-around", scale=2.0),
                            input_embedded_size=6, neighborhood_type="axes", nb_previous_dirs=1, dg_key="distance",
                            dg_args=dict(power=2.0, add_eos=True, axis_head=True), **more)


def test_embedding_layer_and_getter_of_a_user(tmp_path, capsys):
    model = of_a_user()
    assert (model.rnn_model.rnn_1.rate, model.input_embedding_layer.scale, model.direction_getter.power, model.uses_last_point) == (0.25, 2.0, 2.0, True)
    check_model(model)
    model.save_params_and_state(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "parameters.json").read_text())["input_embedding_key"] == {"key": "mean-around", "scale": 2.0}
    again = load_model(tmp_path / "model")
    assert again.params_for_checkpoint == model.params_for_checkpoint
    for options, what in ((dict(input_embedding_key="mean-arond"), "Did you mean 'mean-around'"), (dict(rnn_key="leeky"), "Did you mean 'leaky'"),
                          (dict(input_embedding_key=dict(key="mean-around", scala=1)), "Did you mean 'scale'"), (dict(dg_key="distanc"), "Did you mean 'distance'"),
                          (dict(dg_args=dict(powr=1)), "Did you mean 'power'")):
        with pytest.raises(ValueError, match=what): Learn2TrackModel(**{**model.constructor_arguments, **options})


def test_a_state_of_any_shape_goes_with_its_line():
    "Lines that end early, lines without points, states that are carried over."
    stack = of_a_user().rnn_model.eval()
    batch = LINES.with_data(torch.randn(len(LINES.data), stack.input_size))
    whole, state = stack(batch)
    _, middle = stack(Ragged.from_list([o[:2] for o in batch]))
    later, last = stack(Ragged.from_list([o[2:] for o in batch]), middle)        # two lines have nothing left
    torch.testing.assert_close(later.data, torch.cat([o[2:] for o in whole]))
    for layer, before in zip(last, state):
        for a, b in zip(layer, before): torch.testing.assert_close(a, b)
    assert state[0][0].shape == (1, 5, 2, 5) and state[0][1][:, :, 0].tolist() == [LINES.lengths.tolist()] * 2


def test_a_getter_that_always_learns_the_end_gets_all_points():
    @DIRECTION_GETTERS.register("sure of its end")
    class AlwaysDG(DistanceDG):
        def __init__(self, input_size, **parts): super().__init__(input_size, add_eos=True, **parts)
    assert Learn2TrackModel(4, rnn_layer_sizes=[3], dg_key="sure of its end").uses_last_point
