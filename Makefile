PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
LAB := .venv-lab
ZOO := .venv-zoo
READY := $(VENV)/ready
PACKAGE := build/package
# What the lower bounds are tested with: what reads JAX and Flax closely.
CORE_TESTS := $(addprefix tests/core/test_,moments.py standardize.py batch_norm.py masks.py activation.py \
	running_statistics.py devices.py collectives.py axis_names.py blocks.py) \
	$(addprefix tests/modules/test_,layers.py transforms.py linen.py linen_freezing.py nnx.py nnx_freezing.py \
	flax_compat.py flax_changes.py) \
	$(addprefix tests/tools/test_,optim.py programs.py fold.py recalibrate.py audit.py)

# Compiling takes less time with it.
COMPILE_QUICKLY := --xla_cpu_use_fusion_emitters=false
PYTEST := XLA_FLAGS=$(COMPILE_QUICKLY) $(VENV)/bin/python -m pytest -n auto --dist worksteal
COMPUTING := tests/core/test_moments.py tests/core/test_standardize.py

TIMED := numerics offsets layer step startup sweep inference attempts selections device demo
COMPILED := memory placement compiled scale domains

.PHONY: demo test exhaustive flax-tests lint format claims notebooks notebooks-refresh docs browser package bench bench-refresh floors oldest zoo zoo-refresh environments clean

demo: $(READY)
	$(VENV)/bin/bn-jax train

# Whether everything works: every function, module, tool and command, and each kind of failure once.
test: $(READY)
	$(PYTEST) -m "not exhaustive"

# The full tables of variants, transforms and devices, which `test` leaves out. What computes is
# tested once more as it is compiled for users.
exhaustive: $(READY)
	$(PYTEST) -m exhaustive
	$(VENV)/bin/python -m pytest -n auto --dist worksteal $(COMPUTING)

# Flax's own tests of models with a norm, from its source distribution, with our norms.
flax-tests: $(READY)
	XLA_FLAGS=$(COMPILE_QUICKLY) $(VENV)/bin/python tests/modules/flax_suite.py -n auto --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# Every claim, with fewer and smaller runs.
claims: $(READY)
	folder=$$(mktemp -d) && XLA_FLAGS=$(COMPILE_QUICKLY) $(VENV)/bin/bn-jax reproduce all --quick --out $$folder/claims && rm -r $$folder

# Every notebook from its first cell to its last, two at a time; what is committed stays as it is.
notebooks: $(READY)
	printf '%s\n' notebooks/*.ipynb | xargs -n 1 -P 2 $(VENV)/bin/python notebooks/execute.py

# The same, and writes their outputs.
notebooks-refresh: $(READY)
	printf '%s\n' notebooks/*.ipynb | xargs -n 1 -P 2 $(VENV)/bin/python notebooks/execute.py --refresh

# The documentation, in build/docs/html; neither the build nor a page needs a network. A warning, a
# cell or an example of a docstring that fails, a broken link, or a public name without an entry or a
# docstring is an error.
docs: $(VENV)/ready-docs
	$(PYTEST) tests/test_documentation.py -k "docstring or readme"
	JAX_PLATFORMS=cpu XLA_FLAGS=$(COMPILE_QUICKLY) $(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --jobs 2 docs build/docs/html

# The built documentation in headless Chromium, which comes from the system: search, links, errors,
# narrow screens, copying, dark mode. Pictures of some pages go to build/docs/screenshots.
browser: docs $(VENV)/ready-browser
	BN_JAX_BROWSER=1 $(VENV)/bin/python -m pytest tests/site

# The wheel and the source distribution, as an index would get them: built, checked, installed into
# bare environments and used there.
package:
	rm -rf $(PACKAGE)
	$(PYTHON) -m venv $(PACKAGE)/tools
	$(PACKAGE)/tools/bin/python -m pip install --quiet build twine
	$(PACKAGE)/tools/bin/python -m build --outdir $(PACKAGE)/dist
	$(PACKAGE)/tools/bin/python -m twine check --strict $(PACKAGE)/dist/*
	for file in $(PACKAGE)/dist/*; do $(PYTHON) tests/installed.py $$file $(PACKAGE)/bare || exit; done

# Peers and the compilers of accelerators live apart, for JAX looks for their devices. What is timed
# runs alone, what only compiles two at a time. The figures go to build/benchmarks/; what is committed
# stays as it is.
bench: $(LAB)/ready
	for benchmark in $(TIMED); do $(LAB)/bin/python -m benchmarks.$$benchmark $(REFRESH) || exit; done
	$(MAKE) --jobs=2 $(COMPILED:%=bench-%)

bench-%: $(LAB)/ready
	$(LAB)/bin/python -m benchmarks.$* $(REFRESH)

# The same, and replaces the figures in benchmarks/results/ and the tables of the pages.
bench-refresh: $(LAB)/ready
	$(MAKE) bench REFRESH=--refresh
	$(LAB)/bin/python -m benchmarks.document

# What the compilers of accelerators say; elsewhere these tests skip.
floors: $(LAB)/ready
	BN_JAX_COMPILERS=1 JAX_PLATFORMS=cpu $(LAB)/bin/python -m pytest tests/benchmarks/test_compiled.py tests/benchmarks/test_bytes_of_domains.py

# The lower bounds of pyproject.toml, installed exactly and tested.
oldest: $(OLDEST)/ready
	XLA_FLAGS=$(COMPILE_QUICKLY) $(OLDEST)/bin/python -m pytest -n auto --dist worksteal \
		-m "not exhaustive" $(CORE_TESTS)

# Models of other packages with every tool. A package that is missing is an error here; elsewhere
# this folder is not collected.
zoo: $(ZOO)/ready
	BN_JAX_ZOO=1 XLA_FLAGS=$(COMPILE_QUICKLY) $(ZOO)/bin/python -m pytest tests/zoo -n auto --dist loadgroup

# The same, and replaces their table in benchmarks/.
zoo-refresh: $(ZOO)/ready $(LAB)/ready
	XLA_FLAGS=$(COMPILE_QUICKLY) $(ZOO)/bin/python -m benchmarks.zoo --refresh
	$(LAB)/bin/python -m benchmarks.document

environments: $(READY) $(VENV)/ready-docs $(OLDEST)/ready $(LAB)/ready $(ZOO)/ready

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'bn_jax needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/ready-docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(VENV)/ready-browser: $(READY)
	$(VENV)/bin/python -m pip install --quiet --group browser
	touch $@

$(OLDEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet pytest pytest-xdist $$($(PYTHON) -c "import tomllib; \
	print(*(bound.replace('>=', '==') for bound in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))")
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(LAB)/ready: pyproject.toml
	$(PYTHON) -m venv $(LAB)
	$(LAB)/bin/python -m pip install --quiet --upgrade pip
	$(LAB)/bin/python -m pip install --quiet --editable ".[bench]" pytest
	touch $@

# Some packages need far more to be installed than their models do.
$(ZOO)/ready: pyproject.toml
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --upgrade pip
	$(ZOO)/bin/python -m pip install --quiet --editable ".[zoo]" pytest pytest-xdist
	$(ZOO)/bin/python -m pip install --quiet --no-deps --group zoo-alone
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(LAB) $(ZOO) build dist *.egg-info
