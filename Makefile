PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
READY := $(VENV)/ready
CORE_TESTS := tests/test_moments.py tests/test_standardize.py tests/test_batch_norm.py \
	tests/test_devices.py tests/test_linen.py tests/test_nnx.py tests/test_flax_compat.py \
	tests/test_optim.py tests/test_programs.py tests/test_fold.py tests/test_recalibrate.py \
	tests/test_audit.py

.PHONY: demo test lint format bench oldest environments clean

demo: $(READY)
	$(VENV)/bin/bn-jax train

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(READY)
	$(VENV)/bin/python -m pip install --quiet --editable ".[bench]"
	$(VENV)/bin/python -m benchmarks.numerics
	$(VENV)/bin/python -m benchmarks.scale
	$(VENV)/bin/python -m benchmarks.inference

# The lower bounds of pyproject.toml, installed exactly and tested.
oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n auto --dist loadfile -m "not exhaustive" $(CORE_TESTS)

environments: $(READY) $(OLDEST)/ready

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'bn_jax needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

$(OLDEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet pytest pytest-xdist $$($(PYTHON) -c "import tomllib; \
	print(*(bound.replace('>=', '==') for bound in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))")
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
