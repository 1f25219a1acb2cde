# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint check bench glue clean

demo: $(VENV)/.demo            ## train exits on real text, divide, run under a budget, draw the memory
	$(BIN)/offramp demo --out demo-out

test: $(VENV)/.test            ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.test            ## format, lint, types, import contracts
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

check: lint test

bench: $(VENV)/.test           ## the figures of docs/results/main-job.md
	$(BIN)/python bench/main_job.py --out bench-out

glue: $(VENV)/.test            ## the figures of docs/results/glue.md; hours on two cores, resumes; GLUE=folder
	$(BIN)/python bench/glue.py --data $(GLUE) --workers 2
	$(BIN)/python bench/glue_speed.py --data $(GLUE)
	for task in sst2 mrpc stsb; do $(BIN)/python bench/glue_agree.py --data $(GLUE) --task $$task; done
	$(BIN)/python bench/glue_report.py

clean:
	rm -rf $(VENV) demo-out bench-out glue-out

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test,lint]'
	touch $@ $(VENV)/.demo
