# The handful of things one does. `make quickstart` and `make test` need nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help quickstart test install-dev lint format types check benchmark clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

quickstart: $(BIN)/python  ## install, train a small mixture on a CPU, print what it learned
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	$(BIN)/moadapt train configs/quickstart.yaml

test: $(BIN)/python  ## install and run all tests
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/python -m pytest

install-dev: $(BIN)/python  ## install everything a developer needs
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pre-commit install

lint:  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format:  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types:  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## all of the above

benchmark:  ## speed and memory of one layer against its peers
	$(BIN)/python benchmarks/layer_speed.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
