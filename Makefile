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

.PHONY: setup train test rehearse study-quick lint types docs oldest newest meet clean

setup: $(STAMP)

# torch goes first and alone: DeepSpeed's build looks for it, and a range would let pip replace the build that a
# machine's owner has put there (for example the one without CUDA).
$(STAMP): pyproject.toml constraints.txt launch/assets.txt benchmarks/assets.txt tests/quantised.txt tests/trl.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,mpi,dev]'
	$(BIN)/python -m pip install --no-deps -r launch/assets.txt -r benchmarks/assets.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/quantised -r tests/quantised.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/trl -r tests/trl.txt
	touch $@

train: $(STAMP)
	$(RUN) deepspeed $$($(BIN)/python -c '$(PROCESSES)') launch/train.py $(ARGS)

# Two tests at a time; those that need launchers' real parts, time-outs or every compilation are `make rehearse`, and the
# benchmarks and studies from end to end `make study-quick`.
test: lint types
	$(RUN) python -m pytest -n 2 --dist loadfile

rehearse: $(STAMP)
	$(RUN) python -m pytest -m rehearse -n 2 --dist loadfile

study-quick: $(STAMP)
	$(RUN) python -m pytest -m study

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(STAMP)
	$(RUN) mypy

# The site in site/; a link that leads nowhere fails.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(RUN) mkdocs build --strict

# Tests that meet every library: with the oldest releases that pyproject.toml admits, and with the newest there are.
MEETING := $(addprefix tests/test_,optimizer.py factors.py edges_optimizer.py edges_engine.py trainer.py)
MOVING := accelerate|deepspeed|peft|transformers

oldest:
	$(MAKE) meet RELEASES=$@ PINS=constraints-oldest.txt

newest:
	grep -vE '^($(MOVING))==' constraints.txt >$(VENV)-newest.txt
	$(MAKE) meet RELEASES=$@ PINS=$(VENV)-newest.txt

meet:
	$(PYTHON) -m venv $(VENV)-$(RELEASES)
	$(VENV)-$(RELEASES)/bin/python -m pip install -q -c $(PINS) torch
	$(VENV)-$(RELEASES)/bin/python -m pip install -q -c $(PINS) -e '.[train]' hypothesis pytest
	$(VENV)-$(RELEASES)/bin/python -m pip list | grep -E '^($(MOVING)|torch) '
	$(VENV)-$(RELEASES)/bin/python -m pytest -q $(MEETING)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
