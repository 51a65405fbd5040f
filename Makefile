# `make train` and `make test` set up everything they need in $(VENV); nothing else has to be installed first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test gpu lint types check equality mutants sanitize clean

train: $(VENV)/.ready
	$(BIN)/mars train $(ARGS)

# Two workers of one thread each: more threads than cores make each other wait.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# What only a CUDA device can show; visibly skipped without one.
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_polar_triton.py -v -rs

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

# The equality table: training on 2 and 4 processes against one.
equality: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/sharded_checks.py $(ARGS)

# Breaks the library on purpose, one place at a time, and asks the tests to notice.
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutants.py

# The native kernels under the compiler's sanitizers; needs a compiler and nothing else.
sanitize:
	$(PYTHON) tests/sanitize.py

# torch first and pinned: a looser request would fetch a build with several gigabytes of CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
