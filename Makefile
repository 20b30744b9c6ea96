# PYTHON makes the environment, VENV is where: `make test PYTHON=python3.12 VENV=.venv312`.
PYTHON ?= python3
VENV ?= .venv
# Tried first on a machine without a GPU: several gigabytes less than the CUDA build, where pip finds it.
TORCH_CPU ?= torch==2.13.0+cpu

# Installed before the project: pip searches for many minutes when axolotl's exact pins meet our ranges all at once.
AXOLOTL := $(shell sed -n 's/^axolotl = \["\(.*\)"\]$$/\1/p' pyproject.toml)

BIN := $(VENV)/bin
SOURCES := axolotl_ivon cli tests benchmarks example_configs

.PHONY: help demo test lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## train SmolLM2 on movie snippets with IVON-LoRA and evaluate its posterior (8 minutes on 2 cores)
	$(BIN)/python example_configs/demo.py

# Two workers, and one thread in each: threads that wait for one another's core make everything ten times slower.
test: export OMP_NUM_THREADS = 1
test: export AXOLOTL_DO_NOT_TRACK = 1
test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:  ## remove what make has made: .venv, .demo, build and cache folders
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

# An environment is as new as its stamp; what pip has installed by then, it does not install again.
$(VENV)/.%: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed; this is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install '$(TORCH_CPU)' 2>/dev/null || \
		echo 'pip finds no CPU build of torch here; the build that it does find works as well.'
	$(BIN)/python -m pip install '$(AXOLOTL)'
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@ $(VENV)/.demo
