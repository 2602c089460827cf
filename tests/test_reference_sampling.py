"Sampling, neighbourhoods and directions against values computed by dwi_ml (tests/data/sampling.npz)."
from pathlib import Path
import numpy as np
import pytest
import torch
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.lines import directions, previous_directions
from dwiml_nb.core.volume import neighborhood_vectors, sample_nearest, sample_neighborhood, sample_trilinear

@pytest.fixture(scope='module')
def ref(): return {k: torch.tensor(v) for k,v in np.load(Path(__file__).parent/'data'/'sampling.npz').items() if v.dtype.kind in 'fbiu'}

@pytest.fixture(scope='module')
def lines(ref): return Ragged.from_lengths(ref['lines'], ref['lines_lengths'])

def close(a, b, atol=1e-5): torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=atol, equal_nan=True)

def test_trilinear_is_the_reference_half_a_voxel_further(ref):
    "The reference reads half a voxel off; called at c - 0.5 it is right, and so are we at c."
    close(sample_trilinear(ref['volume'], ref['coords_vox_corner']), ref['trilinear_at_coords_minus_half'])
    close(sample_trilinear(ref['volume'], ref['coords_vox_corner'], legacy_half_voxel=True), ref['trilinear'])

def test_nearest(ref):
    close(sample_nearest(ref['volume'], ref['coords_vox_corner'][ref['in_bounds']]), ref['nearest_in_bounds_only'])
    inside = sample_nearest(ref['mask'] > 0, ref['coords_vox_corner'])                # beyond the edge, the edge
    assert torch.equal(inside, ref['in_mask_nearest'].bool())

@pytest.mark.parametrize('name,args', [('axes_r1', ('axes', 1, 1)), ('axes_r2', ('axes', 2, 1)), ('axes_r2_res0p5', ('axes', 2, .5)),
                                       ('grid_r1', ('grid', 1, 1)), ('grid_r1_res0p7', ('grid', 1, .7)), ('grid_r2', ('grid', 2, 1))])
def test_neighbourhoods(ref, name, args):
    vectors = neighborhood_vectors(*args)
    close(vectors, ref[f'vectors_{name}'])
    if f'neighbourhood_{name}' in ref:
        close(sample_neighborhood(ref['volume'], ref['coords_vox_corner'][:10], vectors, legacy_half_voxel=True), ref[f'neighbourhood_{name}'])

def test_directions(ref, lines): close(directions(lines).data, ref['directions'])

@pytest.mark.parametrize('n', [1, 2, 3])
def test_previous_directions(ref, lines, n):
    close(previous_directions(lines, n).data, ref[f'previous_dirs_n{n}'])
    close(previous_directions(lines, n, normalize=True).data, ref[f'previous_dirs_n{n}_normalised'])
    close(previous_directions(lines, n).data[lines.offsets[1:] - 1], ref[f'previous_dirs_n{n}_last_point'])
