"""Direction getters: densities, draws, pictures, extreme outputs, and lines of uneven steps."""
import json
import math
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dwiml_nb.batch.spec import spec_of
from dwiml_nb.core.lines import directions, previous_directions, unit
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.sphere import SPHERES, nearest_vertex, sphere_faces, sphere_vertices, vertex_areas
from dwiml_nb.directions.base import DIRECTION_GETTERS, DirectionGetter
from dwiml_nb.directions.fisher import drawn_fisher, log_fisher
from dwiml_nb.directions.gaussian import log_gaussian, log_gaussian_on_sphere
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.base import load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.tracking.propagate import line_draws

API = json.loads((Path(__file__).parent / "data" / "dwi_ml_api.json").read_text())
KEYS = ("cosine-regression", "l2-regression", "cosine-plus-l2-regression", "sphere-classification", "smooth-sphere-classification",
        "gaussian", "gaussian-mixture", "fisher-von-mises", "fisher-von-mises-mixture")
PROBABILISTIC, GAUSSIANS, FISHERS = KEYS[3:], KEYS[5:7], KEYS[7:]
LINES = Ragged.from_list([torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).cumsum(0) for n in (5, 9, 2, 6)])


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def getter_of(key, input_size=6, **args):
    torch.manual_seed(0)
    if "sphere" in key: args.setdefault("sphere", "repulsion100")
    return direction_getter(key, input_size, **args).eval()


def rows_of(getter, n=4, dtype=torch.float64, seed=1, end=-3.0):
    "Raw outputs: directions about one long, distributions neither flat nor narrow, no end, any axis."
    rows = torch.randn(n, getter.nb_columns + getter.nb_more, generator=seeded(seed)).to(dtype)
    if getter.key in GAUSSIANS:
        log_sigmas = rows[:, getter.nb_columns - 3 * getter.nb_components:getter.nb_columns]
        log_sigmas.mul_(0.3).sub_(0.7)
    if getter.add_eos: rows[:, getter.nb_columns] = end
    return rows


@lru_cache
def quadrature(nb=120):
    "Unit vectors and weights that integrate smooth functions over the sphere."
    z, w = np.polynomial.legendre.leggauss(nb)
    turn = (np.arange(2 * nb) + 0.5) * math.pi / nb
    z, turn = (torch.tensor(a).double().flatten() for a in np.meshgrid(z, turn, indexing="ij"))
    side = (1 - z * z).sqrt()
    return torch.stack([side * turn.cos(), side * turn.sin(), z], 1), torch.tensor(w).double().repeat_interleave(2 * nb) * math.pi / nb


# ---- what there is

def test_all_getters_by_name():
    told = DIRECTION_GETTERS.describe()
    assert set(KEYS) <= set(told)
    for key in KEYS:
        getter = getter_of(key)
        assert getter.key == key and 20 < len(told[key]) < 110
        assert getter.is_probabilistic == (key in PROBABILISTIC) == (getter.density_on is not None)
        assert getter.supports_compressed_streamlines == (key in ("l2-regression", *GAUSSIANS))      # as in dwi_ml
    assert getter_of("cos-plus-l2-regression").key == "cosine-plus-l2-regression"                   # dwi_ml's other name


@pytest.mark.parametrize("key", KEYS[:7] + KEYS[7:8])
def test_weights_have_the_names_that_dwi_ml_gives_them(key):
    R, half = 7, 4
    for eos in (False, True):
        values = dict(half=half, R=R, eos=int(eos), V=100, N=3)
        theirs = {k: [eval(o, {}, values) for o in shape] for k, shape in API["parameters"]["direction_getter"][key].items()}    # our own text
        if key == "gaussian-mixture" and eos: theirs |= {"layers_mean.1.weight": [10, half], "layers_mean.1.bias": [10]}            # none there
        state = getter_of(key, R, add_eos=eos).state_dict()
        assert {k: list(v.shape) for k, v in state.items()} == theirs and list(state) == list(theirs)


# ---- lengths that cannot be squared

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1e-16, 1.0, 1e17, 1e19, 1e30, 1e38])
def test_a_direction_of_any_length_is_a_direction(size, dtype):
    "Squared in float32, lengths below 1e-23 vanish and lengths above 1e19 overflow: a step of length zero, without a word."
    v = torch.tensor([[0.36, -0.48, 0.8], [0, 0, -1], [1, 1, 1]], dtype=dtype)
    long = v * torch.tensor(size, dtype=dtype)
    right = v / v.norm(dim=1, keepdim=True)
    for got in (unit(long), unit(long.clone().requires_grad_()).detach()): torch.testing.assert_close(got, right, atol=1e-3 if size < 1e-40 else 1e-6, rtol=0)
    lines = Ragged.from_list([torch.stack([o * 0, o]) for o in long])
    for got in (previous_directions(lines, 1, True), previous_directions(lines.with_data(lines.data.clone().requires_grad_()), 1, True)):
        torch.testing.assert_close(got.data[1::2].detach(), right, atol=1e-3 if size < 1e-40 else 1e-6, rtol=0)
    getter = direction_getter("cosine-regression", 4)
    assert torch.equal(getter.get_tracking_directions(long), long)


def test_zero_and_what_is_no_number_stay():
    v = torch.tensor([[0.0, 0, 0], [torch.nan, 1, 0], [torch.inf, 1, 0]])
    for got in (unit(v), unit(v.clone().requires_grad_())): assert got[0].tolist() == [0, 0, 0] and got[1:].isnan().any(1).all()


# ---- spheres

@pytest.mark.parametrize("name", SPHERES)
def test_areas_and_faces_cover_a_sphere(name):
    vertices, areas, faces = sphere_vertices(name), vertex_areas(name), sphere_faces(name)
    assert abs(areas.sum() - 4 * math.pi) < 1e-4 and (areas > 0).all() and len(faces) == 2 * len(vertices) - 4
    assert (torch.linalg.det(vertices[faces]) > 0).all() and faces.unique().tolist() == list(range(len(vertices)))
    edges = torch.cat([faces[:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0))])
    assert {tuple(e) for e in edges.tolist()} == {tuple(e) for e in edges.flip(1).tolist()}      # each edge twice, once either way
    assert nearest_vertex(vertices[None], vertices).tolist() == [list(range(len(vertices)))]


# ---- draws

def test_a_getter_is_given_the_draws_that_it_asks_for():
    @DIRECTION_GETTERS.register("of many draws")
    class Many(DirectionGetter):
        nb_draws = 7
        def direction_terms(self, rows, dirs): return (rows - dirs.data).norm(dim=1)
        def det_directions(self, rows): return rows
        def prob_directions(self, rows, draws): return draws[:, 4:7].to(rows) - 0.5
    try:
        model = Learn2TrackModel(2, rnn_layer_sizes=[3], dg_key="of many draws")
        assert (spec_of(model).nb_draws, spec_of(Learn2TrackModel(2, rnn_layer_sizes=[3])).nb_draws) == (7, 4)
        rows = torch.ones(3, 3)
        for few in (torch.rand(3, 6), torch.rand(2, 7), torch.rand(7)):
            with pytest.raises(ValueError, match=r"draws are \(3, 7\) numbers or more for 3 rows"): model.get_tracking_directions(rows, "prob", draws=few)
        numbers = torch.arange(3)
        assert torch.equal(line_draws(1, numbers, 2, 7)[:, :4], line_draws(1, numbers, 2))
        model.get_tracking_directions(rows, "prob", draws=line_draws(1, numbers, 2, spec_of(model).nb_draws))
    finally: del DIRECTION_GETTERS.entries["of many draws"]


# ---- densities

@pytest.mark.parametrize("key", PROBABILISTIC)
@pytest.mark.parametrize("args", [{}, {"add_eos": True, "axis_head": True}], ids=["alone", "ends and starts"])
def test_densities_are_one_in_all(key, args):
    getter = getter_of(key, **args)
    rows, (u, w) = rows_of(getter), quadrature()
    if getter.density_on == "sphere":
        total = getter.log_density(rows, u[None]).exp() @ w
        assert (total - 1).abs().max() < (2e-2 if "sphere" in key else 1e-6)                # classes are steps, whose borders cost precision
    else:
        _, means, log_sigmas = getter.components(rows[:, :getter.nb_columns])
        low, high = ((means + k * log_sigmas.exp()).amax(1) if k > 0 else (means + k * log_sigmas.exp()).amin(1) for k in (-7, 7))
        for i in range(len(rows)):
            axes = [torch.linspace(a, b, 90, dtype=torch.float64) for a, b in zip(low[i], high[i])]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
            total = getter.log_density(rows[i:i+1], grid).exp().sum() * math.prod(float(a[1] - a[0]) for a in axes)
            assert abs(total - 1) < 5e-3
    on_sphere = getter.log_on_sphere(rows[:, :getter.nb_columns], u).double().exp() @ w
    assert (on_sphere - 1).abs().max() < 2e-2


@pytest.mark.parametrize("key", KEYS)
def test_a_picture_is_one_in_all(key):
    getter = getter_of(key, add_eos=True, axis_head=True)
    outputs = Ragged.from_lengths(rows_of(getter, dtype=torch.float32), torch.tensor([3, 1]))
    for sphere in ("symmetric362", "repulsion724"):
        values = getter.picture(outputs, sphere)
        assert values.shape == (4, len(sphere_vertices(sphere))) and (values >= 0).all()
        torch.testing.assert_close(values @ vertex_areas(sphere), torch.ones(4), atol=1e-4, rtol=0)
        assert torch.equal(values, getter.picture(outputs.unbind(), sphere)) and torch.equal(values, getter.picture(outputs.data, sphere))
    if key in KEYS[:3]:
        nearest = nearest_vertex(outputs.data[:, :3], sphere_vertices("repulsion724"))
        assert values.argmax(1).tolist() == nearest.tolist() and (values > 0).sum() == 4
        with pytest.raises(ValueError, match=f"{key} answers with one direction and has no density"): getter.log_density(outputs, outputs.data[:, :3])


def test_gaussians_as_scipy_has_them():
    mixture, one = getter_of("gaussian-mixture"), getter_of("gaussian")
    rows, steps = rows_of(mixture), torch.randn(4, 3, generator=seeded(2)).double()
    weights, means, log_sigmas = mixture.components(rows)
    known = np.array([[stats.multivariate_normal(means[i, k], np.diag(log_sigmas[i, k].exp()**2)).logpdf(steps[i]) for k in range(3)] for i in range(4)])
    together = np.log((weights.exp().numpy() * np.exp(known)).sum(1))
    np.testing.assert_allclose(mixture.log_density(rows, steps), together, atol=1e-10)
    single = torch.cat([means[:, 0], log_sigmas[:, 0]], 1)
    np.testing.assert_allclose(one.log_density(single, steps), known[:, 0], atol=1e-10)
    lines = [torch.stack([0 * o, o]) for o in steps]
    for getter, mine, right in ((mixture, rows, together), (one, single, known[:, 0])):
        np.testing.assert_allclose(getter.compute_loss(mine, lines)[0], -right.mean(), atol=1e-10)
        np.testing.assert_allclose(torch.cat(getter.compute_loss(mine, lines, average_results=False)[0]), -right, atol=1e-10)
    wide = getter_of("gaussian", entropy_weight=0.3)
    entropy = np.array([stats.multivariate_normal(cov=np.diag(o.exp()**2)).entropy() for o in log_sigmas[:, 0]])
    np.testing.assert_allclose(torch.cat(wide.compute_loss(single, lines, average_results=False)[0]), -known[:, 0] - 0.3 * entropy, atol=1e-10)


@pytest.mark.parametrize("kappa", [1e-3, 0.1, 0.29, 0.31, 1.0, 20.0, 500.0, 1e4])
def test_fishers_as_scipy_has_them(kappa):
    mixture, one = getter_of("fisher-von-mises-mixture", max_kappa=2 * kappa), getter_of("fisher-von-mises", max_kappa=2 * kappa)
    rows = rows_of(mixture); rows[:, 12:] = 0                                                    # half of the largest kappa
    around = unit(rows[:, 3:6]) + torch.randn(4, 3, generator=seeded(2)).double() / max(kappa, 1)**0.5
    u = unit(around)
    weights, means, kappas = mixture.components(rows)
    assert torch.allclose(kappas, torch.tensor(kappa).double())
    known = np.array([[stats.vonmises_fisher((m := means[i, k].numpy()) / np.linalg.norm(m), kappa).logpdf(u[i] / np.linalg.norm(u[i])) for k in range(3)] for i in range(4)])
    np.testing.assert_allclose(mixture.log_density(rows, 7 * u), np.log((weights.exp().numpy() * np.exp(known)).sum(1)), atol=1e-9 * max(kappa, 1))
    single = torch.cat([3 * means[:, 0], torch.zeros(4, 1)], 1)
    np.testing.assert_allclose(one.log_density(single, u), known[:, 0], atol=1e-9 * max(kappa, 1))
    np.testing.assert_allclose(one.row_losses(single, Ragged.from_list([torch.stack([0 * o, 5 * o]) for o in u])), -known[:, 0], atol=1e-9 * max(kappa, 1))


def test_smooth_classes_as_a_divergence():
    getter = getter_of("smooth-sphere-classification")
    rows, dirs = rows_of(getter, 18), directions(LINES).data.double()
    angles = np.arccos(np.clip(unit(dirs) @ getter.vertices.double().T, -1, 1))
    targets = np.exp(-angles / 0.1) / np.exp(-angles / 0.1).sum(1, keepdims=True)
    right = stats.entropy(targets, rows.softmax(1), axis=1)
    np.testing.assert_allclose(getter.row_losses(rows, LINES.to(torch.float64)), right, atol=1e-6)


def test_the_direction_of_a_gaussian_step():
    "Against the integral over lengths, wherever the mean lies and whatever the spread."
    u = unit(torch.randn(40, 3, generator=seeded(5)).double())
    x, w = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(500))
    for mean, sigma in (((1.0, 0, 0), (0.5, 0.4, 0.3)), ((0.0, 0, 0), (1.0, 2, 0.5)), ((0.2, -3, 1), (1.0, 1, 1)), ((20.0, 0, 0), (9.0, 2, 5))):
        mean, log_sigma = torch.tensor(mean).double(), torch.tensor(sigma).double().log()
        top = float(mean.norm() + 12 * max(sigma))
        r = (x + 1) * top / 2
        by_hand = (log_gaussian(r[:, None, None] * u, mean, log_sigma).exp() * (r**2 * w)[:, None]).sum(0) * top / 2
        np.testing.assert_allclose(log_gaussian_on_sphere(u, mean, log_sigma).exp(), by_hand, rtol=1e-6, atol=1e-12)
    for size in (1e-6, 1e-3, 1e3, 1e6):
        assert log_gaussian_on_sphere(u, torch.ones(3), torch.full((3,), math.log(size))).isfinite().all()


# ---- draws

@pytest.mark.parametrize("key", PROBABILISTIC)
def test_draws_follow_the_density(key):
    "Counts in the cells of a sphere against the integral of the density over each (chi-square)."
    getter, n = getter_of(key, add_eos=True), 20_000
    vertices, (u, w) = sphere_vertices("repulsion100").double(), quadrature(200)
    for row in range(2):
        rows = rows_of(getter, seed=row + 3)[:1]
        dirs = getter.get_tracking_directions(rows.expand(n, -1), "prob", eos_threshold=1, draws=line_draws(row, torch.arange(n), 0, getter.nb_draws))
        expected = n * torch.zeros(100).double().index_add(0, nearest_vertex(u, vertices), w * getter.log_on_sphere(rows[:, :getter.nb_columns], u)[0].exp())
        found = nearest_vertex(dirs, vertices).bincount(minlength=100).double()
        if key in KEYS[3:5]: expected = n * rows[0, :100].softmax(0)                       # cells are the classes: no quadrature
        few = expected < 8
        e, f = (torch.cat([o[~few], o[few].sum()[None]]) for o in (expected, found))
        if e[-1] < 1: e, f = e[:-1], f[:-1]
        assert stats.chisquare(f.numpy(), (e * f.sum() / e.sum()).numpy()).pvalue > 1e-3


def test_draws_of_a_gaussian_along_each_axis():
    getter = getter_of("gaussian")
    rows = torch.tensor([[1.0, -2, 0.5, math.log(0.1), 0, math.log(3)]]).expand(5000, -1)
    steps = getter.get_tracking_directions(rows, "prob", draws=line_draws(1, torch.arange(5000), 0))
    for axis, (mean, sigma) in enumerate(((1, 0.1), (-2, 1), (0.5, 3))): assert stats.kstest(steps[:, axis], stats.norm(mean, sigma).cdf).pvalue > 1e-2
    assert np.abs(np.corrcoef(steps.T) - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("kappa", [1e-6, 1e-2, 1.0, 20.0, 1e4])
def test_draws_of_a_fisher_by_angle_and_turn(kappa):
    n = 5000
    mean = unit(torch.tensor([0.3, -0.5, -0.8]).double())
    dirs = drawn_fisher(mean.expand(n, 3), torch.full((n,), kappa).double(), line_draws(2, torch.arange(n), 0))
    off = ((dirs - mean)**2).sum(1) / 2                                                       # one minus the cosine
    cdf = lambda off: np.expm1(-kappa * off) / np.expm1(-2 * kappa)
    assert stats.kstest(off, cdf).pvalue > 1e-2
    side = unit(torch.linalg.cross(mean, torch.tensor([1.0, 0, 0]).double(), dim=0))
    turn = torch.atan2(dirs @ torch.linalg.cross(mean, side, dim=0), dirs @ side)
    assert stats.kstest(turn, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-2
    torch.testing.assert_close(dirs.norm(dim=1), torch.ones(n).double())


@pytest.mark.parametrize("key", PROBABILISTIC)
def test_a_draw_depends_on_its_numbers_alone(key):
    getter = getter_of(key, add_eos=True, axis_head=True)
    rows, draws = rows_of(getter, 30, torch.float32), torch.rand(30, 6, generator=seeded())
    go = lambda at: getter.get_tracking_directions(rows[at], "prob", 1, torch.ones(30, 3)[at], draws[at])
    assert go(slice(None)).dtype == torch.float32
    torch.testing.assert_close(go(slice(None)), torch.cat([go([i]) for i in range(30)]), atol=1e-6, rtol=1e-6)
    for edge in (0.0, 1.0): assert getter.get_tracking_directions(rows, "prob", 1, torch.ones(30, 3), torch.full((30, 4), edge)).isfinite().all()
    stop = getter.get_tracking_directions(rows_of(getter, 30, end=3.0), "prob", 0.5, torch.ones(30, 3), draws)
    if "sphere" not in key: assert stop.isnan().all()
    first = getter.get_tracking_directions(rows, "prob", 1, torch.zeros(30, 3), draws)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(30))                                     # the axis, whatever was drawn


def test_the_likeliest_component():
    for key, single in zip(("gaussian-mixture", "fisher-von-mises-mixture"), ("gaussian", "fisher-von-mises")):
        mixture, one, alone = getter_of(key), getter_of(single), getter_of(key, **{"nb_gaussians" if "gauss" in key else "nb_clusters": 1})
        rows, dirs = rows_of(mixture), unit(torch.randn(4, 3, generator=seeded()).double())
        weights, means, _ = mixture.components(rows)
        for i, found in enumerate(mixture.get_tracking_directions(rows)): assert torch.equal(found, means[i, weights[i].argmax()])
        rows, draws = rows_of(one), torch.rand(4, 4, generator=seeded()).double()
        of_one = torch.cat([torch.full((4, 1), 5.0), rows], 1)                                  # a mixture of one is that one
        torch.testing.assert_close(alone.log_density(of_one, dirs), one.log_density(rows, dirs))
        torch.testing.assert_close(alone.get_tracking_directions(of_one, "prob", draws=draws), one.get_tracking_directions(rows, "prob", draws=draws))


# ---- numbers far out

@pytest.mark.parametrize("key", GAUSSIANS)
def test_any_spread_is_finite(key):
    getter = getter_of(key, add_eos=True)
    for size in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        rows = rows_of(getter, len(LINES.data), torch.float32)
        rows[:, getter.nb_columns - 3 * getter.nb_components:getter.nb_columns] = math.log(size)
        finite_everywhere(getter, rows)
        exact = getter.compute_loss(rows.double(), LINES.to(torch.float64))[0]
        torch.testing.assert_close(getter.compute_loss(rows, LINES)[0].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("key", FISHERS)
def test_any_concentration_is_finite(key):
    for kappa in (1e-6, 1e-3, 0.3, 1.0, 88.0, 1e4):
        getter = getter_of(key, add_eos=True, max_kappa=2 * kappa)
        rows = rows_of(getter, len(LINES.data), torch.float32)
        rows[:, getter.nb_columns - getter.nb_components:getter.nb_columns] = 0
        finite_everywhere(getter, rows)
        exact = getter.compute_loss(rows.double(), LINES.to(torch.float64))[0]
        torch.testing.assert_close(getter.compute_loss(rows, LINES)[0].double(), exact, rtol=1e-5, atol=1e-4)
    kappa = torch.logspace(-6, 4, 300).requires_grad_()                                        # gradients against float64
    mean, u = unit(torch.tensor([[1.0, 2, 3], [-3, 1, 1]]))
    slopes = [torch.autograd.grad(log_fisher(u.to(k.dtype), mean.to(k.dtype), k).sum(), k)[0] for k in (kappa, kappa.detach().double().requires_grad_())]
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-4, atol=1e-5)
    getter = getter_of(key, add_eos=True, max_kappa=1e4)
    for logit in (-200.0, -50, 50, 200):
        rows = rows_of(getter, len(LINES.data), torch.float32)
        rows[:, getter.nb_columns - getter.nb_components:getter.nb_columns] = logit
        finite_everywhere(getter, rows)


def finite_everywhere(getter, rows):
    rows = rows.clone().requires_grad_()
    loss = getter.compute_loss(rows, LINES)[0]
    assert loss.isfinite() and torch.autograd.grad(loss, rows)[0].isfinite().all()
    values = rows.detach()
    draws = torch.rand(len(values), getter.nb_draws, generator=seeded())
    assert getter.get_tracking_directions(values, "prob", 1.0, draws=draws).isfinite().all()
    assert getter.picture(values, "symmetric362").isfinite().all() and getter.log_density(values, LINES.data + 1).isfinite().all()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("axis", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_gradients(key, eos, axis):
    getter = getter_of(key, add_eos=eos, axis_head=axis).double()
    lines = LINES.to(torch.float64)[[0, 2]]
    rows = rows_of(getter, 7 if eos else 5).requires_grad_()
    check = lambda f: torch.autograd.gradcheck(f, rows, fast_mode="sphere" in key)           # of many columns
    assert check(lambda o: getter.compute_loss(o, lines)[0]) and check(lambda o: getter.row_losses(o, lines))
    if key in PROBABILISTIC:
        dirs = torch.randn(len(rows), 3, generator=seeded(9)).double()
        assert check(lambda o: getter.log_density(o, dirs))
    weights = list(getter.parameters())
    x = torch.randn(len(rows), 6, generator=seeded()).double()
    found = torch.autograd.grad(getter.compute_loss(getter(x), lines)[0], weights)
    assert all((g != 0).any() for g in found)                                                 # every head learns


# ---- options

def test_lengths_of_targets_and_outputs():
    steps = [torch.tensor([[0.0, 0, 0], [3, 4, 0]])]
    for key in ("l2-regression", "cosine-plus-l2-regression", "gaussian", "gaussian-mixture"):
        plain, same = getter_of(key), getter_of(key, normalize_targets=2.0)
        rows, short = rows_of(plain, 1, torch.float32), [torch.tensor([[0.0, 0, 0], [1.2, 1.6, 0]])]
        torch.testing.assert_close(same.compute_loss(rows, steps)[0], plain.compute_loss(rows, short)[0])
        for wrong in (0, -1, "a", torch.nan):
            with pytest.raises(ValueError, match="normalize_targets is a number"): getter_of(key, normalize_targets=wrong)
    for key in FISHERS:                                                                        # directions: lengths play no part
        rows = rows_of(getter_of(key), 1, torch.float32)
        torch.testing.assert_close(getter_of(key).compute_loss(rows, steps)[0], getter_of(key).compute_loss(rows, short)[0])
        with pytest.raises(ValueError, match="max_kappa is a number > 0 and <= 1e.08, found -1"): getter_of(key, max_kappa=-1)
    for key in KEYS[:3]:
        getter = getter_of(key, normalize_outputs=2.0, add_eos=True)
        x = torch.randn(5, 6, generator=seeded())
        plain = getter_of(key, add_eos=True)
        torch.testing.assert_close(getter(x)[:, :3].norm(dim=1), torch.full((5,), 2.0))
        assert torch.equal(getter(x)[:, 3:], plain(x)[:, 3:])
    for key, option in (("gaussian-mixture", "nb_gaussians"), ("fisher-von-mises-mixture", "nb_clusters")):
        assert getter_of(key, **{option: 5}).nb_components == 5
        for wrong in (0, 2.5, "a", True, 10**9):                                               # a stranger's file may ask for anything
            with pytest.raises(ValueError, match=f"{option} is a whole number"): getter_of(key, **{option: wrong})
    with pytest.raises(ValueError, match="entropy_weight is a number >= 0"): getter_of("gaussian", entropy_weight=-1)


@pytest.mark.parametrize("sphere", SPHERES)
def test_any_sphere_of_dipy(sphere):
    for key in KEYS[3:5]:
        getter = getter_of(key, sphere=sphere, add_eos=True)
        nb = len(sphere_vertices(sphere))
        rows = getter(torch.randn(len(LINES.data), 6, generator=seeded()))
        assert rows.shape[1] == nb + 1 and getter.compute_loss(rows, LINES)[0].isfinite()
        assert "vertices" not in getter.state_dict()


# ---- compressed lines

def test_compressed_lines_are_supported_or_refused_by_name(tmp_path):
    small = dict(nb_features=2, rnn_layer_sizes=[3], compress_lines=0.1)
    for key in KEYS:
        if getter_of(key).supports_compressed_streamlines: assert Learn2TrackModel(dg_key=key, **small).compress_lines == 0.1; continue
        with pytest.raises(ValueError, match=f"'{key}' does not support compressed lines.*compress_lines=0.1.*l2-regression, gaussian, gaussian-mixture"):
            Learn2TrackModel(dg_key=key, **small)


def test_a_model_trained_on_compressed_lines_all_the_same_opens(tmp_path):
    "dwi_ml never refused them, and neither did earlier versions of ours."
    Learn2TrackModel(2, rnn_layer_sizes=[3]).save_params_and_state(tmp_path / "model")
    file = tmp_path / "model" / "parameters.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "compress_lines": 0.1}))
    with pytest.warns(UserWarning, match="'cosine-regression' does not support compressed lines"): model = load_model(tmp_path / "model")
    assert model.compress_lines == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_params_and_state(tmp_path / "again")
    with pytest.raises(ValueError, match="compressed"): Learn2TrackModel(2, rnn_layer_sizes=[3], compress_lines=0.1)        # still, after reading


def test_the_other_name_in_a_file(tmp_path):
    Learn2TrackModel(2, rnn_layer_sizes=[3], dg_key="cosine-plus-l2-regression").save_params_and_state(tmp_path / "model")
    file = tmp_path / "model" / "parameters.json"
    file.write_text(file.read_text().replace("cosine-plus-l2", "cos-plus-l2"))
    assert load_model(tmp_path / "model").direction_getter.key == "cosine-plus-l2-regression"


@pytest.mark.parametrize("key", GAUSSIANS)
def test_a_spread_beyond_the_ends_comes_back(key):
    getter = getter_of(key, add_eos=True, **({"entropy_weight": 0.1} if key == "gaussian" else {}))
    for log_sigma in (-1e6, -90.0, 90.0, 1e6):
        rows = rows_of(getter, len(LINES.data), torch.float32)
        widths = slice(getter.nb_columns - 3 * getter.nb_components, getter.nb_columns)
        rows[:, widths] = log_sigma
        finite_everywhere(getter, rows)
        rows.requires_grad_()
        slope = torch.autograd.grad(getter.compute_loss(rows, LINES)[0], rows)[0][:, widths].sum(1)
        assert (slope * math.copysign(1, log_sigma) >= 0).all() and (slope != 0).any()
