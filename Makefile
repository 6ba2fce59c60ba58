# `make demo` and `make test` do everything on a fresh clone, the set-up included.

# Concrete (TFHE) has wheels for Python 3.10 to 3.12. A newer default gives way to one of those where it can.
ifndef PYTHON
PYTHON := $(shell \
	for python in python3 python3.12 python3.11 python3.10; do \
		$$python -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
			&& echo $$python && exit; \
	done; echo python3)
endif

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard engine/build_backend.py) \
	$(shell find engine \( -name '*.go' -o -name 'go.*' \) ! -name '*_test.go' 2>/dev/null)
PIP := -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help setup demo test test-all lint bench clean

help:
	@echo "make demo      generate text with a whole small model on real ciphertexts"
	@echo "make test      style, types and the tests that take minutes"
	@echo "make test-all  the long encrypted tests and the oldest transformers too"
	@echo "make bench     measure what the README's table says"
	@echo "make setup     make $(VENV) and nothing else (PYTHON=python3.12 chooses the Python)"
	@echo "make clean     remove what was made here"

setup: $(READY)

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "CipherLM needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
		echo "Setting up without TFHE: Concrete has no wheels for $$($(PYTHON) -V). With Python 3.10 to 3.12: make clean setup PYTHON=python3.12"
	$(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time this downloads a few GB, most of it PyTorch"
	$(BIN)/python $(PIP) -e ".[tfhe,plot,serve,dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/cipherlm demo

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint $(OLDEST)/.ready
	@if command -v go >/dev/null; then cd engine && go vet ./... && go test ./core; \
		else echo "No go on the PATH: the engine's own tests are left out"; fi
	$(OLDEST)/bin/python -m pytest -m "not slow" tests/test_loading.py tests/test_models*.py tests/test_cli.py
	$(BIN)/python -m pytest

# The other end of the range of transformers that pyproject.toml allows.
$(OLDEST)/.ready: $(SOURCES)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -e ".[tfhe,serve,dev]" "transformers==4.57.*"
	@touch $@

bench: $(READY)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src engine -name '*.so' -delete
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
