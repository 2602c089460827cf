"""Direction getters: densities, draws, pictures, extreme outputs, and lines of uneven steps."""
import math

import pytest
import torch

from dwiml_nb.batch.spec import spec_of
from dwiml_nb.core.lines import previous_directions, unit
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.sphere import SPHERES, nearest_vertex, sphere_faces, sphere_vertices, vertex_areas
from dwiml_nb.directions.base import DIRECTION_GETTERS, DirectionGetter
from dwiml_nb.directions.registry import direction_getter
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.tracking.propagate import line_draws


def seeded(seed=0): return torch.Generator().manual_seed(seed)


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
