# `make help` lists the targets. `make demo` and `make test` set everything up themselves; the environment in
# .venv is made anew only when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers/.installed

# The Python to make .venv with: `make demo PYTHON=/path/to/python3.12`. Without it, the first that runs.
PYTHON ?=
# Seeds per plan of `make simulate`; a tenth where one run takes seconds.
SEEDS ?= 200
# How long `make soak` takes.
MINUTES ?= 60
# Processes that `make test` runs tests in, whole files at a time; 0 for none but itself, as a debugger needs.
TEST_PROCESSES ?= 2
# Passed on to what a target runs, as in `make test PYTEST_ARGUMENTS="tests/consensus -k merkle"`.
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
PYTEST_ARGUMENTS ?=

.PHONY: help
help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sort | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(INSTALLED) ## Run a whole network and a governed fine-tune on this machine.
	@$(BIN)/countersign demo $(DEMO_ARGUMENTS)

.PHONY: test
test: lint ## Everything that must pass: lint, types, import rules, all tests.
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGUMENTS)

.PHONY: lint
lint: $(INSTALLED) ## Lint, format check, strict types, import rules; no tests.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: simulate
simulate: $(INSTALLED) ## Run the BFT engines under chaos, with SEEDS=n seeds per plan.
	@COUNTERSIGN_SIMULATION_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/simulation $(PYTEST_ARGUMENTS)

.PHONY: bench
bench: $(INSTALLED) ## Measure, one benchmark after the other, on an otherwise idle machine; prints one JSON document.
	@$(BIN)/python benchmarks/harness.py $(BENCH_ARGUMENTS)

.PHONY: bench-attribution
bench-attribution: $(PEERS) ## Traces beside kronfluence, bergson and TRAK: fine-tunes repeated without some of it, an hour or more.
	@.venv-peers/bin/python benchmarks/attribution/bench.py $(BENCH_ARGUMENTS)

.PHONY: bench-trainer
bench-trainer: $(PEERS) ## A governed training step beside a plain one, MLflow's logging and model-signing's hash; 5 minutes.
	@.venv-peers/bin/python benchmarks/bench_trainer.py --peers $(BENCH_ARGUMENTS)

.PHONY: soak
soak: $(INSTALLED) ## Memory and finality of four nodes under steady load for MINUTES.
	@$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(BENCH_ARGUMENTS)

.PHONY: clean
clean: ## Remove .venv, caches, build output and what the demo left.
	@rm -rf $(VENV) .venv-peers build dist *.egg-info demo-run .cache .coverage
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on the PATH may be a stand-in that does not run: each candidate is executed before it is chosen.
$(INSTALLED): pyproject.toml constraints.txt
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then \
		for candidate in python3.11 python3.12 python3; do \
			if "$$candidate" -c '' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
		done; \
	fi; \
	if [ -z "$$python" ]; then \
		echo 'No Python found. Debian, Ubuntu: apt-get install python3.11 python3-venv; Fedora: dnf install python3.11' >&2; \
		exit 1; \
	fi; \
	"$$python" scripts/check_prerequisites.py; \
	if ! $(BIN)/python -c '' >/dev/null 2>&1 || [ -n '$(PYTHON)' ]; then \
		"$$python" -m venv --clear $(VENV); \
	fi
	@echo 'Installing into $(VENV) (minutes the first time)' >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[node,trainer,hf,attribution,export,dev]'
	@touch $@

# An environment of its own: what the peers bring along does not suit every library of ours.
$(PEERS): pyproject.toml constraints.txt | $(INSTALLED)
	@$(BIN)/python -m venv --clear .venv-peers
	@echo 'Installing into .venv-peers (minutes the first time)' >&2
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trainer,attribution,peers]'
	@touch $@
