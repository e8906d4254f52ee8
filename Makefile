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

.PHONY: setup train test rehearse study-quick lint types docs oldest oldest-torch newest meet release clean

setup: $(STAMP)

# torch goes first and alone: DeepSpeed's build looks for it, and a range would let pip replace the build that a
# machine's owner has put there (for example the one without CUDA).
$(STAMP): pyproject.toml constraints.txt loft_ds/training/assets.txt benchmarks/assets.txt $(addprefix tests/,quantised.txt trl.txt lightning.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,mpi,dev]'
	$(BIN)/python -m pip install --no-deps -r loft_ds/training/assets.txt -r benchmarks/assets.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/quantised -r tests/quantised.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/trl -r tests/trl.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/lightning -r tests/lightning.txt
	touch $@

train: $(STAMP)
	$(RUN) deepspeed $$($(BIN)/python -c '$(PROCESSES)') launch/train.py $(ARGS)

# Two tests at a time; those that need launchers' real parts, time-outs or every compilation are `make rehearse`, and the
# benchmarks and studies from end to end `make study-quick`.
test: lint types
	$(RUN) python -m pytest -n 2 --dist loadfile

# Programs that LoFT plugs into, which no other tier needs. They pin other releases than constraints.txt.
$(VENV)/integrations: tests/integrations.txt | $(STAMP)
	$(BIN)/python -m pip install --no-deps --upgrade --target $@ -r $<
	touch $@

rehearse: $(STAMP) $(VENV)/integrations
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

# Not in CI: on many indexes the wheel of that torch is of several GB.
oldest-torch:
	sed 's/^torch==.*/torch==2.9.0/' constraints-oldest.txt >$(VENV)-oldest-torch.txt
	$(MAKE) meet RELEASES=$@ PINS=$(VENV)-oldest-torch.txt

newest:
	grep -vE '^($(MOVING))==' constraints.txt >$(VENV)-newest.txt
	$(MAKE) meet RELEASES=$@ PINS=$(VENV)-newest.txt

meet:
	$(PYTHON) -m venv $(VENV)-$(RELEASES)
	$(VENV)-$(RELEASES)/bin/python -m pip install -q -c $(PINS) torch
	$(VENV)-$(RELEASES)/bin/python -m pip install -q -c $(PINS) -e '.[train]' hypothesis pytest
	$(VENV)-$(RELEASES)/bin/python -m pip list | grep -E '^($(MOVING)|torch) '
	$(VENV)-$(RELEASES)/bin/python -m pytest -q $(MEETING)

# What an index would get: built, checked (twine renders the README as the index would), installed into an empty
# environment, and the main job run from there in another folder. First without an extra, where the job says what it needs.
RELEASE := $(abspath $(VENV)-release)
TOOLS := $(RELEASE)/tools/bin
WHEEL := $(RELEASE)/wheel/bin
release:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(TOOLS)/python -m pip install -q -c constraints.txt build check-wheel-contents 'readme-renderer[md]' twine
	$(TOOLS)/python -m build
	$(TOOLS)/twine check --strict dist/*
	$(TOOLS)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv $(RELEASE)/wheel
	$(WHEEL)/python -m pip install -q -c constraints.txt torch
	$(WHEEL)/python -m pip install -q -c constraints.txt dist/*.whl
	mkdir $(RELEASE)/elsewhere
	cd $(RELEASE)/elsewhere && PATH="$(WHEEL):$$PATH" && set -x && \
	python -c 'import loft_ds; loft_ds.LoFTTrainer' && \
	loft-plan Mistral-7B --rank 16 && \
	loft-doctor && \
	{ loft-train 2>&1 | grep "it needs datasets.*pip install 'loft_ds\[train\]'"; } && \
	pip install -q -c $(CURDIR)/constraints.txt "$$(echo $(CURDIR)/dist/*.whl)[train]" && \
	package=$$(python -c 'import loft_ds; print(loft_ds.__path__[0])') && \
	case $$package in $(RELEASE)/*) ;; *) exit 1 ;; esac && \
	pip install -q --no-deps -r $$package/training/assets.txt && \
	cp -r $$package/ds_configs . && \
	deepspeed $$(python -c '$(PROCESSES)') --module loft_ds.training --deepspeed ds_configs/zero2.json \
		--max_steps 4 --block_size 32 --max_eval_blocks 4 && \
	ls -l runs/loft-zero2 && \
	loft-train --max_steps 2 --block_size 32 --max_eval_blocks 4
	$(TOOLS)/python -m zipfile -l dist/*.whl
	tar tzvf dist/*.tar.gz
	cd dist && ls -l && sha256sum *

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
