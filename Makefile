# `make` lists the targets. Each one creates .venv and builds what it needs; a second call does no
# work twice. Needs Python >= 3.10 and a C++20 compiler; says so where they are missing.

PYTHON ?= python3
VENV ?= .venv
ABI_VENV ?= .venv-abi

# Arguments for pytest, e.g. make test PYTEST_ARGS='-k kmeans -x'.
PYTEST_ARGS ?=
# Processes that share the tests, file by file; empty: one, with all the cores. Each gets one torch thread.
TEST_WORKERS ?=
# Of make fuzz; SANITIZER is address (with undefined behaviour), wide (the same, the code of 64-byte vectors) or thread.
SECONDS ?= 600
SANITIZER ?= address
FUZZ_SEED ?= 0
DEMO_ARGS ?= --preset demo --out runs/demo
# Arguments for pytest that select groups, e.g. make bench BENCH_ARGS='-k "kmeans and not scaling"'.
BENCH_ARGS ?=
BENCH_OUT ?= benchmarks/results/latest.json
WHEEL_DIR ?= dist

# The environment's variable, since it takes the place of a constraint in the user's own pip
# configuration; a -c on the command line would only be added to that.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start many processes; without byte code each of them compiles all of torch's modules again.
unexport PYTHONDONTWRITEBYTECODE
ifneq ($(filter command line environment,$(origin CXX)),)
export CXX
endif

PY := $(VENV)/bin/python
# Byte code of the few modules that are used is made when they are first imported.
PIP_INSTALL := -m pip install --no-compile --progress-bar off
ABI_PY := $(ABI_VENV)/bin/python
BUILD_REQUIREMENTS := setuptools ninja pybind11 numpy torch
NATIVE_SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)
FORMATTED_CPP = $(shell find csrc python_tests/hardening -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_CODE := .

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help build demo test fuzz bench bench-gate lint format docs wheel test-wheel gpu-check test-abi clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the environment -----------------------------------------------------------------------------

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not found: dse-ext needs Python 3.10 or newer (make PYTHON=/path/to/python3)" >&2; exit 1; }
	@$(PYTHON) tools/check_toolchain.py
	$(PYTHON) -m venv $(VENV)

# What is installed, and with it a first build. The build requirements come first: the package is
# built against the torch that it will run with, not in an isolated environment.
$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PY) $(PIP_INSTALL) $(BUILD_REQUIREMENTS)
	$(PY) $(PIP_INSTALL) --no-build-isolation -e '.[ssl,test,bench,dev]'
	@touch $@ $(VENV)/.native

# Ninja compiles again only what a change concerns.
$(VENV)/.native: $(VENV)/.installed $(NATIVE_SOURCES)
	@$(PY) tools/check_toolchain.py
	$(PY) setup.py build_ext --inplace
	@touch $@

build: $(VENV)/.native ## create .venv, install everything and build the native libraries

# --- what to do with it --------------------------------------------------------------------------

demo: build ## train, score and select on embedded photographs; writes runs/demo/report.html
	$(VENV)/bin/dse-ext train $(DEMO_ARGS)

test: build ## run the tests
	@$(PY) -m pytest python_tests $(if $(TEST_WORKERS),-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder) $(PYTEST_ARGS)

fuzz: build ## random calls of the CPU kernels under sanitizers; SECONDS=600 SANITIZER=address|wide|thread FUZZ_SEED=1
	@$(PY) python_tests/hardening/sanitized.py $(SANITIZER) --seconds $(SECONDS) --seed $(FUZZ_SEED)

bench: build ## time it against lightly, PyTorch, scikit-learn, faiss and scipy; prints tables of ratios
	@mkdir -p $(dir $(BENCH_OUT))
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-json=$(BENCH_OUT) $(BENCH_ARGS)
	@$(PY) -m benchmarks.report $(BENCH_OUT)

bench-gate: build ## fail where it has become slower in relation to its peers (a minute at most)
	@$(PY) -m benchmarks.gate

lint: build ## check style, types and formatting
	$(PY) -m ruff check $(PYTHON_CODE)
	$(PY) -m ruff format --check $(PYTHON_CODE)
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED_CPP)

format: build ## format the sources in place
	$(PY) -m ruff check --fix-only $(PYTHON_CODE)
	$(PY) -m ruff format $(PYTHON_CODE)
	$(VENV)/bin/clang-format -i $(FORMATTED_CPP)

docs: build ## build the documentation into build/docs; a broken link or formula is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Not isolated: built against the torch of .venv, not a fresh copy of some gigabytes.
wheel: build ## build dist/*.whl (manylinux) and dist/*.tar.gz; the wheel runs on every torch >= 2.11
	rm -rf build/lib.* build/bdist.* build/unrepaired  # of files that are gone by now
	$(PY) -m build --no-isolation --sdist --outdir $(WHEEL_DIR)
	$(PY) -m build --no-isolation --wheel --outdir build/unrepaired
	$(PY) tools/repair_wheel.py build/unrepaired/*.whl $(WHEEL_DIR)

# A wheel that is there: make test-wheel WHEEL=dist/NAME.whl.
WHEEL ?=
test-wheel: build $(ABI_VENV)/.installed ## install a wheel beside torch 2.15 and torch 2.13 and test it there
	@$(PY) tools/check_wheel.py $(if $(WHEEL),--wheel $(WHEEL)) $(PY) $(ABI_PY)

# Uses the Python that is there, not .venv: a machine with a GPU has a torch of its own and often no
# network. Writes into OUT.
OUT ?= runs/gpu-check
GPU_CHECK_ARGS ?=
gpu-check: ## on a machine with a GPU: build, test, sanitize and measure; OUT=folder for the results
	@$(PYTHON) tools/gpu_check.py --out $(OUT) $(GPU_CHECK_ARGS)

# --- one binary, many torches --------------------------------------------------------------------

# Of the same Python as .venv, which _C is built for, with an older torch and little else.
$(ABI_VENV)/.installed: constraints-abi.txt | $(VENV)/.installed
	$(PY) -m venv $(ABI_VENV)
	PIP_CONSTRAINT=constraints-abi.txt $(ABI_PY) $(PIP_INSTALL) torch numpy pytest
	@touch $@

test-abi: build $(ABI_VENV)/.installed ## run the same built libraries on torch 2.15 and on torch 2.13
	@$(PY) tools/check_abi.py $(PY) $(ABI_PY)

# --- cleaning ------------------------------------------------------------------------------------

clean: ## remove what was built, keep the environments
	rm -rf build $(WHEEL_DIR) *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
	rm -f dse_ext/_ops.so dse_ext/_cuda.so dse_ext/_C.*.so $(VENV)/.native
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf $(VENV) $(ABI_VENV)
