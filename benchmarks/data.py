"""How fast the data engine is, beside what people use and beside what the machine can do.

    python benchmarks/data.py                    # the whole table, one thread and two
    python benchmarks/data.py --only lines       # the rows of one module of benchmarks/data_rows
    python benchmarks/data.py --threads 1

Every row runs ours, its peers and the machine's limit in one process, taking turns, and prints the median's ratios; it checks that they
agree before it prints anything. Peers are dipy, scipy, nibabel and h5py as one would call them, and textbook forms, labelled so.
Times are of this machine and this moment; only the ratios travel. Nothing here is a test: the tests compare values, not times.
"""
import argparse
import importlib
import os
import sys
import time

MODULES = ('volume', 'lines', 'reading', 'batch', 'study', 'dwi_ml', 'gpu')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=MODULES, default=MODULES, help="modules of rows")
    parser.add_argument('--threads', nargs='*', type=int, default=[1, 2], help="numbers of threads, each a set of rows")
    parser.add_argument('--quick', action='store_true', help="small sizes: that it runs, not how fast")
    args = parser.parse_args()
    os.environ.setdefault('NUMBA_NUM_THREADS', str(max(args.threads)))
    import torch
    import dwiml_nb.all  # noqa: F401  every kernel
    from dwiml_nb.core.kernels import warm_up
    from side_by_side import machine, table, threads
    print(f"{machine()}\nkernels ready after {warm_up():.1f} s", flush=True)
    start,rows = time.time(), []
    for name in args.only:
        module = importlib.import_module(f'data_rows.{name}')
        for n in args.threads:
            with threads(n):
                for row in module.rows(n, args.quick):
                    rows.append(row)
                    print('.', end='', file=sys.stderr, flush=True)
    print(f"\n{table(rows)}\n")
    if not torch.cuda.is_available(): print("GPU rows: not measured")
    missed = [r.name for r in rows if r.met is False]
    print(f"{len(rows)} rows in {time.time() - start:.0f} s; {len(missed)} miss their goal" + (f": {'; '.join(missed)}" if missed else ''))

if __name__ == '__main__': main()
