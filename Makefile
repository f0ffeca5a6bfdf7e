# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
STORE ?= local
RUN ?= sample
ARGS ?=

PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-fast bench check constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## the virtual environment, made anew only when its inputs change

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The same two commands on either store; the S3 server's address and keys reach them through the environment.
ifeq ($(STORE),s3)
  RAW := s3://corpus/shakespeare
  WITH_STORE := $(PY) cluster/local_s3.py --dir corpora/s3 --
  URIS := --corpus.uri $(RAW) --corpus.prepared s3://corpus/prepared --run.storage s3://checkpoints/runs
else
  RAW := corpora/shakespeare
  URIS :=
endif

pretrain: $(SETUP)  ## the main job on the sample corpus; STORE=s3 uses a real S3 server on loopback
	@$(WITH_STORE) sh -c '$(PY) data/sample.py --output $(RAW) && exec $(PY) trainers/pretrain.py \
	  --config trainers/configs/sample.yaml --run.name $(RUN) $(URIS) $(ARGS)'

test: $(SETUP)  ## every test, on a real Ray cluster and a real S3 server (about 20 minutes on 2 cores)
	@$(PY) -m pytest $(ARGS)

test-fast: $(SETUP)  ## the tests that need no cluster (about four minutes)
	@$(PY) -m pytest -m "not cluster" $(ARGS)

check: $(SETUP)  ## lint, format and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

bench: $(SETUP)  ## the table of speeds, each as a ratio within one run
	@$(PY) benchmarks/run.py $(ARGS)

constraints: $(SETUP)  ## write down the exact versions of what is installed now
	@$(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu//; s/ @ .*//' > constraints.txt

clean:  ## remove the environment, runs and prepared corpora
	rm -rf $(VENV) runs corpora
