"""How fast models, their training step and their tracking are, beside what people use.

    python benchmarks/models.py                  # the whole table
    python benchmarks/models.py --only sharing   # the rows of one module of benchmarks/models_rows
    python benchmarks/models.py --threads 1 --quick

Every row runs ours and its peers in one go, taking turns, prints the medians' ratios, and says what was compared. Times are of this
machine and this moment; only the ratios travel. A new module of benchmarks/models_rows is found by itself: it has `rows(threads, quick)`.
"""
import argparse
import importlib
import os
import sys
import time
from pathlib import Path

MODULES = sorted(f.stem for f in (Path(__file__).parent/'models_rows').glob('*.py'))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=MODULES, default=MODULES, help="modules of rows")
    parser.add_argument('--threads', nargs='*', type=int, default=[1, 2], help="numbers of threads, each a set of rows")
    parser.add_argument('--quick', action='store_true', help="small sizes: that it runs, not how fast")
    args = parser.parse_args()
    os.environ.setdefault('NUMBA_NUM_THREADS', str(max(args.threads)))
    import dwiml_nb.all  # noqa: F401  before torch: its idle threads sleep
    from side_by_side import machine, table, threads
    print(machine(), flush=True)
    start,rows = time.time(), []
    for name in args.only:
        module = importlib.import_module(f'models_rows.{name}')
        for n in args.threads:
            with threads(n):
                for row in module.rows(n, args.quick):
                    rows.append(row)
                    print('.', end='', file=sys.stderr, flush=True)
    print(f"\n{table(rows)}\n")
    missed = [r.name for r in rows if r.met is False]
    print(f"{len(rows)} rows in {time.time() - start:.0f} s; {len(missed)} miss their goal" + (f": {'; '.join(missed)}" if missed else ''))

if __name__ == '__main__': main()
