"""A training step of Learn2Track, beside the same layers on torch's packed sequences (what dwi_ml does). Processor time, best of the turns."""
import resource
import time
from pathlib import Path
import torch
from torch.nn.utils.rnn import pack_sequence
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.models.rnn import StackedRNN
from side_by_side import Row, interleaved

def ragged(nb_lines:int, most:int, features:int) -> Ragged:
    lengths = torch.randint(20, most, (nb_lines,), generator=torch.Generator().manual_seed(0))
    return Ragged.from_lengths(torch.randn(int(lengths.sum()), features), lengths)

def packed(rnn:StackedRNN, x:list):
    "The layers of the stack one after the other, each on a packed sequence."
    y = pack_sequence(x, enforce_sorted=False)
    for i in range(len(rnn.layer_sizes)):
        y,_ = rnn.get_submodule(f'rnn_{i}')(y)
        if i < len(rnn.layer_sizes) - 1: y = y._replace(data=y.data.relu())
    return y.data

def arithmetic(rnn:StackedRNN, nb_rows:int):
    "Only the products of matrices that a step has to do, each as one product."
    shapes = [(p.shape, torch.randn(nb_rows, p.shape[1]), torch.randn(nb_rows, p.shape[0])) for p in rnn.parameters() if p.ndim == 2]
    weights = [torch.randn(shape) for shape,_,_ in shapes]
    def run():
        for w,(_,x,g) in zip(weights, shapes): x@w.t(); g@w; g.t()@x
    return run

def step(rnn, outputs):
    rnn.zero_grad(set_to_none=True)
    outputs.square().mean().backward()
    return [p.grad.clone() for p in rnn.parameters()]

def in_bf16(rnn, x):
    with torch.autocast('cpu', torch.bfloat16): outputs = rnn(x)[0].data
    return step(rnn, outputs.float())

def faults(f) -> int: # pages that the system had to hand out
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def rows(threads, quick):
    bf16 = 'avx512_bf16' in Path('/proc/cpuinfo').read_text()
    torch.manual_seed(0)
    for key,sizes,nb_lines,most,goal in (('gru', [500, 500], 60, 160, 5.), ('lstm', [500, 500], 15, 160, None), ('gru', [128], 126, 60, None)):
        if quick: sizes,nb_lines,most = [16]*len(sizes), 10, 30
        x,rnn = ragged(nb_lines, most, 320), StackedRNN(key, 320, sizes)
        lists = list(x.unbind())
        ways = {'ours': lambda: step(rnn, rnn(x)[0].data), 'packed': lambda: step(rnn, packed(rnn, lists)), 'products alone': arithmetic(rnn, len(x.data))}
        if goal and bf16: ways['bf16'] = lambda rnn=rnn, x=x: in_bf16(rnn, x)
        # the mean over rows does not know their order, so the gradients are the same
        apart = max(float((a - b).abs().max()/b.abs().max()) for a,b in zip(ways['ours'](), ways['packed']()))
        times = interleaved(ways, 1 if quick else 10, clock=time.process_time, budget=8, of=min)
        notes = [f"page faults: ours {faults(ways['ours']):,}, packed {faults(ways['packed']):,}"]
        if goal: notes.append(f"under bf16 autocast {times['packed']/times['bf16']:.1f}x packed in float32" if bf16 else "bf16: this processor has none")
        yield Row(f"{key} {sizes}, {nb_lines} lines, {len(x.data):,} points: forward and backward", threads, times, 'packed',
                  f">= {goal:g}x torch's packed form" if goal else "", times['packed']/times['ours'] >= goal if goal else None,
                  limit='products alone', agrees=f"gradients, largest difference {apart:.0e} of the largest entry", notes=notes)
