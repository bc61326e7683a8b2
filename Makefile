# `make run` and `make test` do all their own set-up: they need Python >= 3.11 (with venv and pip) and make.

# The first interpreter that really runs, is new enough and can make a venv with pip.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/.installed

# Two workers take tests from each other; each has ranks of its own.
WORKERS ?= -n 2 --dist worksteal

.PHONY: install run test test-all check bench

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv and pip: install one, or name it: make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

run: install
	$(BIN)/meshwright train quickstart --layout.replicate 2 --layout.tensor 2 --processes 4

test: install
	$(BIN)/pytest -m "not slow" $(WORKERS)

test-all: install
	$(BIN)/pytest $(WORKERS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m meshwright.bench.record check

bench: install
	$(BIN)/python benchmarks/commands.py
