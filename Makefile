# Two commands for a newcomer: `make demo` and `make test`. Each makes the virtual environment it needs first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Exact versions come from constraints.txt, so that a run can be repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[all]"
	touch $@

demo: $(VENV)/.installed ## train a tiny model, take one update, report how its entropy moved
	$(BIN)/entropy-fast demo --output demo-report

test: $(VENV)/.installed ## run every test (on a GPU too, where there is one)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment and what the demo wrote
	rm -rf $(VENV) demo-report
