"""How fast the data engine is, beside what people use and beside what the machine can do.

    python benchmarks/data.py                    # the whole table, one thread and two
    python benchmarks/data.py --only lines       # the rows of one module of benchmarks/data_rows
    python benchmarks/data.py --threads 1

Every row runs ours, its peers and the machine's limit in one process, taking turns, and prints the median's ratios; it checks that they
agree before it prints anything. Peers are dipy, scipy, nibabel and h5py as one would call them, and textbook forms, labelled so.
Times are of this machine and this moment; only the ratios travel. Nothing here is a test: the tests compare values, not times.
"""
from side_by_side import main

MODULES = ('volume', 'lines', 'reading', 'batch', 'study', 'dwi_ml', 'gpu')

def prepare():
    import torch
    from dwiml_nb.core.kernels import warm_up
    print(f"kernels ready after {warm_up():.1f} s", flush=True)
    if not torch.cuda.is_available(): print("GPU rows: not measured", flush=True)

if __name__ == '__main__': main(__doc__, 'data_rows', MODULES, prepare)
