"""How fast models, their training step and their tracking are, beside what people use.

    python benchmarks/models.py                  # the whole table
    python benchmarks/models.py --only sharing   # the rows of one module of benchmarks/models_rows
    python benchmarks/models.py --threads 1 --quick

Every row runs ours and its peers in one go, taking turns, prints their ratios, and says what was compared. Times are of this machine
and this moment; only the ratios travel. A new module of benchmarks/models_rows is found by itself: it has `rows(threads, quick)`.
"""
from pathlib import Path
from side_by_side import main

if __name__ == '__main__': main(__doc__, 'models_rows', sorted(f.stem for f in (Path(__file__).parent/'models_rows').glob('*.py')))
