# `make demo` and `make test` work on a fresh machine: both create .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: compiling all of them would take longer than the rest.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Compiled modules are kept, also where the environment says otherwise: dozens of processes import torch, each of which
# would compile it again.
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
# One thread for each process: two processes with a pool each would wait for one another.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SRC := src/offramp
DEVICE := $(addprefix $(SRC)/,__init__.py __main__.py errors.py forks.py units.py program store policies measure runtime session \
	profiling tasks/__init__.py tasks/text.py) \
	$(wildcard $(addprefix $(SRC)/backends/,__init__.py base.py onnx*.py numpy*.py)) \
	$(wildcard $(addprefix $(SRC)/cli/,__init__.py options.py run.py plan.py ls.py verify.py memory.py profile.py))

.PHONY: help demo test test-all coverage guards mutants soak device lint audit check sbom licences bench pages rivals glue reliability clean

help:                          ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo            ## train exits on text, divide, run under a budget, draw the memory
	$(BIN)/offramp demo --out demo-out

test: $(VENV)/.test            ## run the tests that CI runs: all but the slow ones
	OFFRAMP_TESTS=sample $(PARALLEL) -m "not slow and not alone"
	$(PYTEST) -m "not slow and alone"

test-all: $(VENV)/.test        ## run all tests
	$(PARALLEL) -m "not alone"
	$(PYTEST) -m alone

coverage: $(VENV)/.test        ## run all tests and print the line and branch coverage of src
	$(PARALLEL) -m "not alone" --cov --cov-report=
	$(PYTEST) -m alone --cov --cov-append --cov-report=term:skip-covered --cov-report=json:coverage.json

guards: $(VENV)/.test          ## remove safety checks one by one, and check that a test fails for each
	$(BIN)/python -m tests.checks.guards

mutants: $(VENV)/.test         ## change the code in 200 small ways, and count the changes that make a test fail
	$(BIN)/python -m tests.checks.mutants

soak: $(VENV)/.test            ## open and close engines 1,000 times, and check threads, files and memory
	$(BIN)/python -m tests.checks.soak

device: $(VENV)/.test          ## run the golden answers under Python 3.8, NumPy 1.19 and ONNX Runtime 1.10
	.ci/device.sh $(BIN)/python

lint: $(VENV)/.test            ## check format, style, types, imports, sizes, and Python 3.8 in the rooms of a device
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/ruff check src tests bench recipes
	$(BIN)/vermin --quiet --no-tips --violations --target=3.8- $(DEVICE)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.checks.house

audit: $(VENV)/.audit          ## look for known weaknesses of the code (bandit) and of the dependencies (pip-audit)
	.ci/audit.sh $(BIN)

check: lint test device audit  ## run what CI runs, and the audits

sbom: $(VENV)/.test            ## write the software bill of materials to sbom.json (CycloneDX)
	$(BIN)/python -m tests.checks.supply sbom sbom.json

licences: $(VENV)/.test        ## write the licences of the dependencies to docs/licences.md
	$(BIN)/python -m tests.checks.supply licences docs/licences.md

bench: $(VENV)/.test           ## latency and memory of BERT-base's shape against the budget, and rivals; resumes
	$(BIN)/python bench/shapes.py bench-out/models
	MODELS=bench-out/models $(BIN)/offramp sweep recipes/main_job.py --out bench-out/results
	$(BIN)/offramp report bench-out/results

pages: $(VENV)/.test           ## make pages of docs/results from their records
	for page in glue latency any-model main-job; do $(BIN)/offramp report docs/results/records/$$page \
		--template recipes/$$(echo $$page | tr - _).md.jinja --out docs/results/$$page.md; done
	$(BIN)/offramp report $(addprefix docs/results/records/,study glue latency) --template recipes/ancestor.md.jinja \
		--out docs/results/study.md

rivals: $(VENV)/.test          ## compare with other runtimes, and write docs/results/rivals.md; resumes
	$(BIN)/python bench/rivals_page.py --out bench-out

glue: $(VENV)/.test            ## ask the questions of docs/results/glue.md: hours on two cores; resumes; GLUE=FOLDER MODELS=FOLDER
	GLUE=$(GLUE) MODELS=$(MODELS) $(BIN)/offramp sweep recipes/glue.py --out glue-out --jobs 2
	$(BIN)/offramp report glue-out

reliability: $(VENV)/.test     ## try hostile, damaged and changing files: an hour on two cores; resumes
	$(BIN)/python -m tests.reliability --out reliability-out

clean:                         ## remove what these commands wrote
	rm -rf $(VENV) demo-out bench-out glue-out mutants-out reliability-out .coverage coverage.json sbom.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test,lint]'
	touch $@ $(VENV)/.demo

$(VENV)/.audit: $(VENV)/.test
	-$(PIP) -e '.[audit]' && touch $@
