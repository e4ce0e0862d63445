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
NPROC ?=
ZERO ?= 2
OFFLOAD ?=

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

.PHONY: help venv demo test test-long test-cluster matrix fuzz lint format bench bench-quick bench-layer measure-stories measure-wikitext measure-evaluation measure-recovery measure-memory hooks clean
.PHONY: train train-torchrun train-deepspeed train-fsdp train-accelerate resume eval merge

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=python3.12 (3.11 to 3.13), JOBS=2 (test processes), ARGS='...' (handed to the program)"
	@echo "  Training: CONFIG=my.yaml, NPROC=2 (processes on this machine; default: the GPUs), ARGS='--train.max_steps 100'"

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

# Variables that a target needs, each with what was expected: one line and exit code 2 before anything is installed or started.
need-CONFIG: EXPECTED := the run's YAML file, as in CONFIG=configs/wikitext2_llama.yaml
need-MODEL: EXPECTED := the directory of a model
need-BASE: EXPECTED := the directory of the pruned model
need-ADAPTER: EXPECTED := the directory of an adapter
need-OUT: EXPECTED := a directory for the merged model
.PHONY: need-CONFIG need-MODEL need-BASE need-ADAPTER need-OUT
need-CONFIG need-MODEL need-BASE need-ADAPTER need-OUT:
	@[ -n '$($(@:need-%=%))' ] || { echo "$(@:need-%=%): found nothing, expected $(EXPECTED)" >&2; exit 2; }

# The launchers take these from the environment; all their other variables (docs/launching.md) reach them from the user's.
LAUNCH := PYTHON=$(BIN)/python NPROC='$(NPROC)' launch
# One process without a launcher, unless NPROC asks for more.
START := $(if $(filter-out 1,$(NPROC)),$(LAUNCH)/torchrun.sh,$(BIN)/python -m lora_dist)

train: need-CONFIG $(STAMP)  ## train on one process (CONFIG=my.yaml)
	@$(BIN)/python -m lora_dist train --config '$(CONFIG)' $(ARGS)

train-torchrun: need-CONFIG $(STAMP)  ## train on NPROC processes under torchrun
	@$(LAUNCH)/torchrun.sh train --config '$(CONFIG)' $(ARGS)

train-deepspeed: need-CONFIG $(STAMP)  ## train with DeepSpeed (ZERO=1, 2 or 3; OFFLOAD=cpu, or nvme for ZERO=3)
	@case '$(ZERO)' in 1|2|3) ;; *) echo "ZERO: found '$(ZERO)', expected 1, 2 or 3" >&2; exit 2 ;; esac
	@case '$(OFFLOAD)' in ''|cpu|nvme) ;; *) echo "OFFLOAD: found '$(OFFLOAD)', expected cpu, nvme or nothing" >&2; exit 2 ;; esac
	@$(LAUNCH)/deepspeed.sh train --config '$(CONFIG)' --parallel.strategy zero$(ZERO) \
		$(if $(OFFLOAD),--parallel.offload_optimizer $(OFFLOAD) $(if $(filter 3,$(ZERO)),--parallel.offload_param cpu)) $(ARGS)

train-fsdp: need-CONFIG $(STAMP)  ## train with base, gradients and optimizer sharded by FSDP2
	@$(LAUNCH)/torchrun.sh train --config '$(CONFIG)' --parallel.strategy fsdp2 $(ARGS)

train-accelerate: need-CONFIG $(STAMP)  ## train on NPROC processes under accelerate launch
	@$(LAUNCH)/accelerate.sh train --config '$(CONFIG)' $(ARGS)

resume: need-CONFIG $(STAMP)  ## go on from the newest checkpoint, on one process or NPROC
	@$(START) train --config '$(CONFIG)' --resume auto $(ARGS)

eval: need-MODEL $(STAMP)  ## perplexity (MODEL=dir, ADAPTER=dir if there is one, ARGS='--dataset_name text.txt')
	@$(START) eval '$(MODEL)' $(if $(ADAPTER),--adapter '$(ADAPTER)') $(ARGS)

merge: need-BASE need-ADAPTER need-OUT $(STAMP)  ## add an adapter to its base (BASE=dir ADAPTER=dir OUT=dir)
	@$(START) merge '$(BASE)' '$(ADAPTER)' '$(OUT)' $(ARGS)

# One thread a process: two test processes on two cores; torch's own threads would only wait for each other.
test: $(STAMP)  ## run the tests (ARGS='tests/blocks' for some of them)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=15 $(ARGS)

test-long: $(STAMP)  ## lost machines, launchers across machines, one checkpoint under every strategy, a dozen kills (25 to 40 minutes; not in CI)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --long -m long -n $(JOBS) --dist loadfile --durations=15 $(ARGS)

matrix: $(STAMP)  ## every strategy's checkpoint resumed under every other, on 2, 1, 2 processes; kills (15 to 20 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --matrix -m matrix tests/distributed tests/launch $(ARGS)

fuzz: $(STAMP)  ## 200 kills at random moments, 50 inside a save: every run ends as if never killed (ARGS='--seed 7'; about 20 minutes)
	@$(BIN)/python scripts/fuzz_kills.py $(ARGS)

# Installs the two packages where it can (Debian, root); where there is no Slurm, every test is skipped and says so.
test-cluster: $(STAMP)  ## jobs preempted, out of time and without a node, on a real two-node Slurm (6 to 10 minutes)
	@command -v sbatch > /dev/null && PATH="$$PATH:/usr/sbin" command -v munged > /dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && echo "Installing slurm-wlm and munge" && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null; } || \
		echo "test-cluster: found no slurm-wlm and munge, and cannot install them (needs root and apt-get): skipped" >&2
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --cluster -m cluster tests/cluster --durations=10 $(ARGS)

lint: $(STAMP)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## put the code into the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Measured on a machine of its own (or on one thread, --shared), where threads that spin are a tenth faster than those that sleep.
bench: $(STAMP)  ## speed and memory of training beside Trainer with PEFT and dense-masked LoRA (ARGS="out/bench --preset cpu"; about 30 minutes)
	@env -u OMP_WAIT_POLICY $(BIN)/python scripts/bench/run.py $(if $(ARGS),$(ARGS),out/bench)

bench-quick: $(STAMP)  ## ratios of speed and memory on a very small model, far from what is measured (a minute or two)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(BIN)/python scripts/bench/run.py "$$out" --preset quick --repeats 2

bench-layer: $(STAMP)  ## error, time and memory of the block-masked layer against plain LoRA and the dense form
	@$(BIN)/python scripts/bench_layer.py $(ARGS)

measure-stories: $(STAMP)  ## the README's table on stories260K (LORA_DIST_DATA names the data; about 10 minutes)
	@$(BIN)/python scripts/measure.py stories $(ARGS)

measure-wikitext: $(STAMP)  ## the README's table on wikitext2-llama (LORA_DIST_DATA names the data; about 30 minutes)
	@$(BIN)/python scripts/measure.py wikitext $(ARGS)

measure-evaluation: $(STAMP)  ## docs/measurements.md's table of whole evaluations of stories260K (LORA_DIST_DATA names the data; about 15 minutes)
	@$(BIN)/python scripts/measure_evaluation.py $(ARGS)

measure-recovery: $(STAMP)  ## the README's table of what comes back: pruning x method, both models (LORA_DIST_DATA names the data; hours; ARGS="--only stories")
	@$(BIN)/python scripts/bench/recovery.py out/recovery $(ARGS)

measure-memory: $(STAMP)  ## the README's table of memory by strategy, on a base of 1.1e9 parameters (15 GiB free; about 30 minutes)
	@$(BIN)/python scripts/measure_memory.py $(ARGS)

hooks: $(STAMP)  ## run lint before every commit
	@$(BIN)/pre-commit install

clean:  ## remove caches (not .venv, not results)
	@rm -rf .ruff_cache .mypy_cache .pytest_cache build *.egg-info
