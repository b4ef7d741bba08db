# Two commands are enough: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# quickstart: DATA=folder-or-zip TEST=folder-or-zip OUT=folder
QUICKSTART_ARGS := $(if $(DATA),--data $(DATA)) $(if $(TEST),--test $(TEST)) $(if $(OUT),--out $(OUT))
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup quickstart test test-all lint format types check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the locked dependencies (skipped when up to date)

$(STAMP): pyproject.toml requirements.lock launch/setup_environment.sh
	@PYTHON="$(PYTHON)" bash launch/setup_environment.sh "$(VENV)"
	@touch $@

quickstart: setup  ## pack -> train -> export -> gallery -> identify -> report [DATA=.. TEST=.. OUT=..]
	@$(BIN)/aroface quickstart $(QUICKSTART_ARGS)

test: setup  ## the default tests, a few minutes on 2 cores
	$(BIN)/python -m pytest

test-all: setup  ## the slow tests too (those that need a GPU skip where there is none)
	$(BIN)/python -m pytest -m "" --durations=20

lint: setup  ## ruff, formatting and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## what to run before a commit

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) dist build runs .mypy_cache .ruff_cache .pytest_cache
