# Owns the developer's commands; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
CONFIG ?= configs/local.yaml
PORT ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' requirements.lock)
STAMP := $(VENV)/.baton-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)

# pyright's wrapper asks a registry for newer versions of itself unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup run test check compare faults lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install everything into .venv (TORCH_INDEX=<url of PyTorch's CPU wheels> if torch comes with CUDA)

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or pass PYTHON=<path>" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11; pass PYTHON=<path>" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	$(BIN)/pip install --quiet --no-deps torch==$(TORCH)
else
	$(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) torch==$(TORCH)+cpu
endif
	@grep -q "^cuda.*= None" $(VENV)/lib/python3.11/site-packages/torch/version.py || { echo "make: pip took torch's CUDA build; pass TORCH_INDEX=<url of PyTorch's CPU wheels>, see README.md" >&2; $(BIN)/pip uninstall --quiet --yes torch; exit 1; }
	grep -v '^torch==' requirements.lock | $(BIN)/pip install --quiet --no-deps --requirement /dev/stdin
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.baton-*
	@touch $@

run: setup ## start engines and gateway here and serve until Ctrl-C (CONFIG=..., PORT=...)
	@exec $(BIN)/baton serve $(CONFIG) $(if $(PORT),--port $(PORT))

test: setup ## run all tests, with real engines
	@exec $(BIN)/python -m pytest tests/unit tests/simulation tests/contracts tests/engine tests/cluster tests/api

check: setup ## lint, format, types, import rules, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit

compare: setup ## does splitting pay here? load systems in turns and write compare.html (SYSTEMS="aggregated split bare router", REPORT=...)
	@exec $(BIN)/python -m bench compare $(or $(SYSTEMS),aggregated split) --config $(CONFIG) --quick --check --html "$(or $(REPORT),compare.html)"

faults: setup ## kill and stop real processes under clients, 60 cases, goes on where it stopped (CASES=<patterns>, RESULTS=<folder>)
	@exec $(BIN)/python -m bench faults --check --results "$(or $(RESULTS),fault-results)" $(if $(CASES),--cases '$(CASES)')

lock: ## resolve requirements.lock anew from pyproject.toml, requirements.in and requirements.overrides
	@tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	$(PYTHON) -m venv "$$tools"; \
	"$$tools/bin/pip" install --quiet uv; \
	"$$tools/bin/uv" pip compile --quiet --python-version 3.11 --extra cpu --extra dev --extra bench --upgrade --no-header --no-annotate \
	  --override requirements.overrides --output-file "$$tools/lock" pyproject.toml requirements.in >/dev/null; \
	{ sed -n '/^#/p;/^[^#]/q' requirements.lock; sed '/^ *#/d' "$$tools/lock"; } > "$$tools/new"; \
	cp "$$tools/new" requirements.lock

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
