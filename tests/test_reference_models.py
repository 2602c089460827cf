"""Learn2Track models, Transformers and direction getters of dwi_ml 1.0.0, reproduced number by number.

tests/data/dwi_ml_models/<name>/ and tests/data/direction_getters.* are copies of values that dwi_ml computed on synthetic inputs. Two of its faults are
not reproduced: with EOS as a logit, the direction loss of each line's last row against (0, 0, 0); and the normalisation of the EOS logit. Run this file alone to print the largest differences: python tests/test_reference_models.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_nb.core.lines import directions, previous_directions
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.directions.densities import DensityDG
from dwiml_nb.directions.ends_starts import EndClass, EndLogit
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.base import load_model

DATA = Path(__file__).parent / "data"
MODELS = sorted(p.name for p in (DATA / "dwi_ml_models").iterdir())
RECURRENT = [name for name in MODELS if name.startswith("l2t")]
GETTERS = json.loads((DATA / "direction_getters.json").read_text())
TOLERANCE = 1e-5
largest = {}


def same(what, ours, reference):
    "Compare, NaN for NaN, and remember the largest difference."
    ours, reference = np.asarray(ours.detach() if torch.is_tensor(ours) else ours), np.asarray(reference)
    assert ours.shape == reference.shape, f"{what}: {ours.shape}, reference {reference.shape}"
    assert (np.isnan(ours) == np.isnan(reference)).all(), f"{what}: NaN in other places"
    diff = float(np.nan_to_num(np.abs(ours - reference)).max(initial=0.))
    largest[what] = max(largest.get(what, 0.), diff)
    assert diff < TOLERANCE, f"{what} differs by {diff}"


def bce(probs, lengths):
    "Binary cross-entropy of the reference's P(EOS), 1 at each line's last point."
    label = np.zeros(len(probs)); label[np.cumsum(lengths) - 1] = 1
    return -(label*np.log(probs) + (1 - label)*np.log1p(-probs))


def check_losses(what, compute_loss, outputs, target, io, eos_weight=None, eos_probs=None):
    "All losses; `eos_weight` is given where the reference's last rows are tainted."
    loss, n = compute_loss(outputs, target)
    per_point, one = compute_loss(outputs, target, average_results=False)
    assert one == 1
    lengths = io["loss_lengths"]
    per_point = np.concatenate([o.detach().numpy() for o in per_point.unbind()]) if isinstance(per_point, Ragged) else torch.cat(per_point).detach().numpy()
    last = np.cumsum(lengths) - 1
    if eos_weight is None:
        same(f"{what}: loss", loss, io["loss_mean"])
        same(f"{what}: loss per point", per_point, io["loss_per_point"])
        assert n == io["loss_n"]
    else:
        ends = eos_weight*bce(eos_probs.astype(np.float64), lengths)
        has_direction = np.ones(len(ends), bool); has_direction[last] = False
        same(f"{what}: loss per point, last rows apart", per_point[has_direction], io["loss_per_point"][has_direction])
        same(f"{what}: loss of last rows, the end's alone", per_point[last], ends[last])
        same(f"{what}: loss", loss, (io["loss_per_point"] - ends)[has_direction].mean() + ends.mean())
        assert n == has_direction.sum()


def as_there(getter, rows):
    "Our outputs as dwi_ml's: of two heads, the mean with its end, and sigma or kappa."
    if not isinstance(getter, DensityDG): return {"output": rows}
    own, more = rows.split([getter.nb_columns, rows.shape[1] - getter.nb_columns], 1)
    _, means, widths = getter.components(own)
    return {"output_0": torch.cat([means[:, 0], more], 1), "output_1": widths[:, 0].exp() if getter.key == "gaussian" else widths[:, 0, 0]}


def same_outputs(what, getter, rows, io, name="output", at=slice(None)):
    "Compare raw outputs with the arrays `name` or `name_0`, `name_1`."
    for k, v in as_there(getter, rows).items(): same(what, v, io[name + k.removeprefix("output")][at])


def is_tainted(getter):
    "Where dwi_ml compares last rows with (0, 0, 0)."
    return getter.add_eos and isinstance(getter.end, EndLogit) and not isinstance(getter.end, EndClass)


def model_and_io(name):
    io = np.load(DATA / "dwi_ml_models" / name / "io.npz")
    inputs, seen = (Ragged.from_lengths(torch.from_numpy(io[k]), io["lengths"]) for k in ("inputs", "streamlines"))
    target = Ragged.from_lengths(torch.from_numpy(io["target_streamlines"]), io["target_lengths"])
    return load_model(DATA / "dwi_ml_models" / name), io, inputs, seen, target


def hidden_values(states):
    return {f"hidden_{i}_{k}": v for i, s in enumerate(states) for k, v in zip("hc", s if isinstance(s, tuple) else (s,))}


@pytest.mark.parametrize("name", MODELS)
def test_whole_lines(name):
    model, io, inputs, seen, target = model_and_io(name)
    assert type(model).__name__ == (DATA / "dwi_ml_models" / name / "model_type.txt").read_text()
    assert (model.streamline_space, model.legacy_half_voxel) == ("vox", True)        # what a folder of dwi_ml's means
    outputs = model(inputs, seen)
    same_outputs("outputs", model.direction_getter, outputs.data, io, "outputs")
    if name in RECURRENT:
        for k, v in hidden_values(model(inputs, seen, return_hidden=True)[1]).items(): same("hidden states", v, io[k])
    tainted = is_tainted(model.direction_getter)
    if model.uses_last_point:
        probs = model.compute_loss(outputs, target, return_eos_probs=True)[2]
        same("eos probability", probs, io["eos_probs_mean"])
        same("eos probability", model.compute_loss(outputs, target, average_results=False, return_eos_probs=True)[2].data, io["eos_probs_per_point"])
    check_losses("models", model.compute_loss, outputs, target, io, model.direction_getter.eos_weight if tainted else None,
                 io["eos_probs_per_point"] if tainted else None)
    if not tainted:
        per_line = [o.mean().item() for o in model.compute_loss(outputs, target, average_results=False)[0]]
        same("loss per line", per_line, io["loss_per_line_mean"])


@pytest.mark.parametrize("name", MODELS)
def test_lists_give_lists(name):
    model, io, inputs, seen, target = model_and_io(name)
    outputs = model(inputs.unbind(), seen.unbind())
    assert isinstance(outputs, list) and [len(o) for o in outputs] == io["lengths"].tolist()
    same_outputs("outputs from lists", model.direction_getter, torch.cat(outputs), io, "outputs")
    losses, _ = model.compute_loss(outputs, target.unbind(), average_results=False)
    assert isinstance(losses, list) and [len(o) for o in losses] == io["loss_lengths"].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_point_by_point(name):
    model, io, inputs, seen, _ = model_and_io(name)
    first, prev, state, outputs = seen.offsets[:-1], previous_directions(seen, model.nb_previous_dirs).data, None, None
    with torch.no_grad():
        for i in range(int(io["tracking_prefix_points"])):
            outputs, state = model.tracking_step(inputs.data[first + i], prev[first + i], state)
    same_outputs("tracking outputs", model.direction_getter, outputs, io, "tracking_output")
    same("tracking directions", model.get_tracking_directions(outputs, "det", .5), io["tracking_direction_det"])


@pytest.mark.parametrize("name", MODELS)
def test_continued_and_compacted(name):
    "Warm up on the first points, drop some lines, go on: the same outputs as on whole lines; Learn2Track also with `point_idx=-1`."
    model, io, inputs, seen, _ = model_and_io(name)
    k = int(io["tracking_prefix_points"])
    keep = seen.lengths > k
    with torch.no_grad():
        state = model.select_state(model.warm_up(Ragged.from_list([o[:k] for o in inputs]), Ragged.from_list([o[:k] for o in seen])), keep)
        here, so_far = inputs.offsets[:-1][keep] + k, [o[:k+1] for o in seen[keep]]
        if name in RECURRENT:
            outputs = model(inputs.data[here], so_far, hidden_recurrent_states=state, point_idx=-1)
            same_outputs("outputs after a warm-up", model.direction_getter, outputs, io, "outputs", here.numpy())
        outputs = model.tracking_step(inputs.data[here], previous_directions(seen, model.nb_previous_dirs).data[here], state)[0]
    same_outputs("outputs after a warm-up", model.direction_getter, outputs, io, "outputs", here.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_several_lines(name):
    "Where the reference goes wrong: each line's gradient must be its own."
    model, io, inputs, seen, target = model_and_io(name)
    model = model.double()
    x = inputs.data.double().requires_grad_()
    model.compute_loss(model(inputs.with_data(x), seen.to(torch.float64)), target.to(torch.float64))[0].backward()
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for line in range(3):
        here = (inputs.line_index == line)[:, None]*way
        with torch.no_grad():
            up, down = (model.compute_loss(model(inputs.with_data(x + e*here), seen.to(torch.float64)), target.to(torch.float64))[0] for e in (1e-6, -1e-6))
        same("gradient of one line", (x.grad*here).sum(), ((up - down)/2e-6).item())


def test_the_model_comes_back_from_our_own_folder(tmp_path):
    for name in MODELS:
        model, io, inputs, seen, _ = model_and_io(name)
        model.save_params_and_state(tmp_path / name)
        again = load_model(tmp_path / name)
        assert again.params_for_checkpoint == model.params_for_checkpoint
        assert torch.equal(again(inputs, seen).data, model(inputs, seen).data)


def check_normalised(getter, inputs, outputs, target, io):
    "dwi_ml's values are tainted throughout: what they should be, in numpy."
    (a, b), (c, d) = ((io[f"state/layers.{i}.weight"].astype(np.float64), io[f"state/layers.{i}.bias"]) for i in (0, 1))
    raw = np.maximum(inputs @ a.T + b, 0) @ c.T + d
    dirs = getter.normalize_outputs*raw[:, :3]/np.linalg.norm(raw[:, :3], axis=1, keepdims=True)
    same("normalised outputs", outputs, np.concatenate([dirs, raw[:, 3:]], 1))
    same("normalised directions", dirs/getter.normalize_outputs, io["output"][:, :3]/np.linalg.norm(io["output"][:, :3], axis=1, keepdims=True))
    lengths = target.lengths.numpy()
    last = np.cumsum(lengths) - 1
    steps, of = directions(target).data.numpy(), np.setdiff1d(np.arange(len(raw)), last)
    apart = {"cosine-regression": lambda y, t: 1 - (y*t).sum(1)/np.linalg.norm(y, axis=1)/np.linalg.norm(t, axis=1),
             "l2-regression": lambda y, t: np.linalg.norm(y - t, axis=1)}[getter.key](dirs[of], steps)
    ends = getter.eos_weight*bce(1/(1 + np.exp(-raw[:, 3])), lengths)
    per_row = ends.copy(); per_row[of] += apart
    same("losses of normalised outputs", getter.compute_loss(outputs, target, average_results=False)[0].data, per_row)
    same("losses of normalised outputs", getter.compute_loss(outputs, target)[0], apart.mean() + ends.mean())


@pytest.mark.parametrize("case", GETTERS["cases"])
def test_direction_getter(case):
    z = np.load(DATA / "direction_getters.npz")
    io = {k.removeprefix(case + "/"): z[k] for k in z if k.startswith(case + "/")}
    init = {k: v for k, v in GETTERS["cases"][case]["init"].items() if k != "input_size"}
    getter = direction_getter(GETTERS["cases"][case]["key"], GETTERS["input_size"], **init).eval()
    getter.load_state_dict({k.removeprefix("state/"): torch.from_numpy(v) for k, v in io.items() if k.startswith("state/")})
    target = Ragged.from_lengths(torch.from_numpy(z["target_streamlines"]), z["target_lengths"])
    inputs = z["inputs_eos" if getter.add_eos else "inputs_no_eos"]
    outputs = getter(torch.from_numpy(inputs))
    if getattr(getter, "normalize_outputs", False) and getter.add_eos: return check_normalised(getter, inputs, outputs, target, io)
    same_outputs("getter outputs", getter, outputs, io)
    tainted = is_tainted(getter)
    check_losses("getters", getter.compute_loss, outputs, target, io, getter.eos_weight if tainted else None, io.get("eos_prob"))
    same("getter directions", getter.get_tracking_directions(outputs), io["direction_det"])
    if getter.add_eos:
        same("getter eos probability", getter.eos_probs(outputs), io["eos_prob"])
        same("getter directions", getter.get_tracking_directions(outputs, eos_threshold=.45), io["direction_det_thresh0.45"])
        assert not torch.equal(getter.get_tracking_directions(outputs, eos_threshold=0.).isnan(), getter.get_tracking_directions(outputs, eos_threshold=1.).isnan())
        getter.get_tracking_directions(outputs, eos_threshold="max")
    assert len(directions(target).data) == 16


if __name__ == "__main__":
    code = pytest.main([__file__, "-q", "-p", "no:cacheprovider"])
    import test_reference_models as run
    for k, v in run.largest.items(): print(f"{k:50} {v:.1e}")
    raise SystemExit(code)
