# Every target makes .venv from pyproject.toml when it is missing or out of date; nothing else needs to be installed first.
# uv is used where it is on the PATH, else venv and pip of $(PYTHON).

PYTHON ?= python3
THREADS ?= 1
STAMP := .venv/.installed
RUN := OMP_NUM_THREADS=$(THREADS)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint bench build

help:
	@echo "make quickstart   install, then distil the shipped teacher, export, evaluate and report (runs/quickstart)"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-all     all the tests"
	@echo "make lint         ruff and mypy"
	@echo "make bench        the benchmarks in benchmarks/"
	@echo "make build        sdist, and the wheel built from it, in dist/"

# The stamp is written last, so an interrupted install is taken up again.
$(STAMP): pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  echo "==> installing fastgen and its dependencies into .venv (uv, about a minute the first time)" && \
	  { test -x .venv/bin/python || uv venv --quiet --python '>=3.11' .venv; } && \
	  uv pip install --python .venv/bin/python --editable '.[dev]'; \
	else \
	  echo "==> installing fastgen and its dependencies into .venv (pip, a few minutes the first time)" && \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.x")' && \
	  { test -x .venv/bin/python || $(PYTHON) -m venv .venv; } && \
	  { .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip; } && \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'; \
	fi
	@touch $@

quickstart: $(STAMP)
	@echo "==> fastgen quickstart"
	@.venv/bin/fastgen quickstart

test: $(STAMP)
	@echo "==> tests (without the slow ones)"
	@$(RUN) .venv/bin/python -m pytest -q -m "not slow"

test-all: $(STAMP)
	@echo "==> all tests"
	@$(RUN) .venv/bin/python -m pytest -q

lint: $(STAMP)
	@echo "==> ruff"
	@.venv/bin/ruff check .
	@echo "==> mypy"
	@.venv/bin/mypy

bench: $(STAMP)
	@echo "==> benchmarks"
	@$(RUN) .venv/bin/python -m benchmarks

build: $(STAMP)
	@echo "==> sdist, and the wheel from it"
	@rm -rf dist
	@.venv/bin/python -m build --no-isolation --outdir dist .
