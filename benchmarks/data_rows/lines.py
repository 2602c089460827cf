"""What is done to every line of a batch: placing points, leaving points out, steps, lengths, turning, splitting."""
import numpy as np
import torch
from dipy.tracking.streamline import length, set_number_of_points
from dipy.tracking.streamlinespeed import compress_streamlines

from dwiml_nb.core import lines as L
from dwiml_nb.core.ragged import Ragged
from side_by_side import Row, interleaved, peak_memory

def smooth_lines(n, seed=0):
    "Lines of 50 to 150 points half a mm apart that bend a little at each, float32."
    rng = np.random.default_rng(seed)
    def line(k):
        steps = (.08*rng.normal(size=(k, 3))).cumsum(0) + rng.normal(size=3)
        return (.5*steps/np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0).astype(np.float32)
    return [line(k) for k in rng.integers(50, 151, n)]

def by_arc_length(line, n):
    "Linear interpolation at equal distances along the arc, in float64."
    line = line.astype(np.float64)
    along = np.concatenate([[0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    return np.stack([np.interp(np.linspace(0, along[-1], n), along, column) for column in line.T], 1)

def resample_row(n_threads, one_by_one, lines):
    step = .77
    placed = L.resample_step(lines, step)
    off = max(np.abs(new.numpy() - by_arc_length(old, len(new))).max() for old,new in zip(one_by_one, placed))
    assert off < 1e-4
    def dipy(): return [set_number_of_points(o, max(2, int(np.ceil(length(o)/step)))) for o in one_by_one]
    same = np.mean([len(a) == len(b) for a,b in zip(dipy(), placed)])
    t = interleaved({'ours': lambda: L.resample_step(lines, step), 'dipy, line by line': dipy, 'a copy of what is read': lambda: lines.data.numpy().copy()}, 5)
    return Row(f"resample to a step, {len(lines)} lines", n_threads, t, 'dipy, line by line', '>= 2.5x dipy', t['dipy, line by line'] >= 2.5*t['ours'],
               limit='a copy of what is read', memory=peak_memory(lambda: L.resample_step(lines, step))/placed.data.nbytes,
               agrees=f"arc-length interpolation in float64 to {off:.0e} mm; as many points as dipy on {same:.2%} of the lines")

def compress_row(n_threads, one_by_one, lines):
    kept = L.compress(lines, .1)
    dipy = lambda: compress_streamlines(one_by_one, tol_error=.1)
    assert all(np.array_equal(a, b) for a,b in zip(dipy(), kept))
    rng = np.random.default_rng(1)
    crooked = [rng.integers(-1, 2, size=(k, 3)).cumsum(0).astype(np.float32) for k in rng.integers(1, 60, len(lines))]
    assert all(np.array_equal(a, b) for a,b in zip(compress_streamlines(crooked, tol_error=.7, max_segment_length=4.), L.compress(Ragged.from_list(crooked), .7, 4.)))
    t = interleaved({'ours': lambda: L.compress(lines, .1), 'dipy': dipy, 'a copy of what is read': lambda: lines.data.numpy().copy()}, 5)
    return Row(f"compress, {len(lines)} lines", n_threads, t, 'dipy', '>= 1x dipy', t['dipy'] >= t['ours'], limit='a copy of what is read',
               memory=peak_memory(lambda: L.compress(lines, .1))/kept.data.nbytes,
               agrees=f"the same points kept of {len(lines)} smooth lines and of {len(crooked)} that stand still or come back; {len(kept.data)/len(lines.data):.0%} kept")

def near_copy_row(name, n_threads, ours, peer_name, peer, copied, off, agrees, note=None, why=''):
    limit = f"a copy of {copied.nbytes/1e6:.1f} MB by numpy"
    t = interleaved({'ours': ours, peer_name: peer, limit: copied.copy}, 9)
    out = ours()
    out = out[0] if isinstance(out, tuple) else out
    return Row(name, n_threads, t, peer_name, '<= 2x a copy', t['ours'] <= 2*t[limit], limit=limit, memory=peak_memory(ours)/getattr(out, 'data', out).nbytes,
               agrees=f"{agrees}, largest difference {off:.0e}", notes=[note] if note else [], why='' if t['ours'] <= 2*t[limit] else why)

def largest(a, b): return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())

def geometry_rows(n_threads, one_by_one, lines):
    data,n = lines.data.numpy(), len(lines)
    steps = lambda: [np.diff(o, axis=0) for o in one_by_one]
    yield near_copy_row(f"directions, {n} lines", n_threads, lambda: L.directions(lines), 'numpy, line by line', steps, data[:len(data) - n],
                        largest(L.directions(lines).data, np.concatenate(steps())), "numpy", "limit: reads and writes as many numbers as ours")
    norms = lambda: np.array([length(o) for o in one_by_one])
    yield near_copy_row(f"lengths, {n} lines", n_threads, lambda: L.lengths_of(lines), 'dipy, line by line', norms, data,
                        largest(L.lengths_of(lines), norms()), "dipy", "limit: a copy of the points read; ours writes one number a line",
                        f"{len(data)} square roots in float64 take as long as the copy")
    def previous():
        out = []
        for o in one_by_one:
            d,rows = np.diff(o, axis=0), np.zeros((len(o), 9), np.float32)
            for k in range(3): rows[k+1:, 3*k:3*k+3] = d[:len(d) - k]
            out.append(rows)
        return out
    before = L.previous_directions(lines, 3).data.numpy()
    yield near_copy_row(f"3 previous directions, {n} lines", n_threads, lambda: L.previous_directions(lines, 3), 'numpy, line by line', previous, before,
                        largest(before, np.concatenate(previous())), "numpy", "limit: a copy of the output, three times the points read")
    turned = lambda: [o[::-1].copy() for o in one_by_one]
    yield near_copy_row(f"reverse, {n} lines", n_threads, lambda: L.reverse(lines), 'numpy, line by line', turned, data,
                        largest(L.reverse(lines).data, np.concatenate(turned())), "numpy", "limit: reads and writes as many numbers as ours")
    at = np.random.default_rng(2).integers(6, 44, n)
    cuts = torch.from_numpy(at)
    def halves(): return [part for o,c in zip(one_by_one, at) for part in (o[:c].copy(), o[c:].copy())]
    parts,_ = L.split(lines, cuts)
    assert parts.lengths.tolist() == [len(o) for o in halves()]
    yield near_copy_row(f"split, {n} lines", n_threads, lambda: L.split(lines, cuts), 'numpy, line by line', halves, data,
                        largest(parts.data, np.concatenate(halves())), "numpy", "ours writes new offsets and copies no point")

def rows(n_threads:int, quick:bool):
    "The rows of this module."
    one_by_one = smooth_lines(300 if quick else 5000)
    lines = Ragged.from_list(one_by_one)
    yield resample_row(n_threads, one_by_one, lines)
    yield compress_row(n_threads, one_by_one, lines)
    yield from geometry_rows(n_threads, one_by_one, lines)
