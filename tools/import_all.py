"""Import every module of the installed package; with `--from FOLDER`, make sure that it is the one in that folder."""
import importlib
import pkgutil
import sys
import tempfile
import os
from importlib.metadata import version
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--from") + 1]).resolve() if "--from" in sys.argv else None
os.chdir(tempfile.mkdtemp())  # nothing but the installed package can be found from here

import dwiml_nb  # noqa: E402
import fastcore  # noqa: E402

where = Path(dwiml_nb.__file__).resolve().parent
if folder and folder not in where.parents: sys.exit(f"imported {where}, not the package in {folder}")
modules = [module.name for module in pkgutil.walk_packages([str(where)], "dwiml_nb.") if not module.ispkg]
for name in modules: importlib.import_module(name)
print(f"{len(modules)} modules of dwiml_nb {dwiml_nb.__version__} imported with fastcore {fastcore.__version__}, torch {version('torch')}")
