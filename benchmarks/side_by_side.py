"""Timing several ways of doing one thing side by side: in one process, taking turns, medians; only ratios are meant to travel."""
import ctypes
import gc
import os
import statistics
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

def interleaved(
    ways:dict, # name -> function without arguments
    repeats:int=5, # Turns of each, after one that does not count
    before=lambda: None, # Called before each turn, outside the clock (for instance to empty the page cache)
    clock=time.perf_counter, # `time.process_time` where other processes share the cores
) -> dict: # name -> median seconds
    "Median time of each way, the ways taking turns."
    times = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name,f in ways.items():
            before()
            gc.collect()
            start = clock()
            f()
            if turn: times[name].append(clock() - start)
    return {name: statistics.median(t) for name,t in times.items()}

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
