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
NEWEST := .venv-newest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The quick tests in two processes, file by file. NumPy, torch and Concrete keep to one thread in each, or they
# wait for one another. A process that dies and a test that hangs fail the run. PROCESSES=0: all in one.
PROCESSES := 2
QUICK = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -m "not slow" --timeout 600 \
	-n $(PROCESSES) --dist loadfile --max-worker-restart 0
LOCK := requirements.lock
EXTRAS := tfhe plot serve ray gguf train smollm2 dev
SOURCES := pyproject.toml setup.py $(LOCK) $(wildcard engine/build_backend.py) \
	$(shell find engine \( -name '*.go' -o -name 'go.*' \) ! -name '*_test.go' 2>/dev/null)
# Bytecode is compiled when it is first imported: most of what packages bring never is.
PIP := -m pip --disable-pip-version-check install --quiet --no-compile
# The engine is built with a Go of the PATH or, where there is none, with the one that was just installed.
BUILD = PATH="$$PATH:$(CURDIR)/$(1)/bin" $(1)/bin/python $(PIP) --no-deps --no-build-isolation -e .

.PHONY: help setup lock demo test quick test-ray test-page test-newest test-oldest test-all mutants lint bench docs recording clean

help:
	@echo "make demo      generate text with a whole small model on real ciphertexts"
	@echo "make test      style, types and the quick tests: at most 7 minutes on 2 cores"
	@echo "make test-ray  the tests of a cluster"
	@echo "make test-page the tests of the web page, in Chromium"
	@echo "make test-all  the long encrypted tests too, with the newest and the oldest versions"
	@echo "make mutants   see that the tests notice an engine whose encryption is broken"
	@echo "make bench     measure what the README's tables say"
	@echo "make docs      write the API reference into docs/api, and the pages that scripts write"
	@echo "make recording record the demo of the README anew"
	@echo "make setup     make $(VENV) and nothing else (PYTHON=python3.12 chooses the Python)"
	@echo "make lock      write $(LOCK) anew: the newest versions that pyproject.toml allows"
	@echo "make clean     remove what was made here"

setup: $(READY)

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "CipherLM needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
		echo "Setting up without TFHE: Concrete has no wheels for $$($(PYTHON) -V). With Python 3.10 to 3.12: make clean setup PYTHON=python3.12"
	$(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time this downloads a few GB, most of it PyTorch"
	$(BIN)/python $(PIP) --no-deps --require-hashes -r $(LOCK)
	@$(call BUILD,$(VENV))
	@touch $@

# One lock for all platforms and versions of Python, with hashes.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --upgrade \
		--custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links \
		$(EXTRAS:%=--extra %) pyproject.toml -o $(LOCK)

demo: $(READY)
	@$(BIN)/cipherlm demo

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

# All but what `make test-ray` and `make test-page` run. Types are checked beside the first tests.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 lint quick

quick: $(READY)
	$(call QUICK,$(VENV)) --ignore tests/serving/test_ray.py --ignore tests/page

# Set-up brings Ray; on a Python for which there is none the tests say so and fail.
test-ray: $(READY)
	$(BIN)/python -c "import ray"
	$(BIN)/python -m pytest -m "not slow" tests/serving/test_ray.py

# Of the engine in WebAssembly under Node, and of the page in a browser. Nothing of it is skipped.
test-page: $(READY)
	PATH="$$PATH:$(CURDIR)/$(BIN)" $(BIN)/python page/build.py --check
	$(BIN)/python tests/page/chromium.py
	$(BIN)/python -m pytest tests/page

COMPATIBILITY := tests/test_loading.py tests/test_gguf.py tests/test_models*.py tests/test_chat.py tests/test_cli.py \
	tests/test_harness*.py tests/linear tests/serving

# The newest of everything that pyproject.toml allows, and the oldest of transformers.
test-newest: $(NEWEST)/.ready
	$(call QUICK,$(NEWEST)) $(COMPATIBILITY)

test-oldest: $(OLDEST)/.ready
	$(call QUICK,$(OLDEST)) $(COMPATIBILITY)

test-all: lint test-newest test-oldest
	@if command -v go >/dev/null; then cd engine && go vet ./... && go test ./core; \
		else echo "No go on the PATH: the engine's own tests are left out"; fi
	$(BIN)/python -m pytest --ignore tests/page
	$(MAKE) test-page
	$(BIN)/python tests/mutants/run.py

# ONLY=name builds one.
mutants: $(READY)
	$(BIN)/python tests/mutants/run.py $(ONLY:%=--only %)

# Made anew for every run: what is newest changes without a change here.
.PHONY: $(NEWEST)/.ready
$(NEWEST)/.ready:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(PIP) -e ".[tfhe,serve,gguf,train,eval,dev]"

$(OLDEST)/.ready: $(SOURCES)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -e ".[tfhe,serve,gguf,train,dev]" "transformers==4.57.*"
	@touch $@

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# What users call, and what research builds on.
API := cipherlm cipherlm.models.chat cipherlm.models.architecture cipherlm.linear \
	cipherlm.nn cipherlm.engine cipherlm.schemes.ckks.session cipherlm.evaluation.texts cipherlm.evaluation.chats \
	cipherlm.evaluation.fidelity cipherlm.serving.client

# The extra `docs` is no part of the lock.
DOCUMENT = $(BIN)/uv pip install --quiet --python $(BIN)/python -r pyproject.toml --extra docs

docs: $(READY)
	@$(DOCUMENT)
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/pictures.py
	$(BIN)/pdoc --docformat restructuredtext --output-directory docs/api $(API)
	@echo "Open docs/api/index.html"

recording: $(READY)
	@$(DOCUMENT)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/recording.py

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src engine -name '*.so' -delete
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
