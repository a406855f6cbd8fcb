# Everything happens in a virtual environment of its own; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= moetrace-out
# Versions that tests and documents are run with.
LOCK := .github/constraints.txt
# A file of tests stays with one process, and those that take long come first (tests/conftest.py).
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moetrace needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(LOCK)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --group dev
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## Install moetrace into .venv

.PHONY: demo
demo: install ## Install, then run the main job on the sample traces
	$(BIN)/moetrace ingest --workspace $(OUT)
	$(BIN)/moetrace states --workspace $(OUT)
	$(BIN)/moetrace predict --horizon 2000 --workspace $(OUT)
	$(BIN)/moetrace report --workspace $(OUT)
	@echo "The report is in $(OUT)/report: open $(OUT)/report/report.html"

.PHONY: test
test: $(VENV)/.installed-dev ## Install what the tests need, then run them
	$(BIN)/python -m pytest $(PARALLEL) -m "not thorough" $(COVER)

.PHONY: test-thorough
test-thorough: $(VENV)/.installed-dev ## Run the rest: every odd trace, kill and pair of commands, the page in a browser
	$(BIN)/python -m pytest $(PARALLEL) -m thorough $(COVER)

.PHONY: test-quick
test-quick: $(VENV)/.installed-dev ## Run the tests that take no time
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not thorough"

.PHONY: test-browser
test-browser: $(VENV)/.installed-dev ## Look at the page of a report in Chromium
	$(BIN)/python -m pytest tests/reporting/test_browser.py

.PHONY: test-kernels
test-kernels: $(VENV)/.installed-dev ## Run the tests of documents and plans under another BLAS kernel
	OPENBLAS_CORETYPE=Prescott $(BIN)/python -m pytest $(PARALLEL) tests/test_docs.py tests/placement

.PHONY: coverage
coverage: $(VENV)/.installed-torch ## Run all tests, and show which lines and branches none of them reaches
	$(MAKE) test COVER="--cov --cov-report="
	$(MAKE) test-thorough COVER="--cov --cov-append --cov-report="
	$(MAKE) test-torch COVER="--cov --cov-append --cov-report="
	$(BIN)/coverage report --skip-covered --fail-under 95

$(VENV)/.installed-torch: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --group torch-tests
	@touch $@

.PHONY: test-torch
test-torch: $(VENV)/.installed-torch ## Install torch and transformers, then test what needs them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/with_torch tests/formats/test_formats_sglang.py tests/formats/test_formats_arrays.py tests/formats/test_tensors.py $(COVER)

# vLLM for CPUs brings torch, and packages built for another one. Of SGLang only the modules that read and make plans
# are run, of Megatron-Core and torchtitan the MoE layers: the rest needs a GPU, or packages that nothing here uses.
.venv-systems/.installed: pyproject.toml Makefile | $(BIN)/python
	$(PYTHON) -m venv .venv-systems
	.venv-systems/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-systems/bin/python -m pip install --quiet --group systems-tests --editable .
	.venv-systems/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-systems/bin/python -m pip install --quiet --no-deps sglang==0.5.23 megatron-core==0.16.1 torchtitan==0.3.0 spmd_types==0.2.3
	@touch $@

.PHONY: test-systems
test-systems: .venv-systems/.installed ## Record in vLLM, Megatron-Core and torchtitan; let SGLang read plans (5 GB)
	OMP_NUM_THREADS=1 .venv-systems/bin/python -m pytest tests/with_systems

.PHONY: fuzz
fuzz: $(VENV)/.installed-dev ## Damage dumps and traces, and kill ingests (FUZZ_SECONDS=60)
	$(BIN)/python tests/fuzz/readers.py
	$(BIN)/python tests/fuzz/flips.py
	$(BIN)/python tests/fuzz/kills.py

$(VENV)/.installed-mutants: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --group mutants
	@touch $@

.PHONY: mutants
mutants: $(VENV)/.installed-mutants $(VENV)/.installed-torch ## Change each package in small ways: do its tests notice? (PACKAGE=placement SAMPLE=120 SEED=1)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(PACKAGE) --sample $(or $(SAMPLE),120) --seed $(or $(SEED),1)

# The lowest versions that pyproject.toml declares, and the newest that are published, pre-releases included.
UV_TESTS := hypothesis pytest==9.2.0 pytest-xdist polars safetensors tensorboard "dask[distributed]" fsspec build hatchling
LOWEST := --resolution lowest-direct
NEWEST := --prerelease allow --upgrade

.PHONY: test-lowest
test-lowest: ## Run the tests with the lowest versions that are declared
	$(call tested,.venv-lowest,$(LOWEST))

.PHONY: test-newest
test-newest: ## Run the tests with the newest versions, pre-releases included
	$(call tested,.venv-newest,$(NEWEST))

define tested
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet uv
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) --editable ".[sql]"
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(UV_TESTS)
	$(1)/bin/python -m pytest $(PARALLEL) -m "not thorough" -W default::DeprecationWarning
endef

.PHONY: lock
lock: ## Pin the newest versions of what tests and documents are run with
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	echo "# Versions that the tests and the documents are run with; \`make lock\` brings them up to date." > $(LOCK)
	.venv-lock/bin/uv pip compile pyproject.toml --group dev --group site --universal --python-version 3.11 --no-annotate --no-header --quiet >> $(LOCK)

.PHONY: changelog
changelog: $(VENV)/.installed-dev ## Put the files of changes/ into the changelog (VERSION=X.Y.Z)
	$(BIN)/towncrier build --yes --version $(VERSION)

.PHONY: demo-wheel
demo-wheel: package ## Install the built wheel alone into a new environment, and run the demo with it
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	.venv-wheel/bin/moetrace ingest --workspace $(OUT)
	.venv-wheel/bin/moetrace report --predictor window_mean --workspace $(OUT)

.PHONY: package
package: $(VENV)/.installed-dev ## Build wheel and sdist into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

.PHONY: lint
lint: $(VENV)/.installed-dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

.PHONY: types
types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy
	cd tests && $(abspath $(BIN))/mypy --config-file mypy.ini .

.PHONY: format
format: $(VENV)/.installed-dev ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv-site/.installed: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-site/bin/python -m pip install --quiet --constraint $(LOCK) --group site
	@touch $@

.PHONY: site
site: .venv-site/.installed $(VENV)/.installed-dev ## Build the documentation site into site/, without a warning, and run axe on it
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --quiet --strict
	$(BIN)/python docs/accessibility.py site
	@echo "The site is in site/: open site/index.html, or run .venv-site/bin/mkdocs serve"

.PHONY: docs
docs: $(VENV)/.installed-dev ## Write the output of the commands into README and docs
	$(BIN)/python docs/generate.py

.venv-rivals/.installed: Makefile benchmarks/unpack.py | $(BIN)/python
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet torch==2.13.0
	.venv-rivals/bin/python -m pip install --quiet neuralforecast statsforecast numba
	.venv-rivals/bin/python -m pip install --quiet --no-deps sglang==0.5.23
	.venv-rivals/bin/python benchmarks/unpack.py vllm==0.33.0 vllm/distributed/eplb/policy
	.venv-rivals/bin/python benchmarks/unpack.py vllm-ascend==0.30.0rc2 vllm_ascend/eplb/core/policy
	@touch $@

.venv-bench/.installed: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-bench/bin/python -m pip install --quiet --group bench --editable .
	@touch $@

.PHONY: bench
bench: .venv-bench/.installed .venv-rivals/.installed .venv-systems/.installed ## Run the benchmarks, beside rivals in environments of their own
	MOETRACE_RIVALS=$(CURDIR)/.venv-rivals/bin/python MOETRACE_VLLM=$(CURDIR)/.venv-systems/bin/python .venv-bench/bin/python benchmarks/run.py

.PHONY: check
check: lint types test ## All of lint, types and test

.PHONY: clean
clean: ## Remove what was installed and made
	rm -rf $(VENV) .venv-* site $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants*
