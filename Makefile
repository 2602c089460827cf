# make demo    install, simulate, train, track, score, report: everything in demo/
# make test    everything CI runs, in a fresh environment      make docs     the site, in _docs/
# make lab     open the pages in JupyterLab                    make readme   README.md from nbs/index.ipynb
# make clean   remove what these commands made (not .venv)
PYTHON ?= python3
VENV ?= .venv
# The build of PyTorch is chosen here: make test TORCH_PIP_ARGS=--index-url=... (on Linux the default one brings CUDA)
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles all it imports again

# What `make test` runs, two steps at a time; `timed-x: timed-y` below says what waits for what
STEPS := packages system check kernels wheel fastcore2 pages quick-demo tests docs
TIMED := $(STEPS:%=timed-%)

.PHONY: demo test install $(STEPS) $(TIMED) readme lab clean

demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 2)
demo: $(VENV)/.ready kernels
	$(BIN)/dwiml_demo --out demo

test:
	@mkdir -p build; rm -f build/steps; start=$$(date +%s); $(MAKE) --no-print-directory -j2 $(WHOLE) $(TIMED) && \
		{ printf '\nseconds of each step\n'; cat build/steps; echo "all in $$(($$(date +%s) - start)) s"; }

WHOLE := $(if $(filter output-sync,$(.FEATURES)),-Orecurse)
timed-check timed-kernels timed-wheel timed-fastcore2: timed-packages
timed-pages: timed-check timed-kernels
timed-quick-demo: timed-kernels
timed-tests: timed-pages timed-system
timed-docs: timed-pages
$(TIMED): timed-%:
	@start=$$(date +%s); echo "==== $*"; $(MAKE) --no-print-directory $* && printf '%5d  %s\n' $$(($$(date +%s) - start)) $* >> build/steps

install: packages kernels

packages: $(VENV)/.ready
	$(PY) -m pip check

kernels: $(VENV)/.ready  # compile the loops for this machine, both forms, instead of at their first call
	$(PY) -c "import dwiml_nb.all; from dwiml_nb.core.kernels import warm_up; print(f'kernels ready after {warm_up():.1f} s')"

$(VENV)/.ready: settings.ini setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile $(TORCH_PIP_ARGS) --constraint constraints.txt "$(TORCH)" --editable ".[dev,all]"
	touch $@

system:  # a browser and software Vulkan for the tests that draw
	tools/system_packages.sh

check:  # pages, modules and README in step; who imports whom; names that do not exist
	$(PY) tools/check_house.py
	$(BIN)/lint-imports --no-cache
	$(BIN)/ruff check --quiet --no-cache --output-format concise .

pages:  # execute every page once; the outputs are kept for the site, the coverage is printed
	$(PY) tools/run_pages.py

docs: build/pages.done
	$(PY) tools/build_docs.py

build/pages.done: $(VENV)/.ready $(shell find nbs dwiml_nb -name '*.ipynb' -o -name '*.py')
	$(PY) tools/run_pages.py

tests:  # two files at a time; `pytest` alone runs them one by one
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

wheel:  # build it, install it in an empty folder, import everything there
	rm -rf build/lib build/bdist* build/wheel build/installed
	$(PY) -m build --wheel --no-isolation --outdir build/wheel . > /dev/null
	$(PY) -m pip install --quiet --no-compile --no-deps --target build/installed build/wheel/*.whl
	PYTHONPATH=$(CURDIR)/build/installed $(PY) tools/import_all.py --from build/installed

fastcore2:  # developers are held to fastcore 1 by nbdev; users may have 2
	$(PY) -m pip install --quiet --no-compile --upgrade --no-deps --target build/fastcore2 "fastcore>=2"
	PYTHONPATH=$(CURDIR)/build/fastcore2 $(PY) tools/import_all.py

quick-demo:  # the demo's whole path in a minute: that it works, not how well
	$(BIN)/dwiml_demo --out build/demo --quick

readme:
	$(PY) tools/build_docs.py --readme

lab: $(VENV)/.ready
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build _docs _proc demo dist .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info
