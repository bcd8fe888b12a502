# `make` sets up .venv/ and runs config.yaml (or `make CONFIG=my-config.yaml`) to the reports; `make test` sets it up and runs the tests.
# Both may be called again at any time: what is done is not done again. Options: `make SNAKEMAKE="-n"`.
.PHONY: run test lint check estimate provenance verify clean-results prune test-cluster clean-venv
.DEFAULT_GOAL := run
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
CPUS := $(shell $(PYTHON) -c "import os; print(len(getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0)))")
# Jobs at a time. At least four, because a job that waits for the device uses no processor.
CORES ?= $(shell echo $$(( $(CPUS) > 4 ? $(CPUS) : 4 )))
SNAKEMAKE ?=
CONFIG ?= config.yaml
ROWS ?= 20
STAMP := .venv/.installed
PEERS := .venv-peers/.installed
BENCH ?=
GPU ?=
FORMATTED := Snakefile workflow/rules

run: $(STAMP)
	.venv/bin/snakemake --cores $(CORES) $(if $(filter-out config.yaml,$(CONFIG)),--configfile $(CONFIG)) $(SNAKEMAKE)

# Files of tests side by side: most of the time goes into starting processes. The longest files come first (testpaths).
test: lint
	.venv/bin/pytest --numprocesses $(CPUS) --dist loadfile --no-loadscope-reorder --durations 10

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/snakefmt --line-length 110 --check $(FORMATTED)
	.venv/bin/snakemake --lint

# Before a run: configuration, data files, tokenizers, devices and disk. `make check CONFIG=my-config.yaml`
check: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.check --configfile $(CONFIG)

# Before a run: cells, rows, operations, time, disk and memory, and warnings. `make estimate CONFIG=my-config.yaml`
estimate: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.estimate --configfile $(CONFIG)

# From a file back to what made it. `make provenance FILE=results/.../layer=0.parquet`
provenance: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.lineage $(FILE)

# Compute a random sample of finished rows again, by full forward passes. `make verify ROWS=100`
verify: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.verify --rows $(ROWS)

# Measure this engine beside other tools, which live in an environment of their own. `make bench BENCH=--quick`
.PHONY: bench
bench: $(STAMP) $(PEERS)
	PYTHONPATH=scripts:tests/support .venv-peers/bin/python tests/benchmark/compare.py $(BENCH)
	PYTHONPATH=scripts:tests/support .venv/bin/python tests/benchmark/picture.py

# With a GPU: its tests, the engine beside other tools at 100M to 8B parameters, and a whole grid. `make gpu GPU=--toy`
# runs the same on the CPU with a tiny model. Other tools take part if `make bench` has installed them.
.PHONY: gpu
gpu: $(STAMP)
	PYTHONPATH=scripts:tests/support .venv/bin/python tests/benchmark/gpu.py $(GPU)

# Remove the cells and other files that earlier configurations left in the directories of the current experiments.
clean-results: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.clean --configfile $(CONFIG)

# Remove finished cells that no file of results/ uses any more.
prune: $(STAMP)
	PYTHONPATH=scripts .venv/bin/python -m selfrepair.tools.prune

# Through a real SLURM on this machine, which takes root and Debian's packages.
test-cluster: $(STAMP)
	tests/cluster/run.sh

clean-venv:
	rm -rf .venv

$(STAMP): requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3')"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.lock
	touch $@

$(PEERS): tests/benchmark/requirements-peers.lock
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	touch $@
