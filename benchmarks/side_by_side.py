"""Timing several ways of doing one thing side by side: in one process, taking turns, medians; only ratios are meant to travel."""
import argparse
import ctypes
import gc
import importlib
import os
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

def interleaved(
    ways:dict, # name -> function without arguments
    repeats:int=5, # Turns of each, after one that does not count
    before=lambda: None, # Called before each turn, outside the clock (for instance to empty the page cache)
    clock=time.perf_counter, # `time.process_time` where other processes share the cores
    budget:float=float('inf'), # Seconds after which no turn starts; each way has one that counts
    of=statistics.median, # `min` where others disturb many of the turns
) -> dict: # name -> seconds
    "Median time of each way, the ways taking turns."
    times,began = {name: [] for name in ways}, time.perf_counter()
    for turn in range(repeats + 1):
        if turn > 1 and time.perf_counter() - began > budget: break
        for name,f in ways.items():
            before()
            gc.collect()
            start = clock()
            f()
            if turn: times[name].append(clock() - start)
    return {name: of(t) for name,t in times.items()}

def rss(key:str='RssAnon') -> int: # bytes of this process's own memory
    for line in open('/proc/self/status'):
        if line.startswith(key + ':'): return int(line.split()[1])*1024
    raise OSError(f"/proc/self/status has no {key}")

def peak_memory(f, every:float=2e-4) -> int: # bytes
    "How far this process's own memory rises above where it was, while `f` runs; its result included."
    f()                                                        # what is set up once does not count
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'): libc.malloc_trim(0)     # nor may memory that was kept for reuse hide what is used
    base,highest,done = rss(), [0], threading.Event()
    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], rss() - base)
            time.sleep(every)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try: result = f(); highest[0] = max(highest[0], rss() - base)
    finally: done.set(); watcher.join()
    del result
    return highest[0]

@contextmanager
def threads(n:int):
    "torch, and with it the kernels, on n threads."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)

@dataclass
class Row:
    "One line of the table."
    name:str # What is done, and to how much
    threads:int
    seconds:dict # 'ours', each peer and 'limit' by name -> median seconds
    peer:str # Which of them is the peer of the goal
    goal:str # In words, as the issue states it
    met:bool # Whether the goal is met; None where there is none
    limit:str=None # Which of them is the machine's limit
    memory:float=None # Extra memory as a multiple of the output's bytes
    agrees:str='' # What was compared, and the largest difference
    why:str='' # For a row that misses: why
    notes:list = field(default_factory=list) # More ratios, in words

    @property
    def to_peer(self) -> float: return self.seconds[self.peer]/self.seconds['ours']
    @property
    def to_limit(self) -> float: return self.seconds['ours']/self.seconds[self.limit] if self.limit else None

def table(rows) -> str:
    "The rows in columns, the remarks of each row below it."
    head = ('row', 'thr', 'ours', 'peer', 'x faster', 'x limit', 'memory/out', 'goal', 'met')
    def cells(r):
        return (r.name, str(r.threads), f"{r.seconds['ours']*1e3:.2f} ms", f"{r.peer} {r.seconds[r.peer]*1e3:.1f} ms", f"{r.to_peer:.1f}",
                '' if r.limit is None else f"{r.to_limit:.2f}", '' if r.memory is None else f"{r.memory:.2f}", r.goal, {True: 'yes', False: 'NO', None: '-'}[r.met])
    body = [cells(r) for r in rows]
    widths = [max(len(c[i]) for c in [head, *body]) for i in range(len(head))]
    line = lambda c: '  '.join(x.ljust(w) for x,w in zip(c, widths)).rstrip()
    out = [line(head), line(['-'*w for w in widths])]
    for r,c in zip(rows, body):
        out.append(line(c))
        if r.limit: out.append(f"      limit: {r.limit}")
        if r.agrees: out.append(f"      agrees: {r.agrees}")
        if r.why: out.append(f"      why: {r.why}")
        out += [f"      {n}" for n in r.notes]
    return '\n'.join(out)

def machine() -> str:
    "What these ratios were taken on."
    import numpy as np
    a,b = np.ones(2**26, np.float32), np.empty(2**26, np.float32)
    seconds = interleaved({'copy': lambda: np.copyto(b, a)})['copy']
    model = next((x.split(':')[1].strip() for x in open('/proc/cpuinfo') if x.startswith('model name')), 'unknown processor')
    return f"{model}, {len(os.sched_getaffinity(0))} cores; copying 256 MiB: {2*a.nbytes/seconds/1e9:.1f} GB/s read and written; load {os.getloadavg()[0]:.1f}"

def main(
    doc:str, # The benchmark's docstring
    folder:str, # Of modules with `rows(threads, quick)`
    modules, # Their names, in order
    prepare=lambda: None, # Called before the rows, after dwiml_nb was imported
):
    "The command of a benchmark: each row is told when it is there, the table comes last."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=modules, default=modules, help="modules of rows")
    parser.add_argument('--threads', nargs='*', type=int, default=[1, 2], help="numbers of threads, each a set of rows")
    parser.add_argument('--quick', action='store_true', help="small sizes: that it runs, not how fast")
    args = parser.parse_args()
    os.environ.setdefault('NUMBA_NUM_THREADS', str(max(args.threads)))
    import dwiml_nb.all  # noqa: F401  before torch: its idle threads sleep
    print(machine(), flush=True)
    prepare()
    start,rows = time.time(), []
    for name in args.only:
        module,began = importlib.import_module(f'{folder}.{name}'), time.time()
        for n in args.threads:
            with threads(n):
                for row in module.rows(n, args.quick):
                    rows.append(row)
                    print(f"  {time.time() - start:4.0f} s  {row.threads} thr  {row.name}: {row.to_peer:.2f}x", file=sys.stderr, flush=True)
        print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{table(rows)}\n")
    missed = [r.name for r in rows if r.met is False]
    print(f"{len(rows)} rows in {time.time() - start:.0f} s; {len(missed)} miss their goal" + (f": {'; '.join(missed)}" if missed else ''))
