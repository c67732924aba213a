# make demo    set up, then run the default preset: from nothing to a table of results
# make test    set up, then run every check
# make ui      set up, then Prefect's server, worker and UI on this machine
# make e2e     runs against a real server and worker, with what can fail there; part of the tests
# make check   the same checks in the environment that is active (or .venv)
PYTHON ?= python3
BIN := .venv/bin

# The checks run where the tools are: in .venv once it exists, else in the active environment.
IN_VENV := $(wildcard $(BIN)/python)
RUN = $(if $(IN_VENV),$(BIN)/,)

.PHONY: demo test ui check e2e fast clean

demo: .venv/installed
	$(BIN)/rotvit run

test: .venv/installed-dev
	$(MAKE) check RUN=$(BIN)/

ui: .venv/installed
	$(BIN)/python -m flows.service

check:
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy
	$(RUN)lint-imports
	$(RUN)pytest

e2e:
	$(RUN)pytest -m e2e

fast:
	$(RUN)pytest -m "not slow"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
