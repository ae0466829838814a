# Everything sets itself up: `make test` and `make train` need only a Python >= 3.11 with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where libtpu or the CUDA plugin are installed every command looks for their hardware first: they get their own place.
AOT_VENV ?= .venv-aot
AOT_BIN := $(AOT_VENV)/bin
AOT_READY := $(AOT_VENV)/.ready

.PHONY: help train test lint types slow reference aot aot-slow benchmark clean

help:
	@echo "make train      train the nano model on real text (about 10 minutes on 2 cores)"
	@echo "make test       the tests"
	@echo "make lint       ruff"
	@echo "make types      pyright"
	@echo "make slow       the slow tests, and those of inference on programs compiled as users compile them"
	@echo "make reference  the comparison with PyTorch implementations (installs torch and transformers)"
	@echo "make aot        what compiles for TPUs and GPUs that are not here (installs their compilers; Linux on x86-64)"
	@echo "make aot-slow   the same for whole models and further chips"
	@echo "make benchmark  training and inference speed against transformers (installs them too)"

define new_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.11 (or newer)"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
endef

$(READY): pyproject.toml
	$(new_venv)
	$(BIN)/python -m pip install --quiet --group dev --editable .
	@touch $@

train: $(READY)
	$(BIN)/dsv4 train nano

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations=25

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

slow: $(READY)
	$(BIN)/python -m pytest -q -m 'slow and not aot'
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -q tests/inference

aot-slow: $(AOT_READY)
	$(AOT_BIN)/python -m pytest -q -m 'aot and slow'

$(VENV)/.reference: $(READY)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[reference]'
	@touch $@

reference: $(VENV)/.reference
	$(BIN)/python -m pytest -q -m reference

$(AOT_READY): pyproject.toml
	@[ "$$(uname -sm)" = "Linux x86_64" ] || \
	  { echo "libtpu and the CUDA plugin exist for Linux on x86-64 only, and this is $$(uname -sm)"; exit 1; }
	$(new_venv)
	$(AOT_BIN)/python -m pip install --quiet --group test --editable '.[aot]'
	@touch $@

aot: $(AOT_READY)
	$(AOT_BIN)/python -m pytest -n 2 -q -m 'aot and not slow'

benchmark: $(VENV)/.reference
	$(BIN)/python -m tests.benchmarks.train_cpu
	$(BIN)/python -m tests.benchmarks.infer_cpu

clean:
	rm -rf $(VENV) $(AOT_VENV) .pytest_cache .ruff_cache
