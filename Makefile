# `make demo` and `make test` are all the set-up there is: each makes .venv if it is missing. `make help` lists the rest.
#
# A machine without a GPU can save about 3 GB of CUDA packages by also letting pip look at PyTorch's own index:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

# Threads that wait for each other should sleep, not spin: on a machine shared with other work, spinning makes torch several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
# The stamp carries a checksum of what decides the installation: a fresh checkout's new dates alone reinstall nothing.
STAMP := $(VENV)/.installed-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt
# pip says a line or more a package; show the large downloads and a count, and keep the rest for when something goes wrong.
PROGRESS := tee -a $(VENV)/install.log | awk '\
	/(Downloading|Using cached) .*[0-9] [MG]B\)/ { sub(/^ */, ""); print "  " $$0 } \
	/^Collecting|^Requirement already/ { if (++n % 25 == 0) print "  " n " requirements looked up" } \
	/^Installing collected/ { print "  unpacking" } \
	/^ERROR|^error/ { print } { fflush() }'

.PHONY: help venv demo test lint format bench measure-stories measure-wikitext hooks clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=python3.12 (3.11 to 3.13), JOBS=2 (test processes), ARGS='...' (handed to demo, test and bench)"

venv: $(STAMP)  ## make .venv with everything that demo, test and lint need

$(STAMP): | check-python
	@[ -x $(BIN)/python ] || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@: > $(VENV)/install.log
	@echo "Installing torch and the other packages into $(VENV) (once; details in $(VENV)/install.log)"
	@{ $(PIP_INSTALL) torch 2>&1 && $(PIP_INSTALL) -e '.[dev]' 2>&1; } | $(PROGRESS) \
		|| { echo "Installation failed; the end of $(VENV)/install.log:" >&2; tail -n 15 $(VENV)/install.log >&2; exit 1; }
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "Installed."

.PHONY: check-python
check-python:
	@command -v $(PYTHON) > /dev/null || { echo "PYTHON=$(PYTHON): no such command; name a Python 3.11, 3.12 or 3.13" >&2; exit 2; }
	@python=$(PYTHON); [ ! -x $(BIN)/python ] || python=$(BIN)/python; \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "$$python is $$($$python --version 2>&1), expected Python 3.11, 3.12 or 3.13:" \
			"name one, as in make PYTHON=python3.12 (and move $(VENV) away if it is of another version)" >&2; exit 2; }

demo: $(STAMP)  ## train, prune, recover and merge a small model, with a table at the end (about 6 minutes)
	@$(BIN)/python scripts/demo.py $(ARGS)

# One thread a process: two test processes on two cores; torch's own threads would only wait for each other.
test: $(STAMP)  ## run all tests (ARGS='-m "not slow"' for the quick ones)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=15 $(ARGS)

lint: $(STAMP)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## put the code into the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## error, time and memory of the block-masked layer against plain LoRA and the dense form
	@$(BIN)/python scripts/bench_layer.py $(ARGS)

measure-stories: $(STAMP)  ## the README's table on stories260K (LORA_DIST_DATA names the data; about 10 minutes)
	@$(BIN)/python scripts/measure.py stories $(ARGS)

measure-wikitext: $(STAMP)  ## the README's table on wikitext2-llama (LORA_DIST_DATA names the data; about 30 minutes)
	@$(BIN)/python scripts/measure.py wikitext $(ARGS)

hooks: $(STAMP)  ## run lint before every commit
	@$(BIN)/pre-commit install

clean:  ## remove caches (not .venv, not results)
	@rm -rf .ruff_cache .mypy_cache .pytest_cache build *.egg-info
