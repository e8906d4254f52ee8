# `make train` and `make test` start from nothing but Python 3.10+ and g++; `make setup` is what both do first.
PYTHON ?= python3
VENV ?= .venv
# Processes for the main job on a machine without an accelerator; with one, DeepSpeed takes all there are.
RANKS ?= 2
ARGS ?= --deepspeed ds_configs/zero2.json

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROCESSES := import torch; print("" if torch.accelerator.is_available() else "--num_accelerators $(RANKS)")
RUN := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: setup train test lint types clean

setup: $(STAMP)

# torch goes first and alone: DeepSpeed's build looks for it, and a range would let pip replace the build that a
# machine's owner has put there (for example the one without CUDA).
$(STAMP): pyproject.toml constraints.txt launch/assets.txt benchmarks/assets.txt tests/quantised.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,mpi,dev]'
	$(BIN)/python -m pip install --no-deps -r launch/assets.txt -r benchmarks/assets.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/quantised -r tests/quantised.txt
	touch $@

train: $(STAMP)
	$(RUN) deepspeed $$($(BIN)/python -c '$(PROCESSES)') launch/train.py $(ARGS)

test: lint types
	$(RUN) python -m pytest

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(STAMP)
	$(RUN) mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
