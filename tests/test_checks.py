"""Checks of anybody's model: every wrong model is caught, by the check that should; no right model raises an alarm; the report and its command.

Each wrong model changes one thing of a right one. The right ones do what checks might take for a fault: dropout, batch normalisation, padding, gates that
begin at zero, outputs of any form, losses of several means.
"""
import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwiml_nb.batch.spec import InputSpec
from dwiml_nb.cli.checks import dwiml_check_model
from dwiml_nb.cli.common import run_command
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.directions.base import DIRECTION_GETTERS
from dwiml_nb.directions.regression import CosineRegressionDG
from dwiml_nb.directions.sphere import SphereClassificationDG
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.checks import GETTER_CHECKS, MODEL_CHECKS, check_direction_getter, check_model
from dwiml_nb.models.findings import Broken, CheckFailed, CheckReport, Finding, NotApplicable, check_in
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.parts import ModelWithDirectionGetter, ModelWithOneInput, ModelWithPreviousDirections
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel


# ---- right models

class Plain(MainModelAbstract):
    "Lists, a squared distance to each step."
    uses_last_point = False
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]
    def errors(self, outputs, targets): return [(o - t.diff(dim=0)).square().sum(1) for o, t in zip(outputs, targets)]
    def compute_loss(self, outputs, targets):
        errors = torch.cat(self.errors(outputs, targets))
        return errors.mean(), len(errors)


class Walker(ModelWithDirectionGetter):
    "A recurrent layer, step by step as well."
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = nn.GRU(4, 8)
        self.instantiate_direction_getter(8)
    def features(self, x): return self.body(x)[0]
    def forward(self, inputs, streamlines): return [self.direction_getter(self.features(x)) for x in inputs]
    def tracking_step(self, inputs, previous_dirs, state=None):
        x, state = self.body(inputs[None], state)
        return self.direction_getter(x[0]), state
    def warm_up(self, inputs, lines): return torch.stack([self.body(x)[1] for x in inputs], 1)


class Dropping(Plain):
    "Dropout in training, of values and of a whole layer."
    def __init__(self): super().__init__(); self.more, self.drop = nn.Linear(4, 4), nn.Dropout(.9)
    def forward(self, inputs, streamlines):
        skip = self.training and random.random() < .5
        return super().forward([self.drop(x if skip else x + self.more(x)) for x in inputs], streamlines)


class Normed(Plain):
    "Batch normalisation, over all points."
    def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(4)
    def forward(self, inputs, streamlines):
        return super().forward(self.norm(torch.cat(list(inputs))).split([len(x) for x in inputs]), streamlines)


class Padded(Plain):
    "Padded lines in one tensor; the loss cuts them."
    def forward(self, inputs, streamlines): return self.layer(nn.utils.rnn.pad_sequence(list(inputs), batch_first=True))
    def compute_loss(self, outputs, targets): return super().compute_loss([o[:len(t) - 1] for o, t in zip(outputs, targets)], targets)


class ChannelsFirst(Padded):
    def forward(self, inputs, streamlines): return super().forward(inputs, streamlines).transpose(1, 2)
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs.transpose(1, 2), targets)


class AllPoints(Plain):
    "All points in one tensor, in a tuple with the hidden state of a layer."
    def forward(self, inputs, streamlines): return self.layer(torch.cat(list(inputs))), [torch.zeros(1, len(inputs), 3)]
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs[0].split([len(t) - 1 for t in targets]), targets)


class TwoParts(Plain):
    "A mean and a spread, both as a list."
    def __init__(self): super().__init__(); self.spread = nn.Linear(4, 1)
    def forward(self, inputs, streamlines): return super().forward(inputs, streamlines), [self.spread(x).exp() for x in inputs]
    def compute_loss(self, outputs, targets):
        errors, s = torch.cat(self.errors(outputs[0], targets)), torch.cat(outputs[1])[:, 0]
        return (errors/s + 3*s.log()).mean(), len(errors), {"spread": s.mean()}


class ByName(TwoParts):
    def forward(self, inputs, streamlines): return dict(zip(("mean", "spread"), super().forward(inputs, streamlines)))
    def compute_loss(self, outputs, targets): return super().compute_loss(tuple(outputs.values()), targets)


class LineClasses(MainModelAbstract):
    "One answer a line, from both of its ends: it may look at all of it."
    def __init__(self): super().__init__(); self.body, self.head = nn.GRU(4, 8, bidirectional=True), nn.Linear(16, 5)
    def forward(self, inputs, streamlines): return torch.stack([self.head(self.body(x)[0].mean(0)) for x in inputs])
    def compute_loss(self, outputs, targets):
        label = torch.stack([(t[-1, 0] > t[0, 0]).long() for t in targets])
        return F.cross_entropy(outputs, label), len(label)


class Pooled(MainModelAbstract):
    "A number for the batch: outputs of a form that nobody compares."
    def __init__(self): super().__init__(); self.layer = nn.Linear(3, 3)
    def forward(self, streamlines): return torch.cat([self.layer(s) - s for s in streamlines]).square().sum(1).mean()[None]
    def compute_loss(self, outputs, targets): return outputs[0], sum(map(len, targets))


class Gate(Plain):
    "A branch behind a zero, and a layer behind a ReLU that is dead at first."
    def __init__(self):
        super().__init__()
        self.more, self.gate = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        with torch.no_grad(): self.more.bias.fill_(-5)
    def forward(self, inputs, streamlines): return super().forward([x + self.gate*self.more(x).relu() for x in inputs], streamlines)


class Tied(Plain):
    "One weight under two names, and one that is frozen."
    def __init__(self):
        super().__init__()
        self.one, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
    def forward(self, inputs, streamlines): return super().forward([self.two(self.one(self.frozen(x))) for x in inputs], streamlines)


class Fixed(Plain):
    "Nothing to train."
    def __init__(self): super().__init__(); self.requires_grad_(False)


class NoLoss(MainModelAbstract):
    "Somebody else trains it."
    def __init__(self): super().__init__(); self.layer = nn.Linear(4, 3)
    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]


class Alone(Plain):
    "The loss without its number."
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs, targets)[0]


class LineMeans(Plain):
    "The mean of the lines' means, with the number of lines: that fits."
    def compute_loss(self, outputs, targets):
        means = torch.stack([e.mean() for e in self.errors(outputs, targets)])
        return means.mean(), len(means)


class SumAndOne(Plain):
    "As dwi_ml's auto-encoder: a sum, and n = 1."
    def compute_loss(self, outputs, targets): return torch.cat(self.errors(outputs, targets)).sum(), 1


class Regular(Plain):
    "A mean, and a penalty on the weights."
    def compute_loss(self, outputs, targets):
        loss, n = super().compute_loss(outputs, targets)
        return loss + 1e-2*self.layer.weight.square().sum(), n


class Attentive(Plain):
    "Attention over padded lines, masked."
    def __init__(self): super().__init__(); self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
    def forward(self, inputs, streamlines):
        x, mask = Ragged.from_list(inputs).to_padded()
        x = x + self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
        return super().forward([o[:len(i)] for o, i in zip(x, inputs)], streamlines)


class TwoInputs(ModelWithDirectionGetter):
    "A Ragged of each of two volumes."
    accepts_ragged = True
    def __init__(self):
        super().__init__()
        self.input_specs = {"a": InputSpec(3), "b": InputSpec(2)}
        self.instantiate_direction_getter(5)
    def forward(self, a, b, streamlines): return a.with_data(self.tracking_step((a.data, b.data), None)[0])
    def tracking_step(self, inputs, previous_dirs, state=None): return self.direction_getter(torch.cat(inputs, 1)), state


class Doubles(Plain):
    "Its weights are doubles."
    def __init__(self): super().__init__(); self.double()


class Whole(Plain):
    "Lines of 20 points in one tensor, with a convolution over all of them."
    uses_last_point = True
    def __init__(self): super().__init__(); self.set_preprocessing(nb_points=20); self.conv = nn.Conv1d(4, 3, 5, padding=2)
    def forward(self, inputs, streamlines): return self.layer(torch.stack(list(inputs))) + self.conv(torch.stack(list(inputs)).transpose(1, 2)).transpose(1, 2)
    def compute_loss(self, outputs, targets): return super().compute_loss([o[1:] for o in outputs], targets)


class Halves(Plain):
    "Small floats inside, floats in the loss."
    def forward(self, inputs, streamlines):
        with torch.autocast("cpu", torch.bfloat16): return super().forward(inputs, streamlines)
    def compute_loss(self, outputs, targets): return super().compute_loss([o.float() for o in outputs], targets)


class Variational(MainModelAbstract):
    "Chance in training only, parts of several forms, a large loss."
    def __init__(self): super().__init__(nb_points=16); self.down, self.up = nn.Linear(48, 8), nn.Linear(4, 48)
    def forward(self, streamlines):
        mean, spread = self.down(torch.stack(list(streamlines)).flatten(1)).chunk(2, 1)
        z = mean + torch.randn_like(mean)*(spread/2).exp()*self.training
        return self.up(z).reshape(-1, 16, 3), mean, spread
    def compute_loss(self, outputs, targets):
        lines, mean, spread = outputs
        errors = (lines - torch.stack(list(targets))).square().sum((1, 2)) + (mean**2 + spread.exp() - 1 - spread).sum(1)/2
        return errors.mean(), len(errors)


class ByMean(Walker):
    "The mean over what lies behind: a running sum of many numbers in float32."
    def features(self, x): return super().features(x.cumsum(0)/torch.arange(1, len(x) + 1)[:, None].to(x))
    tracking_step = MainModelAbstract.tracking_step


RIGHT = [Plain, Walker, Dropping, Normed, Padded, ChannelsFirst, AllPoints, TwoParts, ByName, LineClasses, Pooled, Gate, Tied, Fixed, NoLoss, Alone, LineMeans, SumAndOne,
         Regular, Attentive, TwoInputs, Doubles, Whole, ByMean, Halves, Variational]


@pytest.mark.parametrize("cls", RIGHT, ids=lambda cls: cls.__name__)
def test_no_false_alarm(cls):
    report = check_model(cls, raise_on=None)
    assert report.ok, report
    assert len(report.findings) == len(MODEL_CHECKS)


def test_what_does_not_apply_says_why():
    def why(cls):
        report = check_model(cls)
        return {name: report[name] for name in report.named("not applicable")}
    assert why(NoLoss)["learns"] == why(NoLoss)["loss adds up"] == "no compute_loss" and why(Fixed)["every weight"] == "nothing to train"
    assert "may look at whole lines" in why(LineClasses)["past"] and "not one tensor" in why(Pooled)["outputs"] and why(Whole)["two points"] == "every line has 20 points"
    assert "BatchNorm1d sees the whole batch" in check_model(Normed)["lines are alone"]
    assert "equal length; for others parts of it are means over other rows" in check_model(
        Learn2TrackModel, nb_features=4, dg_args=dict(axis_head=True, second_step_weight=5.))["loss adds up"]


# ---- wrong models: each with the checks that must fail, and no others

class Raises(Plain):
    def forward(self, inputs, streamlines): return [self.layer(x).reshape(7, 7) for x in inputs]

class NotANumber(Plain):
    def forward(self, inputs, streamlines): return super().forward([x/(x - x) for x in inputs], streamlines)

class LossIsInfinite(Plain):
    def compute_loss(self, outputs, targets): return -torch.cat(outputs).sum().mul(0).log(), 4

class NoN(Plain):
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs, targets)[0], 0

class Vector(Plain):
    def compute_loss(self, outputs, targets): return torch.cat(self.errors(outputs, targets)), 4

class Chance(Plain):
    def forward(self, inputs, streamlines): return [F.dropout(o, .1) for o in super().forward(inputs, streamlines)]

class ChanceInTheLoss(Plain):
    def compute_loss(self, outputs, targets): return super().compute_loss([o + .1*torch.randn_like(o) for o in outputs], targets)

class Sorted(Plain):
    def forward(self, inputs, streamlines): return super().forward(sorted(inputs, key=len), streamlines)
    def errors(self, outputs, targets): return [o.square().sum(1) for o in outputs]

class SortedPoints(Sorted):
    def forward(self, inputs, streamlines): return torch.cat(super().forward(inputs, streamlines))
    def errors(self, outputs, targets): return [outputs.square().sum(1)]

class Reversed(Sorted):
    def forward(self, inputs, streamlines): return Plain.forward(self, inputs[::-1], streamlines)

class Fewer(Sorted):
    def forward(self, inputs, streamlines): return Plain.forward(self, [x for x in inputs if len(x) > 4], streamlines)

class OneMore(Sorted):
    def forward(self, inputs, streamlines): return Plain.forward(self, [*inputs, inputs[0]], streamlines)

class Neighbours(Plain):
    def forward(self, inputs, streamlines):
        mean = torch.cat(list(inputs)).mean(0)
        return super().forward([x - .01*mean for x in inputs], streamlines)

class HandsOn(Plain):
    "The state at a line's end is the next line's beginning."
    def __init__(self): super().__init__(); self.body = nn.GRU(4, 4)
    def forward(self, inputs, streamlines):
        state, found = None, []
        for x in inputs:
            x, state = self.body(x, state)
            found.append(x)
        return super().forward(found, streamlines)

class PaddedMean(Plain):
    def forward(self, inputs, streamlines):
        x = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True)
        return super().forward([o[:len(i)] - o.mean(0) for o, i in zip(x, inputs)], streamlines)

class Unmasked(Attentive):
    def forward(self, inputs, streamlines):
        x = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return Plain.forward(self, [o[:len(i)] for o, i in zip(x, inputs)], streamlines)

class Oracle(Walker):
    tracking_step = MainModelAbstract.tracking_step
    def features(self, x): return super().features(torch.cat([x[1:], x[-1:]]))

class BothWays(Walker):
    tracking_step = MainModelAbstract.tracking_step
    def features(self, x): return self.body(x)[0] + self.body(x.flip(0))[0].flip(0)

class HowLong(Walker):
    tracking_step = MainModelAbstract.tracking_step
    def features(self, x): return super().features(x*len(x)/20)

class SeesLines(ModelWithOneInput, ModelWithPreviousDirections, ModelWithDirectionGetter):
    "Takes the next direction for the one before."
    accepts_ragged = True
    def __init__(self): super().__init__(nb_features=4, nb_previous_dirs=1); self.instantiate_direction_getter(7)
    def forward(self, inputs, streamlines):
        dirs = self.embed_lines(streamlines)
        return inputs.with_data(self.direction_getter(torch.cat([inputs.data, torch.cat([dirs[1:], dirs[:1]])], 1)))

class Spread(Plain):
    def forward(self, inputs, streamlines): return super().forward([x/x.std(0) for x in inputs], streamlines)

class RootOfZero(Plain):
    "Fine numbers, but no slope, where there is one point."
    def forward(self, inputs, streamlines): return super().forward([x + (self.layer(x) - self.layer(x).mean(0)).square().sum(1, keepdim=True).sqrt() for x in inputs], streamlines)

class TooShort(Plain):
    def __init__(self): super().__init__(); self.conv = nn.Conv1d(4, 4, 3)
    def forward(self, inputs, streamlines): return super().forward([x + self.conv(x.T).mean(1) for x in inputs], streamlines)

class Remembers(Plain):
    last = 0.
    def forward(self, inputs, streamlines):
        before, self.last = self.last, inputs[0].mean(0).detach()
        return super().forward([x - before for x in inputs], streamlines)

class KeepsItsGraph(Walker):
    state = None
    def forward(self, inputs, streamlines):
        found = []
        for x in inputs:
            x, self.state = self.body(x, self.state)
            found.append(self.direction_getter(x))
        return found

class WritesInputs(Plain):
    def forward(self, inputs, streamlines): return super().forward([x.mul_(.5) for x in inputs], streamlines)

class WritesLines(Plain):
    def forward(self, inputs, streamlines):
        for s in streamlines: s -= s[:1].clone()
        return super().forward(inputs, streamlines)

class WritesTargets(Plain):
    def compute_loss(self, outputs, targets):
        for t in targets: t[0] = t[1]
        return super().compute_loss(outputs, targets)

class TakesOut(Plain):
    "Its list is another one afterwards."
    def forward(self, inputs, streamlines): return [self.layer(inputs.pop(0)) for _ in range(len(inputs))]

class Forgets(Walker):
    def tracking_step(self, inputs, previous_dirs, state=None): return super().tracking_step(inputs, previous_dirs, None)

class LetsTheWrongOnesGo(Walker):
    def select_state(self, state, keep): return None if state is None else state[:, :int(keep.sum())]

class ColdStart(Walker):
    def warm_up(self, inputs, lines): return None

class OtherScale(Walker):
    def tracking_step(self, inputs, previous_dirs, state=None): return super().tracking_step(inputs*1.01, previous_dirs, state)

class StepIsNoPair(Walker):
    def tracking_step(self, inputs, previous_dirs, state=None): return super().tracking_step(inputs, previous_dirs, state)[0]

class PlainTensor(Plain):
    def __init__(self): super().__init__(); self.mix = torch.randn(4, 4).requires_grad_(False).to(torch.float64)
    def forward(self, inputs, streamlines): return super().forward([x @ self.mix.to(x) for x in inputs], streamlines)

class LearnsASide(Plain):
    mean = 0.
    def forward(self, inputs, streamlines):
        if self.training: self.mean = .9*self.mean + .1*torch.cat(list(inputs)).mean(0).detach().cpu()
        return super().forward([x - (self.mean.to(x) if torch.is_tensor(self.mean) else 0.) for x in inputs], streamlines)

class SavesHalf(Plain):
    def state_dict(self, *args, **kwargs): return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "bias" not in k}
    def load_state_dict(self, state, **kwargs): return super().load_state_dict(state, strict=False)

class OwnDefault(Plain):
    "An argument that the folder knows nothing of."
    def __init__(self): super().__init__(); self.register_buffer("scale", torch.rand(1) + 1, persistent=False)
    def forward(self, inputs, streamlines): return super().forward([x*self.scale for x in inputs], streamlines)

class Itself(Plain):
    def compute_loss(self, outputs, targets): return sum((o - o.detach()).square().sum() for o in outputs), 1

class Detached(Plain):
    def forward(self, inputs, streamlines): return [o.detach() for o in super().forward(inputs, streamlines)]

class Unused(Plain):
    def __init__(self): super().__init__(); self.more = nn.Linear(4, 4)

class CutOff(Plain):
    def __init__(self): super().__init__(); self.more = nn.Linear(4, 4)
    def forward(self, inputs, streamlines):
        with torch.no_grad(): more = [self.more(x) for x in inputs]
        return super().forward(more, streamlines)

class TimesZero(Plain):
    def __init__(self): super().__init__(); self.more = nn.Linear(4, 4)
    def forward(self, inputs, streamlines): return super().forward([x + 0*self.more(x) for x in inputs], streamlines)

class Sum(Plain):
    def compute_loss(self, outputs, targets):
        errors = torch.cat(self.errors(outputs, targets))
        return errors.sum(), len(errors)

class MeanAndOne(Plain):
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs, targets)[0], 1

class CountsLines(Plain):
    def compute_loss(self, outputs, targets): return super().compute_loss(outputs, targets)[0], len(targets)

class MeanOfMeans(Plain):
    def compute_loss(self, outputs, targets):
        errors = self.errors(outputs, targets)
        return torch.stack([e.mean() for e in errors]).mean(), sum(map(len, errors))

class SumOfMeans(Plain):
    def compute_loss(self, outputs, targets):
        errors = self.errors(outputs, targets)
        return sum(e.mean() for e in errors), sum(map(len, errors))

class PaddedLoss(Plain):
    def compute_loss(self, outputs, targets):
        errors = self.errors(outputs, targets)
        return nn.utils.rnn.pad_sequence(errors).mean(), sum(map(len, errors))

class Root(Plain):
    def compute_loss(self, outputs, targets):
        loss, n = super().compute_loss(outputs, targets)
        return loss.sqrt(), n

class Largest(Plain):
    def compute_loss(self, outputs, targets):
        errors = torch.cat(self.errors(outputs, targets))
        return errors.max(), len(errors)

class Singles(Plain):
    def forward(self, inputs, streamlines): return [o.float() + torch.ones(3) for o in super().forward(inputs, streamlines)]

class MadeAsFloats(Plain):
    def forward(self, inputs, streamlines): return super().forward([torch.zeros(len(x), 4) + x.float() for x in inputs], streamlines)

class AtHome(Plain):
    def __init__(self): super().__init__(); self.mean = torch.zeros(4)
    def forward(self, inputs, streamlines): return super().forward([x - self.mean for x in inputs], streamlines)

class ThroughNumpy(Plain):
    def forward(self, inputs, streamlines): return super().forward([x + torch.from_numpy(x.numpy()**2) for x in inputs], streamlines)

class StraightThrough(Plain):
    def forward(self, inputs, streamlines): return [o + .1*(o**2).detach() for o in super().forward(inputs, streamlines)]


WRONG = {
    Raises: {"runs"}, NotANumber: {"runs"}, LossIsInfinite: {"runs"}, NoN: {"runs"}, Vector: {"runs"}, Chance: {"repeats"}, ChanceInTheLoss: {"repeats"},
    Sorted: {"outputs"}, SortedPoints: {"outputs"}, Reversed: {"outputs"}, Fewer: {"outputs", "two points"}, OneMore: {"outputs", "loss adds up"},
    Neighbours: {"lines are alone", "loss adds up"}, HandsOn: {"lines are alone", "loss adds up"}, PaddedMean: {"lines are alone"}, Unmasked: {"lines are alone"},
    Oracle: {"past"}, BothWays: {"past"}, HowLong: {"past"}, SeesLines: {"past"},
    Spread: {"two points"}, RootOfZero: {"two points"}, TooShort: {"two points"}, Remembers: {"no memory"}, KeepsItsGraph: {"no memory"},
    WritesInputs: {"nothing is changed"}, WritesLines: {"nothing is changed"}, WritesTargets: {"nothing is changed"}, TakesOut: {"nothing is changed"},
    Forgets: {"tracking"}, LetsTheWrongOnesGo: {"tracking"}, ColdStart: {"tracking"}, OtherScale: {"tracking"}, StepIsNoPair: {"tracking"},
    PlainTensor: {"folder"}, LearnsASide: {"folder"}, SavesHalf: {"folder"}, OwnDefault: {"folder"},
    Itself: {"learns", "every weight"}, Detached: {"learns", "every weight"}, Unused: {"every weight"}, CutOff: {"every weight", "gradients"}, TimesZero: {"every weight"},
    Sum: {"loss adds up"}, MeanAndOne: {"loss adds up"}, CountsLines: {"loss adds up"}, MeanOfMeans: {"loss adds up"}, SumOfMeans: {"loss adds up"},
    PaddedLoss: {"loss adds up"}, Root: {"loss adds up"}, Largest: {"loss adds up"}, Singles: {"float64", "device"}, MadeAsFloats: {"float64", "device"}, AtHome: {"device"},
    ThroughNumpy: {"device"}, StraightThrough: {"gradients"},
}


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_model_is_caught(cls):
    report = check_model(cls, raise_on=None)
    assert set(report.failed) == WRONG[cls], report
    assert all(o.do.endswith(".") and o.found for o in report.findings if o.status == "failed")


def test_every_check_has_a_wrong_model(): assert set().union(*WRONG.values()) == set(MODEL_CHECKS)


# ---- what the library has

FORMS = {
    "lstm": dict(nb_features=4), "gru, all": dict(nb_features=3, rnn_key="gru", rnn_layer_sizes=[9, 7], use_skip_connection=True, use_layer_normalization=True, dropout=.3,
                                                  nb_previous_dirs=2, neighborhood_type="axes", dg_args=dict(add_eos=True, axis_head=True, second_step_weight=1.)),
    "embedded": dict(nb_features=4, step_size=.5, input_embedding_key="nn_embedding", input_embedded_size=5, nb_previous_dirs=1, prev_dirs_embedding_key="nn_embedding",
                     prev_dirs_embedded_size=4, normalize_prev_dirs=True, dg_key="sphere-classification", dg_args=dict(sphere="repulsion100", add_eos=True)),
    "cnn": dict(nb_features=2, neighborhood_type="grid", input_embedding_key="cnn_embedding", nb_cnn_filters=[4], kernel_size=[2], streamline_space="vox", legacy_half_voxel=True)}
SMALL = dict(nb_features=4, input_embedded_size=8, nheads=2, n_layers_e=2)


@pytest.mark.parametrize("form", FORMS)
def test_learn2track(form): check_model(Learn2TrackModel, **FORMS[form])


@pytest.mark.parametrize("cls", [OriginalTransformerModel, TransformerSrcOnlyModel, TransformerSrcAndTgtModel])
def test_transformers(cls):
    more = dict(target_embedded_size=8) if "Tgt" in cls.__name__ else {}
    check_model(cls, **SMALL, **more)
    check_model(cls, **SMALL, **more, max_len=19, norm_first=True, window=4, dg_args=dict(add_eos=True, axis_head=True))


def test_auto_encoder(): assert "not applicable" not in {o.status for o in check_model(ModelAE).findings if o.name in ("folder", "learns", "loss adds up")}


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
def test_getters(key):
    options = dict(sphere="repulsion100") if "sphere" in key else {}
    for parts in (dict(), dict(add_eos=True), dict(axis_head=True), dict(add_eos=True, axis_head=True, second_step_weight=.5)):
        report = check_direction_getter(key, raise_on=None, **options, **parts)
        assert report.ok, report
    assert (report["density"] == "one direction, no density") == (DIRECTION_GETTERS[key].density_on is None)


@pytest.mark.cuda
def test_devices():
    "What cannot be tried without values is tried on a GPU."
    for cls, options in ((Learn2TrackModel, dict(nb_features=4)), (TransformerSrcOnlyModel, SMALL), (ModelAE, {})): assert check_model(cls, **options)["device"] == "runs on cuda"
    assert check_model(AtHome, raise_on=None).failed == ["device"] and check_model(ThroughNumpy, raise_on=None).failed == ["device"]


# ---- wrong getters

class OneLoss(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return super().direction_terms(rows, dirs).mean()

class OtherRows(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return 1 - F.cosine_similarity(rows, dirs.data.sort(0).values)

class OtherMean(CosineRegressionDG):
    def mean_loss(self, rows, lines, ends=None):
        loss, n = super().mean_loss(rows, lines, ends)
        return 2*loss, n

class WritesOutputs(CosineRegressionDG):
    def det_directions(self, rows): return rows.mul_(2)

class WritesInLoss(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return super().direction_terms(rows, dirs.with_data(dirs.data.mul_(1))) + 0*rows.detach().mul_(1.5).sum(1)

class GetterByChance(CosineRegressionDG):
    def det_directions(self, rows): return rows + torch.randn_like(rows)

class NoHistory(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return super().direction_terms(rows.detach(), dirs)

class Extra(CosineRegressionDG):
    def __init__(self, input_size, **parts): super().__init__(input_size, **parts); self.more = nn.Linear(3, 3)

class ItsOwnTarget(CosineRegressionDG):
    "Compares with what it just gave."
    def direction_terms(self, rows, dirs): return (rows - rows.detach()).square().sum(1)

class TwoNumbers(CosineRegressionDG):
    def det_directions(self, rows): return rows[:, :2]

class OwnDraws(SphereClassificationDG):
    def prob_directions(self, rows, draws): return super().prob_directions(rows, torch.rand(len(rows), 4))

class BatchDraws(SphereClassificationDG):
    def prob_directions(self, rows, draws): return super().prob_directions(rows, draws.mean(0).expand(len(rows), -1))

class Explodes(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return super().direction_terms(rows, dirs)*rows.norm(dim=1).exp()

class NoNorm(CosineRegressionDG):
    def direction_terms(self, rows, dirs): return 1 - (rows*dirs.data).sum(1)/(rows.norm(dim=1)*dirs.data.norm(dim=1))

class TooDense(SphereClassificationDG):
    def log_densities(self, rows, dirs): return super().log_densities(rows, dirs) + .1

class EndsAtCuts(CosineRegressionDG):
    def compute_loss(self, *args, ends=None, **more): return super().compute_loss(*args, **more)

WRONG_GETTERS = {
    OneLoss: {"rows"}, OtherRows: {"rows"}, OtherMean: {"rows"}, WritesOutputs: {"nothing is changed"}, GetterByChance: {"nothing is changed"},
    NoHistory: {"gradients"}, Extra: {"gradients"}, ItsOwnTarget: {"learns"}, TwoNumbers: {"tracking"}, OwnDraws: {"tracking"}, BatchDraws: {"tracking"},
    Explodes: {"extremes"}, NoNorm: {"extremes"}, TooDense: {"density"}, EndsAtCuts: {"ends"}}


@pytest.mark.parametrize("cls", WRONG_GETTERS, ids=lambda cls: cls.__name__)
def test_a_wrong_getter_is_caught(cls):
    options = dict(sphere="repulsion100") if issubclass(cls, SphereClassificationDG) else {}
    report = check_direction_getter(cls, raise_on=None, add_eos=cls is EndsAtCuts, **options)
    assert set(report.failed) == WRONG_GETTERS[cls], report


def test_every_check_has_a_wrong_getter(): assert set().union(*WRONG_GETTERS.values()) == set(GETTER_CHECKS)


# ---- the report

def test_a_failure_is_an_error_with_its_report():
    with pytest.raises(AssertionError, match="To do: use them in forward") as raised: check_model(Unused)
    assert isinstance(raised.value, CheckFailed) and raised.value.report.failed == ["every weight"]
    assert check_model(Unused, leave_out=["every weight"]).ok
    with pytest.raises(ValueError, match="Did you mean 'every weight'"): check_model(Unused, leave_out=["every weigt"])
    with pytest.raises(ValueError, match="raise_on is 'failed' or None"): check_model(Unused, raise_on="all")
    report = check_model(Unused, raise_on=None)
    assert json.loads(json.dumps(report)) == report and json.loads(json.dumps(report.as_dict()))["ok"] is False
    assert list(report) == list(MODEL_CHECKS) and "1 failed" in report.headline()


def test_one_fault_is_told_once():
    report = check_model(Raises, raise_on=None)
    assert {o.found for o in report.findings if o.status == "not applicable"} == {"needs 'runs'", "needs 'no memory'", "needs 'repeats'", "needs 'outputs'", "needs 'float64'"}
    assert "return [self.layer(x).reshape(7, 7)" in report["runs"]                       # the line of the user


def test_a_report_obeys_nothing():
    report = CheckReport("<b>a\x1b[2J", [Finding("<i>", "failed", "<script>\u202e" + "x"*5000, "mend\nit.")])
    assert "\x1b" not in repr(report) and "\u202e" not in repr(report) and len(repr(report)) < 2000 and len(repr(report).splitlines()) == 3
    html = report._repr_html_()
    assert not {"<b>", "<i>", "<script>"} & set(html.replace(">", "> ").split()) and "<script" not in html and "\x1b" not in html and "&lt;script&gt;" in html


def test_model_and_chance_stay_as_they_are():
    torch.manual_seed(3)
    model = Walker().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    a, b = (check_model(model) for _ in range(2))
    assert a == b and torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    with torch.no_grad(): assert check_model(model) == a


def test_a_promise_of_ones_own():
    try:
        @check_in(MODEL_CHECKS, "is small", needs=("runs",))
        def small(case):
            "It is small."
            if isinstance(case.model, Walker): raise NotApplicable("walkers may be large")
            raise Broken("it is large.", "make it smaller.")
        assert check_model(Plain, raise_on=None).failed == ["is small"] and check_model(Walker)["is small"] == "walkers may be large"
        assert MODEL_CHECKS.describe()["is small"] == small.__doc__ == "It is small."
    finally: MODEL_CHECKS.entries.pop("is small")


# ---- the command

def status(*words):
    try: run_command(dwiml_check_model, [str(w) for w in words])
    except SystemExit as e: return e.code
    return 0


MINE = """
import pathlib, torch
from torch import nn
from dwiml_nb.all import CosineRegressionDG, MainModelAbstract
pathlib.Path(__file__).with_suffix('.ran').touch()

class Right(MainModelAbstract):
    def __init__(self, nb_features, add=0.):
        super().__init__()
        self.layer, self.add = nn.Linear(nb_features, 3), add
    def forward(self, inputs, streamlines): return [self.layer(x) for x in inputs]
    def compute_loss(self, outputs, targets):
        errors = torch.cat([(o[:-1] - t.diff(dim=0)).square().sum(1) for o, t in zip(outputs, targets)])
        return errors.mean() + self.add*len(errors), len(errors)

class Getter(CosineRegressionDG):
    def det_directions(self, rows): return -rows
"""


def test_the_command(tmp_path, capsys):
    mine = tmp_path / "mine_for_checks.py"
    mine.write_text(MINE)
    (tmp_path / "right.toml").write_text("nb_features = 4")
    (tmp_path / "wrong.json").write_text('{"nb_features": 4, "add": 1.0}')
    name = "mine_for_checks:Right"
    assert status(name, "--args", tmp_path / "right.toml") == 2 and not mine.with_suffix(".ran").exists()
    assert "not allowed to run here" in (told := capsys.readouterr().err) or "not on this machine, nor allowed" in told
    assert status(name, "--args", tmp_path / "right.toml", "--trust", mine) == 0
    assert mine.with_suffix(".ran").exists() and "Right: 14 passed, 0 failed" in capsys.readouterr().out
    assert status(name, "--args", tmp_path / "wrong.json", "--trust", mine, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [o["name"] for o in found["findings"] if o["status"] == "failed"] == ["loss adds up"]
    assert status(name, "--args", tmp_path / "wrong.json", "--trust", mine, "--leave_out", "loss adds up") == 0
    assert status("mine_for_checks:Getter", "--trust", mine, "--args", '{"input_size": 5, "add_eos": true}') == 0
    assert "Getter: 7 passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("words, says", [
    (["dwiml_nb.models.learn2track.Learn2TrackModel"], "expected package.module:Class"), (["torch.nn.modules.linear:Linear"], "neither a model nor a direction getter"),
    (["dwiml_nb.models.learn2track:Learn2Track"], "no class of that name"), (["dwiml_nb.models.learn2track:Learn2TrackModel"], "nb_features"),
    (["dwiml_nb.models.learn2track:Learn2TrackModel", "--args", "{nb_features: 5}"], "expected '{\"name\": value"),
    (["dwiml_nb.models.learn2track:Learn2TrackModel", "--args", '{"nb_feature": 5}'], "Did you mean 'nb_features'"),
    (["dwiml_nb.models.learn2track:Learn2TrackModel", "--args", "nowhere.toml"], "no such arguments"),
    (["dwiml_nb.models.learn2track:Learn2TrackModel", "--args", '{"nb_features": 5}', "--leave_out", "lern"], "Did you mean 'learns'")], ids=str)
def test_nothing_to_check(words, says, capsys):
    assert status(*words) == 2
    assert says in capsys.readouterr().err
