"""A training step on a machine that is busy: two other processes want its cores."""
import json
import os
import subprocess
import sys
from side_by_side import Row

STEP = '''
import json, statistics, sys, time
if sys.argv[1] == 'torch first': import torch
import dwiml_nb, torch
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.demo.recipe import recipe_model
torch.set_num_threads(int(sys.argv[2])); torch.manual_seed(0)
nb_lines, nb_points, model = 126, 40, recipe_model(45)
lines = Ragged.from_lengths(torch.randn(nb_lines*(nb_points + 1), 3).cumsum(0), torch.full((nb_lines,), nb_points + 1))
seen = Ragged.from_lengths(torch.randn(nb_lines*nb_points, 3), torch.full((nb_lines,), nb_points))
inputs, optimizer = seen.with_data(torch.randn(nb_lines*nb_points, 7*45)), torch.optim.AdamW(model.parameters())
times = []
for turn in range(3 + int(sys.argv[3])):
    start = time.perf_counter()
    optimizer.zero_grad(); model.compute_loss(model(inputs, seen), lines)[0].backward(); optimizer.step()
    times.append(time.perf_counter() - start)
    if turn and sum(times) > 4: break
print(json.dumps(statistics.median(times[3:] or times[-1:])))
'''
SPIN = "while True: pass"

def seconds(order:str, threads:int, turns:int) -> float:
    "Median of the demo's step in a fresh process, in which torch or dwiml_nb was imported first."
    env = {k: v for k,v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')}
    done = subprocess.run([sys.executable, '-c', STEP, order, str(threads), str(turns)], env=env, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)

def rows(threads, quick):
    if threads == 1: return                                   # nothing waits
    turns = 3 if quick else 30
    both = lambda: {order: seconds(order, threads, turns) for order in ('ours', 'torch first')}
    load = os.getloadavg()[0]
    quiet = both()
    busy = [subprocess.Popen([sys.executable, '-c', SPIN]) for _ in range(os.cpu_count() or 1)]
    try: shared = both()
    finally:
        for process in busy: process.kill(); process.wait()
    costs = {k: shared[k]/quiet[k] for k in quiet}
    yield Row("demo's step beside as many busy processes as cores", threads, shared, 'torch first', "at most 2.5x its time alone (its share is a half)",
              costs['ours'] <= 2.5, agrees="the same step in fresh processes",
              notes=[f"busy / alone: ours {costs['ours']:.1f}, with spinning threads {costs['torch first']:.1f}",
                     f"before: {load:.1f} processes wanted {os.cpu_count()} cores; a step that takes long ends after 4 s",
                     f"alone: spinning threads take {quiet['torch first']/quiet['ours']:.2f} of ours"])
