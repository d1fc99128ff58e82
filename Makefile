# make autotune   install what is needed, then tune, verify and report for the device that is here (a GPU, or else the CPU)
# make test       install what is needed, then run the tests
# make lint       ruff and mypy
# make benchmark  measure against torch and, where installed, other implementations
# make clean      remove what make made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORT ?= report

.DEFAULT_GOAL := help
.PHONY: help autotune test lint benchmark clean

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"coordroute needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]} (choose another: make PYTHON=python3.12)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt) setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

autotune: $(STAMP)
	$(BIN)/coordroute autotune --json $(REPORT)/autotune.json $(ARGS)
	$(BIN)/coordroute verify --json $(REPORT)/verify.json
	$(BIN)/coordroute benchmark --peers --json $(REPORT)/benchmark.json
	$(BIN)/coordroute report --input $(REPORT) --output $(REPORT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/coordroute
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p coordroute

benchmark: $(STAMP)
	$(BIN)/coordroute benchmark --peers --json $(REPORT)/benchmark.json

clean:
	rm -rf $(VENV) $(REPORT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
