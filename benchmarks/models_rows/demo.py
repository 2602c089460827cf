"""The demo's training step beside the same step in torch's own products and layers. Processor time, best of the turns."""
import time
from contextlib import contextmanager
import torch
from dwiml_nb.core import products
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.demo.recipe import recipe_model
from side_by_side import Row, interleaved

@contextmanager
def torch_alone():
    "Without oneDNN's products, and with torch's GRU."
    ours = products.onednn_product
    products.onednn_product = lambda: None
    try: yield
    finally: products.onednn_product = ours

def rows(threads, quick):
    torch.manual_seed(0)
    nb_lines,nb_points,model = 10 if quick else 126, 40, recipe_model(45)
    lines = Ragged.from_lengths(torch.randn(nb_lines*(nb_points + 1), 3).cumsum(0), [nb_points + 1]*nb_lines)
    seen = Ragged.from_lengths(torch.randn(nb_lines*nb_points, 3), [nb_points]*nb_lines)
    inputs,optimizer = seen.with_data(torch.randn(nb_lines*nb_points, 7*45)), torch.optim.AdamW(model.parameters())
    def gradients():
        torch.manual_seed(1); model.zero_grad()
        model.compute_loss(model(inputs, seen), lines)[0].backward()
        return [p.grad.clone() for p in model.parameters()]
    def step():
        optimizer.zero_grad()
        model.compute_loss(model(inputs, seen), lines)[0].backward()
        optimizer.step()
    def before():
        with torch_alone(): step()
    ours = gradients()
    with torch_alone(): theirs = gradients()
    apart,largest = (max(float(o.abs().max()) for o in s) for s in ([a - b for a,b in zip(ours, theirs)], theirs))
    times = interleaved({'ours': step, "torch's layers": before}, 3 if quick else 60, clock=time.process_time, budget=15, of=min)
    yield Row(f"demo's step, {len(seen.data):,} points", threads, times, "torch's layers", ">= 1.5x torch's layers", times["torch's layers"]/times['ours'] >= 1.5,
              agrees=f"gradients, largest difference {apart:.0e}, largest entry {largest:.1g}")
