# Everything here works on a fresh clone: each target first brings `.venv` up to date by itself.
# Where torch should come from another index than pip's own, set PIP_EXTRA_INDEX_URL; the versions stay those of
# constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.stamp-env
WHEEL := build/wheel

.DEFAULT_GOAL := help
.PHONY: help env demo test sweep bench bench-gpu test-gpu lint wheel-test clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(READY)  ## only set up: .venv with the versions of constraints.txt

# The stamp lies inside .venv, so that it goes with it; it is written last, so that an interrupted set-up starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed for the development environment, found %d.%d; set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@rm -f $@
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools setuptools_scm wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt) numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[sinabs,snntorch,norse,spikingjelly,brainpy,demo,dev]'
	@touch $@

demo: env  ## train a network, port it, and compare; writes build/demo
	$(BIN)/tracetorch demo --out build/demo

# A worker for each core; the tests of a file stay together, for what they share. Files in the order of their names: by
# number, the one of a single long test would come last, and leave the other cores idle.
test: lint  ## what .ci/run runs: lint, types, tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

sweep: env  ## the long sweeps over random networks
	$(BIN)/python -m pytest -m sweep -n auto

bench: env  ## measurements of the engine beside its peers and its limits; writes build/bench.json
	$(BIN)/python -m benchmarks

# These two take any Python that has torch with CUDA, Triton, NumPy and pytest; nothing is installed.
GPU_PYTHON ?= python3

test-gpu:  ## the engine's tests on a CUDA GPU
	$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py

bench-gpu:  ## measurements on a CUDA GPU, 8 minutes at most; writes build/bench-gpu.json
	$(GPU_PYTHON) -m benchmarks.gpu --out build/bench-gpu.json

# build/lib goes first: setuptools would pack modules that were deleted since.
lint: env  ## ruff on the sources, mypy on the wheel
	$(BIN)/ruff check .
	rm -rf build/lib $(WHEEL)
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w $(WHEEL) .
	$(BIN)/python -m zipfile -e $(WHEEL)/*.whl $(WHEEL)/tree
	cd $(WHEEL)/tree && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p tracetorch

wheel-test: lint  ## build a wheel, check its types, install it into an environment of its own, use it
	$(BIN)/python -m pytest tests/test_packaging.py

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
