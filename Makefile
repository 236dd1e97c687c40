# Needs make and Python 3.11 or 3.12, nothing else. `make help` lists what there is.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit((3, 11) > sys.version_info[:2] or sys.version_info[:2] > (3, 12))' 2>/dev/null \
	&& { echo $$p; break; }; done)

BIN := $(VENV)/bin
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
DEPENDS := setup.cfg pyproject.toml $(CONSTRAINTS)

.PHONY: help demo test clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    edit facts in the embedded model with ROME and TOP and show what became of them'
	@echo 'make test    all checks: ruff, types, import contracts, fast tests'
	@echo 'make clean   remove $(VENV) and caches; runs in lightning_logs stay'
	@echo 'Variables: PYTHON=python3.12   VENV=.venv   CONSTRAINTS= (empty: whatever versions pip finds)'

demo: $(VENV)/.installed
	$(BIN)/kedit fit --config configs/rome_almanac.yaml
	$(BIN)/kedit fit --config configs/top_almanac.yaml
	$(BIN)/kedit show lightning_logs/rome_almanac lightning_logs/top_almanac

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .grimp_cache *.egg-info
	find kedit_lightning tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than all it was installed from, so a second run goes straight to work.
$(VENV)/.installed: $(DEPENDS) | $(BIN)/python
	@echo 'Installing into $(VENV) (a few minutes the first time) …'
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or 3.12 is needed and was not found; give it as PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'python -m venv failed; on Debian: apt install python3-venv' >&2; exit 1; }
