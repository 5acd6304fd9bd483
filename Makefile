# Everything runs from the repository root. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow coverage lint bench tensorboard docs docs-fast screenshots clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is older than pyproject.toml only after an edit, so a second call costs nothing.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("bayesdiff needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv: several minutes and 6 GB the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@

setup: $(READY) ## make .venv and install the package with its tools

demo: $(READY) ## train, sample and report a small model on a CPU
	$(BIN)/python train.py experiment=demo

test: $(READY) ## run the fast tests, a file per core at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## run the long checks
	$(BIN)/python -m pytest -m slow

coverage: $(READY) ## run the fast tests and refuse less than 90 % of the package covered
	$(BIN)/python -m pytest -m "not slow" --cov=bayesdiff --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: $(READY) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure what uncertainty costs
	$(BIN)/python experiments/benchmark/run.py

tensorboard: $(READY) ## look at the runs in outputs/
	$(BIN)/tensorboard --logdir outputs

docs: $(READY) ## build the documentation, which runs its tutorials
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

docs-fast: $(READY) ## build the documentation without running its tutorials
	$(BIN)/python -m sphinx -W --keep-going -D plot_gallery=0 -b html docs docs/_build/html

# TensorBoard's pages in docs/start/tensorboard: make screenshots RUN=outputs/digits-flow-...
screenshots: $(READY) ## take the documentation's pictures of TensorBoard, by Chromium: RUN=outputs/...
	$(BIN)/python docs/_ext/screenshots.py $(RUN)

clean: ## remove caches, and the documentation that was built; keep .venv and outputs
	rm -rf docs/_build docs/gallery docs/studies docs/reference/api docs/reference/configuration
	rm -rf docs/sg_execution_times.rst docs/tutorials/outputs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* build dist *.egg-info
	find bayesdiff tests experiments docs -name __pycache__ -prune -exec rm -rf {} +
