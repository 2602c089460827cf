"""Sampling a volume at random points, and around them."""
import itertools

import numba
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from dwiml_nb.core.kernels import kernel
from dwiml_nb.core.volume import block_order, neighborhood_vectors, reading_plan, sample_by_bag, sample_neighborhood, sample_trilinear
from side_by_side import Row, interleaved, peak_memory


# ---- peers

def eight_corner_gather(volume, points):
    "Textbook: the eight rows of every point in an explicit (n, 8, F) array, weighted and summed."
    low = (points - .5).floor()
    frac = (points - .5 - low)[:, None]
    corners = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    x,y,z = torch.minimum((low.long()[:, None] + corners).clamp(min=0), torch.tensor(volume.shape[:3]) - 1).unbind(2)
    weights = torch.where(corners.bool(), frac, 1 - frac).prod(2)
    return (volume[x, y, z]*weights[..., None]).sum(1)

def gather_around(volume, points, vectors):
    "Textbook: the coordinates repeated for each neighbour, then the gather."
    return eight_corner_gather(volume, (points[:, None] + vectors).reshape(-1, 3)).reshape(len(points), -1)

def grid_sample(volume, points):
    "torch's own, (1, F, X, Y, Z) laid out as `volume` is given."
    where = (2*points/torch.tensor(volume.shape[2:]) - 1).flip(1)
    return F.grid_sample(volume, where[None, None, None], padding_mode='border', align_corners=False)[0, :, 0, 0].T

def scipy_per_channel(volume, points):
    at = (points - .5).T
    return np.stack([map_coordinates(volume[..., f], at, order=1, mode='nearest') for f in range(volume.shape[-1])], 1)


# ---- the machine's limit: the same rows read in the same order, the output written, nothing else

@kernel(lambda: (np.ones((8, 3), np.float32), (2, 2, 2), np.ones((3, 3), np.float32), np.arange(3, dtype=np.int32), np.empty((3, 3), np.float32)))
def read_eight(table, dimensions, points, order, out):
    "Adds up the eight rows around each point, so that the compiler has to read them."
    nf,flat = table.shape[1], table.ravel()
    nx,ny,nz = dimensions
    for q in numba.prange(len(order)):
        m = order[q]
        x = min(max(int(points[m, 0] - np.float32(.5)), 0), nx - 2)
        y = min(max(int(points[m, 1] - np.float32(.5)), 0), ny - 2)
        z = min(max(int(points[m, 2] - np.float32(.5)), 0), nz - 2)
        at = ((x*ny + y)*nz + z)*nf
        a,b,c,d = flat[at:][:nf], flat[at + nf:][:nf], flat[at + nz*nf:][:nf], flat[at + (nz + 1)*nf:][:nf]
        at += ny*nz*nf
        e,g,h,i = flat[at:][:nf], flat[at + nf:][:nf], flat[at + nz*nf:][:nf], flat[at + (nz + 1)*nf:][:nf]
        o = out[m]
        for f in range(nf): o[f] = a[f] + b[f] + c[f] + d[f] + e[f] + g[f] + h[f] + i[f]

@kernel(lambda: (np.ones((8, 3), np.float32), (2, 2, 2), np.ones((3, 3), np.float32), np.arange(3, dtype=np.int32), np.zeros((1, 4), np.int64), np.empty((3, 3), np.float32)))
def read_columns(table, dimensions, points, order, columns, out):
    "Adds up each row below a neighbourhood once, and writes the sum to every neighbour's place."
    nf,flat = table.shape[1], table.ravel()
    nx,ny,nz = dimensions
    for i in numba.prange(len(order)):
        m,total = order[i], np.zeros(nf, np.float32)
        x,y,z = int(points[m, 0] - np.float32(.5)), int(points[m, 1] - np.float32(.5)), int(points[m, 2] - np.float32(.5))
        for c in range(len(columns)):
            n = columns[c, 3]
            row = (min(max(x + columns[c, 0], 0), nx - 1)*ny + min(max(y + columns[c, 1], 0), ny - 1))*nz + min(max(z + columns[c, 2], 0), nz - n)
            for j in range(row, row + n):
                values = flat[j*nf:][:nf]
                for f in range(nf): total[f] += values[f]
        for k in range(out.shape[1]//nf):
            o = out[m, k*nf:(k + 1)*nf]
            for f in range(nf): o[f] = total[f]


# ---- rows

def scene(quick):
    rng = np.random.default_rng(0)
    dimensions,features,n = ((24, 24, 20), 5, 2000) if quick else ((96, 96, 60), 45, 100_000)
    return torch.from_numpy(rng.random((*dimensions, features), np.float32)), torch.from_numpy((rng.random((n, 3))*dimensions).astype(np.float32))

def returned_memory(shape):
    "Writes as much memory as the output takes and gives it back, as the batch before does: outside the clock, before each turn of each way."
    return lambda: np.empty(shape, np.float32).fill(0)

def apart(a, b): return float((torch.as_tensor(a) - b).abs().max())

def notes(t, names, ours, copied, written):
    return [f"{n}: {t[n]*1e3:.1f} ms, ours is {t[n]/ours:.1f}x" for n in names] + [
        f"to copy speed (the output copied once, {t[copied]*1e3:.1f} ms): {ours/t[copied]:.1f}; writing new memory of its size alone: {t[written]/ours:.0%} of ours"]

def point_row(n_threads, volume, points, quick):
    channels_last,channels_first = volume.permute(3, 0, 1, 2)[None], volume.permute(3, 0, 1, 2)[None].contiguous()
    truth,table,values,where,dimensions = sample_trilinear(volume, points), volume.view(-1, volume.shape[-1]).numpy(), volume.numpy(), points.numpy(), tuple(volume.shape[:3])
    order,existing,peer,limit = numba.njit(block_order)(where, dimensions), np.empty_like(truth.numpy()), 'textbook gather, (n, 8, F)', "reads the same rows in the same order, writes the output"
    others = {'embedding_bag': lambda: sample_by_bag(volume, points), 'grid_sample, channels last': lambda: grid_sample(channels_last, points),
              'grid_sample, channels first': lambda: grid_sample(channels_first, points), 'scipy map_coordinates, per channel': lambda: scipy_per_channel(values, where)}
    off = max(apart(f(), truth) for f in (lambda: eight_corner_gather(volume, points), *others.values()))
    assert off < 1e-4
    def read():
        out = np.empty(truth.shape, np.float32)
        read_eight(table, dimensions, where, order, out)
    t = interleaved({'ours': lambda: sample_trilinear(volume, points), limit: read, peer: lambda: eight_corner_gather(volume, points), **others,
                     'copy': lambda: np.copyto(existing, truth.numpy()), 'write': returned_memory(truth.shape)}, 9, returned_memory(truth.shape))
    memory = peak_memory(lambda: sample_trilinear(volume, points))/truth.nbytes
    met = t[peer] >= 12*t['ours'] and t['ours'] <= 1.5*t[limit] and memory <= 1.2
    return Row(f"trilinear, {'x'.join(map(str, volume.shape))}, {len(points):,} random points", n_threads, t, peer, '>= 12x, <= 1.5x limit', None if quick else met, limit=limit, memory=memory,
               agrees=f"gather, embedding_bag, grid_sample, scipy: largest difference {off:.0e} of values in 0..1", why='' if met or quick else "the machine was busy, or two threads share its memory",
               notes=notes(t, others, t['ours'], 'copy', 'write'))

def neighbourhood_row(n_threads, volume, points, kind, goal, part, quick):
    vectors = neighborhood_vectors(kind)
    few = points[:len(points)//part]
    peer,limit = 'textbook gather, (n*K, 8, F)' + (f", {len(few):,} points, time x {part}" if part > 1 else ''), "reads each of the same rows once, in the same order, writes the output"
    truth,table,where,dimensions = sample_neighborhood(volume, points, vectors), volume.view(-1, volume.shape[-1]).numpy(), points.numpy(), tuple(volume.shape[:3])
    off = max(apart(gather_around(volume, points[i:i+1000], vectors), truth[i:i+1000]) for i in range(0, len(points), 1000))
    assert off < 1e-4
    order,columns,existing = numba.njit(block_order)(where, dimensions), reading_plan(tuple(map(tuple, vectors.tolist())))[0][2], np.empty_like(truth.numpy())
    def read():
        out = np.empty(truth.shape, np.float32)
        read_columns(table, dimensions, where, order, columns, out)
    bag = lambda: sample_by_bag(volume, (few[:, None] + vectors).reshape(-1, 3))
    t = interleaved({'ours': lambda: sample_neighborhood(volume, points, vectors), limit: read, peer: lambda: gather_around(volume, few, vectors), 'embedding_bag over all corners': bag,
                     'copy': lambda: np.copyto(existing, truth.numpy()), 'write': returned_memory(truth.shape)}, 5, returned_memory(truth.shape))
    for name in (peer, 'embedding_bag over all corners'): t[name] *= part
    memory = peak_memory(lambda: sample_neighborhood(volume, points, vectors))/truth.nbytes
    met = t[peer] >= goal*t['ours'] and memory <= 1.2
    return Row(f"the same with {len(vectors)} neighbours ({kind})", n_threads, t, peer, f'>= {goal}x', None if quick else met, limit=limit, memory=memory,
               agrees=f"gather around each point: largest difference {off:.0e}", why='' if met or quick else f"writing the output alone takes {t['write']/t['ours']:.0%} of the time, reading and writing {t[limit]/t['ours']:.0%}",
               notes=notes(t, ['embedding_bag over all corners'], t['ours'], 'copy', 'write'))

def rows(threads, quick):
    volume,points = scene(quick)
    yield point_row(threads, volume, points, quick)
    yield neighbourhood_row(threads, volume, points, 'axes', 45, 1, quick)
    yield neighbourhood_row(threads, volume, points, 'grid', 47, 1 if quick else 10, quick)
